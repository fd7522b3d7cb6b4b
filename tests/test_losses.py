"""The loss in blocks is the loss written out, whatever the rows, the masks and the block size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trec_twotower.model import losses
from trec_twotower.model.losses import sampled_softmax


@dataclass
class Case:
    """Which row took and knows which columns; every positive is among the known pairs."""

    num_rows: int
    num_columns: int
    positives: list[tuple[int, int, float]]  # row, column, weight
    known: list[tuple[int, int]] = field(default_factory=list)  # beside the positives
    negatives: list[int] | None = None  # columns; None: all
    corrections: list[float] | None = None
    temperature: float = 0.5

    def vectors(self, dtype: torch.dtype = torch.float64, scale: float = 1.0, dim: int = 5) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(3)
        made = [
            scale * torch.randn(count, dim, generator=random, dtype=torch.float64)
            for count in (self.num_rows, self.num_columns)
        ]
        return made[0].to(dtype).requires_grad_(), made[1].to(dtype).requires_grad_()

    def pairs(self) -> list[tuple[int, int]]:
        return [(row, column) for row, column, _ in self.positives] + self.known

    def loss(self, user_BD: Tensor, item_CD: Tensor) -> Tensor:
        """What our code makes of it."""

        def numbers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64)

        is_negative_C = None
        if self.negatives is not None:
            is_negative_C = torch.zeros(self.num_columns, dtype=torch.bool)
            is_negative_C[numbers(self.negatives)] = True
        return sampled_softmax(
            user_BD,
            item_CD,
            positive_row_P=numbers([row for row, _, _ in self.positives]),
            positive_column_P=numbers([column for _, column, _ in self.positives]),
            positive_weight_P=torch.tensor([weight for _, _, weight in self.positives], dtype=user_BD.dtype),
            known_row_M=numbers([row for row, _ in self.pairs()]),
            known_column_M=numbers([column for _, column in self.pairs()]),
            correction_C=None if self.corrections is None else torch.tensor(self.corrections, dtype=user_BD.dtype),
            is_negative_C=is_negative_C,
            temperature=self.temperature,
        )

    def written_out(self, user_BD: Tensor, item_CD: Tensor) -> Tensor:
        """The textbook formula, one positive after the other, left to autograd."""
        corrections = self.corrections or [0.0] * self.num_columns

        def logit(row: int, column: int) -> Tensor:
            return user_BD[row] @ item_CD[column] / self.temperature - corrections[column]

        negatives = range(self.num_columns) if self.negatives is None else self.negatives
        total = user_BD.sum() * 0 + item_CD.sum() * 0
        for row, column, weight in self.positives:
            against = [other for other in negatives if (row, other) not in self.pairs()]
            own = logit(row, column)
            choice = torch.stack([own, *(logit(row, other) for other in against)])
            total = total + weight * (torch.logsumexp(choice, 0) - own)
        return total


def drawn(seed: int, num_rows: int, num_columns: int) -> Case:
    """Rows of none to several positives in no order, with masks, weights, corrections and columns for positives."""
    random = torch.Generator().manual_seed(seed)

    def whole(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=random).tolist()

    def reals(count: int) -> list[float]:
        return torch.rand(count, generator=random, dtype=torch.float64).tolist()

    taken = dict.fromkeys(zip(whole(num_rows, 2 * num_rows), whole(num_columns, 2 * num_rows), strict=True))
    positives = [(row, column, weight) for (row, column), weight in zip(taken, reals(len(taken)), strict=True)]
    known = list(zip(whole(num_rows, num_rows), whole(num_columns, num_rows), strict=True))
    negatives = [column for column, lot in enumerate(reals(num_columns)) if lot < 0.7]
    corrections = [-6 * lot for lot in reals(num_columns)]
    return Case(num_rows, num_columns, positives, known, negatives, corrections)


CASES = {
    "one positive a row": Case(4, 6, [(row, row, 1.0) for row in range(4)]),
    "several positives a row": Case(3, 7, [(0, 1, 0.5), (0, 4, 0.5), (1, 0, 1.0), (2, 6, 0.2), (2, 5, 0.3), (2, 1, 1)]),
    "rows without positives": Case(4, 5, [(2, 3, 1.0)]),
    "no positives": Case(3, 4, []),
    "positives out of order": Case(4, 4, [(3, 0, 1.0), (0, 1, 2.0), (2, 2, 0.5), (0, 3, 0.1)]),
    "one positive twice": Case(2, 3, [(0, 1, 1.0), (0, 1, 0.5)]),
    "known items are no negatives": Case(3, 5, [(0, 0, 1.0), (1, 1, 1.0)], known=[(0, 3), (0, 4), (1, 0), (2, 2)]),
    "only sampled columns are negatives": Case(3, 5, [(0, 0, 1.0), (1, 1, 1.0), (2, 4, 1.0)], negatives=[3, 4]),
    "no negative is left": Case(2, 2, [(0, 0, 1.0), (0, 1, 1.0), (1, 1, 1.0)], known=[(1, 0)]),
    "no column is a negative": Case(2, 3, [(0, 0, 1.0), (1, 2, 1.0)], negatives=[]),
    "corrections": Case(3, 4, [(0, 1, 1.0), (1, 1, 1.0), (2, 0, 1.0)], corrections=[-0.1, -2.0, -7.0, 0.0]),
    "one column": Case(3, 1, [(0, 0, 1.0), (2, 0, 1.0)]),
    "one row": Case(1, 4, [(0, 2, 1.0)]),
    "no rows": Case(0, 4, []),
    "no columns": Case(3, 0, []),
    "drawn, narrow": drawn(1, 17, 9),
    "drawn, wide": drawn(2, 8, 40),
}


@pytest.mark.parametrize("rows_a_block", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_sum_written_out(name, rows_a_block, monkeypatch):
    """Block after block, in float64, to ten decimals."""
    case = CASES[name]
    monkeypatch.setattr(losses, "BLOCK_CELLS", rows_a_block * max(case.num_columns, 1))
    user_BD, item_CD = case.vectors()
    loss = case.loss(user_BD, item_CD)
    found = torch.autograd.grad(loss, [user_BD, item_CD])
    expected_loss = case.written_out(user_BD, item_CD)
    expected = torch.autograd.grad(expected_loss, [user_BD, item_CD])
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-10, abs=1e-10)
    for made, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-10)


def test_a_block_smaller_than_a_row_still_takes_one_row(monkeypatch):
    monkeypatch.setattr(losses, "BLOCK_CELLS", 1)
    case = CASES["drawn, wide"]
    user_BD, item_CD = case.vectors()
    assert case.loss(user_BD, item_CD).item() == pytest.approx(case.written_out(user_BD, item_CD).item(), rel=1e-12)


def test_backward_scales_with_what_comes_from_above():
    """As the model does when it divides by the number of rows."""
    case = CASES["drawn, narrow"]
    user_BD, item_CD = case.vectors()
    plain = torch.autograd.grad(case.loss(user_BD, item_CD), [user_BD, item_CD])
    scaled = torch.autograd.grad(case.loss(user_BD, item_CD) * -3.0, [user_BD, item_CD])
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other, -3.0 * one)


@pytest.mark.parametrize(
    "name", ["one positive a row", "several positives a row", "no negative is left", "drawn, narrow", "drawn, wide"]
)
def test_cold_softmax_of_long_vectors_stays_finite_and_right(name):
    """Logits beyond ±10,000 at temperature 1e-3: float32 agrees with float64, where nothing is near the edge."""
    case = CASES[name]
    case.temperature = 1e-3
    user_BD, item_CD = case.vectors(torch.float32, scale=5.0)
    loss = case.loss(user_BD, item_CD)
    found = torch.autograd.grad(loss, [user_BD, item_CD])
    exact = [vectors.detach().double().requires_grad_() for vectors in (user_BD, item_CD)]
    wide = case.written_out(*exact)
    assert math.isfinite(loss.item())
    assert loss.item() == pytest.approx(wide.item(), rel=1e-5)
    for made, wanted in zip(found, torch.autograd.grad(wide, exact), strict=True):
        torch.testing.assert_close(made.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max() + 1e-30))


def test_a_positive_far_below_its_sibling_keeps_its_own_loss():
    """Two positives of a row do not meet: one at logit 1,000 must not push the other's softmax out of float32."""
    case = Case(1, 3, [(0, 0, 1.0), (0, 1, 1.0)], temperature=1.0)
    user_BD = torch.tensor([[1.0, 0.0]], requires_grad=True)
    item_CD = torch.tensor([[1000.0, 0.0], [-2.0, 0.0], [-3.0, 0.0]], requires_grad=True)
    loss = case.loss(user_BD, item_CD)
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)), rel=1e-6)
    share = 1 / (1 + math.e)  # of the negative, in the second positive's softmax
    assert item_CD.grad is not None
    assert item_CD.grad[:, 0].tolist() == pytest.approx([0.0, -share, share], rel=1e-6)


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation inside has returned in one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                size = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.num_elements = max(self.num_elements, size)
        return out


