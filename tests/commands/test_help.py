"""Help answers at once and describes every option; completion scripts name what can be typed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from trec_twotower.cli import COMMANDS, _parsed
from trec_twotower.commands.completion import completion_script
from trec_twotower.commands.parser import SHELLS, SUBCOMMANDS, build_parser
from trec_twotower.commands.source_help import description, source_help, type_text
from trec_twotower.data.sources import SOURCES, Source
from trec_twotower.data.sources.options import SourceOptions
from trec_twotower.storage.package_files import shipped_configs

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_option_of_a_source_is_described(cli, source):
    said = cli("prepare", source.name, "--help")
    assert (said.code, said.err) == (0, "")
    lines = said.out.splitlines()
    for name, field in source.options.model_fields.items():
        [line] = [line for line in lines if line.startswith(f"  {name} ")]
        assert description(source.options, name), name
        assert not field.is_required() or " required " in line
    assert cli("prepare", source.name, "--out", "folder", "-h").out == said.out


class Options(SourceOptions):
    rows: int = 1000
    """Without a description."""
    names: tuple[str, ...] = Field((), description="names of " + "columns " * 30)
    path: str = Field(description="a file")
    keeps: bool | None = Field(True, description="whether rows are kept")


class Derived(Options):
    keeps: bool | None = False


def test_the_help_of_a_source_has_type_default_and_meaning(monkeypatch):
    monkeypatch.setattr(Source, "options", Derived)
    text = source_help(Source("planted", "", "", "a planted source"))
    lines = [line.split(maxsplit=3) for line in text.splitlines()]
    assert "trec-twotower prepare planted --out DATASET" in text and "planted: a planted source." in text
    table = lines[lines.index(["option", "type", "default", "meaning"]) + 1 :]
    assert table[0] == ["path", "text", "required", "a file"]  # the options without a default come first
    assert table[1] == ["rows", "integer", "1000"]
    assert ["keeps", "true", "or", "false     false     whether rows are kept"] in [
        [*line[:3], re.sub(" {2,}", "     ", line[3])] for line in table if len(line) > 3
    ]  # the meaning is that of the base model
    assert max(map(len, text.splitlines())) <= 110


def test_types_are_written_for_people():
    fields = SOURCES["events"].options.model_fields
    expected = {
        "rows": "event, both",
        "timestamp": "text",
        "context": "list",
        "types": "mapping",
        "header": "true or false",
        "valid_from": "time",
        "decimal": "text",
        "memory_gb": "number",
    }
    assert {name: type_text(fields[name].annotation) for name in expected} == expected


def test_the_help_of_prepare_lists_the_sources(cli):
    lines = cli("prepare", "--help").out.splitlines()
    for source in SOURCES.values():
        assert f"  {source.name:<16}{source.help}" in lines


def test_an_unknown_source_is_named(cli):
    said = cli("prepare", "movielnes", "--help")
    assert said.code == 2 and "'movielnes' (nearest: 'movielens')" in said.mistake and said.out == ""


def test_the_list_of_commands_is_complete(cli):
    said = cli("--help")
    assert said.code == 0 and SUBCOMMANDS.keys() == COMMANDS.keys()
    for name, command in SUBCOMMANDS.items():
        assert f"  {name:<11}{command.help}" in said.out.splitlines()


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_examples_of_the_help_are_calls_that_parse(name):
    """Each line `trec-twotower ...` of a help text is accepted by the parser."""
    lines = [line.strip() for line in SUBCOMMANDS[name].epilog.splitlines()]
    for line in lines:
        if line.startswith("trec-twotower "):
            words = line.partition(" > ")[0].split()[1:]
            assert _parsed(words).command == words[0]


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["prepare", "--help"]], ids=" ".join)
def test_help_imports_no_library_that_loads_slowly(words):
    code = f"""
import sys
from trec_twotower.cli import main
try:
    main({words})
except SystemExit:
    pass
print([name for name in ("torch", "numpy", "pyarrow", "duckdb", "pydantic", "shtab", "tqdm") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_help_of_a_source_reads_no_data():
    code = """
import sys
from trec_twotower.cli import main
for source in ("movielens", "gowalla", "events", "synthetic"):
    try:
        main(["prepare", source, "--help"])
    except SystemExit:
        pass
print([name for name in ("torch", "pyarrow", "numba") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------- completion


@pytest.mark.parametrize("shell", SHELLS)
def test_a_completion_script_names_commands_options_sources_and_configs(cli, shell):
    said = cli("completion", shell)
    assert (said.code, said.err) == (0, "")
    for name in (*SUBCOMMANDS, *SOURCES, *shipped_configs(), "init-from", "overwrite"):
        assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", said.out.replace("--", " ")), name


def completed(*words: str, folder: Path) -> set[str]:
    """Return what bash offers for the last word."""
    script = completion_script("bash", build_parser(COMMANDS))
    line = " ".join(f'"{word}"' for word in words)
    ask = f"""
COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
COMP_LINE="{" ".join(words)}"; COMP_POINT=${{#COMP_LINE}}
$(complete -p trec-twotower | sed 's/.*-F \\([^ ]*\\).*/\\1/') trec-twotower "${{COMP_WORDS[COMP_CWORD]}}" ""
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], {"train"}),
        (["prepare", "movi"], {"movielens"}),
        (["train", "gowalla"], {"gowalla", "gowalla_bag", "gowalla_spectral"}),
        (["train", "mi"], {"mine.yaml"}),
        (["export", "ru"], {"runs"}),
        (["compare", "runs", "--sp"], {"--split"}),
        (["completion", "z"], {"zsh"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bash_completes(tmp_path, words, offered):
    (tmp_path / "runs").mkdir()
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.txt").touch()
    found = completed("trec-twotower", *words, folder=tmp_path)
    assert found == offered


def test_an_unknown_shell_is_named(cli):
    said = cli("completion", "fsh")
    assert said.code == 2 and "'fsh' (nearest: 'fish')" in said.mistake
