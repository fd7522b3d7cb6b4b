"""Streaming estimate of the sampling probability of items, from the steps at which they were candidates.

Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", algorithm 2. For each
hash of an item, it keeps the last step with the item and the mean gap between such steps. 1 / gap is the probability.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trec_twotower.ops.hashing import hash_to_bucket_torch

RATE = 0.01  # weight of a new gap in the moving average, after 1 / RATE gaps
HASHES = 2  # independent hashes; a collision shortens a gap, so the longest of them is used
SLOTS = 1 << 20


class StreamingLogQ(nn.Module):
    """Log of the probability that an item is a candidate of a step. All ranks see the same steps and agree.

    The first 1 / RATE gaps have equal weights: an item seen n times up to step t has a mean gap of t / n.
    """

    def __init__(self, device: torch.device, slots: int | None = None) -> None:
        super().__init__()
        self.slots = slots = slots or SLOTS
        self.last_HN: Tensor
        self.gap_HN: Tensor
        self.times_HN: Tensor
        self.step: Tensor
        self.register_buffer("last_HN", torch.zeros(HASHES, slots, dtype=torch.int32, device=device))
        self.register_buffer("gap_HN", torch.zeros(HASHES, slots, device=device))
        self.register_buffer("times_HN", torch.zeros(HASHES, slots, dtype=torch.int32, device=device))
        self.register_buffer("step", torch.zeros(1, dtype=torch.int32, device=device))

    def forget(self) -> None:
        """Forget all items."""
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def forward(self, key_C: Tensor, is_negative_C: Tensor | None) -> Tensor:
        """Return (C,) float32 for the candidates of a step, and record those that are negatives of all rows."""
        if self.training:
            self.step += 1
            self._take(key_C if is_negative_C is None else key_C[is_negative_C])
        gap_C = torch.ones(len(key_C), device=key_C.device)
        for number in range(HASHES):
            slot_C = hash_to_bucket_torch(key_C, self.slots, number)
            gap = self.gap_HN[number, slot_C]
            # An item that was never seen might be seen in the next step.
            gap_C = torch.maximum(gap_C, gap.where(self.times_HN[number, slot_C] > 0, (self.step + 1).to(gap.dtype)))
        return -gap_C.log()

    def _take(self, key_N: Tensor) -> None:
        for number in range(HASHES):
            slot_N = hash_to_bucket_torch(key_N, self.slots, number)
            # Two items in one slot write the same value.
            times_N = self.times_HN[number, slot_N] + 1
            gap_N = self.gap_HN[number, slot_N]
            now_N = (self.step - self.last_HN[number, slot_N]).to(gap_N.dtype)
            self.gap_HN[number, slot_N] = gap_N + (1 / times_N).clamp(min=RATE) * (now_N - gap_N)
            self.times_HN[number, slot_N] = times_N
            self.last_HN[number, slot_N] = self.step.expand(len(slot_N))