def test_memory_grows_with_rows_and_columns_not_with_their_product(monkeypatch):
    """The largest tensor of forward and backward is a block, or as large as what came in."""
    num_rows, num_columns, dim = 300, 400, 5
    monkeypatch.setattr(losses, "BLOCK_CELLS", 10 * num_columns)
    case = Case(num_rows, num_columns, [(row, row, 1.0) for row in range(num_rows)])
    user_BD, item_CD = case.vectors(torch.float32, dim=dim)
    with LargestTensor() as largest:
        case.loss(user_BD, item_CD).backward()
    assert largest.num_elements <= 10 * num_columns < num_rows * num_columns
    with LargestTensor() as naive:
        torch.log_softmax(user_BD @ item_CD.T, 1).sum().backward()
    assert naive.num_elements == num_rows * num_columns, "the count itself would not see a whole matrix"


def test_log_q_makes_the_sampled_gradient_that_of_the_full_softmax():
    """Columns drawn by unequal popularity, corrected by log(draws x p), give the full softmax's gradient.

    The gradient with respect to the user is sum_j P(j) v_j - v_positive. With n columns drawn with probabilities q_j
    and corrected, importance sampling says that the expectation tends to P = softmax(u v); uncorrected it tends to
    the softmax of u v + log q, which is known just as well. Both limits are checked; they are far apart.
    """
    num_items, num_drawn, num_draws = 200, 2000, 40
    random = torch.Generator().manual_seed(11)
    item_ID = torch.randn(num_items, 4, generator=random, dtype=torch.float64)
    user_D = torch.randn(4, generator=random, dtype=torch.float64)
    popularity_I = torch.arange(1, num_items + 1, dtype=torch.float64) ** -1.0
    popularity_I /= popularity_I.sum()
    positive = 150
    full_D = torch.softmax(item_ID @ user_D, 0) @ item_ID - item_ID[positive]
    biased_D = torch.softmax(item_ID @ user_D + popularity_I.log(), 0) @ item_ID - item_ID[positive]

    found: dict[str, list[Tensor]] = {"corrected": [], "uncorrected": []}
    for _ in range(num_draws):
        column_C = torch.multinomial(popularity_I, num_drawn, replacement=True, generator=random)
        for name, rows in found.items():
            user_BD = user_D[None].clone().requires_grad_()
            own = torch.tensor([0])
            loss = sampled_softmax(
                user_BD,
                torch.cat([item_ID[positive][None], item_ID[column_C]]),
                positive_row_P=own,
                positive_column_P=own,
                positive_weight_P=torch.ones(1, dtype=torch.float64),
                known_row_M=own,
                known_column_M=own,
                # The positive stands for itself: it is drawn with certainty.
                correction_C=torch.cat([torch.zeros(1), (num_drawn * popularity_I[column_C]).log()])
                if name == "corrected"
                else None,
            )
            rows.append(torch.autograd.grad(loss, user_BD)[0][0])
    means = {name: torch.stack(rows).mean(0) for name, rows in found.items()}
    errors = {name: torch.stack(rows).std(0) / num_draws**0.5 for name, rows in found.items()}
    apart = (full_D - biased_D).norm()
    # Sampling error, and the positive itself counted once more: one item of weight exp(u v) in a sum of them all.
    once_more = float(torch.softmax(item_ID @ user_D, 0)[positive] * full_D.norm())
    assert (means["corrected"] - full_D).norm() < 4 * errors["corrected"].norm() + once_more
    assert (means["corrected"] - full_D).norm() < 0.1 * apart
    assert (means["uncorrected"] - biased_D).norm() < 0.1 * apart
    assert (means["uncorrected"] - full_D).norm() > 0.9 * apart


