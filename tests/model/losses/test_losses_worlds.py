"""What the losses find in worlds whose best scores or temperature are known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from tests.kinds import build_loss
from trec_twotower.config.data import DataConfig
from trec_twotower.config.features import build_feature
from trec_twotower.config.losses import LearnedTemperature
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.data.negatives.samplers import count_items
from trec_twotower.model.losses import LOSSES, Pairs, Relations
from trec_twotower.model.losses.temperature import Temperature
from trec_twotower.model.two_tower import relations_of

softmax, bce = LOSSES["softmax"], LOSSES["bce"]


def own(count: int) -> Pairs:
    """Row i took column i."""
    return Pairs(torch.arange(count), torch.arange(count))


# logQ


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
            loss = softmax(
                user_BD,
                torch.cat([item_ID[positive][None], item_ID[column_C]]),
                Relations(
                    own(1),
                    own(1),
                    # The positive stands for itself: it is drawn with certainty.
                    log_q_C=torch.cat([torch.zeros(1), (num_drawn * popularity_I[column_C]).log()])
                    if name == "corrected"
                    else None,
                ),
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
        return softmax(
            torch.ones(num_rows, 1, dtype=torch.float64),
            logit_I[item_C][:, None],
            Relations(
                positive=Pairs(rows, num_drawn + rows, torch.full((num_rows,), 1 / num_rows, dtype=torch.float64)),
                known=Pairs(known_row, known_column),
                log_q_C=(num_drawn * popularity_I[item_C]).log() * is_negative_C if is_corrected else None,
                is_negative_C=is_negative_C,
            ),
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


@pytest.fixture(scope="module")
def popularity_world(tmp_path_factory, write_dataset) -> tuple[FeatureDataset, Tensor]:
    """60 items that one and the same user takes in proportion to 1, 1/2, 1/3 ...; and the logs of their shares."""
    rng, num_items, num_rows = np.random.default_rng(0), 60, 12_000
    wanted_I = 1 / np.arange(1, num_items + 1)
    item = np.repeat(np.arange(num_items), np.round(wanted_I / wanted_I.sum() * num_rows).astype(int))
    rng.shuffle(item)
    folder = write_dataset(
        tmp_path_factory.mktemp("popular") / "d",
        train=pa.table({"user_id": np.zeros(len(item), np.int64), "item_id": item}),
        items=pa.table({"item_id": np.arange(num_items)}),
    )
    table = TableSpec(buckets=num_items, dim=4, hashing="modulo")
    user, item_id = (build_feature(name=name, kind="id", table="t") for name in ("user_id", "item_id"))
    share_I = torch.from_numpy(np.bincount(item) / len(item))
    return FeatureDataset(Dataset(folder), Schema.build({"t": table}, (user,), (item_id,)), "event"), share_I.log()


@pytest.mark.parametrize(
    ("case", "low", "high"),
    [
        ({}, 0.96, 1.04),
        ({"log_q": 0.0}, -0.1, 0.4),
        ({"negatives": {"sampled": 6, "power": 0.75}}, 0.96, 1.04),
        ({"negatives": {"in_batch": False, "sampled": 12}}, 0.96, 1.04),
    ],
    ids=["in-batch", "in-batch, uncorrected", "and by popularity", "even samples alone"],
)
def test_the_batches_own_corrections_let_scores_be_the_logs_of_popularity(popularity_world, case, low, high):
    """With the engine's candidates and its log q, one score an item is fitted, of which none depends on the user.

    The full softmax has its optimum where an item's score is the log of its share, up to a constant: the slope of one
    on the other is 1. Uncorrected in-batch negatives make popular items pay for being popular: it is near 0. The other
    slopes that were seen lie within .01 of 1.
    """
    sources, log_share_I = popularity_world
    loss = build_loss(**{**case, "temperature": 1.0})
    data = DataConfig(dataset=str(sources.dataset.folder), batch_size=16, shuffle_rows=20_000, threads=0)
    batches = TrainBatches(sources, data, loss, count_items(sources, loss), (0, 1))
    num_steps = 1500
    score_I = torch.zeros(len(log_share_I), requires_grad=True)
    optimizer = torch.optim.Adam([score_I], lr=0.05)
    total_I = torch.zeros(len(log_share_I))
    for step, batch in enumerate(batches.iter_from(0, num_steps)):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / num_steps)
        optimizer.zero_grad()
        item_C = batch.sparse["item:item_id"].values()[: batch.item_sizes[0]].long()
        rows = batch.num_rows_of_all_ranks
        (softmax(torch.ones(rows, 1), score_I[item_C][:, None], relations_of(batch, loss.log_q)) / rows).backward()
        optimizer.step()
        if step >= num_steps // 2:
            total_I += score_I.detach()
    slope = np.polyfit(log_share_I.numpy(), (total_I / (num_steps // 2)).numpy(), 1)[0]
    assert low < slope < high


# Binary cross-entropy


@pytest.mark.parametrize("negative_weight", [1.0, 0.25])
@pytest.mark.parametrize("is_corrected", [True, False])
def test_the_best_scores_of_bce_are_log_odds_unless_uncorrected_by_popularity(is_corrected, negative_weight):
    """Users take item j with probability p_j; it is a candidate with probability q_j.

    The expectation is exact: all 16 sets of candidates, weighted by their probabilities, beside 4,000 items that nobody
    takes and whose scores are so low that they count in N alone. The best score is log(p / (1 - p) * N / weight), and
    without the correction less by log q: a known, large bias against popular items.
    """
    take_I = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    candidate_I = torch.tensor([0.9, 0.5, 0.2, 0.05], dtype=torch.float64)
    num_items, num_others = 4, 4000
    log_q_C = torch.cat([candidate_I.log(), torch.zeros(num_others)]) if is_corrected else None
    sets = []
    for is_in in product([False, True], repeat=num_items):
        is_in_I = torch.tensor(is_in)
        probability = torch.where(is_in_I, candidate_I, 1 - candidate_I).prod()
        sets.append((float(probability), torch.cat([is_in_I, torch.ones(num_others, dtype=torch.bool)])))
    positive = Pairs(torch.arange(num_items), torch.arange(num_items), take_I)

    def expected_loss(score_I: Tensor) -> Tensor:
        item_CD = torch.cat([score_I, score_I.new_full((num_others,), -60.0)])[:, None]
        user_BD = torch.ones(num_items, 1, dtype=torch.float64)
        return sum(
            probability
            * bce(
                user_BD,
                item_CD,
                Relations(positive, positive, log_q_C=log_q_C, is_negative_C=is_negative_C),
                negative_weight=negative_weight,
            )
            for probability, is_negative_C in sets
        )

    score_I = torch.zeros(num_items, dtype=torch.float64, requires_grad=True)
    exact = {"max_iter": 60, "tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([score_I], **exact)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = expected_loss(score_I)
        loss.backward()
        return loss

    optimizer.step(closure)
    best_I = (take_I / (1 - take_I)).log() + torch.log(torch.tensor(num_others / negative_weight))
    if not is_corrected:
        best_I = best_I - candidate_I.log()
    torch.testing.assert_close(score_I.detach(), best_I, rtol=0, atol=2e-3)  # N varies by 4 in 4,000


# Temperature


def learned(start: float, low: float = 0.01, high: float = 1.0) -> Temperature:
    return Temperature(LearnedTemperature(learned=True, start=start, low=low, high=high), torch.device("cpu"))


def fit(temperature: nn.Module, loss: Callable[[], Tensor], num_steps: int = 400) -> None:
    optimizer = torch.optim.Adam(temperature.parameters(), lr=0.2, betas=(0.9, 0.95))  # forgets the steep start
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / num_steps)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def planted(best: float) -> Callable[[Tensor], Tensor]:
    """The expected softmax loss where items are taken with the probabilities softmax(scores / best).

    As a function of the temperature it is a cross-entropy, least where it is the entropy: at `best`.
    """
    random = torch.Generator().manual_seed(2)
    score_I = 2 * torch.rand(30, generator=random, dtype=torch.float64) - 1
    interactions_I = torch.softmax(score_I / best, 0)
    positive = Pairs(torch.arange(30), torch.arange(30), interactions_I)
    user_BD = torch.ones(30, 1, dtype=torch.float64)
    return lambda temperature: softmax(
        user_BD, score_I[:, None], Relations(positive, positive), temperature=temperature.double()
    )


@pytest.mark.parametrize("start", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("best", [0.05, 0.2, 0.6])
def test_a_learned_temperature_finds_the_planted_one(best, start):
    temperature, loss = learned(start), planted(best)
    assert temperature().item() == pytest.approx(start, rel=1e-5)
    fit(temperature, lambda: loss(temperature()))
    assert temperature().item() == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize(("best", "bound"), [(0.03, 0.1), (2.0, 0.5)])
def test_a_learned_temperature_stays_within_its_bounds(best, bound):
    """And goes to the one beyond which the best lies."""
    temperature, loss = learned(0.2, 0.1, 0.5), planted(best)
    fit(temperature, lambda: loss(temperature()))
    assert 0.1 <= temperature().item() <= 0.5
    assert temperature().item() == pytest.approx(bound, rel=0.02)
