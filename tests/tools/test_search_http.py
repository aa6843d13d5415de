import asyncio
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rllib_arpo
from rllib_arpo.errors import ConfigError, ToolError
from rllib_arpo.tools.cache import CachedSearch, ToolCache
from rllib_arpo.tools.pace import Pace, pace_of
from rllib_arpo.tools.search import Document, SearchBackend, SearchTool
from rllib_arpo.tools.search_http import APIS, HttpSearch, search_backend
from tests.http_server import HttpServer, Reply, Request

KEY = "s3cret-key"
KEYS = {"serper": "SERPER_API_KEY", "brave": "BRAVE_API_KEY", "bing": "BING_API_KEY"}

SERPER = {
    "searchParameters": {"q": "q"},
    "answerBox": {"title": "Height", "answer": "330 m", "link": "https://a.org"},
    "knowledgeGraph": {
        "title": "Eiffel Tower",
        "type": "Tower",
        "description": "A tower in Paris.",
        "descriptionLink": "https://k.org",
    },
    "organic": [
        {"title": "One", "link": "https://1.org", "snippet": "first", "position": 1},
        {"title": "Two", "link": "https://2.org", "position": 2},
    ],
}
BRAVE = {
    "type": "search",
    "web": {
        "results": [
            {"title": "A &amp; B", "url": "https://1.org", "description": "it&#x27;s"},
            {"title": "Two", "url": "https://2.org", "description": "second"},
        ]
    },
}
BING = {
    "_type": "SearchResponse",
    "webPages": {
        "value": [
            {"name": "One", "url": "https://1.org", "snippet": "first"},
            {"name": "Two", "url": "https://2.org", "snippet": "second"},
        ]
    },
}
SEARXNG = {
    "query": "q",
    "results": [
        {"title": "One", "url": "https://1.org", "content": "first", "engine": "x"},
        {"title": "Two", "url": "https://2.org", "content": None, "engine": "y"},
    ],
    "unresponsive_engines": [["z", "timeout"]],
}
RETRIEVAL = {
    "result": [
        [
            {"document": {"id": "1", "contents": '"One"\nfirst\nline'}, "score": 0.9},
            {"document": {"id": "2", "contents": "no title"}, "score": 0.5},
        ]
    ]
}
ANSWERS = {
    "serper": SERPER,
    "brave": BRAVE,
    "bing": BING,
    "searxng": SEARXNG,
    "retrieval": RETRIEVAL,
}
NOTHING = {
    "serper": {"searchParameters": {"q": "q"}, "organic": []},
    "brave": {"type": "search", "query": {"original": "q"}},
    "bing": {"_type": "SearchResponse"},
    "searxng": {"query": "q", "results": [], "unresponsive_engines": []},
    "retrieval": {"result": [[]]},
}
every_service = pytest.mark.parametrize("name", list(ANSWERS))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in KEYS.values():
        monkeypatch.setenv(variable, KEY)
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    yield
    pace_of.cache_clear()  # the next server may listen where one is left alone


def answering(answer: Any, **reply: Any) -> HttpServer:
    return HttpServer(lambda request: Reply(json=answer, **reply))


def backend(name: str, server: HttpServer, **settings: Any) -> HttpSearch:
    return search_backend(name, endpoint=server.url("/search"), **settings)


def found(search: SearchBackend, query: str = "q", top_k: int = 5) -> list[Document]:
    return list(asyncio.run(search.search(query, top_k)))


def failure(search: SearchBackend, query: str = "q") -> ToolError:
    with pytest.raises(ToolError) as raised:
        found(search, query)
    return raised.value


def asked(name: str, query: str, top_k: int, **settings: Any) -> Request:
    """What a service is sent."""
    with answering(ANSWERS[name]) as server:
        found(backend(name, server, **settings), query, top_k)
    (request,) = server.requests
    assert request.path == "/search"
    return request


def test_serper_is_asked_in_its_format():
    request = asked("serper", "café?", 3, country="fr", language="fr")
    assert request.method == "POST"
    assert request.headers["x-api-key"] == KEY
    assert request.headers["content-type"] == "application/json"
    assert request.json == {"q": "café?", "num": 3, "gl": "fr", "hl": "fr"}


def test_brave_is_asked_in_its_format():
    request = asked("brave", "café?", 30, country="fr", language="fr")
    assert request.method == "GET"
    assert request.headers["x-subscription-token"] == KEY
    assert request.headers["accept"] == "application/json"
    assert request.params == {
        "q": "café?",
        "count": "20",
        "country": "FR",
        "search_lang": "fr",
        "safesearch": "moderate",
        "text_decorations": "false",
        "result_filter": "web",
    }


