"""Vectors that were made elsewhere, and layers that read numbers."""

from __future__ import annotations

import math
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec
from trec_twotower.config.schema import Schema
from trec_twotower.data.features.transform import check_kind
from trec_twotower.data.features.embeddings import vectors
from trec_twotower.data.features.numeric import normalize
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.features.transform import transform
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.model.feature_encoders import VectorInput, WavesInput

IMAGE = build_feature(name="image", kind="vector", size=3, dim=4)
NUMBERS = st.floats(-1e6, 1e6, width=32)
ROWS = st.lists(st.none() | st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=5)
TYPES = [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float64(), 3)]


@pytest.mark.parametrize("kind", TYPES, ids=str)
@settings(max_examples=25)
@given(ROWS, st.booleans())
def test_a_vector_is_its_numbers_and_whether_it_is_missing(kind, rows, is_unit):
    feature = IMAGE.model_copy(update={"unit_length": is_unit})
    array = pa.array([[9.0, 9.0, 9.0], *rows], kind).slice(1)
    expected = []
    for row in rows:
        length = math.sqrt(sum(value**2 for value in row)) if row and is_unit else 1.0
        expected.append([0, 0, 0, 1] if row is None else [*(value / (length or 1.0) for value in row), 0])
    found = vectors(feature, array, "here")
    assert found.dtype == np.float32 and found.shape == (len(rows), 4)
    np.testing.assert_allclose(found, np.array(expected, float).reshape(-1, 4), rtol=1e-6, atol=1e-30)


def test_a_vector_of_another_length_is_refused():
    message = r"here, row 1: a vector of 2 numbers, but feature 'image' has size 3 \(1 of"
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 2)):
        with pytest.raises(DataError, match=message):
            vectors(IMAGE, pa.array([None, [1.0, 2.0]], kind), "here")


@pytest.mark.parametrize("odd", [math.nan, math.inf, 1e300, None])
def test_a_vector_with_a_hole_is_refused_or_missing(odd):
    array = pa.array([None, [1.0, 2.0, 3.0], [1.0, odd, 3.0]], pa.list_(pa.float64()))
    with pytest.raises(DataError, match=r"here, row 2: a vector with null, NaN or infinity \(1 of 3 rows"):
        vectors(IMAGE, array, "here")
    found = vectors(IMAGE.model_copy(update={"nan": "missing"}), array, "here")
    assert found.tolist() == [[0, 0, 0, 1], [1, 2, 3, 0], [0, 0, 0, 1]]


def test_a_vector_wants_lists_of_numbers():
    for kind in (pa.list_(pa.string()), pa.float32(), pa.list_(pa.int64())):
        with pytest.raises(DataError, match="feature 'image' of kind 'vector' needs lists of floating-point numbers"):
            check_kind(IMAGE, kind, "here")


def test_missing_vectors_are_learned_and_others_projected():
    number_BN = torch.tensor([[1.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    projected = VectorInput(IMAGE)
    torch.nn.init.normal_(projected.missing)
    found = projected(number_BN)
    assert torch.allclose(found[0], projected.project.weight @ number_BN[0, :3] + projected.project.bias, atol=1e-6)
    assert found[1].equal(projected.missing)
    plain = VectorInput(IMAGE.model_copy(update={"dim": None}))
    plain(number_BN).sum().backward()
    assert plain(number_BN)[0].tolist() == [1, 2, 3] and plain.missing.grad.tolist() == [1, 1, 1]


def test_vectors_stand_between_bags_and_plain_numbers():
    age, price = (build_feature(name=name, kind="number") for name in ("age", "price"))
    brand = build_feature(name="brand", kind="category", table="t")
    schema = Schema.build({"t": TableSpec(buckets=9, dim=8)}, (brand,), (age, IMAGE, brand, price))
    assert schema.layout.part_widths("item") == (8, 4, 4) and schema.layout.input_width("item") == 16
    assert schema.layout.part_names("item") == ["brand", "image", "age"]
    assert [schema.layout.part_index("item", name) for name in ("brand", "image", "age", "price")] == [0, 1, 2, 2]
    assert schema.layout.float_features("item") == [IMAGE, age, price]


def test_waves_equal_the_formula_written_out():
    waves = WavesInput(build_feature(name="age", kind="number", frequencies=2, dim=3))
    for value, missing in ((0.7, 0.0), (0.0, 1.0)):
        angles = [2 * math.pi * frequency * value for frequency in waves.frequency.tolist()]
        told = torch.tensor([value, missing, *map(math.sin, angles), *map(math.cos, angles)])
        expected = (waves.layer.weight @ told + waves.layer.bias).clamp(min=0)
        assert torch.allclose(waves(torch.tensor([[value, missing]]))[0], expected, atol=1e-6)


@pytest.mark.parametrize(("kind", "there"), [("zscore", (8 - 3) / 2), ("log1p", math.log(9)), ("none", 8.0)])
def test_a_default_stands_for_null_and_null_still_shows(kind, there):
    feature = build_feature(name="age", kind="number", normalize=kind, default=9.0, clip=(0, 8))
    found = normalize(feature, np.array([8.0, 0.0]), np.array([False, True]), Statistics(mean=3.0, std=2.0))
    np.testing.assert_allclose(found, [[there, 0], [there, 1]], rtol=1e-6)


def test_a_default_is_found_by_transform():
    feature = build_feature(name="age", kind="number", normalize="none", default=5.0)
    columns = transform([feature], {}, {"age": Statistics()}, pa.table({"age": pa.array([None, 2.0])}), "here")
    assert columns.numbers["age"].tolist() == [[5, 1], [2, 0]]


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"kind": "vector"}, "'size' is missing"),
        ({"kind": "vector", "size": 0}, "greater than 0"),
        ({"kind": "number", "size": 3}, "has no size: remove it"),
        ({"kind": "number", "frequencies": 4}, "has bins or frequencies, but no dim"),
        ({"kind": "number", "frequencies": 4, "dim": 4, "bins": 3}, "has bins and frequencies: keep one of them"),
        ({"kind": "number", "default": 4, "dim": 4, "bins": 3}, "has bins, of which null has one: remove default"),
    ],
)
def test_settings_that_clash_are_refused(feature, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_feature(name="f", **feature)
