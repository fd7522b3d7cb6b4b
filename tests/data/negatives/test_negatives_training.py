"""Training with every kind of negative: neighbours found as the model changes, and runs that are cut short."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.data.loading import test_stream as streaming
from tests.kinds import build_loss
from tests.ranks.launch import SAID_BY_TORCHREC
from tests.ranks.states import whole_state
from tests.ranks.worlds import MIXED, NUM_ITEMS, event_config, negatives, user_config
from trec_twotower.config.base import as_values
from trec_twotower.config.loading import to_yaml
from trec_twotower.config.run_config import RunConfig
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.index import item_neighbors as nearness
from trec_twotower.index.item_neighbors import neighbours
from trec_twotower.model.losses import streaming_log_q as frequency
from trec_twotower.training import hard_negatives as refreshing
from trec_twotower.training import loop as training
from trec_twotower.training.run_dir import Run

pytestmark = [pytest.mark.filterwarnings(said) for said in SAID_BY_TORCHREC]
REFRESH = {"every": 3, "neighbor_range": [2, 8], "count": 2}


@pytest.fixture(autouse=True)
def small_frequencies(monkeypatch):
    monkeypatch.setattr(frequency, "SLOTS", 64)


# Neighbours


@pytest.mark.parametrize("exact_items", [1 << 16, 100])
def test_neighbours_are_those_of_all_cosines_sorted(rng, monkeypatch, exact_items):
    """Of a larger catalogue, when all lists are scanned, too; lengths play no part, and no item is its own."""
    monkeypatch.setattr(nearness, "EXACT_ITEMS", exact_items)
    monkeypatch.setattr(nearness, "LISTS_SCANNED", 1)
    monkeypatch.setattr(nearness, "BLOCK", 7)
    item_ID = rng.standard_normal((300, 5)).astype(np.float32)
    item_ID[17] = 4 * item_ID[3]  # one direction twice
    rows = rng.permutation(300)[:40]
    rows[:2] = 3, 17
    found = neighbours(item_ID, rows, 4, 30)
    unit = item_ID.astype(np.float64) / np.linalg.norm(item_ID, axis=1, keepdims=True)
    for row, near in zip(rows.tolist(), found.tolist(), strict=True):
        others = [other for other in np.argsort(-unit @ unit[row], kind="stable").tolist() if other != row]
        assert near == others[3:30]


def test_an_item_has_no_more_neighbours_than_there_are_others(rng):
    found = neighbours(rng.standard_normal((5, 3)).astype(np.float32), np.array([2, 4]), 2, 7)
    assert found.shape == (2, 6)
    assert (found[:, :3] >= 0).all() and (found[:, 3:] == -1).all()
    assert not (found == np.array([[2], [4]])).any()


# Runs


def settings(world: Path, **more) -> dict:
    """A loss with every kind of negative."""
    loss = negatives(world)
    return {**loss, "log_q_estimate": "streaming", "negatives": {**loss["negatives"], "refresh": REFRESH}, **more}


def config_of(world: Path, run_dir: Path, **parts) -> RunConfig:
    return event_config(world, run_dir, MIXED, **{"loss": settings(world), **parts})


def train(config: RunConfig, ranks, monkeypatch=None) -> tuple[list[float], dict]:
    """The losses, and every weight and memory at the end."""
    kept = []
    make = training.build_model
    training.build_model = lambda *given: kept.append(make(*given)) or kept[-1]
    try:
        training.train(config, ranks, neighbours=neighbours)
    finally:
        training.build_model = make
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    return losses, whole_state(kept[0], ranks)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_neighbours_are_found_from_the_weights_of_their_step_and_drawn_from_then_on(
    small_world, tmp_path, lone_rank, monkeypatch
):
    """At each multiple of `every`, of every item that is taken, from vectors as they are after so many steps."""
    config = config_of(small_world, tmp_path / "run")
    seen, batches = [], {}
    step = 0

    def watching(item_ID, rows, first, last):
        seen.append((step, item_ID.copy(), sorted(rows.tolist()), first, last))
        return neighbours(item_ID, rows, first, last)

    real = training.await_rows

    def counting(found, trainer):
        nonlocal step
        for batch in real(found, trainer):
            batches[trainer.state.step] = batch
            step = trainer.state.step + 1
            yield batch

    monkeypatch.setattr(training, "await_rows", counting)
    encoded = []
    really = refreshing.encode_everywhere
    monkeypatch.setattr(refreshing, "encode_everywhere", lambda *given: encoded.append(really(*given)) or encoded[-1])
    training.train(config, lone_rank, neighbours=watching)
    assert [each[0] for each in seen] == [3, 6]
    assert len(batches) == 9
    assert not np.allclose(seen[0][1], seen[1][1])
    taken = pq.read_table(small_world / "events" / "train", columns=["item_id"])["item_id"].to_pylist()
    ids = pq.read_table(small_world / "events" / "items", columns=["item_id"])["item_id"].to_pylist()
    for found_at, item_ID, rows, first, last in seen:
        assert item_ID.shape == (NUM_ITEMS, 6) and (first, last) == (2, 8)
        assert rows == sorted({ids.index(item) for item in taken})
        folder = tmp_path / "run" / "neighbours" / f"step-{found_at:08d}"
        items, near = np.load(folder / "items.npy"), np.load(folder / "neighbours.npy")
        assert np.array_equal(near, neighbours(item_ID, items, 2, 8))
    # Two mined and two neighbours for each row that has such lists: none of the latter before step 3.
    first, later = batches[2], batches[3]
    assert len(later.targets.given.row_P) - len(first.targets.given.row_P) > len(later.user_divisor_BF)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_run_that_is_cut_short_goes_on_to_the_same_weights(small_world, tmp_path, lone_rank, threads):
    """After each of its steps, at refreshes and between them: losses, weights and all memories bit for bit.

    Batches made ahead never hold what was valid before a refresh, however many threads make them.
    """
    data = {"threads": 1, "prefetch": 8}
    whole = train(config_of(small_world, tmp_path / "whole", data=data), lone_rank)
    assert len(whole[0]) == 9
    assert {"queue.vector_QD", "frequency.gap_HN"} <= whole[1].keys()
    saving = {"data": {"threads": threads, "prefetch": 3}, "checkpoint": {"every": 1, "keep": 20}}
    train(config_of(small_world, tmp_path / "all", **saving), lone_rank)
    for step in range(1, 9):
        run_dir = tmp_path / f"run-{step}"
        shutil.copytree(tmp_path / "all", run_dir)
        for path in (run_dir / "checkpoints").glob("step-*"):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        found = train(config_of(small_world, run_dir, **saving), lone_rank)
        assert found[0] == whole[0]
        assert same(found[1], whole[1])


def test_neighbours_that_no_checkpoint_needs_are_let_go(small_world, tmp_path, lone_rank):
    few = {"checkpoint": {"every": 4, "keep": 2, "in_background": False}, "train": {"epochs": 7}}
    train(config_of(small_world, tmp_path / "run", **few), lone_rank)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == ["step-00000020", "step-00000021"]
    kept = sorted(path.name for path in (tmp_path / "run" / "neighbours").glob("step-*"))
    assert kept == ["step-00000012", "step-00000015", "step-00000018"]  # when 18 was written, 12 and 16 were saved


def test_neighbours_that_are_gone_or_damaged_are_told(small_world, tmp_path, lone_rank):
    run_dir = tmp_path / "run"
    parts = {"checkpoint": {"every": 4, "keep": 9}, "train": {"epochs": 3}}
    train(config_of(small_world, run_dir, **parts), lone_rank)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000009")
    shutil.copytree(run_dir, tmp_path / "damaged")
    shutil.rmtree(run_dir / "neighbours" / "step-00000006")
    with pytest.raises(DataError, match=r"neighbours/step-00000006/manifest\.json is missing: bring it back"):
        train(config_of(small_world, run_dir, **parts), lone_rank)
    path = tmp_path / "damaged" / "neighbours" / "step-00000006" / "neighbours.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match=r"neighbours\.npy .*bring it back, or train into another run_dir"):
        train(config_of(small_world, tmp_path / "damaged", **parts), lone_rank)


def test_a_file_of_lists_that_has_changed_since_the_run_began_is_told(small_world, tmp_path, lone_rank):
    world = tmp_path / "world"
    shutil.copytree(small_world, world)
    train(config_of(world, tmp_path / "run", train={"epochs": 1}), lone_rank)
    path = world / "negatives-by-item_id.parquet"
    pq.write_table(pq.read_table(path)[:-1], path)
    with pytest.raises(DataError, match=r"negatives-by-item_id\.parquet is not the file that this run began with"):
        train(config_of(world, tmp_path / "run"), lone_rank)


def test_another_runs_weights_are_taken_without_what_it_remembers(small_world, tmp_path, lone_rank):
    train(config_of(small_world, tmp_path / "run"), lone_rank)
    first = {}
    real = training.warm_start

    def looking(model, *given):
        report = real(model, *given)
        first.update({name: value.clone() for name, value in whole_state(model, lone_rank).items()})
        return report

    config = config_of(small_world, tmp_path / "other", train={"epochs": 1})
    training.warm_start = looking
    try:
        training.train(config, lone_rank, init_from=tmp_path / "run", neighbours=neighbours)
    finally:
        training.warm_start = real
    assert not first["frequency.times_HN"].any() and not first["frequency.step"].any()
    assert (first["queue.first_Q"] < 0).all()
    assert first["user_tower.layers.0.weight"].any()


def test_two_ranks_find_the_same_neighbours_and_resume(small_world, tmp_path, lone_rank, forked):
    """A share of the search each. The second launch finds those of the step that it goes on from."""
    parts = {"checkpoint": {"every": 4, "keep": 9}}
    config = as_values(config_of(small_world, tmp_path / "run", **parts))
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    for override in ("train.epochs=2", "train.epochs=3"):
        code, said = forked(2, "trec_twotower", "train", path, override)
        assert code == 0, said
    assert said.count("neighbours 2 to 8 of") == 1  # of step 6, which the checkpoint of that step had before it
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 10))
    train(config_of(small_world, tmp_path / "alone", checkpoint=parts["checkpoint"]), lone_rank)
    for name in ("items.npy", "neighbours.npy"):
        place = Path("neighbours", "step-00000003", name)
        assert np.array_equal(np.load(tmp_path / "run" / place), np.load(tmp_path / "alone" / place))


def test_a_row_per_user_draws_neighbours_of_its_positives(small_world, tmp_path, lone_rank):
    loss = {"negatives": {"refresh": {"every": 2, "neighbor_range": [1, 3], "count": 3}, "in_batch": True}}
    losses, _ = train(user_config(small_world, tmp_path / "run", loss=loss), lone_rank)
    assert len(losses) == 9 and np.isfinite(losses).all()


# What does not fit


def test_refreshing_without_a_search_or_with_too_few_items_is_refused(small_world, tmp_path, lone_rank):
    with pytest.raises(ConfigError, match=r"refresh needs a search for neighbours: give train\(\) that of the index"):
        training.train(config_of(small_world, tmp_path / "run"), lone_rank)
    loss = {"negatives": {"refresh": {"every": 2, "neighbor_range": [29, 40], "count": 3}}}
    with pytest.raises(ConfigError, match=r"neighbor_range begins with 29, but each item has only 28 neighbours"):
        train(event_config(small_world, tmp_path / "other", loss=loss), lone_rank)


def test_batches_that_are_taken_ahead_are_refused_beside_a_refresh(small_world, tmp_path):
    with pytest.raises(
        ConfigError, match=r"train\.pipeline is 'sparse_dist', which reads batches ahead of the step, but those"
    ):
        config_of(small_world, tmp_path, train={"pipeline": "sparse_dist"})


# A folder that grows


def test_what_rows_refuse_is_counted_on_as_files_come(tmp_path):
    """Items that come later among them: the counts of all files are those of one pass over them."""
    folder = tmp_path / "d"
    shown = pa.array([["i03", "i04"], None, ["i03"], ["i03", "i03"]] * 3, pa.list_(pa.string()))
    streaming.publish(folder, "items/part-0.parquet", streaming.items(*streaming.ITEMS))
    streaming.publish(folder, "train/a.parquet", streaming.rows(0, 12, shown=shown))
    loss = {"impressions": {"column": "shown"}, "known": tmp_path / "known.parquet"}
    pq.write_table(pa.table({"user_id": [3], "item_ids": [["new", "i05"]]}), tmp_path / "known.parquet")
    config = streaming.config_of(folder)
    config = config.model_copy(update={"loss": build_loss(**loss)})
    stream = streaming.stream_by(config)

    def come() -> None:
        streaming.publish(folder, "items/a.parquet", streaming.items("new"))
        later = pa.array([["new", "i04"], ["new"], []], pa.list_(pa.string()))
        streaming.publish(folder, "train/c.parquet", streaming.rows(12, 3, ["new", "i05"], shown=later))

    batches = []
    for number, batch in enumerate(stream.iter_from(0)):
        batches.append(batch)
        if number == 0:
            come()
    assert len(batches) == 3
    counts = Run(config.run_dir, config).counts()
    names = [*streaming.ITEMS, "new"]
    taken = dict.fromkeys(names, 0)
    for number in range(15):
        taken[streaming.ITEMS[number * number % 12] if number < 12 else ["new", "i05"][number * number % 2]] += 1
    refused = {**dict.fromkeys(names, 0), "i03": 9, "i04": 4, "new": 2}
    assert counts.tolist() == [[taken[name] for name in names], [refused[name] for name in names]]
    # The item that has come is known to the user for whom the file named it before it came: candidates i04, i05, new.
    last, known = batches[-1], {}
    for row, column in zip(
        batches[-1].targets.known.row_P.tolist(), batches[-1].targets.known.column_P.tolist(), strict=True
    ):
        known.setdefault(streaming.rows_in(last)[row] % 5, set()).add(column)
    assert known == {2: {2}, 3: {1, 2}, 4: {2}}
