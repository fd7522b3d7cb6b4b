"""`compare`: two runs on the same users."""

from __future__ import annotations

import argparse

from trec_twotower.errors import ConfigError


def run_compare(options: argparse.Namespace) -> int:
    """Run the subcommand and return its exit code."""
    if options.k < 1:
        raise ConfigError(f"--k is {options.k}: give 1 or more.")
    from trec_twotower.training.run_dir import Run

    runs = Run.open(options.run_a), Run.open(options.run_b)
    from trec_twotower.distributed.ranks import quiet_libraries, start_ranks

    quiet_libraries()
    with start_ranks() as ranks:
        from trec_twotower.evaluation.run_comparison import compare_runs, format_comparison
        from trec_twotower.storage.arrow_values import printable
        from trec_twotower.storage.atomic import write_json

        result = compare_runs(
            runs, ranks, split=options.split, k=options.k, checkpoint=options.checkpoint, slices=options.slice
        )
        if ranks.is_first:
            for line in format_comparison(result).split("\n"):  # values of the slices' columns are in it
                print(printable(line))
            if options.json is not None:
                write_json(options.json, result)
    return 0
