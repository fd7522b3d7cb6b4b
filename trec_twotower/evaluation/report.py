"""The HTML report of a run: collects what the stages wrote and measured, and runs nothing again."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, PackageLoader, StrictUndefined

from trec_twotower.config.feature_spec import HISTORY
from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.data.dataset import ITEM_ID, POSITIVES, SERVING, USER_ID
from trec_twotower.data.split import Split
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.evaluation import charts
from trec_twotower.evaluation.comparison import EXACT, REACHABLE, THROUGH_INDEX
from trec_twotower.evaluation.result_text import SAMPLED_NOTE, excluded_text, verdict
from trec_twotower.evaluation.slices import column_of, parts_of
from trec_twotower.index import IndexReport, exact_search
from trec_twotower.inference.export import Exported, read_export
from trec_twotower.ops.hashing import id_keys
from trec_twotower.ops.key_table import KeyTable
from trec_twotower.ops.ragged import Ragged
from trec_twotower.storage.arrow_values import format_item, python_rows, python_value, python_values
from trec_twotower.storage.artifacts import read_manifest
from trec_twotower.storage.atomic import read_json, write_file
from trec_twotower.storage.manifest import MANIFEST
from trec_twotower.training.checkpoints.checkpoint import versions as versions_of_writer
from trec_twotower.training.optimizer import table_state_bytes
from trec_twotower.training.run_dir import CONFIG, STATUS, Run

REPORT, TEMPLATE = "report.html", "report.html.j2"
MAX_POINTS = 4000  # items on the map
NUM_USERS, NUM_ITEMS, NUM_RECENT = 4, 8, 5  # example users, and their recommendations and recent items
MIN_USERS = 20  # slices of fewer users are not drawn


def write_report(run: Run, colour: str | None = None) -> Path:
    """Write RUN/report.html, one self-contained file, and return its path.

    A stage that has not run yet is replaced by the command that runs it. `colour` is the column of items/ that colors
    the item map; by default the first category among the item features, else the number of interactions in train.
    Raises ConfigError for an unknown column, DataError for damaged files or another dataset.
    """
    has_export = (run.folder / "export" / MANIFEST).is_file()
    exported = read_export(run.folder / "export") if has_export else None
    loader = PackageLoader("trec_twotower.evaluation")
    page = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    ).get_template(TEMPLATE)
    text = page.render(
        name=run.folder.name,
        run_dir=str(run.folder),
        dataset=str(run.config.data.dataset),
        about=_about(run),
        config=(run.folder / CONFIG).read_text(encoding="utf-8"),
        training=_training(run),
        evaluation=_evaluation(run, exported),
        index=_index(run, exported),
        items=_items(run, exported, colour),
        users=_users(run, exported),
        memory=_memory(run),
    )
    write_file(run.folder / REPORT, text)
    return run.folder / REPORT


def _about(run: Run) -> list[tuple[str, str]]:
    """Return when and by what the report was written, and the sizes of the dataset, as labels and values."""
    counts = run.dataset().description.get("counts", {})
    sizes = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items() if isinstance(value, int))
    versions = ", ".join(f"{name} {version}" for name, version in versions_of_writer().items())
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    rows = [("Written", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by trec-twotower report {run.folder}")]
    return [*rows, ("Versions", versions), ("Machine", machine), *([("Dataset", sizes)] if sizes else [])]


@contextmanager
def _check_format(path: Path, hint: str) -> Iterator[None]:
    """Raise DataError for a readable file that lacks fields which this version writes."""
    try:
        yield
    except DataError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is not in the format of this version ({reason}): {hint}") from error


# ---------------------------------------------------------------- training


def _training(run: Run) -> dict[str, Any]:
    path, status_path = run.folder / "metrics.jsonl", run.folder / STATUS
    with _check_format(path, "remove the damaged lines."):
        events = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []
        curves = charts.training_curves(events, run.config.evaluate.best)
    text = ""
    if status_path.is_file():
        status = read_json(status_path)
        with _check_format(status_path, "train again."):
            text = f"{status['step']:,} of {status['of_steps']:,} steps, {status['reason']}"
            if "train_s" in status:
                ranks = "1 rank" if status["num_ranks"] == 1 else f"{status['num_ranks']:,} ranks"
                text += f"; {status['train_s']:,.0f} s on {ranks}"
                text += f", {status['rows_per_s']:,.0f} rows/s"
    return {"curves": curves, "status": text}


# ---------------------------------------------------------------- evaluation


def _evaluation(run: Run, exported: Exported | None) -> dict[str, Any] | None:
    path = run.folder / "evaluation.json"
    if not path.is_file():
        return None
    result = read_json(path, "evaluate again.")
    with _check_format(path, "evaluate again."):
        return _evaluation_tables(result, exported)


def _evaluation_tables(result: dict[str, Any], exported: Exported | None) -> dict[str, Any]:
    ks = sorted({int(name.partition("@")[2]) for name in result["metrics"][EXACT]})[:2]
    metrics = [f"{name}@{k}" for k in ks for name in ("recall", "ndcg")] + [f"mrr@{ks[0]}", f"map@{ks[0]}"]
    list_metrics = [f"{name}@{ks[0]}" for name in ("coverage", "novelty", "diversity", "popularity_bias")]
    tables: dict[str, Any] = {
        "verdict": verdict(result, ks[0]),
        "about": f"{result['split']}, {result['users']:,} users, whole catalogue, {excluded_text(result)}",
        "model": f"{result['model_version']}, step {result['step']:,}",
        "exported_model": "",
        "columns": ["", *metrics],
        "rows": [],
        "best": [],  # of each row and metric, whether the value is the highest
        "list_columns": ["", *list_metrics],
        "list_rows": [[name, *_cells(values, list_metrics)] for name, values in result.get("lists", {}).items()],
        "index_loss": "",
        "sampled": [],
        "sampled_note": SAMPLED_NOTE,
        "slices": _slices(result, f"recall@{ks[0]}"),
        "min_users": MIN_USERS,
    }
    best = {metric: max(values.get(metric, 0.0) for name, values in result["metrics"].items() if name != REACHABLE)
            for metric in metrics}  # fmt: skip
    for name, values in result["metrics"].items():
        tables["best"].append([name != REACHABLE and values.get(metric) == best[metric] > 0 for metric in metrics])
        intervals = (result.get("intervals", {}).get(name, {}).get(metric) for metric in metrics)
        cells = zip(_cells(values, metrics), intervals, strict=True)
        tables["rows"].append([name, *(_with_interval(cell, interval) for cell, interval in cells)])
    if exported is not None and result["model_version"] != exported.manifest["model_version"]:
        step = exported.manifest["step"]
        tables["exported_model"] = f"{exported.manifest['model_version']}, step {step:,}"
        tables["exported_step"] = step
    if "index_loss" in result:
        loss = result["index_loss"][f"recall@{ks[0]}"]
        low, high = loss.get("interval", (None, None))
        interval = "" if low is None else f" (95 % confidence interval {low:+.5f} to {high:+.5f})"
        tables["index_loss"] = f"recall@{ks[0]} lost to the index: {loss['value']:+.5f}{interval}"
    for name, by_method in result.get("sampled", {}).items():
        columns = list(next(iter(by_method.values())))
        rows = [[method, *_cells(values, columns)] for method, values in by_method.items()]
        tables["sampled"].append({"name": name, "columns": ["", *columns], "rows": rows})
    return tables


def _cells(values: dict[str, float], columns: Sequence[str]) -> list[str]:
    return [f"{values[column]:.4f}" if column in values else "-" for column in columns]


def _with_interval(cell: str, interval: Sequence[float] | None) -> str | tuple[str, str]:
    return (cell, f"{interval[0]:.4f} – {interval[1]:.4f}") if interval else cell


def _slices(result: dict[str, Any], metric: str) -> str | None:
    """Return charts of a metric by slice; None where no slice has two values of enough users."""
    slices = []
    for name, parts in result.get("slices", {}).items():
        large = {label: part for label, part in parts.items() if part["users"] >= MIN_USERS}
        if len(large) > 1:
            slices.append((name, large))
    methods = [name for name in result["metrics"] if name not in (THROUGH_INDEX, REACHABLE)]
    return charts.slice_recall(slices, methods, metric) if slices else None


# ---------------------------------------------------------------- index


def _index(run: Run, exported: Exported | None) -> dict[str, Any]:
    folder = run.folder / "index"
    if exported is None or not (folder / MANIFEST).is_file():
        return {"missing": "This run has no index yet", "command": "index" if exported else "export"}
    manifest = read_manifest(folder, "build the index again.")
    if manifest["model_version"] != exported.manifest["model_version"]:
        return {"missing": "The index is of other weights than the export; build it again", "command": "index"}
    with _check_format(folder / MANIFEST, "build the index again."):
        report = IndexReport.read(manifest["report"])
        if not report.latency_ms:
            return {"missing": "The index is of a version that did not measure its latency; build it again",
                    "command": "index"}  # fmt: skip
        latency = [f"{report.latency_ms[name]:.2f}" for name in ("p50", "p90", "p99")]
        exact = ["-"] * len(latency)
        return {
            "missing": "",
            "about": f"{len(exported.item_ids):,} items: {report.summary()}",
            "device": report.device,
            "rows": [
                ["this index", f"{report.users_per_s:,.0f}", *latency],
                ["exact search", f"{report.exact_users_per_s:,.0f}", *exact],
            ],
            "chart": charts.index_recall(report),
        }


# ---------------------------------------------------------------- items and users


def principal_plane(vector_ID: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the vectors' coordinates (I, 2) on their two principal axes, and the share of variance that these keep."""
    centered_ID = vector_ID.astype(np.float64) - vector_ID.mean(axis=0, dtype=np.float64)
    values, axes = np.linalg.eigh(centered_ID.T @ centered_ID)
    share = float(values[-2:].sum() / max(values.sum(), 1e-30))
    return centered_ID @ axes[:, -2:][:, ::-1], min(share, 1.0)


