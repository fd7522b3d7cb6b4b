"""Every loss in blocks is the loss written out, whatever the rows, the masks, the temperature and the block size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kinds import WITH_LOG_Q
from trec_twotower.model.losses import LOSSES, Hardest, Pairs, Relations, pair_products
from trec_twotower.model.losses import chunked as blocks
from trec_twotower.model.losses.regularizers import alignment, nearness, squared_lengths


@dataclass
class Case:
    """Which row took, knows and was given which columns; every positive is also known."""

    num_rows: int
    num_columns: int
    positives: list[tuple[int, int, float]]  # row, column, weight
    known: list[tuple[int, int]] = field(default_factory=list)  # beside the positives
    negatives: list[int] | None = None  # columns; None: all
    corrections: list[float] | None = None
    given: list[tuple[int, int, float, float]] = field(default_factory=list)  # row, column, label, weight

    def vectors(self, dtype: torch.dtype = torch.float64, scale: float = 1.0, dim: int = 5) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(3)
        made = [
            scale * torch.randn(count, dim, generator=random, dtype=torch.float64)
            for count in (self.num_rows, self.num_columns)
        ]
        return made[0].to(dtype).requires_grad_(), made[1].to(dtype).requires_grad_()

    def knows(self, row: int, column: int) -> bool:
        return (row, column) in self.known or (row, column) in [pair[:2] for pair in self.positives]

    def labels(self, row: int, column: int) -> list[float]:
        return [label for *pair, label, _ in self.given if pair == [row, column]]

    def is_common(self, column: int) -> bool:
        """Whether it stands against every row that does not know it."""
        return self.negatives is None or column in self.negatives

    def negatives_of(self, row: int) -> list[int]:
        """What stands against a row: common negatives and what it refused, not what it knows or was given and liked."""
        return [
            column
            for column in range(self.num_columns)
            if not self.knows(row, column)
            and not any(label > 0 for label in self.labels(row, column))
            and (self.is_common(column) or self.labels(row, column))
        ]

    def correction(self, column: int) -> float:
        return 0.0 if self.corrections is None else self.corrections[column]

    def relations(self, dtype: torch.dtype = torch.float64, has_given: bool = False) -> Relations:
        """The same in tensors; `has_given` where a step's rows were given pairs, but none of these rows."""
        pairs = [pair[:2] for pair in self.positives] + self.known
        is_negative_C = None
        if self.negatives is not None:
            is_negative_C = torch.zeros(self.num_columns, dtype=torch.bool)
            is_negative_C[numbers(self.negatives)] = True
        return Relations(
            positive=Pairs(*indices(self.positives), torch.tensor([w for *_, w in self.positives], dtype=dtype)),
            known=Pairs(*indices(pairs)),
            given=Pairs(
                *indices(self.given),
                torch.tensor([weight for *_, weight in self.given], dtype=dtype),
                torch.tensor([label for *_, label, _ in self.given], dtype=dtype),
            )
            if self.given or has_given
            else None,
            log_q_C=None if self.corrections is None else torch.tensor(self.corrections, dtype=dtype),
            is_negative_C=is_negative_C,
        )

    def rows(self, start: int, stop: int) -> Case:
        """Some of the rows by themselves."""

        def moved(pairs: list[Any]) -> list[Any]:
            return [(row - start, *rest) for row, *rest in pairs if start <= row < stop]

        return Case(
            stop - start,
            self.num_columns,
            moved(self.positives),
            moved(self.known),
            self.negatives,
            self.corrections,
            moved(self.given),
        )


def numbers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def indices(pairs: list[Any]) -> tuple[Tensor, Tensor]:
    return numbers([pair[0] for pair in pairs]), numbers([pair[1] for pair in pairs])


# The losses written out, one number after the other, left to autograd


