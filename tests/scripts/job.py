"""Submits the cluster example as a job, and once more to go on with its run.

    python -m tests.scripts.job MODEL FOLDER

Starts a head with the job server on a free port of this machine alone. Prints how each
job ended as one line of JSON.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import ray

from tests.scripts import ROOT

EXAMPLE = ROOT / "tuned_examples" / "cluster"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def submit(address: str, model: str, run: Path, iterations: int) -> str:
    """The state in which the job ended."""
    job = f"almanac-{iterations}"
    command = ["ray", "job", "submit", "--address", address, "--submission-id", job]
    command += ["--working-dir", str(EXAMPLE), "--"]
    command += ["./train.sh", "almanac_cpu.py", str(run), str(iterations)]
    subprocess.run([*command, "--model", model], check=False, stdout=sys.stderr)
    from ray.job_submission import JobSubmissionClient

    return str(JobSubmissionClient(address).get_job_status(job))


def main(model: str, folder: Path) -> dict[str, str]:
    # Where `ray` and `rllib-arpo` are, for the head and with it for the job.
    programs = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([programs, os.environ["PATH"]])
    port = free_port()
    ray.init(
        num_cpus=6,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        dashboard_port=port,
        log_to_driver=False,
    )
    address = f"http://127.0.0.1:{port}"
    seen = {
        str(iterations): submit(address, model, folder / "run", iterations)
        for iterations in (1, 2)
    }
    ray.shutdown()
    return seen


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
