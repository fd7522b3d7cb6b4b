"""The encoder of a run makes the vectors of the export, alone; what was exported is read by pyarrow alone."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from trec_twotower.errors import ConfigError, DataError

SIDES = {"item": ("items", "item_id"), "user": ("users", "user_id")}


def exported(run: Path, side: str) -> tuple[list[str], np.ndarray]:
    """Ids and vectors by pyarrow alone, as Milvus, pgvector, Qdrant or Spark would take them."""
    what, name = SIDES[side]
    files = sorted(str(path) for path in (run / "export").glob(f"{what}-*.parquet"))
    table = ds.dataset(files, format="parquet").to_table()
    assert table.column_names == [name, "vector"]
    kind = table.schema.field("vector").type
    assert pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()
    assert not table[name].null_count and not table["vector"].null_count
    return table[name].to_pylist(), np.array(table["vector"].to_pylist(), np.float32)


def with_static(tables: dict[str, pa.Table]) -> pa.Table:
    """The test rows beside what users/ says of their users."""
    static = {row["user_id"]: row for row in tables["users"].to_pylist()}
    test = tables["test"]
    for name in ("country", "age"):
        values = [static[user][name] for user in test["user_id"].to_pylist()]
        test = test.append_column(name, pa.array(values, tables["users"].schema.field(name).type))
    return test


@pytest.fixture(scope="module")
def folder(shop, cli):
    said = cli("export", shop.run, "--encoder")
    assert said.code == 0, said.err
    assert "user.pt2: ok" in said.out and "item.pt2: ok" in said.out
    return shop.run / "encoder"


def rows_of(shop_tables, side):
    return shop_tables["items"] if side == "item" else with_static(shop_tables)


def test_a_side_that_is_no_tower_is_refused(folder, shop_tables):
    """It is not taken for the item tower."""
    from trec_twotower import Encoder

    encoder = Encoder.load(folder)
    rows = with_static(shop_tables)
    asks = (encoder.encode, encoder.with_vectors, encoder.inputs, lambda side, _: encoder.columns(side))
    for ask in asks:
        with pytest.raises(ConfigError, match=r"no tower 'users' \(nearest: 'user'\)"):
            ask("users", rows)


def test_the_encoder_makes_the_exported_vectors_and_so_does_the_program_without_it(folder, shop, shop_tables):
    """In a process of its own there is no group, no run and no dataset; nor is this package in the second."""
    import torch

    from trec_twotower import Encoder

    encoder = Encoder.load(folder)
    assert encoder.columns("item") == ["colour", "item_id", "price", "tags"]
    for side in SIDES:
        ids, expected = exported(shop.run, side)
        rows = rows_of(shop_tables, side)
        np.testing.assert_allclose(encoder.encode(side, rows), expected, atol=1e-6)
        batch = encoder.with_vectors(side, rows.to_batches()[0])
        assert batch.schema.names == [SIDES[side][1], "vector"] and batch.column(0).to_pylist() == ids
        assert str(batch.schema.field("vector").type) == "fixed_size_list<item: float>[8]"
        np.testing.assert_allclose(np.array(batch.column(1).to_pylist()), expected, atol=1e-6)
        program = torch.export.load(folder / f"{side}.pt2").module()
        for count in (1, 3, len(ids)):
            part = rows.slice(0, count)
            np.testing.assert_allclose(program(encoder.inputs(side, part)).detach(), expected[:count], atol=1e-5)
    assert encoder.encode("item", shop_tables["items"].slice(0, 0)).shape == (0, 8)


def test_a_pickled_encoder_works_in_another_process(folder, shop, shop_tables, tmp_path):
    from trec_twotower import Encoder

    (tmp_path / "encoder.pickle").write_bytes(pickle.dumps(Encoder.load(folder)))
    (tmp_path / "rows.pickle").write_bytes(pickle.dumps(shop_tables["items"]))
    script = (
        "import pickle, sys, numpy as np, torch.distributed as dist\n"
        "encoder, rows = (pickle.load(open(f'{sys.argv[1]}/{name}.pickle', 'rb')) for name in ('encoder', 'rows'))\n"
        "np.save(f'{sys.argv[1]}/vectors.npy', encoder.encode('item', rows))\n"
        "assert not dist.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), exported(shop.run, "item")[1], atol=1e-6)


def test_what_is_missing_or_damaged_is_said(folder, shop, shop_tables, tmp_path, monkeypatch, cli):
    import shutil

    from trec_twotower import Encoder

    encoder = Encoder.load(folder)
    with pytest.raises(DataError, match="no column 'colour', which feature 'colour' reads"):
        encoder.encode("item", shop_tables["items"].drop_columns("colour"))
    with pytest.raises(DataError, match=r"'price' is string"):
        items = shop_tables["items"]
        encoder.encode("item", items.set_column(4, "price", pa.array(["x"] * len(items))))
    with pytest.raises(ConfigError, match="holds no encoder: write it again"):
        Encoder.load(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "encoder")
    content = bytearray((copy / "weights.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "weights.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"weights\.safetensors is damaged"):
        Encoder.load(copy)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave out the launcher" in cli("export", shop.run, "--encoder").mistake


def test_the_manifest_names_the_model(folder, shop):
    manifest = json.loads((folder / "manifest.json").read_text())
    told = json.loads((shop.run / "export/manifest.json").read_text())
    assert {name: manifest[name] for name in ("model_version", "step", "dim", "similarity")} == {
        name: told[name] for name in ("model_version", "step", "dim", "similarity")
    }
    assert manifest["programs"] == {"user": "ok", "item": "ok"}
    assert {"user.pt2", "weights.safetensors"} <= set(manifest["files"])


STEPS = """
data: {dataset: DATASET, batch_size: 64}
tables:
  item: {buckets: 512, dim: 8}
  colour: {buckets: 32, dim: 8}
  own: {buckets: 64, dim: 4, dtype: fp16}
