"""The command line: one word per stage. Imports are inside the commands, so that --help answers at once."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from trec_twotower.errors import ConfigError, DataError, LostRanks, Stopped, TrainingError

MAX_PLANNED_RANKS = 4096  # more, and the planner does not come back
INTERRUPTED = 130  # the customary code after Ctrl-C
EPILOG = (
    "Exit codes: 0 done, 1 failed, 2 a mistake in the call or the config, 3 a mistake in the data, 128 + the signal "
    "when stopped by one (130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM; training has then saved, see RUN/status.json)."
)


class _Parser(argparse.ArgumentParser):
    """One short message for a mistaken call, said by one rank."""

    def error(self, message: str) -> NoReturn:
        _say_once(f"{self.prog}: {message}: `{self.prog} --help` shows how it is called.")
        raise SystemExit(ConfigError.exit_code)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="trec-twotower",
        description="A distributed two-tower recommender on TorchRec: Parquet in, recommendations out.",
        epilog=EPILOG,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EPILOG)
        sub.set_defaults(run=run)
        return sub

    def folder(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("run_dir", metavar="RUN", type=Path, help="a run folder, made by train")
        sub.add_argument("--checkpoint", default="best", metavar="WHICH", help="best (default), newest, or a step")

    demo = command("demo", _demo, "the whole chain on a generated world, with two ranks")
    demo.add_argument("--ranks", type=int, help="processes that train together (default 2; 1 where there is one GPU)")
    demo.add_argument("--dir", type=Path, default=Path("."), help="where data/demo and runs/demo go (default: here)")

    prepare = command("prepare", _prepare, "raw files to a dataset folder")
    prepare.add_argument(
        "source",
        metavar="SOURCE",
        help="synthetic, gowalla, amazon-beauty, amazon-reviews, movielens, goodbooks or events",
    )
    prepare.add_argument("--out", type=Path, required=True, metavar="DATASET", help="the folder to make")
    prepare.add_argument("--overwrite", action="store_true", help="replace a dataset that is there")
    prepare.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="options of the source, such as rows=1000000"
    )

    train = command("train", _train, "fit the towers of a config, or go on with a run that was cut short")
    train.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, such as configs/gowalla.yaml")
    train.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings to change, such as train.epochs=3"
    )

    train.add_argument(
        "--init-from", type=Path, metavar="RUN", help="a run whose weights a new run begins with, where they fit"
    )

    export = command("export", _export, "item and user vectors to Parquet, under RUN/export")
    folder(export)
    export.add_argument(
        "--encoder", action="store_true", help="instead the towers, to encode rows elsewhere, under RUN/encoder"
    )

    export.add_argument(
        "--columns", nargs="+", default=[], metavar="NAME", help="columns of items/ to stand beside the items' vectors"
    )
    export.add_argument(
        "--users", metavar="PART", help="whose users: test, valid or serving (default: the first of them)"
    )

    index = command("index", _index, "a FAISS index of the exported items, tuned against exact search, under RUN/index")
    index.add_argument("run_dir", metavar="RUN", type=Path, help="a run folder with an export")
    index.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as index.target_recall=0.95, for this index"
    )

    evaluate = command("evaluate", _evaluate, "metrics over the whole catalogue, beside the baselines")
    folder(evaluate)
    evaluate.add_argument("--split", default="test", help="the part of the dataset to find (default test)")
    evaluate.add_argument("--index", action="store_true", help="also through the tuned index")
    evaluate.add_argument(
        "--slice", action="append", default=[], metavar="NAME", help="also told apart by user.COLUMN or item.COLUMN"
    )
    evaluate.add_argument(
        "--sampled",
        type=int,
        metavar="N",
        help="also metrics over N drawn items in place of the catalogue, as papers do",
    )
    evaluate.add_argument(
        "--same", metavar="COLUMN", help="with --sampled: also of items alike in this column, such as the category"
    )
    evaluate.add_argument("--rankings", type=Path, metavar="FILE", help="also write user_id, item_ids as Parquet")

    recommend = command("recommend", _recommend, "what a user gets, and from which history")
    folder(recommend)
    recommend.add_argument("--user", required=True, action="append", metavar="ID", help="a user_id; may be repeated")
    recommend.add_argument("--k", type=int, default=10, help="how many items (default 10)")
    recommend.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="only items with this value; may be repeated",
    )
    recommend.add_argument(
        "--without", action="append", default=[], metavar="ID", help="not this item; may be repeated"
    )

    serve = command("serve", _serve, "recommendations over HTTP, until it is told to stop")
    folder(serve)
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="and the port (default 8000; 0: any that is free)")
    serve.add_argument("--max-k", type=int, default=1000, help="the most items a request may ask for (default 1000)")
    serve.add_argument(
        "--reload-s", type=float, default=10.0, help="seconds between looks for a new index; 0: none (default 10)"
    )
    serve.add_argument(
        "--mapped", action="store_true", help="share the index with other processes of this host, each reading at need"
    )

    report = command("report", _report, "the run in pictures, one HTML file of all that was done so far")
    report.add_argument("run_dir", metavar="RUN", type=Path, help="a run folder, made by train")
    report.add_argument("--colour", metavar="COLUMN", help="of items/, for the map (default: the first category)")

    plan = command("plan", _plan, "which rank would hold which part of which table, and how many bytes")
    plan.add_argument("config", type=Path, metavar="CONFIG")
    plan.add_argument("--ranks", type=int, required=True, metavar="N")
    plan.add_argument("--gpu-gb", type=float, metavar="GB", help="for GPUs of so much memory (default: those here)")
    plan.add_argument("overrides", nargs="*", default=[], metavar="key=value")

    features = command("features", _features, "how well tables fit the data: nulls, unknown and new ids, collisions")
    features.add_argument("config", type=Path, metavar="CONFIG")
    features.add_argument("overrides", nargs="*", default=[], metavar="key=value")

    command("doctor", _doctor, "what is installed, what does not fit, and the line that mends it")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code, having said in one message what went wrong.

    Without `arguments` it runs the process's own command line, and ends the process with it.
    """
    try:
        code = _run(arguments)
    except Exception:
        if arguments is not None:
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    if arguments is None:
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """End this process at once.

    gloo's threads outlive the process group where a sharded model still refers to it. One that lets go of its last
    tensor while the interpreter is being taken down cannot get the interpreter's lock, and aborts the process. NCCL's
    group, left behind by an error, would wait for ranks that wait for this one.
    """
    with contextlib.suppress(OSError):  # nobody reads on, as with `| head`
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _run(arguments: list[str] | None) -> int:
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse wants all positional words together; key=value may stand behind options as well.
    if rest and hasattr(options, "overrides") and not any(word.startswith("-") for word in rest):
        options.overrides = [*options.overrides, *rest]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options)
    except (ConfigError, DataError, TrainingError) as error:
        _say_once(f"trec-twotower {options.command}: {error}", is_own=isinstance(error, LostRanks))
        return error.exit_code
    except Stopped as stopped:
        _say_once(f"trec-twotower {options.command}: {stopped}")
        return _code_for_launcher(stopped.exit_code)
    except KeyboardInterrupt:
        goes_on = "goes on from what is saved" if options.command == "train" else "begins anew"
        _say_once(f"trec-twotower {options.command}: interrupted; the same command {goes_on}.")
        return INTERRUPTED
    except RuntimeError as error:
        from trec_twotower.heartbeat import cause_of, is_lost

        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not is_lost(error):
            raise
        lost = f"rank {os.environ['RANK']} lost the others ({cause_of(error)}): the first of them to end says why."
        _say_once(f"trec-twotower {options.command}: {lost}", is_own=True)
        return 1
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):  # as behind `| head`
            return 128 + signal.SIGPIPE
        _say_once(f"trec-twotower {options.command}: {error.strerror or error}: {error.filename or ''}".rstrip(": "))
        return 1


