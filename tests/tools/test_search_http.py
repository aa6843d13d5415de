"""Search services, each played by a local server that speaks its wire format."""

import asyncio
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest

from rllib_arpo.errors import ConfigError, ToolError
from rllib_arpo.tools import search_http
from rllib_arpo.tools.search import Document, SearchBackend, SearchTool
from rllib_arpo.tools.search_http import HTTPSearch, search_backend

KEY = "s3cret-key"
ANSWERS: dict[str, Any] = {
    "serper": {
        "organic": [
            {
                "title": "Vifel &amp; co",
                "link": "http://a.test/1",
                "snippet": "44 high",
            },
            {"title": "Zepen", "link": "http://a.test/2", "snippet": "57 high"},
            {"title": "Fozul", "link": "http://a.test/3"},
        ]
    },
    "brave": {
        "web": {
            "results": [
                {
                    "title": "Vifel &amp; co",
                    "url": "http://a.test/1",
                    "description": "<strong>44</strong> high",
                },
                {"title": "Zepen", "url": "http://a.test/2", "description": "57 high"},
            ]
        }
    },
    "bing": {
        "webPages": {
            "value": [
                {"name": "Vifel & co", "url": "http://a.test/1", "snippet": "44 high"},
                {"name": "Zepen", "url": "http://a.test/2", "snippet": "57 high"},
            ]
        }
    },
    "searxng": {
        "results": [
            {"title": "Vifel & co", "url": "http://a.test/1", "content": "44 high"},
            {"title": "Zepen", "url": "http://a.test/2", "content": "57 high"},
        ]
    },
    "retrieval": {
        "result": [
            [
                {"document": {"contents": '"Vifel & co"\n44 high'}, "score": 2.5},
                {"document": {"contents": '"Zepen"\n57 high'}, "score": 1.0},
            ]
        ]
    },
}
NOTHING: dict[str, Any] = {
    "serper": {"organic": []},
    "brave": {"type": "search"},
    "bing": {"_type": "SearchResponse"},
    "searxng": {"results": []},
    "retrieval": {"result": [[]]},
}
KEY_HEADERS = {
    "serper": "X-API-KEY",
    "brave": "X-Subscription-Token",
    "bing": "Ocp-Apim-Subscription-Key",
}


class Asked(NamedTuple):
    method: str
    path: str
    params: dict[str, list[str]]
    headers: dict[str, str]
    body: Any


class Reply(NamedTuple):
    status: int = 200
    body: bytes = b"{}"
    headers: tuple[tuple[str, str], ...] = ()


