"""Fused updates for the tables, Adam for the rest, and how both rates change over a run."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim import LAMB, PartialRowWiseAdam, RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from trec_twotower.config.schema import Schema
from trec_twotower.config.training import GPU_OPTIMIZERS, OptimizerConfig
from trec_twotower.distributed.compat import lookup_modules, table_optimizer
from trec_twotower.errors import ConfigError
from trec_twotower.model.embeddings import table_parameters
from trec_twotower.model.tower import Tower
from trec_twotower.storage.fault_point import fault_point

FINAL_SHARE = 0.02  # of the rate, at the end of a schedule that falls

_TABLE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
    "partial_rowwise_adam": PartialRowWiseAdam,
    "lamb": LAMB,
}
# Optimizer state of each, in numbers: per weight, and per row of a shard.
_STATES = {
    torch.optim.SGD: (0, 0),
    torch.optim.Adagrad: (1, 0),
    RowWiseAdagrad: (0, 1),
    torch.optim.Adam: (2, 0),
    PartialRowWiseAdam: (1, 1),
    LAMB: (2, 0),
}


def check_optimizer(config: OptimizerConfig, schema: Schema, device_type: str) -> None:
    """Raises ConfigError where fbgemm has no such update of tables for this kind of device, or of these tables."""
    if config.sparse not in GPU_OPTIMIZERS:
        return
    if device_type == "cpu":
        known = [name for name in get_args(OptimizerConfig.model_fields["sparse"].annotation)
                 if name not in GPU_OPTIMIZERS]  # fmt: skip
        raise ConfigError(
            f"train.optimizer.sparse is {config.sparse}, which fbgemm has on GPU alone, and there is none here: "
            f"take one of {', '.join(known)}."
        )
    for name, spec in schema.tables.items():
        if spec.sharding == "data_parallel":
            raise ConfigError(
                f"Table {name!r} is data_parallel, whose update is not fused, and train.optimizer.sparse "
                f"{config.sparse} would move rows that no one looked up: give it another sharding, or take an Adagrad."
            )


def fuse_table_updates(model: nn.Module, config: OptimizerConfig) -> None:
    """Give every table its optimizer, to be called before sharding; without one, fbgemm would use SGD at 0.01."""
    kind, settings = _table_optimizer(config)
    apply_optimizer_in_backward(kind, table_parameters(model).values(), settings)


def state_bytes(weight: nn.Parameter, rows: int, columns: int) -> int:
    """Return the bytes of optimizer state for a shard of a table with these rows and columns."""
    optimizer = table_optimizer(weight)
    return 0 if optimizer is None else _state_bytes(optimizer, rows, columns)


def table_state_bytes(config: OptimizerConfig, rows: int, columns: int) -> int:
    """Return the state bytes of a table by a config."""
    return _state_bytes(_TABLE_OPTIMIZERS[config.sparse], rows, columns)


def _state_bytes(kind: type[torch.optim.Optimizer], rows: int, columns: int) -> int:
    per_weight, per_row = _STATES[kind]
    return 4 * rows * (per_weight * columns + per_row)


def _table_optimizer(config: OptimizerConfig) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    settings: dict[str, Any] = {"lr": config.lr}
    if config.sparse != "sgd":
        settings["eps"] = config.eps
    if config.sparse in GPU_OPTIMIZERS:
        settings["weight_decay"] = config.weight_decay
    return _TABLE_OPTIMIZERS[config.sparse], settings


class RunOptimizer:
    """All optimizers of a sharded model as one; every parameter belongs to exactly one of them.

    Data-parallel tables have no fused update (torchrec leaves them frozen without a word), so the same kind of
    optimizer updates them from their gradients.

    `clip_norm` bounds the gradient of everything but the tables, whose updates are done before it could be known.
    """

    def __init__(self, model: DistributedModelParallel, config: OptimizerConfig) -> None:
        self.config = config
        dense: dict[str, torch.Tensor] = {}
        replicated: dict[str, torch.Tensor] = {}
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
            if name in frozen:
                continue
            (replicated if "embedding_bags" in name.split(".") else dense)[name] = parameter
        self._tables = model.fused_optimizer
        self._dense = list(dense.values())
        self._towers = [module for module in model.modules() if isinstance(module, Tower)]
        self._step = 0
        self._gradient_norm: Tensor | None = None
        # Adam's step count; fbgemm increments it in every forward pass, in evaluation too.
        self._counted = [module for module in lookup_modules(model) if hasattr(module, "iter_cpu")]
        optimizers: list[tuple[str, Any]] = [("tables", self._tables)]
        if dense:
            wrapper = KeyedOptimizerWrapper(dense, lambda parameters: _adam(parameters, config))
            _prepare_state(wrapper)
            optimizers.append(("dense", wrapper))
        if replicated:
            kind, settings = _table_optimizer(config)
            wrapper = KeyedOptimizerWrapper(replicated, lambda parameters: kind(parameters, **settings))
            _prepare_state(wrapper)
            optimizers.append(("replicated", wrapper))
        self._combined = CombinedOptimizer(optimizers)
        self._check_complete(model, {*dense, *replicated, *frozen})

    def _check_complete(self, model: DistributedModelParallel, plain: set[str]) -> None:
        fused = set(model.fused_optimizer.params)
        names = {name for name, parameter in model.named_parameters() if parameter.numel()}  # of tables elsewhere: 0
        assert not fused & plain and names <= fused | plain, f"without optimizer: {sorted(names - fused - plain)}"

    def zero_grad(self) -> None:
        self._combined.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Update what backward has not, then move the towers' averages."""
        fault_point("step:backward", self._step + 1)
        # Every rank holds the same mean gradient, so this is its norm over all of them.
        if self._dense:
            self._gradient_norm = nn.utils.clip_grad_norm_(self._dense, self.config.clip_norm or math.inf)
        self._combined.step()
        if self.config.ema is not None:
            # Early averages are short ones: else the first weights would linger in them.
            decay = min(self.config.ema, (1 + self._step) / (10 + self._step))
            for tower in self._towers:
                tower.move_average(decay)

    def set_rates(self, step: int, num_steps: int) -> dict[str, float]:
        """Set the rates of `step`, pure functions of it; returns those of the tables (`lr`) and of the rest.

        To be called before the forward pass, in which the fused updates read their rate.
        """
        config, self._step = self.config, step
        dense_warmup = config.warmup_steps if config.dense_warmup_steps is None else config.dense_warmup_steps
        self._rates = {
            "lr": config.lr * rate_share(config.schedule, config.warmup_steps, step, num_steps),
            "dense_lr": config.dense_lr
            * rate_share(config.dense_schedule or config.schedule, dense_warmup, step, num_steps),
        }
        for name, optimizer in self._combined.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._rates["dense_lr" if name == "dense" else "lr"]
        self._tables.zero_grad()  # hands the rate to the kernels
        for module in self._counted:
            module.iter_cpu.fill_(step)
            module.iter.fill_(step)
        return self._rates

    def figures(self) -> dict[str, float]:
        """Return the figures of the last step for the log: its rates, and the norm of the gradient before clipping."""
        norm = {} if self._gradient_norm is None else {"gradient_norm": float(self._gradient_norm)}
        return {**self._rates, **norm}

    def state(self) -> dict[str, Any]:
        """Return the state tensors by parameter, as a checkpoint holds them; loading writes into these tensors."""
        return {name: dict(values) for name, values in self._combined.state_dict()["state"].items()}


def _prepare_state(optimizer: KeyedOptimizerWrapper) -> None:
    """Make the state that a checkpoint loads into; the dummy step for this must neither count nor change a weight."""
    for group in optimizer.param_groups:  # set_rates gives the rate; weight decay asks for no gradient
        group["lr"] = 0.0
    optimizer.init_state()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].zero_()


def _adam(parameters: list[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return Adam; with weight decay AdamW (Loshchilov and Hutter 2019), which does not decay biases and scalars."""
    if not config.dense_weight_decay:
        return torch.optim.Adam(parameters, lr=config.dense_lr)
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.dense_lr, weight_decay=config.dense_weight_decay)


def rate_share(schedule: str, warmup_steps: int, step: int, num_steps: int) -> float:
    """Return the factor of the rate: a linear rise, then constant, or a linear or cosine fall to FINAL_SHARE."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    passed = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    left = 1.0 - passed if schedule == "linear" else (1.0 + math.cos(math.pi * passed)) / 2
    return FINAL_SHARE + (1.0 - FINAL_SHARE) * left