def _is_unread(stream: TextIO) -> bool:
    """Whether it is a pipe that nobody reads on."""
    poll = select.poll()
    try:
        poll.register(stream, 0)
    except OSError:  # no file of the system: something in Python that catches what is said
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _say_once(message: str, is_own: bool = False) -> None:
    """Tell stderr; of the ranks of one job, which mostly find the same mistake, the first to come speaks.

    Under a launcher that is not ours rank 0 speaks, and every rank of what is its own.
    """
    said_dir = os.environ.get("TREC_TT_SAID_DIR")
    if said_dir is not None:
        import hashlib

        try:
            (Path(said_dir) / hashlib.sha256(message.encode()).hexdigest()[:16]).touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass  # the job's folder is gone: better said twice than not at all
    elif os.environ.get("RANK", "0") != "0" and not is_own:
        return
    print(message, file=sys.stderr, flush=True)


def _code_for_launcher(exit_code: int) -> int:
    """The code to end with: under our launcher 0, which starts no rank again, and the true one left in a file."""
    said_dir = os.environ.get("TREC_TT_SAID_DIR")
    if said_dir is None:
        return exit_code
    try:
        (Path(said_dir) / "exit_code").write_text(str(exit_code))
    except OSError:
        return exit_code
    return 0


def _ranks(config: Any | None = None) -> Any:
    from trec_twotower.distributed import start_ranks

    if config is None:
        return start_ranks()
    return start_ranks(config.train.timeout_s, config.train.threads, config.train.first_timeout_s)


