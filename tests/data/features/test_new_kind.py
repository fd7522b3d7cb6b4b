"""A kind of feature is a class of settings, a reader and a registry line; nothing else has to know it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.data.features.transform import READERS
from trec_twotower.model.feature_encoders import LAYERS

# Runs in a process of its own, since the classes of settings register themselves. The new kind reads the length of a
# string as the table row, up to a limit.
NEW_KIND = """
from typing import Literal
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from trec_twotower.config.feature_spec import ColumnFeature
from trec_twotower.config.model import TableSpec
from trec_twotower.data.features.reader import FeatureReader
from trec_twotower.ops.hashing import is_text
from trec_twotower.ops.ragged import Ragged

class LengthFeature(ColumnFeature):
    kind: Literal["length"] = "length"
    most: int
    dim: int

    @property
    def own_table(self):
        return TableSpec(buckets=self.most + 1, dim=self.dim)

class LengthReader(FeatureReader):
    needs = "strings"

    def fits(self, kind):
        return is_text(kind)

    def read(self, rows):
        length = pc.fill_null(pc.utf8_length(rows.array.cast(pa.string())), 0).to_numpy(zero_copy_only=False)
        return {rows.feature.name: Ragged.singles(np.minimum(length, rows.feature.most).astype(np.int32))}

from trec_twotower.data.features.transform import READERS
READERS[LengthFeature] = LengthReader()

import pathlib, sys
import pyarrow.parquet as pq
from trec_twotower.config.loading import load_config
from trec_twotower.data.feature_report import describe_coverage
from trec_twotower import start_ranks, train
from trec_twotower.training.run_dir import Run

folder = pathlib.Path(sys.argv[1])
def write(name, table):
    (folder / "data" / name).mkdir(parents=True)
    pq.write_table(table, folder / "data" / name / "part-0.parquet")
ids = pa.array(range(50))
titles = pa.array([None if row == 3 else "x" * (row % 9) for row in range(50)])
write("items", pa.table({"item_id": ids, "title": titles}))
write("train", pa.table({"user_id": pa.array(range(400)), "item_id": pa.array([row % 50 for row in range(400)])}))
(folder / "config.yaml").write_text('''
data: {dataset: %s, batch_size: 64}
user: [{name: user_id, kind: id, buckets: 500, dim: 8}]
item: [{name: item_id, kind: id, buckets: 64, dim: 8}, {name: title, kind: length, most: 5, dim: 4}]
model: {dim: 8}
train: {epochs: 1}
run_dir: %s
''' % (folder / "data", folder / "run"))
config = load_config(folder / "config.yaml")
with start_ranks() as ranks:
    train(config, ranks)
    run = Run.open(folder / "run")
    dataset = run.open_dataset(ranks)
    print(dataset.catalogue.columns.sparse["title"].values.tolist())
    print(describe_coverage(dataset).splitlines()[3].split()[:4])
"""


def test_every_kind_has_a_reader_and_a_kind_with_layers_has_them():
    assert set(READERS) == set(FeatureSpec.members())
    assert {feature for feature in READERS if feature.layers_width is not FeatureSpec.layers_width} == set(LAYERS)


@pytest.mark.timeout(120)
def test_a_new_kind_is_trained_with_nothing_but_its_settings_reader_and_registry_line(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NEW_KIND, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=110,
    )
    assert found.returncode == 0, found.stderr
    expected = [0 if row == 3 else min(row % 9, 5) for row in range(50)]
    assert found.stdout.splitlines()[-2] == str(expected)
    assert found.stdout.splitlines()[-1] == "['item', 'title', 'length', '2.00%']"
