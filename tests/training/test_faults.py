"""Faults at named points and what must come of them: a seeded share of `make soak`, and each mechanism by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks.launch import ROOT, SAID_BY_TORCHREC
from tests.ranks.states import whole_state
from tests.ranks.worlds import EVENTS, event_config
from trec_twotower import cli
from trec_twotower.config.base import as_values
from trec_twotower.config.loading import to_yaml
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.demo import default_num_ranks
from trec_twotower.distributed.ranks import start_ranks
from trec_twotower.distributed.signals import AGENT_PID, StopSignals
from trec_twotower.distributed.watchdog import is_lost
from trec_twotower.errors import ConfigError, Stopped, TrainingError
from trec_twotower.model.embeddings import table_shards
from trec_twotower.model.finite_check import GradientCheck, NotFiniteError
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.storage.fault_point import POINTS, Fault, fault_point
from trec_twotower.training.checkpoints.checkpoint_io import PublishingWriter
from trec_twotower.training.diagnostics.crash_guard import ATTEMPT
from trec_twotower.training.diagnostics.divergence import dead_vectors
from trec_twotower.training.diagnostics.step_report import summary
from trec_twotower.training.loop import Trainer, train
from trec_twotower.training.model_builder import build_model, inner_model
from trec_twotower.training.run_dir import Run

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)


# A share of the soak

SHARE = 0.03


@pytest.fixture(scope="module")
def sample(tmp_path_factory, forked) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("soak") / "soak.json"
    _, said = forked(1, "tests.soak", "--share", str(SHARE), "--seed", "20", "--json", out, timeout_s=1500)
    assert out.is_file(), said
    return json.loads(out.read_text())


@pytest.mark.timeout(1600)
def test_nothing_is_lost_and_nothing_doubled_in_a_share_of_the_soak(sample):
    """Every fault is tried, and every try ends as if there had been none, or is refused by name."""
    assert len(sample) == 19
    for tally in sample:
        harm = {name: tally[name] for name in ("tried", "exact", "lost", "doubled", "silent")}
        if tally["wanted"]:
            assert tally["tried"] >= max(1, round(SHARE * tally["wanted"]) - 3), tally
        assert harm["exact"] == harm["tried"] and not (harm["lost"] or harm["doubled"] or harm["silent"]), tally


# Ranks and GPUs


@pytest.mark.parametrize(("has_gpu", "num_ranks", "left"), [(False, 2, True), (True, 1, True), (True, 2, False)])
def test_a_rank_that_fails_does_not_wait_for_others_on_gpus(monkeypatch, has_gpu, num_ranks, left):
    """NCCL's group ends on all ranks together; an error of one of them comes while the others wait for it."""
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(has_gpu))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr("trec_twotower.distributed.ranks._store", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    ended: list[bool] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(True))
    with pytest.raises(KeyError), start_ranks():
        raise KeyError("of one rank")
    assert bool(ended) == left
    with start_ranks():
        ended.clear()
    assert ended == [True]


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_more_ranks_than_gpus_are_refused_on_each(monkeypatch, local_rank):
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 ranks are on this machine, but torch sees 1 GPU here"), start_ranks():
        pass


@pytest.mark.parametrize(("num_gpus", "num_ranks"), [(0, 1), (1, 1), (8, 2)])
def test_the_demo_starts_as_many_ranks_as_gpus_allow(monkeypatch, num_gpus, num_ranks):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert default_num_ranks() == num_ranks


def test_an_error_that_nobody_foresaw_is_told_and_ends_the_process_at_once(monkeypatch, capsys):
    def fails(*_: Any, **__: Any) -> int:
        raise RuntimeError("out of memory")

    codes: list[int] = []
    monkeypatch.setattr(cli, "_run", fails)
    monkeypatch.setattr(os, "_exit", codes.append)
    cli.main()
    assert codes == [1]
    assert capsys.readouterr().err.endswith("RuntimeError: out of memory\n")
    with pytest.raises(RuntimeError, match="out of memory"):
        cli.main([])


# Fault points


