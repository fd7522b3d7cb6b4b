"""Masks and weights of the negatives of a block of logits, and the best vector of multi-interest users."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trec_twotower.model.losses.pair_products import dots
from trec_twotower.model.losses.relations import Hardest, Relations, cells_of


@dataclass(frozen=True)
class NegativeCells:
    """The negatives of all rows: an offset per column, and exceptions by cell, ascending and distinct.

    The number of a cell is row * C + column.
    """

    offset_C: Tensor  # -log q; -inf for columns that are not negatives of all rows
    shut: Tensor  # cells that are not negatives, in columns that are negatives of all rows
    opened: Tensor  # cells that are negatives, in other columns
    opened_logit: Tensor
    opened_best: Tensor  # index of the user vector that has the logit
    num_negatives_B: Tensor
    hardest: Hardest | None
    weight_C: Tensor | None  # weight of each column for weighting rules; 0 where it is not a negative of all rows

    @classmethod
    def of(
        cls, user_BD: Tensor, item_CD: Tensor, relations: Relations, given_apart: bool, weights: bool
    ) -> NegativeCells:
        num_rows, num_columns = user_BD.shape[0], item_CD.shape[0]
        given, is_negative_C = relations.given, relations.is_negative_C
        offset_C = item_CD.new_zeros(num_columns) if relations.log_q_C is None else -relations.log_q_C
        shut = cells_of(relations.known, num_columns)
        opened = shut[:0]
        if given is not None:
            cell_G = cells_of(given, num_columns)
            shut = torch.cat([shut, cell_G if given_apart else cell_G[~given.is_refused()]])
            if is_negative_C is not None and not given_apart:
                opened = _distinct(cell_G[given.is_refused() & ~is_negative_C[given.column_P]])
                opened = opened[~torch.isin(opened, shut)]
        shut = _distinct(shut)
        num_negatives = num_columns
        if is_negative_C is not None:
            offset_C = offset_C.where(is_negative_C, float("-inf"))
            shut = shut[is_negative_C[shut % max(num_columns, 1)]]
            num_negatives = int(is_negative_C.sum())
        num_negatives_B = torch.full((num_rows,), num_negatives, device=user_BD.device)
        for cells, change in ((shut, -1), (opened, 1)):
            if len(cells):
                num_negatives_B += change * torch.bincount(cells // num_columns, minlength=num_rows)
        row, column = opened // max(num_columns, 1), opened % max(num_columns, 1)
        user_BMD = user_BD if user_BD.ndim == 3 else user_BD[:, None]
        opened_best = best_vectors(user_BMD, item_CD, row, column)
        opened_logit = dots(user_BMD.flatten(0, 1), row * user_BMD.shape[1] + opened_best, item_CD, column)
        num_negatives_B = num_negatives_B.to(user_BD.dtype)
        hardest = relations.hardest
        if hardest is not None and hardest.count >= num_columns:
            hardest = None
        weight_C = None
        if weights:
            if hardest is not None or relations.log_q_C is not None:
                weight_C = offset_C.exp()
            offset_C = offset_C.clamp(max=0).where(offset_C.isneginf(), 0.0)
        return cls(offset_C, shut, opened, opened_logit, opened_best, num_negatives_B, hardest, weight_C)

    def mask(self, logit_bC: Tensor, shut: Tensor, opened: Tensor, part: slice, several: BestVectors | None) -> None:
        """Set the cells `shut` of a block to -inf, and the cells `opened[part]` to their own logits."""
        cell = logit_bC.view(-1)
        cell.index_fill_(0, shut, float("-inf"))
        if len(opened):
            cell.index_copy_(0, opened[part], self.opened_logit[part])
            if several is not None:
                several.best_bC.view(-1).index_copy_(0, opened[part], self.opened_best[part].to(torch.int8))

    def block_edges(self, row_P: Tensor, num_rows: int, size: int) -> tuple[list[int], list[int], list[int]]:
        """Return the start of each block of `size` rows among the pairs, the shut cells and the opened cells."""
        edges = torch.arange(0, num_rows + size, size, device=row_P.device).clamp_(max=num_rows)
        width = len(self.offset_C)
        return (
            torch.searchsorted(row_P.contiguous(), edges).tolist(),
            torch.searchsorted(self.shut, edges * width).tolist(),
            torch.searchsorted(self.opened, edges * width).tolist(),
        )

    def weigh(self, room_bC: Tensor | None, logit_bC: Tensor, rows: slice) -> tuple[Tensor | None, Tensor]:
        """Return the weights of a block's negatives, written to `room_bC`, and their sum per row."""
        if room_bC is not None:
            weight_bC = self.weights(room_bC, logit_bC)
            return weight_bC, weight_bC.sum(1)
        if self.hardest is not None:
            self.down_weight_others(logit_bC)
        return None, self.num_negatives_B[rows]

    def down_weight_others(self, logit_bC: Tensor) -> None:
        """Add the log of their weight to the logits of all negatives except the hardest of each row, in place."""
        assert self.hardest is not None
        # Scores are compared without log q: with it, rare items would be the hardest while scores are close together.
        score_bC = logit_bC - self.offset_C.where(self.offset_C.isfinite(), 0.0)
        place_bK = score_bC.topk(self.hardest.count, dim=1, sorted=False).indices
        top_bK = logit_bC.gather(1, place_bK)
        logit_bC.add_(math.log(self.hardest.others)).scatter_(1, place_bK, top_bK)

    def weights(self, room_bC: Tensor, logit_bC: Tensor) -> Tensor:
        """Return the weights of a block's negatives, written to `room_bC`; 0 where a cell is not a negative."""
        assert self.weight_C is not None
        weight_bC = room_bC.copy_(self.weight_C.where(self.weight_C > 0, 1.0))  # 1 for opened cells
        weight_bC.masked_fill_(logit_bC.isneginf(), 0.0)
        if self.hardest is not None:
            place_bK = logit_bC.topk(self.hardest.count, dim=1, sorted=False).indices
            top_bK = weight_bC.gather(1, place_bK)
            weight_bC.mul_(self.hardest.others).scatter_(1, place_bK, top_bK)
        return weight_bC


