"""Which index a catalogue gets, by its size, the memory there is and what it is searched for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from trec_twotower.config.evaluation import IndexConfig
from trec_twotower.errors import ConfigError

EXACT_ITEMS = 16_384  # up to this number, scoring all items is as fast as selecting some
GRAPH_LISTS = 16_384  # from this number on, a graph finds the lists
SHARD_BYTES = 16 << 30  # a file, and a GPU's share, stays below
SHARD_ITEMS, MOST_SHARDS = 64, 256  # a search goes through all shards: more, of fewer items, serve nobody
POINTS_PER_LIST = 39  # FAISS's own floor of training points for a centroid worth its name
ID_BYTES = 8


@dataclass(frozen=True)
class Recipe:
    """A FAISS factory string, and how many indexes of that kind share the items."""

    factory: str
    shards: int = 1

    @property
    def lists(self) -> int | None:
        """Return the number of inverted lists; None for an index without them."""
        found = re.search(r"IVF(\d+)", self.factory)
        return int(found[1]) if found else None


def choose_recipe(num_items: int, dim: int, config: IndexConfig, *, on_gpu: bool = False) -> Recipe:
    """Return the recipe of `config.factory`, else the fastest of ours that fits into `config.memory_gb`.

    Lists of half-precision vectors: half the bytes of float32 go through the processor, and the rounding costs no
    recall. Up to EXACT_ITEMS stay in float32, whose scores are exact. With less memory than that, lists have 8-bit
    codes. Raises ConfigError where nothing fits.
    """
    if config.factory is not None:
        lists = Recipe(config.factory).lists
        if lists is not None and lists > num_items:
            raise ConfigError(
                f"index.factory asks for {lists:,} lists but the catalogue has {num_items:,} items: "
                f"ask for at most {num_items:,}, or leave factory out for a choice by size."
            )
        return Recipe(config.factory, _shards(num_items, config) or 1)
    budget = math.inf if config.memory_gb is None else config.memory_gb * 1e9
    lists = choose_lists(num_items, config)
    choices = {"Flat": 4.0 * dim} if num_items <= EXACT_ITEMS and config.lists is None else {}
    if not choices or 4 * dim * num_items > budget:
        choices |= _list_recipes(num_items, lists, dim, on_gpu)
    overhead = 4 * dim * lists
    for factory, item_bytes in choices.items():
        num_bytes = int(item_bytes * num_items) + (overhead if factory != "Flat" else 0)
        if num_bytes <= budget:
            shards = _shards(num_items, config) or math.ceil(num_bytes / SHARD_BYTES)
            return Recipe(factory, shards)
    raise ConfigError(
        f"index.memory_gb is {config.memory_gb:g}, but {num_items:,} items of dim {dim} take at least "
        f"{num_bytes / 1e9:.3g} GB as {factory}: allow so much, lower model.dim, or say what to do with index.factory."
    )


def _shards(num_items: int, config: IndexConfig) -> int | None:
    most = max(1, min(MOST_SHARDS, num_items // SHARD_ITEMS))
    if config.shards is not None and config.shards > most:
        raise ConfigError(
            f"index.shards is {config.shards:,} but the catalogue has {num_items:,} items, which are shared by at most "
            f"{most:,} indexes ({SHARD_ITEMS} items each, {MOST_SHARDS} in all): lower it, or leave it out."
        )
    return config.shards


def choose_lists(num_items: int, config: IndexConfig) -> int:
    """Return about 3 sqrt(items) lists, fewer if they had too few training points; 1 for a tiny catalogue."""
    if config.lists is None:
        num_trained = min(num_items, config.max_train_vectors or num_items)
        return max(1, min(int(3 * math.sqrt(num_items)), num_trained // POINTS_PER_LIST))
    if config.lists > num_items:
        raise ConfigError(
            f"index.lists is {config.lists:,} but the catalogue has {num_items:,} items: set it to at most "
            f"{num_items:,}, or leave it out for a number by rule."
        )
    return config.lists


def _list_recipes(num_items: int, lists: int, dim: int, on_gpu: bool) -> dict[str, float]:
    """Return factory strings, the fastest first, with their bytes per item."""
    coarse = f"IVF{lists}" if lists < GRAPH_LISTS or on_gpu else f"IVF{lists}_HNSW32"
    half, eighth = {f"{coarse},SQfp16": 2.0 * dim + ID_BYTES}, {f"{coarse},SQ8": 1.0 * dim + ID_BYTES}
    if num_items <= EXACT_ITEMS:
        return {f"{coarse},Flat": 4.0 * dim + ID_BYTES} | half | eighth
    return half | eighth