class Slow:
    """Scores and logits of single cells, and the losses made of them."""

    def __init__(
        self,
        case: Case,
        user_BD: Tensor,
        item_CD: Tensor,
        temperature: Tensor | float = 1.0,
        hardest: Hardest | None = None,
    ) -> None:
        self.case, self.user_BD, self.item_CD, self.temperature = case, user_BD, item_CD, temperature
        self.hardest = hardest
        self.zero = 0 * (user_BD.sum() + item_CD.sum() + temperature)

    def plain(self, row: int, column: int) -> Tensor:
        return self.user_BD[row] @ self.item_CD[column] / self.temperature

    def logit(self, row: int, column: int) -> Tensor:
        return self.plain(row, column) - self.case.correction(column)

    def weights(self, row: int) -> dict[int, float]:
        """The row's negatives, each with 1, or with the weight of those that are not among its highest scores."""
        columns = self.case.negatives_of(row)
        if self.hardest is None:
            return dict.fromkeys(columns, 1.0)
        best = sorted(columns, key=lambda column: -self.plain(row, column).item())[: self.hardest.count]
        return {column: 1.0 if column in best else self.hardest.others for column in columns}

    def against(self, row: int) -> list[Tensor]:
        """Logits of the row's negatives; one that is the row's alone is there with certainty, so not corrected."""
        return [
            math.log(weight) + (self.logit(row, column) if self.case.is_common(column) else self.plain(row, column))
            for column, weight in self.weights(row).items()
        ]

    def shares(self, row: int) -> dict[int, float]:
        """The row's negatives, with their shares in a mean that has the weights 1 / q."""
        weight = {
            column: weight * (math.exp(-self.case.correction(column)) if self.case.is_common(column) else 1.0)
            for column, weight in self.weights(row).items()
        }
        return {column: each / sum(weight.values()) for column, each in weight.items()}

    def taken(self, row: int) -> list[tuple[int, float]]:
        return [(column, weight) for other, column, weight in self.case.positives if other == row]

    def softmax(self) -> Tensor:
        total = self.zero
        for row, column, weight in self.case.positives:
            own = self.logit(row, column)
            total = total + weight * (torch.logsumexp(torch.stack([own, *self.against(row)]), 0) - own)
        return total

    def bsl(self, temperature_ratio: float = 1.0) -> Tensor:
        total = self.zero
        for row in range(self.case.num_rows):
            taken, against = self.taken(row), self.against(row)
            mass = sum(weight for _, weight in taken)
            if not against or mass == 0:
                continue
            expected = [
                math.log(weight / mass) + self.logit(row, column) / temperature_ratio
                for column, weight in taken
                if weight > 0
            ]
            positive = temperature_ratio * torch.logsumexp(torch.stack(expected), 0)
            total = total + mass * (torch.logsumexp(torch.stack(against), 0) - positive)
        return total

    def bce(self, negative_weight: float = 1.0) -> Tensor:
        case, total = self.case, self.zero
        for row in range(case.num_rows):
            shown = [(column, label, weight) for other, column, label, weight in case.given if other == row]
            shown = [pair for pair in shown if pair[1] > 0 or not case.knows(row, pair[0])]
            mass = sum(weight for _, weight in self.taken(row)) + sum(label * weight for _, label, weight in shown)
            for column, weight in self.taken(row):
                total = total + weight * log_one_plus_exp(-self.logit(row, column))
            for column, label, weight in shown:
                cell = self.plain(row, column)
                cost = label * log_one_plus_exp(-cell) + (1 - label) * log_one_plus_exp(cell)
                total = total + weight * cost
            drawn = [
                self.logit(row, column)
                for column in range(case.num_columns)
                if case.is_common(column) and not case.knows(row, column) and not case.labels(row, column)
            ]
            for cell in drawn:
                total = total + negative_weight * mass / len(drawn) * log_one_plus_exp(cell)
        return total

    def softmax_bce(self, softmax_share: float = 0.5, negative_weight: float = 1.0) -> Tensor:
        return softmax_share * self.softmax() + (1 - softmax_share) * self.bce(negative_weight)

    def ccl(self, margin: float = 0.5, negative_weight: float = 150.0) -> Tensor:
        total = self.zero
        for row in range(self.case.num_rows):
            cost, push, mass = self.zero, 0.0, sum(weight for _, weight in self.taken(row))
            for other, share in self.shares(row).items():
                excess = torch.relu(self.plain(row, other) - margin)
                cost = cost + share * excess**2 / (2 * (1 - margin))
                push += share * excess.item() / (1 - margin)
            limited = negative_weight if push * negative_weight <= 1 else 1 / push
            total = total + mass * limited * cost
            for column, weight in self.taken(row):
                total = total + weight * (1 - self.plain(row, column))
        return total

    def pairwise(self, cost: Callable[[Tensor], Tensor]) -> Tensor:
        total = self.zero
        for row, column, weight in self.case.positives:
            for other, share in self.shares(row).items():
                total = total + weight * share * cost(self.plain(row, column) - self.plain(row, other))
        return total

    def bpr(self) -> Tensor:
        return self.pairwise(lambda lead: log_one_plus_exp(-lead))

    def margin(self, margin: float = 0.2) -> Tensor:
        return self.pairwise(lambda lead: torch.relu(margin - lead))

    def listwise(self, grades: str = "share") -> Tensor:
        total = self.zero
        for row in range(self.case.num_rows):
            shown = [pair for pair in self.case.given if pair[0] == row]
            if not shown:
                continue
            gains = [math.exp(label) if grades == "softmax" else max(label, 0.0) for *_, label, _ in shown]
            if sum(gains) == 0:
                continue
            log_total = torch.logsumexp(torch.stack([self.plain(row, column) for _, column, *_ in shown]), 0)
            for gain, (_, column, _, weight) in zip(gains, shown, strict=True):
                total = total + weight * gain / sum(gains) * (log_total - self.plain(row, column))
        return total