def _items(run: Run, exported: Exported | None, colour: str | None) -> dict[str, Any] | None:
    items = run.dataset().items
    if colour is not None and not items.has(colour):
        raise ConfigError(f"--colour is {colour!r}, which is not a column of items/{nearest(colour, items.columns)}.")
    if exported is None:
        return None
    num_items = len(exported.item_ID)
    sample = np.sort(np.random.default_rng(0).permutation(num_items)[:MAX_POINTS])
    plane_IP, share = principal_plane(exported.item_ID)
    count_I = run.item_counts(id_keys(exported.item_ids, "the export"))
    name, labels, label_I = _item_labels(run, exported, colour, count_I)
    title = f"{len(sample):,} of {num_items:,} items by {name}"
    length_I, length_Q = (np.linalg.norm(vectors, axis=-1).ravel() for vectors in (exported.item_ID, exported.user_QD))
    lengths = np.concatenate([length_I, length_Q])
    are_equal = lengths.max(initial=0) - lengths.min(initial=np.inf) <= 1e-3 * lengths.max(initial=1)
    return {
        "variance": f"{share:.0%}",
        "map": charts.item_map(plane_IP[sample], labels, label_I[sample], title),
        "length": f"{lengths.mean():.3g}",
        "lengths": None if are_equal else charts.vector_lengths(length_I, length_Q, count_I),
    }