def test_bing_is_asked_in_its_format():
    request = asked("bing", "café?", 3, market="fr-FR", safesearch="")
    assert request.method == "GET"
    assert request.headers["ocp-apim-subscription-key"] == KEY
    assert request.params == {
        "q": "café?",
        "count": "3",
        "mkt": "fr-FR",
        "responseFilter": "Webpages",
        "textFormat": "Raw",
    }


def test_searxng_is_asked_in_its_format(monkeypatch):
    monkeypatch.setenv("SEARXNG_AUTHORIZATION", "Basic dTpw")
    request = asked(
        "searxng",
        "café?",
        3,
        language="fr",
        engines="wikipedia",
        key_variable="SEARXNG_AUTHORIZATION",
    )
    assert request.method == "GET"
    assert request.headers["authorization"] == "Basic dTpw"
    assert request.params == {
        "q": "café?",
        "format": "json",
        "language": "fr",
        "engines": "wikipedia",
        "safesearch": "1",
    }


def test_a_retrieval_server_is_asked_in_its_format():
    request = asked("retrieval", "café?", 3)
    assert request.method == "POST"
    assert "authorization" not in request.headers
    assert request.json == {"queries": ["café?"], "topk": 3, "return_scores": True}


DOCUMENTS = {
    "serper": [
        Document("330 m", "Height", "https://a.org"),
        Document("A tower in Paris.", "Eiffel Tower", "https://k.org"),
        Document("first", "One", "https://1.org"),
        Document("", "Two", "https://2.org"),
    ],
    "brave": [
        Document("it's", "A & B", "https://1.org"),
        Document("second", "Two", "https://2.org"),
    ],
    "bing": [
        Document("first", "One", "https://1.org"),
        Document("second", "Two", "https://2.org"),
    ],
    "searxng": [
        Document("first", "One", "https://1.org"),
        Document("", "Two", "https://2.org"),
    ],
    "retrieval": [Document("first\nline", "One"), Document("no title")],
}


@every_service
def test_what_a_service_found_becomes_documents(name):
    with answering(ANSWERS[name]) as server:
        search = backend(name, server)
        assert found(search) == DOCUMENTS[name]
        assert found(search, top_k=1) == DOCUMENTS[name][:1]
    assert isinstance(search, SearchBackend)
    assert search.name == name


@every_service
def test_a_query_without_results_is_no_failure(name):
    with answering(NOTHING[name]) as server:
        assert found(backend(name, server)) == []
        tool = SearchTool(backend(name, server))
        assert asyncio.run(tool.call("q")) == "No results."


@every_service
@pytest.mark.parametrize(
    "body",
    [
        b"<html>Bad gateway</html>",
        b"",
        b"\xff\xfe",
        b"null",
        b"[1, 2]",
        b"[" * 100_000,
        b'{"organic": 1, "web": 1, "webPages": 1, "results": 1, "result": 1}',
        b'{"organic": [1], "web": {"results": [1]}, "webPages": {"value": [1]},'
        b' "results": [1], "result": [[1]]}',
        b'{"organic": {"a": 1}, "web": {"results": {"a": 1}}, "results": {"a": 1},'
        b' "webPages": {"value": {"a": 1}}, "result": [[{"document": {}}]]}',
    ],
)
def test_an_answer_that_cannot_be_read_is_the_service_s_failure(name, body):
    with answering(None, body=body) as server:
        error = failure(backend(name, server))
    assert error.retryable
    assert "cannot be read" in str(error)


@every_service
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_service_in_trouble_is_worth_another_try_which_the_environment_makes(
    name, status
):
    with answering({"error": "trouble"}, status=status) as server:
        error = failure(backend(name, server))
    assert error.retryable
    assert f"HTTP {status}" in str(error)
    assert len(server.requests) == 1


@every_service
@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_refused_key_is_no_fault_of_the_query(name, status):
    with answering({"message": "no"}, status=status) as server:
        search = backend(name, server)
        with pytest.raises(ConfigError, match=f"HTTP {status}") as raised:
            found(search)
    assert KEYS.get(name, "key_variable") in str(raised.value)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "status", "answer"),
    [
        ("serper", 400, {"message": "Not enough credits", "statusCode": 400}),
        ("brave", 422, {"error": {"code": "SUBSCRIPTION_TOKEN_INVALID"}}),
    ],
)
def test_a_refused_key_is_known_by_its_text_too(name, status, answer):
    with answering(answer, status=status) as server:
        search = backend(name, server)
        with pytest.raises(ConfigError, match=KEYS[name]):
            found(search)


