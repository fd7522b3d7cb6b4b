"""Encode many users or items in blocks with a sharded model."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trec_twotower.config.base import Side
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.loading.batch import make_batch
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.model.two_tower import TwoTower

BLOCK_ROWS = 8192  # rows per block


@torch.no_grad()
def encode(model: TwoTower, side: Side, columns: Columns, ranks: Ranks) -> Tensor:
    """Return (rows, D): the vectors of this rank's `columns`. All ranks call together, with any number of rows.

    Raises ConfigError after the end of the ranks' `start_ranks` block.
    """
    ranks.check_active()
    was_training = model.training
    model.eval()
    schema = model.schema
    largest = max(ranks.sizes(columns.num_rows))
    vectors = []
    for start in range(0, max(largest, 1), BLOCK_ROWS):  # at least once, so that the result of no rows is (0, D)
        part = columns.take(np.arange(min(start, columns.num_rows), min(start + BLOCK_ROWS, columns.num_rows)))
        user, item = (part, None) if side == "user" else (None, part)
        # Row-wise sharded tables need batches of the same size on all ranks.
        batch = make_batch(schema, user, item, num_rows=min(BLOCK_ROWS, largest - start)).to(ranks.device)
        vectors.append(model.encode_users(batch) if side == "user" else model.encode_items(batch))
    model.train(was_training)
    return torch.cat(vectors)


def encode_share(model: TwoTower, side: Side, columns: Columns, ranks: Ranks) -> Tensor:
    """Return the vectors of this rank's share of `columns`, which all ranks have."""
    mine = ranks.share(columns.num_rows)
    return encode(model, side, columns.slice(mine.start, mine.stop), ranks)


def encode_everywhere(model: TwoTower, side: Side, columns: Columns, ranks: Ranks) -> Tensor:
    """Return all vectors on every rank; each rank encodes its share."""
    mine = encode_share(model, side, columns, ranks)
    return ranks.gather(mine, ranks.sizes(mine.shape[0])).detach()
