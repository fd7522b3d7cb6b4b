"""The report is one file that holds what the stages wrote, and says what is missing."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
import torch

from trec_twotower.evaluation.report import principal_plane
from trec_twotower.evaluation.result_text import verdict
from trec_twotower.serving.retriever import Retriever

VOID = {"meta", "br"}


class Page(HTMLParser):
    """The words of a page, with every element closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def reported(cli, shop, tmp_path_factory):
    """A run folder that all stages have been through, and its page."""
    run = shutil.copytree(shop.run, tmp_path_factory.mktemp("reported") / "run")
    for call in (("evaluate", run, "--index", "--slice", "item.colour"), ("report", run)):
        said = cli(*call)
        assert said.code == 0, said.err
    assert said.out.strip() == str(run / "report.html")
    return run, (run / "report.html").read_text()


def test_the_page_holds_every_figure_of_the_evaluation(reported):
    run, page = reported
    result = json.loads((run / "evaluation.json").read_text())
    text = Page(page).text
    assert verdict(result, 5) in text
    best = max(metrics["recall@5"] for metrics in result["metrics"].values())
    bold = re.findall(r'<td class="found">([0-9.]+)<br>', page)
    assert f"{best:.4f}" in bold
    assert "Written" in text and "run_dir:" in text and f"torch {torch.__version__}" in text
    for name, metrics in result["metrics"].items():
        low, high = result["intervals"][name]["recall@5"]
        for shown in (name, f"{metrics['recall@5']:.4f}", f"{metrics['map@5']:.4f}", f"{low:.4f} – {high:.4f}"):
            assert shown in text
    assert f"Evaluated: model {result['model_version']}, step 10" in text and "not of the exported vectors" not in text
    loss = result["index_loss"]["recall@5"]
    low, high = loss["interval"]
    interval = f"95 % confidence interval {low:+.5f} to {high:+.5f}"
    assert f"recall@5 lost to the index: {loss['value']:+.5f} ({interval})" in text
    for lists in result["lists"].values():
        assert f"{lists['novelty@5']:.4f}" in text and f"{lists['coverage@5']:.4f}" in text


def test_the_page_needs_no_other_file_and_its_pictures_are_whole(reported):
    _, page = reported
    links = re.findall(r"(?:href|src)=\"([^\"]*)\"", page)
    assert all(link.startswith(("#", "data:")) for link in links) and "<script" not in page and "url(http" not in page
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert [re.findall('aria-label="(.*?)"', picture)[0] for picture in pictures] == [
        "training curves", "recall by slices", "index", "map of the items"
    ]  # fmt: skip
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "currentColor" in picture and "#010203" not in picture  # the page's ink, in light and dark
    training, slices, index, items = pictures
    for wanted, picture in (("recall@5 on valid/", training), ("recall@5 by item.colour", slices),
                            ("exact search", index), ("40 of 40 items by colour", items),
                            ("red", items)):  # fmt: skip
        assert f">{wanted}</text>" in picture
    ids = [re.findall(r'(?<!\w)id="([mp][0-9a-f]{10})"', picture) for picture in pictures]
    flat = [each for part in ids for each in part]
    assert len(flat) == len(set(flat)), "one picture's shapes would be drawn in another"


def test_users_are_shown_with_what_exact_search_gives_them(reported, shop_tables):
    """As of before the held-out items: the state that the row of test/ describes."""
    run, page = reported
    retriever = Retriever.alone(run)
    cards = re.findall(r"<div><h3>User (\S+)</h3>(.*?)</div>", page, flags=re.DOTALL)
    assert len(cards) == 4
    test = {row["user_id"]: row for row in shop_tables["test"].to_pylist()}
    for user, card in cards:
        took, gets = (re.findall(r"<li.*?>A (\w+) no. (\d)", part) for part in card.split("Recommendations"))
        assert ["-".join(item) for item in took] == test[user]["history"][::-1][:5]
        state = {name: value for name, value in test[user].items() if not name.startswith("positive")}
        (answer,) = retriever.recommend_now([state], k=8)
        assert ["-".join(item) for item in gets] == [item.item_id for item in answer.items]
        found = ["-".join(item) for item in re.findall(r'<li class="found">A (\w+) no. (\d)', card)]
        assert found == [item for item in map("-".join, gets) if item in test[user]["positives"]]


