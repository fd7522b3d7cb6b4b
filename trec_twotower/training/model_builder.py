"""Models of a config: sharded over ranks, for training or inference, or with whole tables in one process."""

from __future__ import annotations

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from trec_twotower.config.run_config import RunConfig
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.model.embeddings import fill_tables
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.training.optimizer import check_optimizer, fuse_table_updates
from trec_twotower.training.sharding import shard
from trec_twotower.training.spectral_initialization import check_start


def build_model(config: RunConfig, ranks: Ranks, *, for_training: bool = True) -> DistributedModelParallel:
    """Return the model, sharded over the ranks, which call together.

    For training its tables have their optimizer, and its first weights depend on the seed alone. For inference there is
    no optimizer, and the tables are not initialized: load a checkpoint.
    """
    schema = config.feature_schema
    if for_training:
        torch.manual_seed(config.train.seed)
    model = TwoTower(schema, config.model, config.loss, ranks)
    for tower in (model.user_tower, model.item_tower):
        tower.to(ranks.device)
        tower.trains_as(config.train, ranks)
    if for_training:
        check_optimizer(config.train.optimizer, schema, ranks.device.type)
        if config.train.spectral is not None:
            check_start(schema, config.train.spectral)
        fuse_table_updates(model, config.train.optimizer)
    sharded = shard(model, schema, ranks, config.data.batch_size // ranks.num_ranks + 1)
    if for_training:
        fill_tables(sharded, schema, config.train.seed)
    return sharded


def build_whole_model(config: RunConfig, *, has_tables: bool = True) -> TwoTower:
    """Return the model with whole, uninitialized tables on the CPU; without memory for them unless `has_tables`."""
    ranks = Ranks(0, 1, torch.device("cpu"))
    model = TwoTower(config.feature_schema, config.model, config.loss, ranks)
    for tower in (model.user_tower, model.item_tower):
        tower.trains_as(config.train.model_copy(update={"compile": False}), ranks)
    for tables in (model.tables, model.lists):
        if tables is not None and has_tables:
            tables.to_empty(device="cpu")
    return model.float()  # also fp16 tables: torch's own pooling wants one type


def inner_model(model: DistributedModelParallel) -> TwoTower:
    """Return the TwoTower inside a sharded model."""
    inner = model.module
    assert isinstance(inner, TwoTower)
    return inner
