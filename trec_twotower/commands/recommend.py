"""`recommend`: items for some users as text, or for all users as Parquet."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from trec_twotower.errors import ConfigError, DataError

if TYPE_CHECKING:
    from trec_twotower.index import Allowed
    from trec_twotower.serving.retriever import Retriever


def run_recommend(options: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    where = _checked(options)
    from trec_twotower.distributed.ranks import quiet_libraries, start_ranks

    quiet_libraries()
    if options.all:
        from trec_twotower.serving.all_users import check_output

        check_output(options.out, overwrite=options.overwrite)  # before the model is loaded
    with start_ranks() as ranks:
        from trec_twotower.serving.retriever import Retriever

        retriever = Retriever.open(options.run_dir, ranks, options.checkpoint)
        allowed = retriever.allow(where=where, without=options.without) if where or options.without else None
        if not options.all:
            return _print_users(retriever, options, allowed)

        from trec_twotower.commands.progress import ProgressReport
        from trec_twotower.serving.all_users import write_all

        with ProgressReport("users", is_shown=ranks.is_first) as progress:
            num_users = write_all(
                retriever, options.out, options.k, allowed=allowed, overwrite=options.overwrite, progress=progress
            )
        if ranks.is_first:
            print(f"{options.out}: recommendations for {num_users:,} users, up to {options.k:,} items each")
    return 0


def _checked(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the values of --where by column; raises ConfigError for options that do not fit together."""
    if options.k < 1:
        raise ConfigError(f"--k is {options.k}: give 1 or more.")
    if options.all and options.user:
        raise ConfigError("--all is for all users and --user for some of them: give one of the two.")
    if options.all and options.out is None:
        raise ConfigError("--all writes a Parquet file: name it by --out, such as --out recommendations.parquet.")
    if not options.all and not options.user:
        raise ConfigError("No user is named: give --user ID, or --all --out FILE for all users of the dataset.")
    if not options.all and (options.out is not None or options.overwrite):
        raise ConfigError("--out and --overwrite belong to --all: add --all in place of --user, or leave them out.")
    where: dict[str, list[str]] = {}
    for each in options.where:
        column, found, value = each.partition("=")
        if not found:
            raise ConfigError(f"--where is {each!r}: give a column of the catalogue and a value, as in category=Mugs.")
        where.setdefault(column, []).append(value)
    return where


def _print_users(retriever: Retriever, options: argparse.Namespace, allowed: Allowed | None) -> int:
    from trec_twotower.storage.arrow_values import format_item, printable

    answers = retriever.recommend(options.user, options.k, allowed=allowed)
    for answer in answers if retriever.ranks.is_first else ():
        if answer.error is not None:
            print(f"trec-twotower recommend: {printable(answer.error)}", file=sys.stderr, flush=True)
            continue
        print(f"User {printable(answer.user_id)} interacted last with:")
        for about in answer.history:
            print(f"      {format_item(about)}")
        print("and is recommended:")
        for place, item in enumerate(answer.items, 1):
            print(f"  {place:>3}  {item.score:>8.4f}  {format_item(item.about)}  [{printable(item.item_id)}]")
    return 0 if any(answer.is_known for answer in answers) else DataError.exit_code
