"""Programs that tests run in processes of their own: these kill and fill things."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Generous: on a loaded machine Ray alone takes a minute to start.
LIMIT_S = 580


def environment() -> dict[str, str]:
    """For a process that imports this checkout and uses one core."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def run_script(name: str, *words: object, small_disk: Path | None = None) -> str:
    """Run `tests/scripts/NAME.py` and return the last line that it prints.

    With `small_disk` a disk of 16 MB is mounted there, visible to the script alone,
    where the machine allows that.
    """
    command = [sys.executable, "-m", f"tests.scripts.{name}", *map(str, words)]
    if small_disk is not None:
        small_disk.mkdir()
        if can_mount(small_disk):
            command = [*mounting(small_disk), *command]
    process = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-6000:]
    return process.stdout.strip().splitlines()[-1]


def mounting(folder: Path) -> list[str]:
    """The start of a command that runs with a small disk of its own on `folder`."""
    script = 'mount -t tmpfs -o size=16m tmpfs "$0" && exec "$@"'
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(folder)]


def can_mount(folder: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(
        [*mounting(folder), "true"], capture_output=True, check=False
    )
    return tried.returncode == 0
