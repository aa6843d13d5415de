"""`ARPOConfig`: chained groups, refusals that name the cure, and what survives."""

from typing import Any

import numpy as np
import pytest
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from rllib_arpo import ARPO, SFT, ARPOConfig, SFTConfig
from rllib_arpo.config_numbers import OF_SAMPLING, OF_TRAINING
from rllib_arpo.errors import ConfigError
from rllib_arpo.rl_module import CausalLMRLModule
from rllib_arpo.rollouts.branching import BranchPoint, LeafBudget, never, threshold
from tests.tiny_runs import arpo_config

FOLDER = "some/folder"


def branch_on_a_whim(point: BranchPoint) -> bool:
    return point.num_tool_calls > 1


def test_every_group_returns_the_config() -> None:
    config = ARPOConfig()
    assert config.environment(train_tasks=[]) is config
    assert config.env_runners(num_env_runners=0) is config
    assert config.tree_rollout(group_size=4) is config
    assert config.engine("torch") is config
    assert config.training(clip_param_high=0.28) is config
    assert config.learners(num_learners=0) is config
    assert config.rl_module(model_config={"model": FOLDER}) is config
    assert config.evaluation(evaluation_duration=3) is config
    assert config.checkpointing(export_native_model_files=False) is config
    assert config.fault_tolerance(restart_failed_env_runners=True) is config
    assert config.debugging(deterministic=True, seed=3) is config
    assert (config.group_size, config.clip_param_high, config.seed) == (4, 0.28, 3)


def test_a_valid_config_validates() -> None:
    arpo_config(FOLDER).validate()


