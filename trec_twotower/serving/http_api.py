"""The Retriever over HTTP: JSON in and out, on threads of the standard library.

POST /recommend   {"users": [ID, ...]} or {"states": [{COLUMN: VALUE, ...}, ...]}, and any of
                  "k": 10, "history": 0 (the number of newest seen items to return),
                  "where": {COLUMN: [VALUE, ...]}, "only": [ITEM, ...], "without": [ITEM, ...],
                  "boost": [{"where": {COLUMN: [VALUE, ...]}, "score": 0.1}, ...],
                  "most": {"column": COLUMN, "count": 2} (items that agree in it)
GET  /health      {"status": "ok"}; 503 while the server stops
GET  /version     what is served
GET  /metrics     counts and latencies, as Prometheus reads them

A request that cannot be answered gets {"error": what is wrong and how to fix it}; so does, among several users, the
entry of an unknown one. A new model or index in the run folder replaces the old one without a pause. Searches follow
each other, since torch and FAISS use all cores for one.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trec_twotower.data.arrow_types import one_chunk
from trec_twotower.errors import ConfigError, DataError, nearest
from trec_twotower.index import Allowed, mask_of
from trec_twotower.serving.business_rules import Rules
from trec_twotower.serving.retriever import Recommendations, Retriever
from trec_twotower.storage.manifest import MANIFEST

MAX_BODY_BYTES = 1 << 20
MAX_USERS = 256  # of one request
KEPT_FILTERS = 64  # a filter is a mask of the catalogue, made once
IDLE_S = 30  # an idle connection is closed after this time
STOP_S = 20  # for requests in progress when the server is stopped
LATENCIES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
ROUTES = {"/recommend": "POST", "/health": "GET", "/version": "GET", "/metrics": "GET"}
ASKS = ("users", "states", "k", "history", "where", "only", "without", "boost", "most")


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Service:
    """Answers requests, as plain values, from the newest model and index of a run folder."""

    def __init__(self, run_dir: Path, checkpoint: str = "best", max_k: int = 1000, mapped: bool = False) -> None:
        self.run_dir, self.checkpoint, self.max_k, self.mapped = run_dir, checkpoint, max_k, mapped
        self._lock = threading.Lock()
        self._mark = self._marked()
        self._use(Retriever.alone(run_dir, checkpoint, mapped=mapped))
        self.reloads = Counter[str]()

    def _use(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self._filters: OrderedDict[str, Allowed] = OrderedDict()
        self._groups: dict[str, np.ndarray] = {}

    def _marked(self) -> tuple[int, int] | None:
        """Return a value that changes when the index is replaced; None without an index."""
        try:
            stat = (self.run_dir / "index" / MANIFEST).stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_ino

    def reload(self) -> bool:
        """Take up what has been published since; whether there was anything. A misfit leaves what is served."""
        try:
            mark = self._marked()
            if mark is None or mark == self._mark:  # None: between two publications
                return False
            retriever = Retriever.alone(self.run_dir, self.checkpoint, mapped=self.mapped)
        except Exception as error:  # between two publications, or any mistake: what comes later may be right
            self.reloads["failed"] += 1
            is_foreseen = isinstance(error, ConfigError | DataError | OSError)
            why = str(error) if is_foreseen else f"{type(error).__name__}: {error}"
            print(f"trec-twotower serve: went on with the old model: {why}", file=sys.stderr, flush=True)
            return False
        with self._lock:
            self._use(retriever)
        self._mark = mark
        self.reloads["done"] += 1
        return True

    def version(self) -> dict[str, Any]:
        loaded = self._retriever.loaded
        return {
            "model_version": loaded.version,
            "step": loaded.step,
            "items": len(self._retriever.index),
            "dim": loaded.run.config.model.vector_dim,
            "similarity": loaded.run.config.model.similarity,
        }

    def recommend(self, asked: Any) -> dict[str, Any]:
        """Return the response to a request's JSON. Raises Refused, ConfigError or DataError."""
        if not isinstance(asked, dict):
            raise Refused(400, 'The body must be a JSON object, such as {"users": [1], "k": 10}.')
        for name in asked:
            if name not in ASKS:
                raise Refused(400, f"The request has {name!r}{nearest(name, ASKS)}.")
        if ("users" in asked) == ("states" in asked):
            raise Refused(400, 'Give either "users", a list of ids, or "states", a list of objects.')
        side = "users" if "users" in asked else "states"
        wanted = asked[side]
        kinds: tuple[type, ...] = (int, str) if side == "users" else (dict,)
        if not isinstance(wanted, list) or not wanted or not all(type(each) in kinds for each in wanted):
            what = "ids: integers or strings" if side == "users" else 'objects such as {"history": [1, 2]}'
            raise Refused(400, f'"{side}" must be a list of {what}, at least one.')
        if len(wanted) > MAX_USERS:
            raise Refused(
                413, f'"{side}" has {len(wanted):,} entries, but a request may have {MAX_USERS}: send several.'
            )
        k, history = _count(asked, "k", 10, 1, self.max_k), _count(asked, "history", 0, 0, 1000)
        with self._lock:
            allowed, rules = self._allowed(asked), self._rules(asked)
            ask = self._retriever.recommend if side == "users" else self._retriever.recommend_now
            k = min(k, len(self._retriever.index))
            answers = ask(wanted, k, allowed=allowed, rules=rules, history_shown=history)
            version = self._retriever.loaded.version
        if len(answers) == 1 and answers[0].error is not None:
            raise Refused(404, answers[0].error)
        return {"model_version": version, "answers": [_told(answer) for answer in answers]}

    def _allowed(self, asked: Mapping[str, Any]) -> Allowed | None:
        given = {name: asked[name] for name in ("where", "only", "without") if asked.get(name) is not None}
        if not given:
            return None
        _check_where(given.get("where", {}), '"where"')
        for name in ("only", "without"):
            _check_values(given.get(name, []), f'"{name}"')
        label = json.dumps(given, sort_keys=True)
        if label not in self._filters:
            self._filters[label] = self._retriever.allow(**given)
            if len(self._filters) > KEPT_FILTERS:
                self._filters.popitem(last=False)
        self._filters.move_to_end(label)
        return self._filters[label]

    def _rules(self, asked: Mapping[str, Any]) -> Rules | None:
        boosts, most = asked.get("boost"), asked.get("most")
        if boosts is None and most is None:
            return None
        boost_I = group_I = count = None
        if boosts is not None:
            boost_I = np.zeros(len(self._retriever.loaded.sources.catalogue), np.float32)
            is_right = isinstance(boosts, list) and all(
                isinstance(each, dict) and set(each) == {"where", "score"} and _is_number(each["score"])
                for each in boosts
            )
            if not is_right:
                raise Refused(400, '"boost" must be a list of {"where": {COLUMN: [VALUE, ...]}, "score": NUMBER}.')
            for each in boosts:
                _check_where(each["where"], 'the "where" of "boost"')
                is_meant_I = np.ones(len(boost_I), bool)
                for column, values in each["where"].items():
                    is_meant_I &= mask_of(self._column(column), values, column)
                boost_I[is_meant_I] += each["score"]
        if most is not None:
            if not isinstance(most, dict) or set(most) != {"column", "count"} or not isinstance(most["column"], str):
                raise Refused(400, '"most" must be {"column": COLUMN, "count": NUMBER}.')
            count = _count(most, "count", 1, 1, 1 << 30)
            group_I = self._group(most["column"])
        return Rules(boost_I=boost_I, group_I=group_I, max_per_group=count)

    def _column(self, column: str) -> pa.Array:
        split = self._retriever.loaded.sources.catalogue.split
        if column not in split.columns:
            raise ConfigError(f"The catalogue has no column {column!r}{nearest(column, split.columns)}.")
        return one_chunk(split.table([column])[column])

    def _group(self, column: str) -> np.ndarray:
        """Return the group of each item by the value of the column; -1 for null."""
        if column not in self._groups:
            array = self._column(column)
            if pa.types.is_nested(array.type):
                raise ConfigError(f'"most" wants a column with one value an item, but {column!r} is {array.type}.')
            if not pa.types.is_dictionary(array.type):
                array = pc.dictionary_encode(array)
            self._groups[column] = array.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        return self._groups[column]


