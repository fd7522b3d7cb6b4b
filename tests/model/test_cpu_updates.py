"""Updates of tables on CPUs are the textbook's, however many features look a table up, in bags or one by one."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from trec_twotower.model.cpu.embedding_update import accelerate_updates

OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}
LR, EPS = 0.1, 1e-3
BAGS = 5
# Tables of (rows, columns), and which of them each feature looks up: shared ones first, last and between others.
SIZES = [(7, 8), (40, 4), (3, 12), (9, 8)]
FEATURES = [0, 0, 1, 2, 3, 3, 3]
LENGTHS = np.array(
    [[2, 0, 3, 1, 9], [1] * BAGS, [0, 5, 0, 2, 30], [0] * BAGS, [1, 0, 0, 0, 0], [0] * BAGS, [4, 2, 0, 6, 1]]
)


def tables(kind: str, *, features: list[int], sizes: list[tuple[int, int]], **more: Any) -> Any:
    made = SplitTableBatchedEmbeddingBagsCodegen(
        [(*size, EmbeddingLocation.HOST, ComputeDevice.CPU) for size in sizes],
        feature_table_map=features,
        optimizer=OPTIMIZERS[kind],
        learning_rate=LR,
        eps=EPS,
        stochastic_rounding=False,
        **more,
    )
    rng = np.random.default_rng(5)
    for weight in made.split_embedding_weights():
        weight.copy_(torch.from_numpy(rng.uniform(-1, 1, weight.shape)))
    return made


def accelerated(made: Any) -> Any:
    lookup = torch.nn.ModuleList([made])
    sharded = torch.nn.Module()
    sharded._lookups = [lookup]
    accelerate_updates(sharded)
    return made


def is_accelerated(made: Any) -> bool:
    return "forward" in vars(made)


class Textbook:
    """The same tables in float64, updated row by row."""

    def __init__(self, made: Any, kind: str) -> None:
        self.kind = kind
        self.weights = [weight.detach().double().numpy().copy() for weight in made.split_embedding_weights()]
        self.states = [np.zeros_like(weight) for weight in self.weights]

    def update(self, table: int, gradients: dict[int, np.ndarray]) -> None:
        weight, state = self.weights[table], self.states[table]
        for row, gradient in gradients.items():
            if self.kind == "sgd":
                weight[row] -= LR * gradient
                continue
            square = gradient**2
            state[row] += square if self.kind == "adagrad" else square.mean()
            weight[row] -= LR * gradient / (np.sqrt(state[row]) + EPS)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("is_weighted", [False, True])
def test_bags_of_shared_tables(kind: str, is_weighted: bool) -> None:
    made = accelerated(tables(kind, features=FEATURES, sizes=SIZES))
    assert is_accelerated(made)
    textbook, rng = Textbook(made, kind), np.random.default_rng(1)
    dims = [SIZES[table][1] for table in FEATURES]
    ends = np.cumsum(dims)
    for _ in range(3):
        indices = np.concatenate(
            [rng.integers(0, SIZES[table][0], lengths.sum()) for table, lengths in zip(FEATURES, LENGTHS, strict=True)]
        )
        weights = rng.uniform(0.5, 2, len(indices)).astype(np.float32) if is_weighted else None
        gradient = rng.normal(size=(BAGS, ends[-1])).astype(np.float32)
        offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
        found = made(
            torch.from_numpy(indices),
            torch.from_numpy(offsets),
            None if weights is None else torch.from_numpy(weights),
        )
        wanted, by_table = np.zeros((BAGS, ends[-1])), [dict[int, np.ndarray]() for _ in SIZES]
        for number, table in enumerate(FEATURES):
            columns = slice(ends[number] - dims[number], ends[number])
            for bag in range(BAGS):
                for at in range(offsets[number * BAGS + bag], offsets[number * BAGS + bag + 1]):
                    by, row = 1.0 if weights is None else weights[at], int(indices[at])
                    wanted[bag, columns] += by * textbook.weights[table][row]
                    added = by * gradient[bag, columns].astype(np.float64)
                    by_table[table][row] = by_table[table].get(row, 0) + added
        np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-5, atol=1e-5)
        found.backward(torch.from_numpy(gradient))
        for table, gradients in enumerate(by_table):
            textbook.update(table, gradients)
    for weight, expected in zip(made.split_embedding_weights(), textbook.weights, strict=True):
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("features", [[0], [0, 1], [0, 0, 1, 1, 1]])
def test_rows_one_by_one(kind: str, dtype: str, features: list[int]) -> None:
    sizes = [(6, 8), (11, 8)][: features[-1] + 1]
    made = accelerated(
        tables(
            kind,
            features=features,
            sizes=sizes,
            pooling_mode=PoolingMode.NONE,
            weights_precision=SparseType.FP32 if dtype == "fp32" else SparseType.FP16,
            output_dtype=SparseType.FP32,
        )
    )
    assert is_accelerated(made)
    textbook, rng = Textbook(made, kind), np.random.default_rng(2)
    for step in range(3):
        lengths = rng.integers(0, 30, (len(features), 2))  # two bags a feature, as of two ranks
        lengths[step % len(features)] = 0
        indices = np.concatenate(
            [rng.integers(0, sizes[table][0], some.sum()) for table, some in zip(features, lengths, strict=True)]
        )
        gradient = rng.normal(size=(len(indices), 8)).astype(np.float32)
        found = made(torch.from_numpy(indices), torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])))
        by_table = [dict[int, np.ndarray]() for _ in sizes]
        of_feature = np.repeat(features, lengths.sum(1))
        for at, (table, row) in enumerate(zip(of_feature, indices.tolist(), strict=True)):
            by_table[table][row] = by_table[table].get(row, 0) + gradient[at].astype(np.float64)
            close = 1e-5 if dtype == "fp32" else 5e-3
            np.testing.assert_allclose(found[at].detach().numpy(), textbook.weights[table][row], atol=close)
        found.backward(torch.from_numpy(gradient))
        for table, gradients in enumerate(by_table):
            textbook.update(table, gradients)
    for weight, expected in zip(made.split_embedding_weights(), textbook.weights, strict=True):
        np.testing.assert_allclose(weight.detach().float().numpy(), expected, atol=1e-5 if dtype == "fp32" else 5e-3)


def test_a_new_rate_holds_from_the_next_step() -> None:
    made = accelerated(tables("sgd", features=[0, 0], sizes=[(2, 4)]))
    start = made.split_embedding_weights()[0].clone()
    for rate in (0.5, 0.25):
        made.set_learning_rate(rate)
        made(torch.tensor([1, 1]), torch.tensor([0, 1, 2])).sum().backward()
    moved = start - made.split_embedding_weights()[0]
    torch.testing.assert_close(moved, torch.tensor([[0.0] * 4, [2 * 0.5 + 2 * 0.25] * 4]))


def test_tables_go_when_no_one_holds_them() -> None:
    made = accelerated(tables("sgd", features=[0, 0], sizes=[(2, 4)]))
    made(torch.tensor([1, 1]), torch.tensor([0, 1, 2])).sum().backward()
    gone = weakref.ref(made)
    gc.disable()
    try:
        del made
        assert gone() is None  # at once, and not when memory is short
    finally:
        gc.enable()


def test_nothing_is_learned_where_nothing_is_asked() -> None:
    made = accelerated(tables("sgd", features=[0, 0], sizes=[(2, 4)]))
    start = made.split_embedding_weights()[0].clone()
    with torch.no_grad():
        found = made(torch.tensor([1, 1]), torch.tensor([0, 1, 2]))
    assert not found.requires_grad
    torch.testing.assert_close(made.split_embedding_weights()[0], start)


def test_weights_of_ids_that_learn_keep_their_gradient() -> None:
    made = accelerated(tables("sgd", features=[0, 0], sizes=[(2, 4)]))
    weights = torch.ones(2, requires_grad=True)
    row = made.split_embedding_weights()[0][1].clone()
    made(torch.tensor([1, 1]), torch.tensor([0, 1, 2]), weights).sum().backward()
    torch.testing.assert_close(weights.grad, row.sum().repeat(2))


def test_a_mean_hands_each_row_its_part() -> None:
    """Row 1 is one of two in a bag and one of one in another, row 0 the other of the two."""
    made = accelerated(tables("sgd", features=[0, 0], sizes=[(2, 4)], pooling_mode=PoolingMode.MEAN))
    assert is_accelerated(made)
    start = made.split_embedding_weights()[0].clone()
    made(torch.tensor([1, 0, 1]), torch.tensor([0, 2, 3])).sum().backward()
    moved = start - made.split_embedding_weights()[0]
    torch.testing.assert_close(moved, torch.tensor([[LR / 2] * 4, [LR * 3 / 2] * 4]))


@pytest.mark.parametrize(
    ("features", "more"),
    [
        ([0], {}),  # fbgemm is as fast by itself
        ([0, 0], {"weight_decay": 0.1}),
        ([0, 0], {"gradient_clipping": True}),
        ([0, 0], {"max_norm": 0.5}),
    ],
)
def test_what_is_left_to_fbgemm(features: list[int], more: dict[str, Any]) -> None:
    assert not is_accelerated(accelerated(tables("rowwise_adagrad", features=features, sizes=[(2, 4)], **more)))


def test_tables_of_another_device_are_left_alone() -> None:
    made = tables("rowwise_adagrad", features=[0, 0], sizes=[(2, 4)])
    made.use_cpu = False
    assert not is_accelerated(accelerated(made))
