"""Training on a folder that grows: as if undisturbed, whoever is killed, and measured with what is known by then."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.data.loading.test_stream import GROWN, config_of, expected, folder, items, publish, rows  # noqa: F401 - a fixture
from tests.ranks.launch import SAID_BY_TORCHREC
from trec_twotower.config.base import as_values
from trec_twotower.config.loading import to_yaml
from trec_twotower.config.run_config import RunConfig
from trec_twotower.data.loading import streaming
from trec_twotower.errors import DataError
from trec_twotower.training.loop import Trainer, train
from trec_twotower.training.run_dir import Run

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)


def with_settings(config: RunConfig, run_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    """Every loss logged; `sections` laid over the config's."""
    values = as_values(config) | {"run_dir": run_dir}
    for name, settings in {"train": {"log_every": 1}, **sections}.items():
        values[name] = values[name] | settings
    return RunConfig.model_validate(values)


def lines(run_dir: Path, kind: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines(run_dir)]


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


@pytest.fixture
def when_done(monkeypatch) -> Callable[..., None]:
    """Has something happen when a step is done: when_done({3: publish_it})."""

    def arrange(events: dict[int, Callable[[], Any]]) -> None:
        finish_step = Trainer._finish_step

        def then(trainer: Trainer, step: int) -> None:
            events.pop(step, lambda: None)()
            finish_step(trainer, step)

        monkeypatch.setattr(Trainer, "_finish_step", then)

    return arrange


