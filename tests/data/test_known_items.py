"""A run remembers the items that it began with, and later stages find items by their ids."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.shop import Call, Shop
from trec_twotower.config.features import build_feature
from trec_twotower.data.features.statistics import Statistics
from trec_twotower.data.item_table import Catalogue
from trec_twotower.data.known_items import KnownItems
from trec_twotower.data.split import Split
from trec_twotower.data.value_digests import value_digests
from trec_twotower.errors import DataError

FEATURES = [
    build_feature(name="item_id", kind="id", buckets=50, dim=4),
    build_feature(name="brand", kind="category", buckets=50, dim=4),
    build_feature(name="tags", kind="bag", buckets=50, dim=4),
    build_feature(name="price", kind="number"),
    build_feature(name="image", kind="vector", size=2),
]
ITEMS = pa.table(
    {
        "item_id": ["a", "b", "c", "d"],
        "brand": ["x", None, "y", "x"],
        "tags": [["t"], ["t", "u"], None, []],
        "price": [1, 2, None, 4],
        "image": pa.array([[1.0, 2.0], None, [0.5, 0.5], [3.0, 1.0]], pa.list_(pa.float32(), 2)),
        "stock": [9, 0, 3, 1],
    }
)


@pytest.fixture
def catalogue(tmp_path) -> Callable[..., Catalogue]:
    """Writes items/ anew, several files of it where there are several tables, and hashes it."""
    folder = tmp_path / "items"

    def make(*tables: pa.Table, **options) -> Catalogue:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for number, table in enumerate(tables):
            pq.write_table(table, folder / f"part-{number}.parquet", **options)
        tables_of = {feature.table_name: feature.own_table for feature in FEATURES[:3]}
        statistics = {"price": Statistics()}
        return Catalogue(Split(folder, "items"), "item_id", FEATURES, tables_of, statistics)

    return make


def changed(table: pa.Table, name: str, values) -> pa.Table:
    kind = table.schema.field(name).type
    array = values if isinstance(values, pa.Array) else pa.array(values, kind)
    return table.set_column(table.column_names.index(name), name, array)


# What counts as a change


@pytest.mark.parametrize(
    "written",
    [
        lambda make: make(ITEMS.slice(0, 1), ITEMS.slice(1), row_group_size=2),
        lambda make: make(changed(ITEMS, "stock", [0, 0, 0, 7])),
        lambda make: make(ITEMS.drop_columns("stock").append_column("shelf", pa.array(["p"] * 4))),
        lambda make: make(ITEMS.select(ITEMS.column_names[::-1]), use_dictionary=False, compression="zstd"),
        lambda make: make(changed(ITEMS, "price", pa.array([1.0, 2.0, None, 4.0]))),
        lambda make: make(changed(ITEMS, "brand", ITEMS["brand"].combine_chunks().cast(pa.string_view()))),
        lambda make: make(changed(ITEMS, "brand", ITEMS["brand"].combine_chunks().dictionary_encode())),
        lambda make: make(changed(ITEMS, "image", ITEMS["image"].combine_chunks().cast(pa.list_(pa.float64())))),
        lambda make: make(changed(ITEMS, "tags", [["t"], ["t", "u"], [], None])),
    ],
    ids=["files and row groups", "an unread value", "other unread columns", "encoding and order of columns",
         "numbers by value", "string_view", "dictionary", "list of doubles", "null and empty lists"],
)  # fmt: skip
def test_what_no_feature_can_see_is_no_change(catalogue, written):
    known = KnownItems.of(catalogue(ITEMS))
    found = known.compare(written(catalogue))
    assert (len(found.added), found.num_removed, len(found.changed), found.is_reordered) == (0, 0, 0, False)


@pytest.mark.parametrize(
    ("name", "values", "rows"),
    [
        ("brand", ["x", None, "z", "x"], [2]),
        ("brand", ["x", "", "y", "x"], [1]),
        ("brand", [None, None, "y", "x"], [0]),
        ("tags", [["t"], ["u", "t"], None, []], [1]),
        ("tags", [["t"], ["t", "u"], ["t"], []], [2]),
        ("tags", [["t", "t"], ["t", "u", None], None, []], [0, 1]),
        ("price", [1, 2, 0, 4], [2]),
        ("price", [1, 4, None, 2], [1, 3]),
        ("image", [[1.0, 2.0], None, [0.5, 0.25], [3.0, 1.0]], [2]),
        ("image", [[2.0, 1.0], [0.0, 0.0], [0.5, 0.5], [3.0, 1.0]], [0, 1]),
    ],
)
def test_a_changed_value_names_its_items_and_its_column(catalogue, name, values, rows):
    known = KnownItems.of(catalogue(ITEMS))
    now = catalogue(changed(ITEMS, name, values))
    assert known.compare(now).changed.tolist() == rows
    said = rf"{len(rows)} of the 4 items that runs/a began with have other values now, in column '{name}', such as "
    with pytest.raises(DataError, match=said + f"item_id '{'abcd'[rows[0]]}': bring the old values back"):
        known.check(now, Path("runs/a"), grows=False, trains=False)


def test_changes_of_some_columns_are_told_from_added_items(catalogue):
    known = KnownItems.of(catalogue(ITEMS.slice(0, 3)))
    now = catalogue(changed(changed(ITEMS, "price", [1, 2, 3, 4]), "brand", ["x", "q", "y", "x"]).take([3, 1, 2, 0]))
    found = known.compare(now)
    assert (found.added.tolist(), sorted(found.changed.tolist()), found.is_reordered) == ([0], [1, 2], True)
    with pytest.raises(DataError, match=r"2 of the 3 items .*, in columns 'brand', 'price', such as item_id"):
        known.check(now, Path("runs/a"), grows=False, trains=False)


def test_items_are_known_in_any_order_but_not_to_training(catalogue):
    known = KnownItems.of(catalogue(ITEMS))
    now = catalogue(ITEMS.take([2, 0, 3, 1]))
    assert known.check(now, Path("runs/a"), grows=False, trains=False) is None
    for grows in (False, True):
        with pytest.raises(DataError, match="has the 4 items that runs/a began with in another order"):
            known.check(now, Path("runs/a"), grows=grows, trains=True)
    count_NI = np.array([[10, 20, 30, 40], [1, 2, 3, 4]])
    assert known.counts_of(now.keys, count_NI).tolist() == [[30, 10, 40, 20], [3, 1, 4, 2]]


def test_added_items_are_reported_and_refused_where_training_goes_on(catalogue):
    known = KnownItems.of(catalogue(ITEMS.slice(0, 2)))
    now = catalogue(ITEMS)
    notice = known.check(now, Path("runs/a"), grows=False, trains=False)
    assert notice is not None and "has 2 items beyond the 2 items that runs/a began with, such as item_id 'c'" in notice
    with pytest.raises(DataError, match=r"2 items beyond .*: the candidates of a training .*\(--init-from .*data\.follow"):
        known.check(now, Path("runs/a"), grows=False, trains=True)
    assert known.check(now, Path("runs/a"), grows=True, trains=True) is None
    assert known.counts_of(now.keys, np.array([5, 6])).tolist() == [5, 6, 0, 0]


def test_items_that_stand_before_the_known_ones_are_another_order(catalogue):
    known = KnownItems.of(catalogue(ITEMS.slice(1)))
    with pytest.raises(DataError, match="in another order"):
        known.check(catalogue(ITEMS), Path("runs/a"), grows=True, trains=True)


def test_removed_items_are_refused(catalogue):
    known = KnownItems.of(catalogue(ITEMS))
    for trains in (False, True):
        with pytest.raises(DataError, match="lacks 3 of the 4 items that runs/a began with: bring them back, or"):
            known.check(catalogue(ITEMS.slice(2, 1)), Path("runs/a"), grows=False, trains=trains)


def test_a_file_of_known_items_that_is_damaged_is_refused(catalogue, tmp_path):
    known = KnownItems.of(catalogue(ITEMS))
    known.write(tmp_path / "known.npz")
    again = KnownItems.read(tmp_path / "known.npz", known.sums, "make it again.")
    assert again.keys.tolist() == known.keys.tolist() and again.digests.tolist() == known.digests.tolist()
    (tmp_path / "known.npz").write_bytes((tmp_path / "known.npz").read_bytes()[:-40])
    with pytest.raises(DataError, match=r"known\.npz cannot be read .*make it again"):
        KnownItems.read(tmp_path / "known.npz", known.sums, "make it again.")


def test_digests_tell_values_apart_and_types_not():
    def digests(values, kind: pa.DataType | None = None) -> list[int]:
        return value_digests(pa.array(values, kind), "here").tolist()

    assert digests([1, 2, None]) == digests([1.0, 2.0, None]) == digests([1, 2, None], pa.uint8())
    assert digests([0.0]) == digests([-0.0]) and digests([2**53]) != digests([2**53 + 1])
    assert digests([1_700_000_000], pa.timestamp("s")) == digests(
        [1_700_000_000_000_000_000], pa.timestamp("ns", "UTC")
    )
    assert digests([19_000], pa.date32()) == digests([19_000 * 86_400_000], pa.timestamp("ms"))
    lists = [["a", "b"], ["b", "a"], ["a"], ["a", None], [None, "a"], [], ["ab"], ["a", "a"]]
    assert len(set(digests(lists))) == len(lists) and digests([None]) == digests([[]], pa.list_(pa.string()))
    assert digests(lists, pa.large_list(pa.large_string()))[1:4] == digests(lists[1:4])


# The command line


@pytest.fixture
def moving_shop(shop: Shop, shop_copy: Shop) -> Shop:
    """The shop and its run, both to be changed."""
    dataset = Path(shutil.copytree(shop.dataset, shop_copy.run.parent / "shop"))
    for path in (shop_copy.run / "config.yaml", Path(shutil.copy(shop.config, shop_copy.run.parent / "shop.yaml"))):
        path.write_text(path.read_text().replace(str(shop.dataset), str(dataset)))
    return Shop(dataset, shop_copy.run.parent / "shop.yaml", shop_copy.run)


def rewrite(shop: Shop, table: pa.Table, part: str = "items") -> None:
    pq.write_table(table, shop.dataset / part / "part-0.parquet")


def trained_further(shop: Shop, cli: Call):
    return cli("train", shop.config, f"run_dir={shop.run}", "train.epochs=3")


def evaluated(shop: Shop, cli: Call) -> dict:
    said = cli("evaluate", shop.run, "--index", "--slice", "item.colour")
    assert said.code == 0, said.err
    return json.loads((shop.run / "evaluation.json").read_text())


def flat(values, place: str = "") -> dict[str, float]:
    """Every number of nested dicts under the way to it."""
    if not isinstance(values, dict):
        return {place: values} if isinstance(values, float | int) else {}
    return {name: number for key, each in values.items() for name, number in flat(each, f"{place}/{key}").items()}


def cards(shop: Shop, cli: Call) -> list[str]:
    """The items that the report shows to some users."""
    assert cli("report", shop.run).code == 0
    return re.findall("<li.*?</li>", (shop.run / "report.html").read_text())


def test_items_in_another_order_are_the_same_items_to_every_later_stage(moving_shop, cli, shop_tables):
    calls = (
        ("recommend", moving_shop.run, "--user", "user-1", "--user", "user-6", "--k", "30"),
        ("recommend", moving_shop.run, "--user", "user-1", "--where", "colour=red", "--without", "red-3"),
    )
    first, figures, shown = [cli(*call).out for call in calls], evaluated(moving_shop, cli), cards(moving_shop, cli)
    assert all(first) and len(shown) > 20
    rewrite(moving_shop, shop_tables["items"].take(np.random.default_rng(1).permutation(40)))
    for call, before in zip(calls, first, strict=True):
        now = cli(*call)
        assert (now.code, now.out, now.err) == (0, before, "")
    now = evaluated(moving_shop, cli)
    for part in ("metrics", "slices"):  # of the others, equal counts are ranked by row
        found, before = (
            {name: value for name, value in flat(each[part]).items() if "two towers, " in name and "/tail/" not in name}
            for each in (now, figures)
        )
        assert found == pytest.approx(before, abs=1e-6) and len(found) > 10
    assert cards(moving_shop, cli) == shown
    said = trained_further(moving_shop, cli)
    assert said.code == 3 and "has the 40 items that" in said.mistake and "in another order" in said.mistake


def test_columns_that_no_feature_reads_may_change_at_any_time(moving_shop, cli, shop_tables):
    items = changed(shop_tables["items"], "title", [f"New {number}" for number in range(40)])
    rewrite(moving_shop, items.append_column("stock", pa.array([number % 2 == 0 for number in range(40)])))
    said = cli("recommend", moving_shop.run, "--user", "user-1", "--where", "stock=true", "--k", "3")
    assert said.code == 0 and not said.err and "New " in said.out
    assert trained_further(moving_shop, cli).code == 0
    for stage in ("export", "index", "evaluate", "report"):
        assert cli(stage, moving_shop.run).code == 0


def test_added_items_are_found_once_they_are_exported_and_indexed(moving_shop, cli, shop_tables):
    """An added file is tolerated by what works without it, and refused by a training that goes on."""
    new = shop_tables["items"].slice(0, 2)
    new = changed(new, "item_id", ["red-new", "red-newer"])
    pq.write_table(new, moving_shop.dataset / "items" / "part-1.parquet")
    asked = ("recommend", moving_shop.run, "--user", "user-1", "--k", "35")
    before = cli(*asked)
    assert before.code == 0 and "red-new" not in before.out
    assert "has 2 items beyond the 40 items that" in before.err and "such as item_id 'red-new'" in before.err
    assert "the index lacks 2 items of" in before.err and "export and index again" in before.err
    assert evaluated(moving_shop, cli)["metrics"]["two towers, through the index"]
    said = trained_further(moving_shop, cli)
    assert said.code == 3 and "has 2 items beyond the 40 items" in said.mistake and "--init-from" in said.mistake
    for stage in ("export", "index"):
        assert cli(stage, moving_shop.run).code == 0
    after = cli("recommend", moving_shop.run, "--user", "user-1", "--k", "37")
    assert after.code == 0 and after.out.count("[red-new") == 2 and "the index lacks" not in after.err
    (moving_shop.dataset / "items" / "part-1.parquet").unlink()
    said = cli(*asked)
    assert said.code == 3 and "The index has 2 items that" in said.mistake and "'red-new'" in said.mistake
    assert trained_further(moving_shop, cli).code == 0


def test_filters_and_rules_of_the_server_go_by_the_items_as_they_are_now(moving_shop, cli, shop_tables):
    """New items stand before all others, so that no row of the index is that of items/."""
    from trec_twotower.serving.http_api import Service

    def ids(**asked) -> list[str]:
        [answer] = Service(moving_shop.run).recommend({"users": ["user-1"], **asked})["answers"]
        assert all(item["about"]["item_id"] == item["item_id"] for item in answer["items"])
        return [item["item_id"] for item in answer["items"]]

    asked = (
        {"k": 6, "where": {"colour": ["blue", "red"]}, "without": ["blue-3"]},
        {"k": 4, "only": ["green-1", "green-2", "black-5", "red-0"]},
        {"k": 8, "most": {"column": "colour", "count": 2}},
        {"k": 5, "boost": [{"where": {"colour": ["black"]}, "score": 5.0}]},
    )
    before = [ids(**each) for each in asked]
    new = changed(shop_tables["items"].slice(0, 2), "item_id", ["red-new", "red-newer"])
    pq.write_table(new, moving_shop.dataset / "items" / "a.parquet")
    assert [ids(**each) for each in asked] == before
    assert set(before[3]) <= {f"black-{number}" for number in range(10)}


def test_ranks_find_and_refuse_items_together(moving_shop, on_forked_ranks, shop_tables, cli):
    first = evaluated(moving_shop, cli)["metrics"]["two towers, through the index"]
    rewrite(moving_shop, shop_tables["items"].take(np.random.default_rng(3).permutation(40)))
    new = changed(shop_tables["items"].slice(0, 1), "item_id", ["red-new"])
    pq.write_table(new, moving_shop.dataset / "items" / "a.parquet")
    said = on_forked_ranks("evaluate", moving_shop.run, "--index")
    assert said.code == 0 and said.err.count("1 items beyond") == 1 and said.err.count("the index lacks 1 items") == 1
    now = json.loads((moving_shop.run / "evaluation.json").read_text())["metrics"]["two towers, through the index"]
    assert now == pytest.approx(first, abs=1e-6)
    said = on_forked_ranks("train", moving_shop.config, f"run_dir={moving_shop.run}", "train.epochs=3")
    assert said.code == 3 and "in another order" in said.err


@pytest.mark.parametrize("stage", ["export", "evaluate", "recommend", "train"])
def test_changed_and_removed_items_stop_every_stage(moving_shop, cli, shop_tables, stage):
    def run():
        if stage == "train":
            return trained_further(moving_shop, cli)
        return cli(stage, moving_shop.run, *(("--user", "user-1") if stage == "recommend" else ()))

    items = shop_tables["items"]
    rewrite(moving_shop, changed(items, "price", pc.add(pc.fill_null(items["price"], 5.0), 1.0).combine_chunks()))
    said = run()
    assert said.code == 3
    assert "40 of the 40 items" in said.mistake and "in column 'price', such as item_id 'red-0'" in said.mistake
    rewrite(moving_shop, items.slice(1))
    said = run()
    assert said.code == 3 and "lacks 1 of the 40 items that" in said.mistake
    rewrite(moving_shop, items)
    assert run().code == 0


def test_users_may_change_but_for_a_training_that_goes_on(moving_shop, cli, shop_tables):
    users = shop_tables["users"]
    rewrite(moving_shop, users.take(np.random.default_rng(2).permutation(80)), "users")
    assert trained_further(moving_shop, cli).code == 0
    for now, said in (
        (changed(users, "age", [33.0] * 80), "has other users or values than when .* began, in 'age': bring"),
        (pa.concat_tables([users, changed(users.slice(0, 1), "user_id", ["user-new"])]), "has 81 users, but had 80"),
    ):
        rewrite(moving_shop, now, "users")
        for stage in ("export", "index", "evaluate"):
            assert cli(stage, moving_shop.run).code == 0
        assert cli("recommend", moving_shop.run, "--user", "user-1").code == 0
        refused = cli("train", moving_shop.config, f"run_dir={moving_shop.run}", "train.epochs=4")
        assert refused.code == 3 and re.search(said, refused.mistake)


def test_a_run_of_an_earlier_version_says_how_to_learn_again(moving_shop, cli):
    from trec_twotower.storage.manifest import read_signed, write_signed

    path = moving_shop.run / "statistics.json"
    saved = read_signed(path, "")
    write_signed(path, {name: saved[name] for name in saved if name not in ("sha256", "known_items.npz")})
    said = cli("recommend", moving_shop.run, "--user", "user-1")
    assert said.code == 3 and "remove statistics.json, and the next command learns" in said.mistake
    path.unlink()
    assert cli("recommend", moving_shop.run, "--user", "user-1").code == 0


def test_a_damaged_file_of_known_items_is_refused(moving_shop, cli):
    path = moving_shop.run / "known_items.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said = cli("evaluate", moving_shop.run)
    assert said.code == 3 and "known_items.npz" in said.mistake


def test_dataset_yaml_may_be_removed_to_change_items(tmp_path, cli):
    """As the message says where an item file is added to what `prepare` has made."""
    dataset, run, config = tmp_path / "made", tmp_path / "run", tmp_path / "config.yaml"
    options = ("users=60", "items=60", "rows=600")
    made = cli("prepare", "synthetic", "--out", dataset, *options)
    assert made.code == 0, made.err
    features = "user: [{name: history, kind: bag, table: item}]\nitem: [{name: item_id, kind: id, table: item}]"
    config.write_text(
        f"data: {{dataset: {dataset}, batch_size: 64}}\ntables: {{item: {{buckets: 64, dim: 8}}}}\n{features}\n"
        "model: {dim: 8}\ntrain: {epochs: 1}\nevaluate: {k: [5], best: recall@5}\n"
    )
    assert cli("train", config, f"run_dir={run}").code == 0
    items = pq.read_table(sorted((dataset / "items").glob("*.parquet"))[0])
    new = changed(items.slice(0, 1), "item_id", [10**6])
    pq.write_table(new, dataset / "items" / "added.parquet")
    said = cli("export", run)
    assert said.code == 3 and "remove dataset.yaml" in said.mistake
    (dataset / "dataset.yaml").unlink()
    said = cli("export", run)
    assert said.code == 0 and "1 items beyond" in said.err
