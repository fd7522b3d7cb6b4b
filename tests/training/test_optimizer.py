"""Every update is the textbook's: tables fused or not, Adam from its first step, rates by the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ranks.launch import SAID_BY_TORCHREC
from tests.ranks.worlds import MIXED, event_config
from trec_twotower.config.base import validate
from trec_twotower.config.run_config import RunConfig
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.loading.batch import make_batch
from trec_twotower.distributed.compat import lookup_modules
from trec_twotower.errors import ConfigError
from trec_twotower.ops.ragged import Ragged
from trec_twotower.training.model_builder import build_model, inner_model
from trec_twotower.training.optimizer import RunOptimizer, check_optimizer, rate_share

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)
BUCKETS, DIM, SHARD_COLUMNS = 6, 8, 4
BAGS = [[1, 1, 3], [], [4]]  # row 1 twice in one bag; rows 0, 2 and 5 never
IDS = [3, 2]  # row 3 once more, by the other side's feature


def one_table(plan: str, **optimizer: Any) -> RunConfig:
    """A history and an item id on one table; rates rise over two steps, then fall linearly."""
    cut = {"shard_columns": SHARD_COLUMNS} if plan == "column_wise" else {}
    values = {
        "data": {"dataset": "nowhere"},
        "tables": {"t": {"buckets": BUCKETS, "dim": DIM, "sharding": plan, **cut}},
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
    return Columns(len(lists), {name: Ragged.from_lists(lists)}, {})


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
    batch = make_batch(inner_model(model).schema, columns("history", BAGS), columns("item_id", [[row] for row in IDS]))
    expected, state = only_table(model), np.zeros((BUCKETS, DIM))
    random = np.random.default_rng(4)
    for step, rate in enumerate([0.3 * 0.5, 0.3 * 1.0, 0.3 * 1.0, 0.3 * (1 - 0.98 / 8)]):
        wish = {"user:history": random.normal(size=(3, DIM)), "item:item_id": random.normal(size=(2, DIM))}
        optimizer.set_rates(step, 10)
        pooled = inner_model(model).tables(batch.sparse).to_dict()
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
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 1.0, 5: 1.0, 99: 1.0}),
        ("constant", 4, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 99: 1.0}),
        ("linear", 0, {0: 1.0, 50: 0.51, 99: 1 - 0.98 * 0.99, 100: 0.02, 150: 0.02}),
        ("linear", 20, {0: 0.05, 19: 1.0, 20: 1.0, 60: 0.51, 100: 0.02}),
        ("linear", 200, {0: 0.005, 99: 0.5}),
        ("cosine", 0, {0: 1.0, 25: 0.02 + 0.98 * (2 + 2**0.5) / 4, 50: 0.51, 100: 0.02, 150: 0.02}),
        ("cosine", 20, {0: 0.05, 20: 1.0, 60: 0.51, 100: 0.02}),
    ],
)
def test_rates_follow_the_schedule(schedule, warmup, expected):
    """Of a hundred steps: a linear rise, then level, or by a line or half a cosine down to a fiftieth."""
    for step, share in expected.items():
        assert rate_share(schedule, warmup, step, 100) == pytest.approx(share)


def test_both_rates_are_set_from_their_own_base(lone_rank):
    """Tables, fused or not, by lr; layers by dense_lr."""
    config = event_config(
        Path("w"), Path("r"), MIXED, train={"optimizer": {"lr": 0.5, "dense_lr": 0.01, "warmup_steps": 4}}
    )
    optimizer = RunOptimizer(build_model(config, lone_rank), config.train.optimizer)
    assert optimizer.set_rates(0, 100) == {"lr": 0.125, "dense_lr": 0.0025}
    assert rates_of(optimizer) == {"tables": {0.125}, "replicated": {0.125}, "dense": {0.0025}}


def test_layers_may_have_a_schedule_of_their_own(lone_rank):
    settings = {"lr": 0.5, "schedule": "linear", "dense_lr": 0.01, "dense_schedule": "constant"}
    config = event_config(Path("w"), Path("r"), MIXED, train={"optimizer": {**settings, "dense_warmup_steps": 10}})
    optimizer = RunOptimizer(build_model(config, lone_rank), config.train.optimizer)
    for step, share, dense_share in ((4, 1 - 0.98 * 0.04, 0.5), (50, 0.51, 1.0)):
        optimizer.set_rates(step, 100)
        for name, rates in rates_of(optimizer).items():
            assert list(rates) == [pytest.approx(0.01 * dense_share if name == "dense" else 0.5 * share)]


def rates_of(optimizer: RunOptimizer) -> dict[str, set[float]]:
    return {name: {group["lr"] for group in part.param_groups} for name, part in optimizer._combined.optimizers}


# Clipping, decay, averages


def stepped(lone_rank, gradients: list[float], **settings: Any) -> tuple[Any, dict[str, torch.Tensor], list[float]]:
    """A model after steps whose gradients are random with these norms; its layers, and the norms that were noted."""
    config = one_table("table_wise", warmup_steps=0, schedule="constant", dense_lr=0.02, **settings)
    model = build_model(config, lone_rank)
    optimizer = RunOptimizer(model, config.train.optimizer)
    layers = {name: value for name, value in model.named_parameters() if "tower" in name}
    random, noted = torch.Generator().manual_seed(0), []
    for step, norm in enumerate(gradients):
        optimizer.set_rates(step, 10)
        optimizer.zero_grad()
        drawn = [torch.randn(value.shape, generator=random) for value in layers.values()]
        total = sum(float((each**2).sum()) for each in drawn) ** 0.5
        for value, each in zip(layers.values(), drawn, strict=True):
            value.grad = each * (norm / total)
        optimizer.step()
        noted.append(optimizer.figures()["gradient_norm"])
    return model, {name: value.detach().clone() for name, value in layers.items()}, noted


def test_a_gradient_above_the_bound_is_cut_to_it_and_one_below_is_left(lone_rank):
    """Norms 8, 0.5 and 3 under a bound of 2 train like 2, 0.5 and 2; the log has them as they came."""
    _, clipped, noted = stepped(lone_rank, [8.0, 0.5, 3.0], clip_norm=2.0)
    _, small, _ = stepped(lone_rank, [2.0, 0.5, 2.0])
    _, whole, unclipped = stepped(lone_rank, [8.0, 0.5, 3.0])
    for name, value in clipped.items():
        torch.testing.assert_close(value, small[name], rtol=1e-5, atol=1e-7)
    assert any((clipped[name] - whole[name]).abs().max() > 1e-3 for name in whole)
    assert noted == unclipped == pytest.approx([8.0, 0.5, 3.0])


def test_clipping_leaves_tables_alone(lone_rank):
    """Fused ones are updated before the norm is known, and data-parallel ones like them."""
    moved = {}
    for plan in ("table_wise", "data_parallel"):
        for clip in (None, 1e-9):
            config = one_table(plan, sparse="sgd", lr=0.3, clip_norm=clip, warmup_steps=0)
            model = build_model(config, lone_rank)
            optimizer = RunOptimizer(model, config.train.optimizer)
            batch = make_batch(
                inner_model(model).schema, columns("history", BAGS), columns("item_id", [[row] for row in IDS])
            )
            optimizer.set_rates(0, 10)
            pooled = inner_model(model).tables(batch.sparse).to_dict()
            optimizer.zero_grad()
            (pooled["user:history"] * 5).sum().backward()
            optimizer.step()
            moved[plan, clip] = only_table(model)
    first = moved["table_wise", None]
    for other in moved.values():
        np.testing.assert_allclose(other, first, rtol=1e-6, atol=1e-7)


def test_weight_decay_of_layers_shrinks_matrices_and_no_bias(lone_rank):
    """Decoupled: w becomes (1 - lr * decay) w less what Adam takes off, which depends on the gradients alone."""
    config = one_table("table_wise")
    start = dict(build_model(config, lone_rank).named_parameters())
    _, plain, _ = stepped(lone_rank, [1.0])
    _, decayed, _ = stepped(lone_rank, [1.0], dense_weight_decay=0.5)
    for name, value in plain.items():
        expected = value - 0.02 * 0.5 * start[name].detach() if value.dim() > 1 else value
        torch.testing.assert_close(decayed[name], expected, rtol=1e-5, atol=1e-7)


def test_averages_follow_the_weights_by_hand(lone_rank):
    """a = d a + (1 - d) w with d = min(ema, (1 + step) / (10 + step)); encoding takes a, training w."""
    model, _, _ = stepped(lone_rank, [], ema=0.15)
    weights = [dict(model.named_parameters())]
    expected = {name: value.detach().double() for name, value in weights[0].items() if "tower" in name}
    for steps in (1, 2, 3):
        model, layers, _ = stepped(lone_rank, [1.0, 2.0, 3.0][:steps], ema=0.15)
        decay = [0.1, 0.15, 0.15][steps - 1]
        for name in expected:
            expected[name] = decay * expected[name] + (1 - decay) * layers[name].double()
    tower, given = inner_model(model).user_tower, torch.randn(5, DIM)

    def by_hand(values: dict[str, torch.Tensor]) -> torch.Tensor:
        weight, bias = (
            next(value for name, value in values.items() if f"user_tower.layers.0.{part}" in name)
            for part in ("weight", "bias")
        )
        vector = given.double() @ weight.double().T + bias.double()
        return (vector / vector.norm(dim=1, keepdim=True)).float()

    torch.testing.assert_close(tower.train()(given), by_hand(layers))
    torch.testing.assert_close(tower.eval()(given), by_hand(expected))
    assert (by_hand(layers) - by_hand(expected)).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["adam", "partial_rowwise_adam", "lamb"])
def test_updates_that_fbgemm_lacks_on_cpu_are_refused_by_name(kind, lone_rank):
    """Before anything is built, with those it has."""
    said = rf"sparse is {kind}, which fbgemm has on GPU alone.*: take one of rowwise_adagrad, adagrad, sgd\."
    with pytest.raises(ConfigError, match=said):
        build_model(one_table("table_wise", sparse=kind), lone_rank)


def test_adam_would_move_every_row_of_a_data_parallel_table(lone_rank):
    config = one_table("data_parallel", sparse="adam")
    with pytest.raises(ConfigError, match=r"'t' is data_parallel.*give it another sharding"):
        check_optimizer(config.train.optimizer, config.feature_schema, "cuda")
    spread = one_table("row_wise", sparse="adam")
    check_optimizer(spread.train.optimizer, spread.feature_schema, "cuda")


@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adagrad", "sgd"])
def test_decay_that_fbgemm_would_silently_leave_out_is_refused(kind):
    with pytest.raises(ConfigError, match=rf"weight_decay is 0\.1, but fbgemm's {kind} has no weight decay"):
        one_table("table_wise", sparse=kind, weight_decay=0.1)


def test_the_kernels_count_steps_and_not_looks(lone_rank):
    """fbgemm raises the count of Adam's bias correction in each forward pass, also those of evaluation."""
    config = one_table("table_wise")
    model = build_model(config, lone_rank)
    optimizer = RunOptimizer(model, config.train.optimizer)
    batch = make_batch(inner_model(model).schema, columns("history", BAGS), columns("item_id", [[row] for row in IDS]))
    (kernel,) = (module for module in lookup_modules(model) if is_kernel(module))
    for step in (7, 8):
        with torch.no_grad():
            inner_model(model).tables(batch.sparse).values()
        optimizer.set_rates(step, 10)
        assert int(kernel.iter_cpu) == int(kernel.iter) == step


def is_kernel(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "SplitTableBatchedEmbeddingBagsCodegen"
