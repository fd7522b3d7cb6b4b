"""Users whose vectors are more than a point: each part by a slower way, and worlds that a point cannot solve."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.sequences import steps_config
from trec_twotower.config.evaluation import IndexConfig
from trec_twotower.config.model import build_encoder
from trec_twotower.config.schema import Schema
from trec_twotower.errors import ConfigError
from trec_twotower.index import build_index, exact_search
from trec_twotower.inference.export import VECTORS, VectorFiles, _write
from trec_twotower.model.losses import LOSSES, Hardest, Pairs, Relations
from trec_twotower.model.losses import chunked as blocks
from trec_twotower.model.multi_interest import gaussian_item, gaussian_user, label_aware_attention, likeness, uses
from trec_twotower.model.sequence_encoders import ENCODERS
from trec_twotower.ops.ragged import Ragged

ROWS, COLUMNS, INTERESTS, DIM, TEMPERATURE = 4, 9, 3, 5, 0.5


SEVERAL = {"history": {"encoder": {"kind": "routing"}}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products as small as these gain nothing by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    user_BMD = F.normalize(torch.randn(ROWS, INTERESTS, DIM, generator=generator), dim=2)
    return user_BMD.requires_grad_(True), torch.randn(COLUMNS, DIM, generator=generator).requires_grad_(True)


def relations() -> Relations:
    """Row 0 has one positive, row 1 three, row 2 none, row 3 two; what is refused stands against its row alone."""
    positive = Pairs(torch.tensor([1, 0, 3, 1, 1, 3]), torch.tensor([4, 1, 0, 3, 8, 2]), torch.linspace(0.5, 2, 6))
    known = Pairs(torch.tensor([1, 0, 3, 1, 1, 3, 1, 2]), torch.tensor([4, 1, 0, 3, 8, 2, 6, 5]))
    given = Pairs(torch.tensor([1, 0, 3, 1]), torch.tensor([5, 2, 7, 4]), torch.tensor([1.0, 2, 3, 4]), torch.zeros(4))
    is_negative_C = torch.arange(COLUMNS) != 5
    return Relations(positive, known, given, torch.linspace(-3, -1, COLUMNS), is_negative_C)


def by_definition(kind: str, user_BMD: Tensor, item_CD: Tensor, related: Relations, hardest: Hardest | None) -> Tensor:
    """Row after row, over the whole list of its scores, each the highest by any of the row's vectors."""
    score_BC = torch.einsum("bmd,cd->bmc", user_BMD, item_CD).amax(1) / TEMPERATURE
    logit_BC = score_BC - related.log_q_C
    drawn_BC = torch.where(related.is_negative_C, logit_BC, score_BC)  # what only its row refused was not drawn
    total = torch.zeros(())
    positive, known, given = related.positive, related.known, related.given
    for row in range(len(user_BMD)):
        shut = known.column_P[known.row_P == row].tolist()
        refused = [column for column in given.column_P[given.row_P == row].tolist() if column not in shut]
        columns = [c for c in range(COLUMNS) if related.is_negative_C[c] and c not in shut and c not in refused]
        if kind == "softmax":
            columns += refused
        negative = drawn_BC[row, columns]
        if hardest is not None:
            others = score_BC[row, columns].argsort(descending=True)[hardest.count :]
            negative = negative.index_add(0, others, torch.full((len(others),), math.log(hardest.others)))
        own = [(c, w) for r, c, w in zip(*(part.tolist() for part in vars_of(positive)), strict=True) if r == row]
        for column, weight in own:
            logit = logit_BC[row, column]
            if kind == "softmax":
                total = total + weight * (torch.logsumexp(torch.cat([logit[None], negative]), 0) - logit)
            else:
                total = total + weight * (F.softplus(-logit) + F.softplus(negative).sum() / len(columns))
        if kind == "bce":
            for r, c, w in zip(*(part.tolist() for part in vars_of(given)), strict=True):
                if r == row and c in refused:
                    total = total + w * F.softplus(score_BC[row, c])
    return total


