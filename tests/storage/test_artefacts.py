"""A sealed folder is published in one step, and read as it was verified, whatever other processes do meanwhile."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from trec_twotower.errors import ConfigError, DataError
from trec_twotower.storage import artifacts as artefacts
from trec_twotower.storage.artifacts import (
    SealedFolder,
    new_folder,
    open_sealed,
    publish_folder,
    read_manifest,
    sole_writer,
)
from trec_twotower.storage.manifest import seal

FORK = multiprocessing.get_context("fork")
MEND = "export again."


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def publish(path: Path, content: str) -> None:
    with new_folder(path) as writing:
        (writing / "a").write_text(content)
        (writing / "b").write_text(content)
        seal(writing, {"content": content})


def content_of(sealed: SealedFolder) -> set[str]:
    return {sealed.manifest["content"], sealed.path("a").read_text(), sealed.path("b").read_text()}


def in_child(work: Callable[[], None]) -> int:
    """The exit code of a forked process that does this work: -9 if it was killed."""
    child = FORK.Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


@pytest.fixture(params=["exchanged", "renamed twice"])
def renaming(request, monkeypatch):
    """Both ways of publishing over an older folder: in one step, and where the file system cannot do that."""
    if request.param == "renamed twice":
        monkeypatch.setattr(artefacts, "_exchange", lambda one, other: False)
    elif not is_exchange_known():
        pytest.skip("this file system cannot exchange two names")
    return request.param


def is_exchange_known() -> bool:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name in ("one", "other"):
            (Path(folder) / name).mkdir()
        return artefacts._exchange(Path(folder) / "one", Path(folder) / "other")


# Publishing


def test_a_new_folder_appears_only_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "run") as writing:
        (writing / "a").write_text("1")
        assert not (tmp_path / "run").exists()
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "a").read_text() == "1"


def test_a_new_folder_takes_the_place_of_the_old_one_whole(renaming, tmp_path):
    for content in ("first", "second"):
        with new_folder(tmp_path / "run") as writing:
            (writing / content).write_text(content)
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["second"]


def test_an_error_while_writing_leaves_the_old_folder_and_no_rest(tmp_path):
    publish(tmp_path / "run", "old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "run") as writing:
        (writing / "a").write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["run"]
    assert content_of(open_sealed(tmp_path / "run", MEND)) == {"old"}


def test_the_old_folder_is_whole_until_the_new_one_can_take_its_place(tmp_path, monkeypatch):
    publish(tmp_path / "run", "old")

    def refuse(*_: object) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(artefacts, "_exchange", refuse)
    with pytest.raises(PermissionError):
        publish(tmp_path / "run", "new")
    assert names(tmp_path) == ["run"]
    assert content_of(open_sealed(tmp_path / "run", MEND)) == {"old"}


def test_publishing_flushes_every_file_and_every_folder_inside(tmp_path, monkeypatch):
    """A name is on the disk only once its folder is flushed, at any depth."""
    flushed = []
    monkeypatch.setattr(artefacts, "sync", lambda path: flushed.append(path.name))
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "deep" / "file").touch()
    publish_folder(tmp_path / "new", tmp_path / "run")
    assert sorted(flushed) == sorted(["file", "deep", "new", tmp_path.name])


def test_an_older_folder_goes_when_the_new_ones_name_is_on_the_disk(renaming, tmp_path, monkeypatch):
    """A machine that fails at any moment has one of them whole: first the content, then the name, then the removal."""
    for name in ("run", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    found = []

    def whole(path: Path) -> None:
        held = sorted(place.read_text() for place in tmp_path.rglob("file"))
        found.append((path.name, held, (tmp_path / "run" / "file").read_text()))

    monkeypatch.setattr(artefacts, "sync", whole)
    publish_folder(tmp_path / "new", tmp_path / "run")
    both = ["new", "run"]
    assert sorted(found[:2]) == [("file", both, "run"), ("new", both, "run")]
    assert found[2:] == [(tmp_path.name, both, "new")]
    assert names(tmp_path) == ["run"]


def test_the_target_of_a_link_stays_as_it_is(tmp_path):
    """An export that was moved to an archive and linked: the new one takes the link's place."""
    publish(tmp_path / "archive", "old")
    (tmp_path / "run").symlink_to(tmp_path / "archive")
    publish(tmp_path / "run", "new")
    assert content_of(open_sealed(tmp_path / "archive", MEND)) == {"old"}
    assert content_of(open_sealed(tmp_path / "run", MEND)) == {"new"}
    assert not (tmp_path / "run").is_symlink() and names(tmp_path) == ["archive", "run"]


