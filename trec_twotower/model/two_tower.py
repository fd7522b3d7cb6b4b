"""The one model: for training, export, evaluation and serving."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from trec_twotower.config.base import Side
from trec_twotower.config.features import SequenceFeature
from trec_twotower.config.losses import InterestsConfig, LearnedTemperature, LossConfig
from trec_twotower.config.model import ModelConfig
from trec_twotower.config.schema import Schema, delta_key, lookup_key, sub_name
from trec_twotower.data.loading.batch import Batch, Listed
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.model.cross_batch_memory import ItemQueue
from trec_twotower.model.embeddings import Pooled, build_lists, build_tables, pooled_by_hand, tower_input, tower_inputs
from trec_twotower.model.feature_encoders import build_input
from trec_twotower.model.finite_check import gate
from trec_twotower.model.losses import LOSSES, Hardest, Relations
from trec_twotower.model.losses.regularizers import alignment, nearness, squared_lengths
from trec_twotower.model.multi_interest import attended, gaussian_item, gaussian_user, likeness, uses
from trec_twotower.model.sequence_encoders import SequenceInput
from trec_twotower.model.step_diagnostics import Histogram, Watch
from trec_twotower.model.streaming_log_q import Frequency
from trec_twotower.model.temperature import Temperature
from trec_twotower.model.tower import Tower, encoder_name
from trec_twotower.model.tower_layers import row_means

SIDES: tuple[Side, Side] = ("user", "item")


class TwoTower(nn.Module):
    """Users and items as vectors of one space: score = user . item.

    `forward` gives this rank's part of the loss; `encode_users` and `encode_items` the vectors. All three look up
    sharded tables, so all ranks call them together, a rank without rows with an empty batch.
    """

    def __init__(self, schema: Schema, model: ModelConfig, loss: LossConfig, ranks: Ranks) -> None:
        super().__init__()
        self.schema = schema
        self.loss = loss
        self.ranks = ranks
        self.tables = build_tables(schema)
        self.lists = build_lists(schema)
        self.is_unit = is_unit = model.similarity == "cosine"
        self.is_gaussian = model.user_vector == "gaussian"
        sizes = (model.vector_dim, model.dim)  # a Gaussian user's tower makes a mean and a spread
        self.user_tower, self.item_tower = (
            Tower(
                schema.layout.part_widths(side),
                dim,
                config,
                is_unit=is_unit and dim == model.dim,
                place=partial(schema.layout.part_index, side),
            )
            for side, dim, config in zip(SIDES, sizes, (model.user_tower, model.item_tower), strict=True)
        )
        for sequence in schema.sequences:
            encoder = SequenceInput(sequence, schema.table_of(sequence).dim)
            self.user_tower.encoders[encoder_name(sequence.name)] = encoder
        self.vectors_per_user = schema.vectors_per_user  # M
        self.interests = loss.interests or InterestsConfig()
        self.interest_uses: Tensor | None = None  # of this rank's last logged batch
        for side in SIDES:
            for feature in schema.layout.layer_features(side):
                self._tower(side).encoders[encoder_name(feature.name)] = build_input(feature)
        self.watch = Watch(is_unit=is_unit)
        self.user_tower.note_length = partial(self.watch.note_length, "user")
        self.item_tower.note_length = partial(self.watch.note_length, "item")
        self.parameters_of_loss = loss.parameters
        temperature = loss.parameters.get("temperature")
        learned = temperature if isinstance(temperature, LearnedTemperature) else None
        if "precision" in self.parameters_of_loss:
            wanted = self.parameters_of_loss["precision"]
            self.parameters_of_loss["precision"] = wanted if wanted == "bf16_logits" else ranks.precision(wanted)
        self.temperature = None if learned is None else Temperature(learned, ranks.device)
        self.frequency = Frequency(ranks.device) if loss.streams_log_q else None
        size = loss.negatives.cross_batch_memory
        self.queue = ItemQueue(size, model.vector_dim, loss.log_q_strength, ranks.device) if size else None

    def encode_users(self, batch: Batch) -> Tensor:
        """(B, D); (B, M, D) where a user has several vectors."""
        return self._vectors("user", self._inputs(batch, "user")["user"])

    def encode_items(self, batch: Batch) -> Tensor:
        """(S, D)."""
        return self._vectors("item", self._inputs(batch, "item")["item"])

    def _vectors(self, side: Side, feature_BE: Tensor) -> Tensor:
        """What a tower makes of its input; of each of a user's several, where there are."""
        tower = self._tower(side)
        if feature_BE.ndim == 3:
            return tower(feature_BE.flatten(0, 1)).unflatten(0, feature_BE.shape[:2])
        vector_BD = tower(feature_BE)
        if not self.is_gaussian:
            return vector_BD
        return gaussian_user(vector_BD, is_unit=self.is_unit) if side == "user" else gaussian_item(vector_BD)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of this rank's rows, scaled so that its mean over ranks is the mean over all rows of the step."""
        inputs = self._inputs(batch, *SIDES)
        user_BD = self._vectors("user", inputs["user"])
        item_CD = self.ranks.gather(self._vectors("item", inputs["item"]), list(batch.item_sizes))
        relations = relations_of(batch, self.loss.log_q_strength)
        assert relations.given is not None or self.loss.impressions is None, (
            "loss.impressions is set, but the batch has none"
        )
        log_p_C = batch.log_q_C
        if self.frequency is not None:
            assert batch.item_key_C is not None
            log_p_C = self.frequency(batch.item_key_C, batch.is_negative_C)
            relations = replace(relations, log_q_C=self.loss.log_q_strength * log_p_C)
        if (hardest := self.loss.negatives.top_k) is not None:
            relations = replace(relations, hardest=Hardest(hardest.count, hardest.others))
        column_CD, among = item_CD, relations
        if self.queue is not None:
            assert log_p_C is not None
            column_CD, among = self._with_queue(self.queue, item_CD, log_p_C, batch, relations)
        parameters = dict(self.parameters_of_loss)
        if self.temperature is not None:
            parameters["temperature"] = self.temperature()
        share = self.ranks.num_ranks / batch.num_rows_of_all_ranks
        alike = None
        if self.vectors_per_user > 1:
            alike = self.interests.diversity * share * likeness(user_BD).sum()
            if self.watch.is_wanted:
                self.interest_uses = uses(user_BD, item_CD, relations.positive)
            if self.interests.score == "attention":
                positive, sharpness = relations.positive, self.interests.sharpness
                user_BD = attended(user_BD, item_CD, positive, sharpness, is_unit=self.is_unit)
        self.watch.look(user_BD, column_CD, among)
        loss = LOSSES[self.loss.kind](user_BD, column_CD, among, **parameters)
        for tower in (self.user_tower, self.item_tower):
            penalty = tower.penalty(self.ranks)
            loss = loss if penalty is None else loss + penalty / share
        loss = loss * share + self._regularised(user_BD, item_CD, batch, relations, share)
        return loss if alike is None else loss + alike

    def _with_queue(
        self, queue: ItemQueue, item_CD: Tensor, log_p_C: Tensor, batch: Batch, relations: Relations
    ) -> tuple[Tensor, Relations]:
        """Return the candidates followed by those of earlier steps; in training, keep this step's for later ones."""
        assert batch.item_key_C is not None
        assert batch.targets is not None and batch.targets.masked_keys is not None
        both = queue.beside(item_CD, batch.item_key_C, log_p_C, relations, batch.targets.masked_keys)
        if self.training:
            queue.push(item_CD, batch.item_key_C, log_p_C, relations.is_negative_C)
        return both

    def forget(self) -> None:
        """Let go of what is remembered of earlier steps: they were another run's."""
        for memory in (self.frequency, self.queue):
            if memory is not None:
                memory.forget()

    def _regularised(
        self, user_BD: Tensor, item_CD: Tensor, batch: Batch, relations: Relations, share: float
    ) -> Tensor:
        """What loss.regularization adds, scaled as the loss is."""
        wanted = self.loss.regularization
        added = user_BD.new_zeros(())
        if wanted.norm:
            length_B = squared_lengths(user_BD) if user_BD.ndim == 2 else squared_lengths(user_BD).mean(1)
            added = added + wanted.norm * (length_B.sum() * share + squared_lengths(item_CD).mean())
        if wanted.alignment:
            added = added + wanted.alignment * share * alignment(user_BD, item_CD, relations.positive)
        if wanted.uniformity:
            user_BD = user_BD if user_BD.ndim == 2 else user_BD.flatten(0, 1)
            sizes = self.ranks.sizes(user_BD.shape[0])
            users = self._uniformity(self.ranks.gather(user_BD, sizes), sizes)
            added = added + wanted.uniformity / 2 * (users + self._uniformity(item_CD, list(batch.item_sizes)))
        return added

    def _uniformity(self, vector_ND: Tensor, sizes: list[int]) -> Tensor:
        """Of vectors that all ranks hold: each compares its share with all of them.

        The log is of the sum over ranks; so that the mean of their gradients is that of the log, each adds its own part
        as many times as there are ranks.
        """
        rank, num_ranks, total = self.ranks.rank, self.ranks.num_ranks, sum(sizes)
        if total < 2:
            return vector_ND.sum() * 0
        mine = nearness(vector_ND, sum(sizes[:rank]), sizes[rank])
        everyone = self.ranks.mean(mine) * num_ranks
        return (mine - mine.detach()) * (num_ranks / everyone) + math.log(everyone / (total * (total - 1)))

    def figures(self) -> dict[str, float | Histogram]:
        """What the log should show beside the loss; all ranks call together."""
        temperature = {} if self.temperature is None else {"temperature": self.temperature().item()}
        parts = {
            f"{side}_{name}": value
            for side, tower in zip(SIDES, (self.user_tower, self.item_tower), strict=True)
            for name, value in tower.figures(self.ranks).items()
        }
        if self.vectors_per_user > 1:
            names = [f"interest_{number}" for number in range(self.vectors_per_user)]
            parts |= row_means(names, self.interest_uses, self.ranks)
        return {**temperature, **parts, **self.watch.figures(self.ranks)}

    @property
    def has_cosine_scores(self) -> bool:
        """Whether a score is a cosine, or the highest of several."""
        return self.is_unit and not self.is_gaussian

    @property
    def gaussian(self) -> Gaussian:
        return Gaussian(self.is_gaussian, self.is_unit)

    def _tower(self, side: Side) -> Tower:
        return self.user_tower if side == "user" else self.item_tower

    def _inputs(self, batch: Batch, *sides: Side) -> dict[Side, Tensor]:
        """What the towers take, (rows, E) each; (rows, M, E) of users with several vectors."""
        pooled, several_BMD = self._pooled(batch)
        beside = {
            "user": (batch.user_divisor_BF, batch.user_number_BN),
            "item": (batch.item_divisor_SF, batch.item_number_SN),
        }
        wanted = {}
        for side in sides:
            divisor, number = beside[side]
            for name, vector in made_by_layers(self.schema, side, self._tower(side), batch.listed, number).items():
                pooled.add(vector, {name: vector.shape[1]})
            behind = sum(feature.num_numbers for feature in self.schema.layout.layer_features(side))
            wanted[side] = divisor, number[:, behind:]
        made = tower_inputs(self.schema, pooled, wanted)
        if several_BMD is not None and "user" in made:
            assert self.schema.multi_interest_feature is not None
            place = self.schema.layout.part_index("user", self.schema.multi_interest_feature.name)
            first = sum(self.schema.layout.part_widths("user")[:place])
            feature_BME = made["user"][:, None].repeat(1, several_BMD.shape[1], 1)
            # Each of its vectors meets the other features, in one and the same tower.
            feature_BME[:, :, first : first + several_BMD.shape[2]] = several_BMD
            made["user"] = feature_BME
        return made

    def _pooled(self, batch: Batch) -> tuple[Pooled, Tensor | None]:
        """The pooled bags by key, and what the encoders make of the sequences.

        Of one that makes several vectors of a user these are apart, and the first has its place.
        """
        assert batch.sparse.keys() == self.schema.layout.pooled_keys
        bags: KeyedTensor | None = None if self.tables is None else self.tables(batch.sparse)
        vectors = {} if self.lists is None else self.lists(batch.sequences)
        looked_up = [] if bags is None else [bags.values()]
        unpooled = list(self.schema.layout.unpooled_keys)
        looked_up += [vectors[name].values() for name in unpooled]
        if torch.is_grad_enabled():
            weights = [*self.user_tower.parameters(), *self.item_tower.parameters()]
            looked_up = gate(looked_up, weights, self.ranks)
        pooled, several_BMD = Pooled(), None
        if bags is not None:
            pooled.add(looked_up.pop(0), dict(zip(bags.keys(), bags.length_per_key(), strict=True)))
        if self.lists is not None:
            found = {name: each.float() for name, each in zip(unpooled, looked_up, strict=True)}
            for name, vector in put_together(self.schema, self.user_tower, batch.listed, found).items():
                if vector.ndim == 3:
                    several_BMD, vector = vector, vector[:, 0]
                pooled.add(vector, {name: vector.shape[1]})
        return pooled, several_BMD


