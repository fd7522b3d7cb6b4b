"""What a tower may do with its features: each by a second way, and two worlds that only one part can solve."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trec_twotower.config.model import ExpertsConfig, GatingConfig, TowerConfig
from trec_twotower.config.training import TrainConfig
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.model.tower import Tower, encoder_name
from trec_twotower.model.tower_layers import Crosses, Experts, FeatureDropout, FeatureGates, Missing, ShortLong, Unit

WIDTHS = (2, 3, 2)
ALONE = Ranks(0, 1, torch.device("cpu"))  # in no process group


@pytest.fixture
def feature_BE() -> Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


@pytest.mark.parametrize("wanted", ["fp32", "auto", "bf16"])
@pytest.mark.parametrize("is_training", [True, False])
def test_encoders_compute_in_bf16_where_it_is_asked_for_and_in_training_alone(monkeypatch, wanted, is_training):
    """`auto` is for layers; what an encoder returns is float32 in any case."""
    monkeypatch.setenv("TREC_TWOTOWER_PRECISION", "bf16")  # what auto is
    tower = Tower([4], 4, TowerConfig(), is_unit=False).train(is_training)
    tower.encoders[encoder_name("words")] = encoder = nn.Linear(4, 4)
    seen = []
    encoder.register_forward_hook(lambda _, __, made: seen.append(made.dtype))
    tower.trains_as(TrainConfig(precision=wanted), ALONE)
    assert tower.encode("words", torch.ones(3, 4)).dtype == torch.float32
    assert seen == [torch.bfloat16 if wanted == "bf16" and is_training else torch.float32]


def test_features_are_dropped_whole_in_training_alone():
    part = FeatureDropout(WIDTHS, [0.0, 0.25, 1.0])
    ones = torch.ones(4000, 7)
    dropped = part(ones)
    assert dropped[:, :2].all() and not dropped[:, 5:].any()
    assert (dropped[:, 2] == dropped[:, 3]).all() and (dropped[:, 3] == dropped[:, 4]).all()
    assert set(dropped.unique().tolist()) == {0.0, 1.0}  # nothing is scaled up
    assert float(dropped[:, 2].mean()) == pytest.approx(0.75, abs=0.03)
    assert part.eval()(ones).equal(ones)


def test_what_is_zero_gets_a_learned_vector_and_still_learns(feature_BE):
    part = Missing(WIDTHS, [0, 1])
    with torch.no_grad():
        part.vector_E.copy_(torch.arange(1.0, 6.0))
    feature_BE[1, :2] = 0
    feature_BE[2, 2:5] = 0
    feature_BE[3, 2] = 0  # one number alone says nothing
    feature_BE[4, 5:] = 0  # nor does a feature that is not named
    feature_BE.requires_grad_(True)
    made = part(feature_BE)
    expected = feature_BE.detach().clone()
    expected[1, :2], expected[2, 2:5] = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])
    assert made.equal(expected)
    made.sum().backward()
    assert feature_BE.grad.equal(torch.ones(5, 7)) and part.vector_E.grad.equal(torch.ones(5))


def test_some_features_together_have_length_one(feature_BE):
    """And rows in which they are zero stay zero, with a gradient that is finite."""
    feature_BE = feature_BE.clone()
    feature_BE[1, :2] = feature_BE[1, 5:] = 0
    feature_BE.requires_grad_()
    vector_BE = Unit(WIDTHS, [0, 2])(feature_BE)
    for row, found in zip(feature_BE.detach(), vector_BE.detach(), strict=True):
        length = math.sqrt(sum(float(row[place]) ** 2 for place in (0, 1, *range(5, len(row)))))
        for place in range(len(row)):
            expected = float(row[place]) / (length or 1.0) if place < 2 or place >= 5 else float(row[place])
            assert float(found[place]) == pytest.approx(expected, abs=1e-6)
    vector_BE.sum().backward()
    assert feature_BE.grad is not None and feature_BE.grad.isfinite().all()
    every = Unit(WIDTHS, [0, 1, 2])(feature_BE.detach())
    assert torch.allclose(every.square().sum(1), torch.ones(len(every)))


def test_gates_start_at_one_and_equal_the_formula_written_out(feature_BE):
    gates = FeatureGates(WIDTHS, GatingConfig(reduction=1), [])
    assert gates(feature_BE).equal(feature_BE)
    nn.init.normal_(gates.excite.weight)
    mean_BF = torch.stack([feature_BE[:, :2].mean(1), feature_BE[:, 2:5].mean(1), feature_BE[:, 5:].mean(1)], dim=1)
    weight_BF = 2 * torch.sigmoid(F.relu(gates.squeeze(mean_BF)) @ gates.excite.weight.T)
    parts = feature_BE.split(WIDTHS, dim=1)
    expected = torch.cat([part * weight_BF[:, [number]] for number, part in enumerate(parts)], dim=1)
    assert torch.allclose(gates(feature_BE), expected, atol=1e-6)


def test_gates_by_a_context_depend_on_that_alone(feature_BE):
    part = FeatureGates(WIDTHS, GatingConfig(by=("c",), reduction=1), [1])
    nn.init.normal_(part.excite.weight)
    nn.init.normal_(part.squeeze.bias)
    other = feature_BE.clone()
    other[:, 5:] += 1
    weight, changed = part(feature_BE) / feature_BE, part(other) / other
    assert torch.allclose(weight, changed, atol=1e-5)
    other[:, 2] += 1
    assert not torch.allclose(weight, part(other) / other, atol=1e-3)


def test_crosses_equal_the_formula_written_out(feature_BE):
    part = Crosses(7, 2)
    first = feature_BE * (feature_BE @ part.layers[0].weight.T + part.layers[0].bias) + feature_BE
    second = feature_BE * (first @ part.layers[1].weight.T + part.layers[1].bias) + first
    assert torch.allclose(part(feature_BE), second, atol=1e-5)


def test_short_and_long_meet_by_a_gate(feature_BE):
    part = ShortLong(WIDTHS, [1], 4)
    short = part.short(feature_BE[:, 2:5])
    long = part.long(torch.cat([feature_BE[:, :2], feature_BE[:, 5:]], dim=1))
    gate = torch.sigmoid(part.gate(feature_BE))
    assert torch.allclose(part(feature_BE), gate * short + (1 - gate) * long, atol=1e-6)
    assert part.figures(ALONE) == pytest.approx({"gate": float(gate.detach().mean())})


@pytest.mark.parametrize("top", [None, 1, 2])
def test_experts_equal_the_weighted_mean_written_out(top, feature_BE):
    part = Experts(7, ExpertsConfig(count=4, width=6, top_k=top))
    assert part.figures(ALONE) == {}
    used = torch.zeros(4)
    for row, logit_K in enumerate(part.router(feature_BE)):
        best = logit_K.argsort(descending=True)[: top or 4]
        weight = logit_K[best].softmax(0)
        used[best] += weight.detach() / len(feature_BE)
        expected = sum(weight[n] * part.experts[int(best[n])](feature_BE[row]) for n in range(len(best)))
        assert torch.allclose(part(feature_BE)[row], expected, atol=1e-6)
    assert part.figures(ALONE) == pytest.approx({f"expert_{number}": float(used[number]) for number in range(4)})


def test_the_penalty_of_experts_is_least_where_they_are_used_alike():
    part = Experts(2, ExpertsConfig(count=2, width=3, top_k=1, balance=1.0))
    part.weight_BK = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    assert float(part.penalty(ALONE)) == pytest.approx(1.0)
    part.weight_BK = torch.tensor([[0.9, 0.1], [0.7, 0.3]])
    assert float(part.penalty(ALONE)) == pytest.approx(2 * (1.0 * 0.8 + 0.0 * 0.2))


def test_a_tower_names_its_parts_figures(feature_BE):
    config = TowerConfig(short_term=("b",), experts=ExpertsConfig(count=2, width=3), mlp=(4,))
    tower = Tower(WIDTHS, 5, config, is_unit=True, place={"b": 1}.__getitem__)
    assert tower(feature_BE).shape == (5, 5)
    assert set(tower.figures(ALONE)) == {"gate", "expert_0", "expert_1"}
    assert tower.penalty(ALONE) is None  # all experts count: none is left out


@pytest.mark.parametrize("is_unit", [True, False])
@pytest.mark.parametrize("is_training", [True, False])
def test_wide_features_are_added_to_what_the_layers_make(is_unit, is_training):
    """Features as wide as the vector, past all layers, before its length becomes one."""
    config = TowerConfig(mlp=(5,), wide=("b", "c"))
    tower = Tower((2, 3, 3), 3, config, is_unit=is_unit, place={"b": 1, "c": 2}.__getitem__).train(is_training)
    feature_BE = torch.randn(5, 8)
    first, last = tower.layers[0], tower.layers[2]
    made_BD = F.relu(feature_BE @ first.weight.T + first.bias) @ last.weight.T + last.bias
    expected_BD = made_BD + feature_BE[:, 2:5] + feature_BE[:, 5:]
    expected_BD = expected_BD / expected_BD.square().sum(1, keepdim=True).sqrt() if is_unit else expected_BD
    assert torch.allclose(tower(feature_BE), expected_BD, atol=1e-6)


# Worlds that only one part can solve


def found(
    config: TowerConfig, feature_BE: Tensor, target_B: Tensor, widths: tuple[int, ...], steps: int = 250
) -> float:
    """How many rows of a half that was not trained on rank their own of the targets first."""
    torch.manual_seed(0)
    tower = Tower(widths, 16, config, is_unit=True, place=lambda name: int(name))
    item_ID = nn.Parameter(torch.randn(int(target_B.max()) + 1, 16))
    optimizer = torch.optim.Adam([*tower.parameters(), item_ID], lr=0.01)
    half = len(feature_BE) // 2
    for _ in range(steps):
        logit = tower(feature_BE[:half]) @ F.normalize(item_ID, dim=1).T / 0.1
        optimizer.zero_grad()
        F.cross_entropy(logit, target_B[:half]).backward()
        optimizer.step()
    with torch.no_grad():
        best_B = (tower(feature_BE[half:]) @ F.normalize(item_ID, dim=1).T).argmax(1)
    return float((best_B == target_B[half:]).float().mean())


def test_crosses_solve_a_world_of_pairs():
    """What is taken depends on the pair of two categories: (a + b) modulo 4; a sum of the two says nothing of it."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randint(0, 4, (2, 800), generator=generator)
    features = torch.cat([F.one_hot(a, 4), F.one_hot(b, 4)], dim=1).float()
    plain = found(TowerConfig(), features, (a + b) % 4, (4, 4))
    crossed = found(TowerConfig(crosses=2), features, (a + b) % 4, (4, 4))
    assert crossed > 0.95 and crossed > plain + 0.3, (crossed, plain)


