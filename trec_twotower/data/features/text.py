"""Text features: words and character n-grams as hashed bags, and tokens of a language model."""

from __future__ import annotations

import json
import re
import threading
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from trec_twotower.config.features import LanguageModelFeature, TextFeature
from trec_twotower.config.model import TableSpec
from trec_twotower.data.features.hashed import HashedReader, bucket
from trec_twotower.data.features.reader import FeatureReader, FeatureRows, Values
from trec_twotower.errors import ConfigError
from trec_twotower.ops.hashing import is_text, mix_array
from trec_twotower.ops.ragged import Ragged, offsets_of, side_by_side
from trec_twotower.storage.arrow_values import python_values

WORD = re.compile(r"\w+")
# Model types whose positions start after the padding index.
COUNTS_FROM_PADDING = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "longformer"})
MAX_TOKENS = 64  # tokens of a text, if max_length is not set
_borrowed = threading.Lock()  # a tokenizer is not thread-safe


class TextReader(HashedReader[TextFeature]):
    needs = "strings"

    def fits(self, kind: pa.DataType) -> bool:
        return is_text(kind)

    def look_up(self, rows: FeatureRows[TextFeature], settings: TableSpec) -> Ragged:
        keys = text_keys(rows.feature, rows.array)
        return Ragged(keys.offsets, bucket(settings, keys.values))

    def keys(self, rows: FeatureRows[TextFeature]) -> np.ndarray:
        return text_keys(rows.feature, rows.array).values


class LanguageModelReader(FeatureReader[LanguageModelFeature]):
    needs = "strings"

    def fits(self, kind: pa.DataType) -> bool:
        return is_text(kind)

    def read(self, rows: FeatureRows[LanguageModelFeature]) -> Values:
        return {rows.feature.name: tokens(rows.feature, rows.array)}

    def check_files(self, feature: LanguageModelFeature) -> None:
        check_folder(feature)


