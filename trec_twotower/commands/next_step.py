"""The line `Next: ...` at the end of a stage: the command that follows, for this dataset or run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VARIABLE = "TREC_TT_NEXT"  # 0 in the environment: no such lines, as in the stages of `demo`
PREFIX = "Next: "
# Shipped configs that fit what a source writes; other sources need one of their own, by `init`.
CONFIG_OF_SOURCE = {
    "synthetic": "demo",
    "gowalla": "gowalla",
    "amazon-beauty": "amazon_beauty",
    "movielens": "movielens",
    "goodbooks": "goodbooks",
}


def print_next(*commands: Sequence[object]) -> None:
    """Print the subcommands that may follow, one per line, each with its arguments as separate words."""
    if os.environ.get(VARIABLE) == "0":
        return
    for number, words in enumerate(commands):
        lead = PREFIX if number == 0 else " " * len(PREFIX)
        print(lead + shlex.join(["trec-twotower", *map(str, words)]), flush=True)


def on_ranks(num_ranks: int, *words: object) -> list[object]:
    """Return the words of a subcommand that runs on that many ranks, as the stage before it did."""
    return [*words] if num_ranks == 1 else ["launch", "--ranks", num_ranks, *words]


def after_prepare(source: str, out: Path, options: Mapping[str, Any]) -> None:
    """Print how to train on a dataset: by the shipped config of its source, else by a starter config."""
    config = CONFIG_OF_SOURCE.get(source)
    if source == "amazon-reviews" and options.get("category") == "Books":
        config = "amazon_books"
    if config is None:
        print_next(["init", out])
        return
    from trec_twotower.config.loading import read_yaml
    from trec_twotower.storage.package_files import shipped_configs

    is_its_own = read_yaml(shipped_configs()[config])["data"]["dataset"] == str(out)
    overrides = [] if is_its_own else [f"data.dataset={out}", f"run_dir={Path('runs') / out.resolve().name}"]
    print_next(["train", config, *overrides])


def after_index(run: Path, part: str | None, user: Any) -> None:
    """Print how to evaluate and use a run with an index; `part` is that of the exported users, `user` one of them."""
    commands: list[list[object]] = []
    if part in ("test", "valid"):
        commands.append(["evaluate", run, "--index", *(["--split", part] if part == "valid" else [])])
    if user is not None:
        is_option = str(user).startswith("-")
        commands.append(["recommend", run, *([f"--user={user}"] if is_option else ["--user", user])])
    print_next(*commands, ["serve", run])
