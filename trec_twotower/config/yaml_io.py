"""YAML without its traps: what is written comes back, and what was not meant is not read into it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from trec_twotower.errors import ConfigError

MAX_YAML_VALUES = 5_000_000  # of a file, aliases written out


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core words: `no` and `NO` stay text, `1e-3` is a number, `12:30` and dates stay text."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses what aliases blow up: ten short lines of them can stand for more than any memory holds."""
        is_alias, line = self.check_event(yaml.AliasEvent), self.peek_event().start_mark.line + 1
        node: Any = super().compose_node(parent, index)
        if not is_alias:
            inside = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for each in inside for part in (each if isinstance(each, tuple) else (each,))]
            node.num_values = 1 + sum(part.num_values for part in parts)
        elif not hasattr(node, "num_values"):
            raise ValueError(f"line {line}: an alias stands inside what it names")
        if node.num_values > MAX_YAML_VALUES:
            raise ConfigError(f"line {line}: aliases make it more than {MAX_YAML_VALUES:,} values: use fewer.")
        return node


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|nan)$",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """`010` is ten: no octal, no base 60."""
    return int(loader.construct_scalar(node).replace("_", ""))


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(
                f"line {key_node.start_mark.line + 1}: a key is itself a list or a mapping: "
                "quote text that begins with a brace or a bracket."
            )
        name = key_node.value
        if name in seen:
            raise ConfigError(
                f"line {key_node.start_mark.line + 1}: the key {name!r} stands already at line {seen[name]}: keep one."
            )
        seen[name] = key_node.start_mark.line + 1
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text; raises ConfigError naming `origin` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except ConfigError as error:
        raise ConfigError(f"{origin}, {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin} is not YAML: {error}") from None


MAX_YAML_BYTES = 64 << 20  # a longer file is none of ours, and is not read into memory


def read_yaml(path: Path, origin: Path | None = None) -> Any:
    """The value of a YAML file; raises ConfigError naming it (or `origin`) and the line."""
    origin = origin or path
    with path.open("rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise ConfigError(f"{origin} is longer than {MAX_YAML_BYTES:,} bytes: it is no file of ours.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{origin} is not UTF-8 ({error}): save it as UTF-8.") from None
    return parse_yaml(text, str(origin))


def to_yaml(value: Any) -> str:
    """YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes text by the same rules as `_Loader` reads it; floats keep every digit."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Line breaks beyond the usual one survive only as escapes, so in double quotes."""
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
_Dumper.add_representer(str, _text)