def log_one_plus_exp(value: Tensor) -> Tensor:
    return torch.logaddexp(value, torch.zeros_like(value))


# Every word of the config, some with other parameters than its own.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in LOSSES},
    "bce, negatives at .3": ("bce", {"negative_weight": 0.3}),
    "softmax_bce at .9": ("softmax_bce", {"softmax_share": 0.9, "negative_weight": 2.0}),
    "bsl at 2.5": ("bsl", {"temperature_ratio": 2.5}),
    "ccl at -.5": ("ccl", {"margin": -0.5, "negative_weight": 3.0}),
    "margin at 1": ("margin", {"margin": 1.0}),
    "listwise, ListNet": ("listwise", {"grades": "softmax"}),
}
WITHOUT_TEMPERATURE = {"ccl", "margin"}
WITHOUT_PRECISION = {"listwise"}


def drawn(seed: int, num_rows: int, num_columns: int, given_share: float = 0.0) -> Case:
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
    count = int(given_share * num_rows * num_columns)
    labels = [(0.0, 0.0, 0.0, 0.5, 1.0)[lot] for lot in whole(5, count)]
    given = list(zip(whole(num_rows, count), whole(num_columns, count), labels, reals(count), strict=True))
    return Case(num_rows, num_columns, positives, known, negatives, corrections, given)