def _count(asked: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = asked.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise Refused(400, f'"{name}" is {json.dumps(value)}: give a whole number from {least:,} to {most:,}.')
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _check_where(where: Any, what: str) -> None:
    if not isinstance(where, dict):
        raise Refused(400, f"{what} must be an object such as {{COLUMN: [VALUE, ...]}}.")
    for column, values in where.items():
        _check_values(values, f"{what} of {column!r}")


def _check_values(values: Any, what: str) -> None:
    if (
        not isinstance(values, Sequence)
        or isinstance(values, str)
        or not all(type(value) in (int, float, str, bool) for value in values)
    ):
        raise Refused(400, f"{what} must be a list of numbers or strings.")


def _told(answer: Recommendations) -> dict[str, Any]:
    items = [{"item_id": item.item_id, "score": item.score, "about": item.about} for item in answer.items]
    error = {} if answer.error is None else {"error": answer.error}
    return {"user_id": answer.user_id, "items": items, "history": answer.history, **error}


class Measured:
    """Request counts by path and status, and latencies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: Counter[tuple[str, int]] = Counter()
        self._within: Counter[float] = Counter()
        self._seconds, self._count = 0.0, 0

    def note(self, path: str, status: int, seconds: float) -> None:
        with self._lock:
            self._answers[path if path in ROUTES else "other", status] += 1
            if path == "/recommend":
                self._within.update(edge for edge in LATENCIES_S if seconds <= edge)
                self._seconds += seconds
                self._count += 1

    def text(self, service: Service) -> str:
        with self._lock:
            lines = ["# TYPE trec_twotower_requests_total counter"]
            lines += [
                f'trec_twotower_requests_total{{path="{path}",status="{status}"}} {count}'
                for (path, status), count in sorted(self._answers.items())
            ]
            name = "trec_twotower_recommend_seconds"
            lines.append(f"# TYPE {name} histogram")
            lines += [f'{name}_bucket{{le="{edge}"}} {self._within[edge]}' for edge in LATENCIES_S]
            lines += [f'{name}_bucket{{le="+Inf"}} {self._count}', f"{name}_sum {self._seconds:.6f}"]
            lines.append(f"{name}_count {self._count}")
        lines.append("# TYPE trec_twotower_reloads_total counter")
        lines += [
            f'trec_twotower_reloads_total{{outcome="{outcome}"}} {service.reloads[outcome]}'
            for outcome in ("done", "failed")
        ]
        version = service.version()
        lines.append("# TYPE trec_twotower_model gauge")
        lines.append(f'trec_twotower_model{{version="{version["model_version"]}",step="{version["step"]}"}} 1')
        return "\n".join(lines) + "\n"


class Server(ThreadingHTTPServer):
    """A thread a connection; `stop` lets the requests under way end."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, service: Service) -> None:
        super().__init__((host, port), _Handler)
        self.service, self.measured = service, Measured()
        self.is_stopping = threading.Event()
        self._busy = threading.Condition()
        self._under_way = 0

    def begin(self) -> None:
        with self._busy:
            self._under_way += 1

    def end(self) -> None:
        with self._busy:
            self._under_way -= 1
            self._busy.notify_all()

    def stop(self) -> None:
        """Take no more connections; returns when the requests under way are answered, or after STOP_S."""
        self.is_stopping.set()
        self.shutdown()
        with self._busy:
            self._busy.wait_for(lambda: not self._under_way, STOP_S)
        self.server_close()

    def watch(self, every_s: float) -> None:
        """Look for a new index from time to time, until the server stops."""
        while not self.is_stopping.wait(every_s):
            if self.service.reload():
                print(f"trec-twotower serve: loaded model {self.service.version()['model_version']}", flush=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect in the middle of a request."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    wbufsize = 1 << 16  # head and body leave together: apart, the second waits 40 ms for the client's delayed ACK
    disable_nagle_algorithm = True
    server: Server

    def version_string(self) -> str:
        return "trec-twotower"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: /metrics has the counts."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    do_PUT = do_DELETE = do_PATCH = do_HEAD = do_POST

    def _answer(self) -> None:
        start, path = time.perf_counter(), self.path.partition("?")[0]
        self.server.begin()
        try:
            status, body, kind = self._made(path)
            payload = body.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(payload)))
            if status == 405:
                self.send_header("Allow", ROUTES[path])
            if self.server.is_stopping.is_set() or status in (411, 413):  # what is left of a body is not read
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(payload)
            self.wfile.flush()
            self.server.measured.note(path, status, time.perf_counter() - start)
        finally:
            self.server.end()

    def _made(self, path: str) -> tuple[int, str, str]:
        """Return status, body and content type."""
        try:
            content = self._content()  # read in any case, or the next request would begin in it
            if path not in ROUTES:
                raise Refused(404, f"There is no {path}{nearest(path, ROUTES)}.")
            if self.command != ROUTES[path]:
                raise Refused(405, f"{path} wants {ROUTES[path]}, not {self.command}.")
            if path == "/metrics":
                return 200, self.server.measured.text(self.server.service), "text/plain; version=0.0.4"
            if path == "/health":
                is_stopping = self.server.is_stopping.is_set()
                return (503 if is_stopping else 200), *_json({"status": "stopping" if is_stopping else "ok"})
            if path == "/version":
                return 200, *_json(self.server.service.version())
            try:
                asked = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise Refused(400, f"The body is no JSON ({error}).") from None
            return 200, *_json(self.server.service.recommend(asked))
        except Refused as refused:
            return refused.status, *_json({"error": str(refused)})
        except (ConfigError, DataError) as error:
            return 400, *_json({"error": str(error)})
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            traceback.print_exc()
            return 500, *_json({"error": "This is a fault of the server: its log has the traceback."})

    def _content(self) -> bytes:
        lengths = self.headers.get_all("Content-Length", [])
        if (
            "Transfer-Encoding" in self.headers or len(lengths) > 1
        ):  # a parser that accepts another end would see a request there
            raise Refused(411, "Send the body in one piece, with one Content-Length and no Transfer-Encoding.")
        if not lengths:
            if self.command == "POST":
                raise Refused(411, "Send the body's Content-Length.")
            return b""
        [length] = lengths
        if not length.isdecimal() or len(length) > 20 or int(length) > MAX_BODY_BYTES:  # int() has its limit, too
            raise Refused(413, f"Content-Length is {length[:30]}, but a body may have {MAX_BODY_BYTES:,} bytes.")
        return self.rfile.read(int(length))


