"""A distributed two-tower recommender on TorchRec: Parquet in, recommendations out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers and editors
    from trec_twotower.config.feature_spec import FeatureSpec as FeatureSpec
    from trec_twotower.config.features import build_feature as build_feature
    from trec_twotower.config.loading import load_config as load_config
    from trec_twotower.config.model import TableSpec as TableSpec
    from trec_twotower.config.run_config import RunConfig as RunConfig
    from trec_twotower.config.schema import Schema as Schema
    from trec_twotower.data.dataset import Dataset as Dataset
    from trec_twotower.data.features.hash_column import hash_column as hash_column
    from trec_twotower.data.item_table import Catalogue as Catalogue
    from trec_twotower.distributed.ranks import Ranks as Ranks
    from trec_twotower.distributed.ranks import start_ranks as start_ranks
    from trec_twotower.errors import ConfigError as ConfigError
    from trec_twotower.errors import DataError as DataError
    from trec_twotower.index import ItemIndex as ItemIndex
    from trec_twotower.inference.tower_encoder import Encoder as Encoder
    from trec_twotower.model.two_tower import TwoTower as TwoTower
    from trec_twotower.ops.hashing import hash_to_bucket as hash_to_bucket
    from trec_twotower.serving.retriever import Retriever as Retriever
    from trec_twotower.training.loop import train as train

__version__ = "0.1.0"

# Each name and its module, imported at first use, so that `import trec_twotower` does not load torch. No name may be
# that of a submodule: importing the submodule would replace it.
_MODULE_OF = {
    "Catalogue": "data.item_table",
    "ConfigError": "errors",
    "DataError": "errors",
    "Dataset": "data.dataset",
    "Encoder": "inference.tower_encoder",
    "FeatureSpec": "config.feature_spec",
    "ItemIndex": "index",
    "Ranks": "distributed.ranks",
    "Retriever": "serving.retriever",
    "RunConfig": "config.run_config",
    "Schema": "config.schema",
    "TableSpec": "config.model",
    "TwoTower": "model.two_tower",
    "build_feature": "config.features",
    "hash_column": "data.features.hash_column",
    "hash_to_bucket": "ops.hashing",
    "load_config": "config.loading",
    "start_ranks": "distributed.ranks",
    "train": "training.loop",
}
__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'trec_twotower' has no attribute {name!r}")
    return getattr(import_module(f"trec_twotower.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