def test_a_fault_strikes_where_it_is_told_and_nowhere_else(monkeypatch):
    struck: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: struck.append((pid, number)))
    monkeypatch.setenv("TREC_TT_FAULT", "save:between_files:step20:rank1:stop,step:forward")
    for rank, attempt, point, step, expected in (
        ("0", "0", "save:between_files", 20, []),
        ("1", "0", "save:between_files", 19, []),
        ("1", "0", "save:sealed", 20, []),
        ("1", "1", "save:between_files", 20, []),
        ("1", "0", "save:between_files", 20, [(os.getpid(), signal.SIGSTOP)]),
        ("3", "0", "step:forward", 7, [(os.getpid(), signal.SIGKILL)]),
    ):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        struck.clear()
        fault_point(point, step)
        assert struck == expected
    monkeypatch.delenv("TREC_TT_FAULT")
    fault_point("step:forward", 7)
    assert len(struck) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("save:betwen_files", r"'save:betwen_files', which is not a fault point \(nearest: 'save:between_files'\)"),
        ("save", "'save', which is not a fault point"),
        ("save:sealed:20", "'20' in 'save:sealed:20': after the point, write one of stepN, rankN"),
        ("save:sealed:step", "'step' in"),
        ("save:sealed:explode", "'explode' in .*kill, stop, term, usr1, int, agent, full"),
    ],
)
def test_a_mistaken_fault_is_named(text, said):
    with pytest.raises(ConfigError, match=said):
        Fault.parse(text)


@pytest.mark.parametrize("in_background", [True, False])
def test_a_training_passes_every_point(in_background, lone_rank, small_world, tmp_path, monkeypatch, capsys):
    """So that none of the soak's kills is aimed at a place that is never reached."""
    passed: set[str] = set()
    modules = ("optimizer", "checkpoints.checkpoint", "checkpoints.checkpoint_io", "diagnostics.step_monitor", "loop")
    for module in (*(f"training.{name}" for name in modules), "storage.artifacts"):
        monkeypatch.setattr(f"trec_twotower.{module}.fault_point", lambda point, *_: passed.add(point))
    config = event_config(small_world, tmp_path / "run", checkpoint={"in_background": in_background})
    done = 0

    def told(point: str, *_: Any) -> None:
        nonlocal done
        passed.add(point)
        done += point == "step:updated"
        if done == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        for module in ("loop", "diagnostics.step_monitor"):
            patched.setattr(f"trec_twotower.training.{module}.fault_point", told)
        with pytest.raises(Stopped):
            train(config, lone_rank)
    train(config, lone_rank)
    assert passed == set(POINTS) - {"start:joined", "publish:aside"}
    assert "resumed at step 5 of 9" in capsys.readouterr().out


# Being told to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_the_step(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == number  # the first one counts
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once_but_not_under_a_launcher_that_repeats_it(monkeypatch):
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setenv(AGENT_PID, "1")
    with StopSignals() as signals:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT


@pytest.mark.timeout(240)
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGUSR1])  # Ctrl-C: test_cli.py
def test_a_signal_to_the_launcher_saves_on_all_ranks_and_says_so(told, small_world, tmp_path):
    """Real torchrun. Exit code 128 + the signal, status.json with the same, and a checkpoint of the step it names."""
    run_dir = tmp_path / "run"
    config = event_config(small_world, run_dir, train={"epochs": 100_000})
    (tmp_path / "config.yaml").write_text(to_yaml(as_values(config)))
    command = [
        sys.executable,
        "-u",
        "-m",
        "trec_twotower.distributed.launcher",
        "--standalone",
        "--local-addr=127.0.0.1",
    ]
    command += ["--nproc-per-node=2", "--max-restarts=3", "-m", "trec_twotower", "train", str(tmp_path / "config.yaml")]
    settings = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        assert job.stdout is not None
        said = []
        for line in job.stdout:
            said.append(line)
            if line.startswith("step      5/"):
                job.send_signal(told)
        job.wait()
    status = json.loads((run_dir / "status.json").read_text())
    text = "".join(said)
    assert job.returncode == 128 + told, text
    assert (status["state"], status["exit_code"]) == ("stopped", 128 + told)
    assert told.name in status["reason"] and "the same command resumes" in status["meaning"]
    assert text.count(f"stopped by {told.name} after step {status['step']:,} of 300,000, which is saved") == 1
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    assert newest.name == f"step-{status['step']:08d}" and (newest / "manifest.json").is_file()
    assert not (run_dir / ".lock").exists()


