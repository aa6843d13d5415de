from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from rllib_arpo.errors import ConfigError, RewardError
from rllib_arpo.rewards import math_worker
from rllib_arpo.rewards.answers import accuracy
from rllib_arpo.rewards.math_worker import MAX_WORKERS, can_parse, symbolic_equal
from rllib_arpo.rewards.mathematics import math_equal
from tests.children import children_running

LIMIT_S = 600  # far above what it takes: without the alarm these never end
ENDLESS = ["10^{10^{10}}", "(((((9!)!)!)!)!)", "9^{9^{9^{9}}}"]


@pytest.mark.parametrize("expression", ENDLESS)
def test_a_comparison_without_end_is_cut_off_in_any_thread(expression):
    with ThreadPoolExecutor(1) as threads:
        wrong = threads.submit(math_equal, expression, "x+7", 0.2)
        assert wrong.result(LIMIT_S) is False
        after = threads.submit(math_equal, "7+y", "y+7", 20.0)
        assert after.result(LIMIT_S) is True


def test_more_endless_comparisons_than_workers_all_end():
    answers = [f"10^{{10^{{1{number}}}}}" for number in range(MAX_WORKERS + 2)]
    with ThreadPoolExecutor(len(answers)) as threads:
        scores = threads.map(
            lambda answer: accuracy(answer, ["z"], ability="math", timeout_s=0.1),
            answers,
            timeout=LIMIT_S,
        )
        assert list(scores) == [0.0] * len(answers)


def test_parsing_is_cut_off_too():
    assert can_parse("x+1", 20.0)
    assert not can_parse(r"\sqrt{" * 60 + "x" + "}" * 60 + r"\sqrt[", 0.05)


def test_what_sympy_cannot_do_is_unequal():
    assert not symbolic_equal(r"\frac{", "1", 20.0)
    assert symbolic_equal("x", "x", 20.0)


# A library that is killed at its work.
KILLED = """
import os, signal
LatexExtractionConfig = verify = dict
def parse(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_workers() -> int:
    workers = children_running(math_worker.__file__)
    for worker in workers:
        worker.kill()
    psutil.wait_procs(workers)
    return len(workers)


def broken_library(folder: Path, program: str) -> None:
    """Workers that start from here on find this in place of math-verify."""
    kill_workers()
    (folder / "math_verify.py").write_text(program)


def test_an_answer_is_right_though_all_idle_workers_were_killed():
    assert symbolic_equal("a+b", "b+a", 20.0)
    assert kill_workers()
    assert symbolic_equal("c+d", "d+c", 20.0)
    assert kill_workers()
    assert can_parse("c+d+1", 20.0)


def test_workers_that_are_killed_at_their_work_make_no_answer_wrong(
    tmp_path, monkeypatch
):
    broken_library(tmp_path, KILLED)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(RewardError, match=r"ended from outside \(exit status -9\)"):
            symbolic_equal("e+f", "f+e", 20.0)
    assert symbolic_equal("e+f", "f+e", 20.0)


def test_workers_that_cannot_start_make_no_answer_wrong(tmp_path, monkeypatch):
    broken_library(tmp_path, "raise ImportError")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(ConfigError, match="import math_verify"):
            symbolic_equal("g+h", "h+g", 20.0)
    assert symbolic_equal("g+h", "h+g", 20.0)
