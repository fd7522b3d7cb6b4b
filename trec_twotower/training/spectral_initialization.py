"""Spectral initialization: a truncated SVD of the interaction matrix as initial weights of two tables.

R is the matrix of users and items in train/, n_u and d_i are its row and column sums:

    N = D_u^-user_power R D_i^-item_power  ~  U diag(s) V^T      at rank k, the tables' dim
    history table   A_i = d_i^-history_power (s / s_1)^spectrum_power * V_i
    item table      B_i = d_i^length_power V_i

With diagonal_share = g, V and s^2 are eigenvectors and eigenvalues of N^T N - g diag(N^T N), because the co-occurrence
of an item with itself carries no information on other items.

A user vector is the sum of A over the user's items. The score of an item is the dot product with B, whose length
reflects the popularity of the item. With all powers .5, length_power 0 and spectrum_power 1 this is PureSVD of the
normalized matrix. The decomposition is a randomized SVD with power iterations (Halko, Martinsson, Tropp 2011) on the
item side, which every rank holds whole. The rows of users are distributed over the ranks and processed in blocks, so a
rank needs memory for the interactions of its users and some matrices of (items, k + oversampling).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trec_twotower.config.base import Side
from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import BagFeature, IdFeature
from trec_twotower.config.model import Pooling
from trec_twotower.config.schema import Schema
from trec_twotower.config.training import SpectralConfig
from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.data.dataset import ITEM_ID, POSITIVES, USER_ID
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.hashed import buckets
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.model.embeddings import table_shards
from trec_twotower.ops.hashing import SPLITMIX_STEP, id_keys
from trec_twotower.ops.ragged import offsets_of

BLOCK_ROWS = 1 << 16  # users per block


@dataclass(frozen=True)
class Interactions:
    """Distinct user-item pairs: users 0 .. num_users - 1 of this rank, ascending, and catalogue rows."""

    user_P: np.ndarray
    item_P: np.ndarray
    num_users: int
    num_items: int

    @classmethod
    def read(cls, sources: FeatureDataset, ranks: Ranks) -> Interactions:
        """Return the interactions of this rank's share of the users in train/.

        With one row per user the ranks share the row groups; with one row per event, a hash of the id assigns the user.
        """
        train, users, items = sources.dataset.train, [], []
        by_event = sources.rows == "event"
        num_users = 0
        for number, (group, table) in enumerate(train.tables([USER_ID, ITEM_ID] if by_event else [POSITIVES])):
            if by_event:
                key = id_keys(one_chunk(table[USER_ID]), str(group))
                is_mine = _hashed(key) % np.uint64(ranks.num_ranks) == ranks.rank
                table = table.filter(pa.array(is_mine))
                users.append(key[is_mine])
                items.append(sources.positives(table, str(group)).values)
            elif number % ranks.num_ranks == ranks.rank:
                positives = sources.positives(table, str(group))
                users.append(positives.rows + num_users)
                items.append(positives.values)
                num_users += len(positives)
        user, item = (np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64) for parts in (users, items))
        if by_event:
            distinct, user = np.unique(user, return_inverse=True)
            num_users = len(distinct)
        num_items = len(sources.catalogue)
        pairs = np.unique(user * num_items + item)
        return cls(pairs // num_items, pairs % num_items, num_users, num_items)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Yield users (from 0 in each block), items and the number of users of each block."""
        for first in range(0, self.num_users, BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, self.num_users)
            low, high = np.searchsorted(self.user_P, [first, last])
            yield self.user_P[low:high] - first, self.item_P[low:high], last - first


