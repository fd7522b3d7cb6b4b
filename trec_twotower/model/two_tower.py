"""The one model: for training, export, evaluation and serving."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from trec_twotower.config import LearnedTemperature, LossConfig, ModelConfig
from trec_twotower.data.batch import Batch
from trec_twotower.distributed import Ranks
from trec_twotower.model.embedding import build_lists, build_tables, pooled_by_hand, tower_input
from trec_twotower.model.frequency import Frequency
from trec_twotower.model.gate import gate
from trec_twotower.model.inputs import build_input
from trec_twotower.model.losses import LOSSES, Pairs, Relations
from trec_twotower.model.losses.regularisers import alignment, nearness, squared_lengths
from trec_twotower.model.queue import ItemQueue
from trec_twotower.model.sequence import SequenceInput
from trec_twotower.model.temperature import Temperature
from trec_twotower.model.tower import Tower
from trec_twotower.model.watch import Histogram, Watch
from trec_twotower.schema import Schema, Side, key, part_of

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
        is_unit = model.similarity == "cosine"
        self.user_tower, self.item_tower = (
            Tower(schema.widths(side), model.dim, config, is_unit=is_unit, place=partial(schema.place, side))
            for side, config in zip(SIDES, (model.user_tower, model.item_tower), strict=True)
        )
        for feature in schema.sequences:
            self.user_tower.encoders[feature.name] = SequenceInput(feature, schema.table_of(feature).dim)
        for side in SIDES:
            for feature in schema.layered(side):
                self._tower(side).encoders[feature.name] = build_input(feature)
        self.watch = Watch(is_unit=is_unit)
        self.user_tower.note_length = partial(self.watch.note_length, "user")
        self.item_tower.note_length = partial(self.watch.note_length, "item")
        learned = loss.temperature if isinstance(loss.temperature, LearnedTemperature) else None
        self.temperature = None if learned is None else Temperature(learned, ranks.device)
        self.frequency = Frequency(ranks.device) if loss.log_q_estimate == "streaming" else None
        size = loss.negatives.queue
        self.queue = ItemQueue(size, model.dim, loss.log_q, ranks.device) if size else None

    def encode_users(self, batch: Batch) -> Tensor:
        """(B, D)."""
        return self._users(batch, self._pooled(batch))

    def encode_items(self, batch: Batch) -> Tensor:
        """(S, D)."""
        return self._items(batch, self._pooled(batch))

    def forward(self, batch: Batch) -> Tensor:
        """The loss of this rank's rows, scaled so that its mean over ranks is the mean over all rows of the step."""
        pooled = self._pooled(batch)
        user_BD = self._users(batch, pooled)
        item_CD = self.ranks.gather(self._items(batch, pooled), list(batch.item_sizes))
        relations = relations_of(batch)
        assert relations.given is not None or self.loss.given is None, "loss.given is set, but the batch has no pairs"
        if self.frequency is not None:
            assert batch.item_key_C is not None
            log_p_C = self.frequency(batch.item_key_C, batch.is_negative_C)
            relations = replace(relations, log_q_C=self.loss.log_q * log_p_C)
        relations = replace(relations, hardest=self.loss.negatives.hardest)
        column_CD, among = (item_CD, relations) if self.queue is None else self._with_queue(item_CD, batch, relations)
        parameters = self.loss.parameters
        if self.temperature is not None:
            parameters["temperature"] = self.temperature()
        self.watch.look(user_BD, column_CD, among)
        loss = LOSSES[self.loss.kind](user_BD, column_CD, among, **parameters)
        share = self.ranks.num_ranks / batch.num_rows_of_all_ranks
        for tower in (self.user_tower, self.item_tower):
            penalty = tower.penalty(self.ranks)
            loss = loss if penalty is None else loss + penalty / share
        return loss * share + self._regularised(user_BD, item_CD, batch, relations, share)

    def _with_queue(self, item_CD: Tensor, batch: Batch, relations: Relations) -> tuple[Tensor, Relations]:
        """The candidates with those of earlier steps behind them; in training this step's are kept for later ones."""
        assert self.queue is not None and batch.item_key_C is not None
        assert batch.listed_row_L is not None and batch.listed_key_L is not None
        listed = Pairs(batch.listed_row_L, batch.listed_key_L)
        both = self.queue.beside(item_CD, batch.item_key_C, relations, listed)
        if self.training:
            self.queue.push(item_CD, batch.item_key_C, relations)
        return both

    def forget(self) -> None:
        """Let go of what is remembered of earlier steps: they were another run's."""
        for memory in (self.frequency, self.queue):
            if memory is not None:
                memory.forget()

    def _regularised(
        self, user_BD: Tensor, item_CD: Tensor, batch: Batch, relations: Relations, share: float
    ) -> Tensor:
        """What loss.regularise adds, scaled as the loss is."""
        wanted = self.loss.regularise
        added = user_BD.new_zeros(())
        if wanted.norm:
            added = added + wanted.norm * (squared_lengths(user_BD).sum() * share + squared_lengths(item_CD).mean())
        if wanted.alignment:
            added = added + wanted.alignment * share * alignment(user_BD, item_CD, relations.positive)
        if wanted.uniformity:
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
            for name, value in tower.figures().items()
        }
        return {**temperature, **parts, **self.watch.figures(self.ranks)}

    def _pooled(self, batch: Batch) -> dict[str, Tensor]:
        """The pooled bags by key, and what the encoders make of the sequences."""
        assert batch.sparse.keys() == self.schema.keys()
        bags: KeyedTensor | None = None if self.tables is None else self.tables(batch.sparse)
        vectors = {} if self.lists is None else self.lists(batch.sequences)
        looked_up = [] if bags is None else [bags.values()]
        looked_up += [vectors[name].values() for name, _ in self.schema.listed_keys]
        if torch.is_grad_enabled():
            weights = [*self.user_tower.parameters(), *self.item_tower.parameters()]
            looked_up = gate(looked_up, weights, self.ranks)
        pooled = {}
        if bags is not None:
            values = looked_up.pop(0)
            pooled = KeyedTensor(bags.keys(), bags.length_per_key(), values, key_dim=1).to_dict()
        if self.lists is not None:
            found = {name: each.float() for (name, _), each in zip(self.schema.listed_keys, looked_up, strict=True)}
            pooled |= self._by_hand(batch, found)
        return pooled

    def _by_hand(self, batch: Batch, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is made of vectors that were looked up one by one: pooled bags, and the users' encoded sequences."""
        found = {}
        for side, feature in self.schema.sparse_pairs:
            name = key(side, feature)
            if feature.table_name not in self.schema.listed:
                continue
            if feature.kind != "sequence":
                found[name] = pooled_by_hand(vectors[name], batch.listed[name])
                continue
            item_UD = vectors[name]
            if feature.delta:
                item_UD = item_UD + vectors[part_of(name, "delta", "+")]
            for attribute in feature.attributes:
                at = batch.listed[part_of(name, attribute)]
                added = pooled_by_hand(vectors[part_of(name, attribute)], at)
                item_UD = item_UD + (added if at.divisor is None else added / at.divisor[:, None])
            found[name] = self.user_tower.encode(feature.name, item_UD, batch.listed[name])
        return found

    def _layered(self, side: Side, batch: Batch, number: Tensor) -> dict[str, Tensor]:
        """What the features' own layers make of their numbers or tokens, by key."""
        found, column = {}, 0
        for feature in self.schema.layered(side):
            name, behind = key(side, feature), column + feature.num_numbers
            given = batch.listed[name] if feature.is_tokens else number[:, column:behind]
            found[name] = self._tower(side).encode(feature.name, given)
            column = behind
        return found

    def _tower(self, side: Side) -> Tower:
        return self.user_tower if side == "user" else self.item_tower

    def _users(self, batch: Batch, pooled: dict[str, Tensor]) -> Tensor:
        number = batch.user_number_BN
        pooled = pooled | self._layered("user", batch, number)
        return self.user_tower(tower_input(self.schema, "user", pooled, batch.user_divisor_BF, number))

    def _items(self, batch: Batch, pooled: dict[str, Tensor]) -> Tensor:
        number = batch.item_number_SN
        pooled = pooled | self._layered("item", batch, number)
        return self.item_tower(tower_input(self.schema, "item", pooled, batch.item_divisor_SF, number))


def relations_of(batch: Batch) -> Relations:
    """How a training batch's rows and candidates relate."""
    assert batch.positive_row_P is not None and batch.positive_column_P is not None
    assert batch.known_row_M is not None and batch.known_column_M is not None
    given = None
    if batch.given_row_G is not None and batch.given_column_G is not None:
        given = Pairs(batch.given_row_G, batch.given_column_G, batch.given_weight_G, batch.given_label_G)
    return Relations(
        positive=Pairs(batch.positive_row_P, batch.positive_column_P, batch.positive_weight_P),
        known=Pairs(batch.known_row_M, batch.known_column_M),
        given=given,
        log_q_C=batch.log_q_C,
        is_negative_C=batch.is_negative_C,
    )
