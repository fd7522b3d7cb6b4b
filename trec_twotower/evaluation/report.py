"""A run in pictures: report.html, one file that needs no other, of what the run's folder holds so far."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.figure import Figure

from trec_twotower.config.schema import HISTORY
from trec_twotower.data.dataset import ITEM_ID, POSITIVES, SERVING, USER_ID, Split
from trec_twotower.data.features.transform import one_chunk
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.evaluation.evaluator import EXACT, NOT_SAMPLED, REACHABLE, excluded_text
from trec_twotower.evaluation.slices import NONE, OTHERS, column_of, parts_of
from trec_twotower.index import ItemIndex, exact_search
from trec_twotower.inference.export import Exported, read_export
from trec_twotower.ops.hashing import id_keys
from trec_twotower.ops.key_table import KeyTable
from trec_twotower.storage.arrow_values import format_item, python_rows, python_value, python_values
from trec_twotower.storage.artifacts import read_manifest
from trec_twotower.storage.atomic import MANIFEST, read_json, write_file
from trec_twotower.training.optimizer import table_state_bytes
from trec_twotower.training.run_dir import STATUS, Run

REPORT = "report.html"
INK = "#010203"  # of text and axes; becomes the page's own colour, which differs in light and dark
BLUE, ORANGE = "#3b82c4", "#e07b39"
STYLE: Any = {  # matplotlib's type names each of its settings
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
MAPPED_ITEMS = 4000  # points on the map
SHOWN_USERS, SHOWN_ITEMS, SHOWN_HISTORY = 4, 8, 5
TIMED_USERS = 256
TURNS = 7
FEWEST_USERS = 20  # whose mean is drawn as a point

CSS = """
:root { color-scheme: light dark; --line: #8886; --back: #fff; --ink: #1b1f24; --soft: #8881; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --ink: #e3e6ea; } }
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.4rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin-bottom: .3rem; }
table { border-collapse: collapse; margin: .8rem 0; } th, td { padding: .2rem .7rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tbody tr:nth-child(odd) { background: var(--soft); }
small { opacity: .7; white-space: nowrap; } svg { width: 100%; height: auto; }
.users { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
ol, ul { margin-top: .2rem; padding-left: 1.6rem; } .found { font-weight: 600; }
"""


def write_report(run: Run, colour: str | None = None) -> Path:
    """RUN/report.html, of all stages that have run; those that have not say by which command they do.

    `colour` is the column of items/ that colours the map; by default the first category among the item features, else
    how often each item was taken. Raises ConfigError where there is no such column, DataError for damaged files or
    another dataset.
    """
    exported = read_export(run.folder / "export") if (run.folder / "export" / MANIFEST).is_file() else None
    parts: list[tuple[str, Callable[[], str]]] = [
        ("Training", lambda: _training(run)),
        ("How well held-out items are found", lambda: _evaluation(run, exported)),
        ("The index", lambda: _index(run, exported)),
        ("The items", lambda: _map(run, exported, colour)),
        ("Some users", lambda: _users(run, exported)),
        ("Tables and memory", lambda: _memory(run)),
    ]
    with matplotlib.rc_context(STYLE):
        body = "".join(f"<section><h2>{title}</h2>\n{make()}</section>\n" for title, make in parts)
    about = f"{escape(str(run.folder))}, trained on {escape(str(run.config.data.dataset))}"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(run.folder.name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{CSS}</style></head>\n'
        f"<body><h1>{escape(run.folder.name)}</h1>\n<p>{about}</p>\n{body}</body></html>\n"
    )
    write_file(run.folder / REPORT, page)
    return run.folder / REPORT


def _svg(figure: Figure, what: str) -> str:
    """The figure as a part of the page, its ink the page's."""
    figure.tight_layout()
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": what}):
        figure.savefig(out, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(what)}"', 1)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>\n{lines}</tbody></table>\n"


def _missing(what: str, command: str, run: Run) -> str:
    return f"<p>{what}: <code>trec-twotower {command} {escape(str(run.folder))}</code></p>\n"


@contextmanager
def _as_written(path: Path, mend: str) -> Iterator[None]:
    """Raises DataError for a file that can be read but has not the parts of ours."""
    try:
        yield
    except DataError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{path} is not as this version writes it ({what}): {mend}") from error


# ---------------------------------------------------------------- training


def _training(run: Run) -> str:
    path = run.folder / "metrics.jsonl"
    with _as_written(path, "take the damaged lines out."):
        curves = _curves(run, path)
    if curves is None:
        return "<p>Nothing was logged yet: the first figures come after train.log_every steps.</p>\n"
    said = ""
    if (run.folder / STATUS).is_file():
        status = read_json(run.folder / STATUS)
        with _as_written(run.folder / STATUS, "train again."):
            said = f"<p>{status['step']:,} of {status['of_steps']:,} steps, {escape(status['reason'])}"
            if "train_s" in status:
                said += (
                    f"; {status['train_s']:,.0f} s on {status['num_ranks']} ranks, {status['rows_per_s']:,.0f} rows/s"
                )
            said += ".</p>\n"
    return said + curves


def _curves(run: Run, path: Path) -> str | None:
    events = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []
    best = run.config.evaluate.best
    curves = [
        ("loss", [(each["step"], each["loss"]) for each in events if each["kind"] == "train"]),
        (f"{best} on valid/", [(each["step"], each[best]) for each in events if best in each]),
        ("rows/s", [(each["step"], each["rows_per_s"]) for each in events if each["kind"] == "train"]),
    ]
    curves = [(name, points) for name, points in curves if points]
    if not curves:
        return None
    figure = Figure(figsize=(9, 2.6))
    for place, (name, points) in enumerate(curves, 1):
        axes = figure.add_subplot(1, len(curves), place, title=name, xlabel="step")
        axes.plot(*zip(*points, strict=True), color=BLUE, marker="o" if len(points) < 30 else None, markersize=3)
        if name == "rows/s":
            axes.set_ylim(bottom=0)
    return _svg(figure, "training curves")


# ---------------------------------------------------------------- evaluation


def _evaluation(run: Run, exported: Exported | None) -> str:
    path = run.folder / "evaluation.json"
    if not path.is_file():
        return _missing("Nothing was evaluated yet", "evaluate", run)
    result = read_json(path, "evaluate again.")
    with _as_written(path, "evaluate again."):
        return _figures(result, exported)


def _figures(result: dict[str, Any], exported: Exported | None) -> str:
    ks = sorted({int(name.partition("@")[2]) for name in result["metrics"][EXACT]})[:2]
    columns = [f"{name}@{k}" for k in ks for name in ("recall", "ndcg")] + [f"mrr@{ks[0]}", f"map@{ks[0]}"]
    page = (
        f"<p>{escape(result['split'])}, {result['users']:,} users, whole catalogue, {excluded_text(result)}; "
        "below each figure the interval that 95 of 100 draws of the users lie in. Of model "
        f"{escape(str(result['model_version']))}, step {result['step']:,}.</p>\n"
    )
    if exported is not None and result["model_version"] != exported.manifest["model_version"]:
        page += (
            f"<p><strong>These figures are not of the exported vectors</strong>, which are of model "
            f"{escape(str(exported.manifest['model_version']))}, step {exported.manifest['step']:,}: evaluate or "
            f"export again (--checkpoint {exported.manifest['step']} names that one).</p>\n"
        )
    page += _table(["", *columns], [
        [escape(name), *(_with_interval(result, name, metrics, column) for column in columns)]
        for name, metrics in result["metrics"].items()
    ])  # fmt: skip
    if "index_loss" in result:
        loss = result["index_loss"][f"recall@{ks[0]}"]
        low, high = loss.get("interval", (None, None))
        between = f" ({low:+.5f} to {high:+.5f}, 95 times of 100)" if low is not None else ""
        page += f"<p>Lost through the index, of recall@{ks[0]}: {loss['value']:+.5f}{between}.</p>\n"
    names = [f"{name}@{ks[0]}" for name in ("coverage", "novelty", "diversity", "popularity_bias")]
    page += _table(["", *names], [
        [escape(name), *(f"{lists[column]:.4f}" if column in lists else "-" for column in names)]
        for name, lists in result.get("lists", {}).items()
    ])  # fmt: skip
    for name, rows in result.get("sampled", {}).items():
        page += f"<p>Not over the catalogue: each item to find among {escape(name)}.</p>\n"
        columns = list(next(iter(rows.values())))
        page += _table(["", *columns], [
            [escape(contender), *(f"{metrics[column]:.4f}" for column in columns)]
            for contender, metrics in rows.items()
        ])  # fmt: skip
    page += f"<p>{escape(NOT_SAMPLED)}</p>\n" if result.get("sampled") else ""
    drawn = []
    for name, parts in result.get("slices", {}).items():
        enough = {label: part for label, part in parts.items() if part["users"] >= FEWEST_USERS}
        if len(enough) > 1:
            drawn.append((name, enough))
    if drawn:
        rows = -(-len(drawn) // 2)
        figure = Figure(figsize=(9, 2.9 * rows))
        contenders = [name for name in result["lists"] if name not in ("two towers, through the index", REACHABLE)]
        for place, (name, parts) in enumerate(drawn, 1):
            axes = figure.add_subplot(rows, 2, place, title=f"recall@{ks[0]} by {name}")
            for number, contender in enumerate(contenders):
                value = [part["metrics"][contender][f"recall@{ks[0]}"] for part in parts.values()]
                line = "none" if "." in name else "-"  # values of a column stand in no order
                axes.plot(range(len(parts)), value, linestyle=line, marker="o", markersize=3, label=contender,
                          color=(BLUE, ORANGE, "#5aa469", "#9a6fb0")[number % 4])  # fmt: skip
            labels = [label.partition(" (")[0] for label in parts]
            axes.set_xticks(range(len(parts)), labels, rotation=35, ha="right")
            axes.set_ylim(bottom=0)
            if place == 1:
                axes.legend(fontsize=8)
        page += _svg(figure, "recall by slices") + f"<p>Parts of fewer than {FEWEST_USERS} users are left out.</p>\n"
    return page


def _with_interval(result: dict[str, Any], name: str, metrics: dict[str, float], column: str) -> str:
    if column not in metrics:
        return "-"
    interval = result.get("intervals", {}).get(name, {}).get(column)
    between = f"<br><small>{interval[0]:.4f} – {interval[1]:.4f}</small>" if interval else ""
    return f"{metrics[column]:.4f}{between}"


# ---------------------------------------------------------------- index


def _index(run: Run, exported: Exported | None) -> str:
    folder = run.folder / "index"
    if exported is None or not (folder / MANIFEST).is_file():
        return _missing("There is no index yet", "index" if exported else "export", run)
    manifest = read_manifest(folder, "build the index again.")
    if manifest["model_version"] != exported.manifest["model_version"]:
        return _missing("The index is of other weights than the export; build it again", "index", run)
    report = manifest["report"]
    index = ItemIndex.load(folder)
    k = min(int(report["k"]), len(index))
    user_BD = np.ascontiguousarray(exported.user_QD[:TIMED_USERS])
    contenders: dict[Any, Callable[[], Any]] = {"exact search": lambda: exact_search(exported.item_ID, user_BD, k)}
    contenders |= {factor: partial(index.with_breadth(factor).search, user_BD, k) for factor in _factors(index)}
    found, seconds = _in_turn(contenders)
    exact_s, index_s = seconds["exact search"], seconds[1.0]
    single_ms = np.array([_took_s(partial(index.search, user[None], k)) for user in user_BD]) * 1e3
    figure = Figure(figsize=(9, 3))
    axes = figure.add_subplot(1, 2, 1, title=f"recall@{k} against queries/s", xlabel="recall", ylabel="queries/s")
    worst_B = found["exact search"][0][:, -1]
    point = {factor: (_recall(found[factor], worst_B), len(user_BD) / seconds[factor]) for factor in _factors(index)}
    if len(point) > 1:
        axes.plot(*zip(*sorted(point.values()), strict=True), color=BLUE, marker="o", markersize=3, label="this index")
    axes.plot(*point[1.0], "*", color=ORANGE, markersize=13, label="as tuned")
    axes.plot([1], [len(user_BD) / exact_s], "s", color="#5aa469", label="exact search")
    axes.axvline(float(report["target_recall"]), color=INK, linestyle=":", linewidth=1, label="target")
    lowest = min(float(report["target_recall"]), *(recall for recall, _ in point.values()))
    axes.set_xlim(lowest - 0.1 * (1.02 - lowest), 1 + 0.1 * (1.02 - lowest))
    axes.set_ylim(0, 1.15 * max(len(user_BD) / exact_s, *(rate for _, rate in point.values())))
    axes.legend(fontsize=8)
    axes = figure.add_subplot(1, 2, 2, title="one user at a time", xlabel="ms", ylabel="users")
    middle, slow = np.percentile(single_ms, [50, 99])
    axes.hist(single_ms[single_ms <= 2 * slow], bins=40, color=BLUE)
    for at, name, style in ((middle, "p50", "-"), (slow, "p99", "--")):
        axes.axvline(at, color=ORANGE, linestyle=style, label=f"{name} {at:.2f} ms")
    axes.legend(fontsize=8)
    reaches = (
        f"recall@{k} {float(report['reached_recall']):.4f} against exact search (target {report['target_recall']}), "
        f"scanning {report['scanned_share']:.1%} of the items."
    )
    if not report["lists"] and report["reached_recall"] == 1:
        reaches = "so few that all are scored: exact search is the index."
    said = (
        f"<p>{escape(str(report['kind']))} of {len(index):,} items, {report['bytes'] / 1e6:,.1f} MB: {reaches} "
        f"Measured here in turn on {len(user_BD)} users: {len(user_BD) / index_s:,.0f} queries/s in one batch, exact "
        f"search {len(user_BD) / exact_s:,.0f}; one user at a time p50 {middle:.2f} ms, p99 {slow:.2f} ms.</p>\n"
    )
    return said + _svg(figure, "index")


def _factors(index: ItemIndex) -> tuple[float, ...]:
    """Return factors of what a search scans, for points around the tuned one."""
    return (0.25, 0.5, 0.75, 1.0, 1.25, 1.5) if index.report.efforts[0].breadth else (1.0,)


def _in_turn(contenders: dict[Any, Callable[[], Any]]) -> tuple[dict[Any, Any], dict[Any, float]]:
    """What each returns, and the least of its seconds; all take turns, so that what else goes on meets all alike."""
    found: dict[Any, Any] = {}
    seconds: dict[Any, list[float]] = {name: [] for name in contenders}
    for turn in range(1 + TURNS):
        for name, work in contenders.items():
            started = time.perf_counter()
            found[name] = work()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return found, {name: min(taken) for name, taken in seconds.items()}


def _recall(answer: tuple[np.ndarray, np.ndarray], worst_B: np.ndarray) -> float:
    """The share of answers as good as the worst of exact search's; scores that rounding alone parts are equal."""
    score_BK, item_row_BK = answer
    slack_B = 1e-3 * np.abs(worst_B)
    return float(((score_BK >= (worst_B - slack_B)[:, None]) & (item_row_BK >= 0)).mean())


def _took_s(work: Callable[[], Any]) -> float:
    """The better of two times."""
    best = np.inf
    for _ in range(2):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return float(best)


# ---------------------------------------------------------------- items and users


def principal_plane(vector_ID: np.ndarray) -> tuple[np.ndarray, float]:
    """(I, 2): the vectors on the plane along which they differ most (PCA), and the share of the variance it keeps."""
    centred_ID = vector_ID.astype(np.float64) - vector_ID.mean(axis=0, dtype=np.float64)
    values, axes = np.linalg.eigh(centred_ID.T @ centred_ID)
    share = float(values[-2:].sum() / max(values.sum(), 1e-30))
    return centred_ID @ axes[:, -2:][:, ::-1], min(share, 1.0)


def _map(run: Run, exported: Exported | None, colour: str | None) -> str:
    if colour is not None and not run.dataset().items.has(colour):
        known = run.dataset().items.columns
        raise ConfigError(f"--colour asks for column {colour!r} of items/{nearest(colour, known)}.")
    if exported is None:
        return _missing("There are no vectors yet", "export", run)
    num_items = len(exported.item_ID)
    drawn = np.sort(np.random.default_rng(0).permutation(num_items)[:MAPPED_ITEMS])
    plane_IP, share = principal_plane(exported.item_ID)
    name, labels, part_I = _coloured(run, exported, colour)
    used = [part for part in range(len(labels)) if (part_I[drawn] == part).any()]
    palette = matplotlib.colormaps["tab20"](np.arange(20))
    figure = Figure(figsize=(9, 4.6))
    axes = figure.add_subplot(1, 1, 1, title=f"{len(drawn):,} of {num_items:,} items by {name}")
    for part in sorted(used, key=lambda part: labels[part] not in (OTHERS, NONE)):  # these lie below
        here = plane_IP[drawn[part_I[drawn] == part]]
        shade = "#88888866" if labels[part] in (OTHERS, NONE) else palette[part % 20]
        axes.scatter(here[:, 0], here[:, 1], s=7, label=labels[part], color=shade, linewidths=0, rasterized=True)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(fontsize=8, markerscale=2.5, loc="center left", bbox_to_anchor=(1, 0.5))
    said = f"<p>The item vectors on their two principal axes, which keep {share:.0%} of how they differ.</p>\n"
    return said + _svg(figure, "map of the items") + _lengths(run, exported)


def _lengths(run: Run, exported: Exported) -> str:
    """How long the vectors are, and the items' by how often they were taken; a sentence where all are alike."""
    length_I, length_Q = (np.linalg.norm(vectors, axis=-1).ravel() for vectors in (exported.item_ID, exported.user_QD))
    every = np.concatenate([length_I, length_Q])
    if every.max(initial=0) - every.min(initial=np.inf) <= 1e-3 * every.max(initial=1):
        return f"<p>All vectors have length {every.mean():.3g}: scores are cosines.</p>\n"
    figure = Figure(figsize=(9, 2.6))
    axes = figure.add_subplot(1, 2, 1, title="lengths of the vectors", xlabel="length", ylabel="share of them")
    bins = np.linspace(0, np.percentile(every, 99.9), 40).tolist()
    for name, length, colour in (("items", length_I, BLUE), ("users", length_Q, ORANGE)):
        if len(length):
            share = np.full(len(length), 1 / len(length))
            axes.hist(length, bins=bins, weights=share, color=colour, alpha=0.6, label=name)
    axes.legend(fontsize=8)
    octave_I = np.frexp(_counts(run, exported).astype(float))[1]
    used = np.unique(octave_I)
    axes = figure.add_subplot(1, 2, 2, title="items' mean length by how often they were taken")
    axes.plot(range(len(used)), [length_I[octave_I == each].mean() for each in used], color=BLUE, marker="o",
              markersize=3)  # fmt: skip
    axes.set_xticks(range(len(used)), ["0" if each == 0 else f"{1 << (each - 1):,}+" for each in used], rotation=35)
    axes.set_ylim(bottom=0)
    return _svg(figure, "lengths of the vectors")


def _counts(run: Run, exported: Exported) -> np.ndarray:
    """How often each exported item was interacted with in train."""
    return run.item_counts(id_keys(exported.item_ids, "the export"))


def _rows_in_files(items: Split, exported: Exported) -> np.ndarray:
    """Return the row in items/ of each exported item (int64), found by its id.

    Raises DataError for an item that is not there.
    """
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


def _coloured(run: Run, exported: Exported, colour: str | None) -> tuple[str, tuple[str, ...], np.ndarray]:
    """The name, the labels and each exported item's label."""
    items = run.dataset().items
    if colour is None:
        colour = next(
            (each.reads for each in run.config.item if each.kind == "category" and items.has(each.reads)), None
        )
    if colour is None:
        labels, part_I = parts_of(pa.array(_counts(run, exported)))
        return "times taken in train", labels, part_I
    labels, part_I = parts_of(column_of(items, colour, f"--colour {colour}"))
    return colour, labels, part_I[_rows_in_files(items, exported)]


def _users(run: Run, exported: Exported | None) -> str:
    if exported is None or not len(exported.user_QD):
        return _missing("There are no vectors of users yet", "export", run)
    dataset = run.dataset()
    split = dataset.split(exported.manifest["users_from"])
    chosen = np.unique(np.linspace(0, len(exported.user_QD) - 1, SHOWN_USERS).astype(int))
    ids = exported.user_ids.take(pa.array(chosen))
    rows: dict[Any, list[dict[str, Any]]] = {}
    wanted = POSITIVES if split.has(POSITIVES) else ITEM_ID
    columns = [USER_ID, wanted, *([HISTORY] if split.has(HISTORY) else [])]
    for _, table in split.tables(columns):
        here = table.filter(pc.is_in(table[USER_ID], value_set=ids.cast(table.schema.field(USER_ID).type)))
        for row in python_rows(here):
            if row[wanted] not in (None, []) or split.name == SERVING:  # others are not exported
                rows.setdefault(row[USER_ID], []).append(row)
    file_row = _rows_in_files(dataset.items, exported)
    row_of = {item: row for row, item in enumerate(python_values(exported.item_ids))}
    cards = []
    for user, exact_id, user_id in zip(chosen, ids, python_values(ids), strict=True):
        earlier = pc.sum(pc.equal(exported.user_ids.slice(0, user), exact_id)).as_py() or 0
        row = rows[user_id][earlier]  # a user may stand in several rows
        history = [row_of[item] for item in row.get(HISTORY) or [] if item in row_of]
        next_ones = row[wanted] if isinstance(row[wanted], list) else [row[wanted]]
        score_I = (exported.item_ID @ np.atleast_2d(exported.user_QD[user]).T).max(axis=1)
        found = {row_of[item] for item in next_ones if item in row_of}
        exclude_seen = run.config.evaluate.exclude_seen
        kept = found if exclude_seen == "except_target" else set(history) if not exclude_seen else set()
        score_I[[item for item in history if item not in kept]] = -np.inf
        best = [item for item in np.argsort(-score_I, kind="stable")[:SHOWN_ITEMS] if np.isfinite(score_I[item])]
        shown = history[::-1][:SHOWN_HISTORY]
        words = dict(zip([*shown, *best], _words(dataset.items, file_row[[*shown, *best]].tolist()), strict=True))
        took = "".join(f"<li>{words[item]}</li>" for item in shown)
        gets = "".join(
            f"<li{' class=found' if item in found else ''}>{words[item]} <small>{score_I[item]:.3f}</small></li>"
            for item in best
        )
        cards.append(f"<div><h3>User {escape(str(user_id))}</h3>took last<ul>{took}</ul>and gets<ol>{gets}</ol></div>")
    said = "<p>By exact search; what they did take next is bold.</p>\n"
    return said + f'<div class="users">{"".join(cards)}</div>\n'


def _words(items: Split, rows: Sequence[int]) -> list[str]:
    """What the files say of these items, as HTML."""
    found: dict[int, str] = {}
    for group in items.row_groups:
        inside = [row for row in dict.fromkeys(rows) if 0 <= row - group.first_row < group.num_rows]
        if inside:
            table = items.read(group, list(items.columns)).take(pa.array([row - group.first_row for row in inside]))
            found.update(zip(inside, (escape(format_item(about)) for about in python_rows(table)), strict=True))
    return [found[row] for row in rows]


# ---------------------------------------------------------------- memory


def _memory(run: Run) -> str:
    manifests = sorted(run.folder.glob(f"checkpoints/step-*/{MANIFEST}"))
    if not manifests:
        return "<p>There is no checkpoint yet.</p>\n"
    manifest = read_json(manifests[-1], "train again.")
    tables = run.config.feature_schema.tables
    rows, total = [], dict.fromkeys(range(manifest["num_ranks"]), 0)
    for shard in manifest["plan"]:
        spec = tables[shard["table"]]
        # A table that every rank holds whole has no rows of its own in the plan.
        height, width = (shard["rows"], shard["columns"]) if shard["rows"] else (spec.buckets, spec.dim)
        size = height * width * spec.weight_bytes
        state = table_state_bytes(run.config.train.optimizer, height, width)
        total[shard["rank"]] += size + state
        cells = (shard["table"], shard["sharding"], shard["kernel"])
        rows.append(
            [
                *map(escape, cells),
                str(shard["rank"]),
                f"{height:,}",
                f"{width:,}",
                f"{size / 1e6:,.2f}",
                f"{state / 1e6:,.2f}",
            ]
        )
    page = _table(["table", "sharding", "kernel", "rank", "rows", "columns", "weights MB", "optimizer MB"], rows)
    said = ", ".join(f"rank {rank} {size / 1e6:,.1f} MB" for rank, size in total.items())
    page += f"<p>Tables with their optimizer's state: {said}."
    status = read_json(run.folder / STATUS) if (run.folder / STATUS).is_file() else {}
    if "peak_bytes_by_rank" in status:
        peaks = ", ".join(f"rank {rank} {held / 2**20:,.0f}" for rank, held in enumerate(status["peak_bytes_by_rank"]))
        page += f" The most that each process held in all, measured: {peaks} MiB."
    elif "peak_rank_bytes" in status:
        page += f" The most that any rank held in all, measured: {status['peak_rank_bytes'] / 2**20:,.0f} MiB."
    return page + "</p>\n"
