"""ARPO for Qwen2.5-3B-Instruct on a cluster: 8 GPUs, best on two or more nodes.

    rllib-arpo train tuned_examples/cluster/qwen_3b_arpo.py --out /shared/runs/qwen_3b

Four EnvRunners with a vLLM each sample while four learners, which share the model's
weights and optimizer by FSDP2, update. Ray places each actor where its resources are,
so nothing here names a node. Data, documents and runs lie on a disk that all nodes
mount under the same path: ARPO_DATA, else /shared.
"""

import os
from pathlib import Path

from rllib_arpo import ARPOConfig
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.tools.standard import StandardTools

NUM_LEARNERS = 4
TREES_PER_ITERATION = 128
TREES_PER_STEP = 16

shared = Path(os.environ.get("ARPO_DATA", "/shared"))

config = (
    ARPOConfig()
    .environment(
        env=ToolUseEnv,
        env_config={
            "tools": StandardTools(corpus=str(shared / "corpus")),
            "max_response_tokens": 4096,
            "max_tool_calls": 5,
        },
        train_tasks=str(shared / "train.parquet"),
    )
    .rl_module(model_config={"model": "Qwen/Qwen2.5-3B-Instruct", "dtype": "bfloat16"})
    .tree_rollout(group_size=16, num_initial_rollouts=8)
    .engine("vllm", engine_kwargs={"max_model_len": 8192})
    .training(
        lr=1e-6,
        train_batch_size_per_learner=TREES_PER_ITERATION // NUM_LEARNERS,
        minibatch_size=TREES_PER_STEP // NUM_LEARNERS,
        # Sampling goes on during an update, with weights that are one update old at
        # most; importance weights correct for that.
        asynchronous=True,
        max_policy_lag=1,
        tis_cap=2.0,
        old_logprobs="recompute",
    )
    .env_runners(
        num_env_runners=4, num_cpus_per_env_runner=6, num_gpus_per_env_runner=1
    )
    .learners(
        num_learners=NUM_LEARNERS,
        num_cpus_per_learner=4,
        num_gpus_per_learner=1,
        learner_strategy="fsdp2",
    )
    # A runner's node may take minutes to be replaced; sampling goes on meanwhile.
    .fault_tolerance(env_runner_restore_timeout_s=1800)
    .debugging(seed=0, log_level="ERROR")
)