def words_of(text: str) -> list[str]:
    """Return the words of a text: runs of letters, digits and underscores, NFKC-normalized and case-folded."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def parts_of_word(word: str, least: int, most: int) -> list[str]:
    """Return the character n-grams of `<word>`, with marks for its ends (as in Bojanowski et al. 2017)."""
    marked = f"<{word}>"
    return [
        marked[start : start + length] for length in range(least, most + 1) for start in range(len(marked) - length + 1)
    ]


def text_keys(feature: TextFeature, array: pa.Array) -> Ragged:
    """Return the 64-bit keys of the word n-grams of each text, then of its character n-grams; none for null.

    The key of a word is that of a string id. The key of a word n-gram combines those of its words as in a cross. The
    key of a character n-gram is that of `#` and the n-gram. Only the first `max_length` words count.
    """
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    texts = [words_of(text or "")[: feature.max_length] for text in python_values(encoded.dictionary)]
    number: dict[str, int] = {}
    flat = np.array([number.setdefault(word, len(number)) for text in texts for word in text], np.int64)
    words = Ragged(offsets_of([len(text) for text in texts]), flat)
    key_W = _keys(number)
    found = [_runs(words, key_W, length) for length in range(1, feature.words + 1)]
    if feature.characters is not None:
        parts = [[f"#{part}" for part in parts_of_word(word, *feature.characters)] for word in number]
        lists = Ragged(offsets_of([len(each) for each in parts]), _keys(part for each in parts for part in each))
        taken = lists.take(flat)
        found.append(Ragged(taken.offsets[words.offsets], taken.values))
    keys = found[0]
    for other in found[1:]:
        keys = side_by_side(keys, other)
    keys = Ragged.concat([keys, Ragged(np.zeros(2, np.int64), keys.values[:0])])  # the last row is for null
    return keys.take(encoded.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False).astype(np.int64))


def _keys(words: Any) -> np.ndarray:
    return np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in words], np.uint64).view(np.int64)


def _runs(words: Ragged, key_W: np.ndarray, length: int) -> Ragged:
    """Return the keys of the word n-grams of `length` words of each text."""
    key = key_W[words.values]
    if length == 1:
        return Ragged(words.offsets, key)
    counts = np.maximum(words.lengths - (length - 1), 0).astype(np.int64)
    offsets = offsets_of(counts)
    first = np.repeat(words.offsets[:-1] - offsets[:-1], counts) + np.arange(offsets[-1])
    state = mix_array(key[first].view(np.uint64))
    for place in range(1, length):
        state = mix_array(key[first + place].view(np.uint64) ^ state)
    return Ragged(offsets, state.view(np.int64))


# Language models


def check_folder(feature: LanguageModelFeature) -> None:
    """Raise ConfigError if the folder of a feature has no Hugging Face model, or one that does not fit the settings."""
    folder = Path(feature.folder)
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = about["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"feature {feature.name!r} has folder: {folder}, which is no Hugging Face model (no config.json with a "
            "model_type): name a folder that save_pretrained wrote, or git clone one."
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"feature {feature.name!r}: {folder} has no *.safetensors: other weights run code when they are read, so "
            "save the model again with a transformers that writes them."
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        raise ConfigError(
            f"feature {feature.name!r}: {folder} has a {kind} but no tokenizer: save it there, too "
            "(tokenizer.save_pretrained)."
        )
    layers = about.get("num_hidden_layers") or about.get("n_layer") or about.get("n_layers")
    if isinstance(feature.tune, int) and isinstance(layers, int) and feature.tune > layers:
        raise ConfigError(
            f"feature {feature.name!r} has tune: {feature.tune}, but the model in {folder} has {layers} layers: take "
            "fewer, or all."
        )
    inner = [name for name in PARTS_OF_MODELS if isinstance(about.get(name), dict)]
    if about.get("is_encoder_decoder") or inner:
        found = f"is made of parts ({', '.join(inner)})" if inner else "is an encoder with a decoder"
        raise ConfigError(
            f"feature {feature.name!r}: the {kind} in {folder} {found}, which does not read a text into a vector by "
            "itself: take a plain encoder (bert, distilbert, roberta, mpnet and the like, such as MiniLM), or have the "
            "vectors made beforehand (kind vector)."
        )
    length, most = feature.max_length or MAX_TOKENS, _most_tokens(about)
    if most is not None and length > most:
        given = f"max_length: {length}" if feature.max_length else f"no max_length, so {length} tokens"
        raise ConfigError(
            f"feature {feature.name!r} has {given}, but the {kind} in {folder} has places for {most} tokens: set "
            f"max_length to {most} or less."
        )


PARTS_OF_MODELS = ("text_config", "vision_config", "audio_config", "encoder", "decoder")  # in the config of one of them


def _most_tokens(about: dict[str, Any]) -> int | None:
    """Return the maximum number of tokens of a model, from its config.json; None if it is not there."""
    found = (about.get(name) for name in ("max_position_embeddings", "n_positions"))
    places = next((each for each in found if isinstance(each, int) and each > 0), None)
    padding = about.get("pad_token_id")
    if places is not None and about["model_type"] in COUNTS_FROM_PADDING and isinstance(padding, int):
        return places - padding - 1
    return places


def transformers() -> Any:
    """Import a library. Raises ConfigError if it is not installed."""
    try:
        import transformers as library

        library.utils.logging.disable_progress_bar()
    except ImportError:
        raise ConfigError(
            "A text feature with `folder` needs transformers, which is not installed: pip install 'trec-twotower[text]'"
        ) from None
    return library


@lru_cache(maxsize=8)
def _tokenizer(folder: str) -> Any:
    try:
        return transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} has no tokenizer that transformers can load: {error}") from None


def tokens(feature: LanguageModelFeature, array: pa.Array) -> Ragged:
    """Return the first `max_length` tokens (int32) of each text, with special tokens; none for null."""
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    texts = [text or "" for text in python_values(encoded.dictionary)]
    found: list[list[int]] = []
    if texts:
        with _borrowed:
            tokenizer = _tokenizer(feature.folder)
            found = tokenizer(texts, truncation=True, max_length=feature.max_length or MAX_TOKENS)["input_ids"]
    lists = Ragged.from_lists([*found, []])
    taken = lists.take(encoded.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False).astype(np.int64))
    return Ragged(taken.offsets, taken.values.astype(np.int32))