def test_a_stop_where_an_evaluation_is_due_leaves_it_to_the_next_start(lone_rank, small_world, tmp_path, capsys):
    """To leave soon; the metric of that step is in the checkpoint then, as if nothing had been."""
    config = event_config(small_world, tmp_path / "run", checkpoint={"keep": 9})
    seen = []

    def evaluate(sources: Any) -> Any:
        def measure(model: Any) -> dict[str, float]:
            seen.append(len(seen))
            return {"recall@20": 0.5 - 0.1 * len(seen)}

        return measure

    took = TwoTower.forward
    calls = 0

    def telling(model: TwoTower, batch: Any, **more: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return took(model, batch, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TwoTower, "forward", telling)
        with pytest.raises(Stopped, match="stopped by SIGTERM after step 6 of 9"):
            train(config, lone_rank, evaluate)
    assert len(seen) == 1
    train(config, lone_rank, evaluate)
    assert len(seen) == 3
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [3, 6, 9]
    kept = {path.name: json.loads((path / "manifest.json").read_text()) for path in tmp_path.glob("run/checkpoints/*")}
    assert kept["step-00000006"]["valid"] == {"metric": "recall@20", "value": 0.3}
    assert not kept["step-00000006"]["owes_evaluation"]
    capsys.readouterr()


# What is no number


def nan_at(step: int, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    forward = TwoTower.forward
    calls = 0

    def broken(model: TwoTower, batch: Any, **more: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = forward(model, batch, **more)
        if calls == step and what == "loss":
            return loss * float("inf")
        if calls == step:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    monkeypatch.setattr(TwoTower, "forward", broken)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_number_stops_before_the_tables_change_and_tells_the_rows(
    what, lone_rank, small_world, tmp_path, monkeypatch, capsys
):
    """The weights are those after step 3; the report names the files and rows of step 4, and what they hold."""
    from trec_twotower.training import loop as training

    models = []
    build = training.build_model
    monkeypatch.setattr(training, "build_model", lambda *arguments: models.append(build(*arguments)) or models[-1])
    calm = event_config(small_world, tmp_path / "calm", train={"epochs": 1})
    train(calm, lone_rank)
    config = event_config(small_world, tmp_path / "run")
    nan_at(4, monkeypatch, what)
    with pytest.raises(TrainingError, match="nothing was updated by it") as raised:
        train(config, lone_rank)
    for name, value in whole_state(models[0], lone_rank).items():
        assert torch.equal(value, whole_state(models[1], lone_rank)[name]), name
    assert "Lower train.optimizer.lr or raise loss.temperature, and train in" in str(raised.value)
    report = json.loads((tmp_path / "run/not-finite-step-00000004/rank-0.json").read_text())
    assert str(tmp_path / "run/not-finite-step-00000004") in str(raised.value)
    assert report["step"] == 4 and ("loss" if what == "loss" else "gradient") in report["found"]
    rows = [16 * part["row_group"] + row for part in report["rows_of_all_ranks"] for row in part["rows"]]
    assert len(rows) == len(set(rows)) == 16
    assert all(Path(part["path"]).is_file() for part in report["rows_of_all_ranks"])
    lengths = report["features"]["user:history"]["lengths"]
    assert lengths["most"] == max(len(EVENTS[row]["history"]) for row in rows)
    clicked = report["features"]["user:clicks"]["buckets"]["count"]
    assert clicked == sum(len(EVENTS[row]["clicks"]) for row in rows)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (lambda weights: weights[0].fill_(1e30), r"table item has numbers of up to 1e\+30, whose squares overflow"),
        (lambda weights: weights[0].fill_(torch.nan), "table item has numbers that are NaN or infinite"),
        (lambda weights: weights[0, 0].fill_(-torch.inf), "table item has numbers that are NaN or infinite"),
    ],
    ids=["too large", "NaN", "one infinite"],
)
def test_a_model_whose_weights_are_dead_is_not_saved(harm, found, lone_rank, small_world, tmp_path, capsys):
    """The loss of a step says nothing of rows that it does not look up: the checkpoint before stays the newest."""
    config = event_config(small_world, tmp_path / "run", checkpoint={"every": 2})
    finish_step = Trainer._finish_step

    def harmed(trainer: Trainer, step: int) -> None:
        finish_step(trainer, step)
        if step == 4:
            [table] = [shard for name, shard, _ in table_shards(inner_model(trainer.model)) if name == "item"]
            harm(table[-1:])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "_finish_step", harmed)
        with pytest.raises(TrainingError, match=rf"After step 4 {found}: the training has diverged") as raised:
            train(config, lone_rank)
    assert f"The newest checkpoint is {tmp_path}/run/checkpoints/step-00000002" in str(raised.value)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    capsys.readouterr()


