"""What settings of different sections do not allow together, and what one kind of feature lacks of the others."""

from __future__ import annotations

import re
from typing import Any

import pytest

from trec_twotower.config import run_config
from trec_twotower.config.base import RENAMED_KEYS, as_values, validate
from trec_twotower.config.checks import CHECKS
from trec_twotower.config.feature_spec import FeatureSpec
from trec_twotower.config.features import build_feature
from trec_twotower.config.loading import apply_overrides, parse_yaml
from trec_twotower.config.losses import LossConfig
from trec_twotower.config.model import EncoderSpec
from trec_twotower.config.run_config import RunConfig
from trec_twotower.errors import ConfigError

SMALL = """
data: {dataset: data/d}
tables: {item: {buckets: 100, dim: 8}, taken: {buckets: 100, dim: 8}, wide: {buckets: 9, dim: 16}}
user:
  - {name: history, kind: bag, table: item, max_length: 50}
  - {name: taken, kind: bag, table: taken, column: history}
  - {name: age, kind: number}
item:
  - {name: item_id, kind: id, table: item}
  - {name: colour, kind: category, table: wide}
  - {name: tags, kind: bag, table: taken}
"""
SEVERAL = "user.1={name: past, kind: sequence, column: history, table: taken, max_length: 5, encoder: {kind: routing}}"
CLOSED = (
    "model.similarity=dot",
    "train.spectral={history: history, when: after_training}",
    "user=[{name: history, kind: bag, table: item}, {name: taken, kind: bag, table: taken, column: history}]",
    "item=[{name: item_id, kind: id, table: other}, {name: tags, kind: id, table: wide}]",
    "tables={item: {buckets: 9, dim: 8}, other: {buckets: 9, dim: 8}, taken: {buckets: 9, dim: 16}, "
    "wide: {buckets: 9, dim: 16}}",
    "model.dim=24",
    "model.user_tower.project=false",
    "model.item_tower.project=false",
)
# Of each check, overrides of SMALL that it alone refuses, and what it says.
REFUSED: dict[str, list[tuple[tuple[str, ...], str]]] = {
    "check_sum": [
        (("model.item_tower.combine=sum",), "combine is sum, but the item features are [8, 16, 8] wide: give all"),
        (("model.user_tower.combine=sum",), "the user features are [8, 8, 2] wide, numbers among them"),
    ],
    "check_experts": [
        (
            ("train.micro_batch=9", "model.item_tower.experts={count: 3, width: 4, top_k: 2}"),
            "model.item_tower.experts.top_k balances experts over a whole batch, but train.micro_batch splits it",
        )
    ],
    "check_named_features": [
        ((f"model.user_tower.{setting}",), "model.user_tower names the feature 'ages' (nearest: 'age').")
        for setting in (
            "feature_dropout={ages: 0.5}",
            "unit_length=[ages]",
            "short_term=[ages]",
            "wide=[ages]",
            "missing_vectors=[ages]",
            "gating={by: [ages]}",
        )
    ],
    "check_wide": [
        (
            ("user.1={name: size, kind: number}", "model.user_tower.wide=[age]"),
            "model.user_tower.wide names 'age', which is a plain number, but is added to a vector of model.dim = 64",
        ),
        (("model.item_tower.wide=[colour]",), "names 'colour', which is 16 wide, but is added to a vector of"),
    ],
    "check_short": [
        (("model.item_tower.short_term=[item_id, colour, tags]",), "model.item_tower.short_term names all features")
    ],
    "check_missing": [
        (
            ("model.user_tower.missing_vectors=[age]",),
            "missing_vectors names 'age', a number, which has an indicator of null",
        ),
        (
            ("model.item_tower.missing_vectors=[colour]",),
            "but its table 'wide' starts within ±0.25, so that values without",
        ),
    ],
    "check_dropped_ids": [
        (
            ("model.item_tower.feature_dropout={item_id: 0.1}",),
            "give it a table of its own (history, item_id share this one) with init_scale: 0 under `tables`, and name",
        ),
        (
            ("model.item_tower.feature_dropout={item_id: 0.1}", "user.0.table=taken", "user.1.table=taken"),
            "would be random; set init_scale: 0",
        ),
    ],
    "check_projection": [
        (("model.user_tower.project=false",), "project: false, so its last width 18 must be model.dim = 64"),
    ],
    "check_input_share": [
        (("data.rows=user", "data.input_share=0"), "data.input_share is 0, so that all of a user's items are"),
    ],
    "check_closed_form": [
        ((*CLOSED, "model.user_tower.project=true"), "but model.user_tower has project: set similarity: dot"),
        ((*CLOSED, "model.item_tower.gating={}"), "but model.item_tower has gating: set"),
        ((*CLOSED, "model.similarity=cosine"), "but model.similarity is cosine: set similarity: dot"),
        (
            (*CLOSED, "model.user_tower.unit_length=[history]"),
            "model.user_tower names 'history' under feature_dropout, missing_vectors or",
        ),
        ((*CLOSED, "data.follow={}"), "but data.follow is set"),
    ],
    "check_interests": [
        (("loss.interests={}",), "loss.interests is set, but no user feature makes several vectors per user"),
        (
            (SEVERAL, "loss.interests.score=attention", "data.rows=user"),
            "loss.interests.score is attention, which needs one positive per row",
        ),
    ],
    "check_gaussian": [
        (("model.user_vector=gaussian", SEVERAL), "user feature 'past' makes several vectors per user, which do not"),
        (("model.user_vector=gaussian", "loss.kind=ccl"), "model.user_vector is gaussian, but loss.kind is ccl, which"),
        (("model.user_vector=gaussian", "loss.regularization.alignment=1"), "but loss.regularization.alignment is set"),
        (("model.user_vector=gaussian", "model.dim=8", "model.user_tower.wide=[taken]"), "has wide features"),
    ],
    "check_unit_length": [
        (("model.similarity=dot", "loss.kind=ccl"), "loss.kind is ccl, which needs vectors of length 1, but"),
        (
            ("model.similarity=dot", "loss.regularization.uniformity=1"),
            "loss.regularization.uniformity is set, which needs",
        ),
    ],
    "check_index_factory": [
        ((SEVERAL, "index.factory=IVF16,ITQ32"), "index.factory 'IVF16,ITQ32' counts bits instead of scores, but user"),
        (
            (SEVERAL, "index.factory='L2norm,{}'", "model.similarity=dot"),
            "index.factory 'L2norm,{}' divides each vector's scores by its own length, but user feature 'past' makes 4",
        ),
    ],
    "check_following": [
        (("data.follow={}", f"train.optimizer.{name}=linear"), f"train.optimizer.{name} is 'linear', which depends on")
        for name in ("schedule", "dense_schedule")
    ],
    "check_pipeline": [
        (("data.follow={}", "train.pipeline=sparse_dist"), "but with data.follow the next rows may arrive hours later"),
        (
            ("loss.negatives.refresh={every: 5, count: 1}", "train.pipeline=sparse_dist"),
            "which reads batches ahead of the step, but those after a refresh (loss.negatives.refresh) depend on all",
        ),
    ],
    "check_batch_size": [(("data.batch_size=1",), "but in-batch negatives need at least 2 rows")],
    "check_same_category": [
        (
            ("loss.negatives.same_category={feature: tags, count: 1}",),
            "is 'tags', which is of kind bag: name an item feature",
        ),
        (("loss.negatives.same_category={feature: color, count: 1}",), "which is not under `item` (nearest: 'colour')"),
    ],
}


