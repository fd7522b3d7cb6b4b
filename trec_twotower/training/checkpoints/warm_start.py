"""`train --init-from RUN`: the weights of another run, each row and column where this model has the same thing.

A weight is copied where both models mean the same by it. The rows of a vocabulary are matched by word, those of bins by
value, the columns of a layer by the feature that they read. What means something else (a table with another hash, a
layer after another layer) keeps its first weights, and the report names the reason.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trec_twotower.data.features.vocabulary import NULL_ROW, RESERVED_ROWS, UNKNOWN_ROW
from trec_twotower.distributed.compat import local_shards
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError
from trec_twotower.model.tower import Tower
from trec_twotower.training.checkpoints.checkpoint import MODEL, Checkpoints, whole_size
from trec_twotower.training.checkpoints.weight_meaning import Axis, Bins, Layout, Meaning, Weight, Words
from trec_twotower.training.run_dir import Run

MOST_NAMES = 8  # in one line of the report


@dataclass(frozen=True)
class Transfer:
    """One weight of the new model, and where its numbers come from: nowhere if there is a `reason`."""

    new: Weight
    old: Weight | None
    sources: tuple[np.ndarray | None, ...] = ()  # per axis: the old index of each new one, -1: none; None: the same
    reason: str = ""

    @property
    def is_whole(self) -> bool:
        """Return whether the whole weight is copied unchanged."""
        return not self.reason and all(each is None for each in self.sources)


def transfers(new: Layout, old: Layout) -> list[Transfer]:
    """Return how each weight of a new model is initialized from those of an old one."""
    return [_transfer(weight, old.get(key)) for key, weight in new.items()]


def _transfer(new: Weight, old: Weight | None) -> Transfer:
    if old is None:
        return Transfer(new, None, reason="not in that run")
    if new.rows and old.rows and not new.rows & old.rows:
        there, here = (" and ".join(sorted(rows)) for rows in (old.rows, new.rows))
        return Transfer(new, old, reason=f"its rows were {there}, now {here}")
    for name in sorted({*new.settings, *old.settings}):
        was, now = old.settings.get(name), new.settings.get(name)
        if was != now:
            is_long = isinstance(was, tuple) or isinstance(now, tuple)
            return Transfer(new, old, reason=f"{name} changed" if is_long else f"{name} was {was}, now {now}")
    if len(new.size) != len(old.size):
        return Transfer(new, old, reason=_sizes(new, old))
    found: list[np.ndarray | None] = []
    for new_axis, old_axis, length, before in zip(new.axes, old.axes, new.size, old.size, strict=True):
        if new_axis is None and old_axis is None:
            if length != before:
                return Transfer(new, old, reason=_sizes(new, old))
            found.append(None)
        elif new_axis is None or old_axis is None:
            return Transfer(new, old, reason="its inputs are not the same kind")
        else:
            source = _source(new_axis, old_axis)
            if source is not None and not (source >= 0).any():
                return Transfer(new, old, reason="that run has none of what it reads")
            found.append(source)
    return Transfer(new, old, tuple(found))


def _source(new: Axis, old: Axis) -> np.ndarray | None:
    """Return the old index of each new one, -1 if it has none; None if all are equal."""
    if new == old:
        return None
    if isinstance(new, Bins) and isinstance(old, Bins):
        return _rows_of_bins(new, old)
    if isinstance(new, Words) and isinstance(old, Words):
        place = {word: RESERVED_ROWS + number for number, word in enumerate(old.words)}
        spare = [-1] * (new.num_rows - RESERVED_ROWS - len(new.words))
        return np.array([NULL_ROW, UNKNOWN_ROW, *(place.get(word, -1) for word in new.words), *spare], np.int64)
    assert isinstance(new, Sequence) and isinstance(old, Sequence)
    position = {label: number for number, label in enumerate(old)}
    return np.array([position.get(label, -1) for label in new], np.int64)


def _rows_of_bins(new: Bins, old: Bins) -> np.ndarray:
    """Return the old row for the value of each new row of bins: a bin's middle, or the point of a soft bin."""
    source = np.full(new.num_rows, -1, np.int64)
    source[0] = 0
    here, there = np.array(new.points), np.array(old.points)
    if not len(here) or not len(there):
        return source
    if new.is_soft:
        nearest = np.abs(here[:, None] - there).argmin(1)
        source[1 : 1 + len(here)] = 1 + nearest
    else:
        middle = np.concatenate([[-np.inf], (here[1:] + here[:-1]) / 2, [np.inf]])
        source[1 : 2 + len(here)] = 1 + np.searchsorted(there, middle, side="right")
    return source


def _sizes(new: Weight, old: Weight) -> str:
    return f"{shown_size(old.size)} there, {shown_size(new.size)} here"


def shown_size(size: Sequence[int]) -> str:
    """Format a tensor's size: 1,000 x 64."""
    return " x ".join(f"{length:,}" for length in size) or "one number"


# ------------------------------------------------------------ the transfer itself


