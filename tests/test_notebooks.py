"""What people run in a Jupyter kernel: libraries behave differently there."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq

# DuckDB takes a process without a main file, in which IPython reports a kernel, for a notebook. There it draws its
# progress bar with ipywidgets, and refuses every setting of the bar where ipywidgets is missing.
NOTEBOOK = """
import sys, types
shell = types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = lambda: shell
import duckdb
try:
    duckdb.connect().execute("SET enable_progress_bar = false")
    print("has widgets")
except duckdb.Error as error:
    print("no widgets" if "ipywidgets" in str(error) else error)
"""
PREPARE = """
from trec_twotower.cli import main
print("code", main(["prepare", "events", "--out", {out!r}, "events={events}"]))
"""


def test_prepare_runs_in_a_notebook_without_ipywidgets(tmp_path):
    events = {"user_id": [1, 1, 1, 1, 2, 2, 2, 2], "item_id": [1, 2, 3, 4, 4, 3, 2, 1], "timestamp": list(range(8))}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    cells = NOTEBOOK + PREPARE.format(out=str(tmp_path / "out"), events=tmp_path / "events.parquet")
    run = subprocess.run([sys.executable, "-c", cells], capture_output=True, text=True, timeout=60)
    lines = run.stdout.splitlines()
    assert lines[0] == ("no widgets" if importlib.util.find_spec("ipywidgets") is None else "has widgets")
    assert lines[-1] == "code 0", run.stdout + run.stderr
    assert (tmp_path / "out" / "dataset.yaml").is_file()
