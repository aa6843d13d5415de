import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rllib_arpo.errors import ConfigError
from rllib_arpo.rollouts.branching import (
    BRANCH_RULES,
    BranchPoint,
    LeafBudget,
    TreeSettings,
    always,
    branch_probability,
    derive_seed,
    derive_uniform,
    mean_entropy,
    never,
)


def point(**values: float) -> BranchPoint:
    defaults = {
        "entropy": 0.3,
        "initial_entropy": 0.2,
        "entropy_change": 0.1,
        "probability": 0.52,
        "base": 0.5,
        "threshold": 0.5,
        "drawn": 0.51,
        "num_tool_calls": 1,
    }
    return BranchPoint(**(defaults | values))  # type: ignore[arg-type]


def test_entropy_is_a_mean_over_k_tokens_in_units_of_ln_v():
    # first 2 of (ln 8, 3 ln 8, 100): mean 2 ln 8; / ln 64 = 2·3/6 = 1
    entropies = np.array([math.log(8), 3 * math.log(8), 100.0])
    assert mean_entropy(entropies, num_tokens=2, vocab_size=64) == pytest.approx(1.0)


def test_entropy_of_a_short_segment_is_the_mean_over_what_there_is():
    # one token of ln 8 with k = 20: ln 8 / ln 64 = 1/2, not 1/40
    entropies = np.array([math.log(8)])
    assert mean_entropy(entropies, num_tokens=20, vocab_size=64) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [(0.1, 0.52), (-0.1, 0.48), (0.0, 0.5), (5.0, 1.0), (-5.0, 0.0)],
)
def test_probability_is_alpha_plus_beta_change_clipped(change, expected):
    # 0.5 + 0.2·0.1 = 0.52; 0.5 + 0.2·5 = 1.5 -> 1; 0.5 - 1 = -0.5 -> 0
    assert branch_probability(change, base=0.5, weight=0.2) == pytest.approx(expected)


def test_the_rules_decide_as_named():
    likely, unlikely = point(probability=0.52), point(probability=0.48)
    assert BRANCH_RULES["threshold"](likely)
    assert not BRANCH_RULES["threshold"](unlikely)
    assert not BRANCH_RULES["threshold"](point(probability=0.5))  # P > τ, not >=
    # drawn 0.51: below 0.52, above 0.48 and above α = 0.5
    assert BRANCH_RULES["bernoulli"](likely)
    assert not BRANCH_RULES["bernoulli"](unlikely)
    assert not BRANCH_RULES["random"](likely)
    assert BRANCH_RULES["random"](point(probability=0.0, drawn=0.49))
    assert BRANCH_RULES["always"](unlikely)
    assert not BRANCH_RULES["never"](likely)


def test_budget_grants_until_the_group_is_full():
    budget = LeafBudget(TreeSettings(group_size=5, num_initial_rollouts=3))
    assert budget.take(budget.num_initial) == 3
    assert [budget.take(1), budget.take(4), budget.take(1)] == [1, 1, 0]
    assert budget.free == 0


def test_a_rule_that_never_branches_starts_the_whole_group_at_once():
    settings = TreeSettings(group_size=16, num_initial_rollouts=8, branch_rule=never)
    assert LeafBudget(settings).num_initial == 16
    settings = TreeSettings(group_size=16, num_initial_rollouts=8, branch_rule=always)
    assert LeafBudget(settings).num_initial == 8


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"num_initial_rollouts": 32}, ("num_initial_rollouts", "32", "16")),
        ({"num_initial_rollouts": 0}, ("num_initial_rollouts", "0")),
        ({"branch_factor": 1}, ("branch_factor", "1", "never")),
        ({"branch_base": 1.5}, ("branch_base", "1.5")),
        ({"entropy_probe_tokens": 0}, ("entropy_probe_tokens", "0")),
    ],
)
def test_settings_that_contradict_are_refused_with_both_values(settings, names):
    with pytest.raises(ConfigError) as error:
        TreeSettings(**settings)
    assert all(name in str(error.value) for name in names)


@given(st.integers(), st.integers(0, 50))
def test_draws_depend_on_their_parts_alone_and_lie_in_the_unit_interval(seed, turn):
    drawn = derive_uniform(seed, (0, 1), turn, "branch")
    assert drawn == derive_uniform(seed, (0, 1), turn, "branch")
    assert 0.0 <= drawn < 1.0
    assert drawn != derive_uniform(seed, (0, 2), turn, "branch")


def test_draws_are_uniform():
    draws = [derive_uniform(seed, "branch") for seed in range(4000)]
    # standard error of the mean: 1/√12/√4000 = 0.0046; five of them
    assert np.mean(draws) == pytest.approx(0.5, abs=0.023)
    assert len({derive_seed(seed) for seed in range(4000)}) == 4000
