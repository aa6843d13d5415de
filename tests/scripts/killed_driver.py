"""Kills a driver by SIGKILL, again and again, and looks at what is left.

    python -m tests.scripts.killed_driver MODEL FOLDER SEED

Each life of the driver is a fork of this process, so that it starts fast. Prints what
was seen as one line of JSON; raises when something is not as it should be.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil
import ray
from pyarrow.fs import LocalFileSystem

from rllib_arpo import ARPO
from rllib_arpo.checkpoints import newest_checkpoint
from rllib_arpo.runs import Run, train
from rllib_arpo.storage import fault_of, readable, write_contents, written_aside
from tests.tiny_runs import arpo_config

NUM_ITERATIONS = 8
NUM_KILLS = 4
LIMIT_S = 300
LOCAL = LocalFileSystem()
FILE_CALLS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir")


def in_a_fork(life: Callable[[], None]) -> int:
    """Start `life` in a process of its own and return its id."""
    process = os.fork()
    if process:
        return process
    try:
        life()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def ended(process: int) -> int:
    """Wait for the end of a fork; its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def save(target: Path, text: str) -> None:
    with written_aside(target, intact="") as aside:
        aside.mkdir()
        (aside / "state").write_text(text)
        write_contents(str(aside), LOCAL)


def save_and_die(target: Path, call: int) -> None:
    """Save, and die before the call to the file system with this number."""
    seen = 0

    def count(event: str, _: Any) -> None:
        nonlocal seen
        if event in FILE_CALLS:
            seen += 1
            if seen > call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save(target, "two")


def kill_at_every_call(folder: Path) -> int:
    """Replace a checkpoint, killed at each of its calls; return their number."""
    target = folder / "checkpoint"
    for call in range(1000):
        save(target, "one")
        assert [entry.name for entry in folder.iterdir()] == ["checkpoint"]
        died = ended(in_a_fork(lambda call=call: save_and_die(target, call)))
        found = readable(target)
        assert fault_of(str(found), LOCAL) is None, call
        assert (found / "state").read_text() in ("one", "two"), call
        if died == 0:
            return call
        assert died == -signal.SIGKILL, died
    raise AssertionError("the save never ended")


def run_on(folder: Path, model: str, *, num_env_runners: int = 0) -> None:
    """Train from the newest checkpoint, if there is one, and save every iteration."""
    checkpoint = newest_checkpoint(folder)
    if num_env_runners:
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    if checkpoint is None:
        config = arpo_config(model).env_runners(num_env_runners=num_env_runners)
        algorithm = config.build_algo()
    else:
        algorithm = ARPO.from_checkpoint(checkpoint)
    run = Run(folder, resume=True)
    run.forget_after(algorithm.iteration)
    train(
        algorithm,
        run,
        num_iterations=NUM_ITERATIONS,
        stage="ARPO",
        on_iteration=lambda record: None,
        checkpoint_interval=1,
    )


def num_lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def wait_for(condition: Callable[[], bool], process: int) -> bool:
    """Poll until it holds; False if the process ended before."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return False
        time.sleep(0.0005)
    return True


def kill_while_saving(process: int, folder: Path) -> bool:
    """Kill it while a save is under way; False if it came to its end."""

    def saving() -> bool:
        return any((folder / "checkpoints").glob("*.part"))

    while wait_for(saving, process):
        os.kill(process, signal.SIGSTOP)
        if saving():
            os.kill(process, signal.SIGKILL)
            return True
        os.kill(process, signal.SIGCONT)
    return False


def kill_after(process: int, folder: Path, delay_s: float) -> bool:
    """Kill it some time after its next iteration; False if it came to its end."""
    before = num_lines(folder)
    if not wait_for(lambda: num_lines(folder) > before, process):
        return False
    time.sleep(delay_s)  # any moment will do
    os.kill(process, signal.SIGKILL)
    return True


def kill_often(folder: Path, model: str, rng: random.Random) -> dict[str, int]:
    """Kill a run at `NUM_KILLS` moments, then let it end; count the moments."""
    kills = {"while_saving": 0, "at_any_time": 0}
    for number in range(NUM_KILLS):
        process = in_a_fork(lambda: run_on(folder, model))
        if number % 2:
            kills["at_any_time"] += kill_after(process, folder, rng.uniform(0, 0.5))
        else:
            kills["while_saving"] += kill_while_saving(process, folder)
        assert ended(process) in (0, -signal.SIGKILL)
        newest = newest_checkpoint(folder)
        lines = num_lines(folder)
        # What an iteration learned is lost at most once: its checkpoint comes next.
        reached = 0 if newest is None else int(newest.name.split("_")[1].split(".")[0])
        assert reached >= lines - 1, (reached, lines)
    assert ended(in_a_fork(lambda: run_on(folder, model))) == 0
    return kills


def names_of_those_alive(processes: Iterable[psutil.Process]) -> list[str]:
    names = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                names.append(process.name())
    return names


def kill_with_ray(folder: Path, model: str) -> list[psutil.Process]:
    """Kill a driver that started Ray; return the processes that must go with it."""
    process = in_a_fork(lambda: run_on(folder, model, num_env_runners=1))
    assert wait_for(lambda: num_lines(folder) >= 2, process)
    children = psutil.Process(process).children(recursive=True)
    assert {"raylet", "gcs_server"} <= set(names_of_those_alive(children))
    os.kill(process, signal.SIGKILL)
    ended(process)
    return children


def resume_by_command(folder: Path) -> None:
    words = ["train", "--resume", str(folder), "--iterations", str(NUM_ITERATIONS)]
    command = [sys.executable, "-m", "rllib_arpo.cli", *words]
    subprocess.run(command, check=True, stdout=sys.stderr)


def main(model: str, folder: Path, seed: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    # First, because Ray's agents take a minute to see that their raylet is gone.
    children = kill_with_ray(folder / "with_ray", model)
    (folder / "calls").mkdir()
    seen["calls"] = kill_at_every_call(folder / "calls")
    straight = in_a_fork(lambda: run_on(folder / "straight", model))
    assert ended(straight) == 0
    seen["kills"] = kill_often(folder / "killed", model, random.Random(seed))
    resume_by_command(folder / "with_ray")
    _, alive = psutil.wait_procs(children, timeout=LIMIT_S)
    seen["processes"] = len(children)
    seen["alive"] = names_of_those_alive(alive)
    return seen


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
