"""Text: hashed words and their parts against a reading word by word, and a language model that reads each text once."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks.bazaar import WORDS, write_model
from trec_twotower.config.base import as_values, validate
from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import build_feature
from trec_twotower.config.model import TableSpec
from trec_twotower.config.run_config import RunConfig
from trec_twotower.config.schema import Schema
from trec_twotower.data.features.transform import check_kind
from trec_twotower.data.features.hash_column import hash_column
from trec_twotower.data.features.text import _most_tokens, check_folder, text_keys, tokens
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.features.lists import put_pooling_divisor
from trec_twotower.data.features.transform import transform
from trec_twotower.data.loading.batch import JaggedLookup
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.errors import ConfigError, DataError
from trec_twotower.inference.exported_program import export_program, program_inputs
from trec_twotower.model.encode import encode
from trec_twotower.model.feature_encoders import TextInput
from trec_twotower.ops.hashing import mix
from trec_twotower.training.model_builder import build_whole_model

TITLE = build_feature(name="title", kind="text", table="t")
LETTERS = st.text(st.sampled_from("aB ß_9,é中\u0301ﬁ-"), max_size=12)


def slow_keys(text: str | None, words: int, characters: tuple[int, int] | None, most: int | None) -> list[int]:
    found, word = [], ""
    for letter in unicodedata.normalize("NFKC", text or "").casefold() + " ":
        if letter.isalnum() or letter == "_":
            word += letter
        elif word:
            found.append(word)
            word = ""
    found = found[:most]
    key = [xxhash.xxh3_64_intdigest(each.encode()) for each in found]
    keys = []
    for length in range(1, words + 1):
        for first in range(len(key) - length + 1):
            if length == 1:
                keys.append(key[first])
                continue
            state = 0
            for each in key[first : first + length]:
                state = mix(each ^ state)
            keys.append(state)
    for each in found if characters else []:
        marked = f"<{each}>"
        for length in range(characters[0], characters[1] + 1):
            for start in range(len(marked) - length + 1):
                keys.append(xxhash.xxh3_64_intdigest(f"#{marked[start : start + length]}".encode()))
    return keys


@given(
    st.lists(st.none() | LETTERS, max_size=5),
    st.integers(0, 3),
    st.none() | st.sampled_from([(1, 2), (3, 5)]),
    st.none() | st.integers(1, 3),
    st.booleans(),
)
def test_text_is_its_words_their_runs_and_their_parts(texts, words, characters, most, is_encoded):
    characters = characters or (None if words else (2, 2))
    feature = build_feature(name="title", kind="text", table="t", words=words, characters=characters, max_length=most)
    array = pa.array(["left out", *texts], pa.string()).slice(1)
    found = text_keys(feature, array.dictionary_encode() if is_encoded else array)
    for row, text in enumerate(texts):
        keys = found.values[found.offsets[row] : found.offsets[row + 1]].view(np.uint64).tolist()
        assert keys == slow_keys(text, words, characters, most)


def test_text_is_pooled_as_a_bag():
    spec = TableSpec(buckets=1 << 20, dim=4)
    table = pa.table({"title": pa.array(["Red shoe", None, "red"])})
    found = transform([TITLE], {"t": spec}, {}, table, "here").sparse["title"]
    assert found.lengths.tolist() == [2, 0, 1] and found.values[0] == found.values[2]
    divisor = np.empty(3, np.float32)
    put_pooling_divisor(TITLE, found, divisor)
    assert divisor.tolist() == [2, 1, 1]  # the mean
    as_id = hash_column(build_feature(name="title", kind="id", table="t"), pa.array(["red"]), spec)
    assert hash_column(TITLE, pa.array(["RED!"]), spec).to_pylist() == [
        as_id.to_pylist()
    ]  # a word is as an id of its name
    with pytest.raises(DataError, match="feature 'title' of kind 'text' needs strings"):
        check_kind(TITLE, pa.int64(), "here")


# A language model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


def read_by(model: Path, **changes) -> FeatureSpec:
    return build_feature(
        **{"name": "title", "kind": "text", "folder": str(model), "dim": 4, "max_length": 16} | changes
    )


def listed(feature: FeatureSpec, texts: list[str | None]) -> JaggedLookup:
    lists = tokens(feature, pa.array(texts, pa.string()))
    length, place = (torch.from_numpy(values.astype(np.int64)) for values in (lists.lengths, lists.values))
    return JaggedLookup(length, place=place)


TEXTS = ["red shoe", None, "blue hat old", "red shoe", "book", "red unheard-of"]


def test_tokens_are_the_tokenizers_cut_to_the_first(model):
    number = {word: 2 + place for place, word in enumerate(WORDS)}
    found = tokens(read_by(model, max_length=2), pa.array(["blue hat old", None, "", "zebra", "blue hat old"]))
    assert found.lengths.tolist() == [2, 0, 0, 1, 2]
    assert found.values.tolist() == [number["blue"], number["hat"], 1, number["blue"], number["hat"]]


@pytest.mark.parametrize("tune", ["frozen", 1, "all"])
@pytest.mark.parametrize("is_training", [True, False])
def test_a_batch_of_texts_is_each_text_by_itself(model, tune, is_training):
    from transformers import AutoModel

    feature = read_by(model, tune=tune)
    reader = TextInput(feature).train(is_training)
    torch.nn.init.normal_(reader.missing)
    found = reader(listed(feature, TEXTS))
    alone = AutoModel.from_pretrained(model, local_files_only=True).eval()
    for row, text in enumerate(TEXTS):
        if text is None:
            assert found[row].equal(reader.missing)
            continue
        token = listed(feature, [text]).place[None]
        mean = alone(input_ids=token).last_hidden_state[0].mean(0)
        assert torch.allclose(found[row], reader.project(mean), atol=1e-5), text


def test_each_distinct_text_is_read_once_and_kept_while_the_weights_stay(model):
    def read(reader: TextInput, texts: list[str | None]) -> int:
        """How many texts the language model gets to see."""
        seen = []
        hook = reader.model.register_forward_pre_hook(
            lambda module, given, named: seen.append(len(named["input_ids"])), with_kwargs=True
        )
        with torch.set_grad_enabled(reader.training):
            found = reader(listed(feature, texts))
        hook.remove()
        assert found.shape == (len(texts), 4)
        return sum(seen)

    frozen, tuned = (TextInput(read_by(model, tune=tune)).train() for tune in ("frozen", "all"))
    feature, distinct = read_by(model), 5
    assert [read(frozen, TEXTS), read(frozen, TEXTS)] == [distinct, 0]
    assert [read(tuned, TEXTS), read(tuned, TEXTS)] == [distinct, distinct]
    frozen.eval()
    tuned.eval()
    assert [read(frozen, TEXTS), read(frozen, ["hat", "book"])] == [0, 1]
    assert [read(tuned, TEXTS), read(tuned, TEXTS[:2]), read(tuned, ["hat", "book"])] == [distinct, 0, 1]
    tuned.train()
    assert [read(tuned, ["hat"]), read(tuned.eval(), ["hat"])] == [1, 1]  # what was kept has been let go
    assert read(tuned, []) == 1  # one that no one asked for, thrown away


@pytest.mark.parametrize(("tune", "layers"), [("frozen", set()), (1, {1}), (2, {0, 1}), ("all", {0, 1})])
def test_only_the_layers_that_are_tuned_learn(model, tune, layers):
    feature = read_by(model, tune=tune)
    reader = TextInput(feature).train()
    reader(listed(feature, TEXTS)).square().sum().backward()
    learned = {name for name, weight in reader.model.named_parameters() if weight.grad is not None}
    assert {int(name.split(".")[2]) for name in learned if ".layer." in name} == layers
    assert any("embeddings" in name for name in learned) == (tune == "all")
    waiting = {name for name, weight in reader.model.named_parameters() if weight.requires_grad}
    assert waiting == learned  # ranks would wait forever for a gradient that never comes
    assert reader.project.weight.grad.abs().sum() > 0


def test_no_text_leaves_every_weight_with_a_gradient_of_zero(model):
    feature = read_by(model, tune="all")
    reader = TextInput(feature).train()
    reader(listed(feature, [])).sum().backward()
    weights = [weight for weight in reader.parameters() if weight.requires_grad]
    assert weights and all(weight.grad is not None and not weight.grad.any() for weight in weights)


def test_a_folder_that_holds_no_model_is_refused(tmp_path, model):
    def refusal(**changes) -> str:
        with pytest.raises(ConfigError) as refused:
            check_folder(read_by(tmp_path, **changes))
        return str(refused.value)

    assert f"has folder: {tmp_path}, which is no Hugging Face model" in refusal()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "num_hidden_layers": 2}))
    assert "has no *.safetensors" in refusal()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "has a bert but no tokenizer" in refusal()
    (tmp_path / "vocab.txt").write_text("[UNK]")
    assert "has tune: 3, but the model in" in refusal(tune=3)
    with pytest.raises(ConfigError, match="contains no model that transformers can load"):
        TextInput(read_by(tmp_path))


@pytest.mark.parametrize(
    ("kind", "sizes", "max_length", "said"),
    [
        ("BertConfig", {"max_position_embeddings": 16}, 17, "has max_length: 17, but the bert in .* for 16 tokens"),
        ("BertConfig", {"max_position_embeddings": 16}, None, "has no max_length, so 64 tokens, but the bert"),
        ("GPT2Config", {"n_positions": 16}, 17, "places for 16 tokens: set max_length to 16 or less"),
        ("RobertaConfig", {"max_position_embeddings": 18}, 17, "places for 16 tokens"),
        ("T5Config", {}, 8, "the t5 in .* is an encoder with a decoder, .* take a plain encoder"),
        ("CLIPConfig", {}, 8, r"the clip in .* is made of parts \(text_config, vision_config\)"),
    ],
)
def test_models_that_cannot_read_so_much_or_at_all_are_refused_with_the_config(tmp_path, kind, sizes, max_length, said):
    import transformers

    getattr(transformers, kind)(**sizes).save_pretrained(tmp_path)
    for name in ("model.safetensors", "vocab.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=said):
        check_folder(read_by(tmp_path, max_length=max_length))
    if sizes:
        check_folder(read_by(tmp_path, max_length=16))


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_a_model_reads_as_many_tokens_as_it_says(kind, tmp_path):
    """The longest text that is not refused, by the model itself; a longer one ends in an error of its own."""
    import transformers

    sizes = {"hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 4, "num_hidden_layers": 1}
    config = getattr(transformers, f"{kind}Config")(vocab_size=9, max_position_embeddings=18, **sizes)
    reader = getattr(transformers, f"{kind}Model")(config).eval()
    most = _most_tokens(config.to_dict())
    read = torch.full((1, most + 1), 5)
    assert reader(input_ids=read[:, :most]).last_hidden_state.shape == (1, most, 4)
    with pytest.raises((IndexError, RuntimeError)):
        reader(input_ids=read)


def test_a_model_that_makes_no_vectors_of_tokens_is_refused_as_it_is_read(tmp_path):
    """Whatever its config.json says: here a T5 that claims to have no decoder."""
    import transformers

    sizes = {"d_model": 4, "d_kv": 4, "d_ff": 4, "num_layers": 1, "num_heads": 1}
    transformers.T5Model(transformers.T5Config(vocab_size=9, **sizes)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").touch()
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"is_encoder_decoder": False}))
    with pytest.raises(ConfigError, match=r"'title': the T5Model in .* does not make vectors of a text's tokens"):
        TextInput(read_by(tmp_path))


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({}, "needs `table`"),
        ({"table": "t", "words": 0}, "has words: 0 and no characters: set one of them"),
        ({"table": "t", "characters": [4, 3]}, "'characters' is [4, 3]: write the least length first"),
        ({"table": "t", "tune": "all"}, "is of kind 'text', which has no tune: remove it"),
        ({"folder": "nowhere"}, "'dim' is missing"),
        (
            {"folder": "nowhere", "dim": 4, "buckets": 9},
            "is of kind 'text' with folder, which has no buckets: remove it",
        ),
    ],
)
def test_settings_that_clash_are_refused(feature, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_feature(name="f", kind="text", **feature)


def test_a_model_reads_items_alone(model):
    item_id = build_feature(name="item_id", kind="id", table="t")
    with pytest.raises(ConfigError, match="user feature 'title' is text for a language model, which is for items"):
        Schema.build({"t": TableSpec(buckets=9, dim=4)}, (read_by(model),), (item_id,))


def test_a_tower_that_a_language_model_reads_for_runs_as_a_program(model):
    """Texts of all lengths, none among them; and null, which has a vector of its own."""
    config = validate(
        RunConfig,
        {
            "data": {"dataset": "none"},
            "user": [{"name": "history", "kind": "bag", "buckets": 16, "dim": 4}],
            "item": [{**as_values(read_by(model)), "max_length": 8}],
            "model": {"dim": 4},
        },
        "the test's config",
    )
    tower = build_whole_model(config).eval()
    torch.nn.init.normal_(tower.item_tower.encoders["of_title"].missing)
    [feature] = config.feature_schema.item
    rows = Columns(len(TEXTS), {"title": tokens(feature, pa.array(TEXTS, pa.string()))}, {})
    expected = encode(tower, "item", rows, Ranks(0, 1, torch.device("cpu")))
    program = export_program(tower, "item").module()
    found = program(program_inputs(config.feature_schema, "item", rows))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(torch.unique(found.detach().round(decimals=4), dim=0)) == 5  # two of the six texts are equal