def test_an_optimizer_whose_state_is_dead_is_not_saved(lone_rank, small_world, tmp_path, capsys):
    """With an infinite sum of squares Adagrad moves a row no more, though its weights look well."""
    settings = {"optimizer": {"sparse": "rowwise_adagrad", "lr": 0.1}}
    config = event_config(small_world, tmp_path / "run", train=settings)
    finish_step = Trainer._finish_step

    def harmed(trainer: Trainer, step: int) -> None:
        finish_step(trainer, step)
        state = next(parts for name, parts in trainer.optimizer.state().items() if ".tag." in name)
        next(iter(state.values())).local_shards()[0].tensor[-1] = torch.inf

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "_finish_step", harmed)
        with pytest.raises(TrainingError, match="the optimizer's state of table tag has numbers that are NaN or inf"):
            train(config, lone_rank)
    capsys.readouterr()


def test_dead_vectors_are_told_from_living_ones(lone_rank, small_world, tmp_path):
    """A batch of which users have no history, so that their vectors are zero, is none."""
    config = event_config(small_world, tmp_path / "run", train={"epochs": 1})
    run = Run.create_or_open(config, lone_rank)
    batches = TrainBatches(run.initialize(lone_rank), config.data, config.loss, run.item_counts(), (0, 1))
    batch, model = next(iter(batches.iter_from(0, 1))), inner_model(build_model(config, lone_rank))
    assert dead_vectors(model, batch, lone_rank) is None
    weights = {side: getattr(model, f"{side}_tower").layers[-1] for side in ("user", "item")}
    for value, side, found in (
        (0.0, "user", None),
        (torch.nan, "user", "the vectors of users have numbers that are NaN or infinite"),
        (1.0, "user", None),
        (0.0, "item", "the vectors of all items of its batch are zero"),
    ):
        for parameter in weights[side].parameters():
            parameter.data.fill_(value)
        assert dead_vectors(model, batch, lone_rank) == found


# A run directory that is moved


