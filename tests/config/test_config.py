"""Settings: read without YAML's traps, overridden, refused with the nearest name, saved and compared."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kinds import LOSS_PARAMETERS
from trec_twotower.config.base import as_values, validate
from trec_twotower.config.loading import apply_overrides, load_config, parse_overrides, parse_yaml, read_yaml, to_yaml
from trec_twotower.config.model import TableSpec
from trec_twotower.config.run_config import RunConfig, binding, check_same_run, config_hash, differences
from trec_twotower.config.training import OptimizerConfig, TrainConfig
from trec_twotower.errors import ConfigError, nearest

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
SMALL = """
data: {dataset: data/d}
tables: {item: {buckets: 100, dim: 8}}
user:
  - {name: history, kind: bag, table: item, max_length: 50}
  - {name: age, kind: number}
item:
  - {name: item_id, kind: id, table: item}
"""


def small(*overrides: str) -> RunConfig:
    return validate(RunConfig, apply_overrides(parse_yaml(SMALL, "small"), overrides), "small.yaml")


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        small(*overrides)
    return str(caught.value)


# YAML without its traps


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-2.5e+3", -2500.0),
        ("1_000_000", 1_000_000),
        ("010", 10),
        ("+7", 7),
        ("-3", -3),
        ("-.inf", float("-inf")),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        *((word, word) for word in ("NO", "no", "y", "Yes", "on", "OFF", "0x10", "0o17", "0b11")),
        *((word, word) for word in ("12:30", "1:30:00", "2024-01-01", "2024-01-01 10:00:00", "1.2.3", "e5", ".")),
        *((word, word) for word in ("infinity", "nan", "<<", "=", "1e", "_1")),
        ("'1e-3'", "1e-3"),
        ("[1, NO, 1e-3]", [1, "NO", 0.001]),
    ],
)
def test_yaml_words_mean_what_they_look_like(text, value):
    parsed = parse_yaml(f"a: {text}", "here")["a"]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", 'here, line 3: found duplicate key "a" with value "3" (original value: "1"): keep one.'),
        ("a:\n  b: 2\n  b: 3", 'here, line 3: found duplicate key "b" with value "3" (original value: "2"): keep one.'),
        ("a: [{b: 2, b: 3}]", 'here, line 1: found duplicate key "b" with value "3" (original value: "2"): keep one.'),
        ("a: {{ root }}", "here, line 1: a key is a list or a mapping: quote"),
        ("? [a]\n: 1", "here, line 1: a key is a list or a mapping: quote"),
        ("a: [1", "here, line 1, is not valid YAML: while parsing a flow sequence expected ',' or ']'"),
        ("a: !!python/object:os.system {}", "here, line 1, is not valid YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "here, line 2, is not valid YAML: expected a single document"),
        ("a: !!int abc", "here is not valid YAML"),
        ("a: &x [*x]", "here, line 1: anchors (&) and aliases (*) are not supported: repeat the value."),
        ("a: 1\nb: &x 1", "here, line 2: anchors (&) and aliases (*) are not supported: repeat the value."),
        ("a: 1\nb: *x", "here, line 2: anchors (&) and aliases (*) are not supported: repeat the value."),
        ("[" * 9999, "here is not valid YAML"),
    ],
)
def test_broken_yaml_is_refused_with_its_place(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_yaml(text, "here")


def test_yaml_that_is_not_utf_8_is_refused_by_name(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("# für alle".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml is not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
LOOKALIKES = st.sampled_from(
    ["1e-3", "1.0e-05", "NO", "010", "0x10", "12:30", "null", "~", "", "-", "true", "1_0", ".5"]
)


@given(st.dictionaries(st.text(), PLAIN | LOOKALIKES, max_size=4))
def test_yaml_that_we_write_reads_back_equal(values):
    """Text that looks like a number stays text, and every float keeps its digits."""
    back = parse_yaml(to_yaml(values), "here")
    assert back == values
    assert json.dumps(back) == json.dumps(values)  # 1 == 1.0 == True, but not here


# Overrides


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("train.epochs=3", ("train", "epochs"), 3),
        ("train.optimizer.lr=1e-2", ("train", "optimizer", "lr"), 0.01),
        ("user.history.max_length=5", ("user", 0, "max_length"), 5),
        ("user.1.normalize=log1p", ("user", 1, "normalize"), "log1p"),
        ("tables.item.dim=16", ("tables", "item", "dim"), 16),
        ("evaluate.k=[5, 20]", ("evaluate", "k"), [5, 20]),
        ("loss.negatives.sampled=all", ("loss", "negatives", "sampled"), "all"),
        ("data.dataset=a=b", ("data", "dataset"), "a=b"),
        ("evaluate.users=", ("evaluate", "users"), None),
        ("data={dataset: x, seed: 9}", ("data", "seed"), 9),
    ],
)
def test_an_override_sets_one_place(override, place, value):
    before = as_values(small())
    after = as_values(small(override))
    found = after
    for part in place:
        found = found[part]
    assert found == value
    if not override.startswith("data={"):
        *parents, last = place
        spot = before
        for part in parents:
            spot = spot[part]
        spot[last] = value
        assert before == after


def test_overrides_leave_the_values_they_are_given_alone():
    values = parse_yaml(SMALL, "small")
    apply_overrides(values, ["user.history.max_length=5", "tables.item.dim=1"])
    assert values == parse_yaml(SMALL, "small")


def test_the_last_of_two_equal_overrides_counts():
    assert parse_overrides(["a.b=1", "a.b=2"]) == {"a.b": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "'train.epochs' is not an override: write key=value"),
        ("=3", "'=3' is not an override"),
        ("train.epochs=[1", "The value of train.epochs, line 1, is not valid YAML"),
        (
            "user.histroy.max_length=5",
            "user.histroy.max_length: no element 'histroy' in a list of 2 (nearest: 'history')",
        ),
        ("user.7.max_length=5", "no element '7' in a list of 2 (known: 'history', 'age')"),
        ("tables.item.dim.x=5", "tables.item.dim.x: 'dim' is 8, which has no parts to set"),
        ("evaluate.k.0.x=5", "'evaluate.k' is"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(override, message):
    assert message in refused(override)


def test_an_override_into_an_element_that_has_no_parts_is_refused():
    for override in ("evaluate.k.0.x=1", "evaluate.k.0.x.y=1"):
        with pytest.raises(ConfigError, match="which has no parts to set"):
            apply_overrides({"evaluate": {"k": [5, 10]}}, [override])


def test_a_value_that_occurs_twice_is_written_twice():
    """Aliases, which writers of YAML like to use, are refused when read."""
    shared = [1, {"a": 2}]
    assert parse_yaml(to_yaml({"a": shared, "b": [shared, shared]}), "x") == {"a": shared, "b": [shared, shared]}


def test_a_yaml_directive_does_not_change_how_words_are_read():
    assert parse_yaml("%YAML 1.1\n---\na: [no, 1:30, 010, 1e-3]", "x") == {"a": ["no", "1:30", 10, 0.001]}


# What is refused, with the nearest name


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("dat.seed=1", "dat", "data"),
        ("data.batchsize=1", "data.batchsize", "batch_size"),
        ("tables.item.bucket=1", "tables.item.bucket", "buckets"),
        ("user.history.max_len=1", "user.history.max_len", "max_length"),
        ("item.item_id.tabel=1", "item.item_id.tabel", "table"),
        ("model.user_tower.mpl=[]", "model.user_tower.mpl", "mlp"),
        ("loss.negatives.inbatch=true", "loss.negatives.inbatch", "in_batch"),
        ("train.optimizer.learning_rat=1", "train.optimizer.learning_rat", None),
        ("train.optimizer.dense-lr=1", "train.optimizer.dense-lr", "dense_lr"),
        ("checkpoint.keeps=1", "checkpoint.keeps", "keep"),
    ],
)
def test_an_unknown_key_names_the_nearest_at_every_depth(override, key, near):
    message = refused(override)
    assert f"unknown key {key!r}" in message
    assert f"(nearest: {near!r})" in message or near is None


def test_nearest_names_the_likest_or_shows_the_choice():
    assert nearest("histroy", ["history", "age"]) == " (nearest: 'history')"
    assert nearest("zzz", ["history", "age"]) == " (known: 'history', 'age')"
    assert nearest("zzz", []) == ""


def test_of_a_long_choice_the_first_names_are_shown_and_the_rest_counted():
    message = nearest("zzz", [f"run-{number}" for number in range(500)])
    assert message.startswith(" (known: 'run-0', 'run-1', ") and message.endswith(", 'run-29' and 470 more)")


def test_every_mistake_is_told_at_once_with_the_file():
    message = refused("data={}", "train.epochs=-1", "model.dimm=3")
    assert message.startswith("small.yaml: ")
    assert "'data.dataset' is missing: it has no default." in message
    assert "'train.epochs' is -1: input should be greater than or equal to 0." in message
    assert "unknown key 'model.dimm' (nearest: 'dim')." in message
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize("section", ["data", "user", "item"])
def test_what_has_no_default_must_be_there(section):
    values = parse_yaml(SMALL, "small")
    del values[section]
    with pytest.raises(ConfigError, match=f"'{section}' is missing"):
        validate(RunConfig, values, "small.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data=5", "'data' is 5"),
        ("user=5", "'user' is 5"),
        ("user.0=5", "'user.0' is 5"),
        ("train.epochs=many", "'train.epochs' is 'many'"),
        ("train.epochs=1.5", "'train.epochs' is 1.5"),
        ("train.optimizer.lr=fast", "'train.optimizer.lr' is 'fast'"),
        ("train.optimizer.lr=.inf", "'train.optimizer.lr' is inf"),
        ("loss.temperature=.nan", "'loss.temperature' is nan"),
        ("model.similarity=euclid", "'model.similarity' is 'euclid'"),
        ("loss.negatives.sampled=-1", "loss.negatives.sampled"),
        ("data.input_share=1", "'data.input_share' is 1"),
        ("data={dataset: d, rows: user, input_share: 0}", "data.input_share is 0, so that all of a user's items"),
        ("data.seed=-1", "'data.seed' is -1"),
        ("data.seed=9223372036854775808", "'data.seed' is 9223372036854775808"),
        ("data.dataset=5", "'data.dataset' is 5"),
        ("tables.item.buckets=4294967297", "'tables.item.buckets' is 4294967297: input should be less than or equal"),
        ("item.0={name: item_id, kind: id, buckets: 4294967297, dim: 4}", "'item.item_id.buckets' is 4294967297"),
        ("user.1.name=010", "'user.1.name' is 10"),
        ("user.age.kind=nmber", "'user.age.kind' is 'nmber'"),
        ("user.age.clip=5", "'user.age.clip' is 5: input should be a list."),
        ("user.age.clip=[1, 2, 3]", "'user.age.clip' is [1, 2, 3]: list should have at most 2 items"),
        ("user.age={name: age, kind: number, bins: 1, dim: 4}", "'user.age.bins' is 1: input should be greater than"),
        ("model.user_tower.mlp=64", "'model.user_tower.mlp' is 64"),
        # What each value alone does not show
        ("user.0.table=itme", "(nearest: 'item')"),
        ("loss.negatives.in_batch=false", "so there are no negatives"),
        ("evaluate.best=recall@21", "evaluate.best is 'recall@21', which is not measured (nearest: 'recall@2"),
        ("evaluate.slices=[tial]", "evaluate.slices names 'tial' (nearest: 'tail'): give any of tail, popularity"),
        ("evaluate.slices=[item.]", "evaluate.slices names 'item.'"),
        ("data.batch_size=1", "in-batch negatives need at least 2 rows"),
        ("model.user_tower.unit_length=[ages]", "names the feature 'ages' (nearest: 'age')"),
        ("model.user_tower.project=false", "its last width 10 must be model.dim = 64"),
        (
            "model.user_tower={combine: sum, crosses: 1}",
            "'model.user_tower' has crosses, which needs concatenated features",
        ),
        ("model.user_tower.short_term=[histori]", "names the feature 'histori' (nearest: 'history')"),
        ("model.user_tower.short_term=[history, age]", "names all features"),
        (
            "model.item_tower.feature_dropout={item_id: 0.1}",
            "model.item_tower.feature_dropout names the id 'item_id', whose table 'item' starts within ±0.354: the "
            "tower learns to do without an id that is zero, but the vector of a new id would be random; give it a "
            "table of its own (history, item_id share this one) with init_scale: 0 under `tables`, and name 'item_id' "
            "under missing_vectors, too.",
        ),
        ("model.user_tower.feature_dropout={ages: 0.1}", "names the feature 'ages' (nearest: 'age')"),
        (
            "model.user_tower.experts={count: 2, width: 4, top_k: 2}",
            "'model.user_tower.experts' has top_k: 2 of 2 experts",
        ),
        ("model.user_tower.experts={count: 0, width: 4}", "'model.user_tower.experts.count' is 0"),
        ("model.user_tower.combine=sum", "features are [8, 2] wide, numbers among them"),
        ("model.item_tower={project: false, mlp: [32]}", "its last width 32 must be model.dim = 64"),
    ],
)
def test_a_value_that_cannot_be_right_is_refused_by_its_place(override, message):
    assert message in refused(override)


def test_towers_without_a_projection_fit_when_the_widths_meet():
    assert small("model.dim=10", "model.user_tower.project=false").model.dim == 10


def test_one_row_a_step_is_enough_beside_sampled_negatives():
    assert small("data.batch_size=1", "loss.negatives.sampled=10").data.batch_size == 1


# Files


def test_a_missing_config_names_the_nearest_file(tmp_path):
    (tmp_path / "gowalla.yaml").touch()
    with pytest.raises(ConfigError, match=r"no config file .*gowala\.yaml \(nearest: 'gowalla\.yaml'\)"):
        load_config(tmp_path / "gowala.yaml")


@pytest.mark.parametrize(("content", "kind"), [("", "NoneType"), ("5", "int"), ("[1]", "list")])
def test_a_config_that_is_no_mapping_is_refused(tmp_path, content, kind):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ConfigError, match=rf"a\.yaml holds {kind}, not sections"):
        load_config(tmp_path / "a.yaml")


def test_the_run_folder_is_named_after_the_config_unless_told_otherwise(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    assert load_config(path).run_dir == Path("runs/small")
    assert load_config(path, ["run_dir=elsewhere"]).run_dir == Path("elsewhere")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load_and_come_back_from_a_saved_copy(path, tmp_path):
    config = load_config(path, ["data.seed=7"])
    (tmp_path / "config.yaml").write_text(to_yaml(as_values(config)))
    assert load_config(tmp_path / "config.yaml") == config


def test_there_are_shipped_configs():
    assert {"demo", "gowalla", "amazon_beauty"} <= {path.stem for path in SHIPPED}


# What makes two configs the same run

# Each setting of SMALL, another value for it, and whether a run may not take that up in its midst.
OTHER = {
    "train.device": ("cpu", False),
    "data.dataset": ("elsewhere", False),
    "data.rows": ("user", True),
    "data.batch_size": (64, True),
    "data.seed": (1, True),
    "data.shuffle_rows": (100, True),
    "data.input_share": (0.25, True),
    "data.prefetch": (1, False),
    "data.threads": (3, False),
    "data.cache": ("elsewhere", False),
    "data.cache_gb": (2.0, False),
    "data.drop_last": (True, True),
    "data.target_in_history": ("drop", True),
    "data.follow": ({}, True),
    "tables.item.buckets": (50, True),
    "tables.item.dim": (4, True),
    "tables.item.sharding": ("row_wise", False),
    "tables.item.shard_columns": (4, False),
    "tables.item.kernel": ("fused_uvm", False),
    "tables.item.cache_share": (0.5, False),
    "tables.item.dtype": ("fp16", True),
    "tables.item.hashing": ("modulo", True),
    "tables.item.hashes": (2, True),
    "tables.item.seed": (1, True),
    "tables.item.init_scale": (0.5, True),
    "user.0.name": ("past", True),
    "user.0.column": ("past", True),
    "user.0.max_length": (20, True),
    "user.0.pooling": ("sum", True),
    "user.0.weights": ("w", True),
    "user.1.normalize": ("minmax", True),
    "user.1.nan": ("missing", True),
    "item.0.kind": ("category", True),
    "model.dim": (32, True),
    "model.user_tower.mlp": ([8, 4], True),
    "model.user_tower.project": (False, True),
    "model.user_tower.dropout": (0.5, True),
    "model.item_tower.mlp": ([16], True),
    "model.item_tower.combine": ("sum", True),
    "model.user_tower.crosses": (2, True),
    "model.user_tower.short_term": (["history"], True),
    "model.user_tower.wide": (["history"], True),
    "model.user_tower.unit_length": (["history"], True),
    "model.user_tower.missing_vectors": (["history"], True),
    "model.user_vector": ("gaussian", True),
    "model.similarity": ("dot", True),
    "loss.temperature": (0.2, True),
    "loss.precision": ("bf16", True),
    "loss.regularization.norm": (0.1, True),
    "loss.regularization.alignment": (0.1, True),
    "loss.regularization.uniformity": (0.1, True),
    "loss.log_q": (0.0, True),
    "loss.positive_power": (0.5, True),
    "loss.mask_history": (False, True),
    "loss.known": ("elsewhere", True),
    "loss.log_q_estimate": ("streaming", True),
    "loss.negatives.in_batch": (False, True),
    "loss.negatives.sampled": ("all", True),
    "loss.negatives.power": (0.75, True),
    "loss.negatives.cross_batch_memory": (4096, True),
    "loss.negatives.top_k.count": (64, True),
    "train.epochs": (99, False),
    "train.seed": (1, True),
    "train.optimizer.sparse": ("sgd", True),
    "train.optimizer.lr": (0.01, True),
    "train.optimizer.eps": (1e-6, True),
    "train.optimizer.dense_lr": (0.01, True),
    "train.optimizer.warmup_steps": (5, True),
    "train.optimizer.schedule": ("linear", True),
    "train.optimizer.weight_decay": (0.1, True),
    "train.optimizer.dense_weight_decay": (0.1, True),
    "train.optimizer.clip_norm": (1.0, True),
    "train.optimizer.dense_warmup_steps": (5, True),
    "train.optimizer.dense_schedule": ("cosine", True),
    "train.optimizer.ema": (0.9, True),
    "train.precision": ("bf16", True),
    "train.micro_batch": (512, True),
    "train.pipeline": ("sparse_dist", False),
    "train.compile": (True, True),
    "train.profile_steps": (3, False),
    "train.log_every": (1, False),
    "train.log_to": (["tensorboard", "mlflow"], False),
    "train.evaluate_every": (7, False),
    "train.timeout_s": (60, False),
    "train.first_timeout_s": (60, False),
    "train.max_failures": (3, False),
    "train.threads": (2, False),
    "checkpoint.every": (5, False),
    "checkpoint.keep": (9, False),
    "checkpoint.in_background": (False, False),
    "evaluate.k": ([20], False),
    "evaluate.best": ("ndcg@20", False),
    "evaluate.users": (10, False),
    "evaluate.svd": (8, False),
    "evaluate.sampled": (100, False),
    "evaluate.sampled_same": ("category", False),
    "evaluate.block": (10, False),
    "evaluate.exclude_seen": (False, False),
    "evaluate.slices": (["tail"], False),
    "evaluate.item_to_item": (False, False),
    "evaluate.bootstrap": (0, False),
    "index.target_recall": (0.5, False),
    "index.k": (10, False),
    "index.blas_batch": (16, False),
    "index.memory_gb": (0.5, False),
    "index.factory": ("IVF16,SQ8", False),
    "index.shards": (2, False),
    "run_dir": ("elsewhere", False),
}
# SMALL with what lets each value above stand alone: widths that meet, and negatives beside the batch's.
ROOM = ("model.dim=10", "loss.negatives.sampled=5")
NEEDS = {  # what else a setting asks for
    "evaluate.sampled_same": ("evaluate.sampled=100",),
    "loss.negatives.top_k.count": ("loss.negatives.top_k={count: 9}",),
    "model.user_tower.wide": ("tables.item.dim=12", "model.dim=12"),
    "tables.item.shard_columns": ("tables.item.sharding=column_wise",),
    "tables.item.cache_share": ("tables.item.kernel=fused_uvm_caching",),
    "train.optimizer.weight_decay": ("train.optimizer.sparse=adam",),
}


@pytest.mark.parametrize("name", OTHER)
def test_the_hash_changes_exactly_with_the_settings_that_bind_a_run(name):
    value, binds = OTHER[name]
    room = (*ROOM, *NEEDS.get(name, ()))
    first, second = small(*room), small(*room, f"{name}={json.dumps(value)}")
    assert first != second
    assert (config_hash(first) != config_hash(second)) == binds
    if not binds:
        check_same_run(first, second, Path("runs/small"))
        return
    with pytest.raises(ConfigError, match=r"runs/small belongs to another config: .* was .*, now ") as caught:
        check_same_run(first, second, Path("runs/small"))
    shown = name.replace("user.0", "user.history").replace("user.1", "user.age").replace("item.0", "item.item_id")
    if name != "user.0.name":
        assert f"{shown} was " in str(caught.value) and f", now {value!r}" in str(caught.value)
        assert str(caught.value).count(" was ") == 1


def test_a_setting_that_an_older_run_has_not_is_at_its_default_there():
    """A run that was trained before there was such a setting goes on, but for one in which it is changed."""
    bag = "{name: history, kind: bag, table: item, max_length: 50}"
    config = small(f"user=[{bag}]", "tables.item.seed=0")
    saved = binding(config)
    for name in (
        "model.user_tower.unit_length",
        "user.history.pooling",
        "tables.item.seed",
        "train.optimizer.clip_norm",
    ):
        older = {key: value for key, value in saved.items() if key != name}
        assert len(older) == len(saved) - 1
        assert not differences(older, config)
    changed = small("model.user_tower.unit_length=[history]")
    older = {key: value for key, value in binding(changed).items() if key != "model.user_tower.unit_length"}
    assert differences(older, changed) == "model.user_tower.unit_length was None, now ['history']"
    # Where the group was absent, its defaults are changes.
    spectral = {
        "train.spectral.history": "history",
        "train.spectral.item": "item_id",
    }
    started = small("train.spectral={history: history}")
    older = {key: value for key, value in binding(started).items() if not key.startswith("train.spectral.")}
    found = differences({**older, "train.spectral": None}, started)
    assert all(f"{name} was None, now {value!r}" in found for name, value in spectral.items())


def test_the_page_on_training_shows_a_config_that_holds_and_every_setting_it_names_is_one():
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    [shown] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    validate(TrainConfig, parse_yaml(shown, "docs/training.md")["train"], "docs/training.md")
    for prefix, model in (("train.", TrainConfig), ("train.optimizer.", OptimizerConfig), ("tables.NAME.", TableSpec)):
        [table] = re.findall(rf"\| `{re.escape(prefix)}` \| \|\n\|---\|---\|\n((?:\|.*\n)+)", page)
        named = {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])}
        assert named and named <= set(model.model_fields), named - set(model.model_fields)
    assert set(OptimizerConfig.model_fields) == {
        name for name in re.findall(r"`(\w+)`", page.split("## Updates")[1].split("## Tables")[0])
        if name in OptimizerConfig.model_fields
    }  # fmt: skip


def test_every_section_is_in_the_list_of_bindings():
    """A setting that is new must say whether it binds a run."""

    def leaves(value, place):
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from leaves(inner, f"{place}.{name}" if place else name)
        else:
            yield place

    of_small = set(leaves({k: v for k, v in as_values(small()).items() if k not in ("user", "item")}, ""))
    listed = set(OTHER)
    untold = {name for name in of_small - listed if not name.startswith("index.")}
    of_towers = {name.rpartition(".")[2] for name in listed if name.startswith("model.")}
    untold -= {f"model.{tower}.{name}" for tower in ("user_tower", "item_tower") for name in of_towers}
    untold -= {f"model.{tower}.{name}" for tower in ("user_tower", "item_tower") for name in ("gating", "experts")}
    of_their_own = ("popular", "same_category", "mined", "refresh", "top_k")
    untold -= {f"loss.negatives.{name}" for name in of_their_own}
    untold -= {"train.spectral", "loss.interests"}  # likewise
    untold -= {"loss.kind", "loss.impressions", *(f"loss.{name}" for told in LOSS_PARAMETERS.values() for name in told)}
    assert not untold, f"list {untold} in OTHER"


def test_the_order_of_features_binds_a_run():
    """It is the order of the columns that enter a tower: the same weights would meet other features."""
    features = "[{name: age, kind: number}, {name: history, kind: bag, table: item, max_length: 50}]"
    first, second = small(), small(f"user={features}")
    assert config_hash(first) != config_hash(second)
    with pytest.raises(ConfigError, match=r"user was \['history', 'age'\], now \['age', 'history'\]\."):
        check_same_run(first, second, Path("runs/small"))


def test_a_section_that_is_taken_out_binds_as_one_that_comes():
    """Its settings are then in the old config alone."""
    without, having = small(), small("loss.negatives.popular={count: 5}")
    for old, new, said in ((without, having, "was None, now 5"), (having, without, "was 5, now None")):
        with pytest.raises(ConfigError, match=rf"loss\.negatives\.popular\.count {said}"):
            check_same_run(old, new, Path("runs/small"))


def test_a_long_list_of_differences_is_cut():
    rates = [f"train.optimizer.{name}=2" for name in ("lr", "eps", "dense_lr")]
    shares = [f"loss.{name}=0.5" for name in ("temperature", "log_q", "positive_power")]
    other = small("model.dim=8", "data.seed=3", "data.batch_size=7", *rates, *shares)
    with pytest.raises(ConfigError, match=r"data\.batch_size was 4096, now 7; .* \(and 1 more\)"):
        check_same_run(small(), other, Path("runs/small"))


# The command line starts lightly

HEAVY = ("torch", "torchrec", "numpy", "pydantic", "pyarrow", "faiss", "ruamel")


@pytest.mark.parametrize("argument", [None, "--help", "train --help"])
def test_help_loads_nothing_heavy(argument):
    call = f"main({argument.split()!r})" if argument else "pass"
    code = (
        "import sys\n"
        "from trec_twotower.cli import main\n"
        f"try: {call}\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"
    if argument:
        assert "usage: trec-twotower" in done.stdout


def test_index_latency_was_removed_and_saved_configs_still_load():
    """A run of before has `latency: online` in its config.yaml; `batch` would now silently build another index."""
    assert small("index.latency=online").index == small().index
    assert "latency" not in as_values(small("index.latency=online"))["index"]
    assert "index.latency is 'batch', but the setting was removed" in refused("index.latency=batch")
