import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import httpx2
import pytest

from rllib_arpo.errors import ConfigError, EngineError
from rllib_arpo.serving import api_errors
from rllib_arpo.serving.access import hash_key
from rllib_arpo.serving.agent import Agent
from rllib_arpo.serving.engine_client import EngineLostError
from rllib_arpo.serving.http import make_http_app
from rllib_arpo.serving.http_server import CHAT_ERRORS
from rllib_arpo.serving.http_settings import HttpSettings
from rllib_arpo.serving.openai_api import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
)
from rllib_arpo.serving.page_routes import PLAYGROUND
from rllib_arpo.serving.service import ChatService
from tests.serving.live_server import CHAT, PATIENCE_S, EndlessEngine, LiveServer, ask
from tests.serving.scripted_agents import (
    USER,
    SlowTool,
    Unreliable,
    call,
    final,
    make_env,
    service,
)
from tests.virtual_time import run_virtual

HERE = "http://127.0.0.1"
ADMIN = {"Authorization": "Bearer admin"}


def answering() -> ChatService:
    return service(make_env(), [call("tags", "height"), final("tags", "44")])[0]


def serve(chat: Any, settings: HttpSettings | None = None, **parts: Any) -> LiveServer:
    return LiveServer(make_http_app(chat, settings or HttpSettings(), **parts))


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    settings = HttpSettings(max_messages=3, max_tokens=100, max_body_bytes=8000)
    with serve(answering(), settings) as live:
        yield live


class Failing:
    """A service that raises: before the first chunk, or behind it."""

    def __init__(self, error: Exception, *, num_chunks: int = 0) -> None:
        self.error = error
        self._num_chunks = num_chunks

    def models(self) -> list[str]:
        return ["m"]

    async def complete(self, request: ChatCompletionRequest) -> ChatCompletion:
        raise self.error

    async def stream(
        self, request: ChatCompletionRequest
    ) -> AsyncIterator[ChatCompletionChunk]:
        for _ in range(self._num_chunks):
            yield ChatCompletionChunk(id="i", created=0, model="m", choices=[])
        raise self.error


def events(text: str) -> list[Any]:
    """Data of all events of a stream; the last one is checked and left out."""
    assert text.endswith("data: [DONE]\n\n")
    pieces = text.removesuffix("\n\n").split("\n\n")
    assert all(piece.startswith("data: ") for piece in pieces)
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces[:-1]]


# Answers


def test_an_answer_comes_as_json_with_its_turns(server: LiveServer):
    answer = server.client.post(CHAT, json=ask())
    assert answer.status_code == 200
    (choice,) = answer.json()["choices"]
    assert choice["message"]["content"] == "44"
    assert len(choice["message"]["agent"]["turns"]) == 2