def vars_of(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    return pairs.row_P, pairs.column_P, pairs.weight_P


@pytest.mark.parametrize("cells", [1 << 20, 2 * COLUMNS])
@pytest.mark.parametrize(("kind", "hardest"), [("softmax", None), ("softmax", Hardest(2, 0.1)), ("bce", None)])
def test_the_loss_in_blocks_equals_the_definition(kind, hardest, cells, vectors, monkeypatch):
    """Values and gradients, with several positives a row, refused items, columns that are nobody's negatives."""
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 1)
    monkeypatch.setitem(blocks.BLOCK_CELLS, "cpu", cells)
    related = relations()
    found = []
    for make in (
        lambda *each: LOSSES[kind](*each, replace(related, hardest=hardest), temperature=TEMPERATURE),
        lambda *each: by_definition(kind, *each, related, hardest),
    ):
        user_BMD, item_CD = (each.detach().clone().requires_grad_(True) for each in vectors)
        loss = make(user_BMD, item_CD)
        loss.backward()
        found.append((loss.detach(), user_BMD.grad, item_CD.grad))
    for made, expected in zip(*found, strict=True):
        assert torch.allclose(made, expected, atol=1e-5), (made, expected)
    assert (found[0][1].abs().sum(2) > 0).sum() > ROWS  # more than one of a row's vectors has learned something


@pytest.mark.parametrize("kind", LOSSES)
def test_twice_the_same_vector_costs_what_it_costs_once(kind, vectors):
    user_BD, item_CD = vectors[0].detach()[:, 0], vectors[1].detach()
    related = relations()
    once, twice = (LOSSES[kind](user, item_CD, related) for user in (user_BD, user_BD[:, None].expand(-1, 2, -1)))
    assert torch.allclose(once, twice, atol=1e-5)


def test_attention_by_the_positive_is_the_mean_written_out(vectors):
    user_BMD, item_CD = (each.detach() for each in vectors)
    column_B = torch.tensor([1, 4, 7, 2])
    made = label_aware_attention(user_BMD, item_CD, Pairs(torch.arange(ROWS), column_B), 2.0, is_unit=True)
    for row, column in enumerate(column_B):
        weight_M = (2.0 * (user_BMD[row] @ item_CD[column])).softmax(0)
        assert torch.allclose(made[row], F.normalize((weight_M[:, None] * user_BMD[row]).sum(0), dim=0), atol=1e-6)
    used_BM = uses(user_BMD, item_CD, Pairs(torch.arange(ROWS), column_B))
    best = [int((user_BMD[row] @ item_CD[column]).argmax()) for row, column in enumerate(column_B)]
    assert used_BM.tolist() == [[int(vector == one) for vector in range(INTERESTS)] for one in best]


def test_likeness_is_the_mean_square_of_cosines_above_zero():
    user_BMD = torch.tensor([[[1.0, 0], [2, 0], [0, 3]], [[1.0, 0], [-1, 0], [0, 1]], [[1.0, 0], [1, 1], [-1, 0]]])
    assert torch.allclose(likeness(user_BMD), torch.tensor([1 / 3, 0.0, 0.5 / 3]), atol=1e-6)


# Search


@pytest.mark.parametrize("factory", [None, "IVF8,Flat"])
def test_one_search_of_all_vectors_finds_the_best_by_any(factory, rng):
    """Against scoring everything: whole lists of k without items twice, seen ones left out, filters kept."""
    item_ID = rng.normal(size=(300, 8)).astype(np.float32)
    user_BMD = rng.normal(size=(40, 3, 8)).astype(np.float32)
    user_BMD[:10, 1] = user_BMD[:10, 0]  # whose lists are the same
    user_BMD[5, 2] = 0.9 * user_BMD[5, 0]
    seen = Ragged.from_lists([rng.choice(300, 20, replace=False) for _ in range(40)])
    score_BI = np.einsum("bmd,id->bmi", user_BMD, item_ID).max(axis=1)
    score_BI[seen.rows, seen.values] = -np.inf
    best_BK = np.argsort(-score_BI, axis=1, kind="stable")[:, :12]
    index = build_index(item_ID, user_BMD, IndexConfig(target_recall=1.0, k=12, factory=factory))
    for found_BK in (
        index.search(user_BMD, 12, seen=seen)[1],
        exact_search(item_ID, user_BMD, 12, seen)[1],
    ):
        found = np.take_along_axis(score_BI, found_BK, axis=1)
        assert np.allclose(found, np.take_along_axis(score_BI, best_BK, axis=1), atol=1e-5)
        assert all(len(set(row)) == 12 for row in found_BK.tolist())
    mask_I = np.arange(300) % 15 == 0
    score_BK, found_BK = index.search(user_BMD, 20, seen=seen, allowed=index.allow(mask_I))
    assert np.array_equal((found_BK >= 0).sum(axis=1), [mask_I.sum() - mask_I[taken].sum() for taken in seen_of(seen)])
    assert mask_I[found_BK[found_BK >= 0]].all() and (score_BK[:, 1:] <= score_BK[:, :-1]).all()


