"""Which settings make a run what it is, and whether two configs are of the same one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from trec_twotower.config.run_config import RunConfig, as_values, settings_in
from trec_twotower.errors import ConfigError

# What may change between two starts of one run, because it changes no batch and no weight before the next step.
_FREE = ("train.epochs", "train.log_every", "train.evaluate_every", "train.timeout_s", "train.first_timeout_s",
         "train.max_failures", "train.threads", "train.device", "train.profile_steps", "train.pipeline",
         "checkpoint", "evaluate", "index", "run_dir", "data.dataset", "data.prefetch",
         "data.threads", "data.cache", "data.cache_gb")  # fmt: skip


_PLACING = (".sharding", ".shard_columns", ".kernel", ".cache_share")  # of a table


def binding(config: RunConfig) -> dict[str, Any]:
    """The settings that make a run what it is, flat: {"model.dim": 64, ...}.

    Where a table lies is not among them: a checkpoint goes on under another plan where its state allows.
    """
    flat: dict[str, Any] = {}

    def walk(value: Any, place: str) -> None:
        if place in _FREE or (place.startswith("tables.") and place.endswith(_PLACING)):
            return
        if place == "data.follow":
            flat[place] = None if value is None else {}  # whether, not for how long
        elif isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, f"{place}.{name}" if place else name)
        elif place in ("user", "item"):
            flat[place] = [feature["name"] for feature in value]  # their order is the order of the tower's input
            for feature in value:
                walk(feature, f"{place}.{feature['name']}")
        else:
            flat[place] = value

    walk(as_values(config), "")
    return flat


def config_hash(config: RunConfig) -> str:
    """Twelve hex digits that change with any setting that binds a run."""
    return hashlib.sha256(json.dumps(binding(config), sort_keys=True).encode()).hexdigest()[:12]


def check_same_run(saved: RunConfig, given: RunConfig, run_dir: Path) -> None:
    """Raises ConfigError listing the fields in which a run folder's config differs from the one given."""
    if found := differences(binding(saved), binding(given)):
        raise ConfigError(
            f"{run_dir} belongs to another config: {found}. "
            "Give this run a folder of its own (run_dir=...), or take the old settings back."
        )


def _is_newer(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether `old` was written before there was such a setting, which `new` leaves at its default."""
    parts = name.split(".")
    is_named = parts[0] in ("user", "item", "tables")  # and then comes the name of a feature or table
    if name in old or any(".".join(parts[:count]) in old for count in range(1 + is_named, len(parts))):
        return False
    if is_named:
        del parts[1]
    settings: Any = RunConfig
    for part in parts[:-1]:
        settings = settings_in(settings.model_fields[part].annotation) if part in settings.model_fields else None
        if settings is None:
            return False
    field = settings.model_fields.get(parts[-1])
    return (
        field is not None
        and not field.is_required()
        and _as_in_yaml(field.get_default(call_default_factory=True)) == new[name]
    )


def _as_in_yaml(value: Any) -> Any:
    """As as_values has it."""
    return TypeAdapter(Any).dump_python(value, mode="json")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The settings of `binding` that differ, in words; empty where none does."""
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name) and not _is_newer(name, old, new)]
    shown = "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in names[:8])
    return shown + (f" (and {len(names) - 8} more)" if len(names) > 8 else "")
