"""Build the summary that `prepare` prints: counts of events read, dropped and written, and warnings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANY = 0.2  # share of rows without history, or of events that are not used, above which a warning is printed
_PARTS = ("train", "train_users", "valid", "test", "serving")
_READ = ("events_read", "ratings_read")
_DROPPED = {
    "not_positive": "below min_rating",
    "repeats_dropped": "repeats of a user and an item",
    "rare_dropped": "of rare users and items",
}
_SIDES = {"without_row": "without a row in the file", "without_events": "in no event", "removed": "removed as rare"}


def describe(place: Path, manifest: dict[str, Any]) -> str:
    """Return one block of lines about the dataset in `place`, of which `manifest` is the content of dataset.yaml."""
    counts = dict(manifest["counts"])
    split = manifest["options"].get("split")
    lines = [f"{place}: source {manifest['source']}" + (f", split {split}" if split else "")]
    lines += [f"  {name:<12} {text}" for name, text in _lines(counts)]
    lines += [f"Warning: {warning}" for warning in _warnings(manifest["counts"], manifest["options"])]
    return "\n".join(lines)


def _lines(counts: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each line; counts that no line is made for have one of their own."""
    read = next((counts.pop(name) for name in _READ if name in counts), None)
    dropped = [(counts.pop(name), _DROPPED.get(name, _plain(name.removesuffix("_dropped")))) for name in list(counts)
               if name in _DROPPED or name.endswith("_dropped")]  # fmt: skip
    if read is not None:
        kept, repeats = counts.pop("interactions", read), counts.pop("repeats_kept", 0)
        facts = [f"{read:,} read", *(f"{count:,} dropped: {why}" for count, why in dropped if count), f"{kept:,} kept"]
        yield "events", ", ".join(facts) + (f", {repeats:,} of them repeat a user and an item" if repeats else "")
    for side in ("users", "items"):
        if side in counts:
            facts = [f"{counts.pop(side):,}"]
            facts += [f"{counts.pop('users_in_train_only', 0):,} in train only"] if side == "users" else []
            facts += [f"{counts.pop(f'{side}_{name}', 0):,} {text}" for name, text in _SIDES.items()]
            yield side, ", ".join(fact for fact in facts if not fact.startswith("0 "))
    for part in _PARTS:
        rows = counts.pop(f"{part}_rows", None)
        empty, unfindable = counts.pop(f"{part}_empty_histories", None), counts.pop(f"{part}_unfindable", None)
        counts.pop(f"{part}_empty_by_ties", None)
        if not rows:
            continue
        facts = [_number(rows, "row")]
        facts += [f"{_share(empty, rows)} without history"] if empty is not None else []
        facts += [f"{_share(unfindable, rows)} unfindable with exclude_seen"] if unfindable is not None else []
        yield part, ", ".join(facts)
    left_out = counts.pop("repeats_left_out", 0)
    if left_out:
        yield "not trained", f"{_number(left_out, 'repeat')} of held-out items"
    for name, count in counts.items():
        if count:
            yield _plain(name), f"{count:,}"


def _warnings(counts: dict[str, int], options: dict[str, Any]) -> Iterator[str]:
    causes: dict[str, list[str]] = {}
    for part in ("train", "valid", "test"):
        rows, empty = counts.get(f"{part}_rows", 0), counts.get(f"{part}_empty_histories", 0)
        if empty > MANY * rows:
            cause = _cause(part, 2 * counts[f"{part}_empty_by_ties"] >= empty, options)
            causes.setdefault(cause, []).append(f"{_share(empty, rows)} of the {part} rows")
    for cause, shares in causes.items():
        yield f"{' and '.join(shares)} have no history, {cause}"
    for part in ("valid", "test"):
        rows, unfindable = counts.get(f"{part}_rows", 0), counts.get(f"{part}_unfindable", 0)
        if unfindable:
            yield (
                f"{_share(unfindable, rows)} of the {part} rows ask only for items of their own history, which no "
                "model can find while evaluate.exclude_seen is true. Set it to false or except_target, or prepare "
                "with hold_out=new."
            )
        if not rows and f"{part}_unfindable" in counts and options.get(f"{part}_share") != 0:
            yield f"There are no {part} rows: no user has enough events to hold one out ({_needed(part, options)})."
    left_out, kept = counts.get("repeats_left_out", 0), counts.get("interactions", 0)
    if left_out > MANY * kept:
        yield (
            f"{_share(left_out, kept)} of the events are repeats of held-out items, and are not trained on. "
            "split=time trains on all events before one time, hold_out=any on all but each user's last two."
        )


def _cause(part: str, is_by_ties: bool, options: dict[str, Any]) -> str:
    """Return why rows have no history, and which option helps."""
    if is_by_ties and options["split"] != "last-basket":
        cause = "mostly because other events of their users have the same time, so that the order is unknown."
        if "order" not in options:
            return cause
        is_by_event = options["split"] == "leave-last-out"
        basket = ", or split=last-basket to hold out all items of one time" if is_by_event else ""
        return (
            f"{cause} Set order=COLUMN to a column that orders events of one time, or order=file where the rows of the "
            f"files are in order{basket}."
        )
    if part == "train":
        first = "of the first time" if options["split"] == "last-basket" else "the first events"
        return f"mostly because they are {first} of their users: min_history=1 leaves these out."
    return "because their users have no earlier event: they measure what the model recommends to new users."


def _needed(part: str, options: dict[str, Any]) -> str:
    if options["split"] == "last-basket":
        return f"it needs {3 if part == 'valid' else 2} times with new items"
    return "it needs 3 items" if options.get("hold_out") == "new" else "it needs 3 events"


def _share(count: int, rows: int) -> str:
    return f"{count:,} ({100 * count / rows:.1f} %)" if count and rows else f"{count:,}"


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _plain(name: str) -> str:
    return name.replace("_", " ")