def test_a_group_changes_only_what_it_was_given() -> None:
    before = vars(ARPOConfig())
    after = vars(ARPOConfig().tree_rollout(branch_base=0.25))
    assert {name for name in before if after[name] != before[name]} == {"branch_base"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"group_size": 4, "num_initial_rollouts": 8},
            ["`num_initial_rollouts` (8)", "`group_size` (4)", "Lower"],
        ),
        (
            {"group_size": 4, "num_initial_rollouts": 4},
            ["`num_initial_rollouts` (4)", "`group_size` (4)", '"never"'],
        ),
        (
            {"train_batch_size_per_learner": 4, "minibatch_size": 8},
            ["`minibatch_size` (8)", "`train_batch_size_per_learner` (4)"],
        ),
        (
            {"max_tokens_per_row": 2000, "max_tokens_per_microbatch": 1000},
            ["`max_tokens_per_row` (2000)", "`max_tokens_per_microbatch` (1000)"],
        ),
        ({"max_skipped_steps": -2}, ["`max_skipped_steps` (-2)", ">= 0"]),
        (
            {"minibatch_size": None},
            ["`minibatch_size` (None)", "`train_batch_size_per_learner` (4)"],
        ),
        ({"temperature": 0.0}, ["`temperature` (0)", "evaluation_config"]),
        ({"temperature": -0.5}, ["`temperature` (-0.5)", ">= 0"]),
        (
            {"top_p": 0.9},
            ["`top_p` (0.9)", "`old_logprobs` ('rollout')", 'old_logprobs="recompute"'],
        ),
        ({"top_k": 5}, ["`top_k` (5)", "`old_logprobs` ('rollout')"]),
        ({"top_k": -1}, ["`top_k` (-1)", "0 keeps all"]),
        ({"top_p": 0.0}, ["`top_p` (0.0)", "(0, 1]"]),
        (
            {"lr_schedule": "cosine"},
            ["`lr_schedule` ('cosine')", "`lr_total_steps` (None)"],
        ),
        (
            {"lr_schedule": "linear", "lr_warmup_steps": 10, "lr_total_steps": 5},
            ["`lr_warmup_steps` (10)", "`lr_total_steps` (5)", "lower the first"],
        ),
        (
            {"clip_param": 0.2, "clip_param_high": 0.1},
            ["`clip_param_high` (0.1)", "`clip_param` (0.2)"],
        ),
        (
            {"tis_cap": 2.0},
            [
                "`tis_cap` (2.0)",
                "`old_logprobs` ('rollout')",
                'Set `old_logprobs="recompute"`',
            ],
        ),
        ({"clip_param": 1.5}, ["`clip_param` (1.5)", "(0, 1)"]),
        ({"dual_clip": 1.0}, ["`dual_clip` (1.0)", "None"]),
        ({"branch_factor": 1}, ["`branch_factor` (1)", '"never"']),
        ({"branch_rule": "sometimes"}, ['`branch_rule` ("sometimes")', "bernoulli"]),
        ({"optimizer": "sgd"}, ["`optimizer` ('sgd')", "'adamw'", "'muon'"]),
        ({"engine_name": "vllmm"}, ["`engine` ('vllmm')", "'torch'"]),
        ({"engine_kwargs": {"max_seqs": 2}}, ["`max_seqs`", "max_num_seqs"]),
        ({"packing": "trees"}, ["`packing` ('trees')", "'paths'"]),
        ({"learner_strategy": "fsdp"}, ["`learner_strategy` ('fsdp')", "'fsdp2'"]),
        (
            {"evaluation_interval": 5, "eval_tasks": None},
            ["`evaluation_interval` (5)", "`eval_tasks` is None", "eval_tasks=..."],
        ),
        ({"evaluation_duration_unit": "timesteps"}, ["'timesteps'", "'episodes'"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_contradictions_are_refused_with_both_values_and_the_cure(
    settings, words
) -> None:
    config = arpo_config(FOLDER)
    for name, value in settings.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    with pytest.raises(ConfigError) as refused:
        config.validate()
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", -1, "a number >= 0"),
        ("lr", "1e-6", "a number >= 0"),
        ("kl_coeff", -1, "a number >= 0; 0 takes no penalty"),
        ("num_epochs", 0, "a whole number >= 1"),
        ("num_epochs", 1.5, "a whole number >= 1"),
        ("num_env_runners", -1, "a whole number >= 0; 0 samples in the driver"),
        ("num_learners", -1, "a whole number >= 0; 0 learns in the driver"),
        ("clip_param", "0.2", "a number in (0, 1)"),
        ("clip_param", 1, "a number in (0, 1)"),
        ("entropy_coeff", float("nan"), "a number"),
        ("temperature", float("inf"), "a number >= 0"),
        ("weight_decay", -1, "a number >= 0"),
        ("adam_betas", (0.9,), "two numbers in [0, 1): β₁ and β₂"),
        ("adam_betas", (0.9, 1.0), "two numbers in [0, 1): β₁ and β₂"),
        ("adam_betas", 0.9, "two numbers in [0, 1): β₁ and β₂"),
        ("grad_clip", -1, "a number > 0, or None to switch it off"),
        ("max_dynamic_sampling_rounds", -1, "a whole number >= 0"),
        ("max_tool_failure_share", 2, "a number in [0, 1], or None to switch it off"),
        ("group_size", "16", "a whole number >= 1"),
        ("num_saved_trees", -2, "a whole number >= 0, or None for all"),
    ],
)
def test_a_number_that_a_setting_does_not_take_is_refused_by_name(
    name, value, expected
) -> None:
    config = arpo_config(FOLDER)
    assert hasattr(config, name)
    setattr(config, name, value)
    with pytest.raises(ConfigError) as refused:
        config.validate()
    assert str(refused.value) == f"`{name}` ({value!r}) must be {expected}."


def test_numbers_at_the_ends_and_those_of_numpy_are_taken() -> None:
    config = arpo_config(FOLDER).env_runners(num_env_runners=np.int64(0))
    config.training(lr=np.float64(0), minibatch_size=np.int64(2), grad_clip=None)
    config.training(adam_betas=[0, 0.5], clip_param_high=1.5, entropy_coeff=-0.1)
    config.engine(top_p=1).tree_rollout(max_tool_failure_share=1)
    config.validate()


