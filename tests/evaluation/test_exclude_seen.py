"""evaluate.exclude_seen: which items rankings leave out, in validation, evaluation, recommendations and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.shop import SHOP_CONFIG, Shop
from trec_twotower.config.evaluation import EvaluateConfig
from trec_twotower.data.features.columns import Columns
from trec_twotower.data.held_out import HeldOut
from trec_twotower.evaluation.baselines import ItemToItem, SpectralTowers
from trec_twotower.evaluation.sampled_metrics import Negatives, sampled_metrics
from trec_twotower.ops.ragged import Ragged
from trec_twotower.serving.retriever import Retriever
from trec_twotower.training.spectral_initialization import Interactions

SETTINGS = (True, False, "except_target")


@pytest.fixture(scope="module")
def repeats(tmp_path_factory, write_dataset, shop_tables, cli) -> Shop:
    """The shop, where a third of the held-out rows ask for a seen item alone, and a third for a seen and a new one."""
    tables = dict(shop_tables)
    for part in ("valid", "test"):
        table = tables[part]
        changed = []
        for number, row in enumerate(table.to_pylist()):
            old = row["history"][number % len(row["history"])]
            changed.append([[old], [old, *row["positives"]], row["positives"]][number % 3])
        place = table.column_names.index("positives")
        tables[part] = table.set_column(place, "positives", pa.array(changed, pa.list_(pa.string())))
    folder = tmp_path_factory.mktemp("repeats")
    shop = Shop(write_dataset(folder / "shop", **tables), folder / "shop.yaml", folder / "run")
    shop.config.write_text(SHOP_CONFIG.replace("dataset: shop", f"dataset: {shop.dataset}"))
    for command in (("train", shop.config, f"run_dir={shop.run}"), ("export", shop.run), ("index", shop.run)):
        said = cli(*command)
        assert said.code == 0, said.err
    return shop


@pytest.fixture
def repeats_copy(repeats, tmp_path) -> Shop:
    import shutil

    return replace(repeats, run=shutil.copytree(repeats.run, tmp_path / "run"))


def excluded_by(setting: Any, row: dict[str, Any]) -> set[str]:
    if setting is False:
        return set()
    return set(row["history"]) - (set(row["positives"]) if setting == "except_target" else set())


def evaluated(cli, shop: Shop, setting: Any, *flags: object) -> tuple[dict[str, Any], str]:
    said = cli("train", shop.config, f"run_dir={shop.run}", f"evaluate.exclude_seen={str(setting).lower()}")
    assert said.code == 0, said.err
    said = cli("evaluate", shop.run, *flags)
    assert said.code == 0, said.err
    return json.loads((shop.run / "evaluation.json").read_text()), said.out


@pytest.mark.parametrize("setting", SETTINGS)
def test_rankings_leave_out_what_the_setting_says(cli, repeats_copy, tmp_path, setting):
    """Every ranking and recall, from the exported vectors, one user at a time."""
    rankings = tmp_path / "rankings.parquet"
    result, said = evaluated(cli, repeats_copy, setting, "--index", "--rankings", rankings)
    export = repeats_copy.run / "export"
    items, users = (
        pa.concat_tables(pq.read_table(path) for path in sorted(export.glob(f"{side}-*.parquet"))).to_pylist()
        for side in ("items", "users")
    )
    item_ID = np.array([item["vector"] for item in items])
    user_of = {user["user_id"]: np.array(user["vector"]) for user in users}
    ranked = {row["user_id"]: row["item_ids"] for row in pq.read_table(rankings).to_pylist()}
    test = pq.read_table(repeats_copy.dataset / "test").to_pylist()
    recalls, ceilings, num_unfindable = [], [], 0
    for row in test:
        out = excluded_by(setting, row)
        score = {item["item_id"]: s for item, s in zip(items, item_ID @ user_of[row["user_id"]], strict=True)}
        wanted = sorted((item for item in score if item not in out), key=lambda item: -score[item])[:10]
        assert [score[item] for item in ranked[row["user_id"]]] == pytest.approx([score[item] for item in wanted])
        assert not set(ranked[row["user_id"]]) & out
        recalls.append(len(set(ranked[row["user_id"]][:5]) & set(row["positives"])) / len(row["positives"]))
        findable = set(row["positives"]) - out
        ceilings.append(min(len(findable), 5) / len(row["positives"]))
        num_unfindable += not findable
    metrics = result["metrics"]
    assert metrics["two towers, exact search"]["recall@5"] == pytest.approx(np.mean(recalls))
    assert metrics["two towers, through the index"]["recall@5"] == pytest.approx(np.mean(recalls))
    assert result["exclude_seen"] == setting
    assert result["unfindable_users"] == num_unfindable == (27 if setting is True else 0)
    assert result["highest_recall"]["recall@5"] == pytest.approx(np.mean(ceilings))
    assert all(values["recall@5"] <= np.mean(ceilings) + 1e-9 for values in metrics.values())
    assert f"users that no model can hit: {num_unfindable}" in said and f"@5 {np.mean(ceilings):.4f}" in said
    assert {True: "seen items excluded\n", False: "seen items included", "except_target": "excluded except targets"}[
        setting
    ] in said


@pytest.mark.parametrize("setting", SETTINGS)
def test_validation_while_training_is_that_of_evaluate(cli, repeats, tmp_path, setting):
    run = tmp_path / "run"
    said = cli(
        "train", repeats.config, f"run_dir={run}", f"evaluate.exclude_seen={str(setting).lower()}", "train.epochs=1"
    )
    assert said.code == 0, said.err
    assert cli("evaluate", run, "--split", "valid").code == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [measured] = [line for line in lines if line["kind"] == "valid"]
    metrics = json.loads((run / "evaluation.json").read_text())["metrics"]["two towers, exact search"]
    assert metrics == pytest.approx({name: measured[name] for name in metrics})


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_report_shows_users_what_the_setting_lets_them_get(cli, repeats_copy, setting):
    """No card lists an excluded item, and some list a seen one where the setting lets it in."""
    evaluated(cli, repeats_copy, setting)
    assert cli("report", repeats_copy.run).code == 0
    page = (repeats_copy.run / "report.html").read_text()
    cards = page.split('<div class="users">')[1].split("<h3>User ")[1:]
    test = {row["user_id"]: row for row in pq.read_table(repeats_copy.dataset / "test").to_pylist()}
    titles = {row["item_id"]: row["title"] for row in pq.read_table(repeats_copy.dataset / "items").to_pylist()}
    num_seen = 0
    for card in cards:
        row = test[card.split("</h3>")[0]]
        listed = card.split("Recommendations")[1]
        allowed = set(row["history"]) - excluded_by(setting, row)
        shown = {item for item in row["history"] if titles[item] + " " in listed}
        assert shown <= allowed
        num_seen += len(shown)
    assert cards and (num_seen > 0) == (setting is not True)


def test_two_ranks_count_the_same_unfindable_users(cli, on_forked_ranks, repeats_copy):
    alone, _ = evaluated(cli, repeats_copy, True, "--sampled", "5")
    said = on_forked_ranks("evaluate", repeats_copy.run, "--sampled", "5", timeout_s=120)
    assert said.code == 0, said.err
    together = json.loads((repeats_copy.run / "evaluation.json").read_text())
    assert [together[name] for name in ("users", "unfindable_users")] == [80, 27]
    assert together["highest_recall"] == pytest.approx(alone["highest_recall"])
    for kind, contenders in alone["sampled"].items():
        for name, metrics in contenders.items():
            # Other blocks of users round otherwise, which may part two equal scores.
            assert together["sampled"][kind][name] == pytest.approx(metrics, abs=0.02)


def test_a_best_step_is_not_compared_with_one_that_was_measured_otherwise(cli, repeats, tmp_path):
    """The first step measured under another setting is the best so far, whatever was measured before."""
    run = tmp_path / "run"
    overrides = (f"run_dir={run}", "train.epochs=1")
    assert cli("train", repeats.config, *overrides, "evaluate.exclude_seen=except_target").code == 0
    said = cli("train", repeats.config, f"run_dir={run}", "train.epochs=2", "evaluate.exclude_seen=false")
    assert said.code == 0 and "(best so far)" in said.out.split("resumed at step")[1], said.out
    best = json.loads((run / "status.json").read_text())["best"]
    assert best["step"] == 10 and best["metric"] == "recall@5, exclude_seen false"


def test_recommendations_follow_the_setting(cli, repeats_copy):
    """There is nothing to find, so except_target leaves out all that was seen, as true does."""
    test = {row["user_id"]: row for row in pq.read_table(repeats_copy.dataset / "test").to_pylist()}
    lists = {}
    for setting in SETTINGS:
        said = cli(
            "train", repeats_copy.config, f"run_dir={repeats_copy.run}", f"evaluate.exclude_seen={str(setting).lower()}"
        )
        assert said.code == 0, said.err
        retriever = Retriever.alone(repeats_copy.run)
        answers = retriever.recommend(list(test), 30)
        lists[setting] = {answer.user_id: [item.item_id for item in answer.items] for answer in answers}
        [now] = retriever.recommend_now([{"history": ["red-1", "red-2"], "history_weight": [1.0, 1.0]}], 40)
        assert (
            {"red-1", "red-2"} <= {item.item_id for item in now.items}
            if setting is False
            else (not {"red-1", "red-2"} & {item.item_id for item in now.items})
        )
    assert lists[True] == lists["except_target"]
    for user, row in test.items():
        assert not set(lists[True][user]) & set(row["history"])
        assert set(lists[False][user]) & set(row["history"])


def held_out(positives: list[list[int]], seen: list[list[int]]) -> HeldOut:
    user_ids = pa.array(range(len(seen)))
    return HeldOut(user_ids, Columns({}, {}, {}), Ragged.from_lists(positives), Ragged.from_lists(seen))


def test_the_excluded_items_by_hand():
    rows = held_out([[1, 2], [3], [4], [5]], [[2, 7, 2], [3, 3], [], [1, 6]])
    assert rows.excluded(True) is rows.seen
    assert rows.excluded(False).values.size == 0 and len(rows.excluded(False)) == 4
    kept = rows.excluded("except_target")
    assert [kept.slice(row, row + 1).values.tolist() for row in range(4)] == [[7], [], [], [1, 6]]


def test_a_value_is_looked_for_on_its_own_row_alone(rng):
    lists = [[rng.integers(-1, 6, size=rng.integers(0, 5)).tolist() for _ in range(40)] for _ in range(2)]
    one, other = map(Ragged.from_lists, lists)
    expected = [value >= 0 and value in mine for mine, others in zip(*lists, strict=True) for value in others]
    assert one.hold(other).tolist() == expected
    assert Ragged.empty(3).hold(Ragged.from_lists([[1], [], [2]])).tolist() == [False, False]


def test_baselines_use_the_history_and_leave_out_what_is_excluded(lone_rank, rng):
    """Item to item and SVD towers, with scores of the history and every kind of exclusion, against plain loops."""
    user_P, item_P = np.nonzero(rng.random((40, 12)) < 0.3)
    count = np.bincount(item_P, minlength=12)
    pairs = Interactions(user_P, item_P, 40, 12)
    history = [[1, 4, 7], [2], [], [5, 9]]
    for excluded in ([[], [], [], []], [[4], [3], [1], [9, 0]], history):
        given = Ragged.from_lists(history), 12, Ragged.from_lists(excluded)
        svd = SpectralTowers.of(pairs, 99, count, lone_rank)
        ranked = svd.rankings(*given)
        for row, seen, out in zip(ranked.tolist(), history, excluded, strict=True):
            score = svd.history_ID[seen].sum(axis=0) @ svd.item_ID.T if seen else count
            assert row[: 12 - len(out)] == [item for item in np.argsort(-score, kind="stable") if item not in out]
            assert row[12 - len(out) :] == [-1] * len(out)
        neighbours = ItemToItem.of(pairs, count, lone_rank)
        takers = [set(user_P[item_P == item].tolist()) for item in range(12)]
        for row, seen, out in zip(neighbours.rankings(*given).tolist(), history, excluded, strict=True):
            score = [
                sum(len(takers[i] & takers[j]) / np.sqrt(len(takers[i]) * len(takers[j])) for i in seen if i != j)
                for j in range(12)
            ]
            found = [item for item in row if item >= 0]
            assert sorted(found) == [item for item in range(12) if item not in out]
            liked = [score[item] for item in found]
            assert liked == pytest.approx(sorted(liked, reverse=True), abs=1e-5)


def test_a_positive_that_is_excluded_is_never_hit_among_drawn_negatives():
    item_ID = np.array([[9.0], [1.0], [1.0], [1.0]])
    negatives, user_BD = Negatives.uniform(4, 3), np.ones((2, 1))
    positives = Ragged.from_lists([[0], [0, 1]])
    places = negatives.ranks(item_ID, user_BD, positives, Ragged.from_lists([[0], []]), 0)
    assert places[0] == np.inf and places[1] == 1
    metrics = sampled_metrics(places, positives, [2])
    assert metrics["hit@2"][0] == metrics["ndcg@2"][0] == metrics["mrr"][0] == 0
    assert metrics["mrr"][1] > 0.5


@pytest.mark.parametrize("wrong", ["except_targets", 3, None, "all"])
def test_other_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="exclude_seen"):
        EvaluateConfig.model_validate({"exclude_seen": wrong})