def test_the_gate_solves_a_switch_of_regimes():
    """A user in a session wants what it shows, another what he always wanted; a sum of both cannot follow."""
    generator = torch.Generator().manual_seed(4)
    short, long = torch.randint(0, 6, (2, 1600), generator=generator)
    in_session = torch.randint(0, 2, (1600,), generator=generator)
    features = torch.cat([F.one_hot(short, 6), F.one_hot(long, 6), 4 * F.one_hot(in_session, 2)], dim=1).float()
    target = torch.where(in_session == 1, short, long)
    plain = found(TowerConfig(), features, target, (6, 6, 2))
    gated = found(TowerConfig(short_term=("0",)), features, target, (6, 6, 2))
    assert gated > 0.95 and gated > plain + 0.2, (gated, plain)


def test_gates_by_a_context_solve_a_switch_of_what_to_believe():
    """The context says which of two others counts; weights of features can follow it, a sum of all three cannot."""
    generator = torch.Generator().manual_seed(5)
    first, second = torch.randint(0, 6, (2, 1600), generator=generator)
    context = torch.randint(0, 2, (1600,), generator=generator)
    features = torch.cat([F.one_hot(first, 6), F.one_hot(second, 6), 4 * F.one_hot(context, 2)], dim=1).float()
    target = torch.where(context == 1, first, second)
    plain = found(TowerConfig(), features, target, (6, 6, 2))
    gated = found(TowerConfig(gating=GatingConfig(by=("2",), reduction=1)), features, target, (6, 6, 2))
    assert gated > 0.95 and gated > plain + 0.2, (gated, plain)


