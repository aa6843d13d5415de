"""tuned_examples/paper: the paper's settings, and two iterations of each."""

import json
import runpy
from pathlib import Path

import pytest

from rllib_arpo import ARPOConfig
from rllib_arpo.runs import Run, train
from rllib_arpo.tools.standard import StandardTools
from tests.models import save_tiny_model
from tests.scripts import ROOT
from tests.tiny_runs import running
from tests.tokenizers import qwen_like

EXAMPLES = ROOT / "tuned_examples" / "paper"
# Name, model, prompts a batch, M, N, prompt and response tokens, tool calls.
SETTINGS = {
    "qwen25_3b_reasoning": ("Qwen/Qwen2.5-3B-Instruct", 128, 16, 8, 1536, 4096, 3),
    "qwen25_7b_reasoning": ("Qwen/Qwen2.5-7B-Instruct", 128, 16, 8, 1536, 4096, 3),
    "llama31_8b_reasoning": (
        "meta-llama/Llama-3.1-8B-Instruct",
        *(128, 16, 8, 1536, 4096, 3),
    ),
    "qwen3_8b_deep_search": ("Qwen/Qwen3-8B", 128, 16, 8, 2000, 8192, 6),
    "qwen3_14b_deep_search": ("Qwen/Qwen3-14B", 64, 12, 6, 2000, 6192, 6),
}
ITERATIONS = {"reasoning": 10_000 * 2 // 128, "deep_search": 1_071 * 5 // 128}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where the examples find rows and documents."""
    row = {
        "question": "How high is vifel?",
        "answer": "44",
        "ability": "qa",
    }
    text = "".join(json.dumps(row) + "\n" for _ in range(4))
    (tmp_path / "rows.jsonl").write_text(text)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "facts.txt").write_text("The height of vifel is 44.\n")
    monkeypatch.setenv("ARPO_DATA", str(tmp_path))
    monkeypatch.setenv("ARPO_CORPUS", str(tmp_path / "corpus"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return tmp_path


def loaded(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_there_is_an_example_of_each_setting_and_a_row_in_the_table():
    files = {file.stem for file in EXAMPLES.glob("*.py")} - {"paper_base"}
    assert files == set(SETTINGS)
    table = (EXAMPLES.parent / "README.md").read_text()
    assert all(f"`paper/{name}.py`" in table for name in files)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_example_has_the_papers_numbers_and_is_valid(name, place):
    values = loaded(name)
    config = values["config"]
    assert isinstance(config, ARPOConfig)
    config.validate()
    model, batch, group, roots, prompt, response, calls = SETTINGS[name]
    assert config.model_config["model"] == model
    learners = config.num_learners
    assert config.train_batch_size_per_learner * learners == batch
    assert config.minibatch_size is not None
    assert config.minibatch_size * learners == batch // 8
    assert (config.group_size, config.num_initial_rollouts) == (group, roots)
    assert config.env_config["max_response_tokens"] == response
    assert config.env_config["max_tool_calls"] == calls
    assert config.engine_kwargs["max_model_len"] == prompt + response
    assert (config.lr, config.clip_param, config.dual_clip) == (1e-6, 0.2, 3.0)
    assert (config.kl_coeff, config.temperature, config.top_p) == (0.0, 1.0, 1.0)
    assert (config.branch_base, config.branch_threshold) == (0.5, 0.5)
    assert (config.branch_entropy_weight, config.branch_factor) == (0.2, 2)
    kind = "reasoning" if name.endswith("reasoning") else "deep_search"
    expected = ITERATIONS[kind] * 128 // batch
    assert abs(values["NUM_ITERATIONS"] - expected) <= 1
    assert f"--iterations {values['NUM_ITERATIONS']}\n" in values["__doc__"]


def test_without_a_corpus_search_is_bing_with_ten_hits(place, monkeypatch):
    monkeypatch.delenv("ARPO_CORPUS")
    tools = loaded("qwen3_8b_deep_search")["config"].env_config["tools"]
    assert isinstance(tools, StandardTools)
    assert (tools.search, tools.top_k, tools.browse) == ("bing", 10, True)
    assert [spec.name for spec in tools.tool_specs] == ["search", "browse", "python"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", SETTINGS)
def test_an_example_trains_two_iterations_on_a_tiny_model(name, place):
    """The model and what a laptop cannot hold are replaced, nothing else."""
    tokenizer = qwen_like()
    tokenizer.save_pretrained(place / "model")
    save_tiny_model(place / "model", vocab_size=len(tokenizer))
    config = loaded(name)["config"]
    config = (
        config.environment(
            train_tasks=str(place / "rows.jsonl"),
            env_config={"max_response_tokens": 64, "max_result_tokens": 32},
        )
        .rl_module(model_config={"model": str(place / "model")})
        .tree_rollout(group_size=4, num_initial_rollouts=2)
        .engine("torch", engine_kwargs={})
        .training(train_batch_size_per_learner=4, minibatch_size=2)
        .env_runners(num_env_runners=0, num_gpus_per_env_runner=0)
        .learners(num_learners=0, num_gpus_per_learner=0)
    )
    run = Run(place / "run")
    records = []
    with running(config) as algorithm:
        train(
            algorithm,
            run,
            num_iterations=2,
            stage="ARPO",
            on_iteration=records.append,
            checkpoint_interval=2,
        )
    assert [record["iteration"] for record in records] == [1, 2]
    assert all(record["num_tokens_sampled"] > 0 for record in records)
    assert run.checkpoint is not None
    assert list(run.tree_files()) == [1, 2]