def seen_of(seen: Ragged) -> list[np.ndarray]:
    return np.split(seen.values, seen.offsets[1:-1])


def test_exported_vectors_are_lists_of_lists(tmp_path, rng, lone_rank):
    user_QMD = rng.normal(size=(7, 3, 4)).astype(np.float32)

    def write() -> str | None:
        def ids(start, stop):
            return [pa.array(range(start, stop))]

        return _write(
            tmp_path, "users", {"user_id": pa.int64()}, 7, ids, lambda *rows: user_QMD[slice(*rows)], lone_rank
        )

    assert write() is None
    kind = pq.read_schema(tmp_path / "users-00000-of-00001.parquet").field(VECTORS).type
    assert kind == pa.list_(pa.list_(pa.float32(), 4), 3)
    plain = pq.read_table(tmp_path / "users-00000-of-00001.parquet").to_pydict()[VECTORS]
    assert np.array_equal(np.array(plain, np.float32), user_QMD)
    files = VectorFiles(tmp_path, "users")
    assert (len(files), files.dim) == (21, 4)
    assert np.array_equal(np.concatenate(list(files.pieces())), user_QMD.reshape(21, 4))
    user_QMD[3, 1, 2] = np.nan
    assert "1 users have vectors with NaN" in str(write())


# A mean and a variance


def test_a_gaussian_users_score_is_the_log_of_the_expected_similarity():
    """t log E[exp(u . v / t)] over many drawn points; the tower gives m and s² / (2 t), through softplus."""
    generator = torch.Generator().manual_seed(0)
    temperature, spread = 0.5, torch.tensor([0.3, 0.1, 0.6])
    raw = torch.cat([torch.tensor([0.4, -0.2, 0.9]), torch.log(torch.expm1(spread**2 / (2 * temperature))) + 3.0])
    item_SD = torch.tensor([[0.6, 0.8, 0.0], [0.0, -0.6, 0.8]])
    score = gaussian_user(raw[None], is_unit=False) @ gaussian_item(item_SD).T
    points = raw[:3] + spread * torch.randn(400_000, 3, generator=generator)
    expected = temperature * ((points @ item_SD.T) / temperature).exp().mean(0).log()
    assert torch.allclose(score[0], expected, atol=5e-3)
    mean = gaussian_user(raw[None], is_unit=True)[0, :3]
    assert torch.allclose(mean, F.normalize(raw[:3], dim=0))


# Worlds that one point a user cannot solve

CLUSTERS, ITEMS_EACH, STEPS, USERS = 16, 4, 6, 800


