"""Files are whole or not there, and a sealed folder tells when it is no longer what it was."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from trec_twotower.errors import DataError
from trec_twotower.storage.artifacts import open_sealed
from trec_twotower.storage.atomic import naming, read_json, write_file, write_json
from trec_twotower.storage.manifest import MANIFEST, own_sha256, seal

MEND = "export again."


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "export"
    (folder / "deep").mkdir(parents=True)
    (folder / "vectors").write_bytes(bytes(range(200)))
    (folder / "deep" / "ids").write_text("7 8 9")
    seal(folder, {"dim": 4})
    return folder


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path):
    write_file(tmp_path / "a", "old")
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_a_file_stays_as_it_was_when_its_new_content_cannot_be_written(tmp_path, monkeypatch):
    write_file(tmp_path / "a", "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="nothing tells the name of an open file")
def test_a_file_takes_its_name_when_it_is_on_the_disk_and_then_its_folder_is_flushed(tmp_path, monkeypatch):
    """What is flushed is all of it, and still under another name; last the list of names."""
    flush, seen = os.fsync, []

    def flushing(handle: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{handle}"))
        seen.append((place, "" if place.is_dir() else place.read_text(), (tmp_path / "a").exists()))
        flush(handle)

    monkeypatch.setattr(os, "fsync", flushing)
    write_file(tmp_path / "a", "content")
    assert [told[1:] for told in seen] == [("content", False), ("", True)]
    assert seen[0][0].parent == tmp_path and seen[1][0] == tmp_path


def test_json_comes_back_equal(tmp_path):
    value = {"a": [1, 2.5, None, True], "b": {"ü": "ß"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_broken_json_names_the_file_and_the_mend(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json is damaged .* export again"):
        read_json(path, MEND)


def test_missing_json_names_the_file_and_the_mend(tmp_path):
    with pytest.raises(DataError, match=r"none\.json is missing: export again"):
        read_json(tmp_path / "none.json", MEND)


def test_json_that_is_larger_than_any_of_ours_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("[1, 2, 3]")
    monkeypatch.setattr("trec_twotower.storage.atomic.MAX_JSON_BYTES", 9)
    assert read_json(path) == [1, 2, 3]
    path.write_text("[1, 2, 30]")
    with pytest.raises(DataError, match=r"a\.json is damaged \(more than 9 bytes\): export again"):
        read_json(path, MEND)


def test_a_sealed_folder_opens_with_its_facts(sealed):
    manifest = open_sealed(sealed, MEND).manifest
    assert manifest["dim"] == 4
    assert sorted(manifest["files"]) == ["deep/ids", "vectors"]
    assert manifest["files"]["deep/ids"]["bytes"] == 5


def test_every_flipped_bit_of_a_sealed_folder_is_noticed(sealed, rng):
    for name in ("vectors", "deep/ids", MANIFEST):
        path = sealed / name
        whole = path.read_bytes()
        for place in rng.integers(0, len(whole), 40):
            changed = bytearray(whole)
            changed[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(changed)
            try:
                manifest = open_sealed(sealed, MEND).manifest
            except DataError as error:
                assert path.name in str(error) and MEND in str(error)
            else:  # white space between the words of the manifest
                assert name == MANIFEST and manifest == json.loads(whole)
        path.write_bytes(whole)
    open_sealed(sealed, MEND)


def test_a_sealed_folder_tells_what_is_missing_cut_or_of_another_format(sealed):
    (sealed / "vectors").write_bytes(bytes(150))
    with pytest.raises(DataError, match=r"vectors has 150 bytes, 200 were written: export again"):
        open_sealed(sealed, MEND)
    (sealed / "vectors").unlink()
    with pytest.raises(DataError, match=r"vectors is missing, though the manifest lists it: export again"):
        open_sealed(sealed, MEND)
    manifest = {**read_json(sealed / MANIFEST), "format": 99}
    write_json(sealed / MANIFEST, {**manifest, "sha256": own_sha256(manifest)})
    with pytest.raises(DataError, match=r"manifest\.json is of format 99, but this version reads 1"):
        open_sealed(sealed, MEND)
    (sealed / MANIFEST).write_text("[]")
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        open_sealed(sealed, MEND)


def test_a_manifest_without_its_own_digest_is_damaged(sealed):
    manifest = read_json(sealed / MANIFEST)
    del manifest["sha256"]
    write_json(sealed / MANIFEST, manifest)
    with pytest.raises(DataError, match=r"manifest\.json is damaged \(its own sha256 differs\): export again"):
        open_sealed(sealed, MEND)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["vectors"], "does not list its files with their bytes and sha256"),
        ({"vectors": [200, "00"]}, "does not list its files with their bytes and sha256"),
        ({"vectors": {"bytes": "200", "sha256": "00"}}, "does not list its files with their bytes and sha256"),
        ({"vectors": {"bytes": 200, "sha256": None}}, "does not list its files with their bytes and sha256"),
        ({"": {"bytes": 200, "sha256": "00"}}, "lists '', which is not in its folder"),
        ({"a\0b": {"bytes": 200, "sha256": "00"}}, "which is not in its folder"),
    ],
)
def test_a_manifest_of_another_make_is_refused(sealed, files, said):
    """Sealed by whoever has made it, with what no file of ours can be compared with."""
    manifest = {**read_json(sealed / MANIFEST), "files": files}
    write_json(sealed / MANIFEST, {**manifest, "sha256": own_sha256(manifest)})
    with pytest.raises(DataError, match=said):
        open_sealed(sealed, MEND)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_an_error_while_an_open_file_is_written_names_it(tmp_path):
    """Python names the file when it cannot be opened, and no more when it is written."""
    place = tmp_path / "metrics.jsonl"
    with pytest.raises(OSError, match="No space left") as caught, naming(place), open("/dev/full", "w") as file:
        file.write("a line")
    assert caught.value.filename == str(place)
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path / "one"):
        (tmp_path / "other").read_text()
    assert caught.value.filename == str(tmp_path / "other")


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / "place").mkdir()
    with pytest.raises(OSError, match="place"):
        write_file(tmp_path / "place", "content")  # a folder stands there
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
