"""A distributed two-tower recommender on TorchRec: Parquet in, recommendations out."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Each name and the module it comes from; loaded at first use, so that `import trec_twotower` stays free of torch.
_CONTENTS = {
    "ConfigError": "errors",
    "DataError": "errors",
    "FeatureSpec": "schema",
    "Schema": "schema",
    "TableSpec": "schema",
    "RunConfig": "config",
    "load_config": "config",
    "Ranks": "distributed",
    "Catalogue": "data.catalogue",
    "Dataset": "data.dataset",
    "hash_to_bucket": "data.hashing",
    "TwoTower": "model.two_tower",
    "train": "train",
    "Encoder": "encoder",
    "ItemIndex": "index",
    "Retriever": "serve",
}
__all__ = sorted([*_CONTENTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _CONTENTS:
        raise AttributeError(f"module 'trec_twotower' has no attribute {name!r}")
    return getattr(import_module(f"trec_twotower.{_CONTENTS[name]}"), name)