def spectral_tables(
    interactions: Interactions, dim: int, start: SpectralConfig, seed: int, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Return (A, B), each (I, dim) float32, equal on all ranks, which call this together.

    Raises DataError if there are too few items or users for the rank `dim`.
    """
    wide = dim + start.oversampling
    num_users, num_items = int(ranks.sum(np.array([interactions.num_users]))[0]), interactions.num_items
    if min(num_users, num_items) < dim:
        raise DataError(
            f"train.spectral needs the rank of the tables' dim {dim}, but a matrix of {num_users:,} users and "
            f"{num_items:,} items has no such rank: lower dim."
        )
    wide = min(wide, num_users, num_items)
    weight_U = np.bincount(interactions.user_P, minlength=interactions.num_users).astype(np.float32)
    count_I = ranks.sum(np.bincount(interactions.item_P, minlength=num_items)).astype(np.float32)
    scale_U = np.maximum(weight_U, 1) ** -start.user_power
    scale_I = np.maximum(count_I, 1) ** -start.item_power
    blocks = [
        _Block.of(scale_U[first : first + count, None], scale_I, user, item, count, num_items, ranks.device)
        for first, (user, item, count) in zip(
            range(0, interactions.num_users, BLOCK_ROWS), interactions.blocks(), strict=True
        )
    ]

    square_P = (scale_U[interactions.user_P] * scale_I[interactions.item_P]) ** 2
    diagonal_I = ranks.sum(np.bincount(interactions.item_P, square_P, num_items))
    removed_I1 = torch.from_numpy(start.diagonal_share * diagonal_I).float().to(ranks.device)[:, None]

    def squared(basis_IK: Tensor) -> Tensor:
        """Return N^T N, without the share of its diagonal, times a basis."""
        product_IK = torch.zeros_like(basis_IK)
        for block in blocks:
            product_IK += block.of_items @ (block.of_users @ basis_IK)
        return _summed(product_IK, ranks) - removed_I1 * basis_IK

    noise = torch.randn(num_items, wide, generator=torch.Generator().manual_seed(seed)).to(ranks.device)
    basis_IK = noise
    for _ in range(start.iterations + 1):
        basis_IK = _shared(torch.linalg.qr(squared(basis_IK))[0], ranks)
    gram_KK = (basis_IK.T @ squared(basis_IK)).double()
    values, vectors = torch.linalg.eigh((gram_KK + gram_KK.T) / 2)
    strength_D = values.flip(0)[:dim].clamp(min=0).sqrt().float()
    vector_ID = basis_IK @ vectors.flip(1)[:, :dim].float()

    count = torch.from_numpy(count_I).to(ranks.device)
    is_taken = (count > 0).float()[:, None]  # items without interactions have d_i = 0
    count = count.clamp(min=1)[:, None]
    relative_D = strength_D / strength_D[0].clamp(min=1e-30)
    history_ID = vector_ID * count**-start.history_power * relative_D**start.spectrum_power * is_taken
    item_ID = vector_ID * count**start.length_power * is_taken
    return _shared(history_ID, ranks), _shared(item_ID, ranks)


def spread(interactions: Interactions, history_ID: Tensor, item_ID: Tensor, pooling: Pooling, ranks: Ranks) -> float:
    """Return the standard deviation of the scores of all users and items. All ranks call together.

    A user vector is pooled from all interactions. The mean of (u . v)^2 over users u and items v is the sum of the
    elementwise product of E[u u^T] and E[v v^T], so no score is computed.
    """
    dim = history_ID.shape[1]
    power = {"mean": 1.0, "sqrtn": 0.5, "sum": 0.0}[pooling]
    gram_DD, total_D = torch.zeros(dim, dim, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
    for user, item, count in interactions.blocks():
        scale = np.maximum(np.bincount(user, minlength=count), 1).astype(np.float32) ** -power
        of_users = _sparse(user, item, scale[user], (count, interactions.num_items)).to(history_ID.device)
        user_UD = of_users @ history_ID
        gram_DD += (user_UD.T @ user_UD).cpu()
        total_D += user_UD.sum(0).cpu()
    num_users = float(ranks.sum(np.array([interactions.num_users]))[0])
    user_DD, user_D = (torch.from_numpy(ranks.sum(each.numpy())) / num_users for each in (gram_DD, total_D))
    item_DD = (item_ID.T @ item_ID).double().cpu() / len(item_ID)
    mean = float(user_D @ item_ID.double().mean(0).cpu())
    return max(float((user_DD * item_DD).sum()) - mean**2, 0.0) ** 0.5


def start_spectral(
    model: nn.Module, schema: Schema, start: SpectralConfig, sources: FeatureDataset, seed: int, ranks: Ranks
) -> None:
    """Write the spectral initialization to the two tables. All ranks call together.

    A table row shared by several items gets their mean; rows without an item become zero.
    """
    check_start(schema, start)
    history, item = _feature(schema, "user", start.history), _feature(schema, "item", start.item)
    interactions = ranks.together(lambda: Interactions.read(sources, ranks))
    history_ID, item_ID = spectral_tables(interactions, schema.table_of(history).dim, start, seed, ranks)
    if start.score_std is not None:
        history_ID *= start.score_std / max(
            spread(interactions, history_ID, item_ID, history.pooling_mode, ranks), 1e-30
        )
    ids = sources.catalogue.ids
    wanted = {}
    for feature, vector_ID in zip((history, item), (history_ID, item_ID), strict=True):
        row_I = buckets(schema.table_of(feature), ids, "the catalogue")
        wanted[feature.table_name] = torch.from_numpy(row_I.astype(np.int64)).to(ranks.device), vector_ID
    with torch.no_grad():
        for name, weights, (first_row, first_column) in table_shards(model):
            if name not in wanted:
                continue
            row_I, vector_ID = wanted[name]
            rows, columns = weights.shape
            is_here = (row_I >= first_row) & (row_I < first_row + rows)
            place = (row_I[is_here] - first_row).to(weights.device)
            value = vector_ID[is_here, first_column : first_column + columns].to(weights.device)
            share = torch.bincount(place, minlength=rows).clamp(min=1).to(value.dtype)
            weights.zero_()
            weights.index_add_(0, place, (value / share[place, None]).to(weights.dtype))


def check_start(schema: Schema, start: SpectralConfig) -> None:
    """Raise ConfigError if the features of train.spectral cannot have a spectral initialization."""
    history, item = _feature(schema, "user", start.history), _feature(schema, "item", start.item)
    if not isinstance(history, BagFeature | IdFeature) or not isinstance(item, IdFeature):
        raise ConfigError(
            f"train.spectral names the user feature {history.name!r} of kind {history.kind} and the item feature "
            f"{item.name!r} of kind {item.kind}: it needs the bag of a user's items, and the item's id."
        )
    if history.table_name == item.table_name:
        raise ConfigError(
            f"train.spectral gives {history.name!r} and {item.name!r} different weights, but both look up table "
            f"{item.table_name!r}: give each a table."
        )
    one, other = schema.table_of(history).dim, schema.table_of(item).dim
    for feature in (history, item):
        if schema.table_of(feature).hashes == 2:
            raise ConfigError(
                f"train.spectral fills a row for each id, but table {feature.table_name!r} has hashes: 2: set it to 1."
            )
    if one != other:
        raise ConfigError(
            f"train.spectral needs tables of one dim, but {history.table_name!r} has {one} and {item.table_name!r} "
            f"{other}: make them equal."
        )


def _feature(schema: Schema, side: Side, name: str) -> FeatureSpec:
    found = [feature for feature in schema.layout.table_features(side) if feature.name == name]
    if not found:
        known = ", ".join(feature.name for feature in schema.layout.table_features(side)) or "none"
        setting = "history" if side == "user" else "item"
        raise ConfigError(f"train.spectral.{setting} is {name!r}, but the {side} features with tables are: {known}.")
    return found[0]


@dataclass(frozen=True)
class _Block:
    """The normalized matrix N of some users, by user and by item."""

    of_users: Tensor  # sparse (U, I)
    of_items: Tensor  # sparse (I, U)

    @classmethod
    def of(
        cls,
        scale_U1: np.ndarray,
        scale_I: np.ndarray,
        user: np.ndarray,
        item: np.ndarray,
        num_users: int,
        num_items: int,
        device: torch.device,
    ) -> _Block:
        value = scale_U1[user, 0] * scale_I[item]
        by_item = np.argsort(item, kind="stable")
        return cls(
            _sparse(user, item, value, (num_users, num_items)).to(device),
            _sparse(item[by_item], user[by_item], value[by_item], (num_items, num_users)).to(device),
        )


def _sparse(row: np.ndarray, column: np.ndarray, value: np.ndarray, shape: tuple[int, int]) -> Tensor:
    """Return the matrix of entries in ascending order of rows."""
    ends = offsets_of(np.bincount(row, minlength=shape[0]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks)", UserWarning)
        return torch.sparse_csr_tensor(
            torch.from_numpy(ends.astype(np.int64)),
            torch.from_numpy(column),
            torch.from_numpy(value),
            shape,
            check_invariants=False,
        )


def _hashed(key: np.ndarray) -> np.ndarray:
    """Hash ids, because neighbouring ids may be similar users."""
    return (key.astype(np.uint64) * SPLITMIX_STEP) >> np.uint64(32)


def _summed(value: Tensor, ranks: Ranks) -> Tensor:
    if ranks.num_ranks > 1:
        dist.all_reduce(value)
    return value


def _shared(value: Tensor, ranks: Ranks) -> Tensor:
    """Return the first rank's values, because the last bits of a decomposition may differ between machines."""
    if ranks.num_ranks > 1:
        value = value.contiguous()
        dist.broadcast(value, 0)
    return value
