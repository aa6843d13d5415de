import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console as RichConsole
from transformers import AutoModelForCausalLM, AutoTokenizer

from rllib_arpo.checkpoints import newest_checkpoint
from rllib_arpo.errors import ConfigError
from rllib_arpo.progress import Console
from rllib_arpo.quickstart import Settings, quickstart, refuse_other

SUMMARY_KEYS = {
    "seed",
    "seconds",
    "peak_memory_mb",
    "accuracy_cold_start",
    "accuracy_final",
    "greedy_cold_start",
    "greedy_final",
    "tool_calls_per_trajectory",
    "entropy_after_tool",
    "entropy_elsewhere",
}


# The command with fewer iterations; the memory of its process is that of the main job.
SHORT_QUICKSTART = """
import sys
from pathlib import Path

from rich.console import Console as RichConsole

from rllib_arpo.cli_runs import started_ray
from rllib_arpo.progress import Console
from rllib_arpo.quickstart import Settings, quickstart

settings = Settings(
    folder=Path(sys.argv[1]),
    seed=0,
    sft_iterations=18,
    rl_iterations=12,
    num_test_tasks=128,
)
with started_ray():
    quickstart(settings, Console(RichConsole(width=200, highlight=False)))
"""


def short_quickstart(folder: Path) -> str:
    """Run it in a process of its own, and give what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", SHORT_QUICKSTART, str(folder)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_main_job_learns_and_leaves_everything_that_it_promises(tmp_path):
    """The quick start with fewer iterations: what it prints, writes and improves."""
    text = short_quickstart(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    # 31 % -> 75 % in a whole run; standard error of each figure here: 4.4 points
    assert summary["accuracy_final"] > summary["accuracy_cold_start"] + 0.15
    assert summary["peak_memory_mb"] < 4000
    assert summary.keys() == SUMMARY_KEYS
    records = [
        json.loads(line)
        for line in (tmp_path / "metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert [record["iteration"] for record in records] == list(range(1, 13))
    assert records[0]["sampler_logprob_difference"] < 1e-4
    assert all(record["branches_per_tree"] > 0 for record in records)
    for name in ("config.json", "curves.png", "checkpoints", "cold_start", "model"):
        assert (tmp_path / name).exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tmp_path / "model")
    for words in ("cold start", "after ARPO", "entropy after tools", "the answer is"):
        assert words in text


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.json", "model/config.json", "base/config.json"]
)
def test_what_no_quick_start_made_is_left_alone(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"holds .*choose another --out"):
        quickstart(Settings(folder=tmp_path), Console())
    assert [file] == [path for path in tmp_path.rglob("*") if path.is_file()]


class SignallingConsole(Console):
    """Sends this process SIGTERM when an iteration is done."""

    @contextmanager
    def progress(
        self, total: int, name: str, *, done: int = 0
    ) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        yield lambda record: signal.raise_signal(signal.SIGTERM)


def test_a_signal_ends_a_quick_start_which_can_be_started_again(ray_session, tmp_path):
    (tmp_path / "notes.txt").touch()
    screen = io.StringIO()
    console = SignallingConsole(RichConsole(file=screen, width=200, highlight=False))
    settings = Settings(folder=tmp_path, num_test_tasks=1)
    with pytest.raises(typer.Exit) as ended:
        quickstart(settings, console)
    assert ended.value.exit_code == 143
    assert f"rllib-arpo quickstart --out {tmp_path}" in screen.getvalue()
    checkpoint = newest_checkpoint(tmp_path / "sft")
    assert checkpoint is not None and checkpoint.name == "iteration_000001"
    refuse_other(tmp_path)
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_the_main_job_runs_on_vllm_with_the_learners_policy(ray_session, tmp_path):
    screen = io.StringIO()
    console = Console(RichConsole(file=screen, width=200, highlight=False))
    settings = Settings(
        folder=tmp_path,
        engine="vllm",
        sft_iterations=6,
        rl_iterations=3,
        num_test_tasks=16,
    )
    # Its memory is not asked: the engine that other tests share would count too.
    quickstart(settings, console)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 3
    assert all(record["sampler_logprob_difference"] < 1e-4 for record in records)
    assert "Start the actors and the engine (vllm)" in screen.getvalue()
    # What vLLM says is in the run's folder, not on the screen.
    assert "EngineCore" in (tmp_path / "logs" / "vllm_0.log").read_text()
