"""An evaluation as text tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trec_twotower.evaluation.comparison import EXACT, ITEM_TO_ITEM, REACHABLE, THROUGH_INDEX

SAMPLED_NOTE = (
    f"({ITEM_TO_ITEM!r} is missing there because its scores are not inner products; the index is missing because it "
    "does not score given items.)"
)


def format_table(rows: dict[str, dict[str, Any]], columns: list[str]) -> str:
    """Return a table with one row per method and one column per metric; a dash where a value is missing."""
    width = max(len(name) for name in rows)
    lines = [" " * width + "  " + "  ".join(f"{column:>10}" for column in columns)]
    for name, metrics in rows.items():
        cells = (f"{metrics[column]:>10.4f}" if column in metrics else f"{'-':>10}" for column in columns)
        lines.append(f"{name:<{width}}  " + "  ".join(cells))
    return "\n".join(lines)


def excluded_text(result: dict[str, Any]) -> str:
    """Return which items an evaluation left out of its rankings."""
    texts = {True: "seen items excluded", False: "seen items included", "except_target": "seen items "
             "excluded except targets"}  # fmt: skip
    return texts[result.get("exclude_seen", True)]


def _ceiling_text(result: dict[str, Any], ks: Sequence[int]) -> list[str]:
    """Return a line with the upper bound of recall, or nothing for an evaluation that has none."""
    if "highest_recall" not in result:
        return []
    recall = ", ".join(f"@{k} {result['highest_recall'][f'recall@{k}']:.4f}" for k in ks)
    lost = result["unfindable_users"]
    why = " (all their positives are in their history; see evaluate.exclude_seen)" if lost else ""
    return [f"users that no model can hit: {lost:,}{why}; highest possible recall {recall}"]


def verdict(result: dict[str, Any], k: int) -> str:
    """Return one sentence: recall@k of the two towers next to the best baseline and to the best reachable value."""
    recall = {name: each[f"recall@{k}"] for name, each in result["metrics"].items() if f"recall@{k}" in each}
    own, reachable = recall.pop(EXACT), recall.pop(REACHABLE, None)
    recall.pop(THROUGH_INDEX, None)
    text = f"Two towers: recall@{k} {own:.4f}"
    if recall and (best := max(recall.values())) > 0:
        name = next(name for name, value in recall.items() if value == best)
        change = own / best - 1
        text += f", {abs(change):.0%} {'above' if change >= 0 else 'below'} the best baseline ({name}, {best:.4f})"
    if reachable:
        text += f", {own / reachable:.0%} of the best reachable ({reachable:.4f})"
    return f"{text}."


def _slice_text(label: str, part: dict[str, Any], k: int) -> str:
    """Return the recall of a slice, the best reachable one if it is known, and the number of users."""
    reachable = part["metrics"].get(REACHABLE, {}).get(f"recall@{k}")
    best = f" of {reachable:.4f} reachable" if reachable is not None else ""
    return f"{label} {part['metrics'][EXACT][f'recall@{k}']:.4f}{best} ({part['users']:,})"


def format_result(result: dict[str, Any], ks: Sequence[int]) -> str:
    """Return the tables of an evaluation, given the content of evaluation.json."""
    k = ks[0]
    smallest = [name for each in ks[:2] for name in (f"recall@{each}", f"ndcg@{each}")]
    lines = [
        f"{result['split']}, {result['users']:,} users, whole catalogue, {excluded_text(result)}",
        *_ceiling_text(result, ks),
        format_table(result["metrics"], [*smallest, f"hit@{k}", f"mrr@{k}", f"map@{k}"]),
        verdict(result, k),
        "",
        f"list metrics @{k}, and the 95 % confidence interval of recall@{k}",
    ]
    columns = {"coverage": "coverage", "novelty": "novelty", "diversity": "diversity", "popularity_bias": "pop. bias"}
    rows = {}
    for name, lists in result["lists"].items():
        low, high = result["intervals"].get(name, {}).get(f"recall@{k}", (None, None))
        rows[name] = {short: lists[f"{metric}@{k}"] for metric, short in columns.items() if f"{metric}@{k}" in lists}
        rows[name] |= {"low": low, "high": high} if low is not None else {}
    lines.append(format_table(rows, [*columns.values(), "low", "high"]))
    for name, parts in result["slices"].items():
        figures = (_slice_text(label, part, k) for label, part in parts.items())
        lines += ["", f"recall@{k} by {name} (users): " + ", ".join(figures)]
    for name, rows in result.get("sampled", {}).items():
        lines += [
            "",
            f"NOT over the whole catalogue: each positive item is ranked among {name}",
            format_table(rows, list(rows[EXACT])),
        ]
    if result.get("sampled"):
        lines.append(SAMPLED_NOTE)
    if "index_loss" in result:
        loss = result["index_loss"][f"recall@{k}"]
        low, high = loss.get("interval", (None, None))
        between = f" (95 % confidence interval {low:+.5f} to {high:+.5f})" if low is not None else ""
        lines += ["", f"recall@{k} lost to the index: {loss['value']:+.5f}{between}"]
    return "\n".join(lines)
