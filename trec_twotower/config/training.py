"""Settings of training: duration, optimizer, initial weights, checkpoints."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from trec_twotower.config.base import Seed, Settings
from trec_twotower.errors import ConfigError

RateSchedule = Literal["constant", "linear", "cosine"]
GPU_OPTIMIZERS = ("adam", "partial_rowwise_adam", "lamb")  # table optimizers that fbgemm has only for GPUs


class OptimizerConfig(Settings):
    """Fused updates of the embedding tables, and Adam for all other weights."""

    # Optimizer of the tables; adam, partial_rowwise_adam and lamb need a GPU.
    sparse: Literal["rowwise_adagrad", "adagrad", "sgd", "adam", "partial_rowwise_adam", "lamb"] = "rowwise_adagrad"
    lr: PositiveFloat = 0.05  # learning rate of the tables
    eps: PositiveFloat = 1e-8  # epsilon of the tables' optimizer
    weight_decay: NonNegativeFloat = 0.0  # weight decay of the rows that a step looks up; only for GPU optimizers
    dense_lr: PositiveFloat = 1e-3  # learning rate of all other weights (Adam)
    dense_weight_decay: NonNegativeFloat = 0.0  # decoupled weight decay of the layers' matrices (AdamW)
    clip_norm: PositiveFloat | None = None  # limit of the gradient norm of all weights but the tables
    warmup_steps: NonNegativeInt = 0  # steps over which the learning rates rise linearly
    schedule: RateSchedule = "constant"  # learning rates after the warmup; linear and cosine fall to 1/50 at the end
    dense_warmup_steps: NonNegativeInt | None = None  # the same for all weights but the tables; default: warmup_steps
    dense_schedule: RateSchedule | None = None  # the same for all weights but the tables; default: schedule
    ema: float | None = Field(default=None, gt=0, lt=1)  # decay per step of averaged towers for evaluation and export

    @model_validator(mode="after")
    def _check_weight_decay(self) -> Self:
        if self.weight_decay and self.sparse not in GPU_OPTIMIZERS:
            raise ConfigError(
                f"train.optimizer.weight_decay is {self.weight_decay:g}, but fbgemm's {self.sparse} has no weight "
                f"decay: set it to 0 (dense_weight_decay is that of the layers), or sparse to "
                f"{', '.join(GPU_OPTIMIZERS)}."
            )
        return self


class SpectralConfig(Settings):
    """Spectral initialization (truncated SVD) of the history's table and the item's table."""

    # before_training: initial weights. after_training: added after training, which excludes both features.
    when: Literal["before_training", "after_training"] = "before_training"
    history: str  # user feature: the bag of items
    item: str = "item_id"  # item feature: the id
    user_power: NonNegativeFloat = 0.4  # exponent that reduces the weight of users with many items
    item_power: NonNegativeFloat = 0.4  # exponent that reduces the weight of popular items
    history_power: NonNegativeFloat = 0.3  # exponent that reduces the weight of popular items in a history
    length_power: float = 0.3  # exponent that raises the scores of popular items
    spectrum_power: NonNegativeFloat = 0.3  # exponent of the singular values; 0: all directions have equal weight
    # Share of each item's co-occurrence with itself, the diagonal of N^T N, that is subtracted; 0: the SVD of N.
    diagonal_share: NonNegativeFloat = 0.0
    score_std: PositiveFloat | None = None  # standard deviation of the scores, users by items; default: not scaled
    oversampling: PositiveInt = 64  # directions beyond the tables' dim in the randomized SVD
    iterations: PositiveInt = 2  # power iterations of the randomized SVD


class TrainConfig(Settings):
    epochs: NonNegativeInt = 10  # passes over train/; 0: the initial weights are the model
    seed: Seed = 0  # seed of the initial weights
    spectral: SpectralConfig | None = None  # initial weights by a truncated SVD; default: small random weights
    optimizer: OptimizerConfig = OptimizerConfig()
    # Type of the towers' matrix multiplications; weights, vectors and logits are fp32. auto: bf16 where it is faster.
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    micro_batch: PositiveInt | None = None  # rows per forward pass of the towers, which the backward pass repeats
    # plain: steps follow each other; sparse_dist: the next batch's ids are sent during a step.
    pipeline: Literal["plain", "sparse_dist"] = "plain"
    compile: bool = False  # compile the towers with torch.compile
    profile_steps: NonNegativeInt = 0  # steps to trace into RUN/profile, after a few to warm up
    log_every: PositiveInt = 20  # steps between log lines
    # Experiment trackers besides metrics.jsonl; mlflow and wandb are extras of the package.
    log_to: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    evaluate_every: PositiveInt | None = None  # steps between evaluations; default: one per epoch
    timeout_s: PositiveInt = 300  # limit of a collective, after which the job ends
    first_timeout_s: PositiveInt = 900  # limit until the first step is done, because ranks start at different times
    max_failures: PositiveInt = 5  # failures in a row without a new checkpoint after which the run does not restart
    threads: NonNegativeInt = 0  # torch threads per rank; 0: OMP_NUM_THREADS, or the cores divided by the ranks
    # auto: the GPUs of this machine, or the CPU if there are none; a GPU that torch cannot use is an error.
    device: Literal["auto", "cpu", "cuda"] = "auto"


class CheckpointConfig(Settings):
    every: PositiveInt | None = None  # steps between checkpoints; default: one per epoch
    keep: int = Field(default=2, ge=2)  # newest checkpoints to keep besides the best; one may be damaged
    in_background: bool = True  # write while training continues; needs memory for a copy of a rank's shards