@pytest.mark.parametrize(
    ("name", "content", "mend"),
    [
        ("evaluation.json", '{"split": "test"}', "evaluate again"),
        ("evaluation.json", "[]", "evaluate again"),
        ("metrics.jsonl", '{"step": 1}\n', "remove the damaged lines"),
        ("metrics.jsonl", "{\n", "remove the damaged lines"),
        ("status.json", "{}", "train again"),
    ],
)
def test_files_of_another_shape_are_named(reported, shop_copy, cli, name, content, mend):
    run, _ = reported
    shutil.copy(run / "metrics.jsonl", shop_copy.run)
    (shop_copy.run / name).write_text(content)
    said = cli("report", shop_copy.run)
    assert said.code == 3 and f"{name} is not in the format of this version" in said.err and mend in said.err
    assert not (shop_copy.run / "report.html").exists()


def test_a_run_that_was_only_trained_says_what_to_do_next(shop_copy, cli):
    shutil.rmtree(shop_copy.run / "export")
    shutil.rmtree(shop_copy.run / "index")
    said = cli("report", shop_copy.run)
    assert said.code == 0, said.err
    text = Page((shop_copy.run / "report.html").read_text()).text
    for command in ("evaluate", "export"):
        assert f"trec-twotower {command} {shop_copy.run}" in text
    assert "10 of 10 steps" in text and "row_wise" in text


def test_an_index_and_an_evaluation_of_other_weights_than_the_export_are_marked(shop_copy, cli):
    assert cli("evaluate", shop_copy.run).code == 0
    assert cli("export", shop_copy.run, "--checkpoint", "5").code == 0
    assert cli("report", shop_copy.run).code == 0
    page = (shop_copy.run / "report.html").read_text()
    assert "The index is of other weights than the export" in page
    assert "These metrics are not of the exported vectors" in page and "--checkpoint 5 selects that model" in page


def test_memory_is_that_of_tables_optimizer_and_processes(reported, shop):
    """Row-wise Adagrad keeps a number a row."""
    run, page = reported
    rows = re.findall(r"<tr><td>item</td>(.*?)</tr>", page)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    assert cells and all(
        float(state) == pytest.approx(4 * int(height.replace(",", "")) / 1e6, abs=0.005)
        for *_, height, _, _, state in cells
    )
    held = json.loads((run / "status.json").read_text())["peak_bytes_by_rank"]
    assert len(held) == 1 and f"rank 0 {held[0] / 2**20:,.0f} MiB" in page


def test_a_user_of_several_rows_is_shown_as_each_row_was(shop_copy, cli, write_dataset, tmp_path, shop_tables):
    """And vectors that differ in length are drawn."""
    test = shop_tables["test"]
    again = test.slice(0, 1).to_pylist()[0]
    again["history"] = shop_tables["items"]["item_id"].to_pylist()[20:25]
    rows = pa.concat_tables([test, pa.Table.from_pylist([again], schema=test.schema)])
    dataset = write_dataset(tmp_path / "twice", **{**shop_tables, "test": rows})
    config, run = tmp_path / "twice.yaml", tmp_path / "twice-run"
    config.write_text(shop_copy.config.read_text().replace(str(shop_copy.dataset), str(dataset)))
    for call in (
        ("train", config, f"run_dir={run}", "train.epochs=1", "model.similarity=dot"),
        ("export", run),
        ("report", run),
    ):
        said = cli(*call)
        assert said.code == 0, said.err
    page = (run / "report.html").read_text()
    cards = re.findall(r"<div><h3>User (\S+)</h3>(.*?)</div>", page, flags=re.DOTALL)
    took = [["-".join(item) for item in re.findall(r"<li.*?>A (\w+) no. (\d)", card.split("Recommendations")[0])]
            for _, card in cards]  # fmt: skip
    assert cards[0][0] == cards[-1][0] == again["user_id"]
    assert took[0] == test["history"][0].as_py()[::-1][:5] and took[-1] == again["history"][::-1]
    (lengths,) = re.findall(r'<svg role="img" aria-label="lengths of the vectors".*?</svg>', page, flags=re.DOTALL)
    assert all(f">{word}</text>" in lengths for word in ("items", "users", "lengths of the vectors"))
    assert "All vectors have length" not in page


