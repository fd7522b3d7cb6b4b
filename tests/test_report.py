"""The report is one file that holds what the stages wrote, and says what is missing."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from trec_twotower.report import principal_plane

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
    for name, metrics in result["metrics"].items():
        low, high = result["intervals"][name]["recall@5"]
        for shown in (name, f"{metrics['recall@5']:.4f}", f"{metrics['map@5']:.4f}", f"{low:.4f} – {high:.4f}"):
            assert shown in text
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
                            ("exact search, measured now", index), ("40 of 40 items by colour", items),
                            ("red", items)):  # fmt: skip
        assert f">{wanted}</text>" in picture
    ids = [re.findall(r'(?<!\w)id="([mp][0-9a-f]{10})"', picture) for picture in pictures]
    flat = [each for part in ids for each in part]
    assert len(flat) == len(set(flat)), "one picture's shapes would be drawn in another"


def test_users_are_shown_with_what_exact_search_gives_them(reported, shop_tables, cli):
    run, page = reported
    cards = re.findall(r"<div><h3>User (\S+)</h3>(.*?)</div>", page)
    assert len(cards) == 4
    test = {row["user_id"]: row for row in shop_tables["test"].to_pylist()}
    for user, card in cards:
        took, gets = (re.findall(r"<li.*?>A (\w+) no. (\d)", part) for part in card.split("and gets"))
        assert ["-".join(item) for item in took] == test[user]["history"][::-1][:5]
        said = cli("recommend", run, "--user", user, "--k", 8)
        assert ["-".join(item) for item in gets] == re.findall(r"\[(\w+-\d)\]$", said.out, flags=re.MULTILINE)
        found = ["-".join(item) for item in re.findall(r"<li class=found>A (\w+) no. (\d)", card)]
        assert found == [item for item in map("-".join, gets) if item in test[user]["positives"]]


def test_a_run_that_was_only_trained_says_what_to_do_next(shop_copy, cli):
    shutil.rmtree(shop_copy.run / "export")
    shutil.rmtree(shop_copy.run / "index")
    said = cli("report", shop_copy.run)
    assert said.code == 0, said.err
    text = Page((shop_copy.run / "report.html").read_text()).text
    for command in ("evaluate", "export"):
        assert f"trec-twotower {command} {shop_copy.run}" in text
    assert "10 of 10 steps" in text and "row_wise" in text


def test_an_index_of_other_weights_is_not_shown(shop_copy, cli):
    assert cli("export", shop_copy.run, "--checkpoint", "5").code == 0
    assert cli("report", shop_copy.run).code == 0
    assert "The index is of other weights than the export" in (shop_copy.run / "report.html").read_text()


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
