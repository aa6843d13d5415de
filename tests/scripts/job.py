"""Submits the cluster example as a job.

    python -m tests.scripts.job MODEL FOLDER

Starts a head with the job server on a free port of this machine alone, and prints how
the job ended.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

from tests.scripts import LIMIT_S, ROOT

EXAMPLE = ROOT / "tuned_examples" / "cluster"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S / 2
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(1.0)


def main(model: str, folder: Path) -> str:
    # Where `ray` and `rllib-arpo` are, for the head and with it for the job.
    programs = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([programs, os.environ["PATH"]])
    port = free_port()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 6,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": port,
            # Ray's default is one number, which another Ray here may hold; the agent
            # that takes the job would then not be there.
            "dashboard_agent_listen_port": free_port(),
        },
    )
    client = JobSubmissionClient(f"http://127.0.0.1:{port}")
    words = ["./train.sh", "almanac_cpu.py", folder / "run", 1, "--model", model]
    # The head's agent, which takes the job, starts after the head.
    wait_for(lambda: submit(client, [str(word) for word in words]))
    (job,) = (job.submission_id for job in client.list_jobs() if job.submission_id)
    wait_for(lambda: client.get_job_status(job).is_terminal())
    print(client.get_job_logs(job)[-3000:], file=sys.stderr)
    status = str(client.get_job_status(job))
    cluster.shutdown()
    return status


def submit(client: JobSubmissionClient, words: list[str]) -> bool:
    """Run `ray job submit`; False when it was refused."""
    command = ["ray", "job", "submit", "--address", client.get_address(), "--no-wait"]
    command += ["--working-dir", str(EXAMPLE), "--", *words]
    try:
        return subprocess.call(command, stdout=2, timeout=LIMIT_S / 4) == 0
    except subprocess.TimeoutExpired:
        return False


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2])))