CASES = {
    "one positive a row": Case(4, 6, [(row, row, 1.0) for row in range(4)]),
    "several positives a row": Case(3, 7, [(0, 1, 0.5), (0, 4, 0.5), (1, 0, 1.0), (2, 6, 0.2), (2, 5, 0.3), (2, 1, 1)]),
    "rows without positives": Case(4, 5, [(2, 3, 1.0)]),
    "no positives": Case(3, 4, []),
    "positives out of order": Case(4, 4, [(3, 0, 1.0), (0, 1, 2.0), (2, 2, 0.5), (0, 3, 0.1)]),
    "one positive twice": Case(2, 3, [(0, 1, 1.0), (0, 1, 0.5)]),
    "a positive of no weight": Case(2, 4, [(0, 1, 0.0), (0, 2, 0.5), (1, 3, 0.0)]),
    "known items are no negatives": Case(3, 5, [(0, 0, 1.0), (1, 1, 1.0)], known=[(0, 3), (0, 4), (1, 0), (2, 2)]),
    "an item known thrice": Case(2, 5, [(0, 0, 1.0), (1, 1, 1.0)], known=[(0, 3), (0, 3), (0, 0), (0, 3)]),
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
    "given: a graded list": Case(
        3, 5, [(0, 0, 1.0)], given=[(0, 2, 0.5, 1.0), (0, 0, 1.0, 1.0), (0, 4, 0.0, 2.0), (2, 1, 0.25, 1.0)]
    ),
    "given: a grade below 0": Case(2, 4, [(0, 0, 1.0)], given=[(0, 1, -1.0, 1.0), (0, 2, 0.5, 1.0), (1, 3, -2.0, 1.0)]),
    "given: refused, common candidates": Case(
        3, 5, [(0, 0, 1.0), (1, 1, 1.0)], given=[(0, 3, 0.0, 1.0), (2, 3, 0.0, 1.0)]
    ),
    "given: refused, for the row alone": Case(
        3,
        6,
        [(0, 0, 1.0), (1, 1, 1.0)],
        negatives=[0, 1],
        corrections=[-0.5, -1.0, -2.0, -3.0, -0.2, -0.7],
        given=[(0, 3, 0.0, 1.0), (1, 3, 0.0, 1.0), (0, 4, 0.0, 1.0), (0, 4, 0.0, 0.5), (1, 2, 0.0, 1.0)],
    ),
    "given: refused and yet known": Case(
        2, 5, [(0, 0, 1.0), (1, 1, 1.0)], [(0, 3)], [0, 1], given=[(0, 3, 0.0, 1.0), (0, 0, 0.0, 1.0)]
    ),
    "given: refused and liked": Case(2, 4, [(0, 0, 1.0)], negatives=[1], given=[(0, 3, 0.0, 1.0), (0, 3, 1.0, 1.0)]),
    "given: nothing else is a negative": Case(2, 4, [(0, 0, 1.0), (1, 1, 1.0)], negatives=[], given=[(0, 2, 0.0, 1.0)]),
    "given: rows without": Case(4, 4, [(1, 0, 1.0), (3, 1, 1.0)], given=[(1, 2, 1.0, 1.0), (1, 3, 0.0, 1.0)]),
    "given, drawn, narrow": drawn(3, 13, 7, 0.2),
    "given, drawn, wide": drawn(4, 6, 30, 0.2),
}


def both_ways(
    kind: str,
    case: Case,
    temperature: float = 0.5,
    *,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    hardest: Hardest | None = None,
) -> Iterator[list[Tensor]]:
    """The loss and its gradients for both sides and the temperature: written out in float64, then as computed."""
    name, parameters = KINDS[kind]
    if name == "listwise" and not case.given:
        pytest.skip("no lists")
    for type_ in (torch.float64, dtype):
        vectors = case.vectors(dtype, scale)  # the same numbers for both
        inputs = [each.detach().to(type_).requires_grad_() for each in vectors]
        inputs.append(torch.tensor(temperature, dtype=type_, requires_grad=True))
        given = inputs[:2] if name in WITHOUT_TEMPERATURE else inputs
        if type_ is torch.float64:
            slow = getattr(Slow(case, *given, hardest=hardest), name)(**parameters)
            yield [slow, *torch.autograd.grad(slow, given)]
        heat = {} if name in WITHOUT_TEMPERATURE else {"temperature": inputs[2]}
        relations = replace(case.relations(type_), hardest=hardest)
        loss = LOSSES[name](inputs[0], inputs[1], relations, **heat, **parameters)
        if type_ is dtype:
            yield [loss, *torch.autograd.grad(loss, given)]
            return


def assert_equal(kind: str, case: Case, temperature: float = 0.5, tolerance: float = 1e-10, **more: Any) -> None:
    expected, found = both_ways(kind, case, temperature, **more)
    assert len(expected) == len(found)
    for wanted, made in zip(expected, found, strict=True):
        assert made.isfinite().all()
        near = tolerance * max(1.0, float(wanted.detach().abs().max()) if wanted.numel() else 0.0)
        torch.testing.assert_close(made.double(), wanted, rtol=tolerance, atol=near)


def block_of(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 1)
    monkeypatch.setitem(blocks.BLOCK_CELLS, "cpu", cells)


@pytest.mark.parametrize("rows_a_block", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_are_those_of_the_sum_written_out(kind, rows_a_block, monkeypatch):
    """In float64, to ten decimals, in every case; the temperature's gradient included."""
    for name, case in CASES.items():
        if "listwise" in kind and not case.given:
            continue
        block_of(monkeypatch, rows_a_block * max(case.num_columns, 1))
        try:
            assert_equal(kind, case)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.005, 50.0])
