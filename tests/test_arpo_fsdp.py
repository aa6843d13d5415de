"""ARPO on two learners that hold half a model each: nothing waits for ever.

One algorithm serves all tests, in the order of this file.
"""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rllib_arpo import ARPO, ARPOConfig
from rllib_arpo.metrics import WEIGHT_PROBE_ERROR
from tests.tiny_runs import (
    arpo_config,
    engine_weights,
    learned,
    learner_weights,
    optimizer_state,
    running,
    same,
)

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def config(model: str) -> ARPOConfig:
    return (
        arpo_config(model)
        .training(train_batch_size_per_learner=2, minibatch_size=1, kl_coeff=0.01)
        .learners(num_learners=2, num_cpus_per_learner=1, learner_strategy="fsdp2")
    )


@pytest.fixture(scope="module")
def algorithm(almanac_model, ray_session):
    with running(config(almanac_model)) as algorithm:
        yield algorithm


def runs_the_learners_weights(algorithm: ARPO) -> bool:
    held = engine_weights(algorithm.env_runner)
    return all(
        np.array_equal(held[name], array)
        for name, array in learner_weights(algorithm).items()
    )


def test_the_engine_has_the_spread_weights_from_the_start(algorithm) -> None:
    assert runs_the_learners_weights(algorithm)


def test_an_iteration_trains_and_gives_the_engine_new_weights(algorithm) -> None:
    before = learner_weights(algorithm)
    result = algorithm.train()
    assert learned(result)["num_optimizer_steps"] == 2
    assert learned(result)["sampler_logprob_difference"] < 1e-4
    assert result["env_runners"]["engine"][WEIGHT_PROBE_ERROR] < 1e-4
    # Each learner had two of the four trees; the figures are both learners'.
    tokens = learned(result)["tokens_unique"]
    assert tokens == result["env_runners"]["tokens_unique"]
    assert 1 <= learned(result)["tokens_processed"] / tokens < 2
    assert not same(before, learner_weights(algorithm))
    assert runs_the_learners_weights(algorithm)


def test_one_learner_goes_on_from_the_checkpoint_of_two(
    algorithm, almanac_model, tmp_path
) -> None:
    folder = algorithm.save_to_path(str(tmp_path / "checkpoint"))
    saved = learner_weights(algorithm), optimizer_state(algorithm)
    algorithm.train()
    trained = learner_weights(algorithm)
    algorithm.restore_from_path(folder)
    assert same((learner_weights(algorithm), optimizer_state(algorithm)), saved)
    assert runs_the_learners_weights(algorithm)
    alone = config(almanac_model).learners(num_learners=0)
    alone.training(train_batch_size_per_learner=4, minibatch_size=2)
    with running(alone) as one:
        one.restore_from_path(folder)
        assert same((learner_weights(one), optimizer_state(one)), saved)
        one.train()
        # The same four trees, but two others of them in each step.
        for name, array in learner_weights(one).items():
            assert np.abs(array - trained[name]).max() < 5e-3


def test_evaluation_of_spread_weights_does_not_wait(algorithm) -> None:
    assert algorithm.evaluate()["env_runners"]["num_episodes"] == 4


def test_spread_weights_are_exported_as_an_ordinary_model(algorithm, tmp_path) -> None:
    folder = algorithm.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    held = learner_weights(algorithm)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.from_numpy(held[name]))


def test_adapters_are_sampled_with_and_exported(almanac_model, tmp_path) -> None:
    model_config = {"model": almanac_model, "lora": LORA}
    lora = arpo_config(almanac_model).rl_module(model_config=model_config)
    lora.training(lr=0.01, kl_coeff=0.01)
    with running(lora) as algorithm:
        for _ in range(2):
            result = algorithm.train()
        assert learned(result)["sampler_logprob_difference"] < 1e-4
        assert learned(result)["kl"] > 1e-6
        folder = algorithm.save_pretrained(tmp_path / "model")
        sampled_with = engine_weights(algorithm.env_runner)
        first = AutoModelForCausalLM.from_pretrained(almanac_model).state_dict()
        exported = AutoModelForCausalLM.from_pretrained(folder)
        for name, parameter in exported.named_parameters():
            np.testing.assert_allclose(
                parameter.detach(), sampled_with[name], atol=1e-6, err_msg=name
            )
            adapted = name.endswith(("q_proj.weight", "v_proj.weight"))
            assert torch.equal(parameter, first[name]) != adapted, name
        checkpoint = algorithm.save_to_path(str(tmp_path / "checkpoint"))
        assert all(".lora_" in name for name in learner_weights(algorithm))
        algorithm.train()
        algorithm.restore_from_path(checkpoint)
        for name, array in engine_weights(algorithm.env_runner).items():
            np.testing.assert_array_equal(array, sampled_with[name], err_msg=name)
