"""Tables start as their law says, bags pool as their features say, and no id lies outside its table."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.kinds import build_loss
from tests.ranks.launch import SAID_BY_TORCHREC
from tests.ranks.worlds import EVENTS, ITEMS, MIXED, PLANS, event_config, tables
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import ModelConfig, TableSpec, TowerConfig
from trec_twotower.config.schema import Schema
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.features.hashed import bucket
from trec_twotower.data.loading.batch import make_batch
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError
from trec_twotower.model.embeddings import FILL_CELLS, build_embedding_bag_collection, fill_tables
from trec_twotower.model.tower import Tower
from trec_twotower.model.tower_inputs import Pooled, concatenate_features
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.ops.ragged import Ragged
from trec_twotower.training.model_builder import build_model, inner_model

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)
MASK = (1 << 64) - 1


def mixed(key: int) -> int:
    """splitmix64's finaliser, from the paper."""
    key = (key + 0x9E3779B97F4A7C15) & MASK
    key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & MASK
    return key ^ (key >> 31)


def bucket_of(value: int | str, buckets: int) -> int:
    key = xxhash.xxh3_64_intdigest(value.encode()) if isinstance(value, str) else value & MASK
    return ((mixed(key ^ mixed(0)) >> 32) * buckets) >> 32


def one_table(buckets: int, dim: int, **settings: Any) -> Schema:
    features = build_feature(name="bag", kind="bag", table="t"), build_feature(name="id", kind="id", table="t")
    return Schema.build({"t": TableSpec(buckets=buckets, dim=dim, **settings)}, features[:1], features[1:])


def filled(schema: Schema, seed: int = 0) -> dict[str, torch.Tensor]:
    held = build_embedding_bag_collection(schema).to_empty(device="cpu")
    fill_tables(held, schema, seed)
    return {name.split(".")[1]: value for name, value in held.state_dict().items()}


# First weights


@pytest.mark.parametrize("scale", [None, 0.02])
def test_first_weights_are_uniform_within_the_start_scale(scale):
    """Mean 0 and variance scale²/3, each within five standard errors; the default scale is 1/sqrt(dim)."""
    weights = filled(one_table(5000, 16, init_scale=scale))["t"].double()
    limit = scale or 0.25
    assert weights.abs().max() <= limit
    assert weights.abs().max() > 0.999 * limit
    count = weights.numel()
    assert abs(weights.mean()) < 5 * limit / math.sqrt(3 * count)
    # The variance of a uniform square is (1/5 - 1/9) scale⁴.
    assert abs((weights**2).mean() - limit**2 / 3) < 5 * limit**2 * math.sqrt((1 / 5 - 1 / 9) / count)
    correlation = torch.corrcoef(weights.T) - torch.eye(16)
    assert correlation.abs().max() < 5 / math.sqrt(5000)


def test_first_weights_are_the_formula_cell_by_cell(monkeypatch):
    """In Python's integers, on cells of the first, a middle and the last block of rows."""
    monkeypatch.setitem(FILL_CELLS, "cpu", 800)
    schema = one_table(257, 8, init_scale=0.5)
    weights = filled(schema, seed=9)["t"]
    salt = mixed(9 ^ xxhash.xxh3_64_intdigest(b"t"))
    for row, column in ((0, 0), (0, 7), (99, 7), (100, 0), (201, 3), (256, 7)):
        bits = mixed(((row * 8 + column) ^ salt) & MASK) >> 40
        assert weights[row, column].item() == pytest.approx((2 * bits / 2**24 - 1) * 0.5, abs=1e-7)


def test_no_row_repeats_another():
    """Over all tables and seeds: one seed must not give equal tables equal rows."""
    specs = {name: TableSpec(buckets=1000, dim=4) for name in ("a", "b")}
    features = [build_feature(name=name, kind="id", table=name) for name in specs]
    schema = Schema.build(specs, (features[0],), (features[1],))
    rows = [row for seed in (0, 1) for table in filled(schema, seed).values() for row in map(tuple, table.tolist())]
    assert len(rows) == len(set(rows)) == 4000


@pytest.mark.parametrize("plan", ["row_wise", "table_row_wise", "column_wise"])
def test_shards_do_not_repeat_each_other(plan, on_two_ranks):
    """Of a table whose shards lie on two ranks, all rows (or column blocks) differ."""
    table = on_two_ranks[0][f"first weights {plan}"]["tables.embedding_bags.item.weight"]
    assert len(set(map(tuple, table.tolist()))) == 37
    assert len({tuple(block.flatten().tolist()) for block in table.split(4, dim=1)}) == 3


# Pooling