def test_the_same_command_once_more_takes_what_has_come(folder, lone_rank, tmp_path, when_done):  # noqa: F811
    """Three calls with a file before each, or one call to which they come: the same losses of the same steps."""
    parts = with_settings(config_of(folder), tmp_path / "parts")
    at_once = with_settings(config_of(folder), tmp_path / "once")
    files = {"c": rows(23, 9), "d": rows(32, 15)}
    train(parts, lone_rank)
    for name, table in files.items():
        publish(folder, f"train/{name}.parquet", table)
        train(parts, lone_rank)
        train(parts, lone_rank)  # nothing has come: nothing is done
    for name in files:
        (folder / f"train/{name}.parquet").unlink()
    when_done({2: partial(publish, folder, "train/c.parquet", files["c"]),
               6: partial(publish, folder, "train/d.parquet", files["d"])})  # fmt: skip
    train(at_once, lone_rank)
    assert [step for step, _ in losses(tmp_path / "once")] == list(range(1, 10))  # 4, 2 and 3 steps
    assert losses(tmp_path / "parts") == losses(tmp_path / "once")
    assert saved_steps(tmp_path / "once")[-2:] == [6, 9]
    status = json.loads((tmp_path / "once/status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 9)


def test_generations_are_measured_at_their_end_with_the_items_known_by_then(folder, lone_rank, tmp_path, when_done):  # noqa: F811
    measured: list[tuple[int, int]] = []
    steps: list[int] = []

    def come() -> None:
        publish(folder, "items/more.parquet", items("new", "newer"))
        publish(folder, "train/c.parquet", rows(23, 9, ["new", "i01"]))

    def evaluate(sources: Any) -> Callable[[Any], dict[str, float]]:
        num_items = len(sources.catalogue)
        return lambda _: measured.append((steps[-1], num_items)) or {"recall@20": 0.5}

    when_done({1: come, 5: lambda: publish(folder, "train/d.parquet", rows(32, 7)),
               **{n: lambda n=n: steps.append(n) for n in (4, 6, 7)}})  # fmt: skip
    train(with_settings(config_of(folder), tmp_path / "run"), lone_rank, evaluate)
    assert measured == [(4, 12), (6, 14), (7, 14)]
    assert [line["step"] for line in lines(tmp_path / "run", "valid")] == [4, 6, 7]


def test_a_stream_is_measured_and_saved_by_steps_where_told_to_and_at_its_end(folder, lone_rank, tmp_path, when_done):  # noqa: F811
    sections = {"checkpoint": {"every": 3, "keep": 9}}
    config = with_settings(config_of(folder), tmp_path / "run", **sections, train={"log_every": 9, "evaluate_every": 5})
    when_done({2: lambda: publish(folder, "train/c.parquet", rows(23, 30))})
    train(config, lone_rank, lambda sources: lambda model: {"recall@20": 0.0})
    assert [line["step"] for line in lines(tmp_path / "run", "valid")] == [5, 9]
    assert saved_steps(tmp_path / "run") == [3, 5, 6, 9]  # 5 is the best
    assert [line["step"] for line in lines(tmp_path / "run")] == [4, 9]  # a logged loss never spans generations


def test_a_bad_row_can_be_mended_while_no_saved_step_has_rows_of_its_file(folder, lone_rank, tmp_path, capsys):  # noqa: F811
    """The run stops at it; the same command takes the mended file, as if it had come like that."""
    good = rows(23, 9)
    bad = good.set_column(3, "age", pa.array([*good["age"].to_pylist()[:-1], float("nan")]))
    config = with_settings(config_of(folder), tmp_path / "run")
    train(config, lone_rank)
    publish(folder, "train/c.parquet", bad)
    with pytest.raises(DataError, match=r"c\.parquet"):
        train(config, lone_rank)
    publish(folder, "train/c.parquet", pa.concat_tables([good, rows(32, 1)]))
    train(config, lone_rank)
    assert "The files of generation 1 have changed: they are read again" in capsys.readouterr().out
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    undisturbed = with_settings(config_of(folder), tmp_path / "other")
    (folder / "train/c.parquet").rename(tmp_path / "c.parquet")
    train(undisturbed, lone_rank)
    (tmp_path / "c.parquet").rename(folder / "train/c.parquet")
    train(undisturbed, lone_rank)
    assert losses(tmp_path / "other") == losses(tmp_path / "run")
    # Of rows that a checkpoint has learned from, nothing may change.
    publish(folder, "train/c.parquet", good)
    with pytest.raises(DataError, match=r"c\.parquet has .* bytes, but had .* when this run read it"):
        train(config, lone_rank)


def test_a_run_that_nothing_is_saved_of_begins_with_what_is_there(folder, lone_rank, tmp_path):  # noqa: F811
    config = with_settings(config_of(folder), tmp_path / "run")
    run = Run.create_or_open(config, lone_rank)
    run.initialize(lone_rank)
    publish(folder, "train/c.parquet", rows(23, 5))
    train(config, lone_rank)
    saved = json.loads((tmp_path / "run/stream.json").read_text())["generations"]
    assert [one["num_rows"] for one in saved] == [28]


def test_waiting_is_no_part_of_the_time_a_training_took(folder, lone_rank, tmp_path, monkeypatch):  # noqa: F811
    """Both clocks are one that stands still but for the wait: an hour and then some, before the second generation."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += 3600
        if now[0] == 3600:
            publish(folder, "train/c.parquet", rows(23, 9))

    class Clock:
        monotonic = staticmethod(lambda: now[0])
        perf_counter = staticmethod(lambda: now[0])
        time = staticmethod(lambda: now[0])

    Clock.sleep = staticmethod(sleep)
    monkeypatch.setattr(streaming, "time", Clock)
    for module in ("loop", "checkpoints.trainer_state"):
        monkeypatch.setattr(f"trec_twotower.training.{module}.time", Clock)
    train(with_settings(config_of(folder, follow={"idle_s": 1800}), tmp_path / "run"), lone_rank)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["step"], status["train_s"], status["waiting_s"]) == (6, 0, 0)


# Two ranks


def noted(notes: Path, num_ranks: int = 2) -> dict[int, list[list[int]]]:
    """Step -> the rows of all ranks, sorted, as often as it was taken by all."""
    found: dict[int, list[list[list[int]]]] = {}
    for rank in range(num_ranks):
        for line in (notes / f"{rank}.jsonl").read_text().splitlines():
            step, taken = json.loads(line)
            found.setdefault(step, [[] for _ in range(num_ranks)])[rank].append(taken)
    return {
        step: [sorted(row for part in parts for row in part) for parts in zip(*of_ranks, strict=False)]
        for step, of_ranks in found.items()
    }


class Job:
    """A training of two ranks on a folder of its own, and the files that are still to come to it."""

    def __init__(self, forked: Any, root: Path, name: str, **follow: Any) -> None:
        self.forked = forked
        self.root = root / name
        for part in ("train", "items", "staged", "rows"):
            (self.root / "d" / part).mkdir(parents=True)
        self.folder = self.root / "d"
        publish(self.folder, "items/part-0.parquet", items(*[f"i{number:02d}" for number in range(12)]))
        publish(self.folder, "train/a.parquet", rows(0, 10))
        publish(self.folder, "train/b.parquet", rows(10, 13))
        publish(self.folder, "staged/items/more.parquet", items("new"))
        publish(self.folder, "staged/train/c.parquet", rows(32, 11, ["i01", "new"]))
        publish(self.folder, "staged/train/d.parquet", rows(23, 9))
        publish(self.folder, "staged/train/e.parquet", rows(43, 10))
        publish(self.folder, "staged/train/f.parquet", rows(53, 5))
        self.run_dir = self.root / "run"
        config = config_of(self.folder, follow={"idle_s": 0} | follow)
        config = with_settings(config, self.run_dir, checkpoint={"every": 2, "in_background": False})
        (self.root / "config.yaml").write_text(to_yaml(as_values(config)))

    def move(self, *names: str) -> list[list[str]]:
        return [[str(self.folder / "staged" / name), str(self.folder / name)] for name in names]

    def bring(self, *names: str) -> None:
        for there, here in self.move(*names):
            Path(there).rename(here)

    def start(self, steps: dict[int, list[str]], fault: str = "", **plan: Any) -> tuple[int, str]:
        moves = {str(step): self.move(*names) for step, names in steps.items()}
        path = self.root / "plan.json"
        path.write_text(json.dumps({"step": moves, "rows": str(self.folder / "rows"), **plan}))
        return self.forked(2, "tests.ranks.growing", path, "train", self.root / "config.yaml", TREC_TT_FAULT=fault)


COME = {2: ["items/more.parquet", "train/d.parquet", "train/c.parquet"], 5: ["train/e.parquet"]}


def test_killed_ranks_take_every_row_once_in_the_order_of_an_undisturbed_run(tmp_path, forked):
    """Two ranks; SIGKILL to the first in step 6, in the midst of generation 1.

    A further file comes while both are dead, when it is no part of the generation that goes on.
    """
    calm, killed = Job(forked, tmp_path, "calm"), Job(forked, tmp_path, "killed")
    code, said = calm.start({**COME, 5: ["train/e.parquet", "train/f.parquet"]})
    assert code == 0, said
    code, said = killed.start(COME, fault="step:updated:step6:rank0")
    assert code == 128 + 9, said
    killed.bring("train/f.parquet")
    code, said = killed.start({})
    assert code == 0, said
    assert "resumed at step 4 of 7" in said

    found = {name: noted(job.folder / "rows") for name, job in (("calm", calm), ("killed", killed))}
    steps = [found["calm"][step][0] for step in range(1, 11)]
    assert sorted(row for step in steps for row in step) == list(range(58))
    generations = (*GROWN[:2], ("e", "f"))
    assert steps == [step for n, names in enumerate(generations) for step in expected(calm.folder, n, *names)]
    for step in range(1, 11):
        assert len(found["calm"][step]) == 1
        assert {*map(tuple, found["killed"][step])} == {tuple(steps[step - 1])}
    assert [len(found["killed"][step]) for step in (5, 6)] == [2, 2]  # taken again, since they were not saved
    assert losses(killed.run_dir) == losses(calm.run_dir)
    assert np.array_equal(*(np.load(job.run_dir / "item_counts-00000002.npy") for job in (calm, killed)))


def test_ranks_that_wait_for_files_stop_when_one_is_told_to(tmp_path, lone_rank, forked):
    """SIGTERM to the second rank in its second sleep; all save and end, and the run goes on, also on one rank."""
    job = Job(forked, tmp_path, "job", idle_s=None, poll_s=0.01)
    code, said = job.start({}, term_in_sleep=2)
    assert code == 128 + 15, said
    assert "waiting for new files" in said
    status = json.loads((job.run_dir / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 4)
    job.bring("train/d.parquet")
    train(with_settings(config_of(job.folder), job.run_dir), lone_rank)
    assert [step for step, _ in losses(job.run_dir)] == [1, 2, 3, 4, 5, 6]
    status = json.loads((job.run_dir / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("finished", 6, "no new files came")
