"""Fused updates for the tables, Adam for the rest, and how both rates change over a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from trec_twotower.config import OptimizerConfig

FINAL_SHARE = 0.02  # of the rate, at the end of a linear schedule


def fuse_table_updates(model: nn.Module, config: OptimizerConfig) -> None:
    """Give every table its optimizer, to be called before sharding; without one, fbgemm would use SGD at 0.01."""
    kind, settings = _table_optimizer(config)
    apply_optimizer_in_backward(kind, model.tables.parameters(), settings)


def _table_optimizer(config: OptimizerConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    if config.sparse == "sgd":
        return torch.optim.SGD, {"lr": config.lr}
    if config.sparse == "adagrad":
        return torch.optim.Adagrad, {"lr": config.lr, "eps": config.eps}
    return RowWiseAdagrad, {"lr": config.lr, "eps": config.eps}


class RunOptimizer:
    """All optimizers of a sharded model as one; every parameter belongs to exactly one of them.

    Data-parallel tables have no fused update (torchrec leaves them frozen without a word), so the same kind of
    optimizer updates them from their gradients.
    """

    def __init__(self, model: DistributedModelParallel, config: OptimizerConfig) -> None:
        self.config = config
        dense: dict[str, torch.Tensor] = {}
        replicated: dict[str, torch.Tensor] = {}
        for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
            (replicated if "embedding_bags" in name.split(".") else dense)[name] = parameter
        self._tables = model.fused_optimizer
        optimizers: list[tuple[str, Any]] = [("tables", self._tables)]
        if dense:
            wrapper = KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.Adam(parameters, lr=config.dense_lr))
            _prepare_state(wrapper)
            optimizers.append(("dense", wrapper))
        if replicated:
            kind, settings = _table_optimizer(config)
            wrapper = KeyedOptimizerWrapper(replicated, lambda parameters: kind(parameters, **settings))
            _prepare_state(wrapper)
            optimizers.append(("replicated", wrapper))
        self._combined = CombinedOptimizer(optimizers)
        self._check_complete(model, {*dense, *replicated})

    def _check_complete(self, model: DistributedModelParallel, plain: set[str]) -> None:
        fused = set(model.fused_optimizer.params)
        names = {name for name, parameter in model.named_parameters() if parameter.numel()}  # of tables elsewhere: 0
        assert not fused & plain and names <= fused | plain, f"without optimizer: {sorted(names - fused - plain)}"

    def zero_grad(self) -> None:
        self._combined.zero_grad(set_to_none=True)

    def step(self) -> None:
        self._combined.step()

    def set_rates(self, step: int, num_steps: int) -> float:
        """Set both rates for `step`, a pure function of it; returns their share of the configured rates.

        To be called before the forward pass, in which the fused updates read their rate.
        """
        share = rate_share(self.config, step, num_steps)
        for name, optimizer in self._combined.optimizers:
            base = self.config.dense_lr if name == "dense" else self.config.lr
            for group in optimizer.param_groups:
                group["lr"] = base * share
        self._tables.zero_grad()  # hands the rate to the kernels
        return share

    def state(self) -> dict[str, Any]:
        """The state tensors by parameter, as a checkpoint holds them; loading writes into these very tensors."""
        return {name: dict(values) for name, values in self._combined.state_dict()["state"].items()}


def _prepare_state(optimizer: KeyedOptimizerWrapper) -> None:
    """Make the state that a checkpoint loads into; the dummy step this takes must not count as one."""
    optimizer.init_state()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].zero_()


def rate_share(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then constant or linear to FINAL_SHARE."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    passed = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    return 1.0 - (1.0 - FINAL_SHARE) * min(passed, 1.0)
