"""How the rows and the candidates of a step relate: which pairs are positives, known or given, and how each counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trec_twotower.data.loading.pairs import Pairs


@dataclass(frozen=True)
class Hardest:
    """How many negatives of a row have weight 1: those of its highest scores. All others have the weight `others`."""

    count: int
    others: float


@dataclass(frozen=True)
class Relations:
    """What is known of the rows and the candidates of a step.

    positive       what the rows took, with weights
    known          pairs that are nobody's negatives; must include the positives
    given          pairs that the data name beside the positives, with labels: at most 0 for what the row refused, above
                   it a grade. The former are negatives of their row, whatever `is_negative_C` says, but not where the
                   pair is known; the latter are not.
    log_q_C        log of the probability that each item is a candidate (logQ). Losses with a softmax or a sigmoid
                   subtract it from the logits; `bpr` and `margin` weight negatives by its inverse
    is_negative_C  whether an item stands against all rows that do not know it; default: every one does
    hardest        how much less the negatives below a row's highest scores count; default: all count equally
    push_C         what each candidate's gradient as a negative is multiplied by; default: 1. It is larger than 1 where
                   vectors of earlier steps, which get no gradient, are candidates too (model/queue.py)
    """

    positive: Pairs
    known: Pairs
    given: Pairs | None = None
    log_q_C: Tensor | None = None
    is_negative_C: Tensor | None = None
    hardest: Hardest | None = None
    push_C: Tensor | None = None

    def is_known(self, pairs: Pairs, num_columns: int) -> Tensor:
        """(P,): which pairs are among the known."""
        return torch.isin(cells_of(pairs, num_columns), cells_of(self.known, num_columns))

    def corrected(self, logit_P: Tensor, pairs: Pairs) -> Tensor:
        """The logits of pairs without log q."""
        return logit_P if self.log_q_C is None else logit_P - self.log_q_C.to(logit_P.dtype)[pairs.column_P]


def cells_of(pairs: Pairs, num_columns: int) -> Tensor:
    """(P,): the numbers of the cells, row * num_columns + column."""
    return pairs.row_P * num_columns + pairs.column_P
