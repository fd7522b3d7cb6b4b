"""Sequences from the columns to the towers, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.kinds import ENCODER_PARAMETERS
from tests.ranks.launch import SAID_BY_TORCHREC
from tests.sequences import NUM_ITEMS, RESUMED, TOWERS, USERS, steps_config, write_steps
from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.feature_dataset import FeatureDataset
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.features.hash_column import hash_column
from trec_twotower.data.features.transform import transform
from trec_twotower.data.loading.batch import make_batch
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index import build_index
from trec_twotower.inference.export import read_export
from trec_twotower.model.tower_inputs import SideInputs, build_inputs
from trec_twotower.serving.retriever import Retriever
from trec_twotower.serving.user_state import state_table
from trec_twotower.training.model_builder import build_model, inner_model
from trec_twotower.training.run_dir import Run

pytestmark = [pytest.mark.filterwarnings(each) for each in SAID_BY_TORCHREC]
TABLE = TableSpec(buckets=64, dim=4, hashing="modulo")
PLANS = ("table_wise", "row_wise", "column_wise")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_steps(tmp_path_factory.mktemp("steps") / "world")


# From columns to lists


def history(**parts: Any) -> FeatureSpec:
    return build_feature(**{"name": "history", "kind": "sequence", "table": "item", "max_length": 3, **parts})


def columns_of(table: pa.Table, feature: FeatureSpec) -> Columns:
    return transform([feature], {"item": TABLE}, {}, table, "the test")


def plain(lists: Any) -> list[list[int]]:
    return [part.tolist() for part in np.split(lists.values, lists.offsets[1:-1])]


def table_of(**columns: Any) -> pa.Table:
    kinds = {"history": pa.list_(pa.int64()), "when": pa.list_(pa.int64()), "did": pa.list_(pa.string())}
    return pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})


def test_the_newest_steps_stay_and_what_is_null_goes_with_all_that_stands_beside_it():
    table = table_of(
        history=[[1, 2, None, 3, 4], None, [], [5]],
        when=[[0, 10, 15, 20, 80], None, [], [7]],
        did=[["saw", "took", "saw", None, "saw"], None, [], ["took"]],
    )
    found = columns_of(table, history(times="when", actions="did", action_buckets=8)).sparse
    assert plain(found["history"]) == [[2, 3, 4], [], [], [5]]
    # 2 comes 10 s after 1, 3 another 10 s after 2, 4 a minute after 3: 1 + floor(log2(1 + gap)); 5 has none before it.
    assert plain(found["history@gap"]) == [[1 + 3, 1 + 3, 1 + 5], [], [], [0]]
    did = plain(found["history@action"])
    saw = plain(columns_of(table_of(history=[[1]], did=[["saw"]]), history(actions="did", action_buckets=8)).sparse[
        "history@action"
    ])[0][0]  # fmt: skip
    assert did[0][1:] == [0, saw] and did[0][0] == did[3][0] not in (0, saw)


def test_timestamps_are_told_apart_in_seconds():
    day = 86_400
    seconds = table_of(history=[[1, 2, 3]], when=[[0, day, day + 1]])
    stamps = pa.array([[0, 1000 * day, 1000 * (day + 1)]], pa.list_(pa.timestamp("ms", "UTC")))
    other = seconds.set_column(1, "when", stamps)
    gaps = [plain(columns_of(each, history(times="when")).sparse["history@gap"]) for each in (seconds, other)]
    assert gaps[0] == gaps[1] == [[0, 1 + 16, 1 + 1]]  # log2(86,401) = 16.4


def test_nanoseconds_beside_an_id_are_read_as_the_microseconds_they_begin_with():
    at_us = [1_672_625_045_000_123, 1_672_625_047_000_124]
    in_us = pa.array([at_us], pa.list_(pa.timestamp("us", "UTC")))
    in_ns = pa.array([[1000 * each + 7 for each in at_us]], pa.list_(pa.timestamp("ns", "UTC")))
    rows = table_of(history=[[1, 2]])
    for times in (in_us, in_ns):
        found = columns_of(rows.append_column("when", times), history(times="when")).sparse["history@gap"]
        assert plain(found) == [[0, 1 + 1]]  # log2(1 + 2.000001) = 1.6


@pytest.mark.parametrize("unit", ["us", "ns"])
@pytest.mark.parametrize("until_unit", ["us", "ns"])
def test_an_instant_is_not_after_itself_in_another_unit(unit, until_unit):
    """An element of a bag may be as late as `until`, whatever its microsecond and however both columns write it."""
    at_us = np.arange(1_672_625_045_000_123, 1_672_625_045_001_123)
    per_us = {"us": 1, "ns": 1000}
    times = pa.array((at_us * per_us[unit])[:, None].tolist(), pa.list_(pa.timestamp(unit)))
    now = pa.array(at_us * per_us[until_unit], pa.timestamp(until_unit))
    rows = pa.table({"history": pa.array([[1]] * len(at_us), pa.list_(pa.int64())), "when": times, "now": now})
    bag = build_feature(name="history", kind="bag", table="item", times="when", half_life_days=7.0, until="now")
    assert (columns_of(rows, bag).sparse["history"].weights == 1.0).all()


@pytest.mark.parametrize(
    ("columns", "parts", "said"),
    [
        ({"when": [[3, 1]]}, {"times": "when"}, "row 0: the times in 'when' decrease"),
        ({"when": [[3]]}, {"times": "when"}, "2 ids but 1 values in 'when'"),
        ({"when": [[3, None]]}, {"times": "when"}, "contain null"),
        ({"did": [["saw"]]}, {"actions": "did"}, "2 ids but 1 values in 'did'"),
        ({"did": [["saw", "saw"]]}, {"times": "did"}, "not a list of timestamps, dates or numbers"),
    ],
)
def test_odd_lists_beside_the_steps_are_refused(columns, parts, said):
    with pytest.raises(DataError, match=said):
        columns_of(table_of(history=[[1, 2]], **columns), history(**parts))


def test_hash_gives_the_rows_of_a_sequence_as_of_a_bag():
    array = pa.array([[1, 2, 3, 4], None], pa.list_(pa.int64()))
    assert hash_column(history(), array, TABLE).to_pylist() == [[2, 3, 4], []]


# What cannot be


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"history": {"max_length": None}}, "history.max_length. is missing"),
        ({"history": {"weights": "when"}}, "is of kind 'sequence', which has no weights"),
        ({"history": {"attributes": ["tag"]}}, "attribute 'tag', which is not under `item`.*'tags'"),
        ({"history": {"attributes": ["shade"]}}, "adds 'shade', whose vectors have 4 numbers, to its own of 8"),
        ({"history": {"encoder": {"kind": "heads", "heads": 3}}}, "into 3 heads: choose a divisor"),
        ({"history": {"encoder": {"kind": "transformer", "heads": 8, "positions": "rotary"}}}, "8 heads of 1: choose"),
        ({"tables": {"history_delta": {"buckets": 40, "dim": 8}}}, "'history_delta'"),
        ({"tables": {"item": {"buckets": 40, "dim": 8, "sharding": "data_parallel"}}}, "is data_parallel, but a seq"),
        ({"item": [{"name": "past", "kind": "sequence", "table": "tag", "max_length": 3}]}, "which is for users"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(parts, said, world, tmp_path):
    with pytest.raises(ConfigError, match=said):
        steps_config(world, tmp_path, **parts)


def test_only_sequences_have_what_belongs_to_steps():
    with pytest.raises(ValueError, match="'bag', which has no actions, delta"):
        build_feature(name="history", kind="bag", table="item", actions="what", delta=True)


def test_a_sequence_of_users_or_of_drawn_halves_is_refused(world, tmp_path):
    feature = build_feature(name="past", kind="sequence", table="item", max_length=3, column="history")
    item = build_feature(name="item_id", kind="id", table="item")
    schema = Schema.build({"item": TABLE}, (feature,), (item,))
    for part in ("train", "items"):
        (tmp_path / part).mkdir()
    pq.write_table(pa.table({"item_id": [1]}), tmp_path / "items/a.parquet")
    pq.write_table(pa.table({"user_id": [1], "positives": [[1]], "item_id": [1]}), tmp_path / "train/a.parquet")
    with pytest.raises(ConfigError, match="sampled per epoch here: make it a bag"):
        FeatureDataset(Dataset(tmp_path), schema, "user")
    (tmp_path / "users").mkdir()
    pq.write_table(pa.table({"user_id": [1], "history": [[1]]}), tmp_path / "users/a.parquet")
    with pytest.raises(ConfigError, match="is a sequence, but its column 'history' is in"):
        FeatureDataset(Dataset(tmp_path), schema, "event")


# From lists to the tower


@pytest.mark.parametrize("kind", ["mean", "heads"])
def test_what_enters_the_tower_equals_the_sum_written_out(kind, world, tmp_path, lone_rank):
    """Each step: its row, the delta's, its item's tags (scaled, pooled by sqrtn), colour, gap and action."""
    config = steps_config(world, tmp_path, history={"encoder": {"kind": kind}})
    schema = config.feature_schema
    sources = FeatureDataset(Dataset(world), schema, "event")
    rows = sources.dataset.train.table(sources.user_columns())
    columns = sources.user_features(rows, "the test")
    model = inner_model(build_model(config, lone_rank)).eval()
    encoder = model.user_tower.encoders["of_history"]
    with torch.no_grad():
        for weight in (encoder.gap.weight, encoder.action.weight):
            weight += torch.randn(weight.shape)
        state = model.state_dict()
        weights = {name: _whole(state, f"lists.embeddings.{name}.weight") for name in ("item", "tag", "history_delta")}
        assert not weights["history_delta"].any() and weights["item"].any()
        weights["history_delta"] += torch.randn(weights["history_delta"].shape)  # in place: the model's own
        seen: list[torch.Tensor] = []
        encoder.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        batch = make_batch(schema, columns, sources.catalogue.columns)
        pooled, vectors = model._lookup(batch)
        given = SideInputs(model.user_tower, batch.user_divisor_BF, batch.user_number_BN)
        build_inputs(schema, {"user": given}, pooled, vectors, batch.listed)  # adds what is encoded to `pooled`
    item_feature = {feature.name: feature for feature in schema.item}
    table = rows.to_pylist()
    expected = []
    for row, about in enumerate(table):
        buckets = plain(columns.sparse["history"])[row]
        newest = about["history"][-5:] if about["history"] else []
        for step, (bucket, item) in enumerate(zip(buckets, newest, strict=True)):
            vector = weights["item"][bucket] + weights["history_delta"][bucket]
            if item < NUM_ITEMS:
                tags = [int(item % 5), int(item % 3)] if item % 4 else []
                tag = hash_column(item_feature["tags"], pa.array([tags], pa.list_(pa.int64())), schema.tables["tag"])
                for at in tag.to_pylist()[0]:
                    vector = vector + 2.0 * weights["tag"][at] / len(tags) ** 0.5
                colour = hash_column(item_feature["colour"], pa.array([item % 4]), schema.tables["tag"]).to_pylist()[0]
                vector = vector + weights["tag"][colour]
            gap = plain(columns.sparse["history@gap"])[row][step]
            action = plain(columns.sparse["history@action"])[row][step]
            expected.append(vector + encoder.gap.weight[gap] + encoder.action.weight[action])
    assert torch.allclose(seen[0], torch.stack(expected), atol=1e-5)
    lengths = [min(len(about["history"] or []), 5) for about in table]
    if kind == "mean":
        means = [part.mean(0) if len(part) else torch.zeros(8) for part in torch.stack(expected).split(lengths)]
        assert torch.allclose(pooled["user:history"], torch.stack(means), atol=1e-5)
    # The bag that shares the table, pooled by hand: the sum of all its rows, divided later.
    bags = plain(columns.sparse["liked"])
    sums = torch.stack([weights["item"][bag].sum(0) for bag in bags])
    assert torch.allclose(pooled["user:liked"], sums, atol=1e-5)


def _whole(state: dict[str, Any], name: str) -> torch.Tensor:
    value = state[name]
    return value.local_shards()[0].tensor if hasattr(value, "local_shards") else value


def test_items_stand_once_in_a_batch_however_many_steps_take_them(world, tmp_path):
    config = steps_config(world, tmp_path)
    sources = FeatureDataset(Dataset(world), config.feature_schema, "event")
    rows = sources.dataset.train.table(sources.user_columns())
    batch = make_batch(config.feature_schema, sources.user_features(rows, "the test"))
    taken = {item for history in rows["history"].to_pylist() for item in (history or [])[-5:]}
    at = batch.sequences.keys().index("user:history")
    assert batch.sequences.stride() == 1
    assert len(batch.sequences["user:history"].values()) == int(batch.sequences.lengths()[at]) == len(taken)


# On ranks


@pytest.fixture(scope="module")
def made(world, tmp_path_factory, forked) -> dict[int, tuple[dict[str, Any], Path]]:
    """What one rank and two made of the same cases."""
    found = {}
    for num_ranks in (1, 2):
        out = tmp_path_factory.mktemp(f"ranks-{num_ranks}")
        code, said = forked(num_ranks, "tests.ranks.sequences", world, out)
        assert code == 0, said
        found[num_ranks] = torch.load(out / "results.pt", weights_only=True), out / "runs"
    return found


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first if first[name].numel())


CASES = [
    *(f"plan {plan}" for plan in PLANS),
    *(f"encoder {kind}" for kind in ENCODER_PARAMETERS),
    *(f"tower {name}" for name in TOWERS),
    *(f"user {name}" for name in USERS),
    "together",
    "pipeline",
]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(case, made):
    """Three steps of the same losses, weights and vectors, under every plan and with every encoder."""
    (one, _), (two, _) = made[1], made[2]
    assert len(one[f"losses {case}"]) == 3
    assert one[f"losses {case}"] == pytest.approx(two[f"losses {case}"], rel=1e-5)
    # Adagrad and Adam divide a gradient that is nearly zero by itself, and with it its rounding.
    tolerance = 2e-3 if case.startswith(("encoder", "together")) else 1e-5
    assert furthest(one[f"weights {case}"], two[f"weights {case}"]) < tolerance
    assert torch.allclose(one[f"items {case}"], two[f"items {case}"], atol=tolerance)


FIGURES = {
    "tower short": {"user_gate"},
    "tower experts": {f"user_expert_{number}" for number in range(3)},
    "tower experts of few": {f"user_expert_{number}" for number in range(3)},
    "together": {
        *("user_gate", "user_expert_0", "user_expert_1", "user_expert_2", "item_expert_0", "item_expert_1"),
        *("interest_0", "interest_1"),
    },
}


@pytest.mark.parametrize(("case", "names"), FIGURES.items())
def test_the_log_tells_what_parts_do_with_the_rows_of_all_ranks(case, names, made):
    """The same figures from one rank and from two; what is shared out adds up to one, and of few to what is chosen."""
    (one, _), (two, _) = made[1], made[2]
    for line, other in zip(one[f"log {case}"], two[f"log {case}"], strict=True):
        found = {name: line[name] for name in line if "_expert_" in name or "gate" in name or "interest_" in name}
        assert set(found) == names
        assert found == pytest.approx({name: other[name] for name in names}, abs=1e-5)
        for part in ("user_expert_", "item_expert_", "interest_"):
            shares = [value for name, value in found.items() if name.startswith(part)]
            assert not shares or sum(shares) == pytest.approx(1, abs=1e-5)
    if case == "tower experts of few":  # one expert has all of a row's weight: shares are counts of its rows
        shares = np.array([[line[name] for name in sorted(names)] for line in one[f"log {case}"]])
        counts = shares * np.array([[32], [32], [26]])
        assert np.abs(counts - counts.round()).max() < 1e-4


@pytest.mark.parametrize("case", [*(f"plan {plan}" for plan in PLANS[1:]), "pipeline"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_plan_does_not_change_the_training(case, num_ranks, made):
    reference = made[1][0]["losses plan table_wise"]
    assert made[num_ranks][0][f"losses {case}"] == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_resumed_run_goes_on_as_one_that_never_stopped(case, num_ranks, made):
    results = made[num_ranks][0]
    assert len(results[f"at once {case}"]) == 6
    assert results[f"resumed {case}"] == results[f"at once {case}"]


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(("plan", "pipe"))] + ["drawn"])
def test_every_part_is_indexed_and_recommends(case, made, lone_rank):
    """What two ranks trained and exported, one rank indexes and serves; the history names items of no catalogue."""
    run = Run.open(made[2][1] / case.replace(" ", "-"))
    exported = read_export(run.folder / "export")
    index = build_index(exported.item_ID, exported.user_QD, run.config.index)
    manifest = exported.manifest
    index.save(
        run.folder / "index",
        model_version=manifest["model_version"],
        item_ids=exported.item_ids,
        similarity=manifest["similarity"],
    )
    retriever = Retriever.open(run.folder, lone_rank)
    columns = ["user_id", "history", "when", "did", "positives"]
    row = run.open_dataset(lone_rank).dataset.split("test").table(columns).to_pylist()[3]
    state = {name: row[name] for name in columns[:-1]}
    [answer] = retriever.recommend_now([state], k=4)
    user = exported.user_ids.to_pylist().index(3)
    expected = (exported.item_ID @ np.atleast_2d(exported.user_QD[user]).T).max(axis=1)
    found = [item.score for item in answer.items]
    assert len(found) == 4 and all(np.abs(expected - score).min() < 1e-5 for score in found)
    # A user of test/ is served with the item that was held out, which has no time and action of its own.
    now = {"user_id": 3, "history": row["history"] + row["positives"], "when": [*row["when"], row["when"][-1]],
           "did": [*row["did"], row["did"][-1]]}  # fmt: skip
    assert retriever.recommend([3], k=4) == retriever.recommend_now([now], k=4)
    # One event more changes the answer.
    taken = {**state, "history": [*state["history"], 7], "when": [*state["when"], state["when"][-1] + 5],
             "did": [*state["did"], "took"]}  # fmt: skip
    [changed] = retriever.recommend_now([taken], k=4)
    assert changed.items != answer.items and 7 not in [item.item_id for item in changed.items]


def test_a_state_with_an_unknown_column_or_type_is_refused(world, tmp_path):
    sources = FeatureDataset(Dataset(world), steps_config(world, tmp_path).feature_schema, "event")
    with pytest.raises(ConfigError, match=r"has a column 'histori', which no user feature reads.*'history'"):
        state_table(sources, {"histori": [1]}, "state 0")
    with pytest.raises(DataError, match="state 0 does not have the types of"):
        state_table(sources, {"history": ["one"]}, "state 0")