def test_extreme_temperatures_are_exact(temperature, kind):
    """Also in float32, where logits beyond ±1,000 would overflow an exponential."""
    if KINDS[kind][0] in WITHOUT_TEMPERATURE:
        pytest.skip("has no temperature")
    for name in ("several positives a row", "no negative is left", "drawn, narrow", "given, drawn, wide"):
        if "listwise" in kind and "given" not in name:
            continue
        assert_equal(kind, CASES[name], temperature)
        assert_equal(kind, CASES[name], temperature, 2e-3, dtype=torch.float32)


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 12), st.integers(1, 150), st.sampled_from(list(KINDS)))
@settings(max_examples=80, deadline=None)
def test_any_drawn_case_is_the_sum_written_out(seed, num_rows, num_columns, cells, kind):
    case = drawn(seed, num_rows, num_columns, 0.2)
    if "listwise" in kind and not case.given:
        return
    with pytest.MonkeyPatch.context() as patch:
        block_of(patch, cells)
        assert_equal(kind, case, tolerance=1e-9)


@given(st.integers(0, 2**31), st.sampled_from(list(KINDS)), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_neither_the_order_of_pairs_nor_that_of_columns_matters(seed, kind, random):
    case = drawn(seed, 7, 9, 0.2)
    name, parameters = KINDS[kind]
    place = random.sample(range(9), 9)  # where each column goes

    def shuffled(pairs: list[Any]) -> list[Any]:
        return random.sample([(row, place[column], *rest) for row, column, *rest in pairs], len(pairs))

    moved = Case(
        7,
        9,
        shuffled(case.positives),
        shuffled(case.known),
        [place[column] for column in case.negatives],
        [case.corrections[place.index(column)] for column in range(9)],
        shuffled(case.given),
    )
    user_BD, item_CD = case.vectors()
    order = numbers([place.index(column) for column in range(9)])
    first = LOSSES[name](user_BD, item_CD, case.relations(), **parameters)
    second = LOSSES[name](user_BD, item_CD[order], moved.relations(), **parameters)
    assert second.item() == pytest.approx(first.item(), rel=1e-12, abs=1e-12)
    wanted, found = torch.autograd.grad(first, [user_BD, item_CD]), torch.autograd.grad(second, [user_BD, item_CD])
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_may_be_shared_out(kind):
    """The sum of the losses of two parts of the rows is that of all: what ranks do."""
    case = CASES["given, drawn, narrow"]
    name, parameters = KINDS[kind]
    user_BD, item_CD = case.vectors()
    whole = LOSSES[name](user_BD, item_CD, case.relations(), **parameters)
    parts = [
        LOSSES[name](user_BD[start:stop], item_CD, case.rows(start, stop).relations(has_given=True), **parameters)
        for start, stop in ((0, 4), (4, 4), (4, 13))
    ]
    assert parts[1].item() == 0
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-12)
    wanted = torch.autograd.grad(whole, [user_BD, item_CD])
    found = torch.autograd.grad(parts[0] + parts[1] + parts[2], [user_BD, item_CD])
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "listwise" not in kind])
@pytest.mark.parametrize("name", ["drawn, narrow", "given, drawn, narrow", "given: refused and yet known"])
def test_no_false_negative_gets_gradient(name, kind):
    """Row by row: no known item moves but the row's positives, and those only towards the row; nor does an item that
    stands against nobody."""
    case = CASES[name]
    function, parameters = KINDS[kind]
    num_watched = 0
    for row in range(case.num_rows):
        alone = case.rows(row, row + 1)
        user_BD, item_CD = (each[row : row + 1] if side == 0 else each for side, each in enumerate(case.vectors()))
        item_CD = item_CD.detach().requires_grad_()
        loss = LOSSES[function](user_BD.detach(), item_CD, alone.relations(), **parameters)
        (moved_CD,) = torch.autograd.grad(loss, item_CD)
        positives = {column for _, column, _ in alone.positives}
        liked = {column for _, column, label, _ in alone.given if label > 0}
        for column in range(case.num_columns):
            if column in positives | liked:
                assert moved_CD[column] @ user_BD[0] <= 1e-12 or column in liked, "a positive is pushed away"
            elif alone.knows(0, column) or column not in alone.negatives_of(0):
                num_watched += 1
                assert (moved_CD[column] == 0).all()
            elif function not in ("ccl", "margin"):
                assert alone.positives == [] or (moved_CD[column] != 0).any() or function == "bce" or not positives
    assert num_watched > 0


