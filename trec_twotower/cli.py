"""The command line: one subcommand per stage. Imports are inside the commands, so that --help answers at once."""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from trec_twotower.commands.next_step import after_index, after_prepare, on_ranks, print_next
from trec_twotower.commands.output import code_for_launcher, is_unread, leave, prepare_output, print_once
from trec_twotower.commands.parser import ON_RANKS, SUBCOMMANDS, CallError, build_parser
from trec_twotower.errors import ConfigError, DataError, LostRanks, Stopped, TrainingError, nearest

MAX_PLANNED_RANKS = 4096  # more, and the planner does not come back
INTERRUPTED = 130  # the customary code after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a mistake is reported in one message.

    Without `arguments` it runs the process's own command line, and ends the process with it.
    """
    if arguments is None:
        prepare_output()
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words and words[0] in SUBCOMMANDS else ""
    try:
        code = _run(words, name, is_own_process=arguments is None)
    except Exception as error:
        if _is_interrupt(error):
            code = _interrupted(name)
        elif arguments is not None:
            raise
        else:
            sys.excepthook(*sys.exc_info())
            code = 1
    if arguments is None:
        leave(code)
    return code


def _run(words: list[str], name: str, *, is_own_process: bool) -> int:
    try:
        options = _parsed(words)
        options.is_own_process = is_own_process
        return options.run(options)
    except (ConfigError, DataError, TrainingError) as error:
        message = str(error) if isinstance(error, CallError) else f"trec-twotower {name}: {error}"
        print_once(message, is_own=isinstance(error, LostRanks))
        return error.exit_code
    except Stopped as stopped:
        print_once(f"trec-twotower {name}: {stopped}")
        return code_for_launcher(stopped.exit_code)
    except KeyboardInterrupt:
        return _interrupted(name)
    except RuntimeError as error:
        from trec_twotower.distributed.watchdog import cause_of, is_lost

        if _num_ranks() < 2 or not is_lost(error):
            raise
        lost = (
            f"rank {os.environ['RANK']} lost the others ({cause_of(error)}): the first rank that ended has the cause."
        )
        print_once(f"trec-twotower {name}: {lost}", is_own=True)
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError) and is_unread(sys.stdout):  # as with `| head`
            return 128 + signal.SIGPIPE
        print_once(f"trec-twotower {name}: {error.strerror or error}: {error.filename or ''}".rstrip(": "))
        return 1


def _interrupted(name: str) -> int:
    then = "continues from the newest checkpoint" if name == "train" else "starts again"
    print_once(f"trec-twotower {name}: interrupted; the same command {then}.")
    return INTERRUPTED


def _is_interrupt(error: BaseException | None) -> bool:
    """Return whether a library turned Ctrl-C into an error of its own, as native code that calls Python does."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or "KeyboardInterrupt" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _parsed(words: list[str]) -> argparse.Namespace:
    """Return the options of a command line; raises CallError."""
    parser = build_parser(COMMANDS)
    if words and not words[0].startswith("-") and words[0] not in SUBCOMMANDS:
        parser.error(f"there is no command {words[0]!r}{nearest(words[0], SUBCOMMANDS)}")
    options, rest = parser.parse_known_args(words)
    # argparse wants all positional arguments together; key=value may stand after options as well.
    if rest and hasattr(options, "overrides") and not any(word.startswith("-") for word in rest):
        options.overrides = [*options.overrides, *rest]
    elif rest:
        options.parser.refuse_unknown(rest)
    if options.command not in ON_RANKS and _num_ranks() > 1:
        raise ConfigError(
            f"{options.command} runs in one process, but WORLD_SIZE is {_num_ranks()}: start it without a launcher "
            f"(those that run on ranks are {', '.join(ON_RANKS)})."
        )
    return options


def _num_ranks() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal():
        raise ConfigError(f"WORLD_SIZE in the environment is {text!r}: unset it, or start ranks with a launcher.")
    return int(text)


def _ranks(config: Any | None = None, *, trains: bool = False) -> Any:
    """Return the ranks of this job by a run's config. Other stages need no GPU, even if the run was trained on one."""
    from trec_twotower.distributed.ranks import start_ranks

    if config is None:
        return start_ranks()
    wanted = config.train
    device: Any = "auto" if wanted.device == "cuda" and not trains else wanted.device
    return start_ranks(wanted.timeout_s, wanted.threads, wanted.first_timeout_s, device)


def _prepare(options: argparse.Namespace) -> int:
    from trec_twotower.data.sources import parse_options, prepare
    from trec_twotower.data.sources.event_logs.summary import describe

    overrides = parse_options(options.source, options.overrides)
    made = prepare(options.source, options.out, overrides, overwrite=options.overwrite)
    print(describe(options.out, made))
    if made.get("counts_checked"):
        print("These are the published files, and the counts agree with the published ones.")
    after_prepare(options.source, options.out, overrides)
    return 0