def _item_labels(
    run: Run, exported: Exported, colour: str | None, count_I: np.ndarray
) -> tuple[str, tuple[str, ...], np.ndarray]:
    """Return what the map is colored by, its labels, and the label (int64) of each exported item."""
    items = run.dataset().items
    if colour is None:
        categories = (each for each in run.config.item if each.kind == "category")
        colour = next((each.source_column for each in categories if items.has(each.source_column)), None)
    if colour is None:
        return "interactions in train", *parts_of(pa.array(count_I))
    labels, label_I = parts_of(column_of(items, colour, f"--colour {colour}"))
    return colour, labels, label_I[_rows_in_files(items, exported)]


def _rows_in_files(items: Split, exported: Exported) -> np.ndarray:
    """Return the row in items/ of each exported item (int64); raises DataError for an item that is not there."""
    ids = id_keys(one_chunk(items.table([ITEM_ID])[ITEM_ID]), f"{items.folder}, column {ITEM_ID!r}")
    wanted = id_keys(exported.item_ids, "the export")
    if np.array_equal(ids, wanted):
        return np.arange(len(ids))
    table = KeyTable(ids, np.zeros(KeyTable.num_slots(len(ids)), np.int32))
    table.insert(0, len(ids))
    row = table.find(wanted)
    if (row < 0).any():
        raise DataError(
            f"{items.folder} lacks {int((row < 0).sum()):,} of the exported items, such as item_id "
            f"{python_value(exported.item_ids, int((row < 0).argmax()))!r}: export again."
        )
    return row


