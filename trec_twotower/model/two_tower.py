"""The one model: for training, export, evaluation and serving."""

from __future__ import annotations

from torch import Tensor, nn

from trec_twotower.config import LossConfig, ModelConfig
from trec_twotower.data.batch import Batch
from trec_twotower.distributed import Ranks
from trec_twotower.model.embedding import build_tables, tower_input
from trec_twotower.model.losses import sampled_softmax
from trec_twotower.model.tower import Tower
from trec_twotower.schema import Schema


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
        is_unit = model.similarity == "cosine"
        self.user_tower = Tower(schema.width("user"), model.dim, model.user_tower, is_unit=is_unit)
        self.item_tower = Tower(schema.width("item"), model.dim, model.item_tower, is_unit=is_unit)

    def encode_users(self, batch: Batch) -> Tensor:
        """(B, D)."""
        return self._users(batch, self._pooled(batch))

    def encode_items(self, batch: Batch) -> Tensor:
        """(S, D)."""
        return self._items(batch, self._pooled(batch))

    def forward(self, batch: Batch) -> Tensor:
        """The loss of this rank's rows, scaled so that its mean over ranks is the mean over all rows of the step."""
        pooled = self._pooled(batch)
        item_CD = self.ranks.gather(self._items(batch, pooled), list(batch.item_sizes))
        total = sampled_softmax(
            self._users(batch, pooled),
            item_CD,
            positive_row_P=batch.positive_row_P,
            positive_column_P=batch.positive_column_P,
            positive_weight_P=batch.positive_weight_P,
            known_row_M=batch.known_row_M,
            known_column_M=batch.known_column_M,
            correction_C=batch.log_q_C,
            is_negative_C=batch.is_negative_C,
            temperature=self.loss.temperature,
        )
        return total * (self.ranks.num_ranks / batch.num_rows_of_all_ranks)

    def _pooled(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.sparse.keys() == self.schema.keys()
        return self.tables(batch.sparse).to_dict()

    def _users(self, batch: Batch, pooled: dict[str, Tensor]) -> Tensor:
        return self.user_tower(tower_input(self.schema, "user", pooled, batch.user_divisor_BF, batch.user_number_BN))

    def _items(self, batch: Batch, pooled: dict[str, Tensor]) -> Tensor:
        return self.item_tower(tower_input(self.schema, "item", pooled, batch.item_divisor_SF, batch.item_number_SN))
