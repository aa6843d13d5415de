"""The number of agent replicas follows the load."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serving.calling_agent import Call, held_by, make_calling_agent
from tests.serving.file_server import serving_file
from tests.serving.served import Served, until

pytestmark = pytest.mark.slow
# Twice what one replica is to have at once.
NUM_HELD = 4
# Without the half minute and the ten that Serve waits before it scales.
AT_ONCE = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": NUM_HELD / 2,
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 0.0,
    "look_back_period_s": 1.0,
}
NO_CPUS = {"num_cpus": 0}


@pytest.fixture
def scaled(tmp_path: Path) -> Iterator[Served]:
    model = make_calling_agent(tmp_path / "almanac")
    with serving_file(
        tmp_path,
        args={"checkpoint": str(model), "max_agents": 2},
        deployments=[
            {
                "name": "agent",
                "autoscaling_config": AT_ONCE,
                "ray_actor_options": NO_CPUS,
            },
            {"name": "engine-0", "ray_actor_options": NO_CPUS},
        ],
        RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.2",
        RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.2",
    ) as running:
        yield running


def content(served: Served, **fields: object) -> str:
    reply = served.post(**fields).raise_for_status().json()
    return reply["choices"][0]["message"]["content"]


def test_agents_become_more_under_load_and_fewer_after_it_without_a_failure(
    scaled: Served,
) -> None:
    def answered_by() -> int:
        """Process of the replica that writes one more answer."""
        asked = pool.submit(content, scaled, metadata=held_by(listener))
        call = Call.next(listener)
        call.end()
        assert asked.result() == "44"
        return call.pid

    def scaled_down() -> bool:
        assert content(scaled) == "44"
        return len(scaled.replicas("agent")) == 1

    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        ThreadPoolExecutor(NUM_HELD + 1) as pool,
    ):
        held = [
            pool.submit(content, scaled, metadata=held_by(listener))
            for _ in range(NUM_HELD)
        ]
        calls = [Call.next(listener) for _ in held]
        (first,) = {call.pid for call in calls}
        until(lambda: answered_by() != first)
        assert len(scaled.replicas("agent")) == 2
        for call in calls:
            call.end()
        assert [one.result() for one in held] == NUM_HELD * ["44"]
        until(scaled_down)
