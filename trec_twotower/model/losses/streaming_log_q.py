"""How often an item is a candidate, from the steps at which it was one: nothing has to be counted beforehand.

Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", algorithm 2: by hash of
the item, the step at which it last came and the mean gap between two such steps, whose inverse is the probability.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trec_twotower.ops.hashing import hash_to_bucket_torch

RATE = 0.01  # what a new gap counts, once 1 / RATE of them have been averaged evenly
HASHES = 2  # items that share a slot come more often together: the longest gap is believed
SLOTS = 1 << 20


class StreamingLogQ(nn.Module):
    """Log of the probability that an item is a candidate of a step; the same on all ranks, which see the same steps.

    The first gaps are averaged evenly: an item that came n times up to step t has a mean gap of t / n.
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
        """Begin anew."""
        for buffer in self.buffers():
            buffer.zero_()

    @torch.no_grad()
    def forward(self, key_C: Tensor, is_negative_C: Tensor | None) -> Tensor:
        """(C,) float32, for a step's candidates by their keys; those that stand against all rows have come now."""
        if self.training:
            self.step += 1
            self._take(key_C if is_negative_C is None else key_C[is_negative_C])
        gap_C = torch.ones(len(key_C), device=key_C.device)
        for number in range(HASHES):
            slot_C = hash_to_bucket_torch(key_C, self.slots, number)
            gap = self.gap_HN[number, slot_C]
            # One that never came might have come in the next step.
            gap_C = torch.maximum(gap_C, gap.where(self.times_HN[number, slot_C] > 0, (self.step + 1).to(gap.dtype)))
        return -gap_C.log()

    def _take(self, key_N: Tensor) -> None:
        for number in range(HASHES):
            slot_N = hash_to_bucket_torch(key_N, self.slots, number)
            # Two items of one slot write the same.
            times_N = self.times_HN[number, slot_N] + 1
            gap_N = self.gap_HN[number, slot_N]
            now_N = (self.step - self.last_HN[number, slot_N]).to(gap_N.dtype)
            self.gap_HN[number, slot_N] = gap_N + (1 / times_N).clamp(min=RATE) * (now_N - gap_N)
            self.times_HN[number, slot_N] = times_N
            self.last_HN[number, slot_N] = self.step.expand(len(slot_N))
