"""The two-tower model of training, export, evaluation and serving."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from trec_twotower.config.base import Side
from trec_twotower.config.losses import InterestsConfig, LearnedTemperature, LossConfig
from trec_twotower.config.model import ModelConfig
from trec_twotower.config.schema import Schema
from trec_twotower.data.loading.batch import Batch
from trec_twotower.distributed.ranks import Ranks
from trec_twotower.model.cross_batch_memory import CrossBatchMemory
from trec_twotower.model.embeddings import build_embedding_bag_collection, build_embedding_collection
from trec_twotower.model.feature_encoders import build_input
from trec_twotower.model.finite_check import GradientCheck
from trec_twotower.model.losses import LOSSES, Hardest, Relations
from trec_twotower.model.losses.regularizers import alignment, nearness, squared_lengths
from trec_twotower.model.losses.streaming_log_q import StreamingLogQ
from trec_twotower.model.losses.temperature import Temperature
from trec_twotower.model.multi_interest import gaussian_item, gaussian_user, label_aware_attention, likeness, uses
from trec_twotower.model.sequence_encoders import SequenceInput
from trec_twotower.model.step_diagnostics import Histogram, StepDiagnostics
from trec_twotower.model.tower import Tower, encoder_name
from trec_twotower.model.tower_inputs import Pooled, SideInputs, build_inputs
from trec_twotower.model.tower_layers import row_means

SIDES: tuple[Side, Side] = ("user", "item")


class TwoTower(nn.Module):
    """Maps users and items to vectors with score = user . item.

    `forward` returns this rank's loss, `encode_users` and `encode_items` return vectors. All three look up sharded
    tables, so all ranks call them together, a rank without rows with an empty batch.
    """

    def __init__(self, schema: Schema, model: ModelConfig, loss: LossConfig, ranks: Ranks) -> None:
        super().__init__()
        self.schema = schema
        self.loss = loss
        self.ranks = ranks
        self.tables = build_embedding_bag_collection(schema)
        self.lists = build_embedding_collection(schema)
        self.is_unit = is_unit = model.similarity == "cosine"
        self.is_gaussian = model.user_vector == "gaussian"
        sizes = (model.vector_dim, model.dim)  # the tower of Gaussian users outputs a mean and a variance
        outputs = (partial(gaussian_user, is_unit=is_unit), gaussian_item) if self.is_gaussian else (None, None)
        self.user_tower, self.item_tower = (
            Tower(
                schema.layout.part_widths(side),
                dim,
                config,
                is_unit=is_unit and dim == model.dim,
                place=partial(schema.layout.part_index, side),
                output=output,
            )
            for side, dim, config, output in zip(
                SIDES, sizes, (model.user_tower, model.item_tower), outputs, strict=True
            )
        )
        for sequence in schema.sequences:
            encoder = SequenceInput(sequence, schema.table_of(sequence).dim)
            self.user_tower.encoders[encoder_name(sequence.name)] = encoder
        self.vectors_per_user = schema.vectors_per_user  # M
        self.interests = loss.interests or InterestsConfig()
        self.interest_uses: Tensor | None = None  # this rank's last logged batch
        for side in SIDES:
            for feature in schema.layout.layer_features(side):
                self._tower(side).encoders[encoder_name(feature.name)] = build_input(feature)
        self.diagnostics = StepDiagnostics(is_unit=is_unit)
        self.gradient_check = GradientCheck(ranks)
        self.parameters_of_loss = loss.parameters
        temperature = loss.parameters.get("temperature")
        learned = temperature if isinstance(temperature, LearnedTemperature) else None
        if "precision" in self.parameters_of_loss:
            wanted = self.parameters_of_loss["precision"]
            self.parameters_of_loss["precision"] = wanted if wanted == "bf16_logits" else ranks.precision(wanted)
        self.temperature = None if learned is None else Temperature(learned, ranks.device)
        self.frequency = StreamingLogQ(ranks.device) if loss.streams_log_q else None
        size = loss.negatives.cross_batch_memory
        self.queue = CrossBatchMemory(size, model.vector_dim, loss.log_q_strength, ranks.device) if size else None

    def encode_users(self, batch: Batch) -> Tensor:
        """Return (B, D), or (B, M, D) for multi-interest users."""
        return self.user_tower(self._inputs(batch, "user")["user"])

    def encode_items(self, batch: Batch) -> Tensor:
        """Return (S, D)."""
        return self.item_tower(self._inputs(batch, "item")["item"])

    def forward(self, batch: Batch, *, with_diagnostics: bool = False) -> Tensor:
        """Return the loss of this rank's rows, whose mean over ranks is the mean over all rows of the step.

        `with_diagnostics` records what `figures` returns of this step; all ranks pass the same.
        """
        inputs = self._inputs(batch, *SIDES)
        on_raw = {side: partial(self.diagnostics.record_length, side) if with_diagnostics else None for side in SIDES}
        user_BD = self.user_tower(inputs["user"], on_raw["user"])
        item_SD = self.item_tower(inputs["item"], on_raw["item"])
        item_CD = self.ranks.gather(item_SD, list(batch.item_sizes))
        relations = relations_of(batch, self.loss.log_q_strength)
        assert relations.given is not None or self.loss.impressions is None, (
            "loss.impressions is set, but the batch has no pairs"
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
            if with_diagnostics:
                self.interest_uses = uses(user_BD, item_CD, relations.positive)
            if self.interests.score == "attention":
                positive, sharpness = relations.positive, self.interests.sharpness
                user_BD = label_aware_attention(user_BD, item_CD, positive, sharpness, is_unit=self.is_unit)
        if with_diagnostics:
            self.diagnostics.record(user_BD, column_CD, among)
        loss = LOSSES[self.loss.kind](user_BD, column_CD, among, **parameters)
        for tower in (self.user_tower, self.item_tower):
            penalty = tower.penalty(self.ranks)
            loss = loss if penalty is None else loss + penalty / share
        loss = loss * share + self._regularised(user_BD, item_CD, batch, relations, share)
        return loss if alike is None else loss + alike

    def _with_queue(
        self, queue: CrossBatchMemory, item_CD: Tensor, log_p_C: Tensor, batch: Batch, relations: Relations
    ) -> tuple[Tensor, Relations]:
        """Return the candidates followed by those of earlier steps; in training, keep this step's for later ones."""
        assert batch.item_key_C is not None
        assert batch.targets is not None and batch.targets.masked_keys is not None
        both = queue.extend(item_CD, batch.item_key_C, log_p_C, relations, batch.targets.masked_keys)
        if self.training:
            queue.push(item_CD, batch.item_key_C, log_p_C, relations.is_negative_C)
        return both

    def forget(self) -> None:
        """Clear the memory of earlier steps, which belong to another run."""
        for memory in (self.frequency, self.queue):
            if memory is not None:
                memory.forget()

    def _regularised(
        self, user_BD: Tensor, item_CD: Tensor, batch: Batch, relations: Relations, share: float
    ) -> Tensor:
        """Return the terms of loss.regularization, scaled like the loss."""
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
        """Return the uniformity of the vectors of all ranks; each rank compares its share with all of them.

        The log is of the sum over ranks. Each rank multiplies its own part by the number of ranks, so that the mean of
        their gradients is the gradient of the log.
        """
        rank, num_ranks, total = self.ranks.rank, self.ranks.num_ranks, sum(sizes)
        if total < 2:
            return vector_ND.sum() * 0
        mine = nearness(vector_ND, sum(sizes[:rank]), sizes[rank])
        everyone = self.ranks.mean(mine) * num_ranks
        return (mine - mine.detach()) * (num_ranks / everyone) + math.log(everyone / (total * (total - 1)))

    def figures(self) -> dict[str, float | Histogram]:
        """Return the metrics to log next to the loss. All ranks call together."""
        temperature = {} if self.temperature is None else {"temperature": self.temperature().item()}
        parts = {
            f"{side}_{name}": value
            for side, tower in zip(SIDES, (self.user_tower, self.item_tower), strict=True)
            for name, value in tower.figures(self.ranks).items()
        }
        if self.vectors_per_user > 1:
            names = [f"interest_{number}" for number in range(self.vectors_per_user)]
            parts |= row_means(names, self.interest_uses, self.ranks)
        return {**temperature, **parts, **self.diagnostics.figures(self.ranks)}

    @property
    def has_cosine_scores(self) -> bool:
        """Return whether a score is a cosine, or the highest of several."""
        return self.is_unit and not self.is_gaussian

    def _tower(self, side: Side) -> Tower:
        return self.user_tower if side == "user" else self.item_tower

    def _inputs(self, batch: Batch, *sides: Side) -> dict[Side, Tensor]:
        """Return the input of each tower: (rows, E); (rows, M, E) for multi-interest users."""
        given: dict[Side, SideInputs] = {
            "user": SideInputs(self.user_tower, batch.user_divisor_BF, batch.user_number_BN),
            "item": SideInputs(self.item_tower, batch.item_divisor_SF, batch.item_number_SN),
        }
        pooled, vectors = self._lookup(batch)
        return build_inputs(self.schema, {side: given[side] for side in sides}, pooled, vectors, batch.listed)

    def _lookup(self, batch: Batch) -> tuple[Pooled, dict[str, Tensor]]:
        """Return the pooled bags, and the embeddings of the unpooled keys."""
        assert batch.sparse.keys() == self.schema.layout.pooled_keys
        bags: KeyedTensor | None = None if self.tables is None else self.tables(batch.sparse)
        vectors = {} if self.lists is None else self.lists(batch.sequences)
        looked_up = [] if bags is None else [bags.values()]
        unpooled = list(self.schema.layout.unpooled_keys)
        looked_up += [vectors[name].values() for name in unpooled]
        if torch.is_grad_enabled():
            weights = [*self.user_tower.parameters(), *self.item_tower.parameters()]
            looked_up = self.gradient_check.gate(looked_up, weights)
        pooled = Pooled()
        if bags is not None:
            pooled.add(looked_up.pop(0), dict(zip(bags.keys(), bags.length_per_key(), strict=True)))
        return pooled, {name: each.float() for name, each in zip(unpooled, looked_up, strict=True)}


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