def test_log_q_makes_the_sampled_optimum_that_of_the_full_softmax():
    """One user takes items as often as they are popular; the candidates are drawn by the same popularity p.

    The optimum of the full softmax is logit = log p, and so is that of the corrected sample, since the other drawn
    columns of the positive's item are masked and each column counts 1 / (n p). Uncorrected, positive i stands against
    n p_j columns of every other item j; that optimum is found from the expectation itself, without drawing.
    """
    num_items, num_drawn, num_rows, num_steps = 12, 256, 64, 400
    random = torch.Generator().manual_seed(5)
    popularity_I = torch.arange(1, num_items + 1, dtype=torch.float64) ** -1.0
    popularity_I /= popularity_I.sum()

    def sampled_loss(logit_I: Tensor, is_corrected: bool) -> Tensor:
        drawn_C = torch.multinomial(popularity_I, num_drawn, replacement=True, generator=random)
        taken_B = torch.multinomial(popularity_I, num_rows, replacement=True, generator=random)
        rows, item_C = torch.arange(num_rows), torch.cat([drawn_C, taken_B])
        known_row, known_column = torch.nonzero(taken_B[:, None] == item_C, as_tuple=True)
        is_negative_C = torch.arange(len(item_C)) < num_drawn
        return sampled_softmax(
            torch.ones(num_rows, 1, dtype=torch.float64),
            logit_I[item_C][:, None],
            positive_row_P=rows,
            positive_column_P=num_drawn + rows,
            positive_weight_P=torch.full((num_rows,), 1 / num_rows, dtype=torch.float64),
            known_row_M=known_row,
            known_column_M=known_column,
            correction_C=(num_drawn * popularity_I[item_C]).log() * is_negative_C if is_corrected else None,
            is_negative_C=is_negative_C,
        )

    def expected_loss(logit_I: Tensor) -> Tensor:
        weight_I = num_drawn * popularity_I * logit_I.exp()
        total_I = logit_I.exp() + weight_I.sum() - weight_I
        return (popularity_I * (total_I.log() - logit_I)).sum()

    def optimum(loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Centred; the mean of the second half of the steps."""
        logit_I = torch.zeros(num_items, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([logit_I], lr=0.05)
        total_I = torch.zeros(num_items, dtype=torch.float64)
        for step in range(num_steps):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / num_steps)
            optimizer.zero_grad()
            loss(logit_I).backward()
            optimizer.step()
            if step >= num_steps // 2:
                total_I += logit_I.detach()
        return (total_I - total_I.mean()) / (num_steps - num_steps // 2)

    full_I = popularity_I.log() - popularity_I.log().mean()
    corrected_I = optimum(lambda logit_I: sampled_loss(logit_I, True))
    uncorrected_I = optimum(lambda logit_I: sampled_loss(logit_I, False))
    biased_I = optimum(expected_loss)
    assert (corrected_I - full_I).abs().max() < 0.12
    assert (uncorrected_I - biased_I).abs().max() < 0.12
    assert (biased_I - full_I).abs().max() > 0.6