def recall_of_two(kind: str, dim: int = 4, steps: int = 150, seed: int = 0, **settings: Any) -> float:
    """Users take items of two clusters by turns; how many of a half that was not trained on find the next one.

    It is of either cluster, so among the eight best of somebody who knows both.
    """
    generator = torch.Generator().manual_seed(0)
    pair = torch.stack([torch.randperm(CLUSTERS, generator=generator)[:2] for _ in range(USERS)])
    turn = torch.stack([torch.randperm(STEPS, generator=generator) % 2 for _ in range(USERS)])
    history = pair.gather(1, turn) * ITEMS_EACH + torch.randint(ITEMS_EACH, (USERS, STEPS), generator=generator)
    either = torch.randint(2, (USERS, 1), generator=generator)
    target = (pair.gather(1, either) * ITEMS_EACH + torch.randint(ITEMS_EACH, (USERS, 1), generator=generator))[:, 0]
    torch.manual_seed(seed)
    encoder = ENCODERS[kind](build_encoder(kind=kind, **settings), dim, STEPS)
    table, layer = nn.Parameter(torch.randn(CLUSTERS * ITEMS_EACH, dim)), nn.Linear(dim, dim)
    optimizer = torch.optim.Adam([*encoder.parameters(), *layer.parameters(), table], lr=0.1)
    half = USERS // 2
    length, rows = torch.full((half,), STEPS), torch.arange(half)
    related = Relations(Pairs(rows, target[:half]), Pairs(rows, target[:half]))

    def users(part: Tensor) -> Tensor:
        return F.normalize(layer(encoder(F.embedding(part, table).flatten(0, 1), length)), dim=-1)

    for _ in range(steps):
        user, item_CD = users(history[:half]), F.normalize(table, dim=1)
        loss = LOSSES["softmax"](user, item_CD, related, temperature=0.1) / half
        loss = loss + (0.1 * likeness(user).mean() if user.ndim == 3 else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        score = users(history[half:]) @ F.normalize(table, dim=1).T
        best = (score if score.ndim == 2 else score.amax(1)).topk(2 * ITEMS_EACH, dim=1).indices
    return float((best == target[half:, None]).any(1).float().mean())


def test_several_vectors_solve_a_world_of_two_interests():
    """In four dimensions no point is near two of sixteen clusters and far from the others.

    How well one run does depends on its first weights and on rounding, by .1 and more: hence the means.
    """

    def mean(kind: str, **settings: Any) -> float:
        return statistics.mean(recall_of_two(kind, seed=seed, **settings) for seed in range(3))

    points, several = recall_of_two("attention"), mean("self_attention", interests=8)
    assert several > points + 0.2, (several, points)
    routed = mean("routing", interests=8, iterations=2)
    assert routed > points + 0.1, (routed, points)


def right_of_two(is_gaussian: bool, groups: int = 8, each: int = 4, dim: int = 3, steps: int = 200) -> float:
    """Each kind of user likes two of the groups; the share of their eight best that are of these."""
    pair = torch.combinations(torch.arange(groups), 2)
    generator = torch.Generator().manual_seed(1)
    kind = torch.randint(len(pair), (600,), generator=generator)
    target = pair[kind, torch.randint(2, (600,), generator=generator)] * each
    target = target + torch.randint(each, (600,), generator=generator)
    torch.manual_seed(0)
    user, item = nn.Embedding(len(pair), 2 * dim if is_gaussian else dim), nn.Parameter(torch.randn(groups * each, dim))
    optimizer = torch.optim.Adam([*user.parameters(), item], lr=0.05)

    def scores() -> Tensor:
        item_CD = F.normalize(item, dim=1)
        if is_gaussian:
            return gaussian_user(user.weight, is_unit=True) @ gaussian_item(item_CD).T
        return F.normalize(user.weight, dim=1) @ item_CD.T

    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(scores()[kind] / 0.1, target).backward()
        optimizer.step()
    best = scores().topk(2 * each, dim=1).indices // each
    return float((best[:, :, None] == pair[:, None, :]).any(2).float().mean())


def test_a_variance_solves_a_world_of_opposites():
    """With a spread along a direction a user reaches to both ends of it, where a point lies in the middle."""
    point, gaussian = right_of_two(is_gaussian=False), right_of_two(is_gaussian=True)
    assert gaussian > point + 0.1, (gaussian, point)


# What cannot be


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"loss": {"interests": {"diversity": 1}}}, "loss.interests is set, but no user feature makes several"),
        ({"model": {"user_vector": "gaussian"}, **SEVERAL}, "is gaussian, but user feature 'history' makes several"),
        (
            {"model": {"user_vector": "gaussian", "user_tower": {"project": False, "combine": "sum"}}},
            "but model.user_tower has project: false",
        ),
        ({"model": {"user_vector": "gaussian"}, "loss": {"kind": "ccl"}}, "is gaussian, but loss.kind is ccl"),
        ({"index": {"factory": "LSH"}, **SEVERAL}, "'LSH' counts bits instead of scores.*4 vectors per user"),
        (
            {"index": {"factory": "L2norm,Flat"}, "model": {"similarity": "dot"}, **SEVERAL},
            "divides each vector's scores by its own length.*remove factory",
        ),
        ({"model": {"item_tower": {"missing_vectors": ["item_id"]}}}, "starts within.*set tables.item.init_scale: 0"),
        ({"model": {"item_tower": {"missing_vectors": ["itemid"]}}}, "names the feature 'itemid'.*item_id"),
        ({"model": {"user_tower": {"experts": {"count": 0, "width": 4}}}}, "experts.count' is 0: input should be gr"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(parts, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        steps_config(tmp_path, tmp_path, **parts)


def test_two_sequences_of_several_vectors_are_refused(tmp_path):
    config = steps_config(tmp_path, tmp_path, **SEVERAL)
    other = config.user[0].model_copy(update={"name": "other", "column": "history", "delta": False})
    with pytest.raises(ConfigError, match="features history, other each make several vectors"):
        Schema.build(config.tables, (*config.user, other), config.item)
