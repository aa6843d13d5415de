"""What the paper's settings share (arXiv:2507.19849, appendix C.2, and its scripts).

Data, documents and runs lie in ARPO_DATA (else /shared): `train_10k.parquet`,
`hard_search_1k.parquet`, as published with the paper. Search is a service that speaks
Bing's protocol (BING_ENDPOINT, BING_API_KEY); a folder of documents in ARPO_CORPUS
takes its place. What services and pages answer is kept in ARPO_TOOL_CACHE, else in
ARPO_DATA.
"""

import os
from pathlib import Path

from rllib_arpo import ARPOConfig
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.tools.standard import StandardTools

BATCH = 128
MINIBATCH = 16
NUM_LEARNERS = 4
NUM_ENV_RUNNERS = 4


def iterations(num_rows: int, num_epochs: int, batch: int = BATCH) -> int:
    """Iterations of `num_epochs` passes over the rows."""
    return num_rows * num_epochs // batch


def paper_config(
    *,
    model: str,
    data: str,
    max_prompt_tokens: int,
    max_response_tokens: int,
    max_tool_calls: int,
    max_result_tokens: int,
    browse: bool = False,
    group_size: int = 16,
    num_initial_rollouts: int = 8,
    batch: int = BATCH,
    minibatch: int = MINIBATCH,
) -> ARPOConfig:
    """ARPO as the paper trains, on 8 GPUs: 4 sample, 4 learn.

    Args:
        model: Hugging Face folder or hub name, after the cold start.
        data: file in ARPO_DATA.
        max_prompt_tokens: of the longest prompt.
        max_response_tokens: of model and tools after it.
        max_tool_calls: per trajectory.
        max_result_tokens: of one tool result; the released code has no such cap.
        browse: whether pages can be opened.
        group_size: M.
        num_initial_rollouts: N.
        batch: prompts per iteration.
        minibatch: prompts per optimizer step.
    """
    shared = Path(os.environ.get("ARPO_DATA", "/shared"))
    corpus = os.environ.get("ARPO_CORPUS")
    endpoint = os.environ.get("BING_ENDPOINT", "")
    tools = StandardTools(
        python="subprocess",
        corpus=corpus,
        search=None if corpus else "bing",
        search_settings={} if corpus else {"endpoint": endpoint},
        top_k=10,
        browse=browse,
        cache=os.environ.get("ARPO_TOOL_CACHE", str(shared / "tool_cache.sqlite")),
    )
    return (
        ARPOConfig()
        .environment(
            env=ToolUseEnv,
            env_config={
                "tools": tools,
                "max_response_tokens": max_response_tokens,
                "max_tool_calls": max_tool_calls,
                "max_result_tokens": max_result_tokens,
            },
            train_tasks=str(shared / data),
        )
        .rl_module(
            model_config={
                "model": model,
                "dtype": "bfloat16",
                "gradient_checkpointing": True,
            }
        )
        .tree_rollout(
            group_size=group_size,
            num_initial_rollouts=num_initial_rollouts,
            branch_factor=2,
            branch_rule="threshold",
            branch_base=0.5,
            branch_entropy_weight=0.2,
            branch_threshold=0.5,
            entropy_probe_tokens=20,
        )
        .engine(
            "vllm",
            engine_kwargs={"max_model_len": max_prompt_tokens + max_response_tokens},
            temperature=1.0,
            top_p=1.0,
        )
        .training(
            lr=1e-6,
            lr_schedule="constant",
            train_batch_size_per_learner=batch // NUM_LEARNERS,
            minibatch_size=minibatch // NUM_LEARNERS,
            num_epochs=1,
            clip_param=0.2,
            dual_clip=3.0,
            kl_coeff=0.0,
            entropy_coeff=0.0,
            loss_aggregation="token_mean",
            advantage_attribution="soft",
        )
        .env_runners(
            num_env_runners=NUM_ENV_RUNNERS,
            num_cpus_per_env_runner=6,
            num_gpus_per_env_runner=1,
        )
        .learners(
            num_learners=NUM_LEARNERS,
            num_cpus_per_learner=4,
            num_gpus_per_learner=1,
            learner_strategy="fsdp2",
        )
        .fault_tolerance(env_runner_restore_timeout_s=1800)
        .debugging(seed=0, log_level="ERROR")
    )
