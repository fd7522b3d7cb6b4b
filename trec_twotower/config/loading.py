"""Reads and writes configs: strict YAML 1.2, overrides, validation."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import ScalarEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.tag import Tag

from trec_twotower.config.base import as_values, validate
from trec_twotower.config.evaluation import IndexConfig
from trec_twotower.config.run_config import RunConfig
from trec_twotower.errors import ConfigError, nearest
from trec_twotower.storage.package_files import shipped_configs

MAX_YAML_BYTES = 64 << 20  # a longer file is not read into memory
# Types of unquoted scalars other than text: the core schema of YAML 1.2, with decimal numbers only.
_SCALARS = {
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "null": re.compile(r"~|null|Null|NULL|"),
    "int": re.compile(r"[-+]?[0-9][0-9_]*"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)"),
}


class _Resolver(VersionedResolver):
    """Reads `no`, `12:30`, 0x10 and dates as text, 1e-3 as a number and 010 as ten."""

    processing_version = (1, 2)  # %YAML directives are ignored

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is not ScalarNode or not implicit[0]:
            return super().resolve(kind, value, (False, False))
        name = next((name for name, pattern in _SCALARS.items() if pattern.fullmatch(value)), "str")
        return Tag(suffix=f"tag:yaml.org,2002:{name}")


class _Composer(Composer):
    """Refuses aliases, which can expand a short text beyond any memory, and keys that are lists or mappings."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        line = event.start_mark.line + 1
        if event.anchor is not None:
            raise ConfigError(f"line {line}: anchors (&) and aliases (*) are not supported: repeat the value.")
        if isinstance(parent, MappingNode) and index is None and not isinstance(event, ScalarEvent):
            raise ConfigError(
                f"line {line}: a key is a list or a mapping: quote text that begins with a bracket or a brace."
            )
        return super().compose_node(parent, index)


class _Representer(SafeRepresenter):
    def ignore_aliases(self, data: Any) -> bool:
        """Return True, so that a repeated object is written out: `parse_yaml` refuses aliases."""
        return True

    def represent_text(self, text: str) -> Any:
        """Write text with unusual line breaks in double quotes, where they survive as escapes."""
        style = '"' if set(text) & set("\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Representer.add_representer(str, _Representer.represent_text)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Composer, yaml.Representer = _Resolver, _Composer, _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    return yaml


def parse_yaml(text: str, origin: str) -> Any:
    """Return the value of a YAML text; raises ConfigError naming `origin` and the line."""
    try:
        return _yaml().load(text)
    except ConfigError as error:
        raise ConfigError(f"{origin}, {error}") from None
    except DuplicateKeyError as error:
        raise ConfigError(f"{origin}, line {error.problem_mark.line + 1}: {error.problem}: keep one.") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = f"{error.context or ''} {error.problem}".strip()
        raise ConfigError(f"{origin}, line {mark.line + 1}, is not valid YAML: {problem}.") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin} is not valid YAML: {error}.") from None


def read_yaml(path: Path, origin: Path | None = None) -> Any:
    """Return the value of a YAML file; raises ConfigError naming it (or `origin`) and the line."""
    origin = origin or path
    with path.open("rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise ConfigError(f"{origin} is longer than {MAX_YAML_BYTES:,} bytes: it is not a file of this project.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{origin} is not UTF-8 ({error}): save it as UTF-8.") from None
    return parse_yaml(text, str(origin))


def to_yaml(value: Any) -> str:
    """Return YAML that `parse_yaml` reads back unchanged."""
    stream = io.StringIO()
    _yaml().dump(value, stream)
    return stream.getvalue()


def load_config(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Return the config of a YAML file with `key.part=value` overrides; raises ConfigError.

    If there is no such file, the name of a shipped config works too: `gowalla` or `configs/gowalla.yaml`.
    """
    path = _config_file(Path(path))
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not sections such as data, user, item and model.")
    values = apply_overrides(values, overrides)
    if values.get("run_dir") is None:
        values["run_dir"] = f"runs/{path.stem}"
    return validate(RunConfig, values, str(path))


def _config_file(path: Path) -> Path:
    if path.is_file():
        return path
    shipped = shipped_configs()
    if path.suffix in ("", ".yaml") and path.parent in (Path(), Path("configs")) and path.stem in shipped:
        return shipped[path.stem]
    here = [other.name for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a config file in it, or a shipped config.")
    raise ConfigError(f"There is no config file {path}{nearest(path.name, sorted({*here, *shipped}))}.")


def with_index_settings(config: RunConfig, overrides: Iterable[str]) -> IndexConfig:
    """Return the index settings of a run with `index.key=value` overrides; raises ConfigError for any other key."""
    overrides = list(overrides)
    for name in parse_overrides(overrides):
        if not name.startswith("index."):
            known = [f"index.{field}" for field in IndexConfig.model_fields]
            hint = nearest(f"index.{name}", known) if f"index.{name}" in known else ""
            raise ConfigError(
                f"{name} is not an index setting{hint}, and the run is trained already: override index settings only, "
                "such as index.target_recall=0.95."
            )
    return validate(RunConfig, apply_overrides(as_values(config), overrides), "index settings").index


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Return `["a.b=1"]` as {"a.b": 1}; the values are read as YAML."""
    if isinstance(overrides, str | Mapping):
        raise ConfigError(f"Overrides are {overrides!r}: give a list of key=value, such as ['train.epochs=3'].")
    parsed = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ConfigError(f"{override!r} is not an override: write key=value, such as train.epochs=3.")
        parsed[name] = parse_yaml(text, f"The value of {name}")
    return parsed


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `values` with each `key.part=value` set; list elements are named by index or by `name`."""
    result = json.loads(json.dumps(values, default=str))
    for name, value in parse_overrides(overrides).items():
        *parents, last = name.split(".")
        place = result
        for part in parents:
            place = _child(place, part, name)
        place[_index(place, last, name) if isinstance(place, list) else last] = value
    return result


def _child(place: Any, part: str, name: str) -> Any:
    """Return the group or list at `part`; a group that lacks it gets an empty group."""
    if isinstance(place, list):
        child = place[_index(place, part, name)]
    else:
        if place.get(part) is None:
            place[part] = {}
        child = place[part]
    if not isinstance(child, dict | list):
        raise ConfigError(f"{name}: {part!r} is {child!r}, which has no parts to set.")
    return child


def _index(elements: list[Any], part: str, name: str) -> int:
    if part.isdigit() and int(part) < len(elements):
        return int(part)
    names = [element.get("name") for element in elements if isinstance(element, dict)]
    if part in names:
        return names.index(part)
    raise ConfigError(f"{name}: no element {part!r} in a list of {len(elements)}{nearest(part, filter(None, names))}.")
