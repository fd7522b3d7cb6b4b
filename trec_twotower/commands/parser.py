"""The subcommands of the command line and their options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from trec_twotower import __version__
from trec_twotower.errors import ConfigError, nearest

EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 a mistake in the call or the config, 3 a mistake in the data, 128 + the signal "
    "when stopped by one (130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM; training has then saved, see RUN/status.json)."
)
ON_RANKS = ("train", "export", "evaluate", "recommend")  # subcommands that several ranks may run together
Command = Callable[[argparse.Namespace], int]


class CallError(ConfigError):
    """A mistake in the command line; the message begins with the command."""


class Parser(argparse.ArgumentParser):
    """Raises CallError for a mistake in the call."""

    def error(self, message: str) -> NoReturn:
        option = re.search(r"argument (--[\w-]+).*: expected (one|at least one) argument", message)
        if option:
            message += f" (write a value that begins with - as {option[1]}=-VALUE)"
        raise CallError(f"{self.prog}: {message}: `{self.prog} --help` shows how it is called.")

    def refuse_unknown(self, words: list[str]) -> NoReturn:
        """Raise CallError for arguments that the subcommand does not know, with the option most like the first."""
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        first = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
        self.error(f"unrecognized arguments: {' '.join(words)}{'' if first is None else nearest(first, known)}")


def build_parser(commands: Mapping[str, Command]) -> Parser:
    """Return the parser; `commands` are the functions that run the subcommands, by name."""
    parser = Parser(
        prog="trec-twotower",
        description="Train and serve two-tower recommenders on TorchRec: Parquet in, recommendations out.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"trec-twotower {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (text, add_options) in SUBCOMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EPILOG)
        sub.set_defaults(run=commands[name], parser=sub)
        add_options(sub)
    return parser


def _overrides(sub: argparse.ArgumentParser, text: str) -> None:
    sub.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=text)


def _run_and_checkpoint(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_dir", metavar="RUN", type=Path, help="a run folder, made by train")
    sub.add_argument("--checkpoint", default="best", metavar="WHICH", help="best (default), newest, or a step")


def _demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--ranks", type=int, help="processes that train together (default 1; 2 with two or more GPUs)")
    sub.add_argument("--dir", type=Path, default=Path("."), help="where data/demo and runs/demo go (default: here)")


def _prepare(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "source",
        metavar="SOURCE",
        help="synthetic, gowalla, amazon-beauty, amazon-reviews, movielens, goodbooks or events",
    )
    sub.add_argument("--out", type=Path, required=True, metavar="DATASET", help="the folder to make")
    sub.add_argument("--overwrite", action="store_true", help="replace a dataset that is there")
    _overrides(sub, "options of the source, such as rows=1000000")


def _init(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("dataset", metavar="DATASET", help="a dataset folder, written by prepare, or its URL")
    sub.add_argument("--out", type=Path, metavar="FILE", help="the config to write (default: DATASET's name + .yaml)")
    sub.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def _config(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "config", type=Path, metavar="CONFIG", help="a YAML file, or the name of a shipped config, such as gowalla"
    )


def _train(sub: argparse.ArgumentParser) -> None:
    _config(sub)
    _overrides(sub, "settings to change, such as train.epochs=3")
    sub.add_argument(
        "--init-from", type=Path, metavar="RUN", help="a run whose weights a new run begins with, where they fit"
    )


def _export(sub: argparse.ArgumentParser) -> None:
    _run_and_checkpoint(sub)
    sub.add_argument(
        "--encoder", action="store_true", help="instead the towers, to encode rows elsewhere, under RUN/encoder"
    )
    sub.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME", help="columns of items/ to write next to the items' vectors"
    )
    sub.add_argument("--users", metavar="PART", help="whose users: test, valid or serving (default: the first of them)")


def _index(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_dir", metavar="RUN", type=Path, help="a run folder with an export")
    _overrides(sub, "such as index.target_recall=0.95, for this index")


def _evaluate(sub: argparse.ArgumentParser) -> None:
    _run_and_checkpoint(sub)
    sub.add_argument("--split", default="test", help="the part of the dataset to evaluate (default test)")
    sub.add_argument("--index", action="store_true", help="also through the tuned index")
    sub.add_argument(
        "--slice", action="append", default=[], metavar="NAME", help="also report metrics by user.COLUMN or item.COLUMN"
    )
    sub.add_argument(
        "--sampled",
        type=int,
        metavar="N",
        help="also metrics over N drawn items in place of the catalogue, as papers do",
    )
    sub.add_argument(
        "--same",
        metavar="COLUMN",
        help="with --sampled: also of items with the same value of this column, such as the category",
    )
    sub.add_argument("--rankings", type=Path, metavar="FILE", help="also write user_id, item_ids as Parquet")


def _recommend(sub: argparse.ArgumentParser) -> None:
    _run_and_checkpoint(sub)
    sub.add_argument("--user", required=True, action="append", metavar="ID", help="a user_id; may be repeated")
    sub.add_argument("--k", type=int, default=10, help="how many items (default 10)")
    sub.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="only items with this value; may be repeated",
    )
    sub.add_argument("--without", action="append", default=[], metavar="ID", help="not this item; may be repeated")


def _serve(sub: argparse.ArgumentParser) -> None:
    _run_and_checkpoint(sub)
    sub.add_argument("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1)")
    sub.add_argument("--port", type=int, default=8000, help="and the port (default 8000; 0: any that is free)")
    sub.add_argument("--max-k", type=int, default=1000, help="the most items a request may ask for (default 1000)")
    sub.add_argument(
        "--reload-s", type=float, default=10.0, help="seconds between checks for a new index; 0: none (default 10)"
    )
    sub.add_argument(
        "--mapped", action="store_true", help="memory-map the index, to share it between processes of this host"
    )


def _report(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_dir", metavar="RUN", type=Path, help="a run folder, made by train")
    sub.add_argument("--colour", metavar="COLUMN", help="of items/, for the map (default: the first category)")


def _plan(sub: argparse.ArgumentParser) -> None:
    _config(sub)
    sub.add_argument("--ranks", type=int, required=True, metavar="N", help="the number of ranks to plan for")
    sub.add_argument("--gpu-gb", type=float, metavar="GB", help="for GPUs of so much memory (default: those here)")
    _overrides(sub, "settings to change, such as data.batch_size=8192")


def _features(sub: argparse.ArgumentParser) -> None:
    _config(sub)
    _overrides(sub, "settings to change, such as data.batch_size=8192")


def _launch(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--ranks", metavar="N", help="ranks on this machine (default: one per GPU, else 1)")
    sub.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...", help=f"{', '.join(ON_RANKS)}, and its arguments"
    )


def _nothing(sub: argparse.ArgumentParser) -> None:
    pass


# Each subcommand with its line of help and what adds its options.
SUBCOMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": ("run the whole chain on a generated dataset", _demo),
    "prepare": ("turn raw files into a dataset folder", _prepare),
    "init": ("write a starter config for a dataset, with a feature for each column", _init),
    "train": ("train the towers of a config, or resume an interrupted run", _train),
    "export": ("write item and user vectors to Parquet, under RUN/export", _export),
    "index": ("build a FAISS index of the exported items, tuned against exact search, under RUN/index", _index),
    "evaluate": ("measure metrics over the whole catalogue, next to the baselines", _evaluate),
    "recommend": ("print the best items for users, with their recent history", _recommend),
    "serve": ("answer recommendation requests over HTTP", _serve),
    "report": ("write an HTML report of the run", _report),
    "plan": ("show which rank would hold which part of which table, and its memory", _plan),
    "features": ("show how well tables fit the data: nulls, unknown and new ids, collisions", _features),
    "launch": ("start a subcommand on several ranks of this machine, or of several machines", _launch),
    "doctor": ("check the installation, and print the command that fixes each problem", _nothing),
}