def _init(options: argparse.Namespace) -> int:
    from trec_twotower.data.starter_config import starter_config
    from trec_twotower.storage.atomic import write_file

    folder = options.dataset
    out = options.out or Path(f"{PurePosixPath(folder).name if '://' in folder else Path(folder).resolve().name}.yaml")
    if out.exists() and not options.overwrite:
        raise ConfigError(f"{out} exists already: give another file by --out, or replace it by --overwrite.")
    write_file(out, starter_config(folder))
    print(f"{out}: a starter config; check its features before training")
    print_next(["train", out])
    return 0


def _config(options: argparse.Namespace) -> Any:
    """Return the config that the command names, with its overrides."""
    from trec_twotower.config.loading import load_config
    from trec_twotower.data.features.transform import check_files

    config = load_config(options.config, options.overrides)
    check_files((*config.user, *config.item))
    if config.index.factory is not None:  # better refused now than when a run of days is to be indexed
        from trec_twotower.index import check_factory

        check_factory(config.index.factory, config.model.vector_dim)
    return config


def _train(options: argparse.Namespace) -> int:
    config = _config(options)
    _quiet()
    if options.init_from is not None:  # before the run folder is made
        from trec_twotower.training.run_dir import Run

        Run.open(options.init_from)
    with _ranks(config, trains=True) as ranks:
        from trec_twotower.evaluation.evaluator import Evaluator
        from trec_twotower.training.loop import train

        def evaluator(sources: Any) -> Any:
            if not sources.dataset.has("valid"):
                return None
            return Evaluator.of(sources, "valid", config.evaluate, ranks, sample=config.evaluate.users)

        search: Any = None
        if config.loss.negatives.refresh is not None:
            from trec_twotower.index.item_neighbors import neighbours as search

        train(config, ranks, evaluator, options.init_from, search)
        if ranks.is_first:
            print_next(on_ranks(ranks.num_ranks, "export", config.run_dir))
    return 0


def _export(options: argparse.Namespace) -> int:
    from trec_twotower.training.run_dir import Run

    run = Run.open(options.run_dir)
    _quiet()
    if options.encoder and (options.columns or options.users):
        raise ConfigError("--encoder writes towers, no vectors: leave out --columns and --users, or --encoder.")
    if options.encoder:
        return _export_encoder(run, options.checkpoint)
    with _ranks(run.config) as ranks:
        from trec_twotower.inference.export import export
        from trec_twotower.inference.model_loader import load_model
        from trec_twotower.storage.atomic import read_json

        folder = export(load_model(run, ranks, options.checkpoint), ranks, columns=options.columns, users=options.users)
        if ranks.is_first:
            manifest = read_json(folder / "manifest.json")
            print(
                f"{folder}: {manifest['items']:,} items and {manifest['users']:,} users of dim {manifest['dim']}, "
                f"model {manifest['model_version']} (step {manifest['step']:,})"
            )
            if manifest["users"]:  # an index is tuned for users' vectors
                print_next(["index", run.folder])
    return 0


