"""The synthetic dataset: its files, and the law that its events follow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.sources.test_sources import SMALL, digests, rows
from trec_twotower.config.loading import read_yaml
from trec_twotower.data.sources import prepare
from trec_twotower.data.sources.synthetic.interaction_model import (
    DAYPARTS,
    GLOBAL_SHARE,
    LEVEL_WEIGHT,
    MAIN_SHARE,
    OFF_PEAK,
    PEAK,
    SECOND_SHARE,
    SESSION_EVENTS,
    SESSION_SHARE,
    STYLE_WEIGHT,
    STYLES,
    Events,
    InteractionModel,
    Situation,
    Users,
)
from trec_twotower.data.sources.synthetic.options import Options
from trec_twotower.data.sources.synthetic.tables import Tables
from trec_twotower.data.sources.synthetic.words import BUDGETS, COUNTRIES, KINDS


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small") / "world"
    prepare("synthetic", out, SMALL)
    return out


@pytest.fixture(scope="module")
def default(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("default") / "world"
    return out, prepare("synthetic", out, {})


def slow_weights(model: InteractionModel, user: Users, row: int, event: Situation, place: int) -> np.ndarray:
    """The probability of every item as the module's docstring has it, item by item."""
    clusters = model.options.clusters
    part = event.daypart[place]
    law = np.zeros(clusters)
    for cluster in range(clusters):
        own = MAIN_SHARE * (cluster == user.main[row]) + SECOND_SHARE * (cluster == user.second[row])
        law[cluster] = (own + GLOBAL_SHARE * model.cluster_popularity[cluster]) * model.affinity[cluster, part]
    law /= law.sum()
    if not event.starts[place]:
        law *= 1 - SESSION_SHARE
        law[event.focus[place]] += SESSION_SHARE
    weight = np.zeros(model.options.items)
    position, count = model.tag_positions(np.arange(model.options.items))
    for item in range(model.options.items):
        rank = item - model.cluster_starts[model.cluster_of[item]] + 1
        matching = sum(tag % STYLES == user.style[row] for tag in position[item, : count[item]])
        weight[item] = LEVEL_WEIGHT[abs(model.item_level[item] - user.level[row])] * STYLE_WEIGHT**matching / rank
        if model.is_new[item] and not event.has_new[place]:
            weight[item] = 0
    for cluster in range(clusters):
        mine = model.cluster_of == cluster
        weight[mine] *= law[cluster] / weight[mine].sum()
    return weight


def items_of(events: Events, row: int) -> np.ndarray:
    return events.item[events.offsets[row] : events.offsets[row + 1]]


# The files


def test_synthetic_columns_have_the_promised_types(default):
    columns = default[1]["columns"]
    ids = "list<element: int64>"
    assert columns["train"] == {
        "user_id": "int64",
        "item_id": "int64",
        "timestamp": "int64",
        "device": "string",
        "session": ids,
        "history": ids,
    }
    for split in ("valid", "test"):
        assert {name: columns[split][name] for name in ("user_id", "positives", "history")} == {
            "user_id": "int64",
            "positives": ids,
            "history": ids,
        }
    assert columns["items"] == {
        "item_id": "int64",
        "title": "string",
        "category": "string",
        "tags": "list<element: string>",
        "price": "float",
        "rating": "float",
    }
    assert columns["users"] == {"user_id": "int64", "country": "string", "age": "float", "budget": "string"}


