import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rllib_arpo.statistics import best_of_k, compare, mean_with_interval, pass_at_k


@pytest.mark.parametrize(
    ("num_correct", "num_samples", "k", "expected"),
    [
        # 1 - C(n-c, k)/C(n, k)
        (1, 2, 1, 0.5),  # 1 - 1/2
        (1, 5, 3, 0.6),  # 1 - C(4,3)/C(5,3) = 1 - 4/10
        (2, 5, 3, 0.9),  # 1 - C(3,3)/C(5,3) = 1 - 1/10
        (3, 5, 3, 1.0),  # only two are wrong
        (0, 5, 5, 0.0),
        (5, 5, 5, 1.0),
    ],
)
def test_pass_at_k_is_that_of_the_paper(num_correct, num_samples, k, expected):
    assert pass_at_k(num_correct, num_samples, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_takes_thousands_of_samples():
    # 1 - 9999/10000: one right answer of 10,000 is found by one draw in 10,000
    assert pass_at_k(1, 10_000, 1) == pytest.approx(1e-4)
    assert 0.5 < pass_at_k(10, 10_000, 1_000) < 1


@pytest.mark.parametrize(("c", "n", "k"), [(3, 2, 1), (1, 2, 3), (1, 2, 0), (-1, 2, 1)])
def test_impossible_counts_are_refused(c, n, k):
    with pytest.raises(ValueError, match=r"pass@k needs"):
        pass_at_k(c, n, k)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.data())
def test_best_of_k_is_the_mean_over_all_choices_of_k_answers(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    chosen = [max(some) for some in itertools.combinations(scores, k)]
    expected = math.fsum(chosen) / len(chosen)
    assert best_of_k(scores, k) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.data())
def test_best_of_k_of_right_and_wrong_is_pass_at_k(right, data):
    k = data.draw(st.integers(1, len(right)))
    expected = pass_at_k(sum(right), len(right), k)
    assert best_of_k([float(one) for one in right], k) == pytest.approx(expected)


def test_more_answers_than_there_are_cannot_be_chosen():
    with pytest.raises(ValueError, match=r"1 <= k \(3\) <= n \(2\)"):
        best_of_k([0.5, 1.0], 3)


def test_one_answer_per_task_has_wilsons_interval():
    # p = 8/10, z = 1.959964, z² = 3.841459
    # center (0.8 + z²/20)/(1 + z²/10) = 0.992073/1.384146 = 0.716740
    # half   z·√(0.8·0.2/10 + z²/400)/1.384146 = 1.959964·0.160014/1.384146 = 0.226579
    found = mean_with_interval([1.0] * 8 + [0.0] * 2)
    assert found.mean == pytest.approx(0.8)
    assert found.low == pytest.approx(0.490162, abs=1e-5)
    assert found.high == pytest.approx(0.943319, abs=1e-5)


def test_all_right_is_not_certainty():
    found = mean_with_interval([1.0] * 30)
    # Wilson's lower bound at p = 1: n/(n + z²) = 30/33.841459
    assert (found.mean, found.high) == (1.0, pytest.approx(1.0))
    assert found.low == pytest.approx(30 / 33.841459, abs=1e-6)


def test_means_of_several_answers_are_bootstrapped_over_tasks():
    values = [0.0, 0.25, 0.5, 0.75, 1.0] * 40
    found = mean_with_interval(values, seed=3)
    # standard error of the mean √(0.125/200) = 0.025; 1.96 of them on either side
    assert found.mean == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5 - 0.049, abs=0.005)
    assert found.high == pytest.approx(0.5 + 0.049, abs=0.005)
    assert mean_with_interval(values, seed=3) == found
    assert mean_with_interval(values, seed=4) != found


def test_one_task_says_nothing():
    found = mean_with_interval([0.4])
    assert (found.mean, found.low, found.high) == (0.4, 0.0, 1.0)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(80):
        values = rng.binomial(4, 0.3, size=60) / 4
        found = mean_with_interval(values.tolist(), seed=seed)
        hits += found.low <= 0.3 <= found.high
    # 76 expected; 3 standard deviations are √(80·0.95·0.05)·3 = 5.8
    assert hits >= 70


def test_single_answers_are_compared_by_mcnemar():
    ours = [1.0] * 8 + [0.0] * 1 + [1.0] * 11
    theirs = [0.0] * 8 + [1.0] * 1 + [1.0] * 11
    found = compare(ours, theirs)
    assert found.test == "mcnemar"
    # 9 tasks are told apart, 8 to 1: 2·(C(9,0) + C(9,1))/2⁹ = 20/512
    assert found.p_value == pytest.approx(20 / 512)
    assert found.difference.mean == pytest.approx(7 / 20)
    assert found.difference.low < 7 / 20 < found.difference.high


def test_means_are_compared_by_flipping_signs():
    ours, theirs = [0.5, 0.75, 1.0, 0.5], [0.25, 0.5, 0.5, 0.5]
    found = compare(ours, theirs)
    assert found.test == "permutation"
    # differences .25 .25 .5 and one tie: of 2³ signs only two give a sum as large
    assert found.p_value == pytest.approx(2 / 8)
    assert found.difference.mean == pytest.approx(0.25)


def test_equal_models_are_not_told_apart():
    for values in ([0.0, 1.0, 1.0], [0.5, 0.25, 1.0]):
        found = compare(values, values)
        assert found.p_value == 1.0
        difference = found.difference
        assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)


def test_models_of_equal_strength_seldom_differ():
    rng = np.random.default_rng(1)
    p_values = [
        compare(
            (rng.binomial(3, 0.4, size=30) / 3).tolist(),
            (rng.binomial(3, 0.4, size=30) / 3).tolist(),
            seed=seed,
        ).p_value
        for seed in range(30)
    ]
    # 1.5 below 0.05 expected of 30; 3 standard deviations more are 5.1
    assert sum(p < 0.05 for p in p_values) <= 5


def test_a_paired_test_needs_the_same_tasks():
    with pytest.raises(ValueError, match="got 2 and 1"):
        compare([1.0, 0.0], [1.0])
