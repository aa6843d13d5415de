import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from rllib_arpo import ARPOConfig
from rllib_arpo.rewards.reward import PaperReward

EXAMPLES = Path(__file__).parents[1] / "tuned_examples"
METHODS = sorted(file.stem for file in EXAMPLES.glob("almanac_*.py"))
METHODS.remove("almanac_base")


def config_of(method: str, monkeypatch: pytest.MonkeyPatch) -> ARPOConfig:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    config = runpy.run_path(str(EXAMPLES / f"{method}.py"))["config"]
    assert isinstance(config, ARPOConfig)
    return config


@pytest.mark.parametrize("method", METHODS)
def test_every_example_is_a_valid_config_and_in_the_table(method, monkeypatch):
    config_of(method, monkeypatch).validate()
    assert f"`{method}.py`" in (EXAMPLES / "README.md").read_text()


def test_arpo_branches(monkeypatch):
    config = config_of("almanac_arpo", monkeypatch)
    assert config.branch_rule != "never"
    assert config.num_initial_rollouts < config.group_size


def test_grpo_compares_independent_rollouts_of_a_group(monkeypatch):
    config = config_of("almanac_grpo", monkeypatch)
    assert config.branch_rule == "never"
    assert config.advantage_normalization == "group"
    assert config.loss_aggregation == "sequence_mean"
    assert config.clip_param_high is None


def test_dapo_has_its_four_parts_and_no_kl(monkeypatch):
    config = config_of("almanac_dapo", monkeypatch)
    assert (config.clip_param, config.clip_param_high) == (0.2, 0.28)
    assert config.dynamic_sampling
    assert config.loss_aggregation == "token_mean"
    reward = config.env_config["reward_fn"]
    assert isinstance(reward, PaperReward)
    assert 0 < reward.overlong_buffer_tokens < config.env_config["max_response_tokens"]
    assert config.kl_coeff == 0
    assert config.branch_rule == "never"


def test_reinforce_pp_normalises_over_the_batch_with_a_small_kl(monkeypatch):
    config = config_of("almanac_reinforce_pp", monkeypatch)
    assert config.advantage_normalization == "batch"
    assert 0 < config.kl_coeff <= 0.01
    assert config.branch_rule == "never"


def start(method: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{method}.py"), *flags],
        capture_output=True,
        text=True,
        timeout=580,
        # Not the Ray of another test, which ends when that does.
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"},
    )


@pytest.mark.timeout(600)
def test_an_example_without_its_model_says_what_to_do(tmp_path):
    ended = start("almanac_arpo", "--model", str(tmp_path / "none"))
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"Error: no model in {tmp_path / 'none'}: run `make quick")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_example_trains(almanac_model):
    ended = start(
        "almanac_reinforce_pp", "--model", almanac_model, "--no-tune", "--stop-iters=1"
    )
    assert ended.returncode == 0, ended.stderr
    assert "iter=0 R=" in ended.stdout
    assert "R=nan" not in ended.stdout
