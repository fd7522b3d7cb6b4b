"""Which cells of a block of logits are negatives, with what weight; the best of the vectors of multi-interest users."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trec_twotower.model.cpu.loss_kernels import dots
from trec_twotower.model.losses.relations import Hardest, Relations, cells_of


@dataclass(frozen=True)
class NegativeCells:
    """Which cells are negatives: columns by their offset, and cells by number (row * W + column), rising, distinct.

    The W columns of the matrix are the candidates and, on CPUs, some behind them that are nobody's negatives.
    """

    offset_W: Tensor  # -log q, and -inf for columns that are not everybody's negatives
    shut: Tensor  # cells of negative columns that are none
    opened: Tensor  # cells of other columns that are some
    opened_logit: Tensor
    opened_best: Tensor  # which of a row's vectors that is of
    num_negatives_B: Tensor
    hardest: Hardest | None
    weight_W: Tensor | None  # for a rule that weights: of each column, 0 where it is not everybody's negative

    @classmethod
    def of(
        cls, user_BD: Tensor, item_CD: Tensor, relations: Relations, given_apart: bool, width: int, weights: bool
    ) -> NegativeCells:
        num_rows, num_columns = user_BD.shape[0], item_CD.shape[0]
        given, is_negative_C = relations.given, relations.is_negative_C
        offset_C = item_CD.new_zeros(num_columns) if relations.log_q_C is None else -relations.log_q_C
        shut = cells_of(relations.known, width)
        opened = shut[:0]
        if given is not None:
            cell_G = cells_of(given, width)
            shut = torch.cat([shut, cell_G if given_apart else cell_G[~given.is_refused()]])
            if is_negative_C is not None and not given_apart:
                opened = _distinct(cell_G[given.is_refused() & ~is_negative_C[given.column_P]])
                opened = opened[~torch.isin(opened, shut)]
        shut = _distinct(shut)
        num_negatives = num_columns
        if is_negative_C is not None:
            offset_C = offset_C.where(is_negative_C, float("-inf"))
            shut = shut[is_negative_C[shut % max(width, 1)]]
            num_negatives = int(is_negative_C.sum())
        num_negatives_B = torch.full((num_rows,), num_negatives, device=user_BD.device)
        for cells, change in ((shut, -1), (opened, 1)):
            if len(cells):
                num_negatives_B += change * torch.bincount(cells // width, minlength=num_rows)
        row, column = opened // max(width, 1), opened % max(width, 1)
        user_BMD = user_BD if user_BD.ndim == 3 else user_BD[:, None]
        opened_best = best_vectors(user_BMD, item_CD, row, column)
        opened_logit = dots(user_BMD.flatten(0, 1), row * user_BMD.shape[1] + opened_best, item_CD, column)
        num_negatives_B = num_negatives_B.to(user_BD.dtype)
        offset_W = item_CD.new_full((width,), float("-inf"))
        offset_W[:num_columns] = offset_C
        hardest = relations.hardest
        if hardest is not None and hardest.count >= num_columns:
            hardest = None
        weight_W = None
        if weights:
            if hardest is not None or relations.log_q_C is not None:
                weight_W = offset_W.exp()
            offset_W = offset_W.clamp(max=0).where(offset_W.isneginf(), 0.0)
        return cls(offset_W, shut, opened, opened_logit, opened_best, num_negatives_B, hardest, weight_W)

    def mask(self, logit_bW: Tensor, shut: Tensor, opened: Tensor, part: slice, several: BestVectors | None) -> None:
        """Set the cells `shut` of a block to -inf, and the cells `opened[part]` to their own logits."""
        cell = logit_bW.view(-1)
        cell.index_fill_(0, shut, float("-inf"))
        if len(opened):
            cell.index_copy_(0, opened[part], self.opened_logit[part])
            if several is not None:
                several.best_bW.view(-1).index_copy_(0, opened[part], self.opened_best[part].to(torch.int8))

    def block_edges(self, row_P: Tensor, num_rows: int, size: int) -> tuple[list[int], list[int], list[int]]:
        """Return where the pairs, the shut and the opened cells of each block of `size` rows begin."""
        edges = torch.arange(0, num_rows + size, size, device=row_P.device).clamp_(max=num_rows)
        width = len(self.offset_W)
        return (
            torch.searchsorted(row_P.contiguous(), edges).tolist(),
            torch.searchsorted(self.shut, edges * width).tolist(),
            torch.searchsorted(self.opened, edges * width).tolist(),
        )

    def weigh(self, room_bW: Tensor | None, logit_bW: Tensor, rows: slice) -> tuple[Tensor | None, Tensor]:
        """Return the weights of a block's negatives, in `room_bW` if there are any, and their total of each row."""
        if room_bW is not None:
            weight_bW = self.weights(room_bW, logit_bW)
            return weight_bW, weight_bW.sum(1)
        if self.hardest is not None:
            self.down_weight_others(logit_bW)
        return None, self.num_negatives_B[rows]

    def down_weight_others(self, logit_bW: Tensor) -> None:
        """Add the log of their weight to the logits of all but a row's hardest negatives, in place."""
        assert self.hardest is not None
        # Compared without log q: with it, the rarest items would be the hardest as long as scores are close together.
        score_bW = logit_bW - self.offset_W.where(self.offset_W.isfinite(), 0.0)
        place_bK = score_bW.topk(self.hardest.count, dim=1, sorted=False).indices
        top_bK = logit_bW.gather(1, place_bK)
        logit_bW.add_(math.log(self.hardest.others)).scatter_(1, place_bK, top_bK)

    def weights(self, room_bW: Tensor, logit_bW: Tensor) -> Tensor:
        """The weights of a block's negatives, made in `room_bW`; 0 where a cell is none."""
        assert self.weight_W is not None
        weight_bW = room_bW.copy_(self.weight_W.where(self.weight_W > 0, 1.0))  # 1 is for what is opened
        weight_bW.masked_fill_(logit_bW.isneginf(), 0.0)
        if self.hardest is not None:
            place_bK = logit_bW.topk(self.hardest.count, dim=1, sorted=False).indices
            top_bK = weight_bW.gather(1, place_bK)
            weight_bW.mul_(self.hardest.others).scatter_(1, place_bK, top_bK)
        return weight_bW