def test_every_number_of_ours_has_its_interval() -> None:
    defaults = vars(ARPOConfig())
    ours = {
        name
        for name in defaults.keys() - vars(AlgorithmConfig()).keys()
        if isinstance(defaults[name], float | int)
        and not isinstance(defaults[name], bool)
    }
    assert ours - OF_SAMPLING.keys() - OF_TRAINING.keys() == set()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"deterministic": True, "num_gpus_per_env_runner": 0},
            ["`deterministic` (True)", '`engine` "torch"'],
        ),
        (
            {"num_gpus_per_env_runner": 0.5},
            ["`num_gpus_per_env_runner` (0.5)", "at most 0.5", "`colocate=True`"],
        ),
        (
            {
                "num_gpus_per_env_runner": 0.5,
                "engine_kwargs": {"gpu_memory_utilization": 0.8},
            },
            ["`gpu_memory_utilization` (0.8)"],
        ),
        (
            {
                "num_gpus_per_env_runner": 0.5,
                "engine_kwargs": {"tensor_parallel_size": 2},
            },
            ["`num_gpus_per_env_runner` (0.5)", "`tensor_parallel_size` (2)"],
        ),
        (
            {
                "num_gpus_per_env_runner": 2,
                "engine_kwargs": {"tensor_parallel_size": 4},
            },
            ["`num_gpus_per_env_runner` (2)", "`tensor_parallel_size` (4)"],
        ),
        (
            {"num_gpus_per_env_runner": 1.5},
            ["`num_gpus_per_env_runner` (1.5)", "whole number"],
        ),
        (
            {"weight_transfer": "nccl", "num_gpus_per_env_runner": 0},
            ["`weight_transfer` ('nccl')", "`num_gpus_per_env_runner`"],
        ),
        (
            {"weight_transfer": "nccl"},
            ["`weight_transfer` ('nccl')", "`num_gpus_per_learner`"],
        ),
        (
            {
                "weight_transfer": "nccl",
                "num_gpus_per_env_runner": 0.5,
                "num_gpus_per_learner": 0.5,
                "colocate": True,
            },
            ["`weight_transfer` ('nccl')", "`colocate` (True)", "'ipc'"],
        ),
        (
            {"weight_transfer": "ipc", "num_gpus_per_learner": 1, "num_learners": 1},
            ["`weight_transfer` ('ipc')", "`num_gpus_per_env_runner` (1)"],
        ),
        (
            {
                "weight_transfer": "ipc",
                "num_env_runners": 2,
                "num_gpus_per_env_runner": 0.5,
                "num_gpus_per_learner": 0.5,
                "num_learners": 1,
                "colocate": True,
            },
            ["`num_env_runners` (2)", "learners (1)"],
        ),
        (
            {
                "num_gpus_per_env_runner": 1,
                "engine_kwargs": {"tensor_parallel_size": 2},
            },
            ["`num_gpus_per_env_runner` (1)", "`tensor_parallel_size` (2)"],
        ),
        ({"weight_transfer": "rdma"}, ["`weight_transfer` ('rdma')", "'ipc'"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_vllm_cannot_do_is_refused_before_it_starts(settings, words) -> None:
    config = (
        arpo_config(FOLDER)
        .engine("vllm")
        .debugging(deterministic=False)
        .env_runners(num_env_runners=1, num_gpus_per_env_runner=1)
    )
    for name, value in settings.items():
        assert hasattr(config, name), name
        setattr(config, name, value)
    with pytest.raises(ConfigError) as refused:
        config.validate()
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_gpus_per_env_runner": 0},
        {"num_gpus_per_env_runner": 2},
        {"num_gpus_per_env_runner": 0.5, "colocate": True},
        {
            "num_gpus_per_env_runner": 0.25,
            "engine_kwargs": {"gpu_memory_utilization": 0.25},
        },
        {
            "num_gpus_per_env_runner": 1,
            "num_gpus_per_learner": 1,
            "weight_transfer": "nccl",
        },
        {
            "num_gpus_per_env_runner": 0.5,
            "num_gpus_per_learner": 0.5,
            "num_learners": 1,
            "weight_transfer": "ipc",
            "colocate": True,
        },
    ],
    ids=str,
)
def test_what_vllm_can_do_is_not_refused(settings) -> None:
    config = arpo_config(FOLDER).engine("vllm").debugging(deterministic=False)
    config.env_runners(num_env_runners=1)
    for name, value in settings.items():
        setattr(config, name, value)
    config.validate()
    # RLlib makes and validates it whether or not there are EnvRunners of its own.
    evaluation: Any = config.get_evaluation_config_object()
    evaluation.validate()
    assert evaluation.weight_transfer == "object_store"


