from concurrent.futures import ThreadPoolExecutor

import pytest

from rllib_arpo.rewards.answers import accuracy
from rllib_arpo.rewards.math_worker import MAX_WORKERS, can_parse, symbolic_equal
from rllib_arpo.rewards.mathematics import math_equal

LIMIT_S = 120  # far above what it takes: without the alarm these never end
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