user:
  - {name: history, kind: sequence, table: item, max_length: 10, times: at, actions: did, attributes: [colour, tags],
     delta: true, encoder: {kind: transformer, layers: 1, heads: 2}}
  - {name: taken, kind: bag, column: history, table: own, weights: history_weight}
item:
  - {name: item_id, kind: id, table: item}
  - {name: colour, kind: category, table: colour}
  - {name: tags, kind: bag, table: colour, pooling: sqrtn}
  - {name: price, kind: number, bins: 4, dim: 4, soft: true}
model: {dim: 8}
run_dir: run
"""


def test_steps_with_attributes_gaps_and_actions_are_those_of_the_dataset(shop_tables, write_dataset, tmp_path):
    """The encoder has no catalogue but what the steps need of it; items that it lacks are in the histories, too."""
    import torch

    from trec_twotower.config.base import as_values, validate
    from trec_twotower.config.loading import parse_yaml
    from trec_twotower.config.run_config import RunConfig
    from trec_twotower.data.dataset import Dataset
    from trec_twotower.data.feature_dataset import FeatureDataset
    from trec_twotower.distributed.ranks import Ranks
    from trec_twotower.inference.tower_encoder import Encoder, Parts, _steps
    from trec_twotower.model.embeddings import fill_tables
    from trec_twotower.model.encode import encode
    from trec_twotower.training.model_builder import build_whole_model

    def longer(table: pa.Table) -> pa.Table:
        histories = [
            ["gone", *history] if row % 3 else history for row, history in enumerate(table["history"].to_pylist())
        ]
        weights = [[1.0] * len(history) for history in histories]
        table = table.drop_columns(["history", "history_weight"])
        table = table.append_column("history", pa.array(histories, pa.list_(pa.string())))
        table = table.append_column("history_weight", pa.array(weights, pa.list_(pa.float32())))
        at = pa.array([[3**step for step in range(len(history))] for history in histories], pa.list_(pa.int64()))
        did = pa.array([["saw", "bought"] * 9 for _ in histories], pa.list_(pa.string()))
        did = pa.array([one[: len(h)] for one, h in zip(did.to_pylist(), histories, strict=True)], did.type)
        return table.append_column("at", at).append_column("did", did)

    parts = {name: longer(shop_tables[name]) for name in ("train", "test")}
    dataset = write_dataset(tmp_path / "shop", **parts, items=shop_tables["items"])
    config = validate(RunConfig, parse_yaml(STEPS.replace("DATASET", str(dataset)), "STEPS"), "the test's config")
    sources = FeatureDataset(Dataset(dataset), config.feature_schema, "event")
    torch.manual_seed(0)
    model = build_whole_model(config).eval()
    fill_tables(model, config.feature_schema, 1)
    for parameter in model.user_tower.parameters():
        torch.nn.init.normal_(parameter)
    learned = {name: asdict(values) for name, values in sources.statistics.items()}
    made = Encoder(Parts({}, as_values(config), learned, model.state_dict(), _steps(sources)))
    encoder = pickle.loads(pickle.dumps(made))
    features = sources.user_features(parts["test"], "test")
    expected = encode(model, "user", features, Ranks(0, 1, torch.device("cpu"))).numpy()
    np.testing.assert_array_equal(encoder.encode("user", parts["test"]), expected)
    assert len(np.unique(expected.round(4), axis=0)) > 60  # no two users are taken for one
