"""What is saved comes back bit for bit, on any number of ranks, and nothing half-written or altered is taken for it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.ranks.launch import SAID_BY_TORCHREC
from tests.ranks.states import whole_optimizer_state, whole_state
from tests.ranks.worlds import MIXED, TABLES, event_config, user_config
from trec_twotower.config.base import as_values
from trec_twotower.config.loading import to_yaml
from trec_twotower.config.run_config import RunConfig, config_hash
from trec_twotower.data.dataset import Dataset
from trec_twotower.data.loading.loader import TrainBatches
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError, DataError, TrainingError
from trec_twotower.storage.atomic import write_json
from trec_twotower.storage.manifest import own_sha256, seal
from trec_twotower.training.checkpoints import tensor_files
from trec_twotower.training.checkpoints.checkpoint import Checkpoints, model_version
from trec_twotower.training.checkpoints.checkpoint_io import PublishingWriter
from trec_twotower.training.loop import train
from trec_twotower.training.metrics_logger import RunLog
from trec_twotower.training.model_builder import build_model
from trec_twotower.training.optimizer import RunOptimizer
from trec_twotower.training.run_dir import Run

pytestmark = pytest.mark.filterwarnings(*SAID_BY_TORCHREC)
ADAGRAD = {"optimizer": {"sparse": "rowwise_adagrad", "lr": 0.1, "schedule": "linear", "warmup_steps": 5}}


def built(config: RunConfig, ranks: Ranks) -> tuple[Any, RunOptimizer]:
    model = build_model(config, ranks)
    return model, RunOptimizer(model, config.train.optimizer)


def steps(config: RunConfig, ranks: Ranks, model: Any, optimizer: RunOptimizer, first: int, end: int) -> list[float]:
    """The training loop without its log: the losses of steps first .. end - 1."""
    run = Run.create_or_open(config, ranks)
    batches = TrainBatches(
        run.initialize(ranks) or run.open_dataset(ranks), config.data, config.loss, run.item_counts(), (0, 1)
    )
    losses = []
    for step, batch in enumerate(batches.iter_from(first, end), first):
        optimizer.set_rates(step, 20)
        loss = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs"


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# What is saved comes back


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        ("table_wise", "rowwise_adagrad"),
        ("row_wise", "adagrad"),
        ("column_wise", "rowwise_adagrad"),
        ("data_parallel", "rowwise_adagrad"),
        ("data_parallel", "adagrad"),
        ("mixed", "sgd"),
        ("mixed", "rowwise_adagrad"),
    ],
)
def test_a_loaded_model_goes_on_as_the_saved_one(plan, kind, lone_rank, small_world, tmp_path):
    """Weights, Adagrad's and Adam's states: the next losses are equal to the last bit, in the middle of a schedule."""
    wanted = MIXED if plan == "mixed" else plan
    settings = {"optimizer": ADAGRAD["optimizer"] | {"sparse": kind}}
    config = event_config(small_world, tmp_path / "run", wanted, train=settings)
    model, optimizer = built(config, lone_rank)
    steps(config, lone_rank, model, optimizer, 0, 4)
    checkpoints = Checkpoints(tmp_path / "checkpoints", lone_rank)
    path = checkpoints.save(4, model, optimizer, {"config": "of this test"})
    saved = whole_state(model, lone_rank), whole_optimizer_state(optimizer, lone_rank)
    expected = steps(config, lone_rank, model, optimizer, 4, 8)

    other, its_optimizer = built(config, lone_rank)
    manifest = checkpoints.load(path, other, its_optimizer)
    assert (manifest["step"], manifest["num_ranks"], manifest["config"]) == (4, 1, "of this test")
    assert_same(whole_state(other, lone_rank), saved[0])
    assert_same(whole_optimizer_state(its_optimizer, lone_rank), saved[1])
    assert steps(config, lone_rank, other, its_optimizer, 4, 8) == expected


def test_weights_alone_can_be_loaded(lone_rank, small_world, tmp_path):
    """As export does, which has no optimizer."""
    config = event_config(small_world, tmp_path / "run", MIXED, train=ADAGRAD)
    model, optimizer = built(config, lone_rank)
    steps(config, lone_rank, model, optimizer, 0, 2)
    checkpoints = Checkpoints(tmp_path / "checkpoints", lone_rank)
    path = checkpoints.save(2, model, optimizer, {})
    other = build_model(config, lone_rank)
    checkpoints.load(path, other)
    assert_same(whole_state(other, lone_rank), whole_state(model, lone_rank))


@pytest.mark.parametrize(
    ("runs", "name", "plan", "make"),
    [
        ("table_wise-rowwise_adagrad", "event table_wise rowwise_adagrad", "table_wise", event_config),
        ("row_wise-rowwise_adagrad", "event row_wise rowwise_adagrad", "row_wise", event_config),
        ("column_wise-rowwise_adagrad", "event column_wise rowwise_adagrad", "column_wise", event_config),
        ("data_parallel-sgd", "event data_parallel sgd", "data_parallel", event_config),
        ("mixed-adagrad", "event mixed adagrad", MIXED, event_config),
        ("user-rowwise_adagrad", "user mixed rowwise_adagrad", MIXED, user_config),
    ],
)
def test_one_rank_loads_what_two_saved(runs, name, plan, make, lone_rank, small_world, on_two_ranks):
    """Tables, layers and states that lay on two ranks, bit for bit. (One rank's on two: test_two_ranks.py.)"""
    results, folder = on_two_ranks
    config = make(small_world, folder / runs, plan, train={"optimizer": {"sparse": runs.split("-")[1]}})
    model, optimizer = built(config, lone_rank)
    checkpoints = Checkpoints(folder / runs / "checkpoints", lone_rank)
    manifest = checkpoints.load(checkpoints.complete()[-1], model, optimizer)
    assert manifest["num_ranks"] == 2
    assert_same(whole_state(model, lone_rank), results[f"train {name}"]["weights"])
    assert_same(whole_optimizer_state(optimizer, lone_rank), results[f"train {name}"]["states"])


# Which are kept, which is chosen


def valid(value: float, metric: str = "recall@20") -> dict[str, Any]:
    return {"valid": {"metric": metric, "value": value}}


@pytest.fixture
def small(lone_rank, small_world, tmp_path) -> tuple[Any, RunOptimizer, Checkpoints]:
    config = user_config(small_world, tmp_path / "run")
    model, optimizer = built(config, lone_rank)
    return model, optimizer, Checkpoints(tmp_path / "checkpoints", lone_rank, keep=2)


def test_the_newest_and_the_best_are_kept(small):
    model, optimizer, checkpoints = small
    assert checkpoints.newest() is None
    assert checkpoints.best() is None
    left = {}
    for step in (5, 10, 15, 20, 25):
        checkpoints.save(step, model, optimizer, valid(0.1 * step if step <= 15 else 1.0))
        left[step] = [int(path.name.removeprefix("step-")) for path in checkpoints.complete()]
    assert left == {5: [5], 10: [5, 10], 15: [10, 15], 20: [15, 20], 25: [15, 20, 25]}
    assert checkpoints.best() == {"step": 15, "metric": "recall@20", "value": 0.1 * 15}
    assert checkpoints.newest() == checkpoints.path(25)
    assert len({model_version(path) for path in checkpoints.complete()}) == 3


def test_a_stage_gets_the_checkpoint_it_names(small):
    model, optimizer, checkpoints = small
    checkpoints.keep = 9
    for step in (5, 10):
        checkpoints.save(step, model, optimizer, {})
    assert checkpoints.choose("best") == checkpoints.path(10)  # none was evaluated
    for step, value in ((15, 0.1), (20, 0.3), (25, 0.3), (30, 0.2)):
        checkpoints.save(step, model, optimizer, valid(value))
    assert checkpoints.choose("best") == checkpoints.path(20)  # of equal ones the first
    assert checkpoints.choose("newest") == checkpoints.path(30)
    assert checkpoints.choose("5") == checkpoints.path(5)
    with pytest.raises(ConfigError, match=r"no checkpoint '7' in .*: use best, newest, or one of the steps \[5, 10, "):
        checkpoints.choose("7")


def test_values_of_another_metric_are_not_compared(small):
    """A run that goes on with another evaluate.best begins anew."""
    model, optimizer, checkpoints = small
    checkpoints.save(5, model, optimizer, valid(0.9, "hit@20"))
    checkpoints.save(10, model, optimizer, valid(0.2))
    assert checkpoints.best() == {"step": 10, "metric": "recall@20", "value": 0.2}


def test_without_a_checkpoint_one_is_told_to_train(lone_rank, tmp_path):
    for which in ("best", "newest"):
        with pytest.raises(ConfigError, match="holds no complete checkpoint: train first"):
            Checkpoints(tmp_path / "none", lone_rank).choose(which)


# What is broken is named, what is left over is swept


def test_any_damage_is_named(small):
    """Each file in turn: one bit, one byte less, gone; and the manifest itself."""
    model, optimizer, checkpoints = small
    path = checkpoints.save(5, model, optimizer, {})
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert {file.name for file in files} == {"rank-00000-of-00001.safetensors", "manifest.json"}
    for file in files:
        whole = file.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
        for damaged in (flipped, whole[:-1], None):
            if damaged is None:
                file.unlink()
            else:
                file.write_bytes(damaged)
            if file.name == "manifest.json" and damaged == whole[:-1]:
                assert checkpoints.load(path, model, optimizer)["step"] == 5  # the last line break says nothing
            else:
                with pytest.raises(DataError) as raised:
                    checkpoints.load(path, model, optimizer)
                assert str(file) in str(raised.value)
                assert "remove this checkpoint; the run continues from the one before it" in str(raised.value)
            file.write_bytes(whole)
    checkpoints.load(path, model, optimizer)


def test_a_damaged_checkpoint_changes_no_weight(small, lone_rank):
    model, optimizer, checkpoints = small
    path = checkpoints.save(5, model, optimizer, {})
    for value in model.parameters():
        value.data.zero_()
    data = next(path.glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=data.name):
        checkpoints.load(path, model, optimizer)
    assert all((value == 0).all() for value in whole_state(model, lone_rank).values())


def test_leftovers_of_a_killed_save_are_ignored_and_swept(small):
    """A folder without a manifest and one under its temporary name are no checkpoints; the next save clears up."""
    model, optimizer, checkpoints = small
    path = checkpoints.save(5, model, optimizer, {})
    cut_short = checkpoints.folder / ".step-00000010.tmp"
    shutil.copytree(path, cut_short)
    (cut_short / "manifest.json").unlink()
    replaced = checkpoints.folder / ".step-00000005.old-77"
    shutil.copytree(path, replaced)
    without_manifest = checkpoints.path(7)
    shutil.copytree(cut_short, without_manifest)
    assert checkpoints.complete() == [path]
    assert checkpoints.newest() == path
    shutil.rmtree(without_manifest)
    assert checkpoints.save(10, model, optimizer, {}) == checkpoints.path(10)
    assert sorted(folder.name for folder in checkpoints.folder.iterdir()) == ["step-00000005", "step-00000010"]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("point", ["save:opened", "save:within_file", "save:between_files", "save:sealed"])
def test_a_save_without_room_names_path_and_need_and_leaves_the_earlier_ones(
    point, in_background, small, lone_rank, monkeypatch
):
    """ENOSPC at several moments; the folder it was writing to is gone, which gives the room back."""
    model, optimizer, checkpoints = small
    checkpoints.in_background = in_background
    path = checkpoints.save(5, model, optimizer, {})
    checkpoints.wait()
    state = [*whole_state(model, lone_rank).values(), *whole_optimizer_state(optimizer, lone_rank).values()]
    need = sum(value.nbytes for value in state)
    monkeypatch.setenv("TREC_TT_FAULT", f"{point}:step10:full")
    with pytest.raises(TrainingError) as raised:
        checkpoints.save(10, model, optimizer, {})
        checkpoints.wait()
    for said in ("step-00000010", "No space left on device", f"needs about {need:,} bytes", "continues from them"):
        assert said in str(raised.value)
    assert [folder.name for folder in checkpoints.folder.iterdir()] == [path.name]
    monkeypatch.delenv("TREC_TT_FAULT")
    assert checkpoints.newest() == path
    checkpoints.load(path, model, optimizer)
    assert checkpoints.save(10, model, optimizer, {}).name == "step-00000010"
    checkpoints.wait()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_disk_that_fills_within_a_tensor_is_named_as_such(in_background, small, monkeypatch):
    """What was written of it goes, too."""
    model, optimizer, checkpoints = small
    checkpoints.in_background = in_background
    write = tensor_files.write_bytes

    def write_what_is_small(file: Any, content: memoryview) -> None:
        if len(content) > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, content)

    monkeypatch.setattr(tensor_files, "write_bytes", write_what_is_small)
    with pytest.raises(TrainingError, match=r"step 10 \(No space left on device\): a checkpoint needs about"):
        checkpoints.save(10, model, optimizer, {})
        checkpoints.wait()
    assert not any(checkpoints.folder.iterdir())


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Every write to a checkpoint's files raises this."""

    def write(file: Any, content: memoryview) -> None:
        raise error

    monkeypatch.setattr(tensor_files, "write_bytes", write)