def put_together(
    schema: Schema, user_tower: Tower, listed: Mapping[str, Listed], vectors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What is made of vectors that were looked up one by one: pooled bags, and the users' encoded sequences."""
    found = {}
    for side, feature in schema.layout.table_pairs:
        name = lookup_key(side, feature)
        if name not in vectors:
            continue
        if not isinstance(feature, SequenceFeature):
            found[name] = pooled_by_hand(vectors[name], listed[name])
            continue
        item_UD = vectors[name]
        if feature.delta:
            item_UD = item_UD + vectors[delta_key(name)]
        for attribute in feature.attributes:
            at = listed[sub_name(name, attribute)]
            added = pooled_by_hand(vectors[sub_name(name, attribute)], at)
            item_UD = item_UD + (added if at.divisor is None else added / at.divisor[:, None])
        found[name] = user_tower.encode(feature.name, item_UD, listed[name])
    return found


def made_by_layers(
    schema: Schema, side: Side, tower: Tower, listed: Mapping[str, Listed], number: Tensor
) -> dict[str, Tensor]:
    """What the features' own layers make of their numbers or tokens, by key."""
    found, column = {}, 0
    for feature in schema.layout.layer_features(side):
        name, behind = lookup_key(side, feature), column + feature.num_numbers
        given = listed[name] if feature.has_tokens else number[:, column:behind]
        found[name] = tower.encode(feature.name, given)
        column = behind
    return found


@dataclass(frozen=True)
class Gaussian:
    """Whether users are, and whether their means have length 1."""

    is_one: bool
    is_unit: bool


def user_vectors(
    schema: Schema, tower: Tower, pooled: Mapping[str, Tensor], divisor: Tensor, number: Tensor, gaussian: Gaussian
) -> Tensor:
    """(B, D), or (B, M, D), of all that enters the users' tower."""
    several = schema.multi_interest_feature
    if several is None:
        raw_BD = tower(tower_input(schema, "user", pooled, divisor, number))
        return gaussian_user(raw_BD, is_unit=gaussian.is_unit) if gaussian.is_one else raw_BD
    name = lookup_key("user", several)  # each of its vectors meets the other features, in one and the same tower
    each = [
        tower_input(schema, "user", {**pooled, name: part_BD}, divisor, number) for part_BD in pooled[name].unbind(1)
    ]
    feature_BME = torch.stack(each, dim=1)
    return tower(feature_BME.flatten(0, 1)).unflatten(0, feature_BME.shape[:2])


def item_vectors(
    schema: Schema, tower: Tower, pooled: Mapping[str, Tensor], divisor: Tensor, number: Tensor, gaussian: Gaussian
) -> Tensor:
    """(S, D) of all that enters the items' tower."""
    item_SD = tower(tower_input(schema, "item", pooled, divisor, number))
    return gaussian_item(item_SD) if gaussian.is_one else item_SD


def relations_of(batch: Batch, log_q: float = 1.0) -> Relations:
    """Return how a training batch's rows and candidates relate, with logQ at the strength `log_q`."""
    targets = batch.targets
    assert targets is not None
    return Relations(
        positive=targets.positive,
        known=targets.known,
        given=targets.given,
        log_q_C=log_q * batch.log_q_C if log_q and batch.log_q_C is not None else None,
        is_negative_C=batch.is_negative_C,
    )