def test_weights_from_gpu_to_gpu_are_not_for_the_torch_engine() -> None:
    config = arpo_config(FOLDER).engine(weight_transfer="nccl")
    with pytest.raises(ConfigError, match="is vLLM's"):
        config.validate()


def test_an_evaluation_without_a_fixed_number_of_tasks_is_refused() -> None:
    config = arpo_config(FOLDER).evaluation(
        evaluation_duration="auto",
        evaluation_num_env_runners=1,
        evaluation_parallel_to_training=True,
    )
    with pytest.raises(ConfigError, match=r"`evaluation_duration` \('auto'\).*number"):
        config.validate()


@pytest.mark.parametrize(
    ("lora", "settings", "words"),
    [
        ({"rank": 8}, {}, ["`rank`", "expected keys", "lora_alpha"]),
        ({"lora_dropout": 0.1}, {}, ["lora_dropout to 0.1", "expected 0"]),
        (
            {"r": 8},
            {"weight_transfer": "ipc", "engine_name": "vllm"},
            ["`weight_transfer` ('ipc')", "'object_store'"],
        ),
        (
            None,
            {"engine_kwargs": {"lora": {"r": 8}}, "engine_name": "vllm"},
            ["`engine_kwargs` holds `lora`", "model_config"],
        ),
    ],
)
def test_adapters_that_cannot_be_trained_and_served_are_refused(
    lora, settings, words
) -> None:
    config = arpo_config(FOLDER).debugging(deterministic=False)
    config.rl_module(model_config={"model": FOLDER, "lora": lora})
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError) as refused:
        config.validate()
    for word in words:
        assert word in str(refused.value)


def test_adapters_that_can_be_are_not_refused() -> None:
    lora = {"r": 8, "lora_alpha": 16, "target_modules": {"q_proj"}, "lora_dropout": 0}
    arpo_config(FOLDER).rl_module(
        model_config={"model": FOLDER, "lora": lora}
    ).validate()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"gradient_checkpontng": True},
            [
                "`gradient_checkpontng`",
                "takes model, dtype, gradient_checkpointing, lora",
            ],
        ),
        ({"dtype": "float16"}, ["`dtype` 'float16'", "'float32', 'bfloat16'"]),
    ],
)
def test_what_a_model_does_not_take_is_refused(given, words) -> None:
    config = arpo_config(FOLDER)
    config.rl_module(model_config={"model": FOLDER, **given})
    with pytest.raises(ConfigError) as refused:
        config.validate()
    for word in words:
        assert word in str(refused.value)


def test_all_that_a_model_takes_is_not_refused() -> None:
    given = {"dtype": "bfloat16", "gradient_checkpointing": True, "reference": True}
    config = arpo_config(FOLDER)
    config.rl_module(model_config={"model": FOLDER, "lora": None, **given}).validate()


def test_a_module_of_the_users_own_may_take_more() -> None:
    spec = RLModuleSpec(module_class=CausalLMRLModule)
    given = {"model": FOLDER, "of_mine": 1}
    config = arpo_config(FOLDER)
    config.rl_module(rl_module_spec=spec, model_config=given).validate()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("engine_name", "`engine` ('nonsense') must be one of 'torch', 'vllm'."),
        ("gym_env_vectorize_mode", "(nonsense) must be a member of"),
    ],
    ids=["ours", "RLlib's"],
)
def test_a_refusal_can_be_switched_off_but_does_not_advise_it(name, words) -> None:
    config = arpo_config(FOLDER)
    setattr(config, name, "nonsense")
    with pytest.raises(ConfigError) as refused:
        config.validate()
    assert words in str(refused.value)
    assert "suppress" not in str(refused.value)
    config.experimental(_validate_config=False).validate()


def test_a_missing_model_is_refused() -> None:
    config = arpo_config(FOLDER).rl_module(model_config={"dtype": "float32"})
    with pytest.raises(ConfigError, match=r"No model.*rl_module\(model_config="):
        config.validate()


def test_a_cut_distribution_is_allowed_when_probabilities_are_recomputed() -> None:
    arpo_config(FOLDER).engine(top_p=0.9).training(old_logprobs="recompute").validate()