def _export_encoder(run: Any, checkpoint: str) -> int:
    """Export the encoder from one process, whose memory holds all tables."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--encoder puts all tables into one folder, which one process does: leave out the launcher.")
    import torch

    from trec_twotower.distributed.ranks import Ranks
    from trec_twotower.inference.tower_encoder import Encoder
    from trec_twotower.storage.artifacts import sole_writer

    folder = run.folder / "encoder"
    with sole_writer(folder):
        ranks = Ranks(0, 1, torch.device("cpu"))
        encoder = Encoder.of(run, run.initialize(ranks) or run.open_dataset(ranks), checkpoint)
        programs = encoder.save(folder)
    print(f"{folder}: towers of dim {encoder.dim}, model {encoder.model_version}")
    for side, outcome in programs.items():
        print(f"  {side}.pt2: {outcome}")
    return 0


def _index(options: argparse.Namespace) -> int:
    from trec_twotower.config.loading import with_index_settings
    from trec_twotower.index import build_index
    from trec_twotower.inference.export import open_export
    from trec_twotower.storage.artifacts import sole_writer
    from trec_twotower.training.run_dir import Run

    run = Run.open(options.run_dir)
    settings = with_index_settings(run.config, options.overrides)
    with sole_writer(run.folder / "index"):
        manifest, items, users = open_export(run.folder / "export")
        if not len(users):
            raise ConfigError(
                f"{run.folder / 'export'} holds no users, because {run.config.data.dataset} has no test/, valid/ or "
                "serving/, but the index is tuned for users' vectors: write one of them, then train, export and index."
            )
        index = build_index(items, users, settings)
        index.save(
            run.folder / "index",
            model_version=manifest["model_version"],
            item_ids=items.ids(),
            similarity=manifest["similarity"],
        )
    print(f"{run.folder / 'index'}: {index.report.summary()}")
    after_index(run.folder, manifest["users_from"], users.first_id())
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from trec_twotower.training.run_dir import Run

    run = Run.open(options.run_dir)
    _quiet()
    with _ranks(run.config) as ranks:
        from trec_twotower.evaluation.evaluator import evaluate_run

        table = evaluate_run(
            run,
            ranks,
            split=options.split,
            checkpoint=options.checkpoint,
            through_index=options.index,
            rankings=options.rankings,
            slices=options.slice,
            sampled=options.sampled,
            sampled_same=options.same,
        )
        if ranks.is_first:
            from trec_twotower.storage.arrow_values import printable

            print("\n".join(map(printable, table.split("\n"))))  # values of the slices' columns are in it
    return 0


def _compare(options: argparse.Namespace) -> int:
    from trec_twotower.commands.compare import run_compare

    return run_compare(options)


def _completion(options: argparse.Namespace) -> int:
    from trec_twotower.commands.completion import run_completion

    return run_completion(options, build_parser(COMMANDS))


def _recommend(options: argparse.Namespace) -> int:
    from trec_twotower.commands.recommend import run_recommend

    return run_recommend(options)


def _serve(options: argparse.Namespace) -> int:
    if options.max_k < 1:
        raise ConfigError(f"--max-k is {options.max_k}: give 1 or more.")
    if not 0 <= options.reload_s < math.inf:
        raise ConfigError(f"--reload-s is {options.reload_s:g}: give seconds, 0 or more.")
    _quiet()
    from trec_twotower.serving.http_api import serve

    serve(
        options.run_dir,
        options.host,
        options.port,
        checkpoint=options.checkpoint,
        max_k=options.max_k,
        reload_s=options.reload_s,
        mapped=options.mapped,
    )
    return 0


def _report(options: argparse.Namespace) -> int:
    from trec_twotower.training.run_dir import Run

    run = Run.open(options.run_dir)
    _quiet()
    from trec_twotower.evaluation.report import write_report

    print(write_report(run, options.colour))
    return 0


def _plan(options: argparse.Namespace) -> int:
    config = _config(options)
    if not 1 <= options.ranks <= MAX_PLANNED_RANKS:
        raise ConfigError(f"--ranks is {options.ranks}: give 1 to {MAX_PLANNED_RANKS:,}.")
    if options.gpu_gb is not None and not options.gpu_gb > 0:
        raise ConfigError(f"--gpu-gb is {options.gpu_gb}: give the memory of a GPU in GB, such as 80.")
    _quiet()
    from trec_twotower.training.sharding_plan import describe_plan

    print(describe_plan(config, options.ranks, options.gpu_gb))
    return 0


def _features(options: argparse.Namespace) -> int:
    config = _config(options)
    _quiet()
    from trec_twotower.data.dataset import Dataset
    from trec_twotower.data.feature_dataset import FeatureDataset, open_cache
    from trec_twotower.data.feature_report import describe_coverage

    dataset, cache = Dataset.of(config.data), open_cache(config.data)
    print(describe_coverage(FeatureDataset(dataset, config.feature_schema, config.data.rows, cache=cache)))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from trec_twotower import doctor

    return doctor.main()


def _demo(options: argparse.Namespace) -> int:
    from trec_twotower.demo import run_demo

    return run_demo(options.dir, options.ranks)


def _launch(options: argparse.Namespace) -> int:
    """Run launch/torchrun.sh in place of this process; called from Python, as its child."""
    from trec_twotower.storage.package_files import package_file

    words = options.arguments
    if not words:
        options.parser.error(f"name the command to start on ranks: {', '.join(ON_RANKS)}")
    if words[0] not in ON_RANKS:
        why = "runs in one process" if words[0] in SUBCOMMANDS else "is no command"
        raise ConfigError(
            f"{words[0]} {why}{nearest(words[0], ON_RANKS) if words[0] not in SUBCOMMANDS else ''}: launch starts "
            f"{', '.join(ON_RANKS)}, after its own options, as in `trec-twotower launch --ranks 2 train CONFIG`."
        )
    ranks = [] if options.ranks is None else ["--ranks", options.ranks]
    command = ["bash", str(package_file("launch/torchrun.sh")), *ranks, *words]
    environ = {**os.environ, "PYTHON": sys.executable}
    if options.is_own_process:
        sys.stdout.flush()
        os.execvpe(command[0], command, environ)
    return subprocess.run(command, env=environ).returncode


def _quiet() -> None:
    from trec_twotower.distributed.ranks import quiet_libraries

    quiet_libraries()


COMMANDS = {
    "demo": _demo,
    "prepare": _prepare,
    "init": _init,
    "train": _train,
    "export": _export,
    "index": _index,
    "evaluate": _evaluate,
    "compare": _compare,
    "recommend": _recommend,
    "serve": _serve,
    "report": _report,
    "plan": _plan,
    "features": _features,
    "launch": _launch,
    "doctor": _doctor,
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())