def pool_jagged(feature: dict[str, Any], row: dict[str, Any], weights: dict[str, np.ndarray]) -> np.ndarray:
    """A bag's vector in float64: each id's row, weighted, summed and divided as the feature says."""
    table = weights[feature["table"]]
    name = feature.get("column", feature["name"])
    values = [row[name]] if feature["kind"] != "bag" else row[name]
    if feature["kind"] == "category":
        numbers = [0 if value is None else 1 + bucket_of(value, len(table) - 1) for value in values]
    else:
        numbers = [bucket_of(value, len(table)) for value in values]
    weight = row[feature["weights"]] if "weights" in feature else [1.0] * len(numbers)
    if "max_length" in feature:
        numbers, weight = numbers[-feature["max_length"] :], weight[-feature["max_length"] :]
    total = np.zeros(table.shape[1])
    for number, each in zip(numbers, weight, strict=True):
        total += np.float32(each) * table[number]
    if feature["kind"] != "bag" or not numbers or feature.get("pooling") == "sum":
        return total
    return total / (math.sqrt(sum(w * w for w in weight)) if feature.get("pooling") == "sqrtn" else sum(weight))


def numbers_by_hand(feature: dict[str, Any], row: dict[str, Any], rows: list[dict[str, Any]]) -> list[float]:
    value = row[feature["name"]]
    if value is None:
        return [0.0, 1.0]
    if feature.get("normalize") == "log1p":
        return [math.log1p(value), 0.0]
    known = [other[feature["name"]] for other in rows if other[feature["name"]] is not None]
    return [(value - np.mean(known)) / np.std(known), 0.0]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("plan", [*PLANS, "mixed"])
@pytest.mark.parametrize("side", ["user", "item"])
def test_what_enters_a_tower_is_pooled_by_hand(side, plan, num_ranks, small_world, on_one_rank, on_two_ranks):
    """Mean, weighted mean, (weighted) root of n, sum and single ids, from the gathered tables, one row at a time.

    Also beside row-wise tables and with weights, where TorchRec's own MEAN would divide wrongly.
    """
    results = (on_one_rank if num_ranks == 1 else on_two_ranks)[0]
    config = event_config(small_world, small_world, MIXED if plan == "mixed" else plan)
    state = results[f"first weights {plan}"]
    weights = {name: state[f"tables.embedding_bags.{name}.weight"].double().numpy() for name in tables("auto")}
    rows = EVENTS if side == "user" else ITEMS
    features = [feature.model_dump(exclude_unset=True) for feature in config.feature_schema.features(side)]
    expected = [
        np.concatenate(
            [pool_jagged(feature, row, weights) for feature in features if feature["kind"] != "number"]
            + [numbers_by_hand(feature, row, rows) for feature in features if feature["kind"] == "number"]
        )
        for row in rows
    ]
    np.testing.assert_allclose(results[f"inputs {plan} {side}"].numpy(), np.stack(expected), rtol=1e-5, atol=1e-6)


def test_tower_input_divides_the_rows_it_has_and_no_more():
    """The lookup has as many rows as the longer side; the tower gets its own."""
    schema = one_table(5, 4)
    pooled = Pooled()
    pooled.add(torch.tensor([[2.0, 4.0, 6, 0], [3.0, 9.0, 0, 6], [7.0] * 4]), {"user:bag": 4})
    divisor, number = torch.tensor([[2.0], [3.0]]), torch.empty(2, 0)
    assert concatenate_features(schema, pooled, {"user": (divisor, number)})["user"].tolist() == [
        [1, 2, 3, 0],
        [1, 3, 0, 2],
    ]


# Ids and keys


def columns(schema: Schema, side: Any, *, ids: list[list[int]]) -> Columns:
    """Rows whose every sparse feature has the given table rows."""
    names = [feature.name for feature in schema.layout.table_features(side)]
    return Columns(
        len(ids),
        {name: Ragged.from_lists(ids) for name in names},
        {feature.name: np.zeros((len(ids), 2), np.float32) for feature in schema.layout.plain_numbers(side)},
    )


@pytest.mark.parametrize("hashing", ["mix", "modulo"])
@pytest.mark.parametrize("buckets", [1, 2, 7, 64, 1000])
def test_no_id_hashes_outside_its_table(hashing, buckets):
    """TorchRec would look up row 0 for it and say nothing; abs(int64 min) is negative, and so is its remainder."""
    ends = [-(2**63), -(2**63) + 1, -(2**32), -7, -1, 0, 1, 2**31, 2**32, 2**63 - 1]
    keys = np.array([*ends, *np.random.default_rng(0).integers(-(2**63), 2**63, 5000)], np.int64)
    rows = bucket(TableSpec(buckets=buckets, dim=4, hashing=hashing), keys)
    assert rows.min() >= 0
    assert rows.max() < buckets
    assert len(set(rows.tolist())) == buckets or buckets == 1000


