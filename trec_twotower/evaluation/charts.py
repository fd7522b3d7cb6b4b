"""Charts of the report, as SVG elements in the colors of the page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from trec_twotower.evaluation.slices import NONE, OTHERS
from trec_twotower.index import IndexReport

INK = "#010203"  # text and axes; replaced by the page's own color, which differs in light and dark mode
BLUE, ORANGE, GREEN, PURPLE = "#3b82c4", "#e07b39", "#5aa469", "#9a6fb0"
STYLE: Any = {  # Any: matplotlib's type lists every setting by name
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def _svg(figure: Figure, label: str) -> str:
    """Return the figure as an SVG element with an accessible label; the same figure gives the same bytes."""
    figure.tight_layout()
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label}):
        figure.savefig(out, format="svg", transparent=True, dpi=150, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def training_curves(events: Sequence[Mapping[str, Any]], best: str) -> str | None:
    """Return the curves of loss, validation metric `best` and rows/s; None where nothing was logged."""
    curves = [
        ("loss", [(each["step"], each["loss"]) for each in events if each["kind"] == "train"]),
        (f"{best} on valid/", [(each["step"], each[best]) for each in events if best in each]),
        ("rows/s", [(each["step"], each["rows_per_s"]) for each in events if each["kind"] == "train"]),
    ]
    curves = [(name, points) for name, points in curves if points]
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.6))
        for number, (name, points) in enumerate(curves, 1):
            axes = figure.add_subplot(1, len(curves), number, title=name, xlabel="step")
            axes.plot(*zip(*points, strict=True), color=BLUE, marker="o" if len(points) < 30 else None, markersize=3)
            if name == "rows/s":
                axes.set_ylim(bottom=0)
        return _svg(figure, "training curves")


def slice_recall(slices: Sequence[tuple[str, Mapping[str, Any]]], methods: Sequence[str], metric: str) -> str:
    """Return one chart per slice (name, {label: part}) with a metric of each method by label."""
    num_rows = -(-len(slices) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.9 * num_rows))
        for number, (name, parts) in enumerate(slices, 1):
            axes = figure.add_subplot(num_rows, 2, number, title=f"{metric} by {name}")
            for method, color in zip(methods, (BLUE, ORANGE, GREEN, PURPLE) * len(methods), strict=False):
                value = [part["metrics"][method][metric] for part in parts.values()]
                line = "none" if "." in name else "-"  # the values of a column have no order
                axes.plot(range(len(parts)), value, linestyle=line, marker="o", markersize=3, label=method, color=color)
            labels = [label.partition(" (")[0] for label in parts]
            axes.set_xticks(range(len(parts)), labels, rotation=35, ha="right")
            axes.set_ylim(bottom=0)
            if number == 1:
                axes.legend(fontsize=8)
        return _svg(figure, "recall by slices")


def index_recall(report: IndexReport) -> str:
    """Return recall against users/s of CPU time, around the tuned search and for exact search."""
    points = [(recall, rate) for recall, _, rate in report.curve]
    exact_rate = report.exact_users_per_s
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3))
        title = f"recall@{report.k} against throughput"
        axes = figure.add_subplot(1, 1, 1, title=title, xlabel="recall", ylabel="users/s of CPU time")
        if len(points) > 1:
            axes.plot(*zip(*sorted(points), strict=True), color=BLUE, marker="o", markersize=3, label="this index")
        axes.plot(report.reached_recall, report.users_per_s, "*", color=ORANGE, markersize=13, label="as tuned")
        axes.plot(1, exact_rate, "s", color=GREEN, label="exact search")
        axes.axvline(report.target_recall, color=INK, linestyle=":", linewidth=1, label="target")
        margin = 0.1 * (1.02 - min(report.target_recall, *(recall for recall, _ in points)))
        axes.set_xlim(1.02 - 11 * margin, 1 + margin)
        axes.set_ylim(0, 1.15 * max(exact_rate, *(rate for _, rate in points)))
        axes.legend(fontsize=8)
        return _svg(figure, "index")


def item_map(plane_IP: np.ndarray, labels: Sequence[str], label_I: np.ndarray, title: str) -> str:
    """Return a scatter plot of items at `plane_IP`, colored by their label."""
    used = sorted(np.unique(label_I).tolist(), key=lambda each: labels[each] not in (OTHERS, NONE))  # drawn first
    palette = matplotlib.colormaps["tab20"](np.arange(20))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.6))
        axes = figure.add_subplot(1, 1, 1, title=title)
        for each in used:
            at = plane_IP[label_I == each]
            color = "#88888866" if labels[each] in (OTHERS, NONE) else palette[each % 20]
            axes.scatter(at[:, 0], at[:, 1], s=7, label=labels[each], color=color, linewidths=0, rasterized=True)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(fontsize=8, markerscale=2.5, loc="center left", bbox_to_anchor=(1, 0.5))
        return _svg(figure, "map of the items")


def vector_lengths(length_I: np.ndarray, length_Q: np.ndarray, count_I: np.ndarray) -> str:
    """Return the distribution of vector lengths, and the items' mean length by their interactions in train."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.6))
        axes = figure.add_subplot(1, 2, 1, title="lengths of the vectors", xlabel="length", ylabel="share of vectors")
        bins = np.linspace(0, np.percentile(np.concatenate([length_I, length_Q]), 99.9), 40).tolist()
        for name, length, color in (("items", length_I, BLUE), ("users", length_Q, ORANGE)):
            if len(length):
                share = np.full(len(length), 1 / len(length))
                axes.hist(length, bins=bins, weights=share, color=color, alpha=0.6, label=name)
        axes.legend(fontsize=8)
        octave_I = np.frexp(count_I.astype(float))[1]
        used = np.unique(octave_I)
        mean = [length_I[octave_I == each].mean() for each in used]
        axes = figure.add_subplot(1, 2, 2, title="mean length of items by interactions in train")
        axes.plot(range(len(used)), mean, color=BLUE, marker="o", markersize=3)
        labels = ["0" if each == 0 else f"{1 << (each - 1):,}+" for each in used.tolist()]
        axes.set_xticks(range(len(used)), labels, rotation=35)
        axes.set_ylim(bottom=0)
        return _svg(figure, "lengths of the vectors")
