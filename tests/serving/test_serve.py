"""What one user gets, from which of the user's rows, and in which words."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from trec_twotower.errors import ConfigError, DataError
from trec_twotower.storage.arrow_values import format_item


@pytest.fixture
def retriever(shop):
    from trec_twotower.distributed.ranks import start_ranks
    from trec_twotower.serving.retriever import Retriever

    with start_ranks() as ranks:
        yield Retriever.open(shop.run, ranks)


def test_a_user_gets_the_best_unseen_items(retriever, shop_tables):
    test = {row["user_id"]: row for row in shop_tables["test"].to_pylist()}
    first, second = retriever.recommend(["user-1", "user-2"], k=34)
    for answer in (first, second):
        ids = [item.item_id for item in answer.items]
        row = test[answer.user_id]
        seen = [*row["history"], *row["positives"]]
        assert set(ids) == set(shop_tables["items"]["item_id"].to_pylist()) - set(seen)
        assert [about["item_id"] for about in answer.history] == seen[::-1][:5]
        scores = [item.score for item in answer.items]
        assert scores == sorted(scores, reverse=True) and np.isfinite(scores).all()
        assert all(item.about["item_id"] == item.item_id for item in answer.items)
    assert first.user_id == "user-1" and second.user_id == "user-2"


def test_an_answer_shows_the_newest_seen_items(retriever, shop_tables):
    row = next(row for row in shop_tables["test"].to_pylist() if row["user_id"] == "user-1")
    seen = [*row["history"], *row["positives"]]
    for shown in (0, 1, 2, 9):
        (answer,) = retriever.recommend(["user-1"], k=1, history_shown=shown)
        assert [about["item_id"] for about in answer.history] == seen[::-1][:shown]


def test_what_a_user_took_is_not_shown_where_the_catalogue_lacks_some_of_it(
    retriever, shop, shop_tables, write_dataset, tmp_path
):
    """The history of a user of test/, and of one who is given as a state, holds an item that was withdrawn."""
    from trec_twotower.config.loading import load_config
    from trec_twotower.data.dataset import Dataset
    from trec_twotower.data.loading.loader import FeatureDataset
    from trec_twotower.serving.retriever import Retriever

    test = shop_tables["test"]
    row = {**next(row for row in test.to_pylist() if row["user_id"] == "user-1")}
    row |= {"history": [*row["history"][:2], "withdrawn", "green-9"], "history_weight": [1.0, 2.0, 3.0, 4.0]}
    row |= {"positives": ["withdrawn"]}
    dataset = write_dataset(tmp_path / "shop", **{**shop_tables, "test": pa.Table.from_pylist([row], test.schema)})
    sources = FeatureDataset(Dataset(dataset), load_config(shop.config).feature_schema, "event")
    there = Retriever(replace(retriever.loaded, sources=sources), retriever.index, retriever.ranks)
    (stored,) = there.recommend(["user-1"], k=40)
    (given,) = there.recommend_now([{name: row[name] for name in ("user_id", "history", "history_weight")}], k=40)
    for answer in (stored, given):
        assert [about["item_id"] for about in answer.history] == ["green-9", *row["history"][1::-1]]
        assert len(answer.items) == 37 and not {item.item_id for item in answer.items} & set(row["history"])


def test_rules_look_on_until_they_have_found_as_many_as_were_asked_for():
    """The best 300 of 400 items are of one group, of which one item is shown; the others are in none."""
    from trec_twotower.config.evaluation import IndexConfig
    from trec_twotower.index import build_index
    from trec_twotower.ops.ragged import Ragged
    from trec_twotower.serving.business_rules import Rules
    from trec_twotower.serving.retriever import Retriever

    item_ID = np.stack([np.arange(400, 0, -1), np.ones(400)], 1).astype(np.float32)
    user_BD = np.array([[1.0, 0.0]], np.float32)
    found = Retriever(None, build_index(item_ID, user_BD, IndexConfig()), None)  # type: ignore[arg-type]
    rules = Rules(group_I=np.where(np.arange(400) < 300, 0, -1), max_per_group=1)
    seen = Ragged.from_lists([[0, 301]])
    score_BK, item_row_BK = found._ranked(user_BD, 5, seen, None, rules)
    assert item_row_BK.tolist() == [[1, 300, 302, 303, 304]] and score_BK.tolist() == [[399, 100, 98, 97, 96]]
    allowed = found.index.allow(np.arange(400) < 302)
    assert found._ranked(user_BD, 5, seen, allowed, rules)[1].tolist() == [[1, 300, -1, -1, -1]]
    # A boost lifts what is among the best 2 * tuned_k + 50, and nothing from behind them.
    nobody = Ragged.from_lists([[]])
    fetched = 2 * found.index.tuned_k(5) + 50
    for item, best in ((fetched - 1, [fetched - 1, 0, 1, 2, 3]), (fetched, [0, 1, 2, 3, 4])):
        boosted = Rules(boost_I=np.where(np.arange(400) == item, 1000.0, 0.0))
        assert found._ranked(user_BD, 5, nobody, None, boosted)[1].tolist() == [best]


def test_a_user_who_saw_nearly_all_gets_a_shorter_list(retriever):
    (answer,) = retriever.recommend(["user-1"], k=40)
    assert len(answer.items) == 34  # of 40, six of which were seen


def test_a_mapped_index_serves_the_same(retriever, shop, monkeypatch):
    """And is what `serve --mapped` takes, after a reload too."""
    from trec_twotower import cli
    from trec_twotower.index import ItemIndex
    from trec_twotower.serving import http_api as server
    from trec_twotower.serving.retriever import Retriever

    asked = []
    load = ItemIndex.load.__func__
    monkeypatch.setattr(
        ItemIndex, "load", classmethod(lambda *given, **more: asked.append(more["mapped"]) or load(*given, **more))
    )
    with_map = Retriever.alone(shop.run, mapped=True)
    assert with_map.recommend(["user-1", "user-2"], k=10) == retriever.recommend(["user-1", "user-2"], k=10)
    started = {}
    monkeypatch.setattr(server, "serve", lambda *given, **more: started.update(more))
    for flags, mapped in (((), False), (("--mapped",), True)):
        assert cli.main(["serve", str(shop.run), *flags]) == 0 and started["mapped"] is mapped
        service = server.Service(shop.run, mapped=mapped)
        service._mark = (0, 0)  # as if another had been published
        assert service.reload()
    assert asked == [True, False, False, True, True]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", ["Retriever", "Encoder"])
def test_a_forked_process_is_told_to_spawn(what, retriever, shop, shop_tables):
    """The threads of torch are not forked, so that its first answer would never come."""
    import multiprocessing

    from trec_twotower.inference.tower_encoder import Encoder

    encoder = Encoder.of(retriever.loaded.run, retriever.loaded.sources)
    fork = multiprocessing.get_context("fork")
    told = fork.SimpleQueue()

    def ask() -> None:
        calls = [lambda: encoder.encode("item", shop_tables["items"])]
        if what == "Retriever":
            calls = [
                lambda: retriever.recommend(["user-1"]),
                lambda: retriever.recommend_now([{"history": []}]),
                lambda: retriever.allow(only=["red-1"]),
            ]
        for call in calls:
            try:
                call()
            except ConfigError as error:
                told.put(str(error))

    child = fork.Process(target=ask)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    for _ in range(3 if what == "Retriever" else 1):
        said = told.get()
        assert f"This {what} was opened in process {os.getpid()} and is used in process {child.pid}" in said
        assert "start processes by spawn" in said


def test_what_cannot_be_answered_is_said(retriever):
    for k in (0, -1, 41):
        with pytest.raises(ConfigError, match=f"k is {k}, but the catalogue has 40 items"):
            retriever.recommend(["user-1"], k=k)
    for k in (2.5, "5", True, None):
        with pytest.raises(ConfigError, match=r"k is .*: give a whole number"):
            retriever.recommend(["user-1"], k=k)
    with pytest.raises(ConfigError, match="history_shown is -1: give 0 or more"):
        retriever.recommend(["user-1"], history_shown=-1)


@pytest.mark.parametrize(
    ("user_ids", "message"),
    [
        ("user-1", r"user_ids is the single value 'user-1': give a list, such as \['user-1'\]"),
        (b"user-1", "user_ids is the single value b'user-1'"),
        (7, "user_ids is 7: give a list"),
        (np.array(7), r"user_ids is array\(7\): give a list"),
        (None, "user_ids is None"),
        ({"user-1": 3}, "user_ids is {'user-1': 3}: give a list"),
    ],
)
def test_one_value_in_place_of_a_list_of_users_is_refused(retriever, user_ids, message):
    with pytest.raises(ConfigError, match=message):
        retriever.recommend(user_ids)


@pytest.mark.parametrize("filters", [{"only": "red-1"}, {"without": "red-1"}, {"where": {"colour": "red"}}])
def test_one_value_in_place_of_a_list_of_a_filter_is_refused(retriever, filters):
    with pytest.raises(ConfigError, match="is the single value 're"):
        retriever.allow(**filters)


@pytest.mark.parametrize("odd", ["nobody", "", "user-1 ", 7, 1.5, None, float("nan"), True, ("user-1",), "\ud800"])
def test_an_unknown_user_does_not_fail_the_others(retriever, odd):
    (expected,) = retriever.recommend(["user-1"], k=3)
    first, unknown, last = retriever.recommend(["user-1", odd, "user-1"], k=3)
    assert first == last == expected and expected.is_known
    assert not unknown.is_known and unknown.items == [] and unknown.history == [] and unknown.user_id is odd
    assert re.search("is in no part of|but ids are integers or strings", unknown.error)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"history": ["red-1"]}, "states is {'history': .*: give a list"),
        ("history", "states is the single value 'history'"),
        ([None], "state 0 is NoneType: give a dict"),
        ([{}, "history"], "state 1 is str: give a dict"),
        ([{3: "NO"}], "state 0 has a column 3, which no user feature reads"),
    ],
)
def test_what_is_no_list_of_states_is_refused(retriever, states, message):
    with pytest.raises(ConfigError, match=message):
        retriever.recommend_now(states)


def test_numbers_of_numpy_and_steps_are_accepted(retriever, shop):
    from trec_twotower.serving.retriever import Retriever

    expected = retriever.recommend(["user-1"], k=3)
    assert retriever.recommend(["user-1"], k=np.int64(3), history_shown=np.int32(5)) == expected
    assert Retriever.alone(shop.run, retriever.loaded.step).recommend(["user-1"], k=3) == expected
    with pytest.raises(ConfigError, match="where is 'red': give a dict"):
        retriever.allow(where="red")
    (unknown,) = retriever.recommend(["x" * 10_000])
    assert len(unknown.error) < 400


def test_users_may_be_given_in_any_collection(retriever):
    expected = retriever.recommend(["user-1", "user-2"], k=3)
    for users in (("user-1", "user-2"), np.array(["user-1", "user-2"]), pa.array(["user-1", "user-2"])):
        assert retriever.recommend(users, k=3) == expected
    assert retriever.recommend(iter(["user-1", "user-2"]), k=3) == expected
    assert retriever.recommend([], k=3) == []


def test_a_retriever_whose_ranks_have_ended_says_so(shop):
    from trec_twotower.distributed.ranks import start_ranks
    from trec_twotower.serving.retriever import Retriever

    with start_ranks() as ranks:
        retriever = Retriever.open(shop.run, ranks)
        expected = retriever.recommend(["user-1"], k=3)
        with pytest.raises(ConfigError, match="has a process group already"), start_ranks():
            pass
    with pytest.raises(ConfigError, match=r"has ended, .* Retriever\.alone\(RUN\)"):
        retriever.recommend(["user-1"], k=3)
    assert Retriever.alone(shop.run).recommend(["user-1"], k=3) == expected


def test_the_newest_row_of_a_user_counts(shop, shop_tables, write_dataset, tmp_path):
    """test/ before valid/ before train/, and there the last row."""
    from trec_twotower.config.loading import load_config
    from trec_twotower.data.dataset import Dataset
    from trec_twotower.data.loading.loader import FeatureDataset
    from trec_twotower.serving.user_state import find_user

    config = load_config(shop.config)
    dataset = write_dataset(tmp_path / "shop", row_group_size=50, **shop_tables)
    sources = FeatureDataset(Dataset(dataset), config.feature_schema, "event")
    for split, num_seen in (("test", 5), ("valid", 4), ("train", 3)):
        for user in ("user-0", "user-40", "user-79"):
            row, found_in = find_user(sources, user)
            assert found_in.name == split and row["user_id"].to_pylist() == [user]
            assert len(row["history"][0]) == num_seen
        shutil.rmtree(dataset / split)
    with pytest.raises(DataError, match="'user-0' is in no part"):
        find_user(sources, "user-0")


@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_user_of_other_parts_gets_no_item_that_was_taken(cli, shop, shop_tables, write_dataset, tmp_path, split):
    """The items that the rows of train/ and valid/ ask for are seen items, too."""
    rest = [name for name in ("train", "valid", "items", "users") if split == "valid" or name != "valid"]
    dataset = write_dataset(tmp_path / "shop", **{name: shop_tables[name] for name in rest}, test=nobody(shop_tables))
    run = tmp_path / "run"
    for call in (
        ("train", shop.config, f"data.dataset={dataset}", f"run_dir={run}", "train.epochs=1"),
        ("export", run),
        ("index", run),
        ("recommend", run, "--user", "user-3", "--k", 40),
    ):
        said = cli(*call)
        assert said.code == 0, said.err
    row = next(row for row in shop_tables["valid"].to_pylist() if row["user_id"] == "user-3")
    taken = row["history"] if split == "train" else [*row["history"], *row["positives"]]
    listed = re.findall(r"\[(\S+)\]$", said.out, flags=re.MULTILINE)
    assert set(listed) == set(shop_tables["items"]["item_id"].to_pylist()) - set(taken)
    shown = said.out.split("and is recommended:")[0].splitlines()[1:]
    assert [line.split(" (")[0].strip() for line in shown] == [
        f"A {item.replace('-', ' no. ')}" for item in reversed(taken)
    ]


def nobody(shop_tables: dict[str, pa.Table]) -> pa.Table:
    """A test/ of one user, whom the tests do not ask for."""
    return shop_tables["test"].slice(0, 1)


def test_a_split_without_a_column_of_the_towers_is_named(shop, shop_tables, write_dataset, tmp_path):
    from trec_twotower.config.loading import load_config
    from trec_twotower.data.dataset import Dataset
    from trec_twotower.data.loading.loader import FeatureDataset
    from trec_twotower.serving.user_state import find_user

    tables = {**shop_tables, "test": shop_tables["test"].drop_columns(["history_weight"])}
    dataset = write_dataset(tmp_path / "shop", **tables)
    sources = FeatureDataset(Dataset(dataset), load_config(shop.config).feature_schema, "event")
    with pytest.raises(ConfigError, match="test has no column 'history_weight'"):
        find_user(sources, "user-1")


@pytest.mark.parametrize(
    ("about", "line"),
    [
        ({"item_id": 7}, "item 7"),
        ({"item_id": 7, "title": None, "price": None, "tags": []}, "item 7"),
        (
            {"item_id": 7, "title": "A lamp", "price": 12.5, "tags": ["warm", "old"]},
            "A lamp (price 12.50, tags warm old)",
        ),
        ({"title": "A lamp", "item_id": "x", "stock": 0, "sold": True}, "A lamp (stock 0, sold True)"),
        ({"item_id": 7, "tags": list(range(9))}, "item 7 (tags 0 1 2 3 4 5 ...)"),
        ({"item_id": 7, "price": np.float32(0.1)}, "item 7 (price 0.10)"),
        ({"item_id": 7, "tags": ["warm", None, "old"], "sizes": [None]}, "item 7 (tags warm old)"),
        ({"item_id": 7, "vector": [0.5, -1.0], "maker": {"name": "x"}, "parts": [{"name": "y"}]}, "item 7"),
        ({"item_id": 7, "title": "\x1b[31mRed\x1b[0m\r\nlamp\x07 \u202eXYZ\u202c\x9b2J"}, "[31mRed[0m  lamp XYZ2J"),
        (
            {"item_id": "a\x1bb", "tags": ["x\ty", "\U0001f469\u200d\U0001f52c é"]},
            "item ab (tags x y \U0001f469\u200d\U0001f52c é)",
        ),
    ],
)
def test_items_are_formatted_on_one_line(about, line):
    assert format_item(about) == line


def test_recommendations_can_be_kept_to_a_part_of_the_catalogue(retriever, shop_tables):
    items = shop_tables["items"].to_pylist()
    column = next(name for name in items[0] if name != "item_id" and isinstance(items[0][name], str))
    value = items[0][column]
    (answer,) = retriever.recommend(["user-1"], k=40, allowed=retriever.allow(where={column: [value]}))
    (whole,) = retriever.recommend(["user-1"], k=40)
    assert [item.item_id for item in answer.items] == [
        item.item_id for item in whole.items if item.about[column] == value
    ]
    best = [item.item_id for item in whole.items]
    (others,) = retriever.recommend(["user-1"], k=40, allowed=retriever.allow(without=best[:3]))
    assert [item.item_id for item in others.items] == best[3:]
    (chosen,) = retriever.recommend(["user-1"], k=2, allowed=retriever.allow(only=best[5:7]))
    assert [item.item_id for item in chosen.items] == best[5:7]
    # All that is said at once holds at once.
    (whole,) = retriever.recommend(["user-1"], k=40)
    first, *expected = [
        item.item_id
        for item in whole.items[:25]
        if item.about["colour"] in ("red", "blue") and "t1" in (item.about["tags"] or [])
    ]
    kept = retriever.allow(
        where={"colour": ["red", "blue"], "tags": ["t1"]}, only=best[:25], without=[first, "nowhere"]
    )
    (answer,) = retriever.recommend(["user-1"], k=40, allowed=kept)
    assert expected and [item.item_id for item in answer.items] == expected
    with pytest.raises(ConfigError, match="has no column 'smell' to filter by"):
        retriever.allow(where={"smell": ["red"]})
    with pytest.raises(DataError, match="allows none of the 40 items"):
        retriever.allow(where={column: ["nothing like this"]})
