"""A tower as a torch.export program: tensors to vectors without this package, in C++ or through AOTInductor."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trec_twotower.config.base import Side
from trec_twotower.config.features import SequenceFeature
from trec_twotower.config.schema import Schema, bucket_names, lookup_key, sub_name
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.features.lists import GAP_BUCKETS
from trec_twotower.data.loading.batch import JaggedLookup, make_batch
from trec_twotower.model.embeddings import table_parameters
from trec_twotower.model.tower_inputs import Pooled, SideInputs, build_inputs, pool_jagged
from trec_twotower.model.two_tower import TwoTower
from trec_twotower.ops.ragged import Ragged, offsets_of

ROWS = 5  # of the batch that is traced; any other number runs
TOKENS = 8  # of a made-up vocabulary
CHECKED = (1, 2, 9)  # rows of the batches on which the program is compared with the model


class ProgramError(RuntimeError):
    """Why there is no program of a tower."""


class Program(nn.Module):
    """One side's tables and tower. `forward` maps the tensors of `program_inputs`, by name, to vectors:

    KEY/values   int64, the table rows of all rows' ids below each other; KEY is such as user:history
    KEY/length   int64, how many of them each row has (of a sequence's items and their attributes: each distinct item)
    KEY/weight   float32, one an id, where the feature has weights
    KEY/place    of a sequence: int64, which of the distinct items each step is; KEY/length is then the rows'.
                 Of text that a language model reads: its tokens
    KEY/gap, KEY/action, KEY/divisor   of a sequence and its attributes, where it has them
    divisor      float32 (rows, features with a table): what each feature's pooled sum is divided by
    number       float32 (rows, numbers): normalised values and their indicators
    """

    def __init__(self, model: TwoTower, side: Side) -> None:
        super().__init__()
        layout = model.schema.layout
        self.schema, self.side = model.schema, side
        self.table_of = {each.key: each.feature.table_name for each in layout.pooled_lookups if each.side == side}
        self.bags = list(self.table_of)
        self.table_of |= {name: table for name, table in layout.unpooled_keys.items() if _is_of(name, side)}
        self.tokens = [lookup_key(side, feature) for feature in layout.layer_features(side) if feature.has_tokens]
        weights = table_parameters(model)
        self.tables = nn.ParameterDict({name: weights[name] for name in sorted(set(self.table_of.values()))})
        self.tower = model.user_tower if side == "user" else model.item_tower

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        def listed(name: str) -> JaggedLookup:
            return JaggedLookup(**{field: inputs.get(f"{name}/{field}") for field in _FIELDS})

        vectors = {
            name: F.embedding(inputs[f"{name}/values"], self.tables[table]).float()
            for name, table in self.table_of.items()
        }
        pooled = Pooled()
        for name in self.bags:
            vector = pool_jagged(vectors.pop(name), listed(name))
            pooled.add(vector, {name: vector.shape[1]})
        by_hand = {name: listed(name) for name in (*vectors, *self.tokens)}
        side = SideInputs(self.tower, inputs["divisor"], inputs["number"])
        return self.tower(build_inputs(self.schema, {self.side: side}, pooled, vectors, by_hand)[self.side])


_FIELDS = ("length", "weight", "divisor", "place", "gap", "action")


def program_inputs(schema: Schema, side: Side, columns: Columns) -> dict[str, Tensor]:
    """Return the input tensors of a side's program for these rows."""
    batch = make_batch(schema, columns, None) if side == "user" else make_batch(schema, None, columns)
    divisor, number = batch.user_divisor_BF, batch.user_number_BN
    if side == "item":
        divisor, number = batch.item_divisor_SF, batch.item_number_SN
    found = {"divisor": divisor, "number": number}
    for name in batch.sparse.keys():  # noqa: SIM118 - torchrec's, no dict
        if _is_of(name, side):
            bags = batch.sparse[name]
            found |= {f"{name}/values": bags.values().long(), f"{name}/length": bags.lengths().long()}
            if schema.layout.is_weighted:
                found[f"{name}/weight"] = bags.weights()
    for name in schema.layout.unpooled_keys:
        if not _is_of(name, side):
            continue
        assert batch.sequences is not None
        found[f"{name}/values"] = batch.sequences[name].values().long()
    for name, listed in batch.listed.items():
        if _is_of(name, side):
            found |= {f"{name}/{field}": value for field, value in vars(listed).items() if value is not None}
    return found


def export_program(model: TwoTower, side: Side) -> Any:
    """Return the torch.export.ExportedProgram of a side for any number of rows; raises ProgramError if torch cannot.

    It is compared with the model on batches of other sizes: a size that tracing has fixed would be noticed.
    """
    program = Program(model, side).eval()
    schema, rng = model.schema, np.random.default_rng(0)
    inputs = program_inputs(schema, side, made_up(schema, side, ROWS, rng))
    dynamic = {name: {0: torch.export.Dim.AUTO} for name in inputs}
    try:
        with torch.no_grad(), _silence():
            exported = torch.export.export(program, (inputs,), dynamic_shapes=(dynamic,), strict=False)
            for rows in CHECKED:
                other = program_inputs(schema, side, made_up(schema, side, rows, rng))
                found, expected = exported.module()(other), program(other)
                if not torch.allclose(found, expected, atol=1e-4, rtol=1e-4):
                    raise ProgramError(f"the program of the {side} tower differs from it for {rows} rows")
    except ProgramError:
        raise
    except Exception as error:  # torch raises of many kinds; what stops it is a part that depends on numbers
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ProgramError(f"torch.export cannot have the {side} tower: {type(error).__name__}: {first}") from error
    return exported


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep torch from printing the graph of what it cannot export, and from warning of what it can."""
    loud = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level, nowhere = loud.level, io.StringIO()
    loud.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        loud.setLevel(level)


def made_up(schema: Schema, side: Side, rows: int, rng: np.random.Generator) -> Columns:
    """Return random features as example inputs: lists of several elements, some of them empty."""
    sparse, numbers = {}, {}
    items = None
    for feature in schema.features(side):
        if feature.num_numbers:
            numbers[feature.name] = rng.normal(size=(rows, feature.num_numbers)).astype(np.float32)
            continue
        most = min(feature.length_limit or 4, 6) if feature.is_ragged or feature.has_tokens else 1
        lengths = rng.integers(0, most + 1, rows) if most > 1 else np.ones(rows, np.int64)
        lengths[0] = most
        offsets = offsets_of(lengths)
        top, names = TOKENS, [feature.name]
        if feature.looks_up_table:
            table = schema.table_of(feature)
            top, names = table.buckets, bucket_names(feature.name, table)
        weights = rng.random(offsets[-1]).astype(np.float32) if feature.is_weighted else None
        for name in names:
            values = rng.integers(0, top, offsets[-1]).astype(np.int32)
            sparse[name] = Ragged(offsets, values, weights, most == 1)
        if not isinstance(feature, SequenceFeature):
            continue
        for part, top in (("gap", GAP_BUCKETS), ("action", feature.action_buckets), ("row", ROWS)):
            sparse[sub_name(feature.name, part)] = Ragged(offsets, rng.integers(0, top, offsets[-1]).astype(np.int32))
        if feature.attributes:
            items = made_up(schema, "item", ROWS, rng)
    return Columns(rows, sparse, numbers, items)


def _is_of(name: str, side: Side) -> bool:
    return name.startswith(f"{side}:")
