from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rllib_arpo.errors import ToolError
from rllib_arpo.serving.http import make_http_app
from rllib_arpo.serving.http_settings import HttpSettings
from rllib_arpo.serving.serve_metrics import ServeMetrics, merge_expositions
from rllib_arpo.serving.service import ChatService
from rllib_arpo.tools.tool import Tool
from tests.envs.fake_tools import FakeTool
from tests.serving.live_server import CHAT, PATIENCE_S, EndlessEngine, LiveServer, ask
from tests.serving.scripted_agents import call, final, make_env, service

Numbers = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def numbers(text: str) -> Numbers:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def number(text: str, name: str, **labels: str) -> float | None:
    return numbers(text).get((f"rllib_arpo_{name}", tuple(sorted(labels.items()))))


def answering(*turns: str, tool: Tool | None = None) -> ChatService:
    env = make_env(tool or FakeTool("vifel 44"))
    return service(env, [*turns, final("tags", "44")])[0]


def after(app: Any, *requests: dict[str, Any]) -> tuple[str, list[httpx2.Response]]:
    """Numbers after these requests, and their answers."""
    with LiveServer(app) as live:
        answers = [live.client.post(CHAT, json=fields) for fields in requests]
        return live.client.get("/metrics").text, answers


def test_requests_are_counted_by_route_and_status():
    text, _ = after(
        make_http_app(answering(), HttpSettings()), ask(), ask(), ask(model="other")
    )
    assert number(text, "requests_total", route=CHAT, status="200") == 2
    assert number(text, "requests_total", route=CHAT, status="404") == 1
    assert number(text, "request_seconds_count", route=CHAT) == 3
    assert number(text, "requests_in_flight") == 1  # the one that asks for them


def test_paths_that_clients_make_up_share_a_series():
    with LiveServer(make_http_app(answering(), HttpSettings())) as live:
        for path in ("/a", "/b", "/v1/models/x", "/v1/models/y"):
            live.client.get(path)
        text = live.client.get("/metrics").text
    assert number(text, "requests_total", route="other", status="404") == 2
    assert number(text, "requests_total", route="/v1/models/{id}", status="404") == 2


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_and_tool_calls_are_counted_alike_in_both_ways(stream: bool):
    chat = answering(call("tags", "height"))
    app = make_http_app(chat, HttpSettings())
    text, (answer, whole) = after(app, ask(stream=stream), ask())
    assert answer.status_code == 200
    written = whole.json()["usage"]["completion_tokens"]
    assert number(text, "generated_tokens_total", model="m") == 2 * written
    assert number(text, "tool_calls_total", tool="search", status="ok") == 2
    first = number(text, "time_to_first_token_seconds_count", model="m")
    assert first == (1 if stream else None)


def test_a_tool_that_fails_is_counted_with_how():
    broken = FakeTool(ToolError("the index is gone"))
    chat = answering(call("tags", "height"), tool=broken)
    text, _ = after(make_http_app(chat, HttpSettings()), ask())
    assert number(text, "tool_calls_total", tool="search", status="error") == 1


def test_names_that_the_model_makes_up_make_no_series():
    metrics = ServeMetrics()
    for name, status in (("a", "refused"), ("b", "refused"), ("search", "ok")):
        metrics._called(name, status)
    metrics._called("search", "refused")
    text = metrics.exposition()
    assert number(text, "tool_calls_total", tool="unknown", status="refused") == 2
    assert number(text, "tool_calls_total", tool="search", status="refused") == 1


def test_an_answer_is_in_flight_until_its_client_leaves():
    engine = EndlessEngine()
    app = make_http_app(engine.service(), HttpSettings())
    with LiveServer(app) as live:
        with live.client.stream("POST", CHAT, json=ask(stream=True)) as answer:
            lines = answer.iter_lines()  # the client hangs up when it is dropped
            assert next(lines).startswith("data: ")
            running = app.state.metrics.exposition()
        assert engine.closed.wait(PATIENCE_S)
    # Stopping the server waits for its requests.
    over = app.state.metrics.exposition()
    assert number(running, "requests_in_flight") == 1
    assert number(over, "requests_in_flight") == 0
    assert number(over, "requests_total", route=CHAT, status="499") == 1


def test_every_app_has_its_own_numbers():
    one, two = (make_http_app(answering(), HttpSettings()) for _ in range(2))
    text, _ = after(one, ask())
    assert number(text, "requests_total", route=CHAT, status="200") == 1
    other, _ = after(two)
    assert number(other, "requests_total", route=CHAT, status="200") is None


# Several replicas


def replica(num_requests: int) -> str:
    metrics = ServeMetrics()
    for _ in range(num_requests):
        metrics.begun()
        metrics.ended(CHAT, 200, 0.02)
    return metrics.exposition()


def test_merged_numbers_are_those_of_each_replica_with_its_name():
    texts = {"a": replica(1), 'b"\\\n': replica(2)}
    merged = numbers(merge_expositions(texts))
    expected = {
        (name, tuple(sorted([*labels, ("replica", replica)]))): value
        for replica, text in texts.items()
        for (name, labels), value in numbers(text).items()
    }
    assert merged == expected
    assert len(merged) > 20


def test_every_family_is_described_once():
    merged = merge_expositions({"a": replica(1), "b": replica(2)})
    described = [line for line in merged.splitlines() if line.startswith("# TYPE ")]
    assert len(described) == len(set(described)) > 5
    assert "# TYPE rllib_arpo_requests_total counter" in described
    assert "# TYPE rllib_arpo_request_seconds histogram" in described
    # The series of a family stand together, behind its description.
    order = [
        line.split("{")[0] for line in merged.splitlines() if not line.startswith("#")
    ]
    changes = [
        one for one, before in zip(order[1:], order, strict=False) if one != before
    ]
    counters = [name for name in changes if name.endswith("_total")]
    assert len(counters) == len(set(counters))


def test_an_app_of_several_replicas_gives_the_numbers_of_all():
    async def all_replicas() -> dict[str, str]:
        return {"a": replica(1), "b": replica(2)}

    app = make_http_app(answering(), HttpSettings(), metrics_of_all=all_replicas)
    text, _ = after(app)
    for name, count in (("a", 1), ("b", 2)):
        labels = {"route": CHAT, "status": "200", "replica": name}
        assert number(text, "requests_total", **labels) == count


def test_numbers_in_another_format_are_refused():
    with pytest.raises(ValueError):
        merge_expositions({"a": "no metrics { at all"})
