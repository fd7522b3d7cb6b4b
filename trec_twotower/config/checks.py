"""Checks across sections: combinations of settings that no section can reject on its own.

Each check receives the config and its schema, and raises ConfigError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trec_twotower.config.feature_spec import HISTORY
from trec_twotower.config.features import CategoryFeature, IdFeature, VocabularyFeature
from trec_twotower.config.schema import Schema
from trec_twotower.errors import ConfigError, nearest

if TYPE_CHECKING:
    from trec_twotower.config.run_config import RunConfig


def check_sum(config: RunConfig, schema: Schema) -> None:
    for side, tower in config.model.towers:
        widths, has_numbers = schema.layout.part_widths(side), bool(schema.layout.plain_numbers(side))
        if tower.combine == "sum" and (len(set(widths)) > 1 or has_numbers):
            raise ConfigError(
                f"model.{side}_tower.combine is sum, but the {side} features are {list(widths)} wide"
                f"{', numbers among them' if has_numbers else ''}: give all tables one dim and bins to numbers, or set "
                "combine: concat."
            )


def check_experts(config: RunConfig, schema: Schema) -> None:
    for side, tower in config.model.towers:
        if config.train.micro_batch is not None and tower.experts is not None and tower.experts.top_k is not None:
            raise ConfigError(
                f"model.{side}_tower.experts.top_k balances experts over a whole batch, but train.micro_batch splits "
                "it: remove one of them."
            )


def check_named_features(config: RunConfig, schema: Schema) -> None:
    for side, tower in config.model.towers:
        names = [feature.name for feature in schema.features(side)]
        for name in tower.named_features:
            if name not in names:
                raise ConfigError(f"model.{side}_tower names the feature {name!r}{nearest(name, names)}.")


def check_wide(config: RunConfig, schema: Schema) -> None:
    for side, tower in config.model.towers:
        widths = dict(zip(schema.layout.part_names(side), schema.layout.part_widths(side), strict=True))
        for name in tower.wide:
            if widths.get(name) != config.model.dim:
                reason = f"is {widths[name]} wide" if name in widths else "is a plain number"
                raise ConfigError(
                    f"model.{side}_tower.wide names {name!r}, which {reason}, but is added to a vector of model.dim = "
                    f"{config.model.dim}: give it that dim."
                )


def check_short(config: RunConfig, schema: Schema) -> None:
    for side, tower in config.model.towers:
        if tower.short_term and set(tower.short_term) >= set(schema.layout.part_names(side)):
            raise ConfigError(f"model.{side}_tower.short_term names all features: leave some for the long term.")


def check_missing(config: RunConfig, schema: Schema) -> None:
    """Require zero initial table rows, because a missing feature is recognized by its zeros."""
    for side, tower in config.model.towers:
        for feature in schema.features(side):
            if feature.name not in (tower.missing_vectors or ()):
                continue
            place = f"model.{side}_tower.missing_vectors names {feature.name!r}"
            if feature in schema.layout.plain_numbers(side):
                raise ConfigError(f"{place}, a number, which has an indicator of null: remove it.")
            if feature.has_row_per_value and (scale := schema.table_of(feature).start_scale) > 0:
                raise ConfigError(
                    f"{place}, but its table {feature.table_name!r} starts within ±{scale:.3g}, so that values without "
                    f"training rows are not zero: set tables.{feature.table_name}.init_scale: 0."
                )


def check_dropped_ids(config: RunConfig, schema: Schema) -> None:
    """Require zero vectors of new ids, because dropping an id prepares the tower for them."""
    for side, tower in config.model.towers:
        for feature in schema.features(side):
            if not isinstance(feature, IdFeature) or not tower.feature_dropout.get(feature.name):
                continue
            table, scale = feature.table_name, schema.table_of(feature).start_scale
            users = [each.name for _, each in schema.layout.table_pairs if each.table_name == table]
            fix = f"give it a table of its own ({', '.join(users)} share this one) with" if len(users) > 1 else "set"
            if scale > 0:
                raise ConfigError(
                    f"model.{side}_tower.feature_dropout names the id {feature.name!r}, whose table {table!r} starts "
                    f"within ±{scale:.3g}: the tower learns to do without an id that is zero, but the vector of a new "
                    f"id would be random; {fix} init_scale: 0 under `tables`, and name {feature.name!r} under "
                    "missing_vectors, too."
                )


def check_projection(config: RunConfig, schema: Schema) -> None:
    for side, tower in config.model.towers:
        last = tower.layer_widths(schema.layout.part_widths(side), config.model.dim)[-1]
        if not tower.project and last != config.model.dim:
            raise ConfigError(
                f"model.{side}_tower has project: false, so its last width {last} must be model.dim = "
                f"{config.model.dim}: change the dims, or set project: true."
            )


def check_input_share(config: RunConfig, schema: Schema) -> None:
    if config.data.rows != "user" or config.data.input_share:
        return
    spectral = config.train.spectral if config.ends_in_closed_form else None
    for feature in schema.user:
        if feature.source_column == HISTORY and (spectral is None or feature.name != spectral.history):
            raise ConfigError(
                f"data.input_share is 0, so that all of a user's items are positives, but user feature "
                f"{feature.name!r} reads the others, of which there are none: raise input_share, or remove the feature."
            )


def check_closed_form(config: RunConfig, schema: Schema) -> None:
    """Require that no layer follows the features: only then do the spectral and trained parts add up to one score."""
    spectral = config.train.spectral
    if spectral is None or spectral.when != "after_training":
        return
    wrong: dict[str, Any] = {
        "data.follow is set": config.data.follow,
        "model.user_vector is set": config.model.user_vector,
        f"model.similarity is {config.model.similarity}": config.model.similarity != "dot",
    }
    for (side, tower), name in zip(config.model.towers, (spectral.history, spectral.item), strict=True):
        place = f"model.{side}_tower"
        for layer in ("project", "mlp", "gating", "crosses", "short_term", "experts"):
            wrong[f"{place} has {layer}"] = getattr(tower, layer)
        wrong[f"{place} has combine: sum"] = tower.combine == "sum"
        wrong[f"there is no other {side} feature to train"] = [each.name for each in schema.features(side)] == [name]
        named = {*tower.feature_dropout, *(tower.missing_vectors or ()), *tower.unit_length}
        wrong[f"{place} names {name!r} under feature_dropout, missing_vectors or unit_length"] = name in named
    _refuse(
        wrong,
        "train.spectral.when is after_training, which adds spectral vectors to the trained ones, but",
        ": set similarity: dot and project: false, with nothing after the features, or when: before_training.",
    )


def check_interests(config: RunConfig, schema: Schema) -> None:
    interests = config.loss.interests
    if interests is not None and schema.multi_interest_feature is None:
        raise ConfigError(
            "loss.interests is set, but no user feature makes several vectors per user: give a sequence the encoder "
            "routing or self_attention, or remove loss.interests."
        )
    if interests is not None and interests.score == "attention" and config.data.rows == "user":
        raise ConfigError(
            "loss.interests.score is attention, which needs one positive per row, but data.rows: user has several: set "
            "it to max."
        )


def check_gaussian(config: RunConfig, schema: Schema) -> None:
    if config.model.user_vector != "gaussian":
        return
    interests = schema.multi_interest_feature
    wrong = {
        f"user feature {interests and interests.name!r} makes several vectors per user": interests,
        "model.user_tower has project: false": not config.model.user_tower.project,
        "model.user_tower has wide features": config.model.user_tower.wide,
        **_needs_unit_length(config),
    }
    _refuse(wrong, "model.user_vector is gaussian, but", ", which do not work together: remove one of them.")


def check_unit_length(config: RunConfig, schema: Schema) -> None:
    if config.model.similarity != "cosine":
        similarity = f"model.similarity is {config.model.similarity}: set it to cosine, or remove that setting."
        _refuse(_needs_unit_length(config), "", f", which needs vectors of length 1, but {similarity}")


def _needs_unit_length(config: RunConfig) -> dict[str, Any]:
    return {
        f"loss.kind is {config.loss.kind}": config.loss.needs_unit_length,
        "loss.regularization.alignment is set": config.loss.regularization.alignment,
        "loss.regularization.uniformity is set": config.loss.regularization.uniformity,
    }


def check_index_factory(config: RunConfig, schema: Schema) -> None:
    interests, factory = schema.multi_interest_feature, config.index.factory
    if interests is None or factory is None:
        return
    wrong = {
        "divides each vector's scores by its own length": "L2norm" in factory and config.model.similarity == "dot",
        "counts bits instead of scores": "LSH" in factory or "ITQ" in factory,
    }
    _refuse(
        wrong,
        f"index.factory {factory!r}",
        f", but user feature {interests.name!r} makes {schema.vectors_per_user} vectors per user, whose rankings are "
        "merged by score: remove factory, or set one of inner products, such as IVF1024,SQfp16.",
    )


def check_following(config: RunConfig, schema: Schema) -> None:
    if config.data.follow is None:
        return
    for name in ("schedule", "dense_schedule"):
        schedule = getattr(config.train.optimizer, name)
        if schedule not in ("constant", None):
            raise ConfigError(
                f"train.optimizer.{name} is {schedule!r}, which depends on the last step, but with data.follow there "
                "is none: set it to constant, or remove data.follow."
            )


def check_pipeline(config: RunConfig, schema: Schema) -> None:
    wrong = {
        "with data.follow the next rows may arrive hours later": config.data.follow,
        "those after a refresh (loss.negatives.refresh) depend on all steps before": config.loss.negatives.refresh,
    }
    if config.train.pipeline != "plain":
        reads = f"train.pipeline is {config.train.pipeline!r}, which reads batches ahead of the step, but"
        _refuse(wrong, reads, ": set it to plain.")


def check_batch_size(config: RunConfig, schema: Schema) -> None:
    if config.data.batch_size < 2 and not config.loss.has_other_negatives:
        raise ConfigError(
            f"data.batch_size is {config.data.batch_size}, but in-batch negatives need at least 2 rows: raise it, or "
            "set loss.negatives.sampled."
        )


def check_same_category(config: RunConfig, schema: Schema) -> None:
    same = config.loss.negatives.same_category
    features = {feature.name: feature for feature in schema.item}
    if same is None or isinstance(features.get(same.feature), IdFeature | CategoryFeature | VocabularyFeature):
        return
    reason = f"is not under `item`{nearest(same.feature, features)}"
    reason = f"is of kind {features[same.feature].kind}" if same.feature in features else reason
    raise ConfigError(
        f"loss.negatives.same_category.feature is {same.feature!r}, which {reason}: name an item feature of kind "
        "category or id."
    )


def _refuse(wrong: Mapping[str, Any], before: str, after: str) -> None:
    """Raise ConfigError for the first finding that is true; the message is `before`, the finding and `after`."""
    for finding, is_true in wrong.items():
        if is_true:
            raise ConfigError(f"{before} {finding}{after}".strip())


CHECKS: tuple[Callable[[RunConfig, Schema], None], ...] = (
    check_sum,
    check_experts,
    check_named_features,
    check_wide,
    check_short,
    check_missing,
    check_dropped_ids,
    check_projection,
    check_input_share,
    check_closed_form,
    check_interests,
    check_gaussian,
    check_unit_length,
    check_index_factory,
    check_following,
    check_pipeline,
    check_batch_size,
    check_same_category,
)