def test_synthetic_history_is_what_came_before(small):
    """Rebuilt event by event from the train rows, with sets and lists."""
    taken: dict[int, list[int]] = {}
    latest: dict[int, int] = {}
    for row in rows(small, "train"):
        earlier = taken.setdefault(row["user_id"], [])
        assert row["history"] == earlier[-50:]
        assert row["session"] == row["history"][len(row["history"]) - len(row["session"]) :]
        assert row["timestamp"] > latest.get(row["user_id"], 0)
        latest[row["user_id"]] = row["timestamp"]
        earlier.append(row["item_id"])
    for split in ("valid", "test"):
        evaluated = rows(small, split)
        assert len(evaluated) == len({row["user_id"] for row in evaluated}) == len(taken)
        for row in evaluated:
            assert row["history"] == taken[row["user_id"]]
            assert row["timestamp"] > latest[row["user_id"]]
            (positive,) = row["positives"]
            taken[row["user_id"]].append(positive)
            latest[row["user_id"]] = row["timestamp"]
    for items in taken.values():
        assert len(items) == len(set(items)) >= 3
    counts = read_yaml(small / "dataset.yaml")["counts"]
    assert counts["interactions"] == sum(map(len, taken.values()))
    assert counts["users"] == len(taken) == SMALL["users"]


def test_max_and_min_history_are_kept(tmp_path, small):
    prepare("synthetic", tmp_path / "short", SMALL | {"max_history": 3, "min_history": 2})
    full = [row for row in rows(small, "train") if len(row["history"]) >= 2]
    short = rows(tmp_path / "short", "train")
    assert [row["history"] for row in short] == [row["history"][-3:] for row in full]
    assert rows(tmp_path / "short", "test") == rows(small, "test")


def test_catalogue_and_users_are_unique_sparse_and_partly_unknown(default):
    out, manifest = default
    items, users = pq.read_table(out / "items"), pq.read_table(out / "users")
    for table, key, number in ((items, "item_id", 5_000), (users, "user_id", 20_000)):
        ids = table[key].to_numpy()
        assert len(np.unique(ids)) == len(ids) == number == manifest["counts"][f"{key.split('_')[0]}s"]
        assert ids.min() >= 0
        assert ids.max() > 2**62
        assert np.bincount(ids % 16).min() > 0.8 * number / 16
    train = pq.read_table(out / "train")
    assert set(train["item_id"].to_pylist()) <= set(items["item_id"].to_pylist())
    assert set(train["user_id"].to_pylist()) <= set(users["user_id"].to_pylist())
    tags = items["tags"].to_pylist()
    assert {len(words) for words in tags} == {0, 2, 3, 4}
    assert all(len(words) == len(set(words)) for words in tags)
    assert 0 < items["price"].null_count < 0.06 * 5_000
    assert items["price"].drop_null().to_numpy().min() > 0
    assert 0 < users["age"].null_count < 0.1 * 20_000
    assert 0 < users["country"].null_count < 0.06 * 20_000
    assert set(users["country"].drop_null().to_pylist()) == set(COUNTRIES[:12])
    assert "NO" in COUNTRIES[:2]
    assert len(set(items["category"].to_pylist())) == 50
    assert items["title"].to_pylist()[7].endswith(" 0007")


def test_categories_are_readable_and_go_on_beyond_the_words(tmp_path):
    assert len(KINDS) == len({category for category, _, _ in KINDS}) >= 60
    prepare("synthetic", tmp_path / "many", {"users": 10, "items": 200, "clusters": 130})
    categories = set(pq.read_table(tmp_path / "many" / "items")["category"].to_pylist())
    assert len(categories) == 130
    assert {"Lamps", "Running shoes", "Lamps 2", "Lamps 3"} <= categories


