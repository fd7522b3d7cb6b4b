"""Losses over the B x C matrix of logits, computed in blocks of rows: the whole matrix is never in memory.

A `Rule` returns the loss of a block of rows and its derivative with respect to each logit. This module computes the
logits, masks cells that are not negatives, and turns the derivatives into gradients with two matrix multiplications.
Both happen in the forward pass, so memory is O(B + C + pairs + block).

A multi-interest user has M vectors, (B, M, D). Its logit is the maximum over the vectors, as in retrieval, and the
gradient goes to the vector that has the maximum. This costs M times the matrix multiplications.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trec_twotower.data.loading.pairs import Pairs
from trec_twotower.model.losses.negative_cells import BestVectors, NegativeCells, best_vectors
from trec_twotower.model.losses.pair_products import add_products, dots
from trec_twotower.model.losses.relations import Relations

Precision = Literal["fp32", "bf16", "bf16_logits"]

# Cells per block. On CPU 2 MiB of float32, which stays in the cache, and twice that for bfloat16, since oneDNN reorders
# the candidates for each matrix multiplication. On a GPU a block is large enough to keep it busy.
BLOCK_CELLS = {"cpu": 1 << 19, "cuda": 1 << 26}
BLOCK_ROWS = 96


@dataclass
class Block:
    """A block of rows: the logits of their negatives, and their pairs. A rule may overwrite the logits."""

    logit_bC: Tensor  # -inf where a cell is not a negative
    weight_bC: Tensor | None  # weight of each negative; None: all 1
    total_weight_b: Tensor  # sum over the negatives of each row
    row_p: Tensor  # row within the block, ascending
    logit_p: Tensor
    weight_p: Tensor
    label_p: Tensor

    def mean_factor(self) -> Tensor:
        """Return (b,): 1 / the total weight of a row's negatives; 1 for a row without."""
        return 1 / self.total_weight_b.where(self.total_weight_b > 0, 1.0)

    def per_row(self, value_p: Tensor) -> Tensor:
        """Return (b,): the sum over each row's pairs."""
        return torch.zeros_like(self.total_weight_b).index_add_(0, self.row_p, value_p)


@dataclass
class LossGradients:
    """The loss of a block and its derivatives with respect to the logits."""

    loss: Tensor  # scalar
    cell_bC: Tensor  # to be multiplied by factor_b; 0 where a cell is not a negative
    factor_b: Tensor
    pair_p: Tensor


Rule = Callable[[Block], LossGradients]