def _prepare(options: argparse.Namespace) -> int:
    from trec_twotower.data.sources import parse_options, prepare
    from trec_twotower.data.sources.summary import describe

    overrides = parse_options(options.source, options.overrides)
    made = prepare(options.source, options.out, overrides, overwrite=options.overwrite)
    print(describe(options.out, made))
    if made.get("counts_checked"):
        print("These are the published files, and the counts agree with the published ones.")
    return 0


def _config(options: argparse.Namespace) -> Any:
    """The config that a command was given, with its overrides."""
    from trec_twotower.config import load_config

    config = load_config(options.config, options.overrides)
    if config.index.factory is not None:  # better refused now than when a run of days is to be indexed
        from trec_twotower.index import check_factory

        check_factory(config.index.factory, config.model.vector_dim)
    return config


def _train(options: argparse.Namespace) -> int:
    config = _config(options)
    _quiet()
    with _ranks(config) as ranks:
        from trec_twotower.evaluate import Evaluator
        from trec_twotower.train import train

        def evaluator(sources: Any) -> Any:
            if not sources.dataset.has("valid"):
                return None
            return Evaluator.of(sources, "valid", config.evaluate, ranks, sample=config.evaluate.users)

        search: Any = None
        if config.loss.negatives.refresh is not None:
            from trec_twotower.index.neighbours import neighbours as search

        train(config, ranks, evaluator, options.init_from, search)
    return 0


def _export(options: argparse.Namespace) -> int:
    from trec_twotower.run import Run

    run = Run.open(options.run_dir)
    _quiet()
    if options.encoder and (options.columns or options.users):
        raise ConfigError("--encoder writes towers, no vectors: leave out --columns and --users, or --encoder.")
    if options.encoder:
        return _export_encoder(run, options.checkpoint)
    with _ranks(run.config) as ranks:
        from trec_twotower.export import export, load_model
        from trec_twotower.files import read_json

        folder = export(load_model(run, ranks, options.checkpoint), ranks, columns=options.columns, users=options.users)
        if ranks.is_first:
            manifest = read_json(folder / "manifest.json")
            print(
                f"{folder}: {manifest['items']:,} items and {manifest['users']:,} users of dim {manifest['dim']}, "
                f"model {manifest['model_version']} (step {manifest['step']:,})"
            )
    return 0


