"""Cross-batch memory: candidates of earlier steps as additional negatives (Wang et al. 2020, "Cross-Batch Memory")."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from trec_twotower.model.losses import Pairs, Relations
from trec_twotower.ops.hashing import mix_torch

NEVER = -(1 << 62)
FINGERPRINT = (1 << 32) - 1  # bits of a key that hold the fingerprint of the item


class CrossBatchMemory(nn.Module):
    """A ring buffer of the last `size` candidates that were negatives of all rows; equal on all ranks.

    It holds whole steps only (a uniform sample of a step with more than `size` candidates). An item is in it once, with
    its newest vector. If p is the probability that an item is a candidate of one step, it is in the buffer or in the
    current step with probability P = 1 - (1 - p) ** (1 + steps held).

    Without the memory, a loss corrects a candidate by `log_q` * log p. With it, log P - log p is added, so that the
    expected loss is the same, from a larger sample.

    A vector in the memory gets no gradient. An item would be pushed away from users only in steps that have it as their
    own candidate, with probability p instead of P, while its positives pull it at full strength. All items would move
    to the mean direction of the users. Therefore the gradient of a candidate as a negative is multiplied by P / p,
    which makes its expectation that of the loss over the whole set (`Relations.push_C`).
    """

    def __init__(self, size: int, dim: int, log_q: float, device: torch.device) -> None:
        super().__init__()
        self.size = size
        self.strength = log_q
        self.vector_QD: Tensor
        self.key_Q: Tensor
        self.log_p_Q: Tensor
        self.first_Q: Tensor
        self.is_first_Q: Tensor
        self.count: Tensor
        self.register_buffer("vector_QD", torch.zeros(size, dim, device=device))
        # Batch.item_key_C; -1 where empty
        self.register_buffer("key_Q", torch.zeros(size, dtype=torch.int64, device=device))
        self.register_buffer("log_p_Q", torch.zeros(size, device=device))  # log p at the step of the candidate
        # Number of candidates before the step of a slot. A step is invalid once its first candidate is overwritten.
        self.register_buffer("first_Q", torch.full((size,), NEVER, dtype=torch.int64, device=device))
        self.register_buffer("is_first_Q", torch.zeros(size, dtype=torch.bool, device=device))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64, device=device))  # candidates so far

    def forget(self) -> None:
        """Clear the memory."""
        self.first_Q.fill_(NEVER)

    def extend(
        self, item_CD: Tensor, key_C: Tensor, log_p_C: Tensor, relations: Relations, listed: Pairs
    ) -> tuple[Tensor, Relations]:
        """Return the step's candidates followed by those of earlier steps, and how all of them relate to the rows.

        An item that is a negative of all rows in this step has its current vector. `log_p_C` is log p. `listed` has the
        keys (as columns) that are not negatives of a row; for history items ~fingerprint, which is negative, instead
        of the key.
        """
        is_whole_Q = self.first_Q >= self.count - self.size
        is_negative_C = relations.is_negative_C
        key_now = key_C if is_negative_C is None else key_C[is_negative_C]
        place_K = torch.nonzero(is_whole_Q & (self.key_Q >= 0) & ~torch.isin(self.key_Q, key_now)).squeeze(1)
        order_K = torch.argsort(self.key_Q[place_K])
        place_K = place_K[order_K]
        key_K = self.key_Q[place_K]
        row, column = _found(listed, key_K)
        first = item_CD.shape[0]
        known = relations.known
        ones_K = torch.ones_like(key_K, dtype=torch.bool)
        num_steps = (is_whole_Q & self.is_first_Q).sum()
        log_p = torch.cat([log_p_C, self.log_p_Q[place_K].to(log_p_C.dtype)])
        log_of_set = _at_least_once(log_p, 1 + num_steps)
        push_C = (log_of_set[:first] - log_p_C).exp()
        if is_negative_C is not None:
            push_C = push_C.where(is_negative_C, 1.0)
        return torch.cat([item_CD, self.vector_QD[place_K].to(item_CD.dtype)]), replace(
            relations,
            known=Pairs(torch.cat([known.row_P, row]), torch.cat([known.column_P, first + column])),
            log_q_C=log_of_set - (1 - self.strength) * log_p,
            push_C=torch.cat([push_C, torch.ones_like(key_K, dtype=push_C.dtype)]),
            is_negative_C=ones_K.new_ones(first + len(place_K))
            if is_negative_C is None
            else torch.cat([is_negative_C, ones_K]),
        )

    @torch.no_grad()
    def push(self, item_CD: Tensor, key_C: Tensor, log_p_C: Tensor, is_negative_C: Tensor | None) -> None:
        """Add the candidates of a step that are negatives of all rows."""
        parts = (item_CD.detach(), key_C, log_p_C)
        if is_negative_C is not None:
            vector_ND, key_N, log_p_N = (part[is_negative_C] for part in parts)
        else:
            vector_ND, key_N, log_p_N = parts
        count = len(key_N)
        if count > self.size:  # a uniform sample, equal on all ranks
            kept = torch.argsort(mix_torch(key_N ^ mix_torch(self.count)))[: self.size]
            vector_ND, key_N = vector_ND[kept], key_N[kept]
            log_p_N = log_p_N[kept] + math.log(self.size / count)
            count = self.size
        if not count:
            return
        self.key_Q.masked_fill_(torch.isin(self.key_Q, key_N), -1)
        place_N = (self.count + torch.arange(count, device=key_N.device)) % self.size
        self.vector_QD[place_N] = vector_ND.to(self.vector_QD.dtype)
        self.key_Q[place_N] = key_N
        self.log_p_Q[place_N] = log_p_N.to(self.log_p_Q.dtype)
        self.first_Q[place_N] = self.count.expand(count)
        self.is_first_Q[place_N] = False
        self.is_first_Q[place_N[:1]] = True
        self.count += count


def _found(listed: Pairs, key_K: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs whose key or fingerprint is in `key_K` (ascending): their rows, and their positions in it."""
    if not len(key_K):
        return listed.row_P[:0], listed.column_P[:0]
    is_key = listed.column_P >= 0
    fingerprint_K, order_K = (key_K & FINGERPRINT).sort()
    by_key = _places(listed.column_P[is_key], key_K)
    by_fingerprint = _places(~listed.column_P[~is_key], fingerprint_K)
    row = torch.cat([listed.row_P[is_key], listed.row_P[~is_key]])
    place = torch.cat([by_key, torch.where(by_fingerprint < 0, by_fingerprint, order_K[by_fingerprint])])
    return row[place >= 0], place[place >= 0]


def _places(wanted_P: Tensor, rising_K: Tensor) -> Tensor:
    """Return the position of each value in `rising_K`, -1 where it is not there."""
    place = torch.searchsorted(rising_K, wanted_P).clamp_(max=len(rising_K) - 1)
    return torch.where(rising_K[place] == wanted_P, place, -1)


def _at_least_once(log_p: Tensor, times: Tensor) -> Tensor:
    """Return log(1 - (1 - p) ** times)."""
    log_missed = torch.log1p(-log_p.double().clamp(max=0).exp()) * times
    return torch.log(-torch.expm1(log_missed)).to(log_p.dtype)