def begin_with(model: nn.Module, meaning: Meaning, run: Run, ranks: Ranks) -> Report:
    """Give a model the weights of the best checkpoint of `run` that mean the same; all ranks call together.

    `meaning` is that of the model's own run. Raises ConfigError where no weight fits.
    """
    others = Checkpoints(run.folder / "checkpoints", ranks)
    path = others.choose("best")
    reader = others.open(path)
    live = model.state_dict()
    here = meaning.layout({name: whole_size(value) for name, value in live.items()})
    sizes = {name.removeprefix(MODEL): tuple(size) for name, size in reader.sizes.items() if name.startswith(MODEL)}
    there = ranks.once(lambda: Meaning.of_saved(run)).layout(sizes)
    plan = transfers(here, there)
    report = Report.of(plan, there, path, reader.sealed.manifest["step"])
    if all(each.reason for each in plan):
        raise ConfigError(f"{path} has no weight that fits this model:\n{report.text}")
    wanted: dict[str, Any] = {}
    mapped: list[tuple[Transfer, Tensor]] = []
    for each in plan:
        if each.old is None or each.reason:
            continue
        if each.is_whole:
            wanted[MODEL + each.old.name] = live[each.new.name]
        else:
            wanted[MODEL + each.old.name] = value = torch.empty(each.old.size)
            mapped.append((each, value))
    others.fill(wanted, reader)
    for each, value in mapped:
        _map(live[each.new.name], value, each.sources)
    model.load_state_dict(live)
    for module in model.modules():
        if isinstance(module, Tower) and not any(key[0] == "average" for key in there):
            module.begin_average()
    return report


def _map(live: Any, value: Tensor, sources: Sequence[np.ndarray | None]) -> None:
    """Put the parts of an old tensor that have a place into a new one, or into this rank's shards of it."""
    for piece, first in local_shards(live):
        part, places = value, []
        for axis, (source, start, length) in enumerate(zip(sources, first, piece.shape, strict=True)):
            here = np.arange(start, start + length) if source is None else source[start : start + length]
            places.append(torch.from_numpy(np.flatnonzero(here >= 0)))
            part = part.index_select(axis, torch.from_numpy(here[here >= 0]))
        with torch.no_grad():
            grid = torch.meshgrid(*(place.to(piece.device) for place in places), indexing="ij")
            piece[grid] = part.to(piece)


@dataclass(frozen=True)
class Report:
    """What was copied, mapped and skipped, line by line."""

    path: Path
    step: int
    copied: list[str]
    mapped: list[str]
    skipped: list[str]

    @classmethod
    def of(cls, plan: Sequence[Transfer], old: Layout, path: Path, step: int) -> Report:
        shown = [each for each in plan if not each.new.label.endswith((", averaged", "(bias)"))]
        copied = [each.new.label for each in shown if each.is_whole]
        mapped = [f"{each.new.label}: {_how(each)}" for each in shown if not each.reason and not each.is_whole]
        reasons = {each.new.label: each.reason for each in plan if each.reason}
        for label in [*reasons]:  # one line for a layer is enough
            if any(label.removesuffix(end) in reasons for end in (" (bias)", ", averaged") if label.endswith(end)):
                del reasons[label]
        skipped = [f"{label}: {reason}" for label, reason in reasons.items()]
        taken = {each.old.name for each in plan if each.old is not None}
        lost = [weight.label for weight in old.values() if weight.name not in taken]
        skipped += [f"{label}: only in that run" for label in lost if not label.endswith(", averaged")]
        return cls(path, step, *(list(dict.fromkeys(lines)) for lines in (copied, mapped, skipped)))

    @property
    def text(self) -> str:
        """Return the report as text."""
        lines = [f"began with the weights of {self.path} (step {self.step:,})"]
        for what, entries in (("copied", self.copied), ("mapped", self.mapped), ("skipped", self.skipped)):
            if what == "copied" and entries:
                entries = [", ".join(entries)]
            lines += [f"  {what if not number else '':<8} {entry}" for number, entry in enumerate(entries)]
        return "\n".join(lines)

    @property
    def facts(self) -> dict[str, Any]:
        """Return the report as values for the run's log."""
        found = {name: getattr(self, name) for name in ("copied", "mapped", "skipped")}
        return {"checkpoint": str(self.path), "of_step": self.step, **found}


def _how(transfer: Transfer) -> str:
    """Describe which rows and columns of a weight are copied."""
    assert transfer.old is not None
    parts = []
    for new, old, source in zip(transfer.new.axes, transfer.old.axes, transfer.sources, strict=True):
        if source is None:
            continue
        if isinstance(new, Bins):
            parts.append(f"{int((source >= 0).sum()):,} rows of bins by value")
        elif isinstance(new, Words) and isinstance(old, Words):
            known, added, gone = _compared(new.words, old.words)
            parts.append(f"{len(known):,} words" + _listed(added, "; new: ") + _listed(gone, "; gone: "))
        elif isinstance(new, range):
            parts.append(f"the {int((source >= 0).sum()):,} newest steps")
        elif isinstance(new, Sequence) and isinstance(old, Sequence):
            mapped = [_feature(label) for label, place in zip(new, source.tolist(), strict=True) if place >= 0]
            known, added, gone = _compared([_feature(label) for label in new], [_feature(label) for label in old])
            changed = [name for name in known if name not in mapped]
            parts.append(
                f"by feature: {_listed(list(dict.fromkeys(mapped)))}{_listed(added, '; new: ')}"
                f"{_listed(changed, '; of another kind: ')}{_listed(gone, '; gone: ')}"
            )
    return "; ".join(dict.fromkeys(parts))


def _compared(new: Sequence[Hashable], old: Sequence[Hashable]) -> tuple[list[str], list[str], list[str]]:
    """Return the names in both layouts, only in the new one, and only in the old one."""
    here, there = dict.fromkeys(new), dict.fromkeys(old)
    known = [str(each) for each in here if each in there]
    return known, [str(each) for each in here if each not in there], [str(each) for each in there if each not in here]


def _feature(label: Hashable) -> str:
    """Return the feature to which a column or a gate belongs."""
    if isinstance(label, frozenset):
        return "numbers"
    return label[0] if isinstance(label, tuple) else str(label)


def _listed(names: Sequence[str], before: str = "") -> str:
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return before + ", ".join(names[:MOST_NAMES]) + more if names else ""
