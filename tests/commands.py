"""The real command in processes of its own, as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

LIMIT_S = 240


def start(*words: object, folder: Path, stdout: Path | None = None) -> subprocess.Popen:
    """Start `rllib-arpo`; with `stdout`, output goes to that file."""
    with open(stdout or os.devnull, "w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "rllib_arpo.cli", *map(str, words)],
            cwd=folder,
            stdout=file if stdout else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"},
        )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with process:
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        finally:
            process.kill()  # unless it has ended
    return process.returncode, out or "", err


def run(*words: object, folder: Path) -> str:
    """Output of a command that must succeed."""
    code, out, err = finish(start(*words, folder=folder))
    assert code == 0, err
    return out