def test_a_disk_that_fails_otherwise_is_not_said_to_be_full(small, monkeypatch):
    model, optimizer, checkpoints = small
    failing(monkeypatch, OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(TrainingError, match=r"step 10 \(Input/output error\): the earlier checkpoints are whole"):
        checkpoints.save(10, model, optimizer, {})


def test_an_error_that_is_none_of_the_disks_is_raised_as_it_is(small, monkeypatch):
    model, optimizer, checkpoints = small
    failing(monkeypatch, ZeroDivisionError("of a writer"))
    with pytest.raises(ZeroDivisionError, match="of a writer"):
        checkpoints.save(10, model, optimizer, {})
    assert not any(checkpoints.folder.iterdir())


def test_a_first_save_that_cannot_make_its_folder_names_it(small, tmp_path):
    """There is then no folder whose free room could be asked for."""
    model, optimizer, checkpoints = small
    (tmp_path / "file").touch()
    checkpoints.folder = tmp_path / "file" / "checkpoints"
    with pytest.raises(TrainingError, match=r"could not write .*/file/checkpoints.* step 10 \(Not a directory\)"):
        checkpoints.save(10, model, optimizer, {})


def test_the_room_that_is_told_is_for_all_ranks(small, monkeypatch):
    model, optimizer, checkpoints = small
    checkpoints.in_background = True
    monkeypatch.setenv("TREC_TT_FAULT", "save:opened:step10:full")
    checkpoints.save(10, model, optimizer, {})
    need = checkpoints._snapshot.num_bytes
    monkeypatch.setattr(checkpoints, "ranks", Ranks(0, 3, torch.device("cpu")))
    with pytest.raises(TrainingError, match=f"needs about {3 * need:,} bytes"):
        checkpoints.wait()


def test_a_checkpoint_whose_removal_is_cut_short_is_none_any_more(small, monkeypatch):
    """Its manifest goes first: what is left of it is taken for no whole one."""
    model, optimizer, checkpoints = small
    for step in (5, 10):
        checkpoints.save(step, model, optimizer, {})
    remove = shutil.rmtree

    def cut_short(path: Path, **how: Any) -> None:
        if path == checkpoints.path(5):
            next(path.glob("*.safetensors")).unlink()
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        remove(path, **how)

    monkeypatch.setattr(shutil, "rmtree", cut_short)
    with pytest.raises(TrainingError, match="step-00000005"):
        checkpoints.save(15, model, optimizer, {})
    assert checkpoints.path(5).is_dir()
    assert checkpoints.complete() == [checkpoints.path(10), checkpoints.path(15)]


# In the background


@pytest.fixture
def held(small, monkeypatch):
    """A save that is under way and goes on when the event is set."""
    model, optimizer, checkpoints = small
    checkpoints.in_background = True
    go_on, begin = threading.Event(), PublishingWriter.prepare_global_plan

    def late(writer: PublishingWriter, plans: Any) -> Any:
        assert go_on.wait(30)
        return begin(writer, plans)

    monkeypatch.setattr(PublishingWriter, "prepare_global_plan", late)
    checkpoints.save(5, model, optimizer, {})
    yield checkpoints, go_on
    go_on.set()
    checkpoints.wait()


@pytest.mark.timeout(60)
def test_a_training_that_ends_lets_its_save_end(held):
    checkpoints, go_on = held
    threading.Timer(0.2, go_on.set).start()
    checkpoints.close()
    assert checkpoints.complete() == [checkpoints.path(5)]


@pytest.mark.timeout(60)
def test_a_training_that_ends_does_not_wait_for_a_save_that_hangs(held, monkeypatch):
    """Nor is it forgotten."""
    checkpoints, go_on = held
    monkeypatch.setattr("trec_twotower.training.checkpoints.checkpoint.CLOSE_S", 0.1)
    checkpoints.close()
    assert not checkpoints.complete()
    go_on.set()
    checkpoints.wait()
    assert checkpoints.complete() == [checkpoints.path(5)]


@pytest.mark.timeout(60)
def test_a_save_that_has_failed_is_known_before_anyone_waits_for_it(small, monkeypatch):
    """All ranks ask in every step; the end of a training that failed for another reason does not ask."""
    model, optimizer, checkpoints = small
    checkpoints.in_background = True
    monkeypatch.setenv("TREC_TT_FAULT", "save:opened:step10:full")
    for end in (checkpoints.wait, checkpoints.close):
        checkpoints.save(10, model, optimizer, {})
        assert checkpoints._save is not None
        checkpoints._save.join()
        assert checkpoints.has_failed
        with pytest.raises(TrainingError) if end == checkpoints.wait else contextlib.nullcontext():
            end()
        assert not checkpoints.has_failed


def test_what_is_saved_is_the_state_at_the_call(small, lone_rank, monkeypatch):
    """The save is held up while all weights change; what it writes is what they were. Its memory is used again."""
    model, optimizer, checkpoints = small
    checkpoints.in_background = True
    go_on = threading.Event()
    begin = PublishingWriter.prepare_global_plan

    def late(writer: PublishingWriter, plans: Any) -> Any:
        assert go_on.wait(30)
        return begin(writer, plans)

    monkeypatch.setattr(PublishingWriter, "prepare_global_plan", late)
    memory = set()
    for step in (5, 10):
        go_on.clear()
        saved = {name: value.clone() for name, value in whole_state(model, lone_rank).items()}
        path = checkpoints.save(step, model, optimizer, {})
        memory.add(frozenset(copy.data_ptr() for copy in checkpoints._snapshot._copies.values()))
        for value in model.parameters():
            value.data.add_(1)
        assert not path.exists() and not checkpoints.has_failed
        go_on.set()
        checkpoints.wait()
        checkpoints.load(path, model)
        assert_same(whole_state(model, lone_rank), saved)
    assert len(memory) == 1


def test_the_next_save_waits_for_the_last(small):
    model, optimizer, checkpoints = small
    checkpoints.in_background, checkpoints.keep = True, 9
    paths = [checkpoints.save(step, model, optimizer, {}) for step in range(1, 6)]
    checkpoints.wait()
    assert checkpoints.complete() == paths


@pytest.mark.parametrize(("device", "taken"), [("cpu", []), ("cuda:1", [torch.device("cuda:1")])])
def test_a_save_in_the_background_stays_on_its_ranks_gpu(small, monkeypatch, device, taken):
    """torch's writer asks for the current stream, and the GPU of a new thread is the first one."""
    model, optimizer, checkpoints = small
    checkpoints.in_background = True
    monkeypatch.setattr(checkpoints, "ranks", Ranks(0, 1, torch.device(device)))
    told = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: told.append((threading.current_thread().name, gpu)))
    checkpoints.save(5, model, optimizer, {})
    checkpoints.wait()
    assert told == [("checkpoint", gpu) for gpu in taken]


