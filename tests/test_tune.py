"""ARPO by name in Ray Tune."""

import pytest
from ray import tune

from tests.tiny_runs import arpo_config


def test_a_grid_over_the_learning_rate_runs_one_trial_each(
    cold_start, ray_session, tmp_path
) -> None:
    config = arpo_config(cold_start.model).training(lr=tune.grid_search([1e-4, 1e-3]))
    results = tune.Tuner(
        "ARPO",
        param_space=config,
        run_config=tune.RunConfig(
            stop={"training_iteration": 1}, storage_path=str(tmp_path), verbose=0
        ),
    ).fit()
    assert not results.errors
    rates = sorted(
        result.metrics["learners"]["default_policy"]["learning_rate"]
        for result in results
    )
    assert rates == pytest.approx([1e-4, 1e-3])
    assert [result.metrics["training_iteration"] for result in results] == [1, 1]
