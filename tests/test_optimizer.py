"""Every update is the textbook's: tables fused or not, Adam from its first step, rates by the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks.launch import SAID_BY_TORCHREC
from tests.ranks.worlds import MIXED, event_config
from trec_twotower.config import OptimizerConfig, RunConfig, validate
from trec_twotower.data.batch import make_batch
from trec_twotower.data.lists import Lists
from trec_twotower.data.transforms import Columns
from trec_twotower.optimizer import RunOptimizer, rate_share
from trec_twotower.train import build_model, towers

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)
BUCKETS, DIM, SHARD_COLUMNS = 6, 8, 4
BAGS = [[1, 1, 3], [], [4]]  # row 1 twice in one bag; rows 0, 2 and 5 never
IDS = [3, 2]  # row 3 once more, by the other side's feature


def one_table(plan: str, **optimizer: Any) -> RunConfig:
    """A history and an item id on one table; rates rise over two steps, then fall linearly."""
    values = {
        "data": {"dataset": "nowhere"},
        "tables": {"t": {"buckets": BUCKETS, "dim": DIM, "sharding": plan}},
        "user": [{"name": "history", "kind": "bag", "table": "t"}],
        "item": [{"name": "item_id", "kind": "id", "table": "t"}],
        "model": {"dim": 4},
        "train": {"optimizer": {"warmup_steps": 2, "schedule": "linear", **optimizer}},
    }
    return validate(RunConfig, values, "a test's config")


def only_table(model: torch.nn.Module) -> np.ndarray:
    """A copy of the table, in float64."""
    (value,) = (value for name, value in model.state_dict().items() if name.endswith("embedding_bags.t.weight"))
    if not hasattr(value, "local_shards"):
        return value.detach().double().numpy().copy()
    out = np.full((BUCKETS, DIM), np.nan)
    for shard in value.local_shards():
        row, column = shard.metadata.shard_offsets
        rows, width = shard.tensor.shape
        out[row : row + rows, column : column + width] = shard.tensor.detach().numpy()
    return out


def columns(name: str, lists: list[list[int]]) -> Columns:
    return Columns(len(lists), {name: Lists.from_lists(lists)}, {})


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("plan", ["table_wise", "row_wise", "column_wise", "data_parallel"])
def test_three_steps_of_a_table_are_those_by_hand(plan, kind, lone_rank):
    """In the training loop's order of calls. A row's gradient is the sum over all the places that look it up.

    SGD: w -= lr g. Adagrad: s += g², w -= lr g / (sqrt(s) + eps), elementwise; row-wise with one s a row, of the mean
    of g² (over a shard's columns). The rate is the step's own from the first step on.
    """
    config = one_table(plan, sparse=kind, lr=0.3, eps=1e-3)
    model = build_model(config, lone_rank)
    optimizer = RunOptimizer(model, config.train.optimizer)
    batch = make_batch(towers(model).schema, columns("history", BAGS), columns("item_id", [[row] for row in IDS]))
    expected, state = only_table(model), np.zeros((BUCKETS, DIM))
    random = np.random.default_rng(4)
    for step, rate in enumerate([0.3 * 0.5, 0.3 * 1.0, 0.3 * 1.0, 0.3 * (1 - 0.98 / 8)]):
        wish = {"user:history": random.normal(size=(3, DIM)), "item:item_id": random.normal(size=(2, DIM))}
        optimizer.set_rates(step, 10)
        pooled = towers(model).tables(batch.sparse).to_dict()
        loss = sum((pooled[key][: len(want)] * torch.from_numpy(want).float()).sum() for key, want in wish.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        gradient = np.zeros((BUCKETS, DIM))
        for bag, want in zip(BAGS, wish["user:history"], strict=True):
            for row in bag:
                gradient[row] += want
        for row, want in zip(IDS, wish["item:item_id"], strict=True):
            gradient[row] += want
        width = {"sgd": None, "adagrad": 1, "rowwise_adagrad": SHARD_COLUMNS if plan == "column_wise" else DIM}[kind]
        if width is None:
            expected -= rate * gradient
        else:
            squares = (gradient**2).reshape(BUCKETS, -1, width).mean(2)
            state += np.repeat(squares, width, axis=1)
            expected -= rate * gradient / (np.sqrt(state) + 1e-3)
        np.testing.assert_allclose(only_table(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plan", ["table_wise", "data_parallel"])
def test_three_steps_of_the_layers_are_plain_adams(plan, lone_rank):
    """Bit for bit torch.optim.Adam from scratch, which never took the step that makes its state beforehand."""
    config = one_table(plan, lr=0.3, dense_lr=0.02)
    model = build_model(config, lone_rank)
    optimizer = RunOptimizer(model, config.train.optimizer)
    layers = {name: value for name, value in model.named_parameters() if "tower" in name}
    assert len(layers) == 4  # a weight and a bias each
    copies = [value.detach().clone().requires_grad_() for value in layers.values()]
    plain = torch.optim.Adam(copies, lr=0.02)
    random = torch.Generator().manual_seed(0)
    for step, share in enumerate([0.5, 1.0, 1.0]):
        optimizer.set_rates(step, 10)
        optimizer.zero_grad()
        for value, copy in zip(layers.values(), copies, strict=True):
            value.grad = torch.randn(value.shape, generator=random)
            copy.grad = value.grad.clone()
        optimizer.step()
        plain.param_groups[0]["lr"] = 0.02 * share
        plain.step()
        for value, copy in zip(layers.values(), copies, strict=True):
            assert torch.equal(value, copy)


@pytest.mark.parametrize("kind", ["sgd", "adagrad", "rowwise_adagrad"])
@pytest.mark.parametrize("plan", ["mixed", "table_wise", "data_parallel"])
def test_every_parameter_has_exactly_one_optimizer(plan, kind, lone_rank):
    """And no state counts a step, or anything else, before the first one."""
    config = event_config(
        Path("w"), Path("r"), MIXED if plan == "mixed" else plan, train={"optimizer": {"sparse": kind}}
    )
    model = build_model(config, lone_rank)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = RunOptimizer(model, config.train.optimizer)
    owners: dict[str, int] = dict.fromkeys(before, 0)
    for _, part in optimizer._combined.optimizers:
        for name in part.params:
            owners[name] += 1
    assert set(owners.values()) == {1}
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), f"{name} moved before the first step"
        assert value.grad is None
    for parts in optimizer.state().values():
        for value in parts.values():
            tensors = [shard.tensor for shard in value.local_shards()] if hasattr(value, "local_shards") else [value]
            assert all((tensor == 0).all() for tensor in tensors)


def test_a_model_with_a_forgotten_parameter_is_refused(lone_rank):
    """A weight that no optimizer would ever move."""
    config = one_table("table_wise")
    model = build_model(config, lone_rank)
    optimizer = RunOptimizer(model, config.train.optimizer)
    with pytest.raises(AssertionError, match="item_tower"):
        optimizer._check_complete(model, {name for name, _ in model.named_parameters() if "user_tower" in name})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 1.0, 5: 1.0, 99: 1.0}),
        ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 99: 1.0}),
        ({"schedule": "linear"}, {0: 1.0, 50: 0.51, 99: 1 - 0.98 * 0.99, 100: 0.02, 150: 0.02}),
        ({"schedule": "linear", "warmup_steps": 20}, {0: 0.05, 19: 1.0, 20: 1.0, 60: 0.51, 100: 0.02}),
        ({"schedule": "linear", "warmup_steps": 200}, {0: 0.005, 99: 0.5}),
    ],
)
def test_rates_follow_the_schedule(settings, expected):
    """Of a hundred steps: a linear rise, then level or a linear fall to a fiftieth."""
    config = OptimizerConfig(**settings)
    for step, share in expected.items():
        assert rate_share(config, step, 100) == pytest.approx(share)


def test_both_rates_are_set_from_their_own_base(lone_rank):
    """Tables, fused or not, by lr; layers by dense_lr."""
    config = event_config(
        Path("w"), Path("r"), MIXED, train={"optimizer": {"lr": 0.5, "dense_lr": 0.01, "warmup_steps": 4}}
    )
    optimizer = RunOptimizer(build_model(config, lone_rank), config.train.optimizer)
    assert optimizer.set_rates(0, 100) == 0.25
    rates = {name: {group["lr"] for group in part.param_groups} for name, part in optimizer._combined.optimizers}
    assert rates == {"tables": {0.125}, "replicated": {0.125}, "dense": {0.0025}}
