"""Vectors of many users or items, block by block, from a model that is spread over the ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trec_twotower.config.base import Side
from trec_twotower.data.features.transform import Columns
from trec_twotower.data.loading.batch import make_batch
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.model.two_tower import TwoTower

BLOCK_ROWS = 8192  # rows encoded together


@torch.no_grad()
def encode(model: TwoTower, side: Side, columns: Columns, ranks: Ranks) -> Tensor:
    """(rows, D): the vectors of this rank's `columns`, in their order; all ranks call together, with any row counts.

    Raises ConfigError after the end of the ranks' `start_ranks` block.
    """
    ranks.check_active()
    was_training = model.training
    model.eval()
    schema = model.schema
    largest = max(ranks.sizes(columns.num_rows))
    vectors = []
    for start in range(0, max(largest, 1), BLOCK_ROWS):  # once at least: no rows are still (0, D)
        part = columns.take(np.arange(min(start, columns.num_rows), min(start + BLOCK_ROWS, columns.num_rows)))
        user, item = (part, None) if side == "user" else (None, part)
        # Row-wise tables want batches of one size on all ranks.
        batch = make_batch(schema, user, item, num_rows=min(BLOCK_ROWS, largest - start)).to(ranks.device)
        vectors.append(model.encode_users(batch) if side == "user" else model.encode_items(batch))
    model.train(was_training)
    return torch.cat(vectors)


def encode_share(model: TwoTower, side: Side, columns: Columns, ranks: Ranks) -> Tensor:
    """The vectors of this rank's share of `columns`, which all ranks hold."""
    mine = ranks.share(columns.num_rows)
    return encode(model, side, columns.slice(mine.start, mine.stop), ranks)


def encode_everywhere(model: TwoTower, side: Side, columns: Columns, ranks: Ranks) -> Tensor:
    """All vectors on every rank, each rank having made its share."""
    mine = encode_share(model, side, columns, ranks)
    return ranks.gather(mine, ranks.sizes(mine.shape[0])).detach()