@pytest.mark.parametrize("is_replaced", [False, True])
@pytest.mark.parametrize("in_background", [False, True])
def test_a_training_whose_folder_is_moved_ends_and_leaves_what_took_its_place_alone(
    is_replaced, in_background, lone_rank, small_world, tmp_path, capsys
):
    """Another run may have begun under the old path: two trainers would write into one folder."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    config = event_config(small_world, run, checkpoint={"every": 2, "in_background": in_background})
    forward = Trainer._forward

    def moving(trainer: Trainer, batch: Any) -> torch.Tensor:
        if trainer.state.step == 5:
            trainer.checkpoints.wait()
            run.rename(moved)
            if is_replaced:
                (run / "checkpoints").mkdir(parents=True)
                (run / "metrics.jsonl").write_text("another run's")
        return forward(trainer, batch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "_forward", moving)
        with pytest.raises(TrainingError, match=f"{run} was moved, removed or replaced while it was trained"):
            train(config, lone_rank)
    if is_replaced:
        assert sorted(path.name for path in run.rglob("*")) == ["checkpoints", "metrics.jsonl"]
        assert (run / "metrics.jsonl").read_text() == "another run's"
    else:
        assert not run.exists()
    assert sorted(path.name for path in (moved / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    capsys.readouterr()
    train(event_config(small_world, moved, checkpoint={"every": 2}), lone_rank)
    assert "resumed at step 4 of 9" in capsys.readouterr().out


def test_a_save_under_way_is_not_published_in_a_folder_that_took_the_runs_place(lone_rank, small_world, tmp_path):
    """The folder is moved while the save writes."""
    run = tmp_path / "run"
    config = event_config(small_world, run, checkpoint={"in_background": False})
    write = PublishingWriter.write_data

    def moving(writer: PublishingWriter, *given: Any) -> Any:
        written = write(writer, *given)
        run.rename(tmp_path / "moved")
        (run / "checkpoints").mkdir(parents=True)
        return written

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PublishingWriter, "write_data", moving)
        with pytest.raises(TrainingError, match=f"{run} was moved, removed or replaced"):
            train(config, lone_rank)
    assert not list((run / "checkpoints").iterdir())


def test_a_gradient_is_looked_at_before_it_goes_on(lone_rank):
    """In the pooled rows and in the weights behind them; a finite one passes unchanged."""
    weight = torch.ones(3, requires_grad=True)
    pooled = torch.arange(6.0).reshape(2, 3).requires_grad_()
    wish = torch.tensor([1.0, -2.0, 0.5])
    check = GradientCheck(lone_rank)
    (check.gate([pooled], [weight])[0] * wish).sum().backward()
    assert torch.equal(pooled.grad, wish.expand(2, 3))
    for bad in ("inf", "nan", "-inf"):
        pooled.grad = None
        with pytest.raises(NotFiniteError, match=r"NaN or infinity on 1 of 1 ranks"):
            (check.gate([pooled], [weight])[0] * torch.tensor([1.0, float(bad), 1.0])).sum().backward()
        assert pooled.grad is None
    weight.grad = torch.tensor([0.0, float("nan"), 0.0])
    with pytest.raises(NotFiniteError):
        check.gate([pooled], [weight])[0].sum().backward()


def test_a_summary_counts_what_is_no_number():
    values = torch.tensor([1.0, float("nan"), 3.0, float("inf")])
    assert summary(values) == {"count": 4, "not_finite": 2, "least": 1.0, "most": 3.0, "mean": 2.0}
    assert summary(torch.empty(0)) == {"count": 0, "not_finite": 0}


# A run that gets no further


@pytest.mark.timeout(240)
def test_a_run_that_dies_again_and_again_says_where_and_starts_no_more(
    lone_rank, small_world, tmp_path, monkeypatch, capsys
):
    """Three deaths in step 4 with no checkpoint between; a new checkpoint, or no note, begins the count anew."""
    config = event_config(small_world, tmp_path / "run", train={"max_failures": 3}, checkpoint={"every": 2})
    forward = TwoTower.forward
    bad_step = 4

    def dying(model: TwoTower, batch: Any, **more: Any) -> torch.Tensor:
        if (tmp_path / "run" / ATTEMPT).read_text().find(f'"in_step": {bad_step}}}') > 0:
            raise MemoryError("out of memory")
        return forward(model, batch, **more)

    monkeypatch.setattr(TwoTower, "forward", dying)
    for _ in range(3):
        with pytest.raises(MemoryError):
            train(config, lone_rank)
    with pytest.raises(TrainingError) as raised:
        train(config, lone_rank)
    for said in ("has died 3 times in a row", "since step 2, in the steps 4, 4, 4", "Step 4 reads of ", "row group"):
        assert said in str(raised.value)
    assert str(small_world / "events/train/part.parquet") in str(raised.value)
    (tmp_path / "run" / ATTEMPT).unlink()
    for bad_step in (4, 4, 6, 6, 8):  # noqa: B007 - dying reads it; with a checkpoint between, no count is full
        with pytest.raises(MemoryError):
            train(config, lone_rank)
    bad_step = -1
    train(config, lone_rank)
    assert not (tmp_path / "run" / ATTEMPT).exists()
    capsys.readouterr()


# Ranks that do not answer (that one which hangs is named by the others is in the tenth)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (torch.distributed.DistNetworkError("failed to recv"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (TrainingError("The loss is nan"), False),
        (ValueError("Connection"), False),
    ],
)
def test_an_error_of_another_rank_is_told_from_ones_own(error, expected):
    assert is_lost(error) is expected