def small(*overrides: str) -> RunConfig:
    return validate(RunConfig, apply_overrides(parse_yaml(SMALL, "small"), overrides), "small.yaml")


def test_every_check_has_a_case():
    assert set(REFUSED) == {check.__name__ for check in CHECKS}
    small(*CLOSED)
    small(SEVERAL)


@pytest.mark.parametrize(
    ("check", "overrides", "message"),
    [(check, overrides, message) for check, cases in REFUSED.items() for overrides, message in cases],
)
def test_a_check_refuses_what_the_others_let_pass(check, overrides, message, monkeypatch):
    with pytest.raises(ConfigError, match=re.escape(message)):
        small(*overrides)
    others = tuple(other for other in CHECKS if other.__name__ != check)
    monkeypatch.setattr(run_config, "CHECKS", others)
    if check == "check_named_features":  # without it the others look up a feature that is not there
        return
    small(*overrides)


# The settings of each kind, beside name, kind and variant

OWN = {"buckets": 9, "dim": 4}
MINIMAL: dict[str, dict[str, Any]] = {
    "id": OWN,
    "category": OWN,
    "category|vocabulary": {"vocabulary": "learned", **OWN},
    "bag": OWN,
    "sequence": {**OWN, "max_length": 3},
    "cross": {**OWN, "columns": ["a", "b"]},
    "text": OWN,
    "text|folder": {"folder": "m", "dim": 4},
    "vector": {"size": 3},
    "number": {},
    "time": {"part": "hour", "dim": 4},
    "time|part: age": {"part": "age", "at": "2023-06-30"},
}
SETTINGS = {
    "id": "column table buckets dim hashes scale",
    "category": "column table buckets dim hashes scale",
    "category|vocabulary": "column vocabulary min_count buckets dim scale",
    "bag": "column table buckets dim hashes scale max_length pooling weights times unit half_life_days until",
    "sequence": "column table buckets dim max_length times unit encoder actions action_buckets attributes delta",
    "cross": "table buckets dim hashes scale columns",
    "text": "column table buckets dim hashes scale max_length pooling words characters",
    "text|folder": "column folder dim max_length tune",
    "vector": "column size dim unit_length nan",
    "number": "column dim clip normalize bins soft frequencies default nan",
    "time": "column part zone unit dim",
    "time|part: age": "column dim clip normalize bins soft frequencies part unit until at",
}
ALL_SETTINGS = sorted({name for names in SETTINGS.values() for name in names.split()})
CHOOSING = {("category", "vocabulary"), ("text", "folder")}  # settings that choose another variant of the kind