def scaled(user_BD: Tensor, item_CD: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Return vectors whose dot products are logits, in float32 or float64. A learned temperature gets its gradient."""
    wide = torch.float64 if user_BD.dtype == torch.float64 else torch.float32
    return user_BD.to(wide) / temperature, item_CD.to(wide)


def select_vectors(user_BD: Tensor, item_CD: Tensor, pairs: Pairs) -> tuple[Tensor, Pairs]:
    """Return vectors as (rows, D) and the pairs with the row of the user vector that has the highest dot product."""
    if user_BD.ndim == 2:
        return user_BD, pairs
    best_P = best_vectors(user_BD.detach(), item_CD.detach(), pairs.row_P, pairs.column_P)
    return user_BD.flatten(0, 1), replace(pairs, row_P=pairs.row_P * user_BD.shape[1] + best_P)


def pair_logits(user_BD: Tensor, item_CD: Tensor, pairs: Pairs) -> Tensor:
    """Return (P,): the dot product of each pair, without holding P vectors in memory."""
    user_BD, pairs = select_vectors(user_BD, item_CD, pairs)
    with torch.autocast(user_BD.device.type, enabled=False):
        return _PairLogits.apply(user_BD, item_CD, pairs.row_P, pairs.column_P)


def chunked_loss(
    user_BD: Tensor,
    item_CD: Tensor,
    relations: Relations,
    rule: Rule,
    *,
    pairs: Pairs | None = None,
    logit_P: Tensor | None = None,
    given_apart: bool = False,
    weights: bool = False,
    precision: Precision = "fp32",
) -> Tensor:
    """Return the sum of the rule's loss over all blocks: a scalar with gradients for the vectors and `logit_P`.

    The rule sees the logits u . v - log q of each row's negatives and of the row's `pairs` (default: the positives).
    The negatives of a row are the columns in `is_negative_C` and the pairs with label 0 or less, without known pairs;
    with `given_apart` without any given pair.

    With `weights` the logits are u . v, and `Block.weight_bC` holds 1 / q times the weight of negatives that are not
    among the hardest. Without it, the log of that weight is added to the logits.

    With precision "bf16" the matrix multiplications of the gradients are in bfloat16 (relative error about 1e-3). With
    "bf16_logits" the logits of the negatives are, too, and are rounded to bfloat16 before log q is subtracted.
    """
    has_own_pairs = pairs is None and user_BD.ndim == 2  # _ChunkedLoss computes their gradients
    with torch.autocast(user_BD.device.type, enabled=False):
        if pairs is None:
            pairs = relations.positive
            if has_own_pairs:
                logit_P = dots(user_BD.detach(), pairs.row_P, item_CD.detach(), pairs.column_P)
            else:
                logit_P = pair_logits(user_BD, item_CD, pairs)
            logit_P = logit_P if weights else relations.corrected(logit_P, pairs)
        assert logit_P is not None
        order_P = None if _is_rising(pairs.row_P) else torch.argsort(pairs.row_P, stable=True)
        parts = [pairs.row_P, pairs.column_P, logit_P, pairs.weights(logit_P).detach(), pairs.labels(logit_P).detach()]
        row_P, column_P, logit_P, weight_P, label_P = parts if order_P is None else [part[order_P] for part in parts]
        negatives = NegativeCells.of(user_BD.detach(), item_CD.detach(), relations, given_apart, weights)
        return _ChunkedLoss.apply(
            user_BD,
            item_CD,
            logit_P,
            (row_P, column_P if has_own_pairs else None, weight_P, label_P),
            negatives,
            rule,
            precision,
            relations.push_C,
        )


def row_log_sum_exp(value_P: Tensor, row_P: Tensor, num_rows: int) -> Tensor:
    """Return (rows,): the log of the sum of exp over the pairs of each row; 0 for a row without pairs."""
    peak = value_P.new_full((num_rows,), float("-inf"))
    peak = peak.scatter_reduce(0, row_P, value_P.detach(), "amax")
    peak = peak.where(peak > float("-inf"), 0.0)
    total = torch.zeros_like(peak).index_add(0, row_P, (value_P - peak[row_P]).exp())
    return peak + total.where(total > 0, 1.0).log()


def softplus_sum(value_bC: Tensor, weight_bC: Tensor | None = None) -> Tensor:
    """Return (b,): the (weighted) sum of log(1 + exp(value)) of each row, without overflow."""
    scratch_bC = value_bC.abs().neg_().exp_().log1p_()
    total_b = weighted_sum(scratch_bC, weight_bC)
    return total_b + weighted_sum(torch.clamp(value_bC, min=0, out=scratch_bC), weight_bC)


def weighted_sum(value_bC: Tensor, weight_bC: Tensor | None) -> Tensor:
    """Return (b,): the sum of weight * value of each row; without weights, of the values."""
    return value_bC.sum(1) if weight_bC is None else torch.linalg.vecdot(value_bC, weight_bC)


def rows_a_block(num_columns: int, device: torch.device, is_narrow: bool) -> int:
    cells = BLOCK_CELLS["cpu"] << is_narrow if device.type == "cpu" else BLOCK_CELLS["cuda"]
    return max(BLOCK_ROWS, cells // max(num_columns, 1))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        user_BD: Tensor,
        item_CD: Tensor,
        logit_P: Tensor,
        pairs: tuple[Tensor, Tensor | None, Tensor, Tensor],
        negatives: NegativeCells,
        rule: Rule,
        precision: Precision,
        push_C: Tensor | None,
    ) -> Tensor:
        row_P, column_P, weight_P, label_P = pairs
        num_rows, num_columns = user_BD.shape[0], item_CD.shape[0]
        narrow = user_BD.dtype if precision == "fp32" else torch.bfloat16
        size = rows_a_block(num_columns, user_BD.device, narrow != user_BD.dtype)
        size = -(-num_rows // -(-num_rows // size)) if num_rows else size  # blocks of nearly equal size
        edges_P, edges_shut, edges_opened = negatives.block_edges(row_P, num_rows, size)
        cells = max(size * num_columns, 1)
        # Indices within their block.
        row_p, shut, opened = row_P % size, negatives.shut % cells, negatives.opened % cells

        room = user_BD.new_empty(min(size, num_rows), num_columns)  # one block, reused
        narrow_CD = item_CD.to(narrow)
        loss = user_BD.new_zeros(())
        user_BMD = user_BD if user_BD.ndim == 3 else user_BD[:, None]
        num_vectors = user_BMD.shape[1]
        grad_user_BMD = torch.empty_like(user_BMD) if num_columns else torch.zeros_like(user_BMD)
        grad_item_DC = torch.zeros_like(item_CD.T, memory_format=torch.contiguous_format)
        grad_logit_P = torch.zeros_like(logit_P)
        several = BestVectors(room) if num_vectors > 1 else None
        weight_room = None if negatives.weight_C is None else torch.empty_like(room)
        narrow_room = None if narrow == room.dtype else torch.empty_like(room, dtype=narrow)
        for number, start in enumerate(range(0, num_rows if num_columns else 0, size)):
            stop = min(start + size, num_rows)
            mine = slice(edges_P[number], edges_P[number + 1])
            part_bMD = user_BMD[start:stop]
            logit_bC = room[: stop - start]
            narrow_bC = None if narrow_room is None else narrow_room[: stop - start]
            if precision == "bf16_logits":
                _narrow_products(logit_bC, narrow_bC, part_bMD[:, 0].to(narrow), narrow_CD, negatives.offset_C)
            else:
                torch.addmm(negatives.offset_C, part_bMD[:, 0], item_CD.T, out=logit_bC)
            if several is not None:
                several.raise_to_best(logit_bC, negatives.offset_C, part_bMD, item_CD)
            negatives.mask(
                logit_bC,
                shut[edges_shut[number] : edges_shut[number + 1]],
                opened,
                slice(edges_opened[number], edges_opened[number + 1]),
                several,
            )
            own_room = None if weight_room is None else weight_room[: stop - start]
            weights = negatives.weigh(own_room, logit_bC, slice(start, stop))
            pair_values = (each[mine] for each in (row_p, logit_P, weight_P, label_P))
            slopes = rule(Block(logit_bC, *weights, *pair_values))
            loss += slopes.loss
            grad_logit_P[mine] = slopes.pair_p
            factor_b1 = slopes.factor_b[:, None]
            for vector in range(num_vectors):
                cell_bC = slopes.cell_bC if several is None else several.of(vector, slopes.cell_bC)
                cell_bC = cell_bC if narrow_bC is None else narrow_bC.copy_(cell_bC)
                weighted_Db = (factor_b1 * part_bMD[:, vector]).to(narrow).T
                grad_bD = grad_user_BMD[start:stop, vector]
                _add_gradients(grad_bD, grad_item_DC, cell_bC, weighted_Db, narrow_CD)
                grad_bD *= factor_b1
        del room, narrow_room, several, weight_room
        grad_user_BD, grad_item_CD = grad_user_BMD.view_as(user_BD), grad_item_DC.T.contiguous()
        if push_C is not None:
            grad_item_CD *= push_C[:, None]
        if column_P is not None:
            add_products(grad_user_BD, row_P, grad_logit_P, item_CD, column_P)
            add_products(grad_item_CD, column_P, grad_logit_P, user_BD, row_P)
        ctx.save_for_backward(grad_user_BD, grad_item_CD, grad_logit_P)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *(made * gradients[0] for made in ctx.saved_tensors), None, None, None, None, None


def _narrow_products(
    logit_bC: Tensor, narrow_bC: Tensor | None, user_bD: Tensor, item_CD: Tensor, offset_C: Tensor
) -> None:
    """Write the dot products of bfloat16 vectors, rounded to bfloat16, plus `offset_C` into `logit_bC`."""
    assert narrow_bC is not None
    torch.mm(user_bD, item_CD.T, out=narrow_bC)
    logit_bC.copy_(narrow_bC)
    logit_bC += offset_C


def _add_gradients(
    grad_bD: Tensor, grad_item_DC: Tensor, slope_bC: Tensor, weighted_Db: Tensor, item_CD: Tensor
) -> None:
    """Write the gradient of a block of users to `grad_bD`, and add that of the items to `grad_item_DC`.

    `grad_item_DC` is (D, C), because this matrix multiplication is faster than its transpose.
    """
    if slope_bC.dtype == grad_bD.dtype:
        torch.mm(slope_bC, item_CD, out=grad_bD)
        grad_item_DC.addmm_(weighted_Db, slope_bC)
    else:
        grad_bD.copy_(slope_bC @ item_CD)
        grad_item_DC += weighted_Db @ slope_bC


class _PairLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, user_BD: Tensor, item_CD: Tensor, row_P: Tensor, column_P: Tensor) -> Tensor:
        ctx.save_for_backward(user_BD, item_CD, row_P, column_P)
        return dots(user_BD, row_P, item_CD, column_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        user_BD, item_CD, row_P, column_P = ctx.saved_tensors
        grad_user_BD, grad_item_CD = torch.zeros_like(user_BD), torch.zeros_like(item_CD)
        add_products(grad_user_BD, row_P, gradients[0], item_CD, column_P)
        add_products(grad_item_CD, column_P, gradients[0], user_BD, row_P)
        return grad_user_BD, grad_item_CD, None, None


def _is_rising(values: Tensor) -> bool:
    return len(values) < 2 or bool((values[1:] >= values[:-1]).all())
