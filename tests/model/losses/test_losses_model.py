"""The loss as a config words it: what is refused, and what the model makes of each word."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kinds import LOSS_PARAMETERS, WITH_LOG_Q
from tests.ranks.launch import SAID_BY_TORCHREC
from tests.ranks.worlds import event_config, user_config
from trec_twotower.config.base import as_values, validate
from trec_twotower.config.loading import apply_overrides, parse_yaml
from trec_twotower.config.losses import LossConfig
from trec_twotower.config.run_config import RunConfig, check_same_run, config_hash
from trec_twotower.data.loading.batch import Batch
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.errors import ConfigError
from trec_twotower.model.losses import LOSSES, Pairs
from trec_twotower.model.two_tower import TwoTower, relations_of
from trec_twotower.training.loop import train
from trec_twotower.training.model_builder import build_model, inner_model
from trec_twotower.training.optimizer import RunOptimizer
from trec_twotower.training.run_dir import Run

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)
GIVEN = {"column": "shown", "labels": "grades"}
SMALL = """
data: {dataset: data/d}
user: [{name: age, kind: number}]
item: [{name: item_id, kind: id, buckets: 100, dim: 8}]
"""


def small(*overrides: str) -> RunConfig:
    return validate(RunConfig, apply_overrides(parse_yaml(SMALL, "small"), overrides), "small.yaml")


def of_kind(kind: str, *overrides: str) -> RunConfig:
    extra = [f"loss.impressions={json.dumps(GIVEN)}"] if kind == "listwise" else []
    return small(f"loss.kind={kind}", *extra, *overrides)


# The words


def test_every_loss_has_its_word_its_parameters_and_its_function():
    assert {member.title() for member in LossConfig.members()} == set(LOSSES) == set(LOSS_PARAMETERS)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_has_its_own_defaults_and_none_of_the_others(kind):
    """And a config that was saved with them is the same config."""
    config = of_kind(kind)
    assert config.loss.parameters == LOSS_PARAMETERS[kind]
    assert config.loss.log_q_strength == (1.0 if kind in WITH_LOG_Q else 0.0)
    assert validate(RunConfig, json.loads(json.dumps(as_values(config))), "saved") == config


OTHER_VALUE = {
    "temperature": 0.3,
    "precision": "bf16",
    "softmax_share": 0.25,
    "negative_weight": 7.0,
    "temperature_ratio": 2.0,
    "margin": 0.3,
    "grades": "softmax",
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, told in LOSS_PARAMETERS.items() for name in told])
def test_a_parameter_reaches_its_loss_and_binds_the_run(kind, name):
    first, second = of_kind(kind), of_kind(kind, f"loss.{name}={OTHER_VALUE[name]}")
    assert second.loss.parameters == {**LOSS_PARAMETERS[kind], name: OTHER_VALUE[name]}
    assert config_hash(first) != config_hash(second)
    with pytest.raises(ConfigError, match=rf"loss\.{name} was "):
        check_same_run(first, second, Path("runs/small"))


def test_the_kind_and_what_is_given_bind_the_run():
    assert len({config_hash(of_kind(kind)) for kind in LOSSES}) == len(LOSSES)
    shared = [small(f"loss.impressions={{column: shown, shared: {word}}}") for word in ("true", "false")]
    assert len({config_hash(config) for config in (small(), *shared)}) == 3


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, told in LOSS_PARAMETERS.items() for name in OTHER_VALUE if name not in told],
)
def test_a_parameter_of_another_loss_is_refused_with_its_mend(kind, name):
    with pytest.raises(ConfigError) as caught:
        of_kind(kind, f"loss.{name}={OTHER_VALUE[name]}")
    assert f"'loss' is of kind {kind!r}, which has no {name}: remove it." in str(caught.value)
    assert of_kind(kind, f"loss.{name}=null").loss.kind == kind  # what the message says


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.kind=sofmax"], "'loss.kind' is 'sofmax', which is not a kind (nearest: 'softmax')."),
        (["loss.temperature=0"], "'loss.temperature' is 0: input should be greater than 0"),
        (["loss.temperature=-1"], "'loss.temperature' is -1"),
        (["loss.temperature=.nan"], "'loss.temperature' is nan: input should be a finite number"),
        (["loss.temperature=warm"], "'loss.temperature' is 'warm'"),
        (["loss.temperature={learned: false}"], "'loss.temperature.learned' is False"),
        (["loss.temperature={start: 0.1}"], "'loss.temperature.learned' is missing"),
        (["loss.temperature={learned: true, lov: 1}"], "unknown key 'loss.temperature.lov' (nearest: 'low')"),
        (["loss.temperature={learned: true, low: 0}"], "'loss.temperature.low' is 0"),
        (["loss.temperature={learned: true, start: 1}"], "starts at 1, which is not between low = 0.01 and high = 1"),
        (["loss.temperature={learned: true, low: 0.5, high: 0.2}"], "not between low = 0.5 and high = 0.2"),
        (["loss.precision=fp16"], "'loss.precision' is 'fp16'"),
        (["loss.kind=softmax_bce", "loss.softmax_share=1.5"], "'loss.softmax_share' is 1.5"),
        (["loss.kind=softmax_bce", "loss.softmax_share=-0.1"], "'loss.softmax_share' is -0.1"),
        (["loss.kind=bce", "loss.negative_weight=0"], "'loss.negative_weight' is 0"),
        (["loss.kind=bsl", "loss.temperature_ratio=0"], "'loss.temperature_ratio' is 0"),
        (["loss.kind=ccl", "loss.margin=1"], "'loss.margin' is 1: input should be less than 1"),
        (["loss.kind=ccl", "loss.margin=-2"], "'loss.margin' is -2"),
        (["loss.kind=margin", "loss.margin=0"], "'loss.margin' is 0: input should be greater than 0"),
        (["loss.kind=ccl", "model.similarity=dot"], "loss.kind is ccl, which needs"),
        (
            ["loss.regularization.uniformity=1", "model.similarity=dot"],
            "loss.regularization.uniformity is set, which needs",
        ),
        (
            ["loss.regularization.alignment=1", "model.similarity=dot"],
            "loss.regularization.alignment is set, which needs",
        ),
        (["loss.regularization.norm=-1"], "'loss.regularization.norm' is -1"),
        (["loss.kind=ccl", "loss.log_q_strength=0.5"], "unknown key 'loss.log_q_strength'"),
        (["loss.kind=listwise"], "set loss.impressions.column and loss.impressions.labels"),
        (
            ["loss.kind=listwise", "loss.impressions={column: shown}"],
            "set loss.impressions.column and loss.impressions.labels",
        ),
        (["loss.impressions={}"], "'loss.impressions.column' is missing"),
        (["loss.negatives.in_batch=false"], "so there are no negatives"),
        (["data.batch_size=1"], "in-batch negatives need at least 2 rows"),
        (["data.batch_size=1", "loss.kind=ccl"], "in-batch negatives need at least 2 rows"),
    ],
)
def test_a_loss_that_cannot_be_right_is_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        small(*overrides)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_row_is_given_is_enough_to_tell_from():
    """Without other rows or samples; and a graded list needs no negatives at all."""
    alone = ["data.batch_size=1", "loss.negatives.in_batch=false"]
    assert of_kind("listwise", *alone).data.batch_size == 1
    assert small(*alone, "loss.impressions={column: shown}").loss.impressions.shared


# The model


@pytest.fixture(scope="module")
def worlds(small_world, lone_rank, tmp_path_factory) -> dict[str, tuple[RunConfig, Batch]]:
    """A config and its first batch, of events and of users with several positives."""
    made = {}
    for name, make in (("event", event_config), ("user", user_config)):
        config = make(small_world, tmp_path_factory.mktemp(name))
        run = Run.create_or_open(config, lone_rank)
        batches = TrainBatches(run.initialize(lone_rank), config.data, config.loss, run.item_counts(), (0, 1))
        made[name] = config, next(batches.iter_from(0, 1))
    return made


def with_loss(config: RunConfig, **loss: Any) -> RunConfig:
    """The config with another loss section, but for its negatives."""
    values = as_values(config)
    return validate(RunConfig, {**values, "loss": {"negatives": values["loss"]["negatives"], **loss}}, "a test")


def given_pairs(batch: Batch) -> Batch:
    """The batch with a pair for each row, graded 0, 1 and 2 in turn."""
    row = torch.arange(len(batch.user_divisor_BF))
    column = (5 * row + 1) % len(batch.log_q_C)
    given = Pairs(
        row.repeat(2),
        torch.cat([column, (column + 3) % len(batch.log_q_C)]),
        weight_P=torch.ones(2 * len(row)),
        label_P=(torch.arange(2 * len(row)) % 3).float(),
    )
    return replace(batch, targets=replace(batch.targets, given=given))


@pytest.mark.parametrize("world", ["event", "user"])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_model_gives_its_loss_the_batch_and_the_config(kind, world, worlds, lone_rank):
    """The mean over rows of the function of that word, with the parameters of the config."""
    config, batch = worlds[world]
    parameters = {name: OTHER_VALUE[name] for name in LOSS_PARAMETERS[kind] if name != "precision"}
    if kind == "ccl":
        # Some negatives of this small dataset are above the margin, and do not push as hard as the positives pull.
        parameters |= {"margin": -0.5, "negative_weight": 0.5}
    given = {"impressions": GIVEN} if kind in ("listwise", "bce") else {}
    config = with_loss(config, kind=kind, **parameters, **given)
    batch = given_pairs(batch) if given else batch
    model = inner_model(build_model(config, lone_rank))
    users, items = model.encode_users(batch), model.encode_items(batch)
    related = relations_of(batch, config.loss.log_q_strength)
    expected = LOSSES[kind](users, items, related, **config.loss.parameters) / batch.num_rows_of_all_ranks
    found = model(batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.item() > 0
    for name, value in parameters.items():
        if (kind, name, world) == ("bsl", "temperature_ratio", "event"):
            continue  # plays no part where each row has one positive
        without = {**config.loss.parameters, name: LOSS_PARAMETERS[kind][name]}
        other = LOSSES[kind](users, items, related, **without) / batch.num_rows_of_all_ranks
        assert other.item() != pytest.approx(expected.item(), rel=1e-6), f"{name} = {value} changes nothing"


@pytest.mark.parametrize("kind", ["softmax", "bpr"])
def test_the_strength_of_log_q_is_a_factor_of_the_batchs(kind, worlds, lone_rank):
    config, batch = worlds["event"]
    config = with_loss(config, kind=kind, log_q=0.25)
    model = inner_model(build_model(config, lone_rank))
    users, items = model.encode_users(batch), model.encode_items(batch)
    values = {}
    for strength in (0.25, 1.0):
        related = replace(relations_of(batch), log_q_C=strength * batch.log_q_C)
        values[strength] = LOSSES[kind](users, items, related, **config.loss.parameters).item()
    found = model(batch).item() * batch.num_rows_of_all_ranks
    assert found == pytest.approx(values[0.25], rel=1e-6) != pytest.approx(values[1.0], rel=1e-4)


def test_a_batch_without_the_pairs_that_the_config_wants_is_no_batch(worlds, lone_rank):
    config, batch = worlds["event"]
    model = inner_model(build_model(with_loss(config, impressions=GIVEN), lone_rank))
    with pytest.raises(AssertionError, match=r"loss\.impressions is set"):
        model(batch)


def written_out(user_BD: Tensor, item_CD: Tensor, positive: Pairs) -> dict[str, Tensor]:
    """The regularisers, per row of the step."""

    def uniformity(vector_ND: Tensor) -> Tensor:
        square_NN = ((vector_ND[:, None] - vector_ND[None]) ** 2).sum(2)
        return torch.exp(-2 * square_NN[~torch.eye(len(vector_ND), dtype=torch.bool)]).mean().log()

    apart_P = ((user_BD[positive.row_P] - item_CD[positive.column_P]) ** 2).sum(1)
    return {
        "norm": (user_BD**2).sum(1).mean() + (item_CD**2).sum(1).mean(),
        "alignment": (positive.weight_P * apart_P).sum() / len(user_BD),
        "uniformity": (uniformity(user_BD) + uniformity(item_CD)) / 2,
    }


@pytest.mark.parametrize("name", ["norm", "alignment", "uniformity"])
def test_a_regulariser_adds_its_weight_times_itself(name, worlds, lone_rank):
    """To the loss and to the gradient of every layer."""
    config, batch = worlds["user"]
    models = [
        inner_model(build_model(with_loss(config, **extra), lone_rank))
        for extra in ({}, {"regularization": {name: 0.7}})
    ]
    plain, more = (model(batch) for model in models)
    users, items = models[1].encode_users(batch), models[1].encode_items(batch)
    added = 0.7 * written_out(users, items, relations_of(batch).positive)[name]
    assert more.item() - plain.item() == pytest.approx(added.item(), rel=1e-4)
    layers = [list(model.user_tower.parameters()) + list(model.item_tower.parameters()) for model in models]
    slopes = [
        torch.autograd.grad(value, parts)
        for value, parts in ((more, layers[1]), (plain, layers[0]), (added, layers[1]))
    ]
    for of_more, of_plain, of_added in zip(*slopes, strict=True):
        torch.testing.assert_close(of_more, of_plain + of_added, rtol=1e-3, atol=1e-5)


# A learned temperature

LEARNED = {"learned": True, "start": 0.2, "low": 0.05, "high": 0.5}


@pytest.mark.parametrize("kind", [kind for kind, told in LOSS_PARAMETERS.items() if "temperature" in told])
def test_the_temperature_has_a_gradient_and_exactly_one_optimizer(kind, worlds, lone_rank):
    """That of the finite difference; and Adam, which decays no weights, is what moves it."""
    config, batch = worlds["event"]
    given = {"impressions": GIVEN} if kind == "listwise" else {}
    config = with_loss(config, kind=kind, temperature=LEARNED, **given)
    batch = given_pairs(batch) if given else batch
    model = build_model(config, lone_rank)
    inner: TwoTower = inner_model(model)
    optimizer = RunOptimizer(model, config.train.optimizer)
    owners = [
        (name, part)
        for name, part in optimizer._combined.optimizers
        for parameter in part.params
        if "temperature" in parameter
    ]
    assert [name for name, _ in owners] == ["dense"]
    assert all(group.get("weight_decay", 0) == 0 for group in owners[0][1].param_groups)
    position = inner.temperature.position
    assert inner.figures() == {"temperature": pytest.approx(0.2, rel=1e-5)}
    (slope,) = torch.autograd.grad(inner(batch), position)
    values = []
    with torch.no_grad():
        for change in (1e-2, -2e-2):
            position += change
            values.append(inner(batch).item())
    assert slope.item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-2, abs=1e-4)


def test_training_moves_logs_and_keeps_the_temperature(small_world, lone_rank, tmp_path):
    """Each logged line has it; the checkpoint resumes it; and it is within its bounds."""
    config = event_config(small_world, tmp_path / "run", loss={"temperature": LEARNED}, train={"epochs": 2})
    train(config, lone_rank)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    values = [line["temperature"] for line in lines if line["kind"] == "train"]
    assert len(values) > 4 and len(set(values)) == len(values)
    assert all(LEARNED["low"] < value < LEARNED["high"] for value in values)
    assert values[0] != pytest.approx(0.2, rel=1e-5)
    longer = event_config(small_world, tmp_path / "run", loss={"temperature": LEARNED}, train={"epochs": 3})
    train(longer, lone_rank)
    at_once = event_config(small_world, tmp_path / "other", loss={"temperature": LEARNED}, train={"epochs": 3})
    train(at_once, lone_rank)
    both = [
        [json.loads(line)["temperature"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "other")
    ]
    assert both[0] == both[1]


def test_a_fixed_temperature_is_no_parameter_and_not_logged(worlds, lone_rank):
    model = build_model(worlds["event"][0], lone_rank)
    assert inner_model(model).figures() == {}
    assert not [name for name, _ in model.named_parameters() if "temperature" in name]


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "listwise"])
def test_a_few_steps_of_every_loss_lower_it(kind, worlds, lone_rank):
    """On one batch, again and again, by the run's own optimizers."""
    config, batch = worlds["event"]
    config = with_loss(config, kind=kind)
    model = build_model(config, lone_rank)
    optimizer = RunOptimizer(model, config.train.optimizer)
    losses = []
    for step in range(12):
        optimizer.set_rates(step, 12)
        loss = model(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    vectors = F.normalize(inner_model(model).encode_users(batch), dim=1)
    assert vectors.isfinite().all()