def test_backward_scales_with_what_comes_from_above():
    """As the model does when it divides by the number of rows."""
    case = CASES["given, drawn, narrow"]
    for name, function in LOSSES.items():
        user_BD, item_CD = case.vectors()
        plain = torch.autograd.grad(function(user_BD, item_CD, case.relations()), [user_BD, item_CD])
        scaled = torch.autograd.grad(function(user_BD, item_CD, case.relations()) * -3.0, [user_BD, item_CD])
        for one, other in zip(plain, scaled, strict=True):
            torch.testing.assert_close(other, -3.0 * one, msg=name)


def test_a_second_derivative_is_refused_rather_than_wrong():
    case = CASES["one positive a row"]
    user_BD, item_CD = case.vectors()
    loss = LOSSES["softmax"](user_BD, item_CD, case.relations())
    (slope,) = torch.autograd.grad(loss**2, user_BD, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["one positive a row", "several positives a row", "no negative is left", "drawn, wide"]
)
def test_cold_losses_of_long_vectors_stay_finite_and_right(name, kind):
    """Logits beyond ±10,000 at temperature 1e-3: float32 agrees with float64, where nothing is near the edge."""
    if "listwise" in kind:
        name = "given, drawn, wide"
    assert_equal(kind, CASES[name], 1e-3, 1e-3, dtype=torch.float32, scale=5.0)


def test_a_positive_far_below_its_sibling_keeps_its_own_loss():
    """Two positives of a row do not meet: one at logit 1,000 must not push the other's softmax out of float32."""
    case = Case(1, 3, [(0, 0, 1.0), (0, 1, 1.0)])
    user_BD = torch.tensor([[1.0, 0.0]], requires_grad=True)
    item_CD = torch.tensor([[1000.0, 0.0], [-2.0, 0.0], [-3.0, 0.0]], requires_grad=True)
    loss = LOSSES["softmax"](user_BD, item_CD, case.relations(torch.float32))
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1.0)), rel=1e-6)
    share = 1 / (1 + math.e)  # of the negative, in the second positive's softmax
    assert item_CD.grad is not None
    assert item_CD.grad[:, 0].tolist() == pytest.approx([0.0, -share, share], rel=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "listwise" not in kind])
def test_what_is_no_number_shows_in_the_loss(kind):
    """A NaN vector must not vanish in a comparison: training looks at the loss before it updates."""
    case = CASES["one positive a row"]
    name, parameters = KINDS[kind]
    user_BD, item_CD = case.vectors(torch.float32)
    with torch.no_grad():
        item_CD[5, 2] = float("nan")  # nobody's positive
    assert math.isnan(LOSSES[name](user_BD, item_CD, case.relations(torch.float32), **parameters).item())


# Precision


def unit(count: int, dim: int, seed: int) -> Tensor:
    made = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(made, dim=1).requires_grad_()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][0] not in WITHOUT_PRECISION])
def test_bf16_products_leave_the_loss_alone_and_the_gradient_close(kind):
    """The loss is equal to the last bit; gradients are some 1e-3 off, but not equal: the products are really narrow."""
    name, parameters = KINDS[kind]
    heat = {} if name in WITHOUT_TEMPERATURE else {"temperature": 0.1}
    user_BD, item_CD = unit(200, 5, 1), unit(300, 5, 2)
    row = torch.arange(200)
    relations = Relations(Pairs(row, row), Pairs(row, row))
    losses, gradients = [], []
    for precision in ("fp32", "bf16"):
        loss = LOSSES[name](user_BD, item_CD, relations, precision=precision, **heat, **parameters)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, [user_BD, item_CD]))
    assert losses[0] == losses[1]
    for wide, narrow in zip(*gradients, strict=True):
        error = float((wide - narrow).norm() / wide.norm())
        assert 1e-6 < error < 5e-3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][0] not in WITHOUT_PRECISION])
