"""The subcommands of the command line and their options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from trec_twotower import __version__
from trec_twotower.data.sources import SOURCES
from trec_twotower.errors import ConfigError, nearest

ON_RANKS = ("train", "export", "evaluate", "recommend", "compare")  # subcommands that several ranks may run together
SHELLS = ("bash", "zsh", "fish")
USAGE = "usage: trec-twotower [-h] [--version] COMMAND ..."
PURPOSE = """Train and serve two-tower recommenders on TorchRec. The usual order of the commands:
  prepare -> init -> train -> export -> index -> evaluate -> recommend | serve"""
EPILOG = """On several ranks: trec-twotower launch --ranks N COMMAND ..., or torchrun -m trec_twotower COMMAND ...
`trec-twotower COMMAND --help` lists the options of a command, with examples.

Exit codes: 0 done, 1 failed, 2 a mistake in the call or the config, 3 a mistake in the data, 128 + the signal
when stopped by one (130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM; training has then saved, see RUN/status.json).
"""
Command = Callable[[argparse.Namespace], int]
AddOptions = Callable[[argparse.ArgumentParser], None]


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


class RootParser(Parser):
    """The parser of the whole command line; its help lists the subcommands by group."""

    def format_help(self) -> str:
        lines = [USAGE, "", PURPOSE]
        group = None
        for name, command in SUBCOMMANDS.items():
            if command.group != group:
                group = command.group
                lines += ["", group]
            lines.append(f"  {name:<11}{command.help}")
        return "\n".join([*lines, "", EPILOG])


class _PrepareHelp(argparse.Action):
    """`prepare --help` prints the sources, `prepare SOURCE --help` the options of one of them."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> NoReturn:
        source = getattr(namespace, "source", None)
        if source in SOURCES:
            from trec_twotower.commands.source_help import source_help

            print(source_help(SOURCES[source]))
        elif source is not None:
            raise ConfigError(f"There is no source {source!r}{nearest(source, SOURCES)}.")
        else:
            parser.print_help()
        parser.exit()


def build_parser(commands: Mapping[str, Command]) -> Parser:
    """Return the parser; `commands` are the functions that run the subcommands, by name."""
    parser = RootParser(prog="trec-twotower")
    parser.add_argument("--version", action="version", version=f"trec-twotower {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, command in SUBCOMMANDS.items():
        sub = subparsers.add_parser(
            name,
            help=command.help,
            description=command.about or command.help[0].upper() + command.help[1:] + ".",
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=name != "prepare",
        )
        if name == "prepare":
            sub.add_argument("-h", "--help", action=_PrepareHelp, help="show this message, or the options of SOURCE")
        sub.set_defaults(run=commands[name], parser=sub)
        command.add_options(sub)
    return parser


def _overrides(sub: argparse.ArgumentParser, text: str) -> None:
    sub.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=text)


def _run(sub: argparse.ArgumentParser, text: str = "a run directory, written by train") -> None:
    sub.add_argument("run_dir", metavar="RUN", type=Path, help=text)


def _checkpoint(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--checkpoint", default="best", metavar="WHICH", help="best, newest, or the number of a step (default: best)"
    )


def _run_and_checkpoint(sub: argparse.ArgumentParser) -> None:
    _run(sub)
    _checkpoint(sub)


def _demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--ranks", type=int, metavar="N", help="processes that train together (default: 1; 2 with two or more GPUs)"
    )
    sub.add_argument(
        "--dir", type=Path, default=Path("."), metavar="FOLDER", help="where data/demo and runs/demo go (default: here)"
    )