@pytest.mark.parametrize("top", [None, 1])
def test_experts_solve_a_world_of_kinds_of_users(top):
    """Each of four kinds reads the same signs another way; one layer for all cannot, a layer for each kind can."""
    generator = torch.Generator().manual_seed(6)
    kind, sign = torch.randint(0, 4, (1600,), generator=generator), torch.randint(0, 5, (1600,), generator=generator)
    meaning = torch.stack([torch.randperm(5, generator=generator) for _ in range(4)])
    features = torch.cat([F.one_hot(kind, 4), F.one_hot(sign, 5)], dim=1).float()
    target = meaning[kind, sign]
    plain = found(TowerConfig(), features, target, (4, 5))
    shared = found(TowerConfig(experts=ExpertsConfig(count=4, width=8, top_k=top)), features, target, (4, 5))
    assert shared > 0.9 and shared > plain + 0.2, (shared, plain)


def cold_and_warm(config: TowerConfig, id_scale: float) -> tuple[float, float]:
    """Of items that nobody took in training, and of the others: the share that their own taste is told to take.

    An item is its id, which starts within ±id_scale, and what is said of it: its taste's vector, in noise.
    """
    items, tastes, width = 200, 10, 8
    generator = torch.Generator().manual_seed(3)
    taste_I = torch.arange(items) % tastes
    said_IW = torch.randn(tastes, width, generator=generator)[taste_I]
    said_IW = said_IW + 0.5 * torch.randn(items, width, generator=generator)
    torch.manual_seed(0)
    id_IW = nn.Parameter(id_scale * (2 * torch.rand(items, width) - 1))
    user = nn.Parameter(torch.randn(tastes, 16))
    tower = Tower((width, width), 16, config, is_unit=True, place=lambda name: int(name))
    optimizer = torch.optim.Adam([*tower.parameters(), id_IW, user], lr=0.02)
    num_cold = items // 4
    for _ in range(300):
        item = tower(torch.cat([id_IW, said_IW], dim=1)[num_cold:])
        logit = F.normalize(user, dim=1)[taste_I[num_cold:]] @ item.T / 0.1
        optimizer.zero_grad()
        F.cross_entropy(logit, torch.arange(items - num_cold)).backward()
        optimizer.step()
    with torch.no_grad():
        item = tower.eval()(torch.cat([id_IW, said_IW], dim=1))
        best = (F.normalize(user, dim=1) @ item.T).topk(items // tastes, dim=1).indices
    is_found = torch.zeros(items, dtype=torch.bool)
    for taste, row in enumerate(best):
        is_found[row[taste_I[row] == taste]] = True
    return float(is_found[:num_cold].float().mean()), float(is_found[num_cold:].float().mean())


def test_cold_items_are_found_by_what_is_said_of_them():
    """Ids from zero and dropped half of the time, against random ids that are always there; warm items lose nothing."""
    plain, plain_warm = cold_and_warm(TowerConfig(), 8**-0.5)
    dropped, warm = cold_and_warm(TowerConfig(feature_dropout={"0": 0.5}, missing_vectors=("0",)), 0.0)
    assert dropped > plain + 0.1 and dropped > 0.9, (dropped, plain)
    assert warm > plain_warm - 0.03, (warm, plain_warm)
