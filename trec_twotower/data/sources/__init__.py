"""Registry of dataset sources. A source converts raw files, or generates data from a seed, into a dataset folder.

Importing this module is cheap: a source's own module, with numpy and pyarrow, loads on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trec_twotower.errors import ConfigError, nearest
from trec_twotower.storage.atomic import naming_a_full_disk

if TYPE_CHECKING:
    from trec_twotower.data.sources.options import SourceOptions
    from trec_twotower.data.sources.writer import DatasetWriter


@dataclass(frozen=True)
class Source:
    """One source of datasets: `module` has its `write(options, writer)`, and `options_class` is the dotted name of its
    option model, in a module that loads fast."""

    name: str
    module: str
    options_class: str
    help: str

    @property
    def options(self) -> type[SourceOptions]:
        """Return the frozen pydantic model of the source's options."""
        module, _, name = self.options_class.rpartition(".")
        model: type[SourceOptions] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        return model

    @property
    def function(self) -> Callable[[SourceOptions, DatasetWriter], dict[str, Any]]:
        """Return the function that writes the dataset and returns the content of dataset.yaml."""
        write: Callable[[SourceOptions, DatasetWriter], dict[str, Any]]
        write = importlib.import_module(f"{__name__}.{self.module}").write
        return write


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "synthetic",
            "synthetic.source",
            "synthetic.options.Options",
            "a synthetic dataset of any size whose best reachable recall is known",
        ),
        Source(
            "gowalla",
            "gowalla",
            "public_options.GowallaOptions",
            "Gowalla check-ins without times: train.txt and test.txt, lines of `user item item ...`",
        ),
        Source(
            "amazon-beauty",
            "amazon_beauty",
            "public_options.BeautyOptions",
            "Amazon Beauty: one file of item sequences in time order, and item attributes",
        ),
        Source(
            "amazon-reviews",
            "amazon_reviews",
            "public_options.ReviewOptions",
            "Amazon Reviews 2023 (and 2018): reviews and metadata as JSON lines",
        ),
        Source(
            "movielens",
            "movielens",
            "public_options.MovielensOptions",
            "MovieLens, 100K to 32M: ratings, movies, users and tags",
        ),
        Source(
            "goodbooks",
            "goodbooks",
            "public_options.GoodbooksOptions",
            "goodbooks-10k: ratings, books and shelves, as CSV",
        ),
        Source(
            "events",
            "events",
            "event_logs.options.Options",
            "any log of users, items and times, as Parquet, CSV or JSON lines",
        ),
    )
}


def parse_options(source: str, overrides: Iterable[str]) -> dict[str, Any]:
    """Return the options of a source from `key=value` arguments; ConfigError for an unknown source or a bad value."""
    from trec_twotower.data.sources.options import parse_options as parse

    if source not in SOURCES:
        raise ConfigError(f"There is no source {source!r}{nearest(source, SOURCES)}.")
    return parse(SOURCES[source].options, overrides)


def prepare(source: str, out: Path, overrides: dict[str, Any], overwrite: bool = False) -> dict[str, Any]:
    """Write the dataset folder `out` from the named source; return the content of its dataset.yaml.

    Raises ConfigError for an unknown source or option and if `out` exists, DataError for bad files.
    """
    if source not in SOURCES:
        raise ConfigError(f"There is no source {source!r}{nearest(source, SOURCES)}.")
    from trec_twotower.data.sources.options import read_options
    from trec_twotower.data.sources.writer import DatasetWriter

    chosen = SOURCES[source]
    options = read_options(source, chosen.options, overrides)
    with DatasetWriter(out, overwrite=overwrite) as writer, naming_a_full_disk(writer.out, writer.temporary):
        return chosen.function(options, writer)