def test_a_file_in_the_folders_place_is_not_replaced(tmp_path):
    (tmp_path / "run").write_text("a person's")
    with pytest.raises(ConfigError, match="run is a file, but a folder is to be written there"):
        publish(tmp_path / "run", "new")
    assert (tmp_path / "run").read_text() == "a person's" and names(tmp_path) == ["run"]


def test_a_file_system_that_cannot_exchange_names_is_told_from_an_error(tmp_path):
    """Two names that are not there cannot be exchanged on any file system."""
    with pytest.raises(FileNotFoundError):
        artefacts._exchange(tmp_path / "one", tmp_path / "other")


# Writers that are killed


POINTS = {
    "exchanged": ("publish:written", "publish:named"),
    "renamed twice": ("publish:written", "publish:aside", "publish:named"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", range(3))
def test_a_kill_at_any_rename_leaves_one_whole_folder_and_the_next_writer_sweeps(
    number, renaming, tmp_path, monkeypatch
):
    """Between two renames no folder has the name: a reader restores the old one, which was renamed aside."""
    if number >= len(POINTS[renaming]):
        pytest.skip("this way of publishing has fewer renames")
    point = POINTS[renaming][number]
    publish(tmp_path / "run", "old")
    monkeypatch.setenv("TREC_TT_FAULT", point)
    assert in_child(lambda: publish(tmp_path / "run", "new")) == -signal.SIGKILL
    monkeypatch.delenv("TREC_TT_FAULT")
    left = names(tmp_path)
    assert [name for name in left if name.startswith(".run.")], "the kill came too late to leave anything"
    if point == "publish:aside":
        assert "run" not in left
    assert content_of(open_sealed(tmp_path / "run", MEND)) == {"new" if point == "publish:named" else "old"}
    publish(tmp_path / "run", "newest")
    assert names(tmp_path) == ["run"]
    assert content_of(open_sealed(tmp_path / "run", MEND)) == {"newest"}


@pytest.mark.timeout(60)
def test_what_another_process_is_writing_is_not_swept(tmp_path):
    """Two artefacts next to each other have locks of their own."""
    begun, go_on = FORK.Event(), FORK.Event()

    def write_slowly() -> None:
        with new_folder(tmp_path / "export") as writing:
            (writing / "a").write_text("slow")
            begun.set()
            assert go_on.wait(30)

    child = FORK.Process(target=write_slowly)
    child.start()
    assert begun.wait(30)
    publish(tmp_path / "index", "fast")
    go_on.set()
    child.join(30)
    assert child.exitcode == 0 and (tmp_path / "export" / "a").read_text() == "slow"


@pytest.mark.timeout(60)
def test_a_second_writer_is_told_who_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("trec_twotower.storage.lock.FolderLock.acquire.__defaults__", (0.1,))
    begun, go_on = FORK.Event(), FORK.Event()

    def hold() -> None:
        with sole_writer(tmp_path / "export"):
            begun.set()
            assert go_on.wait(30)

    child = FORK.Process(target=hold)
    child.start()
    assert begun.wait(30)
    with pytest.raises(ConfigError, match=rf"export is being written by process {child.pid} on .*: wait for it or end"):
        publish(tmp_path / "export", "second")
    go_on.set()
    child.join(30)
    publish(tmp_path / "export", "second")
    assert names(tmp_path) == ["export"]


def test_blocks_of_one_process_may_be_nested_and_do_not_sweep_each_other(tmp_path):
    with sole_writer(tmp_path / "run"), new_folder(tmp_path / "run") as outer:
        (outer / "a").write_text("outer")
        publish(tmp_path / "run", "inner")
        assert content_of(open_sealed(tmp_path / "run", MEND)) == {"inner"}
    assert (tmp_path / "run" / "a").read_text() == "outer"
    assert names(tmp_path) == ["run"]


def test_what_a_killed_process_of_the_same_number_left_is_no_part_of_a_new_folder(tmp_path):
    """In a container every start may be process 1: both its half-written folder and the one it was replacing."""
    publish(tmp_path / "run", "first")
    for left in ("tmp", "old"):
        (tmp_path / f".run.{left}-{os.getpid()}").mkdir()
        (tmp_path / f".run.{left}-{os.getpid()}" / "half").touch()
    publish(tmp_path / "run", "second")
    assert names(tmp_path) == ["run"]
    assert content_of(open_sealed(tmp_path / "run", MEND)) == {"second"}


# Reading


@pytest.mark.timeout(120)
def test_a_reader_always_finds_one_whole_folder_while_another_process_publishes(renaming, tmp_path):
    """It is neither missing nor damaged, and its files are those of one publication."""
    publish(tmp_path / "run", "0")
    stop = FORK.Event()

    def publish_often() -> None:
        for number in count():
            publish(tmp_path / "run", str(number))
            if stop.is_set():
                return

    child = FORK.Process(target=publish_often)
    child.start()
    seen, num_reads = set(), 0
    try:
        while len(seen) <= 5 or num_reads < 200:
            sealed = open_sealed(tmp_path / "run", MEND)
            [content] = content_of(sealed)
            seen.add(content)
            num_reads += 1
            sealed.close()
    finally:
        stop.set()
        child.join(30)
    assert child.exitcode == 0


def test_a_folder_that_is_open_stays_readable_when_another_takes_its_place(tmp_path):
    publish(tmp_path / "run", "old")
    sealed = open_sealed(tmp_path / "run", MEND)
    publish(tmp_path / "run", "new")
    assert content_of(sealed) == {"old"}
    sealed.verify("a")
    assert content_of(open_sealed(tmp_path / "run", MEND)) == {"new"}
    shutil.rmtree(tmp_path / "run")
    assert content_of(sealed) == {"old"}


def test_closing_a_folder_frees_its_files(tmp_path):
    publish(tmp_path / "run", "old")
    before = len(os.listdir("/proc/self/fd"))
    sealed = open_sealed(tmp_path / "run", MEND)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    del sealed
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_of_more_files_than_may_be_open_raises_the_limit(tmp_path):
    def many() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        open_now = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 20, hard))
        assert len(open_sealed(tmp_path / "run", MEND).names) == 60
        assert soft > open_now + 20

    with new_folder(tmp_path / "run") as writing:
        for number in range(60):
            (writing / f"part-{number}").write_text("x")
        seal(writing, {})
    assert in_child(many) == 0


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"run/manifest\.json is missing: export again"):
        open_sealed(tmp_path / "run", MEND)
    with pytest.raises(DataError, match=r"run/manifest\.json is missing: export again"):
        read_manifest(tmp_path / "run", MEND)
    (tmp_path / "run").mkdir()
    with pytest.raises(DataError, match=r"run/manifest\.json is missing: export again"):
        open_sealed(tmp_path / "run", MEND)
    publish(tmp_path / "run", "x")
    with pytest.raises(DataError, match=r"does not list 'c': export again"):
        open_sealed(tmp_path / "run", MEND).path("c")


@pytest.mark.timeout(60)
def test_a_folder_that_a_living_writer_has_renamed_aside_is_waited_for(tmp_path, monkeypatch):
    """Where two names cannot be exchanged, none has the name for a moment."""
    monkeypatch.setattr(artefacts, "_exchange", lambda one, other: False)
    publish(tmp_path / "run", "old")
    replace, waiting = os.replace, threading.Event()

    def slowly(source: Path, target: Path) -> None:
        if Path(source).name.startswith(".run.tmp-"):
            waiting.set()
            time.sleep(0.2)
        replace(source, target)

    monkeypatch.setattr(os, "replace", slowly)
    writer = threading.Thread(target=publish, args=(tmp_path / "run", "new"))
    writer.start()
    assert waiting.wait(30)
    assert content_of(open_sealed(tmp_path / "run", MEND)) == {"new"}
    writer.join()
