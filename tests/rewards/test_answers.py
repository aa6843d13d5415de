import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rllib_arpo.rewards.answers import accuracy, exact_match, f1, math_equal
from rllib_arpo.rewards.math_worker import symbolic_equal

EQUAL = [
    ("0.5", "1/2"),
    ("0.5", r"\frac{1}{2}"),
    ("1/2", r"\dfrac12"),
    ("-0.5", r"-\frac{1}{2}"),
    ("1,000", "1000"),
    ("3.0", "3"),
    ("+7", "7"),
    (".25", "0.25"),
    ("$44$", "44"),
    (r"3\sqrt{3}-6", r"3\sqrt{3} - 6"),
    (r"\left(1,2\right)", "(1, 2)"),
    (r"50\%", "50"),
]
SYMBOLIC = [
    (r"-6+3\sqrt{3}", r"3\sqrt{3} - 6"),
    ("x+1", "1+x"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\{2,1\}", r"\{1,2\}"),
    ("x=5", "5"),
]
DIFFERENT = [
    ("1.5", "15"),
    ("-3", "3"),
    ("1/2", "12"),
    ("0.333", "1/3"),
    ("1", "1,000"),
    ("", ""),
    ("", "5"),
    ("1/0", "0"),
]


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_equal_values_are_equal_without_a_worker(answer, gold):
    asked = symbolic_equal.cache_info()
    assert math_equal(answer, gold)
    assert math_equal(gold, answer)
    assert symbolic_equal.cache_info() == asked


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_different_values_are_different(answer, gold):
    assert not math_equal(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), SYMBOLIC)
def test_expressions_are_compared_by_value(answer, gold):
    assert math_equal(answer, gold, 20.0)


@pytest.mark.parametrize(
    ("answer", "gold"), [("x+2", "1+x"), (r"\sqrt{2}", r"\sqrt{3}"), ("}{", "1")]
)
def test_other_expressions_are_different(answer, gold):
    assert not math_equal(answer, gold, 20.0)


def test_a_comparison_without_end_is_cut_off_and_the_next_one_works():
    start = time.monotonic()
    assert not math_equal("10^{10^{10}}", "x", 0.2)
    assert math_equal("y+1", "1+y", 20.0)
    # Not a speed test: without the alarm this would take for ever.
    assert time.monotonic() - start < 120


def test_an_endless_answer_is_not_worked_out():
    assert math_equal("x+x+x", "3x", 20.0)
    assert not math_equal("x+" * 300 + "x", "301x", 20.0)


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_whole_numbers_are_equal_only_to_themselves(left, right):
    assert math_equal(str(left), str(right)) == (left == right)
    assert exact_match(str(left), str(right)) == (left == right)
    assert f1(str(left), str(right)) == float(left == right)


@pytest.mark.parametrize(
    ("answer", "gold", "value"),
    [
        ("The Eiffel Tower", "eiffel tower", 1.0),
        ("Vienna", "Vienna, Austria", 2 / 3),  # precision 1, recall 1/2
        ("in Vienna in Austria", "Vienna, Austria", 2 / 3),  # 2/4 and 2/2
        ("Paris", "Vienna", 0.0),
        ("1.5 m", "15 m", 0.5),  # only the m is shared: 1/2 and 1/2
        ("-3", "3", 0.0),
        ("1.0", "1", 1.0),
        ("2.5.1", "2.5", 0.0),  # a version is no number
        ("1,000 people", "1000 people", 1.0),
        ("U.S.", "US", 1.0),
        ("don't", "dont", 1.0),
        ("the", " ", 0.0),
        ("∞", "∞", 1.0),
    ],
)
def test_f1_of_the_words(answer, gold, value):
    assert f1(answer, gold) == pytest.approx(value)


def test_exact_match_ignores_case_articles_and_punctuation_but_not_the_sign():
    assert exact_match("The U.S.!", "us")
    assert not exact_match("1.5", "15")
    assert not exact_match("-3", "3")


@given(st.text(max_size=30), st.text(max_size=30))
def test_f1_lies_between_0_and_1_and_is_symmetric(left, right):
    assert 0 <= f1(left, right) <= 1
    assert f1(left, right) == f1(right, left)


def test_accuracy_is_the_best_over_the_accepted_answers():
    accepted = ("New York City", "NYC")
    assert accuracy("nyc", accepted, ability="qa") == 1.0
    # "New York" against "New York City": precision 1, recall 2/3 -> 0.8
    assert accuracy("New York", accepted, ability="qa") == pytest.approx(0.8)
    assert accuracy("0.5", ("2", "1/2"), ability="math") == 1.0
    assert accuracy("12", ("1/2",), ability="math") == 0.0