def test_features_tell_of_the_preferences(default):
    """Age and country vary between main clusters far beyond chance; budget and price show the price levels."""
    model = InteractionModel(Options())
    tables = Tables(model)
    number = np.arange(20_000)
    users = model.users(number)
    table = tables.users(number)
    age = table["age"].to_numpy()
    groups = [age[(users.main == cluster) & ~np.isnan(age)] for cluster in range(50)]
    between = sum(len(group) * (group.mean() - np.nanmean(age)) ** 2 for group in groups) / 49
    within = sum(((group - group.mean()) ** 2).sum() for group in groups) / (len(age) - 50)
    assert between / within > 100
    country = table["country"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    seen = np.histogram2d(users.main, np.nan_to_num(country, nan=12), bins=(50, 13))[0]
    expected = seen.sum(1, keepdims=True) * seen.sum(0) / seen.sum()
    assert ((seen - expected) ** 2 / expected).sum() > 10 * 49 * 12

    budget = table["budget"].to_pylist()
    is_true = [word == BUDGETS[level] for word, level in zip(budget, users.level, strict=True) if word is not None]
    assert 0.92 < np.mean(is_true) < 0.95  # 90 % state their own, the others any of three
    items = pq.read_table(default[0] / "items")
    number_of = {item_id: item for item, item_id in enumerate(tables.item_id.tolist())}
    item = np.array([number_of[item_id] for item_id in items["item_id"].to_pylist()])
    price, level = items["price"].to_numpy(), model.item_level[item]
    known = ~np.isnan(price)
    assert np.corrcoef(np.log(price[known]), level[known])[0, 1] > 0.95
    rank = item - model.cluster_starts[model.cluster_of[item]]
    assert np.corrcoef(items["rating"].to_numpy(), np.log(rank + 1.0))[0, 1] < -0.95


def test_sessions_share_a_day_and_a_part_of_it(small):
    """The rows of a session are minutes apart, in the daypart of its first; sessions are on different days."""
    model = InteractionModel(Options(**SMALL))
    number = np.arange(300)
    events = model.events(number)
    table = Tables(model).interactions(events)["train"]
    time, session = table["timestamp"].to_numpy(), table["session"].to_pylist()
    user = table["user_id"].to_pylist()
    begin = None
    for row, items in enumerate(session):
        if row and user[row] != user[row - 1]:
            begin = None
        if not items:
            assert begin is None or time[row] // 86_400 > begin // 86_400
            begin = time[row]
        else:
            assert 0 < time[row] - time[row - 1] <= 180
            assert time[row] // 21_600 == begin // 21_600
    parts = events.situation.daypart[events.is_train]
    np.testing.assert_array_equal(time // 21_600 % DAYPARTS, parts)


def test_the_same_seed_gives_the_same_bytes_in_pieces_of_any_size(tmp_path, small):
    assert prepare("synthetic", tmp_path / "again", SMALL)["files"] == read_yaml(small / "dataset.yaml")["files"]
    for rows_per_piece in (1, 997):
        users = 100 if rows_per_piece == 1 else SMALL["users"]
        options = SMALL | {"users": users}
        first, second = tmp_path / f"a{rows_per_piece}", tmp_path / f"b{rows_per_piece}"
        prepare("synthetic", first, options)
        prepare("synthetic", second, options | {"rows_per_piece": rows_per_piece})
        assert digests(first) == digests(second)


def test_another_seed_gives_another_world(tmp_path, small):
    prepare("synthetic", tmp_path / "other", SMALL | {"seed": 1})
    before, after = digests(small), digests(tmp_path / "other")
    assert before.keys() == after.keys()
    assert all(before[name] != after[name] for name in before)


def test_more_users_leave_the_first_ones_as_they_were(tmp_path, small):
    prepare("synthetic", tmp_path / "fewer", SMALL | {"users": 200})
    fewer = rows(tmp_path / "fewer", "train")
    assert fewer == rows(small, "train")[: len(fewer)]


def test_rows_sets_the_number_of_train_rows(tmp_path):
    counts = prepare("synthetic", tmp_path / "rows", {"rows": 20_000})["counts"]
    deviation = np.sqrt(2 * 4.5 * 5.5 * counts["users"])  # two geometric numbers of mean 4.5 a user
    assert abs(counts["train_rows"] - 20_000) < 4 * deviation


def test_a_world_with_hardly_any_items_is_used_up_without_harm(tmp_path):
    manifest = prepare("synthetic", tmp_path / "tiny", {"users": 300, "items": 12, "clusters": 2, "events_per_user": 3})
    assert manifest["counts"]["test_rows"] == 300
    assert manifest["best_reachable"]["recall@100"] == 1
    assert manifest["best_reachable"]["expected_recall@100"] == pytest.approx(1)


# The law


def test_the_law_is_that_of_the_docstring():
    model = InteractionModel(Options(**SMALL))
    events = model.events(np.arange(40))
    last = events.offsets[1:] - 1
    users, situation = model.users(events.user), events.situation.take(last)
    found = model.probabilities(users, situation)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    for row in range(40):
        np.testing.assert_allclose(found[row], slow_weights(model, users, row, situation, row), rtol=1e-9)


def test_every_user_takes_as_many_items_as_drawn_for_them():
    """Also those whose first draws repeat themselves so often that more are needed."""
    model = InteractionModel(Options(**SMALL))
    user = np.arange(3_000)
    np.testing.assert_array_equal(np.diff(model.events(user).offsets), model.num_events(user))


def test_preferences_follow_their_shares():
    """Chi-square of main clusters, and of second ones, drawn from the others in proportion; levels and styles."""
    model = InteractionModel(Options(clusters=6))
    users = model.users(np.arange(60_000))
    popularity = model.cluster_popularity
    seen = np.histogram2d(users.main, users.second, bins=(range(7), range(7)))[0]
    expected = 60_000 * popularity[:, None] * popularity[None, :] / (1 - popularity[:, None])
    np.fill_diagonal(expected, 0)
    assert (seen.diagonal() == 0).all()
    others = ~np.eye(6, dtype=bool)
    chi_square = ((seen - expected)[others] ** 2 / expected[others]).sum()
    assert chi_square < 29 + 5 * np.sqrt(2 * 29)
    both = np.bincount(users.level * STYLES + users.style, minlength=9)
    assert ((both - 60_000 / 9) ** 2 / (60_000 / 9)).sum() < 8 + 5 * np.sqrt(2 * 8)


def test_sessions_and_dayparts_follow_their_shares():
    model = InteractionModel(Options(**SMALL))
    events = model.events(np.arange(3_000))
    starts = events.situation.starts
    is_first = np.zeros(len(starts), bool)
    is_first[events.offsets[:-1]] = True
    assert starts[is_first].all()
    later = starts[~is_first]
    assert abs(later.mean() - 1 / SESSION_EVENTS) < 5 * np.sqrt(0.25 / len(later))
    cluster = model.cluster_of[events.item]
    begin = np.maximum.accumulate(np.where(starts, np.arange(len(starts)), 0))
    inside = np.flatnonzero(~starts)
    np.testing.assert_array_equal(events.situation.focus[inside], cluster[begin[inside]])
    np.testing.assert_array_equal(events.situation.daypart[inside], events.situation.daypart[begin[inside]])
    stays = (cluster[inside] == events.situation.focus[inside]).mean()
    assert SESSION_SHARE < stays < SESSION_SHARE + (1 - SESSION_SHARE) * 0.6
    # Clusters of first events by daypart; nothing is taken before them.
    first = events.offsets[:-1]
    law = model.cluster_law(model.users(events.user), events.situation.take(first))
    clusters = model.options.clusters
    seen, expected = np.zeros((DAYPARTS, clusters)), np.zeros((DAYPARTS, clusters))
    np.add.at(seen, (events.situation.daypart[first], cluster[first]), 1)
    np.add.at(expected, events.situation.daypart[first], law)
    degrees = DAYPARTS * (clusters - 1)
    assert abs(((seen - expected) ** 2 / expected).sum() - degrees) < 5 * np.sqrt(2 * degrees)
    peak = model.affinity == PEAK
    assert (peak.sum(axis=1) == 1).all() and (model.affinity[~peak] == OFF_PEAK).all()
    assert seen.T[peak].sum() / len(first) > 1.5 / DAYPARTS


def test_the_next_item_follows_the_law_restricted_to_what_was_not_taken():
    """The probability, summed below the item drawn, is uniform in [0, 1) if the law holds: last and middle events."""
    model = InteractionModel(Options(**SMALL))
    events = model.events(np.arange(3_000))
    users = model.users(events.user)
    for back in (1, 3):
        kept = np.flatnonzero(np.diff(events.offsets) > back)
        at = events.offsets[1:][kept] - back
        chance = model.probabilities(users.take(kept), events.situation.take(at))
        below = []
        for place, row in enumerate(kept):
            own = chance[place]
            items = items_of(events, row)[: 1 - back or None]
            own[items[:-1]] = 0
            running = np.cumsum(own) / own.sum()
            below.append(running[items[-1]] - own[items[-1]] / own.sum() / 2)
        counts = np.histogram(below, bins=10, range=(0, 1))[0]
        expected = len(kept) / 10
        # Steps blur the bins a little, so the bound is wider than for nine degrees of freedom.
        assert ((counts - expected) ** 2 / expected).sum() < 40


def test_new_items_are_in_the_held_out_events_only(default):
    out, manifest = default
    model = InteractionModel(Options())
    new = set(Tables(model).item_id[model.is_new].tolist())
    assert 0.03 < len(new) / 5_000 < 0.07
    assert not new & set(pq.read_table(out / "train")["item_id"].to_pylist())
    for split in ("valid", "test"):
        positives = [row["positives"][0] in new for row in rows(out, split)]
        assert 0.03 < np.mean(positives) < 0.07
    assert "recall@10 of cold" in manifest["best_reachable"]
    none = model.events(np.arange(50)).item
    assert none.size and not InteractionModel(Options(new_items=0)).is_new.any()


def test_events_per_user_has_the_stated_mean():
    number = InteractionModel(Options()).num_events(np.arange(100_000))
    assert number.min() == 3
    assert abs(number.mean() - 12) < 5 * number.std() / np.sqrt(100_000)


# The best ranking


def test_best_reachable_is_what_ranking_everything_by_the_law_gives(small):
    """From the files and the dense matrix of probabilities; popularity likewise."""
    manifest = read_yaml(small / "dataset.yaml")
    model = InteractionModel(Options(**SMALL))
    tables = Tables(model)
    item_of = {item_id: item for item, item_id in enumerate(tables.item_id.tolist())}
    test = {row["user_id"]: row for row in rows(small, "test")}
    train_items, train_counts = np.unique(pq.read_table(small / "train")["item_id"], return_counts=True)
    count = np.zeros(400)
    count[[item_of[item_id] for item_id in train_items.tolist()]] = train_counts
    known = np.argsort(-count, kind="stable")[: int((count > 0).sum())].tolist()
    head = set(known[: int(np.ceil(len(known) / 5))])
    number = np.arange(3_000)
    events = model.events(number)
    last = events.offsets[1:] - 1
    users, situation = model.users(number), events.situation.take(last)
    probabilities = model.probabilities(users, situation)
    ranks: dict[str, list[int]] = {"best_reachable": [], "popularity": []}
    expected, parts = [], []
    for row, user_id in enumerate(tables.user_id(number).tolist()):
        history = [item_of[item_id] for item_id in test[user_id]["history"]]
        target = item_of[test[user_id]["positives"][0]]
        chance = probabilities[row]
        chance[history] = 0
        expected.append(np.sort(chance)[::-1][:10].sum() / chance.sum())
        by_count = count - tables.item_id / 2**64  # fewer than one train row apart: the smaller id first
        by_count[history] = -1
        ranks["best_reachable"].append((chance > chance[target]).sum())
        ranks["popularity"].append((by_count > by_count[target]).sum())
        parts.append("cold" if not count[target] else "head" if target in head else "tail")
    for name, rank in ranks.items():
        told = manifest[name]
        assert (told["split"], told["users_sampled"]) == ("test", 3_000)
        for k in (10, 20, 50, 100):
            assert told[f"recall@{k}"] == pytest.approx(np.mean([r < k for r in rank]), abs=1e-6)
        for k in (10, 20):
            gains = [1 / np.log2(r + 2) if r < k else 0 for r in rank]
            assert told[f"ndcg@{k}"] == pytest.approx(np.mean(gains), abs=1e-6)
    best = manifest["best_reachable"]
    assert best["expected_recall@10"] == pytest.approx(np.mean(expected), abs=1e-6)
    for part in ("cold", "tail", "head"):
        mine = [r < 10 for r, each in zip(ranks["best_reachable"], parts, strict=True) if each == part]
        assert best[f"recall@10 of {part}"] == pytest.approx(np.mean(mine), abs=1e-6)


def test_best_recall_is_realised_as_expected_and_far_above_popularity(default):
    best, popular = default[1]["best_reachable"], default[1]["popularity"]
    for k in (10, 20, 50, 100):
        chance = best[f"expected_recall@{k}"]
        assert abs(best[f"recall@{k}"] - chance) < 4 * np.sqrt(chance * (1 - chance) / best["users_sampled"])
        assert best[f"recall@{k}"] > popular[f"recall@{k}"]
    assert 0.4 < best["recall@10"] < 0.5
    assert 0 < popular["recall@10"] < best["recall@10"] / 8


def test_history_session_and_context_suffice_to_come_near_the_best():
    """Clusters from the shares of the history, level and style by Bayes's rule: .85 of the best, and far less without
    the session and the hour."""
    model = InteractionModel(Options())
    events = model.events(np.arange(2_000))
    last = events.offsets[1:] - 1
    users, situation, target = model.users(events.user), events.situation.take(last), events.item[last]
    laws = np.stack([model.share_in_cluster(level, style, True) for level in range(3) for style in range(STYLES)])
    hits = {"all": 0, "without context": 0, "best": 0}
    best = model.probabilities(users, situation)
    for row in range(len(users.number)):
        history = items_of(events, row)[:-1]
        share = np.bincount(model.cluster_of[history], minlength=50) / len(history)
        plain = (1 - GLOBAL_SHARE) * share + GLOBAL_SHARE * model.cluster_popularity
        law = plain * model.affinity[:, situation.daypart[row]]
        law /= law.sum()
        if not situation.starts[row]:
            law *= 1 - SESSION_SHARE
            law[situation.focus[row]] += SESSION_SHARE
        likelihood = np.log(np.maximum(laws[:, history], 1e-300)).sum(axis=1)
        posterior = np.exp(likelihood - likelihood.max())
        taste = posterior @ laws / posterior.sum()
        scores = {"all": law[model.cluster_of] * taste, "without context": plain[model.cluster_of] * taste}
        for name, score in (scores | {"best": best[row]}).items():
            score[history] = 0
            hits[name] += int((score > score[target[row]]).sum() < 10)
    assert hits["all"] > 0.85 * hits["best"]
    assert hits["without context"] < 0.75 * hits["best"]


@pytest.mark.soak
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Peak resident memory of two processes, one making ten times the rows of the other."""
    script = (
        "import sys, resource; from pathlib import Path; from trec_twotower.data.sources import prepare; "
        "prepare('synthetic', Path(sys.argv[1]), {'rows': int(sys.argv[2])}); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"  # KiB on Linux
    )
    peak_kb = []
    for num_rows in (200_000, 2_000_000):
        command = [sys.executable, "-c", script, str(tmp_path / str(num_rows)), str(num_rows)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak_kb.append(int(done.stdout))
    written_kb = sum(path.stat().st_size for path in (tmp_path / "2000000").rglob("*.parquet")) / 1024
    assert peak_kb[1] - peak_kb[0] < 150_000
    assert written_kb > 40_000