def _export_encoder(run: Any, checkpoint: str) -> int:
    """On one process, whose memory holds all tables."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--encoder puts all tables into one folder, which one process does: leave out the launcher.")
    import torch

    from trec_twotower.distributed import Ranks
    from trec_twotower.encoder import Encoder

    encoder = Encoder.of(run, run.sources(Ranks(0, 1, torch.device("cpu"))), checkpoint)
    folder = run.folder / "encoder"
    programs = encoder.save(folder)
    print(f"{folder}: towers of dim {encoder.dim}, model {encoder.model_version}")
    for side, outcome in programs.items():
        print(f"  {side}.pt2: {outcome}")
    return 0


def _index(options: argparse.Namespace) -> int:
    from trec_twotower.config import with_index_settings
    from trec_twotower.export import open_export
    from trec_twotower.index import build_index
    from trec_twotower.run import Run

    run = Run.open(options.run_dir)
    settings = with_index_settings(run.config, options.overrides)
    manifest, items, users = open_export(run.folder / "export")
    if not len(users):
        raise ConfigError(
            f"{run.folder / 'export'} holds no users, because {run.config.data.dataset} has no part test/, valid/ or "
            "serving/, but the index is tuned for users' vectors: write one of them, then train, export and index."
        )
    index = build_index(items, users, settings)
    index.save(
        run.folder / "index",
        model_version=manifest["model_version"],
        item_ids=items.ids(),
        similarity=manifest["similarity"],
    )
    print(f"{run.folder / 'index'}: {index.report.in_words()}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from trec_twotower.run import Run

    run = Run.open(options.run_dir)
    _quiet()
    with _ranks(run.config) as ranks:
        from trec_twotower.evaluate import evaluate_run

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
            print(table)
    return 0


def _recommend(options: argparse.Namespace) -> int:
    if options.k < 1:
        raise ConfigError(f"--k is {options.k}: give 1 or more.")
    where: dict[str, list[str]] = {}
    for each in options.where:
        column, found, value = each.partition("=")
        if not found:
            raise ConfigError(f"--where is {each!r}: give a column of the catalogue and a value, as in category=Mugs.")
        where.setdefault(column, []).append(value)
    _quiet()
    with _ranks() as ranks:
        from trec_twotower.serve import Retriever, in_words

        retriever = Retriever.open(options.run_dir, ranks, options.checkpoint)
        allowed = retriever.allow(where=where, without=options.without) if where or options.without else None
        for answer in retriever.recommend(options.user, options.k, allowed=allowed):
            print(f"User {answer.user_id} took last:")
            for about in answer.history:
                print(f"      {in_words(about)}")
            print("and gets:")
            for place, item in enumerate(answer.items, 1):
                print(f"  {place:>3}  {item.score:>8.4f}  {in_words(item.about)}  [{item.item_id}]")
    return 0


def _serve(options: argparse.Namespace) -> int:
    if options.max_k < 1 or not options.reload_s >= 0:
        raise ConfigError(
            f"--max-k is {options.max_k} and --reload-s {options.reload_s:g}: give 1 or more, and 0 or more."
        )
    _quiet()
    from trec_twotower.server import serve

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
    from trec_twotower.run import Run

    run = Run.open(options.run_dir)
    _quiet()
    from trec_twotower.report import write_report

    print(write_report(run, options.colour))
    return 0


def _plan(options: argparse.Namespace) -> int:
    config = _config(options)
    if not 1 <= options.ranks <= MAX_PLANNED_RANKS:
        raise ConfigError(f"--ranks is {options.ranks}: give 1 to {MAX_PLANNED_RANKS:,}.")
    if options.gpu_gb is not None and not options.gpu_gb > 0:
        raise ConfigError(f"--gpu-gb is {options.gpu_gb}: give the memory of a GPU in GB, such as 80.")
    _quiet()
    from trec_twotower.plan import describe_plan

    print(describe_plan(config, options.ranks, options.gpu_gb))
    return 0


def _features(options: argparse.Namespace) -> int:
    config = _config(options)
    _quiet()
    from trec_twotower.data.cache_folder import CacheFolder
    from trec_twotower.data.coverage import describe_coverage
    from trec_twotower.data.dataset import Dataset
    from trec_twotower.data.features import Sources

    dataset, cache = Dataset.of(config.data), CacheFolder.of(config.data)
    print(describe_coverage(Sources(dataset, config.feature_schema, config.data.rows, cache=cache)))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from trec_twotower import doctor

    return doctor.main()


def _demo(options: argparse.Namespace) -> int:
    from trec_twotower.demo import run_demo

    return run_demo(options.dir, options.ranks)


def _quiet() -> None:
    from trec_twotower.distributed import quiet_libraries

    quiet_libraries()


if __name__ == "__main__":
    sys.exit(main())