def test_parts_in_no_order_are_not_joined_by_lines(reported):
    """A line is a stroke without a fill in a contender's colour."""
    _, page = reported
    (slices,) = re.findall(r'<svg role="img" aria-label="recall by slices".*?</svg>', page, flags=re.DOTALL)
    axes = re.split(r'<g id="axes_\d+">', slices)[1:]
    titles = [re.findall(r"recall@5 by ([^<]+)</text>", part)[0] for part in axes]
    joined = ["fill: none; stroke: #3b82c4" in part for part in axes]
    assert "item.colour" in titles and joined == ["." not in title for title in titles]


def test_the_index_is_reported_with_what_was_measured_when_it_was_built(reported):
    run, page = reported
    measured = json.loads((run / "index/manifest.json").read_text())["report"]
    (section,) = re.findall(r'<section id="index"><h2>Index</h2>(.*?)</section>', page, flags=re.DOTALL)
    (index, exact) = re.findall(r"<tr><td>(?:this index|exact search)</td>(.*?)</tr>", section)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in (index, exact)]
    (rate,) = {rate for _, share, rate in measured["curve"] if share == measured["scanned_share"]}
    latency = [f"{measured['latency_ms'][name]:.2f}" for name in ("p50", "p90", "p99")]
    assert cells[0] == [f"{rate:,.0f}", *latency]
    assert cells[1] == [f"{measured['exact_users_per_s']:,.0f}", "-", "-", "-"]
    assert 0 < measured["latency_ms"]["p50"] <= measured["latency_ms"]["p90"] <= measured["latency_ms"]["p99"]
    assert f"{measured['bytes'] / 1e6:.1f} MB" in section and f"{measured['reached_recall']:.4f}" in section


def test_the_same_run_gives_the_same_page(reported, cli):
    """The report reads what the stages measured; it measures nothing itself."""
    run, page = reported
    assert cli("report", run).code == 0
    assert (run / "report.html").read_text() == page


def test_words_of_the_data_do_not_become_markup(shop_copy, cli, write_dataset, tmp_path, shop_tables):
    titles = [f"<b>{number} & $x" for number in range(40)]
    items = shop_tables["items"]
    items = items.set_column(items.column_names.index("title"), "title", [titles])
    dataset = write_dataset(tmp_path / "odd", **{**shop_tables, "items": items})
    config = tmp_path / "odd.yaml"
    config.write_text(shop_copy.config.read_text().replace(str(shop_copy.dataset), str(dataset)))
    run = tmp_path / "odd-run"
    for call in (
        ("train", config, f"run_dir={run}", "train.epochs=1"),
        ("export", run),
        ("report", run, "--colour", "title"),
    ):
        said = cli(*call)
        assert said.code == 0, said.err
    page = (run / "report.html").read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page
    Page(page)


def test_a_report_of_a_dataset_that_has_changed_is_refused(shop_copy, cli, write_dataset, tmp_path, shop_tables):
    """Its rows would be told in the words of other items."""
    moved, config = tmp_path / "moved", shop_copy.run / "config.yaml"
    shutil.copytree(shop_copy.dataset, moved)
    config.write_text(config.read_text().replace(str(shop_copy.dataset), str(moved)))
    assert cli("report", shop_copy.run).code == 0
    shutil.rmtree(moved)
    write_dataset(moved, **{**shop_tables, "items": shop_tables["items"].slice(3)})
    page = (shop_copy.run / "report.html").read_bytes()
    said = cli("report", shop_copy.run)
    assert said.code == 3 and "items lacks 3 of the exported items, such as item_id 'red-0'" in said.mistake
    assert (shop_copy.run / "report.html").read_bytes() == page


def test_a_colour_that_is_no_column_is_refused(shop, cli):
    said = cli("report", shop.run, "--colour", "color")
    assert said.code == 2 and "'color'" in said.mistake and "nearest: 'colour'" in said.mistake


def test_the_plane_is_the_one_that_keeps_most(rng):
    """Vectors that lie in a plane of twelve dimensions but for a little noise: distances stay."""
    plane, _ = np.linalg.qr(rng.normal(size=(12, 2)))
    inside = rng.normal(size=(60, 2)) * [3, 1]
    vector_ID = inside @ plane.T + 5 + 1e-3 * rng.normal(size=(60, 12))
    found, share = principal_plane(vector_ID.astype(np.float32))
    apart = np.linalg.norm(inside[:, None] - inside[None], axis=2)
    assert np.linalg.norm(found[:, None] - found[None], axis=2) == pytest.approx(apart, abs=0.02)
    assert share > 0.999 and found[:, 0].std() > found[:, 1].std()
