"""Processes that die while clients ask."""

import pytest

from tests.serving.served import Crowd, Served, until

pytestmark = pytest.mark.slow

NUM_CLIENTS = 8


def test_a_lost_engine_costs_at_most_a_clean_error(served: Served) -> None:
    with Crowd(served, NUM_CLIENTS) as crowd:
        until(lambda: crowd.has(NUM_CLIENTS, round=0))
        served.kill("engine-0")
        crowd.round = 1
        until(lambda: crowd.has(2 * NUM_CLIENTS, round=1, status=200, error=None))
    seen = {(reply.status, reply.error) for reply in crowd.replies}
    assert seen <= {(200, None), (503, "engine_lost"), (200, "engine_lost")}
    until(lambda: served.client.get("/health").status_code == 200)


def test_a_lost_agent_costs_the_answers_that_it_wrote(served: Served) -> None:
    with Crowd(served, NUM_CLIENTS) as crowd:
        until(lambda: crowd.has(NUM_CLIENTS, round=0))
        served.kill("agent")
        crowd.round = 1
        until(lambda: crowd.has(2 * NUM_CLIENTS, round=1, status=200, error=None))
    failed = {(r.status, r.error) for r in crowd.replies if r.version is None}
    # A stream that is cut, what HAProxy says, or 5xx of Serve's proxy in plain text.
    assert failed <= {(0, None), (503, "agent_lost"), (500, ""), (503, "")}
    until(lambda: served.client.get("/health").status_code == 200)


def test_a_lost_manager_costs_no_answer(served: Served) -> None:
    before = served.replicas("manager")
    served.kill("manager")
    served.post(seed=1).raise_for_status()
    until(lambda: bool(served.replicas("manager") - before))
    until(lambda: served.client.get("/metrics").status_code == 200)