class BestVectors:
    """The index of the user vector that has the highest logit, for each cell of a block."""

    def __init__(self, room: Tensor) -> None:
        self._room, self.best_vectors = torch.empty_like(room), torch.empty_like(room, dtype=torch.int8)
        self.best_bC = self.best_vectors

    def raise_to_best(self, logit_bC: Tensor, offset_C: Tensor, part_bMD: Tensor, item_CD: Tensor) -> None:
        """Replace the logits of the first vectors by the maximum over all vectors."""
        rows, num_vectors = part_bMD.shape[:2]
        self.best_bC = self.best_vectors[:rows].zero_()
        for vector in range(1, num_vectors):
            other_bC = torch.addmm(offset_C, part_bMD[:, vector], item_CD.T, out=self._room[:rows])
            self.best_bC.masked_fill_(other_bC > logit_bC, vector)
            torch.maximum(logit_bC, other_bC, out=logit_bC)

    def of(self, vector: int, cell_bC: Tensor) -> Tensor:
        """Return the cells whose best vector is `vector`; 0 elsewhere."""
        return torch.mul(cell_bC, self.best_bC == vector, out=self._room[: len(cell_bC)])


def best_vectors(user_BMD: Tensor, item_CD: Tensor, row_P: Tensor, column_P: Tensor) -> Tensor:
    """Return (P,): the index of the row's vector with the highest dot product with the item."""
    num_vectors = user_BMD.shape[1]
    if num_vectors == 1:
        return torch.zeros_like(row_P)
    all_ND = user_BMD.flatten(0, 1)
    each = [dots(all_ND, row_P * num_vectors + vector, item_CD, column_P) for vector in range(num_vectors)]
    return torch.stack(each).argmax(0)


def _distinct(values: Tensor) -> Tensor:
    """Return the distinct values in ascending order."""
    is_done = len(values) < 2 or bool((values[1:] > values[:-1]).all())
    return values if is_done else torch.unique(values)
