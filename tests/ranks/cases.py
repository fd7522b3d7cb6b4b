"""What one rank and two ranks make of the same work: `-m tests.ranks.cases WORLD OUT [RUNS]`.

Every part runs on all ranks together; the first rank writes the results to OUT/results.pt, where tests compare them
between launches. RUNS is the folder of an earlier launch, whose checkpoints are loaded here.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trec_twotower.cli import _quiet

_quiet()

from tests.ranks.states import whole_optimizer_state, whole_state  # noqa: E402
from tests.ranks.worlds import LOSSES, MIXED, PLANS, event_config, negatives, tables, user_config  # noqa: E402
from trec_twotower.config.run_config import RunConfig  # noqa: E402
from trec_twotower.config.schema import Schema  # noqa: E402
from trec_twotower.config.training import SpectralConfig  # noqa: E402
from trec_twotower.data.dataset import Dataset  # noqa: E402
from trec_twotower.data.feature_dataset import FeatureDataset  # noqa: E402
from trec_twotower.data.features.transform import Columns  # noqa: E402
from trec_twotower.distributed.ranks import Ranks, start_ranks  # noqa: E402
from trec_twotower.errors import DataError, TrainingError  # noqa: E402
from trec_twotower.model import encode as encoding  # noqa: E402
from trec_twotower.model.two_tower import TwoTower  # noqa: E402
from trec_twotower.training import loop as training  # noqa: E402
from trec_twotower.training.checkpoints.checkpoint import Checkpoints  # noqa: E402
from trec_twotower.training.model_builder import build_model, inner_model  # noqa: E402
from trec_twotower.training.optimizer import RunOptimizer  # noqa: E402
from trec_twotower.training.sharding import make_plan, placements  # noqa: E402
from trec_twotower.training.spectral_initialization import Interactions, spectral_tables, spread  # noqa: E402

warnings.filterwarnings("error", module=r"trec_twotower(\.|$)")

os.fsync = lambda _: None  # these runs outlive no power cut

# A tail batch that is uneven (7 of 45 rows leave 3), and one smaller than two ranks (11 of 45 leave 1).
BATCH_SIZES = (7, 11)


class Work:
    """The parts, in order; each adds to `results` under its own name."""

    def __init__(self, world: Path, out: Path, ranks: Ranks) -> None:
        self.world, self.out, self.ranks = world, out, ranks
        self.results: dict[str, Any] = {}

    # Training

    def trainings(self) -> None:
        cases: dict[str, RunConfig] = {}
        for kind, lr in (("sgd", 0.5), ("rowwise_adagrad", 0.1), ("adagrad", 0.1)):
            optimizer = {"train": {"optimizer": {"sparse": kind, "lr": lr}}}
            for plan in (*PLANS, "mixed"):
                wanted = MIXED if plan == "mixed" else plan
                if kind == "adagrad" and plan not in ("mixed", "table_wise"):
                    continue
                cases[f"event {plan} {kind}"] = event_config(
                    self.world, self.out / "runs" / f"{plan}-{kind}", wanted, **optimizer
                )
            cases[f"user mixed {kind}"] = user_config(
                self.world, self.out / "runs" / f"user-{kind}", MIXED, **optimizer
            )
        cases["user table_wise sgd"] = user_config(self.world, self.out / "runs" / "user-table")
        for size in BATCH_SIZES:
            cases[f"tail {size}"] = event_config(
                self.world, self.out / "runs" / f"tail-{size}", MIXED, data={"batch_size": size}, train={"epochs": 2}
            )
        one_row = tables("auto")
        one_row["brand"] = {"buckets": 1, "dim": 4}  # row-wise, the second rank would hold none
        cases["one row"] = event_config(self.world, self.out / "runs" / "one-row", "auto", tables=one_row)
        for name, loss in LOSSES.items():
            cases[f"loss {name}"] = user_config(self.world, self.out / "runs" / f"loss-{name}", MIXED, loss=loss)
        for kind, lr in (("sgd", 0.5), ("rowwise_adagrad", 0.1)):
            for plan in PLANS if kind == "sgd" else ("table_wise", "row_wise"):
                wanted = {
                    "loss": {**negatives(self.world), "log_q_estimate": "streaming" if kind == "sgd" else "exact"},
                    "train": {"optimizer": {"sparse": kind, "lr": lr}},
                }
                place = self.out / "runs" / f"negatives-{plan}-{kind}"
                cases[f"negatives {plan} {kind}"] = event_config(self.world, place, plan, **wanted)
        of_users = {"loss": negatives(self.world, "user_id")}
        cases["negatives user sgd"] = user_config(self.world, self.out / "runs" / "negatives-user", MIXED, **of_users)
        for name, config in cases.items():
            self.results[f"train {name}"] = self.train(config)

    def spectral(self) -> None:
        """What the closed form makes of both kinds of rows: users' scores, which no turn of the space changes."""
        for name, rows in (("events", "event"), ("users", "user")):
            schema = event_config(self.world, self.out).feature_schema
            sources = FeatureDataset(Dataset(self.world / name), Schema(schema.tables, (), schema.item), rows)
            taken = Interactions.read(sources, self.ranks)
            history_ID, item_ID = spectral_tables(taken, 5, SpectralConfig(history="history"), 7, self.ranks)
            pairs = self.ranks.collect(list(zip(taken.user_P.tolist(), taken.item_P.tolist(), strict=True)))
            self.results[f"spectral {name}"] = {
                "spread": spread(taken, history_ID, item_ID, "sqrtn", self.ranks),
                "scores": history_ID @ item_ID.T,
                "users": sum(self.ranks.collect(taken.num_users)),
                "pairs": sum(map(len, pairs)),
                "items": sorted(item for part in pairs for _, item in part),
            }

    def train(self, config: RunConfig) -> dict[str, Any]:
        """The losses, step by step, and every weight and state at the end."""
        kept: list[Any] = []
        _keep(kept, training, "build_model")
        _keep(kept, training, "RunOptimizer")
        try:
            training.train(config, self.ranks)
        except TrainingError as error:
            outcome: str = str(error)
        else:
            outcome = "finished"
        finally:
            for name in ("build_model", "RunOptimizer"):
                setattr(training, name, getattr(training, name).wrapped)
        lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
        return {
            "outcome": outcome,
            "steps": [line["step"] for line in lines],
            "losses": [line["loss"] for line in lines],
            "weights": whole_state(kept[0], self.ranks),
            "states": whole_optimizer_state(kept[1], self.ranks),
        }

    def not_a_number(self) -> None:
        """The third loss is NaN on the last rank alone; beside it the same run, two steps long."""
        config = event_config(
            self.world, self.out / "runs" / "nan", MIXED, data={"batch_size": 23}, train={"epochs": 2}
        )
        forward = TwoTower.forward
        calls = 0

        def broken(model: TwoTower, batch: Any, **more: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            loss = forward(model, batch, **more)
            return loss * float("nan") if calls == 3 and self.ranks.rank == self.ranks.num_ranks - 1 else loss

        TwoTower.forward = broken  # type: ignore[method-assign]
        try:
            stopped = self.train(config)
        finally:
            TwoTower.forward = forward  # type: ignore[method-assign]
        self.results["nan"] = {
            "outcomes": self.collect(stopped["outcome"]),
            "steps": stopped["steps"],
            "weights": stopped["weights"],
            "states": stopped["states"],
            "two steps": self.train(
                event_config(
                    self.world, self.out / "runs" / "two-steps", MIXED, data={"batch_size": 23}, train={"epochs": 1}
                )
            ),
        }

    # The model as it starts

    def first_weights(self) -> None:
        """Every table as it is filled, under every plan, and the plan that each rank made for itself."""
        for plan in (*PLANS, "mixed", "auto"):
            config = event_config(self.world, self.out, MIXED if plan == "mixed" else plan)
            self.results[f"first weights {plan}"] = whole_state(build_model(config, self.ranks), self.ranks)
            schema = config.feature_schema
            whole = TwoTower(schema, config.model, config.loss, self.ranks)
            made = make_plan(whole, schema, self.ranks.num_ranks, self.ranks.device, 8)
            self.results[f"plan {plan}"] = self.collect([vars(placement) for placement in placements(made)])

    def tower_inputs(self) -> None:
        """What enters each tower for all events and all items, and the vectors that leave it."""
        sources = FeatureDataset(
            Dataset(self.world / "events"), event_config(self.world, self.out).feature_schema, "event"
        )
        table = sources.dataset.train.table(sources.user_columns())
        columns = {"user": sources.user_features(table, "the test"), "item": sources.catalogue.columns}
        encoding.BLOCK_ROWS = 4  # blocks and shares that do not come out even
        for plan in (*PLANS, "mixed"):
            config = event_config(self.world, self.out, MIXED if plan == "mixed" else plan)
            model = inner_model(build_model(config, self.ranks))
            for side in ("user", "item"):
                self.results[f"inputs {plan} {side}"] = self.inputs(model, side, columns[side])
                for count in (columns[side].num_rows, 1, 0):
                    some = columns[side].take(np.arange(count))
                    made = encoding.encode_everywhere(model, side, some, self.ranks)
                    self.results[f"vectors {plan} {side} {count}"] = made
        encoding.BLOCK_ROWS = 8192

    def inputs(self, model: TwoTower, side: Any, columns: Columns) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        tower = model.user_tower if side == "user" else model.item_tower
        hook = tower.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        encoding.encode_share(model, side, columns, self.ranks)
        hook.remove()
        mine = torch.cat(seen)
        return self.ranks.gather(mine, self.ranks.sizes(len(mine))).clone()

    # Collectives

    def collectives(self) -> None:
        ranks = self.ranks
        assert ranks.once(lambda: {"rank": ranks.rank}) == {"rank": 0}
        self.results["errors"] = {
            "plain": self.everyone_raises(DataError("row 3 is broken")),
            "with odd arguments": self.everyone_raises(OddError(7, hint="x")),
            "that cannot travel": self.everyone_raises(LockedError("held")),
        }
        mine = torch.arange(5.0) * (ranks.rank + 1)
        self.results["sum"] = torch.from_numpy(ranks.sum(np.array([ranks.rank + 1, 2**53 - 10])))
        self.results["mean"] = ranks.mean(mine.sum())
        self.results["sizes"] = ranks.sizes(3 * ranks.rank + 1)
        self.results["shares"] = self.collect([(share.start, share.stop) for share in map(ranks.share, (0, 1, 2, 7))])
        self.results["gathered"] = {
            name: self.gathered(sizes) for name, sizes in {"even": [6, 3], "uneven": [6, 2], "empty": [6, 0]}.items()
        }

    def collect(self, value: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.ranks.num_ranks
        dist.all_gather_object(everyone, value)
        return everyone

    def everyone_raises(self, error: Exception) -> list[str]:
        def fail() -> None:
            raise error

        try:
            self.ranks.once(fail)
        except Exception as raised:
            return self.collect(f"{type(raised).__name__}: {raised}")
        return self.collect("nothing")

    def gathered(self, sizes: list[int]) -> dict[str, torch.Tensor]:
        """Rows that lie on the ranks, gathered; each of two ranks wants something else of every row.

        `sizes`: how many rows there are, and how many of them the second rank holds. One rank wants what two would.
        """
        total, last = sizes
        counts = [total] if self.ranks.num_ranks == 1 else [total - last, last]
        everything = torch.arange(3.0 * total).reshape(total, 3).sin()
        first = sum(counts[: self.ranks.rank])
        mine = everything[first : first + counts[self.ranks.rank]].clone().requires_grad_()
        together = self.ranks.gather(mine, self.ranks.sizes(len(mine)))
        wishes = [wish(rank) for rank in range(2)]
        if self.ranks.num_ranks == 1:
            loss = sum((together**2 * wanted).sum() for wanted in wishes)
        else:
            loss = (together**2 * wishes[self.ranks.rank]).sum()
        loss.backward()
        gradients = torch.cat([torch.as_tensor(part) for part in self.collect(mine.grad)])
        return {"values": together.detach().clone(), "gradients": gradients}

    # Checkpoints of an earlier launch, on other ranks

    def foreign_checkpoints(self, runs: Path) -> None:
        for name, make, plan in (
            ("table_wise", event_config, "table_wise"),
            ("mixed", event_config, MIXED),
            ("user", user_config, MIXED),
        ):
            folder = runs / f"{name}-rowwise_adagrad"
            config = make(self.world, folder, plan, train={"optimizer": {"sparse": "rowwise_adagrad"}})  # type: ignore[operator]
            model = build_model(config, self.ranks)
            optimizer = RunOptimizer(model, config.train.optimizer)
            checkpoints = Checkpoints(folder / "checkpoints", self.ranks)
            checkpoints.load(checkpoints.complete()[-1], model, optimizer)
            self.results[f"loaded {folder.name}"] = {
                "weights": whole_state(model, self.ranks),
                "states": whole_optimizer_state(optimizer, self.ranks),
            }


class OddError(Exception):
    """Its own arguments are not those that pickle gives it back."""

    def __init__(self, number: int, *, hint: str) -> None:
        super().__init__(f"number {number} ({hint})")


class LockedError(Exception):
    """Holds what no other process can be given."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.held = threading.Lock()


def wish(rank: int) -> torch.Tensor:
    """How much a rank's loss wants of each of six rows."""
    return torch.cos(torch.arange(18.0) + 5 * rank).reshape(6, 3)


def _keep(kept: list[Any], module: Any, name: str) -> None:
    """Let a name of a module also put what it makes into `kept`."""
    make = getattr(module, name)

    def keeping(*arguments: Any) -> Any:
        kept.append(make(*arguments))
        return kept[-1]

    keeping.wrapped = make  # type: ignore[attr-defined]
    setattr(module, name, keeping)


def main() -> None:
    world, out = Path(sys.argv[1]), Path(sys.argv[2])
    with start_ranks(timeout_s=60) as ranks:
        work = Work(world, out, ranks)
        work.collectives()
        work.first_weights()
        work.tower_inputs()
        work.trainings()
        work.spectral()
        work.not_a_number()
        for runs in sys.argv[3:]:
            work.foreign_checkpoints(Path(runs))
        if ranks.is_first:
            torch.save(work.results, out / "results.pt")


if __name__ == "__main__":
    main()
