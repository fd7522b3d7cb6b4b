"""The relations between the rows and the candidates of a step: positive, known and given pairs with their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trec_twotower.data.loading.pairs import Pairs


@dataclass(frozen=True)
class Hardest:
    """The `count` negatives per row with the highest scores have weight 1, all others the weight `others`."""

    count: int
    others: float


@dataclass(frozen=True)
class Relations:
    """The relations between the rows and the candidates of a step.

    positive       the rows' interactions, with weights
    known          pairs that are never negatives; must include the positives
    given          further pairs of the dataset, with labels. A pair with a label of 0 or less is a negative of its row,
                   whatever `is_negative_C` is, unless the pair is known. A label above 0 is a grade: the pair is no
                   negative.
    log_q_C        log of the probability that each item is a candidate (logQ). Losses with a softmax or a sigmoid
                   subtract it from the logits; `bpr` and `margin` weight negatives by its inverse
    is_negative_C  whether an item is a negative of all rows that do not know it; default: all are
    hardest        the weight of negatives that are not among the hardest of a row; default: all have weight 1
    push_C         factor of each candidate's gradient as a negative; default: 1. It is larger than 1 with a cross-batch
                   memory, whose vectors get no gradient (model/cross_batch_memory.py)
    """

    positive: Pairs
    known: Pairs
    given: Pairs | None = None
    log_q_C: Tensor | None = None
    is_negative_C: Tensor | None = None
    hardest: Hardest | None = None
    push_C: Tensor | None = None

    def is_known(self, pairs: Pairs, num_columns: int) -> Tensor:
        """Return (P,): whether each pair is among the known pairs."""
        return torch.isin(cells_of(pairs, num_columns), cells_of(self.known, num_columns))

    def corrected(self, logit_P: Tensor, pairs: Pairs) -> Tensor:
        """Return the logits of pairs minus log q."""
        return logit_P if self.log_q_C is None else logit_P - self.log_q_C.to(logit_P.dtype)[pairs.column_P]


def cells_of(pairs: Pairs, num_columns: int) -> Tensor:
    """Return (P,): the cell of each pair, row * num_columns + column."""
    return pairs.row_P * num_columns + pairs.column_P