def test_importance_weights_are_allowed_when_probabilities_are_recomputed() -> None:
    arpo_config(FOLDER).training(tis_cap=2.0, old_logprobs="recompute").validate()


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.environment(train_task=[]),
        lambda c: c.tree_rollout(group_sizes=3),
        lambda c: c.engine(temprature=1.0),
        lambda c: c.training(clip_parameter=0.1),
        lambda c: c.debugging(determinist=True),
    ],
)
def test_an_unknown_keyword_is_refused(call) -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        call(ARPOConfig())


def test_no_default_of_ours_is_minus_one() -> None:
    ours = vars(ARPOConfig()).keys() - vars(AlgorithmConfig()).keys()
    assert len(ours) > 30
    assert [name for name in ours if getattr(ARPOConfig(), name) == -1] == []


def test_every_setting_survives_state_and_copy() -> None:
    config = (
        arpo_config(FOLDER)
        # RLlib's own state forgets whatever equals -1.
        .tree_rollout(branch_entropy_weight=-1.0, branch_threshold=-1)
        .engine(temperature=0.7, engine_kwargs={"max_num_seqs": 3})
        .training(adam_betas=(0.8, 0.9), dual_clip=None, lr_total_steps=9)
    )
    # RLlib writes policies as tuples; functools' functions equal only themselves.
    names = vars(config).keys() - {"policies", "train_tasks", "eval_tasks"}
    for other in (ARPOConfig.from_state(config.get_state()), config.copy()):
        assert type(other) is ARPOConfig
        different = {
            name for name in names if getattr(other, name) != getattr(config, name)
        }
        assert different == set()


def test_an_sft_config_comes_back_as_one() -> None:
    config = SFTConfig().environment(train_traces=[]).training(lr=0.5)
    other = ARPOConfig.from_state(config.get_state())
    assert type(other) is SFTConfig and other.algo_class is SFT
    assert (other.lr, other.train_traces) == (0.5, [])
    assert ARPOConfig.from_state(ARPOConfig().get_state()).algo_class is ARPO


@pytest.mark.parametrize(
    "rule", [branch_on_a_whim, f"{__name__}:branch_on_a_whim"], ids=["function", "path"]
)
def test_a_rule_of_the_users_own_is_used(rule) -> None:
    resolved = ARPOConfig().tree_rollout(branch_rule=rule).tree_settings().branch_rule
    assert resolved.__name__ == "branch_on_a_whim"
    assert ARPOConfig().tree_settings().branch_rule is threshold


@pytest.mark.parametrize("path", ["no.such.module:rule", "math:no_such_rule"])
def test_an_import_path_that_leads_nowhere_is_refused(path) -> None:
    config = arpo_config(FOLDER).tree_rollout(branch_rule=path)
    with pytest.raises(ConfigError, match=r"branch_rule.*cannot import"):
        config.validate()


def test_never_branching_is_grpo() -> None:
    settings = (
        ARPOConfig()
        .tree_rollout(branch_rule="never", group_size=16, num_initial_rollouts=8)
        .tree_settings()
    )
    assert settings.branch_rule is never
    # All 16 start at once: nothing is left for branches or a second wave.
    assert LeafBudget(settings).num_initial == 16


def test_evaluation_takes_one_independent_rollout_unless_told_otherwise() -> None:
    config = arpo_config(FOLDER).evaluation(
        evaluation_interval=1,
        evaluation_config=ARPOConfig.overrides(temperature=0.0),
    )
    evaluation = config.get_evaluation_config_object()
    settings = evaluation.tree_settings()
    assert (settings.group_size, settings.num_initial_rollouts) == (1, 1)
    assert settings.branch_rule is never
    assert evaluation.sampling_params().temperature == 0.0
    assert config.sampling_params().temperature == 1.0
    config.evaluation(
        evaluation_config=ARPOConfig.overrides(group_size=5, num_initial_rollouts=5)
    )
    settings = config.get_evaluation_config_object().tree_settings()
    assert settings.group_size == 5


def test_remote_env_runners_leave_the_driver_without_a_model() -> None:
    config = arpo_config(FOLDER).env_runners(num_env_runners=2)
    config.validate()
    assert config.create_local_env_runner is False
    config.env_runners(num_env_runners=0).validate()
    assert config.create_local_env_runner is True