def test_every_kind_of_feature_is_listed_with_its_settings():
    found = {member.title(): set(member.model_fields) - {"name", "kind"} for member in FeatureSpec.members()}
    assert found == {kind: set(names.split()) for kind, names in SETTINGS.items()}


@pytest.mark.parametrize("kind", MINIMAL)
def test_a_feature_comes_back_from_its_saved_settings(kind):
    feature = build_feature(name="f", kind=kind.split("|")[0], **MINIMAL[kind])
    assert type(feature).title() == kind
    assert build_feature(**as_values(feature)) == feature


@pytest.mark.parametrize("kind", MINIMAL)
@pytest.mark.parametrize("setting", ALL_SETTINGS)
def test_a_kind_refuses_the_settings_of_others_by_name(kind, setting):
    if setting in SETTINGS[kind].split() or (kind, setting) in CHOOSING:
        return
    word, _, variant = kind.partition("|")
    values = {"name": "f", "kind": word, **MINIMAL[kind]}
    found = f"is of kind {word!r}{' with ' + variant if variant else ''}, which has no {setting}: remove it."
    with pytest.raises(ConfigError, match=re.escape(found)):
        build_feature(**values, **{setting: 5})
    assert build_feature(**values, **{setting: None}) == build_feature(**values)  # null stands for the default


def test_in_a_config_the_refusal_names_the_place():
    for override, message in (
        ("user.age.pooling=sum", "'user.age' is of kind 'number', which has no pooling: remove it."),
        ("user.age.poolin=sum", "unknown key 'user.age.poolin'"),
        ("loss.margin=0.5", "'loss' is of kind 'softmax', which has no margin: remove it."),
        (f"{SEVERAL[:-2]}, layers: 2}}}}", "'user.past.encoder' is of kind 'routing', which has no layers: remove it."),
        ("user.age={name: age}", "'user.age.kind' is missing"),
        ("user.age.bins=[3, 1]", "'user.age.bins' is [3, 1]: write ascending values, at least one."),
        ("tables.item.shard_columns=4", "'tables.item' has shard_columns 4 with sharding auto and dim 8: it belongs"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            small(override)


@pytest.mark.parametrize("family", [FeatureSpec, EncoderSpec, LossConfig])
def test_no_two_members_of_a_family_have_one_title(family):
    titles = [member.title() for member in family.members()]
    assert len(titles) == len(set(titles)) > 1


# Old names

OLD = {
    "data.own_item=drop": "data.target_in_history",
    "model.user_tower.drop={history: 0.5}": "model.user_tower.feature_dropout",
    "model.item_tower.missing=[tags]": "model.item_tower.missing_vectors",
    "model.user_tower.short=[history]": "model.user_tower.short_term",
    "model.user_tower.unit=[history]": "model.user_tower.unit_length",
    "model.user_tower.experts={count: 3, width: 4, top: 2}": "model.user_tower.experts.top_k",
    "loss.given={column: shown}": "loss.impressions",
    "loss.regularise={norm: 1}": "loss.regularization",
    "loss.negatives.same={feature: colour, count: 1}": "loss.negatives.same_category",
    "loss.negatives.queue=100": "loss.negatives.cross_batch_memory",
    "loss.negatives.hardest=9": "loss.negatives.top_k",
    "loss.negatives.refresh={every: 9, count: 1, ranks: [1, 5]}": "loss.negatives.refresh.neighbor_range",
    "train.start={history: history}": "train.spectral",
    "train.spectral={history: history, at: start}": "train.spectral.when",
    "train.spectral={history: history, spread: 1}": "train.spectral.score_std",
}


@pytest.mark.parametrize(("override", "name"), OLD.items())
def test_an_old_name_is_refused_with_the_new_one(override, name):
    with pytest.raises(ConfigError, match=rf"has a new name: {re.escape(name)}\.$"):
        small(override)


def test_every_old_name_has_a_case_and_no_setting_has_one():
    assert len(OLD) == len(RENAMED_KEYS)
    for override, name in (
        ("data.target_in_history=refuse", "'keep', 'drop' or 'error'"),
        ("train.spectral={history: h, when: end}", "'before_training' or 'after_training'"),
    ):
        with pytest.raises(ConfigError, match=name):
            small(override)