def test_bf16_logits_are_near(kind):
    """A logit of up to 10 is rounded by up to 2^-6; the loss of 200 rows and its gradients are then some 1e-3 off."""
    name, parameters = KINDS[kind]
    heat = {} if name in WITHOUT_TEMPERATURE else {"temperature": 0.1}
    user_BD, item_CD = unit(200, 5, 1), unit(300, 5, 2)
    row = torch.arange(200)
    log_q_C = torch.linspace(-3, 0, 300)
    relations = Relations(Pairs(row, row), Pairs(row, row), log_q_C=log_q_C if name in WITH_LOG_Q else None)
    losses, gradients = [], []
    for precision in ("fp32", "bf16_logits"):
        loss = LOSSES[name](user_BD, item_CD, relations, precision=precision, **heat, **parameters)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, [user_BD, item_CD]))
    assert losses[1] == pytest.approx(losses[0], rel=5e-3) and losses[0] != losses[1]
    for wide, narrow in zip(*gradients, strict=True):
        assert 1e-6 < float((wide - narrow).norm() / wide.norm()) < 0.1  # ccl has a kink


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_and_narrow_vectors_do_not_narrow_the_logits(name):
    """bfloat16 vectors give the loss of the same numbers in float32, and gradients of their own type."""
    case = CASES["given, drawn, wide"]
    narrow = [each.detach().bfloat16().requires_grad_() for each in case.vectors(torch.float32)]
    wide = [each.detach().float().requires_grad_() for each in narrow]
    relations = case.relations(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](*narrow, relations)
    expected = LOSSES[name](*wide, relations)
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item()
    for found, wanted in zip(torch.autograd.grad(loss, narrow), torch.autograd.grad(expected, wide), strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


# Memory


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


@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_with_rows_and_columns_not_with_their_product(kind, monkeypatch):
    """The largest tensor of forward and backward is a block, or as large as what came in; with 3 positives a row too,
    whose vectors together would be larger."""
    num_rows, num_columns, dim = 300, 400, 5
    block_of(monkeypatch, 5 * num_columns)
    monkeypatch.setitem(pair_products.CHUNK_NUMBERS, "cpu", 5 * num_columns)
    positives = [(row, (row + step) % num_columns, 1.0) for row in range(num_rows) for step in range(3)]
    given = [(row, (row + 7) % num_columns, 1.0, 1.0) for row in range(num_rows)]
    case = Case(num_rows, num_columns, positives, given=given)
    user_BD, item_CD = case.vectors(torch.float32, dim=dim)
    name, parameters = KINDS[kind]
    with LargestTensor() as largest:
        LOSSES[name](user_BD, item_CD, case.relations(torch.float32), **parameters).backward()
    assert largest.num_elements <= 5 * num_columns < len(positives) * dim < num_rows * num_columns
    with LargestTensor() as naive:
        torch.log_softmax(user_BD @ item_CD.T, 1).sum().backward()
    assert naive.num_elements == num_rows * num_columns, "the count itself would not see a whole matrix"


# Regularisers


def test_alignment_is_the_weighted_squared_distance_of_positives():
    case = CASES["drawn, narrow"]
    inputs = case.vectors()
    found = alignment(*inputs, case.relations().positive)
    expected = torch.stack(
        [weight * ((inputs[0][row] - inputs[1][column]) ** 2).sum() for row, column, weight in case.positives]
    ).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for one, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parts", [[9], [4, 5], [0, 9], [1, 1, 7]])
def test_nearness_of_parts_adds_up_to_the_double_sum(parts, monkeypatch):
    """Also its gradient, with respect to what is normalised."""
    block_of(monkeypatch, 18)
    raw_ND = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    unit_ND = torch.nn.functional.normalize(raw_ND, dim=1)
    starts = [sum(parts[:number]) for number in range(len(parts))]
    found = sum(nearness(unit_ND, start, count) for start, count in zip(starts, parts, strict=True))
    expected = torch.zeros((), dtype=torch.float64)
    for one in range(9):
        for other in range(9):
            if one != other:
                expected = expected + torch.exp(-2 * ((unit_ND[one] - unit_ND[other]) ** 2).sum())
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    slopes = [torch.autograd.grad(value, raw_ND, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-12)


def test_squared_lengths_are_those_of_pythagoras():
    assert squared_lengths(torch.tensor([[3.0, 4.0], [0.0, -2.0]])).tolist() == [25.0, 4.0]