@pytest.mark.parametrize("status", [302, 404])
def test_an_endpoint_where_nothing_answers_is_a_wrong_setting(status):
    reply = Reply(status=status, headers={"Location": "/elsewhere"})
    with HttpServer(lambda request: reply) as server:
        search = backend("serper", server)
        with pytest.raises(ConfigError, match="`endpoint`"):
            found(search)
    assert [request.path for request in server.requests] == ["/search"]


def test_a_refused_query_is_its_own_fault_and_the_log_hides_the_key(caplog):
    answer = {"message": f"query too odd for {KEY}"}
    with answering(answer, status=422) as server:
        errors = [failure(backend("serper", server)) for _ in range(2)]
    assert not errors[0].retryable
    assert "too odd" not in str(errors[0])
    assert caplog.text.count("query too odd for ***") == 1
    assert KEY not in caplog.text


def test_a_query_that_brave_would_refuse_is_not_sent():
    with answering(BRAVE) as server:
        search = backend("brave", server)
        for query in ("x" * 401, "x " * 51):
            error = failure(search, query)
            assert "too long" in str(error)
            assert not error.retryable
    assert server.requests == []


def test_engines_that_do_not_answer_are_an_outage_not_an_empty_result():
    answer = {"results": [], "unresponsive_engines": [["google", "CAPTCHA"]]}
    with answering(answer) as server:
        assert failure(backend("searxng", server)).retryable


def test_a_service_that_is_too_slow_or_gone_is_worth_another_try():
    gate = threading.Event()

    def answer(request: Request) -> Reply:
        gate.wait(60)
        return Reply(json=SERPER)

    with HttpServer(answer) as server:
        slow = failure(backend("serper", server, timeout_s=0.1))
        gate.set()
        url = server.url()
    gone = failure(search_backend("serper", endpoint=url))
    with HttpServer(lambda request: None) as server:
        broken = failure(backend("serper", server))
    assert [error.retryable for error in (slow, gone, broken)] == [True] * 3
    assert "too long" in str(slow)
    assert "cannot be reached" in str(gone)
    assert "cannot be reached" in str(broken)


def test_an_answer_over_the_limit_is_refused():
    with answering(SERPER, body=b" " * 100_001) as server:
        error = failure(backend("serper", server, max_bytes=100_000))
    assert "too large" in str(error)
    assert error.retryable


def test_no_more_requests_are_made_at_once_than_allowed():
    running, most, lock = 0, 0, threading.Lock()
    two = threading.Barrier(2)

    def answer(request: Request) -> Reply:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        two.wait(30)
        with lock:
            running -= 1
        return Reply(json=SERPER)

    async def all_at_once() -> None:
        await asyncio.gather(*(search.search(str(n), 3) for n in range(8)))

    with HttpServer(answer) as server:
        search = backend("serper", server, max_concurrent=2)
        asyncio.run(all_at_once())
    assert most == 2
    assert len(server.requests) == 8
    assert server.num_connections == 2


def test_turns_are_evenly_spaced():
    pace = Pace(4.0)  # one each .25 s
    assert [pace.reserve(100.0) for _ in range(3)] == [0.0, 0.25, 0.5]
    assert pace.reserve(100.5) == 0.25
    assert pace.reserve(200.0) == 0.0
    assert [Pace(None).reserve(1.0) for _ in range(3)] == [0.0] * 3


def test_backends_of_one_service_share_a_pace():
    with answering(SERPER) as server:
        searches = [backend("serper", server, max_per_s=0.001) for _ in range(2)]
        found(searches[0])
        pace = pace_of(searches[1].api.endpoint, 0.001)
    assert pace.reserve(time.monotonic()) > 900


@pytest.mark.parametrize(
    ("retry_after", "at_least_s", "at_most_s"),
    [
        ("20", 10, 20),
        ("100000", 20, 30),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 20, 30),
        ("soon", 0, 0),
        ("-5", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
    ],
)
def test_a_service_is_left_alone_for_as_long_as_it_asks_within_limits(
    retry_after, at_least_s, at_most_s
):
    headers = {"Retry-After": retry_after}
    with answering({}, status=429, headers=headers) as server:
        search = backend("serper", server)
        failure(search)
    wait_s = pace_of(search.api.endpoint, None).reserve(time.monotonic())
    assert at_least_s <= wait_s <= at_most_s