def test_a_stream_says_the_same_as_an_answer(server: LiveServer):
    whole = server.client.post(CHAT, json=ask()).json()
    fields = ask(stream=True, stream_options={"include_usage": True})
    answer = server.client.post(CHAT, json=fields)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(answer.text)
    deltas = [one["choices"][0]["delta"] for one in chunks if one["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == "44"
    assert chunks[-1]["usage"] == whole["usage"]


def test_models_are_listed_and_found_by_name(server: LiveServer):
    (model,) = server.client.get("/v1/models").json()["data"]
    assert model["id"] == "m"
    assert server.client.get("/v1/models/m").json() == model
    missing = server.client.get("/v1/models/other/name")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_health_is_503_while_a_model_is_not_ready():
    async def ready() -> Mapping[str, bool]:
        return {"m": state["ready"]}

    state = {"ready": False}
    with serve(answering(), ready=ready) as live:
        waiting = live.client.get("/health")
        state["ready"] = True
        assert (waiting.status_code, live.client.get("/health").status_code) == (
            503,
            200,
        )
        assert waiting.json() == {
            "ready": False,
            "models": [{"id": "m", "ready": False}],
        }


# Requests that are wrong

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"x": 7}}}
OUT_OF_RANGE = json.dumps(ask(tools=[TOOL])).replace("7", "1e999").encode()
WRONG: dict[str, tuple[bytes, int, str | None]] = {
    "no body": (b"", 400, None),
    "not JSON": (b"{", 400, None),
    "not UTF-8": (b'{"model": "\xff"}', 400, None),
    "half a surrogate pair": (b'{"model": "\\ud800"}', 400, None),
    "NaN": (json.dumps(ask(temperature=float("nan"))).encode(), 400, None),
    "out of range": (OUT_OF_RANGE, 400, None),
    "long integer": (b'{"seed": ' + b"9" * 5000 + b"}", 400, None),
    "deep": (b"[" * 3000, 400, None),
    "null": (b"null", 400, None),
    "a list": (b"[]", 400, None),
    "no model": (json.dumps({"messages": [USER]}).encode(), 400, "model"),
    "unknown model": (json.dumps(ask(model="gpt")).encode(), 404, "model"),
    "unknown field": (json.dumps(ask(banana=1)).encode(), 400, "banana"),
    "text for number": (json.dumps(ask(temperature="1")).encode(), 400, "temperature"),
    "huge seed": (json.dumps(ask(seed=10**400)).encode(), 400, "seed"),
    "no messages": (json.dumps(ask(messages=[])).encode(), 400, "messages"),
    "4 messages": (json.dumps(ask(messages=[USER] * 4)).encode(), 400, "messages"),
    "no role": (json.dumps(ask(messages=[{}])).encode(), 400, "messages.0"),
    "a number as text": (
        json.dumps(ask(messages=[{"role": "user", "content": 1}])).encode(),
        400,
        "messages.0.content",
    ),
    "many tokens": (json.dumps(ask(max_tokens=101)).encode(), 400, "max_tokens"),
    "logprobs": (json.dumps(ask(logprobs=True)).encode(), 400, "logprobs"),
    "long body": (json.dumps(ask(user="u" * 8000)).encode(), 413, None),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_gets_an_error_that_names_the_field(
    server: LiveServer, case: str, stream: bool
):
    body, status, param = WRONG[case]
    if stream and body.startswith(b'{"model": "'):
        body = body.removesuffix(b"}") + b', "stream": true}'
    answer = server.post_raw(body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == (
        "not_found_error" if status == 404 else "invalid_request_error"
    )


def test_a_body_without_length_is_measured_while_it_arrives(server: LiveServer):
    pieces = (b" " * 1000 for _ in range(9))
    answer = server.client.post(
        CHAT, content=pieces, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for():
    with serve(answering(), HttpSettings(max_body_s=0.2)) as live:
        with live.head(f"POST {CHAT}", length=1000) as chat:
            assert chat.readline().split()[1] == b"408"
        # What takes no body is answered at once.
        for line in ("GET /health", "GET /"):
            with live.head(line, length=1000) as answer:
                assert answer.readline().split()[1] == b"200"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", CHAT, 405), ("PUT", "/v1/models", 405), ("GET", "/v1/nothing", 404)],
)
def test_wrong_paths_and_methods_get_error_objects(
    server: LiveServer, method: str, path: str, status: int
):
    answer = server.client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded"]
)
def test_a_body_must_be_declared_as_json(server: LiveServer, kind: str):
    body = json.dumps(ask()).encode()
    answer = server.post_raw(body, **{"Content-Type": kind})
    assert answer.status_code == 415
    assert repr(kind) in answer.json()["error"]["message"]


def test_a_request_without_a_limit_gets_the_server_s_own():
    env = make_env(max_response_tokens=1000)
    long, engine = service(env, ["a " * 300])
    with serve(long, HttpSettings(max_tokens=5)) as live:
        (choice,) = live.client.post(CHAT, json=ask()).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert engine.requests[0].max_tokens == 5


# What goes wrong


@pytest.mark.parametrize("num_chunks", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_logged_and_not_told(
    stream: bool, num_chunks: int, caplog: pytest.LogCaptureFixture
):
    failing = Failing(RuntimeError("password in the secret"), num_chunks=num_chunks)
    with serve(failing) as live, caplog.at_level(logging.ERROR):
        answer = live.client.post(CHAT, json=ask(stream=stream))
    if stream and num_chunks:
        assert answer.status_code == 200
        *chunks, last = events(answer.text)
        assert len(chunks) == num_chunks
    else:
        assert answer.status_code == 500
        last = answer.json()
    assert last["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    (record,) = (one for one in caplog.records if one.name == api_errors.__name__)
    assert record.exc_info is not None
    assert record.exc_info[1] is failing.error


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_engine_is_503_and_may_be_asked_again(stream: bool):
    env = make_env()
    _, engine = service(env, [final("tags", "44")])
    lost = Unreliable(engine, [0] * 99)
    with serve(ChatService({"m": (Agent(env=env), lost)})) as live:
        answer = live.client.post(CHAT, json=ask(stream=stream))
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "engine_lost"


def test_an_engine_lost_in_mid_stream_is_the_last_event():
    with serve(Failing(EngineLostError("gone"), num_chunks=1)) as live:
        answer = live.client.post(CHAT, json=ask(stream=True))
    assert events(answer.text)[-1]["error"]["code"] == "engine_lost"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_given_up(stream: bool):
    engine = EndlessEngine(num_tokens=0)
    with serve(engine.service(), HttpSettings(max_request_s=0.05)) as live:
        answer = live.client.post(CHAT, json=ask(stream=stream))
        assert engine.closed.wait(PATIENCE_S)
    assert answer.status_code == 408
    assert answer.json()["error"]["type"] == "timeout_error"


def test_a_stream_that_takes_too_long_ends_with_an_error():
    engine = EndlessEngine(num_tokens=1)
    app = make_http_app(engine.service(), HttpSettings(max_request_s=0.5))

    async def answered() -> httpx2.Response:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url=HERE) as client:
            return await client.post(CHAT, json=ask(stream=True))

    # On a clock that stands still until the engine is silent.
    answer = run_virtual(answered())
    assert engine.closed.is_set()
    assert answer.status_code == 200
    *chunks, last = events(answer.text)
    assert chunks
    assert last["error"]["type"] == "timeout_error"
    assert "more than 0.5 s" in last["error"]["message"]


# Clients that hang up


def test_a_client_that_leaves_a_stream_stops_the_engine():
    engine = EndlessEngine()
    with serve(engine.service()) as live:
        with live.client.stream("POST", CHAT, json=ask(stream=True)) as answer:
            lines = answer.iter_lines()  # the client hangs up when it is dropped
            assert next(lines).startswith("data: ")
            assert not engine.closed.is_set()
        assert engine.closed.wait(PATIENCE_S)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_any_text_stops_the_engine(stream: bool):
    engine = EndlessEngine(num_tokens=0)
    with serve(engine.service()) as live:
        connection = live.connection(ask(stream=stream))
        assert engine.started.wait(PATIENCE_S)
        connection.close()
        assert engine.closed.wait(PATIENCE_S)


def test_a_client_that_leaves_stops_the_tool():
    class Slow(SlowTool):
        async def call(self, arguments: str) -> str:
            running.set()
            try:
                return await super().call(arguments)
            finally:
                stopped.set()

    running, stopped = threading.Event(), threading.Event()
    chat, _ = service(make_env(Slow(), tool_timeout_s=60), [call("tags", "height")])
    with serve(chat) as live:
        connection = live.connection(ask())
        assert running.wait(PATIENCE_S)
        connection.close()
        assert stopped.wait(PATIENCE_S)


# Requests at once


def test_a_key_has_so_many_requests_at_once_and_leaves_others_alone():
    settings = HttpSettings(
        api_key_hashes=(hash_key("one"), hash_key("two")), max_concurrent=1
    )
    first, second = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    engine = EndlessEngine()
    with serve(engine.service(), settings) as live:
        fields = ask(stream=True)
        with live.client.stream("POST", CHAT, json=fields, headers=first) as answer:
            lines = answer.iter_lines()  # the client hangs up when it is dropped
            assert next(lines).startswith("data: ")
            refused = live.client.post(CHAT, json=ask(), headers=first)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "rate_limit_error"
            with live.client.stream("POST", CHAT, json=fields, headers=second) as other:
                assert other.status_code == 200
        assert engine.closed.wait(PATIENCE_S)


def test_every_answer_to_a_request_counts():
    settings = HttpSettings(max_concurrent=3)
    engine = EndlessEngine()
    with serve(engine.service(), settings) as live:
        wrong = live.client.post(CHAT, json=ask(n=4))
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "n")
        fields = ask(stream=True, n=2)
        with live.client.stream("POST", CHAT, json=fields) as answer:
            lines = answer.iter_lines()  # the client hangs up when it is dropped
            assert next(lines).startswith("data: ")
            assert live.client.post(CHAT, json=ask(n=2)).status_code == 429
        assert engine.closed.wait(PATIENCE_S)


def test_all_keys_together_have_so_many_requests_at_once():
    settings = HttpSettings(
        api_key_hashes=(hash_key("one"), hash_key("two")), max_in_all=1
    )
    first, second = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    engine = EndlessEngine()
    with serve(engine.service(), settings) as live:
        fields = ask(stream=True)
        with live.client.stream("POST", CHAT, json=fields, headers=first) as answer:
            lines = answer.iter_lines()  # the client hangs up when it is dropped
            assert next(lines).startswith("data: ")
            refused = live.client.post(CHAT, json=ask(), headers=second)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "overloaded"
        assert engine.closed.wait(PATIENCE_S)


# Operators


async def reload(model: str | None, checkpoint: str | None) -> Mapping[str, str]:
    if checkpoint == "nothing":
        raise ConfigError("there is no checkpoint 'nothing'")
    if checkpoint == "large":
        raise EngineError("cannot load large: out of memory")
    if checkpoint == "lost":
        raise EngineLostError("a replica is gone")
    return {model or "m": f"version of {checkpoint}"}


def test_the_admin_s_key_loads_other_weights():
    settings = HttpSettings(admin_key_hash=hash_key("admin"))
    with serve(answering(), settings, reload=reload) as live:
        path = "/admin/reload"
        loaded = live.client.post(path, json={"checkpoint": "c"}, headers=ADMIN)
        assert loaded.json() == {"models": {"m": "version of c"}}
        wrong = live.client.post(path, json={"checkpoint": "nothing"}, headers=ADMIN)
        assert wrong.status_code == 400
        assert "no checkpoint 'nothing'" in wrong.json()["error"]["message"]
        failed = live.client.post(path, json={"checkpoint": "large"}, headers=ADMIN)
        assert failed.status_code == 500
        assert "out of memory" in failed.json()["error"]["message"]
        lost = live.client.post(path, json={"checkpoint": "lost"}, headers=ADMIN)
        assert lost.status_code == 503
        unknown = live.client.post(path, json={"model": "x"}, headers=ADMIN)
        assert unknown.status_code == 404
        assert live.client.post(path, json={}).status_code == 401


def test_a_checkpoint_for_one_of_several_models_needs_its_name():
    chat = answering()
    several = ChatService(chat._agents | {"n": chat._agents["m"]})
    settings = HttpSettings(admin_key_hash=hash_key("admin"))
    with serve(several, settings, reload=reload) as live:
        path = "/admin/reload"
        refused = live.client.post(path, json={"checkpoint": "c"}, headers=ADMIN)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "model"
        fields = {"checkpoint": "c", "model": "n"}
        loaded = live.client.post(path, json=fields, headers=ADMIN)
        assert loaded.json() == {"models": {"n": "version of c"}}


def test_reload_is_off_without_an_admin_key():
    with serve(answering(), reload=reload) as live:
        answer = live.client.post("/admin/reload", json={}, headers=ADMIN)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "admin_disabled"


# The page


def test_the_page_and_its_files_are_served_for_this_server_alone(server: LiveServer):
    files = [one for one in PLAYGROUND.iterdir() if one.is_file()]
    assert files
    for file in files:
        answer = server.client.get(f"/playground/{file.name}")
        assert answer.content == file.read_bytes()
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'")
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert server.client.get("/").content == (PLAYGROUND / "index.html").read_bytes()
    for name in ("nothing.js", "..%2f__init__.py", "%2e%2e/http.py"):
        assert server.client.get(f"/playground/{name}").status_code == 404


# The document


def test_the_document_declares_all_answers_and_no_others(server: LiveServer):
    document = server.client.get("/openapi.json").json()
    chat = document["paths"][CHAT]["post"]
    assert set(chat["responses"]) == {"200", *map(str, CHAT_ERRORS)}
    assert set(chat["responses"]["200"]["content"]) == {
        "application/json",
        "text/event-stream",
    }
    assert "HTTPValidationError" not in document["components"]["schemas"]
