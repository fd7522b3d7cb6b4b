"""Write docs/configuration.md and docs/cli.md from the settings and the command line of the package.

    python docs/site/generate_reference.py            # writes both pages
    python docs/site/generate_reference.py --check    # exits with 1 if a page is out of date

The meaning of a setting is the `description` of its field, or the comment at it: on its line, or directly above it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import json
import re
import sys
import tokenize
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trec_twotower.cli import COMMANDS
from trec_twotower.commands.parser import EPILOG, ON_RANKS, SUBCOMMANDS, Parser, build_parser
from trec_twotower.config.base import KindSettings
from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.losses import LossConfig
from trec_twotower.config.model import EncoderSpec
from trec_twotower.config.run_config import RunConfig
from trec_twotower.data.sources import SOURCES

DOCS = Path(__file__).resolve().parent.parent
COMMAND = "python docs/site/generate_reference.py"
NOTICE = f"<!-- Written by `{COMMAND}`: edit the comments in the source, then run it again. -->"
# Each family of kinds: the heading of its section, the words before a kind, and what to read first.
FAMILIES: dict[type[KindSettings], tuple[str, str, str]] = {
    FeatureSpec: (
        "user and item",
        "feature",
        "Each is a list of features, one per input of the tower. [features.md](features.md) explains the kinds. An "
        "override names a feature: `item.price.normalize=zscore`.",
    ),
    EncoderSpec: (
        "user.NAME.encoder",
        "encoder",
        "The encoder of a feature of kind `sequence`; `mean` without settings. [towers.md](towers.md) compares them.",
    ),
    LossConfig: (
        "loss",
        "loss",
        "`loss.kind` is `softmax` by default. [losses.md](losses.md) explains the kinds, "
        "[negatives.md](negatives.md) the negatives.",
    ),
}

LABELS: dict[type, str] = {FeatureSpec: "features", EncoderSpec: "encoder"}  # texts of links that are not the heading

CONFIG_HEAD = f"""# Configuration

{NOTICE}

This page lists every key of a config file with its type, default and meaning. A config is YAML 1.2. `trec-twotower
init` writes one for a dataset, and `configs/` has one for each public dataset. Any key can be set on the command line
by its path:

    trec-twotower train demo train.epochs=3 item.price.normalize=zscore data.follow.poll_s=5

An unknown key stops the command, which names the nearest known key. The run directory has the resolved config with all
defaults in `config.yaml`.

"required" in the column *default* means that the key has no default. Where the default is `null`, the key is not set.
"""
CLI_HEAD = f"""# Command line

{NOTICE}

This page lists every command with its arguments, and the options of every source of `prepare`. `trec-twotower COMMAND
--help` prints the arguments. `key=value` arguments of other commands than `prepare` change keys of the
[configuration](configuration.md).

{EPILOG}
"""


# ---------------------------------------------------------------- comments at fields


@cache
def comments_of(path: Path) -> dict[str, dict[str, str]]:
    """Return the comments at the annotated fields of a module, by class and field."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }

    def is_alone(number: int) -> bool:
        return number in comments and lines[number - 1].lstrip().startswith("#")

    found: dict[str, dict[str, str]] = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef):
            continue
        for field in node.body:
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            first = field.lineno
            while is_alone(first - 1):
                first -= 1
            text = " ".join(comments[n] for n in range(first, (field.end_lineno or first) + 1) if n in comments)
            if text:
                found.setdefault(node.name, {})[field.target.id] = text
    return found


def meaning_of(model: type[BaseModel], name: str) -> str:
    """Return the description of a field, or the comment at it, where it was declared last with one; empty without."""
    for each in model.__mro__:
        if each in (BaseModel, object) or name not in inspect.get_annotations(each):
            continue
        text = each.model_fields[name].description
        if not text and (path := inspect.getsourcefile(each)):
            text = comments_of(Path(path)).get(each.__name__, {}).get(name)
        if text:
            return text
    return ""


def summary_of(group: type[BaseModel]) -> str:
    """Return the docstring of a class as one paragraph; empty if it has none of its own."""
    return " ".join((group.__dict__.get("__doc__") or "").split())


# ---------------------------------------------------------------- types and defaults


def bounds_of(metadata: Any) -> dict[str, Any]:
    """Return the bounds in the metadata of an annotation: gt, ge, lt, le."""
    found: dict[str, Any] = {}
    for each in metadata:
        parts = each.metadata if isinstance(each, FieldInfo) else [each]
        for part in parts:
            for key in ("gt", "ge", "lt", "le"):
                if isinstance(part, annotated_types.BaseMetadata) and getattr(part, key, None) is not None:
                    found[key] = getattr(part, key)
    return found