ROOT = Path(__file__).parents[2]
# A process of its own: nothing that other tests have left open warns there.
CONNECTIONS = f"""
import sys, types
# The package without its __init__, which takes ten seconds and is not at stake.
package = sys.modules["rllib_arpo"] = types.ModuleType("rllib_arpo")
package.__path__ = [{str(Path(rllib_arpo.__file__).parent)!r}]
import asyncio, gc
from rllib_arpo.tools.search_http import search_backend
from tests.http_server import HttpServer, Reply

async def three():
    for query in "abc":
        await search.search(query, 3)

with HttpServer(lambda request: Reply(json={{"organic": []}})) as server:
    search = search_backend("serper", endpoint=server.url("/search"))
    asyncio.run(three())
    asyncio.run(three())
    print(server.num_connections)
gc.collect()
"""


def test_connections_are_kept_within_a_loop_and_closed_with_it():
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-c", CONNECTIONS],
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": ""},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_a_closed_backend_opens_again():
    async def twice() -> None:
        await search.search("a", 3)
        await search.aclose()
        await search.search("b", 3)

    with answering(SERPER) as server:
        search = backend("serper", server)
        asyncio.run(twice())
    assert server.num_connections == 2


@pytest.mark.parametrize("name", list(KEYS))
def test_a_missing_key_is_told_at_once_and_names_its_variable(name, monkeypatch):
    monkeypatch.delenv(KEYS[name])
    with pytest.raises(ConfigError, match=KEYS[name]):
        search_backend(name, endpoint="http://127.0.0.1:1/")
    later = search_backend(name, endpoint="http://127.0.0.1:1/", require_key=False)
    with pytest.raises(ConfigError, match=KEYS[name]):
        found(later)
    monkeypatch.setenv(KEYS[name], "geheim\nü")
    with pytest.raises(ConfigError, match=KEYS[name]) as raised:
        found(later)
    assert "geheim" not in str(raised.value)


@every_service
def test_a_key_is_nowhere_but_in_the_request(name, caplog):
    caplog.set_level(logging.DEBUG)
    with answering(ANSWERS[name]) as server:
        search = backend(name, server)
        found(search)
        copy = pickle.loads(pickle.dumps(search))
        assert found(copy) == DOCUMENTS[name]
    held = [repr(search), str(vars(search)), search.version, search.name, caplog.text]
    assert KEY not in " ".join(held)
    assert KEY.encode() not in pickle.dumps(search)
    assert all((KEY in str(r.headers)) == (name in KEYS) for r in server.requests)


def test_a_version_tells_settings_apart_that_change_what_is_found(monkeypatch):
    monkeypatch.setenv("OTHER_KEY", KEY)
    endpoint = "https://a.org/search"
    changes: list[dict[str, Any]] = [
        {},
        {"country": "fr"},
        {"language": "fr"},
        {"location": "Paris"},
        {"endpoint": "https://b.org/search"},
    ]
    versions = {
        search_backend("serper", **{"endpoint": endpoint, **change}).version
        for change in changes
    }
    assert len(versions) == len(changes)
    same = search_backend(
        "serper", endpoint=endpoint, key_variable="OTHER_KEY", timeout_s=1, max_per_s=1
    )
    assert same.version in versions


def test_a_replayed_search_needs_neither_a_network_nor_a_key(tmp_path, monkeypatch):
    file = tmp_path / "run.sqlite"
    with answering(SERPER) as server:
        search = backend("serper", server)
        recording = ToolCache(file, mode="record")
        first = found(CachedSearch(search, recording))
        recording.close()
    monkeypatch.delenv("SERPER_API_KEY")
    offline = search_backend("serper", endpoint=search.api.endpoint, require_key=False)
    replayed = CachedSearch(offline, ToolCache(file, mode="replay"))
    assert found(replayed) == first == DOCUMENTS["serper"]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("google", {}, "serper.*brave.*bing.*searxng.*retrieval"),
        ("serper", {"contry": "us"}, "contry.*country.*max_per_s"),
        ("searxng", {}, "needs `endpoint`"),
        ("bing", {}, "needs `endpoint`"),
        ("retrieval", {}, "needs `endpoint`"),
        ("serper", {"endpoint": "serper.dev"}, "`endpoint`"),
        ("serper", {"endpoint": "ftp://serper.dev/x"}, "`endpoint`"),
        ("serper", {"endpoint": "http://[bad/"}, "`endpoint`"),
        ("serper", {"endpoint": "https://u:s3cret@a.org/"}, "`endpoint`"),
        ("serper", {"endpoint": "https://a.org/?key=s3cret"}, "`endpoint`"),
        ("serper", {"timeout_s": 0}, "`timeout_s`"),
        ("serper", {"max_per_s": -1.0}, "`max_per_s`"),
        ("serper", {"max_concurrent": 0}, "`max_concurrent`"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message) as raised:
        search_backend(name, **settings)
    assert "s3cret" not in str(raised.value)


def test_every_service_is_tested():
    assert list(APIS) == list(ANSWERS)
