"""Files that are not what was written: flipped, cut, poisoned, or with no room for them."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.soak.jobs import Job, in_child
from tests.soak.scenarios import Soak, Tally
from tests.soak.world import config

Read = Callable[[Path], Any]  # what a stage gets from a folder, in a form that can be compared


class Artefacts:
    """A run with its checkpoint, export and index, and the dataset; made once, copied to be spoiled."""

    def __init__(self, soak: Soak) -> None:
        self.soak = soak
        self.run = soak.calm.run_dir
        for command in ("export", "index"):
            if not (self.run / command).is_dir():
                ended = Job(1, [command, str(self.run)], soak.folder / command).end()
                assert ended.is_done, ended.said

    @property
    def checkpoint(self) -> Path:
        return sorted((self.run / "checkpoints").glob("step-*"))[-1]

    def places(self) -> dict[str, tuple[Path, Read]]:
        return {
            "checkpoint": (self.checkpoint, _checkpoint_reader(self.soak, self.run)),
            "export": (self.run / "export", _read_export),
            "index": (self.run / "index", _read_index),
            "Parquet": (self.soak.world, _read_dataset),
        }


def _checkpoint_reader(soak: Soak, run_dir: Path) -> Read:
    """Reads into one model, which is built at the first call; to be used in a forked process."""
    made: list[Any] = []

    def read(folder: Path) -> Any:
        from tests.ranks.states import whole_state
        from trec_twotower.distributed.ranks import start_ranks
        from trec_twotower.training.checkpoints.checkpoint import Checkpoints
        from trec_twotower.training.model_builder import build_model

        warnings.simplefilter("ignore")
        if not made:
            joined = start_ranks()
            ranks = joined.__enter__()  # for as long as the process lives
            made[:] = ranks, build_model(config(soak.world, run_dir), ranks), joined
        ranks, model, _ = made
        Checkpoints(folder.parent, ranks).load(folder, model)
        return {name: value.numpy().tobytes() for name, value in whole_state(model, ranks).items()}

    return read


def _read_export(folder: Path) -> Any:
    from trec_twotower.inference.export import read_export

    found = read_export(folder)
    return found.item_ids.to_pylist(), found.item_ID.tobytes(), found.user_ids.to_pylist(), found.user_QD.tobytes()


def _read_index(folder: Path) -> Any:
    import numpy as np

    from trec_twotower.index import ItemIndex

    index = ItemIndex.load(folder)
    found = index.search(np.eye(index.dim, dtype=np.float32), 5)
    return [np.asarray(part).tobytes() for part in found] if isinstance(found, tuple) else str(found)


def _read_dataset(folder: Path) -> Any:
    """All its tables, and what training takes from it: the declared columns, hashed."""
    from trec_twotower.data.dataset import ITEM_ID, Dataset
    from trec_twotower.data.feature_dataset import FeatureDataset

    sources = FeatureDataset(Dataset(folder), config(folder, folder).feature_schema, "event")
    splits = [sources.dataset.split(name) for name in ("train", "items", "test")]
    found: list[Any] = [sources.dataset.fingerprint, sources.catalogue.keys.tobytes()]
    found += [split.table(list(split.columns)).to_pydict() for split in splits]
    columns = [sources.catalogue.columns]
    for group, table in sources.dataset.train.tables([*sources.user_columns(), ITEM_ID]):
        columns.append(sources.user_features(table, str(group)))
        found.append(sources.item_rows(table[ITEM_ID].combine_chunks(), str(group)).tobytes())
    for part in columns:
        found += [(lists.offsets.tobytes(), lists.values.tobytes()) for lists in part.sparse.values()]
        found += [numbers.tobytes() for numbers in part.numbers.values()]
    return found


def flip(content: bytes, drawn: random.Random) -> bytes:
    changed = bytearray(content)
    changed[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    return bytes(changed)


def cut(content: bytes, drawn: random.Random) -> bytes:
    return content[: drawn.randrange(len(content))]


def _spoil(folder: Path, read: Read, change: Callable[[bytes, random.Random], bytes], tries: int, seed: int) -> Any:
    """[named, harmless, silent, notes]: how the reader met so many changes, each in one file of a whole folder."""
    from trec_twotower.errors import ConfigError, DataError

    drawn = random.Random(seed)
    whole = read(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = harmless = silent = 0
    notes = []
    for number in range(tries):  # by turns in proportion to the files' sizes, and each as often as the others
        path = drawn.choices(files, [file.stat().st_size if number % 2 else 1 for file in files])[0]
        content = path.read_bytes()
        path.write_bytes(change(content, drawn))
        try:
            is_same = read(folder) == whole
            harmless += is_same
            silent += not is_same
            if not is_same:
                notes.append(f"{path.name}: read as something else")
        except (DataError, ConfigError) as error:
            is_named = path.name in str(error) or str(path.parent) in str(error)
            named += is_named
            if not is_named:
                notes.append(f"{path.name} is not named: {error}")
        except Exception as error:
            notes.append(f"{path.name}: {type(error).__name__}: {error}")
        path.write_bytes(content)
    return [named, harmless, silent, notes]


def bit_flips(soak: Soak, what: str) -> Tally:
    tally = Tally(f"bit flips: {what} (exact: named, or the values are unchanged)", 300)
    return _tally_spoiled(soak, tally, what, flip, soak.tries(300))


def cut_files(soak: Soak) -> Tally:
    tally = Tally("cut files: checkpoint, export, index, Parquet", 100)
    for what in ("checkpoint", "export", "index", "Parquet"):
        _tally_spoiled(soak, tally, what, cut, max(1, soak.tries(100) // 4))
    return tally


def _tally_spoiled(soak: Soak, tally: Tally, what: str, change: Any, tries: int) -> Tally:
    folder, read = Artefacts(soak).places()[what]
    copy = soak.folder / "spoiled" / folder.name
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(folder, copy)
    named, harmless, silent, notes = in_child(_spoil, copy, read, change, tries, soak.random.randrange(10**9))
    tally.tried += tries
    tally.exact += named + harmless
    tally.silent += silent
    if harmless:
        tally.note(f"{what}: {harmless} of {tries} changed nothing of what is read")
    for note in notes:
        tally.note(note)
    return tally


# Pickles that would do something


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def poisons(trap: Path) -> dict[str, bytes]:
    """The same harm, in the forms that loaders might be open to."""
    import numpy as np
    import torch

    plain = pickle.dumps(Trap(trap))
    zipped, array = io.BytesIO(), io.BytesIO()
    torch.save(Trap(trap), zipped)
    np.save(array, np.array([Trap(trap)], dtype=object), allow_pickle=True)
    yaml = f"!!python/object/apply:os.mkdir ['{trap}']\n"
    return {"pickle": plain, "torch.save": zipped.getvalue(), "numpy": array.getvalue(), "yaml": yaml.encode()}


PLACES = {
    "checkpoint/rank-00000-of-00002.safetensors": ["pickle", "torch.save"],
    "checkpoint/manifest.json": ["pickle"],
    "run/config.yaml": ["yaml", "pickle"],
    "run/statistics.json": ["pickle", "numpy"],
    "run/item_counts.npy": ["numpy", "pickle"],
    "export/manifest.json": ["pickle", "yaml"],
    "export/items-00000-of-00001.parquet": ["pickle"],
    "index/index-00000-of-00001.faiss": ["pickle", "numpy"],
    "index/items.parquet": ["pickle"],
    "world/dataset.yaml": ["yaml"],
    "world/train/part-00000.parquet": ["pickle", "torch.save"],
}


def malicious_pickles(soak: Soak) -> Tally:
    """Each place in turn holds what executes code when it is unpickled, under a manifest that agrees with it."""
    tally = Tally("malicious pickles in every place (exact: refused, nothing executed)", 20)
    Artefacts(soak)
    every = [(place, kind) for place, kinds in PLACES.items() for kind in kinds]
    for place, kind in every if soak.share >= 1 else soak.random.sample(every, soak.tries(20)):
        folder = soak.folder / "poisoned"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(soak.calm.run_dir, folder / "run")
        shutil.copytree(soak.world, folder / "world")
        trap = folder / "executed"
        said = in_child(_take_poison, soak, folder, place, kind, trap)
        tally.tried += 1
        if said and not trap.exists():
            tally.exact += 1
        else:
            tally.silent += trap.exists()
            tally.note(f"{kind} in {place}: {'executed' if trap.exists() else 'not refused'}")
    return tally


def _take_poison(soak: Soak, folder: Path, place: str, kind: str, trap: Path) -> str:
    """The error that the stage raises which reads this place."""
    from trec_twotower.distributed.ranks import start_ranks
    from trec_twotower.errors import ConfigError, DataError
    from trec_twotower.storage.manifest import seal
    from trec_twotower.training.run_dir import Run as TrainedRun

    what, _, name = place.partition("/")
    run = folder / "run"
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    root = {"checkpoint": newest, "run": run, "export": run / "export", "index": run / "index"}
    path = root.get(what, folder / "world") / name
    path.write_bytes(poisons(trap)[kind])
    if what == "world" and name != "dataset.yaml":
        (folder / "world/dataset.yaml").unlink()  # which would not agree
    if what in ("checkpoint", "export", "index") and name != "manifest.json":
        facts = json.loads((path.parent / "manifest.json").read_text())
        del facts["files"], facts["sha256"]
        seal(path.parent, facts)
    try:
        if what == "checkpoint":
            _checkpoint_reader(soak, run)(newest)
        elif what == "export":
            _read_export(run / "export")
        elif what == "index":
            _read_index(run / "index")
        elif what == "world":
            _read_dataset(folder / "world")
        else:
            opened = TrainedRun.open(run)
            with start_ranks() as ranks:
                _ = opened.initialize(ranks) or opened.open_dataset(ranks)
            opened.item_counts()
    except (DataError, ConfigError) as error:
        return str(error)
    except Exception as error:  # a refusal all the same, if no word of ours
        return f"{type(error).__name__}: {error}"
    return ""


# No room


def disk_full(soak: Soak) -> Tally:
    """Each writer on a tmpfs that is almost full: it says which path and leaves what was there."""
    tally = Tally("disk full on a small tmpfs: checkpoint, export, index, dataset", 40)
    Artefacts(soak)
    place = soak.folder / "small"
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "soak", str(place)], capture_output=True)
    if mounted.returncode:
        tally.note(f"not tried, because tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
        tally.wanted = 0
        return tally
    try:
        for number in range(soak.tries(40)):
            writer = ("checkpoint", "export", "index", "dataset")[number % 4]
            tally.tried += 1
            problem = _without_room(soak, place, writer)
            tally.exact += problem is None
            if problem is not None:
                tally.note(f"{writer}: {problem}")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    return tally


def _without_room(soak: Soak, place: Path, writer: str) -> str | None:
    """What went otherwise than it should, if anything did."""
    for left in place.iterdir():
        left.unlink() if left.is_file() else shutil.rmtree(left)
    run_dir, dataset = place / "run", place / "data"
    shutil.copytree(soak.calm.run_dir, run_dir)
    artefact = {"export": run_dir / "export", "index": run_dir / "index", "dataset": dataset}.get(
        writer, sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    )
    if writer == "dataset":
        command = ["prepare", "synthetic", "--out", str(dataset), "rows=3000", "items=300", "clusters=5"]
        assert Job(1, command, soak.folder / "small-job").end().is_done
        command = [*command, "--overwrite", "seed=7"]
    elif writer == "checkpoint":
        path = soak.folder / "small.yaml"
        from tests.soak.world import write_config

        write_config(path, config(soak.world, run_dir, train={"epochs": 9}))
        command = ["train", str(path)]
    else:
        command = [writer, str(run_dir)]
    before = _digests(artefact)
    need = sum(path.stat().st_size for path in artefact.rglob("*") if path.is_file())
    space = shutil.disk_usage(place).free
    with (place / "ballast").open("wb") as file:
        file.write(bytes(max(space - soak.random.randrange(max(need // 4096 * 4096 // 2, 8192)), 0)))
    ended = Job(1, command, soak.folder / "small-job").end()
    if ended.codes == [0]:
        return "it found room"
    if ended.codes not in ([1], [3]) or "No space left" not in ended.said or str(place) not in ended.said:
        return f"{ended.codes}: {ended.said}"
    if _digests(artefact) != before:
        return f"{artefact} has changed"
    (place / "ballast").unlink()
    again = Job(1, command, soak.folder / "small-job").end()
    return None if again.is_done else f"it does not go on when there is room: {again.said}"


def _digests(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flips_of_checkpoint(soak: Soak) -> Tally:
    return bit_flips(soak, "checkpoint")


def flips_of_parquet(soak: Soak) -> Tally:
    return bit_flips(soak, "Parquet")


def flips_of_export(soak: Soak) -> Tally:
    return bit_flips(soak, "export")


def flips_of_index(soak: Soak) -> Tally:
    return bit_flips(soak, "index")


SPOILED: list[Callable[[Soak], Tally]] = [
    flips_of_checkpoint,
    flips_of_parquet,
    flips_of_export,
    flips_of_index,
    cut_files,
    malicious_pickles,
    disk_full,
]
