"""Losses over one matrix of users by candidates, computed in blocks of users and never held whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_CELLS = 1 << 22  # cells of the matrix at a time: 16 MiB of float32


def sampled_softmax(
    user_BD: Tensor,
    item_CD: Tensor,
    *,
    positive_row_P: Tensor,
    positive_column_P: Tensor,
    positive_weight_P: Tensor,
    known_row_M: Tensor,
    known_column_M: Tensor,
    correction_C: Tensor | None = None,
    is_negative_C: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The weighted sum over positives of -log softmax of the positive among itself and its row's negatives.

    With logits l_ij = u_i . v_j / temperature - correction_j, positive p of row i and column j costs

        weight_p * (log(exp(l_ij) + sum over negatives n of row i of exp(l_in)) - l_ij)

    Row i's negatives are all columns marked in `is_negative_C` but those it is known to like (`known_*_M`, pairs of
    row and column, which must include its positives): other positives of the row never stand against each other.
    `correction_C` is the log of how likely the item is a candidate (logQ: Bengio and Senecal 2008; Yi et al. 2019).
    The gradient is made in the forward pass, block of rows by block of rows: memory is O(B + C + block), not B x C.
    Returns a scalar, in nats.
    """
    if correction_C is None:
        correction_C = user_BD.new_zeros(item_CD.shape[0])
    if is_negative_C is None:
        is_negative_C = torch.ones(item_CD.shape[0], dtype=torch.bool, device=item_CD.device)
    return _SampledSoftmax.apply(
        user_BD,
        item_CD,
        (positive_row_P, positive_column_P, positive_weight_P),
        (known_row_M, known_column_M),
        (correction_C, is_negative_C),
        temperature,
    )


class _SampledSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        user_BD: Tensor,
        item_CD: Tensor,
        positives: tuple[Tensor, Tensor, Tensor],
        known: tuple[Tensor, Tensor],
        columns: tuple[Tensor, Tensor],
        temperature: float,
    ) -> Tensor:
        row_P, column_P, weight_P = positives
        correction_C, is_negative_C = columns
        scaled_BD = user_BD / temperature
        # An item that is nobody's negative gets a logit of minus infinity, but not as its row's positive.
        offset_C = torch.where(is_negative_C, -correction_C, float("-inf")).to(user_BD.dtype)
        positive_logit_P = (scaled_BD[row_P] * item_CD[column_P]).sum(1) - correction_C[column_P]

        num_rows, num_columns = user_BD.shape[0], item_CD.shape[0]
        order_P = torch.argsort(row_P, stable=True)
        order_M = torch.argsort(known[0], stable=True)
        block = max(1, BLOCK_CELLS // max(num_columns, 1))
        edges = torch.arange(0, num_rows + block, block, device=user_BD.device).clamp_(max=num_rows)
        edges_P = torch.searchsorted(row_P[order_P].contiguous(), edges).tolist()
        edges_M = torch.searchsorted(known[0][order_M].contiguous(), edges).tolist()

        loss = user_BD.new_zeros(())
        grad_user_BD = torch.zeros_like(user_BD)
        grad_item_CD = torch.zeros_like(item_CD)
        positive_grad_P = torch.empty_like(positive_logit_P)
        for number, start in enumerate(range(0, num_rows, block)):
            rows = slice(start, min(start + block, num_rows))
            mine = order_P[edges_P[number] : edges_P[number + 1]]
            masked = order_M[edges_M[number] : edges_M[number + 1]]
            logit = torch.addmm(offset_C, scaled_BD[rows], item_CD.T)
            logit[known[0][masked] - start, known[1][masked]] = float("-inf")
            row = row_P[mine] - start
            # With L = log(sum over the row's negatives of exp(l)), positive p costs log(1 + exp(L - l_p)): only the
            # negatives are shifted together, so positives far apart do not push each other out of range.
            peak = logit.amax(1) if num_columns else user_BD.new_full((logit.shape[0],), float("-inf"))
            peak = torch.where(peak.isneginf(), 0.0, peak)
            weight = logit.sub_(peak[:, None]).exp_()  # of each negative, unnormalised
            total = weight.sum(1)
            margin = (peak + total.log())[row] - positive_logit_P[mine]
            loss -= (weight_P[mine] * F.logsigmoid(-margin)).sum()
            missed = weight_P[mine] * torch.sigmoid(margin)  # what the softmax gives to negatives
            positive_grad_P[mine] = -missed
            share = torch.zeros_like(total).index_add_(0, row, missed) / total.where(total > 0, 1.0)
            weight.mul_(share[:, None])
            grad_user_BD[rows] = weight @ item_CD
            grad_item_CD.addmm_(weight.T, scaled_BD[rows])
        grad_user_BD.index_add_(0, row_P, positive_grad_P[:, None] * item_CD[column_P])
        grad_item_CD.index_add_(0, column_P, positive_grad_P[:, None] * scaled_BD[row_P])
        ctx.save_for_backward(grad_user_BD.div_(temperature), grad_item_CD)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_user_BD, grad_item_CD = ctx.saved_tensors
        return grad_user_BD * gradients[0], grad_item_CD * gradients[0], None, None, None, None
