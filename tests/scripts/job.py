"""Submits the cluster example as a job.

    python -m tests.scripts.job MODEL FOLDER

Starts a head with the job server on a free port of this machine alone, and prints how
the job ended.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ray.cluster_utils import Cluster
from ray.job_submission import JobSubmissionClient

from rllib_arpo.serving.front import free_ports
from tests.scripts import LIMIT_S, ROOT

EXAMPLE = ROOT / "tuned_examples" / "cluster"
JOB = "example"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S / 2
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(1.0)


def main(model: str, folder: Path) -> str:
    # Where `ray` and `rllib-arpo` are, for the head and with it for the job.
    programs = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([programs, os.environ["PATH"]])
    port, port_of_agent = free_ports(2)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 6,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": port,
            # Ray's default is one number, which another Ray here may hold; the agent
            # that takes the job would then not be there.
            "dashboard_agent_listen_port": port_of_agent,
        },
    )
    try:
        client = JobSubmissionClient(f"http://127.0.0.1:{port}")
        words = ["./train.sh", "almanac_cpu.py", folder / "run", 1, "--model", model]
        # The head's agent, which takes the job, starts after the head.
        wait_for(lambda: submit(client, [str(word) for word in words]))
        wait_for(lambda: client.get_job_status(JOB).is_terminal())
        print(client.get_job_logs(JOB)[-3000:], file=sys.stderr)
        return str(client.get_job_status(JOB))
    finally:
        cluster.shutdown()


def submit(client: JobSubmissionClient, words: list[str]) -> bool:
    """Run `ray job submit`; False when it was refused or took too long.

    What took too long may have been accepted: the next one is then refused because the
    job is there.
    """
    command = ["ray", "job", "submit", "--address", client.get_address(), "--no-wait"]
    command += ["--submission-id", JOB, "--working-dir", str(EXAMPLE), "--", *words]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S / 4,
        )
    except subprocess.TimeoutExpired:
        return False
    print(done.stdout, file=sys.stderr)
    return done.returncode == 0 or "already exists" in done.stdout


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2])))