def _prepare(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("source", metavar="SOURCE", help="one of the sources below")
    sub.add_argument("--out", type=Path, required=True, metavar="DATASET", help="the dataset directory to write")
    sub.add_argument("--overwrite", action="store_true", help="replace a dataset that exists")
    _overrides(sub, "options of the source; `trec-twotower prepare SOURCE --help` lists them with their defaults")


def _init(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("dataset", metavar="DATASET", help="a dataset directory, written by prepare, or its URL")
    sub.add_argument("--out", type=Path, metavar="FILE", help="the config to write (default: DATASET's name + .yaml)")
    sub.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def _config(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "config", type=Path, metavar="CONFIG", help="a YAML file, or the name of a shipped config, such as gowalla"
    )


def _train(sub: argparse.ArgumentParser) -> None:
    _config(sub)
    _overrides(sub, "settings to change, such as train.epochs=3 or item.price.normalize=zscore")
    sub.add_argument(
        "--init-from",
        type=Path,
        metavar="RUN",
        help="start a new run from the weights of another, where they fit, as for retraining on new data",
    )


def _export(sub: argparse.ArgumentParser) -> None:
    _run_and_checkpoint(sub)
    sub.add_argument(
        "--encoder", action="store_true", help="write the towers to RUN/encoder instead, to encode rows elsewhere"
    )
    sub.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME", help="columns of items/ to write next to the items' vectors"
    )
    sub.add_argument(
        "--users", metavar="PART", help="whose users: test, valid or serving (default: the first that exists)"
    )


def _index(sub: argparse.ArgumentParser) -> None:
    _run(sub, "a run directory with an export")
    _overrides(sub, "settings of this index, such as index.target_recall=0.95 or index.memory_gb=1")


def _slices(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--slice",
        action="append",
        default=[],
        metavar="NAME",
        help="also report metrics by user.COLUMN or item.COLUMN; may be repeated",
    )


def _evaluate(sub: argparse.ArgumentParser) -> None:
    _run_and_checkpoint(sub)
    sub.add_argument("--split", default="test", help="the part of the dataset to evaluate (default: test)")
    sub.add_argument("--index", action="store_true", help="also evaluate through the index, and report what it loses")
    _slices(sub)
    sub.add_argument(
        "--sampled",
        type=int,
        metavar="N",
        help="also rank each positive among N sampled items; not comparable with metrics over the catalogue",
    )
    sub.add_argument(
        "--same", metavar="COLUMN", help="with --sampled: also among items with the same value of this column"
    )
    sub.add_argument(
        "--rankings", type=Path, metavar="FILE", help="write each user's items to Parquet (user_id, item_ids)"
    )


def _compare(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_a", metavar="RUN_A", type=Path, help="the run that is compared against")
    sub.add_argument("run_b", metavar="RUN_B", type=Path, help="the run whose differences are reported: B - A")
    _checkpoint(sub)
    sub.add_argument("--split", default="test", help="the part of the dataset to evaluate (default: test)")
    sub.add_argument("--k", type=int, default=20, metavar="N", help="length of the rankings (default: 20)")
    _slices(sub)
    sub.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")


def _recommend(sub: argparse.ArgumentParser) -> None:
    _run_and_checkpoint(sub)
    sub.add_argument("--user", default=[], action="append", metavar="ID", help="a user_id; may be repeated")
    sub.add_argument("--all", action="store_true", help="all users of the dataset, written to --out")
    sub.add_argument(
        "--out", type=Path, metavar="FILE", help="with --all: the Parquet file to write (user_id, item_ids, scores)"
    )
    sub.add_argument("--overwrite", action="store_true", help="with --all: replace the file if it exists")
    sub.add_argument("--k", type=int, default=10, metavar="N", help="number of items per user (default: 10)")
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
    sub.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)")
    sub.add_argument("--port", type=int, default=8000, metavar="N", help="the port; 0: any free one (default: 8000)")
    sub.add_argument(
        "--max-k", type=int, default=1000, metavar="N", help="most items that a request may ask for (default: 1000)"
    )
    sub.add_argument(
        "--reload-s",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="time between checks for a new index; 0: never (default: 10)",
    )
    sub.add_argument(
        "--mapped", action="store_true", help="memory-map the index, to share it between processes of this host"
    )


def _report(sub: argparse.ArgumentParser) -> None:
    _run(sub)
    sub.add_argument(
        "--colour", metavar="COLUMN", help="column of items/ that colours the map (default: the first category)"
    )


def _plan(sub: argparse.ArgumentParser) -> None:
    _config(sub)
    sub.add_argument("--ranks", type=int, required=True, metavar="N", help="number of ranks to plan for")
    sub.add_argument("--gpu-gb", type=float, metavar="GB", help="memory of a GPU (default: that of the GPUs here)")
    _overrides(sub, "settings to change, such as tables.item.sharding=column_wise")


def _features(sub: argparse.ArgumentParser) -> None:
    _config(sub)
    _overrides(sub, "settings to change, such as tables.item.buckets=100000")


def _launch(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--ranks", metavar="N", help="ranks on this machine (default: one per GPU, else 1)")
    sub.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...", help=f"{', '.join(ON_RANKS)}, and its arguments"
    )


def _completion(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("shell", metavar="SHELL", help=", ".join(SHELLS))


def _nothing(sub: argparse.ArgumentParser) -> None:
    pass


@dataclass(frozen=True)
class Subcommand:
    """One subcommand: its group and line in the list of all, its options, and the end of its help."""

    group: str
    help: str
    add_options: AddOptions
    epilog: str = ""
    about: str = ""  # description; default: the line in the list as a sentence


def _examples(*lines: str) -> str:
    return "\n".join(["examples:", *(f"  trec-twotower {line}" for line in lines)])


DATA, TRAINING, RUNS, MACHINE = "Data", "Training", "Using a run", "Machine"

SUBCOMMANDS: dict[str, Subcommand] = {
    "prepare": Subcommand(
        DATA,
        "turn raw files (CSV, Parquet, JSON lines, public sets) into a dataset directory",
        _prepare,
        "\n".join(
            [
                "sources:",
                *(f"  {source.name:<16}{source.help}" for source in SOURCES.values()),
                "",
                _examples(
                    "prepare events --out data/shop events=orders.csv user=customer item=sku timestamp=ordered_at",
                    "prepare movielens --out data/movielens data_dir=ml-32m",
                ),
            ]
        ),
        "Turn raw files into a dataset directory: train/, valid/, test/, items/, users/.",
    ),
    "init": Subcommand(
        DATA,
        "write a starter config for a dataset, with a feature for each column",
        _init,
        _examples("init data/shop --out shop.yaml"),
    ),
    "features": Subcommand(
        DATA,
        "check features against the data: nulls, unknown and new ids, hash collisions",
        _features,
        _examples("features shop.yaml"),
    ),
    "plan": Subcommand(
        TRAINING,
        "show how tables are sharded, and the memory of each rank, without training",
        _plan,
        _examples("plan shop.yaml --ranks 8 --gpu-gb 80"),
    ),
    "train": Subcommand(
        TRAINING,
        "train the towers of a config, or resume an interrupted run",
        _train,
        _examples(
            "train shop.yaml",
            "launch --ranks 8 train shop.yaml data.batch_size=16384",
            "train shop.yaml data.dataset=data/tuesday run_dir=runs/tuesday --init-from runs/monday",
        ),
        "Train the towers of a config, or resume an interrupted run. The run directory is runs/NAME for NAME.yaml,\n"
        "or run_dir=FOLDER. Ctrl-C and SIGTERM save a checkpoint; the same command continues.",
    ),
    "launch": Subcommand(
        TRAINING,
        "start a command on several ranks of this machine, or of several machines",
        _launch,
        _examples("launch --ranks 2 train shop.yaml"),
    ),
    "export": Subcommand(
        RUNS,
        "write item and user vectors to Parquet, under RUN/export (or the towers, with --encoder)",
        _export,
        _examples("export runs/shop --columns title price", "export runs/shop --encoder"),
    ),
    "index": Subcommand(
        RUNS,
        "build a FAISS index of the exported items, tuned to a recall target, under RUN/index",
        _index,
        _examples("index runs/shop index.target_recall=0.95"),
    ),
    "evaluate": Subcommand(
        RUNS,
        "measure Recall, NDCG, MRR ... over the whole catalogue, next to baselines",
        _evaluate,
        _examples("evaluate runs/shop --index --slice item.category --rankings rankings.parquet"),
    ),
    "compare": Subcommand(
        RUNS,
        "compare two runs on the same users: differences with intervals, overlap of the lists",
        _compare,
        _examples("compare runs/monday runs/tuesday --k 20 --slice item.category"),
    ),
    "recommend": Subcommand(
        RUNS,
        "print recommendations for users, or write those for all users to Parquet",
        _recommend,
        _examples(
            "recommend runs/shop --user cust_17 --k 5 --where category=Shoes",
            "recommend runs/shop --all --out recommendations.parquet",
        ),
    ),
    "serve": Subcommand(
        RUNS,
        "answer recommendation requests over HTTP",
        _serve,
        _examples("serve runs/shop --port 8000")
        + '\n  curl -s localhost:8000/recommend -d \'{"users": ["cust_17"], "k": 3}\'',
        "Answer recommendation requests over HTTP: POST /recommend, GET /health, /version, /metrics (Prometheus).",
    ),
    "report": Subcommand(
        RUNS,
        "write RUN/report.html: curves, metrics, index, map of the items, some users",
        _report,
        _examples("report runs/shop --colour category"),
    ),
    "doctor": Subcommand(MACHINE, "check the installation, and print the command that fixes each problem", _nothing),
    "demo": Subcommand(MACHINE, "run all stages on a synthetic dataset (about a minute)", _demo),
    "completion": Subcommand(
        MACHINE,
        "print a completion script for bash, zsh or fish",
        _completion,
        "\n".join(
            [
                "to install:",
                "  trec-twotower completion bash > ~/.local/share/bash-completion/completions/trec-twotower",
                "  trec-twotower completion zsh > ~/.zfunc/_trec-twotower    # a folder of $fpath",
                "  trec-twotower completion fish > ~/.config/fish/completions/trec-twotower.fish",
            ]
        ),
    ),
}