@pytest.mark.parametrize("bad", [-1, -(2**63), 37])
def test_an_id_outside_its_table_is_an_error_in_these_tests(bad, lone_rank, small_world):
    """The bounds check is fatal here, so that every case of these tests would find a wrong hash."""
    config = event_config(small_world, small_world)
    model = inner_model(build_model(config, lone_rank))
    good = columns(model.schema, "item", ids=[[3]])
    assert model.encode_items(make_batch(model.schema, None, good)).isfinite().all()
    with pytest.raises(RuntimeError, match=r"Expected idx|out of bounds"):
        model.encode_items(make_batch(model.schema, None, columns(model.schema, "item", ids=[[bad]])))


def test_a_tower_may_sum_its_features():
    feature_BE = torch.arange(12.0).reshape(2, 6)
    tower = Tower((2, 2, 2), 2, TowerConfig(combine="sum", project=False), is_unit=False)
    assert tower(feature_BE).tolist() == [[0 + 2 + 4, 1 + 3 + 5], [6 + 8 + 10, 7 + 9 + 11]]


def test_another_order_of_keys_is_refused():
    """A sharded collection remembers the first order of keys it sees and would mix up columns in silence."""
    specs = {name: TableSpec(buckets=4, dim=4) for name in ("a", "b")}
    features = [build_feature(name=name, kind="id", table=name) for name in specs]
    schema = Schema.build(specs, (features[0],), (features[1],))
    model = TwoTower(schema, ModelConfig(dim=4), build_loss(), Ranks(0, 1, torch.device("cpu")))
    batch = make_batch(schema, columns(schema, "user", ids=[[1]]), columns(schema, "item", ids=[[2]]))
    assert batch.sparse.keys() == ["user:a", "item:b"]
    batch.sparse = KeyedJaggedTensor(
        keys=["item:b", "user:a"], values=torch.tensor([2, 1]), lengths=torch.tensor([1, 1])
    )
    for encode in (model.encode_users, model.encode_items, model.forward):
        with pytest.raises(AssertionError):
            encode(batch)


def test_every_batch_has_the_keys_of_the_schema_in_their_order(small_world):
    """Whatever sides it has, and in whatever order the features were made."""
    schema = event_config(small_world, small_world).feature_schema
    expected = [f"user:{name}" for name in ("history", "clicks", "roots", "weighted_roots", "newest", "country")]
    expected += ["item:item_id", "item:brand", "item:tags"]
    both = {side: columns(schema, side, ids=[[1], [2, 0]]) for side in ("user", "item")}
    made = both["user"]
    shuffled = Columns(2, dict(reversed(made.sparse.items())), made.numbers)
    for user, item in ((both["user"], both["item"]), (both["user"], None), (None, both["item"]), (shuffled, None)):
        assert make_batch(schema, user, item).sparse.keys() == expected


# Towers


def test_a_tower_is_its_layers_written_out():
    torch.manual_seed(0)
    tower = Tower((2, 3), 3, TowerConfig(mlp=(7, 4)), is_unit=False)
    feature_BE = torch.randn(6, 5)
    hidden = feature_BE
    for number in (0, 2):
        hidden = torch.relu(hidden @ tower.layers[number].weight.T + tower.layers[number].bias)
    expected = hidden @ tower.layers[4].weight.T + tower.layers[4].bias
    torch.testing.assert_close(tower(feature_BE), expected)


def test_without_layers_the_features_are_the_vector():
    feature_BE = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    config = TowerConfig(project=False)
    assert Tower((2,), 2, config, is_unit=False)(feature_BE).tolist() == feature_BE.tolist()
    unit = Tower((2,), 2, config, is_unit=True)(feature_BE)
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))  # nothing to point at: no NaN


def test_dropout_is_for_training_alone():
    torch.manual_seed(0)
    tower = Tower((50,), 50, TowerConfig(project=False, dropout=0.4), is_unit=False)
    ones = torch.ones(40, 50)
    dropped = tower(ones)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert float((dropped == 0).float().mean()) == pytest.approx(0.4, abs=0.05)
    assert torch.equal(tower.eval()(ones), ones)


def test_a_tower_without_a_last_layer_must_be_as_wide_as_the_model(small_world):
    with pytest.raises(ConfigError, match=r"its last width 10 must be model\.dim = 6"):
        event_config(small_world, small_world, model={"user_tower": {"mlp": [10], "project": False}})