def _json(value: Any) -> tuple[str, str]:
    try:
        text = json.dumps(value, default=str, allow_nan=False)
    except ValueError:  # a catalogue's NaN or infinity, for which JSON has no word
        text = json.dumps(_without_nan(value), default=str, allow_nan=False)
    return text + "\n", "application/json"


def _without_nan(value: Any) -> Any:
    """Return the value with null in place of NaN and infinity."""
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def serve(
    run_dir: Path, host: str, port: int, *, checkpoint: str, max_k: int, reload_s: float, mapped: bool = False
) -> None:
    """Answer until SIGTERM or Ctrl-C; raises ConfigError if the port is in use or the run is not ready."""
    service = Service(run_dir, checkpoint, max_k, mapped)
    try:
        server = Server(host, port, service)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"Cannot listen on {host}:{port} ({error}): choose another --host or --port.") from None
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    threads = [threading.Thread(target=server.serve_forever, daemon=True)]
    if reload_s:
        threads.append(threading.Thread(target=server.watch, args=(reload_s,), daemon=True))
    for thread in threads:
        thread.start()
    version = service.version()
    print(
        f"Serving model {version['model_version']} with {version['items']:,} items on "
        f"http://{host}:{server.server_address[1]}",
        flush=True,
    )
    told.wait()
    server.stop()
