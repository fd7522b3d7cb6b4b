"""Base classes of the option models of sources, and the parser of `key=value` overrides."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trec_twotower.config.loading import parse_overrides
from trec_twotower.errors import ConfigError, DataError, nearest

DATA_VARIABLE = "TREC_TT_DATA"


class SourceOptions(BaseModel):
    """Frozen base model that rejects unknown keys. `verbatim` names options whose text is not parsed as YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)
    verbatim: ClassVar[frozenset[str]] = frozenset()


class FolderOptions(SourceOptions):
    """Base options of sources that read files."""

    data_dir: Path | None = Field(None, description="folder of the raw files; without it, $TREC_TT_DATA/SOURCE")

    def folder(self, source: str) -> Path:
        """Return the folder of the raw files of `source`, which must exist."""
        data_dir = self.data_dir
        if data_dir is None:
            root = os.environ.get(DATA_VARIABLE)
            if not root:
                raise ConfigError(
                    f"Source {source!r} does not know where its files are: give data_dir=FOLDER, or set "
                    f"{DATA_VARIABLE} to the folder that holds {source}/."
                )
            data_dir = Path(root) / source
        data_dir = data_dir.expanduser()
        if not data_dir.is_dir():
            parent = data_dir.parent
            siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
            raise DataError(f"There is no folder {data_dir}{nearest(data_dir.name, sorted(siblings))}.")
        return data_dir


Model = TypeVar("Model", bound=SourceOptions)


def _takes_bool(annotation: Any) -> bool:
    return annotation is bool or any(map(_takes_bool, get_args(annotation)))


def parse_options(model: type[SourceOptions], overrides: Iterable[str]) -> dict[str, Any]:
    """Return the values of `key=value` arguments: YAML, but the text itself for options such as `where`.

    Quoted text and mappings in braces are YAML for these options as well. `types.zip=text` sets one key of a mapping.
    """
    parsed: dict[str, Any] = {}
    for override in overrides:
        name, _, text = override.partition("=")
        option, _, key = name.partition(".")
        is_quoted = len(text) > 2 and text[0] in "\"'" and text.find(text[0], 1) == len(text) - 1
        is_text = option in model.verbatim and not (text.startswith("{") or is_quoted)
        is_text |= text.startswith("*")  # a glob such as *.csv: as YAML it would be an alias, and there are no anchors
        value = text if is_text else parse_overrides([override])[name]
        if key and option in model.model_fields:
            before = parsed.get(option)
            parsed[option] = {**(before if isinstance(before, dict) else {}), key: value}
        else:
            parsed[name] = value
    return parsed


def read_options(source: str, model: type[Model], overrides: dict[str, Any]) -> Model:
    """Return the options of `source` with the overrides. ConfigError lists every invalid one."""
    faults = []
    for name, value in overrides.items():
        if name not in model.model_fields:
            faults.append(f"{name!r} is not an option{nearest(name, model.model_fields)}")
        elif isinstance(value, bool) and not _takes_bool(model.model_fields[name].annotation):  # pydantic reads 1
            faults.append(f"{name} = {value!r}: this option is no yes or no")
    if not faults:
        try:
            return model.model_validate(overrides)
        except ValidationError as error:
            for fault in error.errors():
                name = ".".join(map(str, fault["loc"]))
                if fault["loc"] and overrides.get(str(fault["loc"][0])) == fault["input"]:  # set for all tables
                    name = str(fault["loc"][0])
                message = fault["msg"].removeprefix("Value error, ")
                if fault["type"] == "missing":
                    faults.append(f"{name} is missing: it has no default")
                elif fault["type"] == "tuple_type":
                    faults.append(f"{name} = {fault['input']!r}: a list is needed, such as {name}=[{fault['input']}]")
                else:
                    faults.append(f"{name} = {fault['input']!r}: {message}" if name else message)
    raise ConfigError(f"Source {source!r}: " + "; ".join(dict.fromkeys(faults)) + ".")