class Server(ThreadingHTTPServer):
    """Answers with `reply`, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[Asked] = []
        self.reply: Callable[[Asked], Reply] = lambda asked: Reply()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of these tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/find"

    def answers(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.reply = lambda asked: Reply(body=body)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        asked = Asked(
            self.command,
            address.path,
            parse_qs(address.query),
            dict(self.headers),
            json.loads(self.rfile.read(length)) if length else None,
        )
        self.server.asked.append(asked)
        reply = self.server.reply(asked)
        self.send_response(reply.status)
        self.send_header("Content-Length", str(len(reply.body)))
        for header in reply.headers:
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(reply.body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def keys(monkeypatch) -> None:
    for name in ("SERPER_API_KEY", "BRAVE_API_KEY", "BING_API_KEY"):
        monkeypatch.setenv(name, KEY)
    search_http._logged.clear()


def ask(backend: HTTPSearch, query: str = "height of vifel", top_k: int = 2) -> Any:
    return asyncio.run(backend.search(query, top_k))


def failing(backend: HTTPSearch) -> ToolError:
    with pytest.raises(ToolError) as caught:
        ask(backend)
    assert KEY not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", ANSWERS)
def test_a_service_gives_documents(name, server):
    server.answers(ANSWERS[name])
    backend = search_backend(name, endpoint=server.url)
    assert isinstance(backend, SearchBackend)
    url = ("", "") if name == "retrieval" else ("http://a.test/1", "http://a.test/2")
    assert ask(backend) == [
        Document("44 high", "Vifel & co", url[0]),
        Document("57 high", "Zepen", url[1]),
    ]


@pytest.mark.parametrize("name", ANSWERS)
def test_finding_nothing_is_no_failure(name, server):
    server.answers(NOTHING[name])
    backend = search_backend(name, endpoint=server.url)
    assert ask(backend) == []
    tool = SearchTool(backend)
    assert asyncio.run(tool.call("vifel")) == "No results."


@pytest.mark.parametrize(
    ("name", "method", "params", "body"),
    [
        ("serper", "POST", {}, {"q": "a b", "num": 2, "gl": "us", "hl": "en"}),
        (
            "brave",
            "GET",
            {"q": ["a b"], "count": ["2"], "country": ["us"], "search_lang": ["en"]},
            None,
        ),
        ("bing", "GET", {"q": ["a b"], "count": ["2"], "mkt": ["en-US"]}, None),
        (
            "searxng",
            "GET",
            {"q": ["a b"], "format": ["json"], "language": ["en"]},
            None,
        ),
        (
            "retrieval",
            "POST",
            {},
            {"queries": ["a b"], "topk": 2, "return_scores": True},
        ),
    ],
)
def test_a_service_is_asked_in_its_own_way(name, method, params, body, server):
    server.answers(ANSWERS[name])
    backend = search_backend(name, endpoint=server.url, country="us", language="en")
    ask(backend, "a b")
    (asked,) = server.asked
    assert (asked.method, asked.path) == (method, "/find")
    assert (asked.params, asked.body) == (params, body)
    if name in KEY_HEADERS:
        assert asked.headers[KEY_HEADERS[name]] == KEY
    else:
        assert KEY not in str(asked.headers)


def test_no_more_documents_than_were_asked_for(server):
    server.answers(ANSWERS["serper"])
    backend = search_backend("serper", endpoint=server.url)
    assert [len(ask(backend, top_k=k)) for k in (1, 2, 5)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(500), "status 500"),
        (Reply(503, b"<html>"), "status 503"),
        (Reply(302, headers=(("Location", "http://127.0.0.1:1/"),)), "status 302"),
        (Reply(401), "it cannot be used"),
        (Reply(403), "it cannot be used"),
        (Reply(429, headers=(("Retry-After", "0"),)), "it is busy"),
        (Reply(200, b"<html>"), "its answer is no JSON"),
        (Reply(200, b"[]"), "its answer has another shape"),
        (Reply(200, b'{"organic": [3]}'), "its answer has another shape"),
        (Reply(200, b'"' + b"a" * (4 << 20) + b'"'), "its answer is too large"),
    ],
)
def test_what_is_the_services_fault_may_be_tried_again(reply, reason, server):
    server.reply = lambda asked: reply
    error = failing(search_backend("serper", endpoint=server.url))
    assert error.retryable
    assert reason in str(error)
    assert len(server.asked) == 1  # the environment retries, not the backend


def test_a_query_that_is_refused_is_the_models_fault(server):
    server.reply = lambda asked: Reply(400)
    error = failing(search_backend("serper", endpoint=server.url))
    assert not error.retryable
    assert "refuses the query" in str(error)


def test_a_service_that_is_not_there_may_be_tried_again(server):
    endpoint = server.url
    server.server_close()
    error = failing(search_backend("serper", endpoint=endpoint))
    assert error.retryable
    assert "cannot be reached" in str(error)


def test_a_service_that_never_answers_is_given_up_on(server):
    opened = threading.Event()

    def reply(asked: Asked) -> Reply:
        opened.wait()
        return Reply()

    server.reply = reply
    error = failing(search_backend("serper", endpoint=server.url, timeout_s=0.2))
    opened.set()
    assert error.retryable
    assert "took too long" in str(error)


def test_a_refused_key_is_logged_once_with_its_variable(server, caplog):
    server.reply = lambda asked: Reply(403)
    backend = search_backend("serper", endpoint=server.url)
    failing(backend)
    failing(backend)
    (record,) = caplog.records
    assert "SERPER_API_KEY" in record.getMessage()
    assert KEY not in caplog.text


def test_a_busy_service_is_left_alone_for_as_long_as_it_says(server):
    server.reply = lambda asked: Reply(429, headers=(("Retry-After", "30"),))
    backend = search_backend("serper", endpoint=server.url)

    async def twice() -> None:
        with pytest.raises(ToolError, match="busy"):
            await backend.search("a", 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(backend.search("b", 1), timeout=0.2)

    asyncio.run(twice())
    assert len(server.asked) == 1


def test_no_more_requests_at_once_than_allowed(server):
    flying, most = 0, 0
    lock = threading.Lock()
    all_in = threading.Barrier(2, timeout=20)

    def reply(asked: Asked) -> Reply:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        all_in.wait()  # two at a time get here, or the test fails
        with lock:
            flying -= 1
        return Reply(body=json.dumps(ANSWERS["serper"]).encode())

    server.reply = reply
    backend = search_backend("serper", endpoint=server.url, max_concurrent=2)

    async def many() -> None:
        await asyncio.gather(*(backend.search(str(i), 1) for i in range(8)))

    asyncio.run(many())
    assert len(server.asked) == 8
    assert most == 2


def test_no_more_requests_a_second_than_allowed(server):
    server.answers(ANSWERS["serper"])
    backend = search_backend("serper", endpoint=server.url, max_per_s=0.01)

    async def two() -> None:
        await backend.search("a", 1)
        with pytest.raises(TimeoutError):  # its turn comes 100 s later
            await asyncio.wait_for(backend.search("b", 1), timeout=0.2)

    asyncio.run(two())
    assert len(server.asked) == 1


def test_a_key_is_in_no_pickle_no_text_and_no_version(server):
    backend = search_backend("serper", endpoint=server.url)
    assert KEY.encode() not in pickle.dumps(backend)
    assert KEY not in repr(backend) + backend.version


def test_a_copy_in_another_process_reads_its_own_key(server, monkeypatch):
    server.answers(ANSWERS["serper"])
    backend = search_backend("serper", endpoint=server.url)
    ask(backend)
    copy = pickle.loads(pickle.dumps(backend))
    monkeypatch.setenv("SERPER_API_KEY", "another")
    ask(copy)
    keys = [asked.headers["X-API-KEY"] for asked in server.asked]
    assert keys == [KEY, "another"]


def test_a_missing_key_is_told_before_work_starts(monkeypatch):
    monkeypatch.delenv("BRAVE_API_KEY")
    with pytest.raises(ConfigError, match="BRAVE_API_KEY"):
        search_backend("brave")
    monkeypatch.setenv("MY_KEY", KEY)
    search_backend("brave", key_from="MY_KEY")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("google", {}, r"`search` \('google'\) must be one of \['serper', 'brave'"),
        ("searxng", {}, "needs `endpoint`"),
        ("serper", {"endpoint": "ftp://a.test"}, "begins with http"),
        ("serper", {"timeout_s": 0}, "`timeout_s`"),
        ("serper", {"max_per_s": -1}, "`max_per_s`"),
        ("serper", {"speed": 3}, "settings of search backend 'serper': .*speed"),
    ],
)
def test_a_wrong_setting_is_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        search_backend(name, **settings)


def test_the_version_tells_places_and_languages_apart(server):
    def version(**settings: str) -> str:
        return search_backend("searxng", **settings).version

    versions = {
        version(endpoint=server.url),
        version(endpoint=server.url, language="de"),
        version(endpoint="http://user:word@b.test/search"),
        version(endpoint="http://b.test/search"),
    }
    assert len(versions) == 3
    assert "word" not in str(versions)


def test_proxies_of_the_environment_are_used_when_asked_only(server, monkeypatch):
    server.answers(ANSWERS["searxng"])
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    elsewhere = "http://192.0.2.1:9/search"  # reserved: nobody is there
    asked = search_backend("searxng", endpoint=elsewhere, trust_env=True)
    assert len(ask(asked)) == 2
    assert len(server.asked) == 1
    ask(search_backend("searxng", endpoint=server.url))
    assert server.asked[1].path == "/find"
