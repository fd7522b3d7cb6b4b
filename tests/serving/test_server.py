"""The server in a process of its own, asked over HTTP."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from trec_twotower.serving import http_api as server
from trec_twotower.serving.http_api import MAX_USERS, Measured, Server, Service
from trec_twotower.serving.retriever import Retriever


@dataclass(frozen=True)
class Served:
    run: Path
    process: subprocess.Popen[str]
    port: int

    def ask(self, method: str, path: str, body: Any = None, raw: bytes | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, raw if raw is not None else None if body is None else json.dumps(body))
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        return answer.status, json.loads(text) if answer.headers["Content-Type"] == "application/json" else text

    def recommend(self, **body: Any) -> list[dict[str, Any]]:
        status, answer = self.ask("POST", "/recommend", body)
        assert status == 200, answer
        return answer["answers"]

    def refused(self, status: int, **body: Any) -> str:
        found, answer = self.ask("POST", "/recommend", body)
        assert found == status and set(answer) == {"error"}, answer
        return answer["error"]

    def wait_for(self, line: str) -> None:
        """Until /metrics has this line."""
        end = time.monotonic() + 60
        while line not in self.ask("GET", "/metrics")[1]:
            assert time.monotonic() < end, self.ask("GET", "/metrics")[1]
            time.sleep(0.1)


@pytest.fixture(scope="module")
def served(shop, tmp_path_factory) -> Iterator[Served]:
    run = shutil.copytree(shop.run, tmp_path_factory.mktemp("served") / "run")
    command = [sys.executable, "-m", "trec_twotower", "serve", run, "--port", "0", "--max-k", "35", "--reload-s", "0.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("Serving model"), process.stderr.read()
        yield Served(run, process, int(re.findall(r":(\d+)$", line.strip())[0]))
        assert process.poll() is None or process.returncode == 0
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def retriever(shop):
    from trec_twotower.serving.retriever import Retriever

    return Retriever.alone(shop.run)


@pytest.fixture(scope="module")
def service(shop) -> Service:
    return Service(shop.run)


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def test_it_answers_as_the_retriever_in_a_process_group_does(served, retriever, shop):
    from trec_twotower.distributed.ranks import start_ranks
    from trec_twotower.serving.retriever import Retriever

    answers = served.recommend(users=["user-1", "user-2"], k=7, history=2)
    with start_ranks() as ranks:
        grouped = Retriever.open(shop.run, ranks).recommend(["user-1", "user-2"], 7)
    for answer, one, other in zip(answers, grouped, retriever.recommend(["user-1", "user-2"], 7), strict=True):
        expected = [item.item_id for item in one.items]
        assert ids(answer) == expected == [item.item_id for item in other.items]
        assert [item["score"] for item in answer["items"]] == pytest.approx([item.score for item in one.items])
        assert answer["items"][0]["about"]["title"].startswith("A ") and len(answer["history"]) == 2
    status, version = served.ask("GET", "/version")
    manifest = json.loads((shop.run / "export/manifest.json").read_text())
    assert status == 200 and version["model_version"] == manifest["model_version"] and version["items"] == 40
    assert served.ask("GET", "/health") == (200, {"status": "ok"})


def test_live_states_are_rows_as_the_dataset_has_them(served, retriever):
    state = {"user_id": "user-3", "history": ["red-1", "red-2"], "history_weight": [1.0, 2.0]}
    [answer] = served.recommend(states=[state], k=5)
    [expected] = retriever.recommend_now([state], 5)
    assert ids(answer) == [item.item_id for item in expected.items] and not {"red-1", "red-2"} & set(ids(answer))
    assert "reads (nearest: 'history')" in served.refused(400, states=[{"user_id": "user-3", "histori": []}])
    assert "types" in served.refused(400, states=[{"user_id": "user-3", "history": 3}])


def test_filters_and_rules(served):
    [free] = served.recommend(users=["user-1"], k=35)
    colour = {item["item_id"]: item["about"]["colour"] for item in free["items"]}
    [red] = served.recommend(users=["user-1"], k=5, where={"colour": ["red"]}, without=[ids(free)[0]])
    assert ids(red) == [item for item in ids(free)[1:] if colour[item] == "red"][:5]
    [only] = served.recommend(users=["user-1"], k=5, only=ids(free)[3:5])
    assert ids(only) == ids(free)[3:5]
    # At most two of a colour, the best of each.
    [spread] = served.recommend(users=["user-1"], k=8, most={"column": "colour", "count": 2})
    expected: list[str] = []
    for item in ids(free):
        if sum(colour[other] == colour[item] for other in expected) < 2:
            expected.append(item)
    assert ids(spread) == expected[:8]
    [lifted] = served.recommend(users=["user-1"], k=3, boost=[{"where": {"colour": ["black"]}, "score": 10.0}])
    assert ids(lifted) == [item for item in ids(free) if colour[item] == "black"][:3]
    assert lifted["items"][0]["score"] > 8


def test_what_is_left_out_of_a_request_has_its_default(served, retriever, service):
    [answer] = served.recommend(users=["user-1"])
    [expected] = retriever.recommend(["user-1"], 10)
    assert ids(answer) == [item.item_id for item in expected.items] and answer["history"] == []
    assert len(served.recommend(users=["user-1"] * MAX_USERS, k=1)) == MAX_USERS
    # All that the user has not taken, where more are asked for than the catalogue has.
    assert len(service.recommend({"users": ["user-1"], "k": 1000})["answers"][0]["items"]) == 34


def test_boosts_add_up_and_each_is_for_items_of_all_its_columns(served):
    boosts = [
        {"where": {"colour": ["black", "red"]}, "score": 1.0},
        {"where": {"colour": ["black"], "tags": ["t1"]}, "score": 2.5},
    ]
    [free] = served.recommend(users=["user-1"], k=35)
    [lifted] = served.recommend(users=["user-1"], k=35, boost=boosts)
    expected = {}
    for item in free["items"]:
        colour, tags = item["about"]["colour"], item["about"]["tags"] or []
        more = (colour in ("black", "red")) + 2.5 * (colour == "black" and "t1" in tags)
        expected[item["item_id"]] = item["score"] + more
    assert {item["item_id"]: item["score"] for item in lifted["items"]} == pytest.approx(expected, abs=1e-5)
    assert ids(lifted) == sorted(expected, key=lambda item: -expected[item])


def test_items_without_a_group_are_not_limited(served):
    """Every price is of one item, but five items have none."""
    [free] = served.recommend(users=["user-1"], k=35)
    [spread] = served.recommend(users=["user-1"], k=35, most={"column": "price", "count": 1})
    assert sum(item["about"]["price"] is None for item in free["items"]) > 1 and ids(spread) == ids(free)


def test_a_filter_that_is_kept_is_not_taken_for_another(service, monkeypatch):
    """Of three filters, two of which are kept, each gives its own items, also when it comes again."""
    monkeypatch.setattr(server, "KEPT_FILTERS", 2)
    for colour in ("red", "green", "blue", "blue", "red", "green", "red"):
        [answer] = service.recommend({"users": ["user-1"], "k": 40, "where": {"colour": [colour]}})["answers"]
        assert {item["about"]["colour"] for item in answer["items"]} == {colour}
    for only in (["red-1"], ["red-2"]):
        [answer] = service.recommend({"users": ["user-1"], "only": only})["answers"]
        assert ids(answer) == only


def test_filters_hold_under_rules_and_no_item_is_no_filter_left_out(served):
    asked = {"users": ["user-1"], "k": 35, "where": {"colour": ["red", "blue"]}, "without": ["red-3"]}
    [plain] = served.recommend(**asked)
    [ruled] = served.recommend(**asked, boost=[{"where": {"colour": ["black"]}, "score": 9.0}])
    assert ids(ruled) == ids(plain) and {item["about"]["colour"] for item in plain["items"]} == {"red", "blue"}
    assert "red-3" not in ids(plain)
    assert "allows none of the 40 items" in served.refused(400, users=["user-1"], only=[])


def test_an_unknown_user_among_others_gets_an_error_in_place_of_items(served):
    [expected] = served.recommend(users=["user-1"], k=3, history=2)
    first, unknown, last = served.recommend(users=["user-1", "nobody", "user-1"], k=3, history=2)
    assert first == last == expected and "error" not in first
    assert unknown.pop("error").startswith("User 'nobody' is in no part of")
    assert unknown == {"user_id": "nobody", "items": [], "history": []}
    for answer in served.recommend(users=["nobody", 7]):
        assert "is in no part of" in answer["error"]


def test_what_cannot_be_answered_is_said(served):
    assert "'nobody' is in no part" in served.refused(404, users=["nobody"])
    assert "give a whole number from 1 to 35" in served.refused(400, users=["user-1"], k=36)
    assert "1 to 35" in served.refused(400, users=["user-1"], k=2.5)
    assert "nearest: 'users'" in served.refused(400, user=["user-1"])
    assert "either" in served.refused(400, users=["user-1"], states=[{}])
    assert "at least one" in served.refused(400, users=[])
    assert "nearest: 'colour'" in served.refused(400, users=["user-1"], where={"color": ["red"]})
    assert "list of numbers or strings" in served.refused(400, users=["user-1"], only="red-1")
    assert "one value an item" in served.refused(400, users=["user-1"], most={"column": "tags", "count": 1})
    assert "must be a list of" in served.refused(400, users=["user-1"], boost=[{"score": 1}])
    assert "may have 256" in served.refused(413, users=["user-1"] * 257)
    assert "filter on 'item_id'" in served.refused(400, users=["user-1"], without=["\ud800"])  # half a surrogate pair
    assert "is in no part" in served.refused(404, users=["\ud800"])
    assert "types" in served.refused(400, states=[{"user_id": "user-3", "history": ["\ud800"]}])
    assert served.ask("POST", "/recommend", raw=b"{")[0] == 400
    assert served.ask("POST", "/recommend", raw=b"[1]")[0] == 400
    assert served.ask("POST", "/recommend", raw=b"[" * 100_000)[0] == 400
    for word in (b"NaN", b"Infinity", b"1e999", b"true"):
        boost = b'{"users": ["user-1"], "boost": [{"where": {}, "score": %s}]}' % word
        assert served.ask("POST", "/recommend", raw=boost)[0] == 400
    assert "must be a list of" in served.refused(400, users=["user-1"], boost=[{"where": {}, "score": 1, "scale": 2}])
    assert "1 to 35" in served.refused(400, users=["user-1"], k=True)
    assert served.ask("GET", "/recommend")[0] == 405 and served.ask("POST", "/health", {})[0] == 405
    status, answer = served.ask("GET", "/recomend")
    assert status == 404 and "nearest: '/recommend'" in answer["error"]
    assert served.recommend(users=["user-1"], k=1)


@pytest.mark.parametrize(
    ("method", "head", "status"),
    [
        ("POST", "Content-Length: 99999999", 413),
        ("POST", f"Content-Length: 1{'0' * 5000}", 413),  # more digits than int() takes
        ("POST", "Content-Length: -1", 413),
        ("POST", "Content-Length: 1e3", 413),
        ("POST", "Host: x", 411),
        ("POST", "Transfer-Encoding: chunked", 411),
        ("POST", "Transfer-Encoding: chunked\r\nContent-Length: 4", 411),
        ("POST", "Content-Length: 4\r\nContent-Length: 40", 411),
        ("GET", "Transfer-Encoding: chunked", 411),
        ("GET", "Content-Length: 99999999", 413),
    ],
)
def test_a_body_that_is_not_read_is_not_taken_for_a_request(served, method, head, status):
    """The connection ends instead: after one answer nothing more comes."""
    path = "/recommend" if method == "POST" else "/version"
    with socket.create_connection(("127.0.0.1", served.port), 10) as raw:
        raw.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n\r\n".encode())
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        said = b""
        try:
            while some := raw.recv(1 << 16):
                said += some
        except ConnectionResetError:  # what was sent last was not read
            pass
    assert said.startswith(b"HTTP/1.1 %d " % status) and said.count(b"HTTP/1.1 ") == 1


def test_a_connection_goes_on_behind_what_was_refused(served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    body = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    for method, path, status, allow in (
        ("POST", "/nowhere", 404, None),
        ("POST", "/health", 405, "GET"),
        ("HEAD", "/health", 405, "GET"),
        ("PUT", "/recommend?now", 405, "POST"),
        ("POST", "/recommend", 400, None),
    ):
        connection.request(method, path, None if method == "HEAD" else body)
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Allow"]) == (status, allow)
        answer.read()
        connection.request("GET", "/health?why=not")
        answer = connection.getresponse()
        assert answer.status == 200 and json.loads(answer.read()) == {"status": "ok"}
    connection.close()


def test_an_answer_to_head_has_no_body(served):
    with socket.create_connection(("127.0.0.1", served.port), 10) as raw:
        raw.sendall(b"HEAD /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        said = b"".join(iter(lambda: raw.recv(1 << 16), b""))
    assert said.startswith(b"HTTP/1.1 405 ") and said.endswith(b"\r\n\r\n")


def test_a_server_that_stops_says_so_and_keeps_no_connection(service):
    stopping = Server("127.0.0.1", 0, service)
    threading.Thread(target=stopping.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", stopping.server_address[1], timeout=10)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    assert answer.read() and answer.status == 200 and answer.headers["Connection"] is None
    stopping.is_stopping.set()
    connection.request("GET", "/health")
    answer = connection.getresponse()
    assert json.loads(answer.read()) == {"status": "stopping"} and answer.status == 503
    assert answer.headers["Connection"] == "close"
    stopping.stop()


def test_metrics_count_what_took_so_long_and_name_no_path_but_ours(served, service):
    measured = Measured()
    for path, seconds in (("/recommend", 0.02), ("/recommend", 0.3), ("/recommend", 9.0), ("/health", 0.02)):
        measured.note(path, 200, seconds)
    text = measured.text(service)
    for edge, count in ((0.01, 0), (0.025, 1), (0.25, 1), (0.5, 2), (2.5, 2), ("+Inf", 3)):
        assert f'trec_twotower_recommend_seconds_bucket{{le="{edge}"}} {count}\n' in text
    assert "trec_twotower_recommend_seconds_count 3\n" in text and "recommend_seconds_sum 9.32" in text
    assert served.ask("GET", '/odd"path')[0] == 404
    metrics = served.ask("GET", "/metrics")[1]
    assert 'requests_total{path="other",status="404"}' in metrics and "odd" not in metrics


def test_numbers_that_json_has_no_word_for_are_told_as_null():
    from trec_twotower.serving.http_api import _json

    about = {"rating": float("nan"), "sizes": [1.5, float("inf")], "maker": {"since": -float("inf")}, "price": 2.5}
    text, _ = _json({"answers": [about], "day": date(2026, 1, 2)})
    told = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert told["answers"] == [{"rating": None, "sizes": [1.5, None], "maker": {"since": None}, "price": 2.5}]
    assert told["day"] == "2026-01-02"


def test_many_at_once_get_each_its_own(served, retriever):
    users = [f"user-{number}" for number in range(40)]
    expected = {answer.user_id: [item.item_id for item in answer.items] for answer in retriever.recommend(users, 5)}

    def ask(user: str) -> tuple[str, list[str]]:
        [answer] = served.recommend(users=[user], k=5)
        return answer["user_id"], ids(answer)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, users * 2))
    assert len(found) == 80 and all(expected[user] == items for user, items in found)
    metrics = served.ask("GET", "/metrics")[1]
    answered = re.findall(r'requests_total\{path="/recommend",status="200"\} (\d+)', metrics)
    assert int(answered[0]) >= 80 and "trec_twotower_recommend_seconds_count" in metrics


def test_a_new_index_is_taken_up_and_a_broken_one_is_not(served):
    index = served.run / "index"
    shutil.copytree(index, served.run / "next")
    index.rename(served.run / "old")
    (served.run / "next").rename(index)
    served.wait_for('reloads_total{outcome="done"} 1')
    manifest = (index / "manifest.json").read_text()
    (index / "manifest.json").write_text(manifest[:-20])
    served.wait_for('reloads_total{outcome="failed"} 1')
    assert served.recommend(users=["user-1"], k=1)
    (index / "manifest.json").write_text(manifest)
    served.wait_for('reloads_total{outcome="done"} 2')


def test_an_error_that_nobody_foresaw_leaves_what_is_served(served, tmp_path, monkeypatch, capsys):
    """And is no end to looking: the next try finds the new index."""
    run = tmp_path / "run"
    shutil.copytree(served.run, run)
    service = Service(run)
    expected = service.recommend({"users": ["user-1"]})
    (run / "index" / "manifest.json").touch()

    def failing(*_: Any, **__: Any) -> None:
        raise KeyError("metrics")

    with monkeypatch.context() as patch:
        patch.setattr(Retriever, "alone", failing)
        assert not service.reload()
    assert "went on with the old model: KeyError: 'metrics'" in capsys.readouterr().err
    assert service.reloads == {"failed": 1} and service.recommend({"users": ["user-1"]}) == expected
    assert service.reload() and service.reloads == {"failed": 1, "done": 1}
    assert not service.reload() and service.reloads == {"failed": 1, "done": 1}  # once is enough


def test_filters_and_groups_of_the_old_model_do_not_outlive_it(shop, tmp_path, write_dataset, shop_tables, cli):
    """The new model is of another catalogue: its items stand in the opposite order and have other colours."""
    items = shop_tables["items"]
    colours = [{"red": "black", "black": "red"}.get(each, each) for each in items["colour"].to_pylist()]
    turned = items.set_column(items.column_names.index("colour"), "colour", pa.array(colours)).take(
        list(range(39, -1, -1))
    )
    dataset = write_dataset(tmp_path / "turned", **{**shop_tables, "items": turned})
    run, new = tmp_path / "run", tmp_path / "new"
    for command in (
        ("train", shop.config, f"data.dataset={dataset}", f"run_dir={new}"),
        ("export", new),
        ("index", new),
    ):
        said = cli(*command)
        assert said.code == 0, said.err
    shutil.copytree(shop.run, run)
    service = Service(run)
    red = {"users": ["user-1"], "k": 40, "where": {"colour": ["red"]}}
    spread = {"users": ["user-1"], "k": 8, "most": {"column": "colour", "count": 2}}
    before = [service.recommend(red), service.recommend(spread)]
    run.rename(tmp_path / "old")
    new.rename(run)
    assert service.reload()
    after = [service.recommend(red), service.recommend(spread)]
    fresh = Service(run)
    assert after == [fresh.recommend(red), fresh.recommend(spread)] != before
    assert {item["item_id"].split("-")[0] for item in after[0]["answers"][0]["items"]} == {"black"}


def test_it_ends_at_sigterm_after_its_last_answer(served, cli):
    """The last test of the module: the server is gone behind it."""
    assert "Cannot listen" in cli("serve", served.run, "--port", served.port).mistake
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(served.recommend, users=[f"user-{number}" for number in range(80)] * 3, k=35)
        time.sleep(0.1)
        served.process.send_signal(signal.SIGTERM)
        assert len(last.result()) == 240
    assert served.process.wait(60) == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", served.port), 2)