def _users(run: Run, exported: Exported | None) -> list[dict[str, Any]] | None:
    """Return a few exported users with their recent items and their recommendations by exact search."""
    if exported is None or not len(exported.user_QD):
        return None
    dataset = run.dataset()
    chosen = np.unique(np.linspace(0, len(exported.user_QD) - 1, NUM_USERS).astype(int))
    row_of = {item: row for row, item in enumerate(python_values(exported.item_ids))}
    histories, positives = [], []
    for row in _rows_of_users(dataset.split(exported.manifest["users_from"]), exported, chosen):
        targets = row.get(POSITIVES, row.get(ITEM_ID))
        targets = targets if isinstance(targets, list) else [targets]
        histories.append([row_of[item] for item in row.get(HISTORY) or [] if item in row_of])
        positives.append({row_of[item] for item in targets if item in row_of})
    mode = run.config.evaluate.exclude_seen
    excluded = [
        [item for item in history if mode and not (mode == "except_target" and item in targets)]
        for history, targets in zip(histories, positives, strict=True)
    ]
    k = min(NUM_ITEMS, len(exported.item_ID))
    score_BK, item_row_BK = exact_search(exported.item_ID, exported.user_QD[chosen], k, Ragged.from_lists(excluded))
    recent = [history[::-1][:NUM_RECENT] for history in histories]
    shown = np.unique([*item_row_BK[item_row_BK >= 0], *(item for items in recent for item in items)])
    file_rows = _rows_in_files(dataset.items, exported)[shown.astype(np.int64)]
    text = dict(zip(shown.tolist(), _item_texts(dataset.items, file_rows.tolist()), strict=True))
    return [
        {
            "id": user_id,
            "recent": [text[item] for item in recent[place]],
            "recommendations": [
                {"text": text[item], "score": f"{score:.3f}", "is_positive": item in positives[place]}
                for item, score in zip(item_row_BK[place].tolist(), score_BK[place].tolist(), strict=True)
                if item >= 0
            ],
        }
        for place, user_id in enumerate(python_values(exported.user_ids.take(pa.array(chosen))))
    ]


def _rows_of_users(split: Split, exported: Exported, chosen: np.ndarray) -> list[dict[str, Any]]:
    """Return the rows from which the chosen users were encoded; a user may have several rows."""
    ids = exported.user_ids.take(pa.array(chosen))
    target = POSITIVES if split.has(POSITIVES) else ITEM_ID
    columns = [name for name in (USER_ID, target, HISTORY) if split.has(name)]
    rows: dict[Any, list[dict[str, Any]]] = {}
    for _, table in split.tables(columns):
        of_chosen = table.filter(pc.is_in(table[USER_ID], value_set=ids.cast(table.schema.field(USER_ID).type)))
        for row in python_rows(of_chosen):
            if split.name == SERVING or row[target] not in (None, []):  # other rows are not exported
                rows.setdefault(row[USER_ID], []).append(row)
    found = []
    for place, exact_id, user_id in zip(chosen.tolist(), ids, python_values(ids), strict=True):
        earlier = pc.sum(pc.equal(exported.user_ids.slice(0, place), exact_id)).as_py() or 0
        found.append(rows[user_id][earlier])
    return found


def _item_texts(items: Split, rows: Sequence[int]) -> list[str]:
    """Return these rows of items/, each as a line of text."""
    found: dict[int, str] = {}
    for group in items.row_groups:
        inside = [row for row in dict.fromkeys(rows) if 0 <= row - group.first_row < group.num_rows]
        if inside:
            table = items.read(group, list(items.columns)).take(pa.array([row - group.first_row for row in inside]))
            found.update(zip(inside, map(format_item, python_rows(table)), strict=True))
    return [found[row] for row in rows]


# ---------------------------------------------------------------- memory


def _memory(run: Run) -> dict[str, Any] | None:
    """Return the shards of the newest checkpoint's plan with their bytes, and the peak memory of training."""
    manifests = sorted(run.folder.glob(f"checkpoints/step-*/{MANIFEST}"))
    if not manifests:
        return None
    manifest = read_json(manifests[-1], "train again.")
    tables = run.config.feature_schema.tables
    rows, total = [], dict.fromkeys(range(manifest["num_ranks"]), 0)
    for shard in manifest["plan"]:
        spec = tables[shard["table"]]
        # The plan has no rows for a table that every rank holds in full.
        height, width = (shard["rows"], shard["columns"]) if shard["rows"] else (spec.buckets, spec.dim)
        weight_bytes = height * width * spec.weight_bytes
        state_bytes = table_state_bytes(run.config.train.optimizer, height, width)
        total[shard["rank"]] += weight_bytes + state_bytes
        sizes = (f"{height:,}", f"{width:,}", f"{weight_bytes / 1e6:,.2f}", f"{state_bytes / 1e6:,.2f}")
        rows.append([shard["table"], shard["sharding"], shard["kernel"], str(shard["rank"]), *sizes])
    status = read_json(run.folder / STATUS) if (run.folder / STATUS).is_file() else {}
    peaks = status.get("peak_bytes_by_rank", [])
    return {
        "rows": rows,
        "table_bytes": ", ".join(f"rank {rank} {size / 1e6:,.1f} MB" for rank, size in total.items()),
        "peak_bytes": ", ".join(f"rank {rank} {peak / 2**20:,.0f} MiB" for rank, peak in enumerate(peaks)),
    }
