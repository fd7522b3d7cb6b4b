"""Exports are whole, in catalogue order and finite, or they are not there; damage is named by file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from trec_twotower.errors import ConfigError, DataError


@pytest.fixture
def loaded(shop_copy):
    """The shop's towers, on one rank."""
    from trec_twotower.distributed.ranks import start_ranks
    from trec_twotower.inference.model_loader import load_model
    from trec_twotower.training.run_dir import Run

    with start_ranks() as ranks:
        yield load_model(Run.open(shop_copy.run), ranks), ranks


def damage(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_files_say_what_they_hold(shop, shop_tables):
    folder = shop.run / "export"
    manifest = json.loads((folder / "manifest.json").read_text())
    items, users = (pq.read_table(folder / f"{what}-00000-of-00001.parquet") for what in ("items", "users"))
    assert (manifest["items"], manifest["users"], manifest["users_from"], manifest["dim"]) == (40, 80, "test", 8)
    assert items.column_names == ["item_id", "vector"] and users.column_names == ["user_id", "vector"]
    assert str(items.schema.field("vector").type) == "fixed_size_list<element: float>[8]"
    assert items["item_id"].to_pylist() == shop_tables["items"]["item_id"].to_pylist()
    assert users["user_id"].to_pylist() == shop_tables["test"]["user_id"].to_pylist()
    for table in (items, users):  # similarity: cosine
        length = np.linalg.norm(np.array(table["vector"].to_pylist()), axis=1)
        np.testing.assert_allclose(length, 1, atol=1e-5)


def test_what_is_read_back_is_what_was_encoded(loaded):
    from trec_twotower.inference.export import export, read_export
    from trec_twotower.model.encode import encode

    model, ranks = loaded
    exported = read_export(export(model, ranks))
    item_ID = encode(model.model, "item", model.sources.catalogue.columns, ranks).numpy()
    np.testing.assert_array_equal(exported.item_ID, item_ID)
    assert exported.item_ids.equals(model.sources.catalogue.ids)
    assert exported.manifest["model_version"] == model.version and len(exported.user_ids) == 80


def test_two_exports_at_once_do_not_mix(loaded, monkeypatch):
    """One that begins and ends while another writes: each publishes its own vectors, the later one's stay."""
    from trec_twotower.inference import export as module
    from trec_twotower.model.encode import encode

    model, ranks = loaded
    own_ID = encode(model.model, "item", model.sources.catalogue.columns, ranks).numpy()
    calls: list[str] = []

    def meanwhile(of, side, features, ranks):
        calls.append(side)
        if len(calls) == 1:
            between = module.read_export(module.export(model, ranks))
            np.testing.assert_array_equal(between.item_ID, 2 * own_ID)
            return encode(of, side, features, ranks)
        return encode(of, side, features, ranks) * (2 if len(calls) < 4 else 1)

    monkeypatch.setattr(module, "encode", meanwhile)
    exported = module.read_export(module.export(model, ranks))
    np.testing.assert_array_equal(exported.item_ID, own_ID)
    assert len(calls) == 4 and not list(model.run.folder.glob(".export*"))


def test_what_is_open_stays_the_export_that_was_verified(loaded, shop_copy, monkeypatch):
    """As for `index`, which reads for minutes while the next model may be exported."""
    from trec_twotower.inference import export as module
    from trec_twotower.model.encode import encode

    model, ranks = loaded
    folder = module.export(model, ranks)
    before = module.read_export(folder)
    manifest, items, users = module.open_export(folder)
    monkeypatch.setattr(module, "encode", lambda *given: 2 * encode(*given))
    module.export(model, ranks, users="valid")
    np.testing.assert_array_equal(np.concatenate(list(items.pieces())), before.item_ID)
    np.testing.assert_array_equal(np.concatenate(list(users.pieces())), before.user_QD)
    assert items.ids().equals(before.item_ids) and manifest == before.manifest
    after = module.read_export(folder)
    np.testing.assert_array_equal(after.item_ID, 2 * before.item_ID)


def test_an_index_is_of_the_export_that_it_was_begun_with(cli, shop_copy, loaded, monkeypatch):
    """Another model is exported while the index is built: its vectors do not get in under the old one's version."""
    from trec_twotower import index as indexes
    from trec_twotower.inference import export as module
    from trec_twotower.model.encode import encode

    model, ranks = loaded
    before = module.read_export(module.export(model, ranks))
    build = indexes.build_index

    def meanwhile(items, users, settings):
        with monkeypatch.context() as patched:
            patched.setattr(module, "encode", lambda *given: -encode(*given))
            module.export(model, ranks)
        return build(items, users, settings)

    monkeypatch.setattr(indexes, "build_index", meanwhile)
    said = cli("index", shop_copy.run)
    assert said.code == 0, said.err
    found, _ = indexes.ItemIndex.load(shop_copy.run / "index").search(before.user_QD[:20], 5)
    expected = -np.sort(-(before.user_QD[:20] @ before.item_ID.T), axis=1)[:, :5]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("stage", [["export"], ["index"], ["export", "--encoder"]])
def test_a_stage_that_another_process_is_at_is_refused_with_its_name(stage, cli, shop_copy, monkeypatch):
    import multiprocessing

    from trec_twotower.storage.artifacts import sole_writer

    monkeypatch.setattr("trec_twotower.storage.lock.FolderLock.acquire.__defaults__", (0.2,))
    fork = multiprocessing.get_context("fork")
    begun, go_on = fork.Event(), fork.Event()
    name = "encoder" if "--encoder" in stage else stage[0]

    def hold() -> None:
        with sole_writer(shop_copy.run / name):
            begun.set()
            assert go_on.wait(60)

    other = fork.Process(target=hold)
    other.start()
    assert begun.wait(30)
    before = sorted(shop_copy.run.iterdir())
    said = cli(stage[0], shop_copy.run, *stage[1:])
    assert said.code == 2 and f"{name} is being written by process {other.pid} on " in said.mistake
    assert sorted(shop_copy.run.iterdir()) == before
    go_on.set()
    other.join(30)
    assert cli(stage[0], shop_copy.run, *stage[1:]).code == 0


@pytest.mark.timeout(120)
@pytest.mark.parametrize("point", ["publish:written", "publish:named"])
def test_an_export_that_is_killed_leaves_a_whole_one_and_the_next_sweeps(point, cli, on_forked_ranks, shop_copy):
    """Two real ranks, the first of which dies before or after the new folder has its name."""
    from trec_twotower.inference.export import read_export

    before = read_export(shop_copy.run / "export").manifest
    said = on_forked_ranks("export", shop_copy.run, "--users", "valid", TREC_TT_FAULT=f"{point}:rank0")
    assert said.code != 0
    assert list(shop_copy.run.glob(".export.tmp-*"))
    found = read_export(shop_copy.run / "export").manifest
    assert found["users_from"] == ("valid" if point == "publish:named" else before["users_from"])
    assert cli("export", shop_copy.run).code == 0
    assert not list(shop_copy.run.glob(".export*"))


def test_a_checkpoint_that_the_training_removes_meanwhile_gives_way_to_the_next_choice(shop_copy, monkeypatch):
    """`export` beside a training: between the choice and the opening a newer checkpoint was published."""
    from trec_twotower.distributed.ranks import start_ranks
    from trec_twotower.inference.model_loader import load_model
    from trec_twotower.training.checkpoints.checkpoint import Checkpoints
    from trec_twotower.training.run_dir import Run

    opened, folder = Checkpoints.open, shop_copy.run / "checkpoints"

    def late(checkpoints: Checkpoints, path: Path):
        if path.name == "step-00000005":
            shutil.rmtree(path)
        return opened(checkpoints, path)

    monkeypatch.setattr(Checkpoints, "open", late)
    monkeypatch.setattr(Checkpoints, "best", lambda self: {"step": 5} if (folder / "step-00000005").is_dir() else None)
    with start_ranks() as ranks:
        assert load_model(Run.open(shop_copy.run), ranks).step == 10


def test_vectors_are_encoded_and_written_a_group_at_a_time(loaded, monkeypatch):
    """Never more at once than a group, and the same as all at once; columns of items/ beside them."""
    from trec_twotower.inference import export as module

    model, ranks = loaded
    whole = module.read_export(module.export(model, ranks))
    sizes, encode = [], module.encode
    monkeypatch.setattr(module, "GROUP_ROWS", 7)
    monkeypatch.setattr(
        module,
        "encode",
        lambda towers, side, columns, _: sizes.append(columns.num_rows) or encode(towers, side, columns, _),
    )
    folder = module.export(model, ranks, columns=["title", "colour", "tags"])
    assert sizes == [7] * 5 + [5] + [7] * 11 + [3]
    again = module.read_export(folder)
    np.testing.assert_allclose(again.item_ID, whole.item_ID, atol=1e-6)
    np.testing.assert_allclose(again.user_QD, whole.user_QD, atol=1e-6)
    assert again.item_ids.equals(whole.item_ids) and again.user_ids.equals(whole.user_ids)
    file = pq.ParquetFile(folder / "items-00000-of-00001.parquet")
    assert file.schema_arrow.names == ["item_id", "title", "colour", "tags", "vector"] and file.num_row_groups == 6
    items = model.sources.dataset.items.table(["title", "colour", "tags"])
    for name in items.column_names:
        assert file.read([name])[name].to_pylist() == items[name].to_pylist()
    assert again.manifest["columns"] == ["title", "colour", "tags"]


def test_the_part_of_the_users_is_chosen(cli, shop_copy, shop_tables):
    run = shop_copy.run
    assert cli("export", run, "--users", "valid").code == 0
    users = pq.read_table(run / "export/users-00000-of-00001.parquet")
    assert users["user_id"].to_pylist() == shop_tables["valid"]["user_id"].to_pylist()
    assert json.loads((run / "export/manifest.json").read_text())["users_from"] == "valid"
    for flags, wrong in (
        (("--users", "train"), "has users in test, valid: name one"),
        (("--columns", "titel"), "nearest: 'title'"),
        (("--columns", "item_id"), "'item_id', which every export of items has"),
        (("--columns", "title", "--encoder"), "leave out --columns"),
    ):
        said = cli("export", run, *flags)
        assert said.code == 2 and wrong in said.mistake


def test_vectors_that_are_no_numbers_are_named_and_the_earlier_export_stays(loaded, shop_copy):
    import torch

    from trec_twotower.inference.export import export
    from trec_twotower.ops.hashing import hash_to_bucket, id_keys

    model, ranks = loaded
    export(model, ranks)
    folder = shop_copy.run / "export"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    bucket = int(hash_to_bucket(id_keys(model.sources.catalogue.ids.slice(17, 1), ""), 512)[0])
    with torch.no_grad():
        table = next(value for name, value in model.model.state_dict().items() if ".item.weight" in name)
        table.local_shards()[0].tensor[bucket] = torch.nan
    with pytest.raises(DataError, match=r"1 items have vectors with NaN or infinity, such as item_id \['green-7'\]"):
        export(model, ranks)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not list(shop_copy.run.glob(".export*"))


def test_a_failed_write_leaves_the_earlier_export(loaded, shop_copy, monkeypatch):
    from trec_twotower.inference import export as module

    model, ranks = loaded
    before = {path.name: path.read_bytes() for path in (shop_copy.run / "export").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "items.parquet")

    monkeypatch.setattr(module.pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        module.export(model, ranks)
    assert {path.name: path.read_bytes() for path in (shop_copy.run / "export").iterdir()} == before
    assert not list(shop_copy.run.glob(".export*"))


@pytest.mark.parametrize(
    ("call", "files", "mend"),
    [
        (["index", "RUN"], "export/items-*.parquet", "export again"),
        (["index", "RUN"], "export/users-*.parquet", "export again"),
        (["index", "RUN"], "export/manifest.json", "export again"),
        (["recommend", "RUN", "--user", "user-1"], "index/index-*.faiss", "build the index again"),
        (["evaluate", "RUN", "--index"], "index/items.parquet", "build the index again"),
        (["export", "RUN"], "checkpoints/step-00000010/rank-00000-of-00001.safetensors", "remove this checkpoint"),
        (["evaluate", "RUN"], "checkpoints/step-00000010/manifest.json", "remove this checkpoint"),
        (["train", "CONFIG", "run_dir=RUN"], "checkpoints/step-00000010/*.safetensors", "remove this checkpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_damaged_file_is_named_with_what_mends_it(cli, shop_copy, call, files, mend):
    (path,) = shop_copy.run.glob(files)
    damage(path)
    call = [word.replace("RUN", str(shop_copy.run)).replace("CONFIG", str(shop_copy.config)) for word in call]
    said = cli(*call)
    assert said.code == 3 and f"{path} is damaged" in said.mistake and mend in said.mistake
    path.unlink()
    said = cli(*call)
    if path.name != "manifest.json":
        assert said.code == 3 and f"{path} is missing" in said.mistake and mend in said.mistake


def test_a_removed_checkpoint_gives_way_to_the_one_before(cli, shop_copy):
    """As the message about a damaged one advises."""
    shutil.rmtree(shop_copy.run / "checkpoints/step-00000010")
    said = cli("train", shop_copy.config, f"run_dir={shop_copy.run}")
    assert said.code == 0, said.err
    assert said.out.startswith("resumed at step 5 of 10")
    assert (shop_copy.run / "checkpoints/step-00000010").is_dir()


def test_no_export_is_a_mistake_of_the_call(tmp_path):
    from trec_twotower.inference.export import read_export

    with pytest.raises(ConfigError, match="holds no export: export again"):
        read_export(tmp_path / "run/export")