# What a checkpoint says of itself


def test_every_file_is_digested_by_who_wrote_it_while_writing(small, monkeypatch):
    """A bit that flips on the way to the disk is found: the digest is of what was meant, not of what came there."""
    model, optimizer, checkpoints = small

    def flipping(file: Any, content: memoryview) -> None:
        file.write(bytes([content[0] ^ 1]) + bytes(content[1:]))

    monkeypatch.setattr(tensor_files, "write_bytes", flipping)
    path = checkpoints.save(5, model, optimizer, {})
    with pytest.raises(DataError, match=r"\.safetensors is damaged"):
        checkpoints.load(path, model, optimizer)


def test_a_manifest_is_complete(train_here, small_world, tmp_path):
    config = event_config(small_world, tmp_path / "run", "row_wise", data={"seed": 7}, train={"epochs": 2})
    folder = train_here(config)
    path = Checkpoints(folder / "checkpoints", None).complete()[-1]
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["cursor"], manifest["place"]) == (3, 6, 6, "epoch 2/2")
    assert (manifest["seed"], manifest["num_ranks"]) == (7, 1)
    assert manifest["config"] == config_hash(config)
    assert manifest["data"] == Dataset(config.data.dataset).fingerprint
    assert manifest["settings"]["model.dim"] == 6
    assert {(each["table"], each["sharding"], each["rank"]) for each in manifest["plan"]} == {
        (table, "row_wise", 0) for table in TABLES
    }
    assert manifest["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    for name, digest in manifest["files"].items():
        content = (path / name).read_bytes()
        assert digest == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {"manifest.json"}


def test_a_checkpoint_of_another_config_is_refused_with_the_fields_that_differ(
    train_here, lone_rank, small_world, tmp_path
):
    """Also where the run folder's config.yaml has been brought into line."""
    folder = train_here(event_config(small_world, tmp_path / "run", train={"epochs": 1}))
    other = event_config(small_world, tmp_path / "other", model={"user_tower": {"dropout": 0.5}}, data={"seed": 3})
    model, optimizer = built(other, lone_rank)
    checkpoints = Checkpoints(folder / "checkpoints", lone_rank, config=other)
    with pytest.raises(ConfigError) as raised:
        checkpoints.load(checkpoints.complete()[-1], model, optimizer)
    for said in ("data.seed was 0, now 3", "model.user_tower.dropout was 0.0, now 0.5", f"--init-from {folder}"):
        assert said in str(raised.value)


# Nothing that a checkpoint says is trusted


def resealed(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest that agrees with the files and with itself, as somebody who means harm would."""
    facts = {name: value for name, value in manifest.items() if name not in ("files", "sha256")}
    seal(path, facts)


def test_a_checkpoint_holds_no_pickle(small):
    """Its tensors are plain bytes that the safetensors package reads, too: nothing in it could be executed."""
    model, optimizer, checkpoints = small
    path = checkpoints.save(5, model, optimizer, {})
    found = load_file(path / "rank-00000-of-00001.safetensors")
    tensors = json.loads((path / "manifest.json").read_text())["tensors"]
    assert {name.partition("@")[0] for name in found} == set(tensors)
    weight = found["model.user_tower.layers.0.weight"]
    assert torch.equal(weight, model.state_dict()["user_tower.layers.0.weight"])


CHUNK = {"at": [0, 0], "size": [2, 2], "file": "rank-00000-of-00001.safetensors", "begin": 0}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (None, "does not describe tensors"),
        ([], "does not describe tensors"),
        ({"x": 7}, "does not describe the tensor 'x'"),
        ({"x": {"dtype": "object", "size": [2, 2], "chunks": [CHUNK]}}, "does not describe the tensor 'x'"),
        ({"x": {"dtype": "F32", "size": [2, -2], "chunks": [CHUNK]}}, "does not describe the tensor 'x'"),
        ({"x": {"dtype": "F32", "size": [2, 2**70], "chunks": [CHUNK]}}, "does not describe the tensor 'x'"),
        ({"x": {"dtype": "F32", "size": [2, 2], "chunks": 7}}, "does not say where 'x' is"),
        ({"x": {"dtype": "F32", "size": [2, 2], "chunks": [{}]}}, "does not say where 'x' is"),
        ({"x": {"dtype": "F32", "size": [2, 2], "chunks": [{**CHUNK, "at": [0]}]}}, "does not say where 'x' is"),
        ({"x": {"dtype": "F32", "size": [2, 2], "chunks": [{**CHUNK, "at": [1, 0]}]}}, "that is outside of it"),
        ({"x": {"dtype": "F32", "size": [2, 2], "chunks": [{**CHUNK, "file": "../x"}]}}, "does not list"),
        ({"x": {"dtype": "F32", "size": [2, 2], "chunks": [{**CHUNK, "begin": 10**12}]}}, "places 'x' outside"),
        ({"x": {"dtype": "F32", "size": [2, 2], "chunks": [{**CHUNK, "begin": -1}]}}, "places 'x' outside"),
        ({"x": {"dtype": "F32", "size": [10**6, 10**6], "chunks": [CHUNK]}}, "do not make up the whole"),
        ({"x": {"dtype": "F32", "size": [2, 2], "chunks": []}}, "do not make up the whole"),
    ],
)
def test_a_manifest_that_claims_what_the_files_do_not_hold_is_refused(tensors, said, small):
    """Before any memory is asked for, with a manifest that agrees with its files and with itself."""
    model, optimizer, checkpoints = small
    path = checkpoints.save(5, model, optimizer, {})
    manifest = json.loads((path / "manifest.json").read_text())
    resealed(path, {**manifest, "tensors": tensors})
    with pytest.raises(DataError, match=said) as raised:
        checkpoints.load(path, model, optimizer)
    assert str(path / "manifest.json") in str(raised.value) and "do not trust it" in str(raised.value)


def test_a_deeply_nested_manifest_is_refused(small):
    """What a parser would need a stack or a minute for."""
    model, optimizer, checkpoints = small
    path = checkpoints.save(5, model, optimizer, {})
    (path / "manifest.json").write_text('{"tensors": ' + "[" * 10**6 + "]" * 10**6 + "}")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        checkpoints.load(path, model, optimizer)


def test_a_checkpoint_of_an_older_format_is_named_as_one(small):
    model, optimizer, checkpoints = small
    path = checkpoints.save(5, model, optimizer, {})
    resealed(path, {**json.loads((path / "manifest.json").read_text()), "format": 2})
    with pytest.raises(DataError, match="is of format 2, but this version reads 3: use the version that wrote it"):
        checkpoints.load(path, model, optimizer)


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc/hostname", "a/../../b", "link"])
def test_a_manifest_cannot_name_files_outside_its_folder(name, small, tmp_path):
    model, optimizer, checkpoints = small
    path = checkpoints.save(5, model, optimizer, {})
    (path / "link").symlink_to("/etc/hostname")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 3, "sha256": "00"}
    write_json(path / "manifest.json", {**manifest, "sha256": own_sha256(manifest)})
    with pytest.raises(DataError, match="which is not in its folder: do not trust it"):
        checkpoints.load(path, model, optimizer)


# A run folder belongs to one config


@pytest.fixture
def train_here(lone_rank, capsys):
    """Trains on one rank in this process; gives the run folder."""

    def start(config: RunConfig) -> Path:
        folder = train(config, lone_rank)
        capsys.readouterr()
        return folder

    return start


def test_fewer_epochs_than_are_done_are_refused_and_change_nothing(train_here, lone_rank, small_world, tmp_path):
    """As many are none of it; the config on disk stays that of the weights."""
    folder = train_here(event_config(small_world, tmp_path / "run", train={"epochs": 2}))
    before = (folder / "config.yaml").read_bytes(), (folder / "status.json").read_bytes()
    with pytest.raises(ConfigError, match=r"is of step 6, but train\.epochs = 1 are only 3 steps"):
        train(event_config(small_world, folder, train={"epochs": 1}), lone_rank)
    assert ((folder / "config.yaml").read_bytes(), (folder / "status.json").read_bytes()) == before
    train(event_config(small_world, folder, train={"epochs": 3, "log_every": 5}), lone_rank)
    assert Run.open(folder).config.train.epochs == 3


def test_another_config_is_refused_with_the_fields_that_differ(train_here, lone_rank, small_world, tmp_path):
    """Once there is something to lose; what changes no batch and no weight is free."""
    folder = train_here(event_config(small_world, tmp_path / "run", train={"epochs": 1}))
    free = event_config(small_world, folder, train={"epochs": 9, "log_every": 5}, checkpoint={"keep": 7})
    Run.create_or_open(free, lone_rank)
    other = event_config(small_world, folder, model={"dim": 8}, train={"optimizer": {"lr": 0.25}})
    with pytest.raises(ConfigError) as raised:
        Run.create_or_open(other, lone_rank)
    for said in (
        "model.dim was 6, now 8",
        "train.optimizer.lr was 0.5, now 0.25",
        "run_dir=...",
    ):
        assert said in str(raised.value)
    assert "epochs" not in str(raised.value)


def test_before_its_first_checkpoint_another_config_takes_a_runs_place(train_here, lone_rank, small_world, tmp_path):
    """What the earlier one learned goes, and what a write that was killed left; a folder of such a name is not ours."""
    folder = train_here(event_config(small_world, tmp_path / "run", train={"epochs": 1}))
    other = event_config(small_world, folder, model={"dim": 8})
    (folder / ".status.json.tmp-77").touch()
    (folder / ".mine.tmp-77").mkdir()
    with pytest.raises(ConfigError, match=r"model\.dim was 6, now 8"):
        Run.create_or_open(other, lone_rank)
    assert (folder / "statistics.json").is_file() and not (folder / ".status.json.tmp-77").exists()
    (folder / "checkpoints/step-00000003/manifest.json").unlink()  # as of a removal that was cut short
    (folder / "stream.json").touch()
    assert Run.create_or_open(other, lone_rank).config.model.dim == 8
    assert not (folder / "statistics.json").exists() and not (folder / "stream.json").exists()
    assert (folder / ".mine.tmp-77").is_dir()


def test_a_vocabulary_that_changes_under_a_run_is_named(lone_rank, small_world, tmp_path):
    """As is one that was none of the files when the run began."""
    words = tmp_path / "words.txt"
    words.write_text("1\n2\n")

    def config(vocabulary: Path) -> RunConfig:
        features = [
            {"name": "clicks", "kind": "bag", "table": "click"},
            {"name": "country", "kind": "category", "table": "country"},
            {"name": "land", "column": "country", "kind": "category", "vocabulary": str(vocabulary), "dim": 4},
        ]
        return event_config(small_world, tmp_path / "run", user=features)

    run = Run.create_or_open(config(words), lone_rank)
    run.initialize(lone_rank)
    run.check_files()
    words.write_text("2\n1\n")
    with pytest.raises(DataError, match=r"words\.txt is not the file that this run began with"):
        run.check_files()
    words.write_text("1\n2\n")
    run.check_files()
    shutil.copy(words, tmp_path / "more.txt")
    with pytest.raises(DataError, match=r"more\.txt is not the file that this run began with .*, then None\)"):
        Run(run.folder, config(tmp_path / "more.txt")).check_files()


# Training that is cut short


def test_more_epochs_go_on_where_the_run_ended(train_here, small_world, tmp_path):
    """Three epochs at once, or one and then two more: the same lines and weights; and again: nothing is left to do."""
    at_once = train_here(event_config(small_world, tmp_path / "a"))
    for epochs in (1, 3, 3):
        in_parts = train_here(event_config(small_world, tmp_path / "b", train={"epochs": epochs}))
    assert [line["loss"] for line in lines(in_parts)] == [line["loss"] for line in lines(at_once)]
    assert [line["step"] for line in lines(in_parts)] == list(range(1, 10))


@pytest.mark.parametrize(("log_every", "save_every"), [(1, 2), (3, 4), (4, 3), (5, 2)])
def test_the_log_of_a_resumed_run_is_that_of_an_undisturbed_one(
    log_every, save_every, train_here, small_world, tmp_path
):
    """A logged loss is the mean of all steps since the line before, also when the run was cut in between.

    The newest checkpoint is taken away, as if the run had died before it was written, and with it half a line at the
    end of the log is what such a death may leave.
    """
    settings = {"train": {"epochs": 4, "log_every": log_every}, "checkpoint": {"every": save_every, "keep": 20}}
    undisturbed = lines(train_here(event_config(small_world, tmp_path / "a", **settings)))
    config = event_config(small_world, tmp_path / "b", **settings)
    folder = train_here(config)
    kept = sorted((folder / "checkpoints").glob("step-*"))
    for path in kept[-2:]:
        shutil.rmtree(path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "ki')
    again = lines(train_here(config))
    assert [(line["step"], line["loss"]) for line in again] == [(line["step"], line["loss"]) for line in undisturbed]


def test_dropout_does_not_spoil_a_resumed_run(train_here, small_world, tmp_path):
    """What a step drops depends on the step, not on how many were taken before it in this process."""
    settings = {"model": {"user_tower": {"dropout": 0.3}}, "checkpoint": {"every": 4, "keep": 20}}
    undisturbed = lines(train_here(event_config(small_world, tmp_path / "a", **settings)))
    config = event_config(small_world, tmp_path / "b", **settings)
    folder = train_here(config)
    for path in sorted((folder / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(path)
    again = lines(train_here(config))
    assert [line["loss"] for line in again] == [line["loss"] for line in undisturbed]
    without = lines(train_here(event_config(small_world, tmp_path / "c")))
    assert [line["loss"] for line in without] != [line["loss"] for line in undisturbed]


def test_the_log_keeps_whole_lines_up_to_its_step(lone_rank, small_world, tmp_path):
    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run", event_config(small_world, tmp_path / "run"))
    log = RunLog(run, lone_rank, 0)
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": 1 / step})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 2, "kind": "tr')
    log = RunLog(run, lone_rank, 2)
    log.write(3, "train", {"loss": 9.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in lines(run.folder)] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    board = EventAccumulator(str(run.folder / "tensorboard"))
    board.Reload()
    assert [(point.step, point.value) for point in board.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_killed_ranks_go_on_as_if_nothing_had_been(small_world, tmp_path, lone_rank, forked):
    """Two ranks; SIGKILL to one in step 13, to the other within the save of step 20; then the same command once more.

    Checkpoints are saved every 4 steps and losses logged every 3, with dropout, warm-up and a falling rate: the log
    and the last weights equal those of a run that nobody killed, bit for bit.
    """
    settings = {
        "data": {"batch_size": 11},
        "model": {"user_tower": {"dropout": 0.2}},
        "train": {"epochs": 6, "log_every": 3, **ADAGRAD},
        "checkpoint": {"every": 4, "in_background": False},
    }
    configs = {name: event_config(small_world, tmp_path / name, MIXED, **settings) for name in ("calm", "killed")}
    for name, config in configs.items():
        (tmp_path / f"{name}.yaml").write_text(to_yaml(as_values(config)))
    command = ["trec_twotower", "train", tmp_path / "killed.yaml"]
    checkpoints = tmp_path / "killed" / "checkpoints"

    code, said = forked(2, "trec_twotower", "train", tmp_path / "calm.yaml")
    assert code == 0, said
    code, said = forked(2, *command, TREC_TT_FAULT="step:updated:step13:rank1")
    assert code == 128 + 9, said
    assert [path.name for path in sorted(checkpoints.glob("step-*"))] == ["step-00000008", "step-00000012"]
    code, said = forked(2, *command, TREC_TT_FAULT="save:sealed:step20")
    assert code == 128 + 9, said
    assert "resumed at step 12 of 30" in said
    assert (checkpoints / ".step-00000020.tmp").is_dir()
    code, said = forked(2, *command)
    assert code == 0, said
    assert "resumed at step 16 of 30" in said
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000028", "step-00000030"]

    calm, killed = lines(tmp_path / "calm"), lines(tmp_path / "killed")
    assert [line["step"] for line in killed] == list(range(3, 31, 3))
    assert [line["loss"] for line in killed] == [line["loss"] for line in calm]
    states = []
    for name, config in configs.items():
        model, optimizer = built(config, lone_rank)
        Checkpoints(tmp_path / name, lone_rank).load(tmp_path / name / "checkpoints/step-00000030", model, optimizer)
        states.append(whole_state(model, lone_rank) | whole_optimizer_state(optimizer, lone_rank))
    assert_same(*states)