class BestVectors:
    """A block of users with several vectors: which of them each cell's logit is of."""

    def __init__(self, room: Tensor) -> None:
        self._room, self.best_vectors = torch.empty_like(room), torch.empty_like(room, dtype=torch.int8)
        self.best_bW = self.best_vectors

    def raise_to_best(self, logit_bW: Tensor, offset_W: Tensor, part_bMD: Tensor, item_WD: Tensor) -> None:
        """Raise the first vectors' logits to those of the vectors that score higher."""
        rows, num_vectors = part_bMD.shape[:2]
        self.best_bW = self.best_vectors[:rows].zero_()
        for vector in range(1, num_vectors):
            other_bW = torch.addmm(offset_W, part_bMD[:, vector], item_WD.T, out=self._room[:rows])
            self.best_bW.masked_fill_(other_bW > logit_bW, vector)
            torch.maximum(logit_bW, other_bW, out=logit_bW)

    def of(self, vector: int, cell_bW: Tensor) -> Tensor:
        """The cells that are one vector's, the others 0."""
        return torch.mul(cell_bW, self.best_bW == vector, out=self._room[: len(cell_bW)])


def best_vectors(user_BMD: Tensor, item_CD: Tensor, row_P: Tensor, column_P: Tensor) -> Tensor:
    """(P,): which of the row's vectors has the highest product with the item."""
    num_vectors = user_BMD.shape[1]
    if num_vectors == 1:
        return torch.zeros_like(row_P)
    all_ND = user_BMD.flatten(0, 1)
    each = [dots(all_ND, row_P * num_vectors + vector, item_CD, column_P) for vector in range(num_vectors)]
    return torch.stack(each).argmax(0)


def _distinct(values: Tensor) -> Tensor:
    """Rising, each once."""
    is_done = len(values) < 2 or bool((values[1:] > values[:-1]).all())
    return values if is_done else torch.unique(values)