def number_text(kind: type, bounds: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return f"2^{value.bit_length() - 1}" if isinstance(value, int) and value >= 1 << 32 else f"{value:,}"

    if kind is int and "gt" in bounds:
        bounds = {**bounds, "ge": bounds["gt"] + 1}
        del bounds["gt"]
    low = f"above {shown(bounds['gt'])}" if "gt" in bounds else f"from {shown(bounds['ge'])}" if "ge" in bounds else ""
    high = f"below {shown(bounds['lt'])}" if "lt" in bounds else f"to {shown(bounds['le'])}" if "le" in bounds else ""
    limits = ", ".join(part for part in (low, high) if part) if "lt" in bounds else f"{low} {high}".strip()
    return f"{'integer' if kind is int else 'number'} {limits}".strip()


def type_text(annotation: Any, metadata: Any = (), groups: dict[type, str] | None = None) -> str:
    """Return a type as readers of a config know it; `groups` are the headings of groups of settings."""
    origin, args = get_origin(annotation), get_args(annotation)

    def inner(each: Any) -> str:
        return type_text(each, (), groups)

    if origin is Annotated:
        return type_text(args[0], [*metadata, *args[1:]], groups)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(each, metadata, groups) for each in args if each is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{str(each).lower() if isinstance(each, bool) else each}`" for each in args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"list of {inner(args[0])}"
        return f"list of {len(args)}: {inner(args[0])}"
    if origin is dict:
        keys = inner(args[0]) if get_origin(args[0]) is Literal else "names"
        return f"mapping of {keys} to {inner(args[1])}"
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return number_text(annotation, bounds_of(metadata))
    if annotation is str:
        return "text"
    if annotation is Path:
        return "path"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return link(groups[annotation], LABELS.get(annotation)) if groups else "group"
    raise TypeError(f"There is no name for the type {annotation!r}: add it to type_text.")


def default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        kind = getattr(value, "kind", None)
        return f"kind `{kind}`" if kind else "its defaults"
    if isinstance(value, Path | str):
        return f"`{value}`"
    if isinstance(value, bool) or value is None:
        return f"`{json.dumps(value)}`"
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    if isinstance(value, float) and 0 < value < 1e-3:
        return f"{value:g}"
    if isinstance(value, int | float):
        return str(value)
    return f"`{json.dumps(value)}`".replace('"', "")


# ---------------------------------------------------------------- markdown


def link(heading: str, label: str | None = None) -> str:
    slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    return f"[{label or heading}](#{slug})"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def keys_table(model: type[BaseModel], names: list[str], groups: dict[type, str] | None = None) -> str:
    rows = []
    for name in names:
        field = model.model_fields[name]
        group = next(iter(groups_in(field.annotation)), None)
        meaning = meaning_of(model, name) or (summary_of(group) if group else "")
        rows.append((f"`{name}`", type_text(field.annotation, field.metadata, groups), default_text(field), meaning))
    return table(("key", "type", "default", "meaning"), rows)


# ---------------------------------------------------------------- configuration.md


def groups_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the groups of settings in an annotation, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [group for part in get_args(annotation) for group in groups_in(part)]


def walk(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield every group of settings below `model` with its path, outer ones first."""
    members = model.members() if model in FAMILIES else [model]
    for member in members:
        for name, field in member.model_fields.items():
            for group in groups_in(field.annotation):
                is_named = get_origin(field.annotation) in (dict, tuple)
                place = f"{path}{name}{'.NAME' if is_named else ''}"
                yield place, group
                yield from walk(group, f"{place}.")


def all_groups() -> dict[type[BaseModel], list[str]]:
    """Return all groups of settings, each with the paths under which a config has it."""
    found: dict[type[BaseModel], list[str]] = {}
    for path, group in walk(RunConfig):
        if path not in found.setdefault(group, []):
            found[group].append(path)
    return found


def kind_title(member: type[KindSettings]) -> str:
    kind, _, variant = member.title().partition("|")
    return f"{kind} with {variant}" if variant else kind


def kind_summary(member: type[KindSettings]) -> str:
    """Return the docstring of a kind, or the comment at its field `kind`, as sentences."""
    if summary := summary_of(member):
        return summary
    comment = meaning_of(member, "kind")
    return f"{comment[0].upper()}{comment[1:]}." if comment else ""


def shared_names(family: type[KindSettings]) -> list[str]:
    """Return the keys that all kinds of a family have with one type, default and meaning."""
    members = family.members()
    first = members[0].model_fields

    def row(member: type[KindSettings], name: str) -> tuple[str, ...]:
        field = member.model_fields[name]
        return repr(field.annotation), repr(field.metadata), default_text(field), meaning_of(member, name)

    return [
        name
        for name in first
        if name != "kind"
        and all(name in member.model_fields and row(member, name) == row(members[0], name) for member in members)
    ]


def family_section(family: type[KindSettings], level: str, groups: dict[type, str]) -> list[str]:
    heading, word, text = FAMILIES[family]
    shared = shared_names(family)
    parts = [f"{level} {heading}", text]
    if shared:
        parts += [f"Keys of every {word}:", keys_table(family.members()[0], shared, groups)]
    for member in family.members():
        names = [name for name in member.model_fields if name not in (*shared, "kind")]
        parts.append(f"{level}# {word} {kind_title(member)}")
        kind = f"`kind: {member.title().partition('|')[0]}`"
        condition = f" with `{member.variant}`" if member.variant else ""
        parts.append(f"{kind}{condition}. {kind_summary(member)}")
        parts.append(keys_table(member, names, groups) if names else "No further keys.")
    return parts


def headings(found: dict[type[BaseModel], list[str]]) -> dict[type, str]:
    """Return the heading of each group's section."""
    names = {group: " and ".join(paths) for group, paths in found.items()}
    return {**names, **{family: heading for family, (heading, _, _) in FAMILIES.items()}}


def configuration() -> str:
    """Return the page of all keys."""
    found = all_groups()
    groups = headings(found)
    parts = [CONFIG_HEAD.strip(), "## Sections", keys_table(RunConfig, list(RunConfig.model_fields), groups)]
    for group, paths in found.items():
        level = "##" if "." not in paths[0].removesuffix(".NAME") else "###"
        if group in FAMILIES:
            parts += family_section(group, level, groups)
            continue
        parts.append(f"{level} {groups[group]}")
        if summary := summary_of(group):
            parts.append(summary)
        parts.append(keys_table(group, list(group.model_fields), groups))
    return "\n\n".join(parts) + "\n"


def keys_without_meaning() -> list[str]:
    """Return the keys and kinds of configs, and the options of sources, at which the source has no comment."""
    models: list[tuple[str, type[BaseModel]]] = [("", RunConfig)]
    for group, paths in all_groups().items():
        members = group.members() if group in FAMILIES else [group]
        models += [(f"{paths[0]}.", member) for member in members]
    models += [(f"prepare {name}: ", source.options) for name, source in SOURCES.items()]
    missing = [
        f"{path}{name} ({model.__name__})"
        for path, model in models
        for name, field in model.model_fields.items()
        if name != "kind" and not (meaning_of(model, name) or any(map(summary_of, groups_in(field.annotation))))
    ]
    kinds = [member for family in FAMILIES for member in family.members()]
    return [*missing, *(f"kind ({member.__name__})" for member in kinds if not kind_summary(member))]


# ---------------------------------------------------------------- cli.md


def subparsers(parser: Parser) -> dict[str, argparse.ArgumentParser]:
    [action] = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    return action.choices


def value_name(action: argparse.Action) -> str:
    return str(action.metavar or action.dest.upper())


def argument_text(action: argparse.Action) -> str:
    if not action.option_strings:
        return value_name(action)
    if action.nargs == 0:
        return ", ".join(action.option_strings)
    more = " ..." if action.nargs == "+" else ""
    return f"{', '.join(action.option_strings)} {value_name(action)}{more}"


def usage(name: str, actions: list[argparse.Action]) -> str:
    words = ["trec-twotower", name]

    def place(action: argparse.Action) -> int:
        if action.nargs == argparse.REMAINDER:
            return 2
        return 1 if action.option_strings else 0

    for action in sorted(actions, key=place):
        text = argument_text(action)
        if action.nargs == "*":
            text = f"[{text} ...]"
        elif action.option_strings and not action.required:
            text = f"[{text}]"
        words.append(text)
    return " ".join(words)


def argument_rows(actions: list[argparse.Action]) -> list[tuple[str, ...]]:
    rows = []
    for action in actions:
        text = action.help or ""
        if action.required and action.option_strings:
            text += " (required)"
        rows.append((f"`{argument_text(action)}`", text.strip()))
    return rows


def sentence(text: str) -> str:
    """Return a line of help as a sentence; names of files keep their first letter."""
    is_word = text.split()[0].isalpha()
    return f"{text[0].upper() if is_word else text[0]}{text[1:]}."


def command_section(name: str, parser: argparse.ArgumentParser) -> list[str]:
    actions = [each for each in parser._actions if not isinstance(each, argparse._HelpAction)]
    help_text = SUBCOMMANDS[name].help
    parts = [f"## {name}", sentence(help_text), f"    {usage(name, actions)}"]
    if name in ON_RANKS:
        parts.append(f"Runs on several ranks by `trec-twotower launch --ranks N {name} ...`.")
    if actions:
        parts.append(table(("argument", "meaning"), argument_rows(actions)))
    return parts


def source_sections() -> list[str]:
    parts = [
        "## Options of prepare",
        "Options are `key=value` arguments after the source. [data.md](data.md) explains them. A value is YAML: "
        "`context=[channel,device]`, `dedupe=true`; `types.zip=text` sets one key of a mapping.",
    ]
    for name, source in SOURCES.items():
        options = source.options
        parts += [
            f"### prepare {name}",
            sentence(source.help),
            keys_table(options, list(options.model_fields)).replace("| key |", "| option |", 1),
        ]
    return parts


def command_line() -> str:
    """Return the page of all commands."""
    parsers = subparsers(build_parser(COMMANDS))
    rows = [(f"[{name}](#{name})", SUBCOMMANDS[name].help) for name in parsers]
    parts = [CLI_HEAD.strip(), table(("command", "does"), rows)]
    for name, parser in parsers.items():
        parts += command_section(name, parser)
    return "\n\n".join([*parts, *source_sections()]) + "\n"


PAGES = {"configuration.md": configuration, "cli.md": command_line}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    is_check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not is_check:
            path.write_text(text, encoding="utf-8")
    if is_check and stale:
        print(f"{', '.join(stale)} out of date: run `{COMMAND}`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
