"""Regularizers of the vectors, which are added to a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from trec_twotower.data.loading.pairs import Pairs
from trec_twotower.model.losses.chunked import Block, LossGradients, chunked_loss, pair_logits, scaled, select_vectors
from trec_twotower.model.losses.relations import Relations


def squared_lengths(vector_ND: Tensor) -> Tensor:
    """Return (N,): the squared length of each vector."""
    return torch.linalg.vecdot(vector_ND, vector_ND)


def alignment(user_BD: Tensor, item_CD: Tensor, positive: Pairs) -> Tensor:
    """Return the weighted sum of the squared distances of positives (Wang and Isola 2020, alpha = 2)."""
    user_BD, item_CD = scaled(user_BD, item_CD)
    user_BD, positive = select_vectors(user_BD, item_CD, positive)
    product_P = pair_logits(user_BD, item_CD, positive)
    square_P = squared_lengths(user_BD)[positive.row_P] + squared_lengths(item_CD)[positive.column_P]
    return (positive.weights(product_P) * (square_P - 2 * product_P)).sum()


def nearness(vector_ND: Tensor, first: int, num_rows: int) -> Tensor:
    """Return the sum over num_rows rows i from `first` on, and all j != i, of exp(-2 |x_i - x_j|²), for unit vectors.

    Its log, when divided by the number of pairs, is the uniformity of Wang and Isola (2020) with t = 2. Each
    rank computes its own rows, in blocks.
    """
    # |x_i - x_j|² is 2 - 2 x_i . x_j, also for the gradient, because normalization removes the component along x.
    part_BD, vector_ND = scaled(4 * vector_ND[first : first + num_rows], vector_ND)
    row_B = torch.arange(num_rows, device=vector_ND.device)
    relations = Relations(
        positive=Pairs(row_B[:0], row_B[:0]),
        known=Pairs(row_B, row_B + first),
        log_q_C=vector_ND.new_full((vector_ND.shape[0],), 4.0),
    )

    def rule(block: Block) -> LossGradients:
        cell_bC = block.logit_bC.exp_()
        return LossGradients(cell_bC.sum(), cell_bC, torch.ones_like(block.total_weight_b), block.logit_p)

    return chunked_loss(part_BD, vector_ND, relations, rule)
