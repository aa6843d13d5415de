"""Goes on from checkpoints in a process of its own, and notes what it does.

    python -m tests.scripts.resume FOLDER SEED

FOLDER/VARIANT/checkpoint is gone on from for each variant. SEED goes into Python's,
NumPy's and torch's own generators: if anything drew from one, numbers would differ.
"""

import pickle
import random
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.rllib.callbacks.callbacks import RLlibCallback

from rllib_arpo import ARPO, ARPOConfig
from rllib_arpo.runs import Run
from tests.tiny_runs import arpo_config, sft_config

VARIANTS = ("local", "remote", "sft")
NUM_MORE = 2


class Checksum(RLlibCallback):
    """Logs a number that any other token in any tree would change."""

    def on_sample_end(self, *, env_runner, samples, metrics_logger, **kwargs) -> None:
        for tree in samples:
            for segment in tree.segments:
                number = zlib.crc32(segment.token_ids.tobytes())
                metrics_logger.log_value("checksum", number, reduce="sum")
                number = zlib.crc32(segment.logprobs.tobytes())
                metrics_logger.log_value("checksum_logprobs", number, reduce="sum")


def config_of(variant: str, model: str) -> ARPOConfig:
    """With everything that has a state: two optimizers, a schedule, a task cursor."""
    make: Callable[[str], ARPOConfig] = sft_config if variant == "sft" else arpo_config
    config = make(model).training(
        optimizer="muon",
        lr_schedule="cosine",
        lr_warmup_steps=3,
        lr_total_steps=40,
        num_epochs=2,
    )
    config.evaluation(evaluation_interval=2)
    if variant != "sft":
        config.training(dynamic_sampling=True, train_batch_size_per_learner=5)
        config.callbacks(Checksum)
    return config.env_runners(num_env_runners=int(variant == "remote"))


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def more(algorithm: ARPO, run: Run) -> dict[str, Any]:
    """Train `NUM_MORE` iterations; records without times, and the state at the end."""
    records = [run.log(algorithm.train(), stage="test") for _ in range(NUM_MORE)]
    state = algorithm.get_state()
    del state["metrics_logger"]  # holds times
    state["learner_group"]["learner"].pop("metrics_logger")
    return {"records": [without_times(record) for record in records], "state": state}


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in record.items()
        if not name.startswith("time_")
        and "per_s" not in name
        and "latency" not in name
    }


def main(folder: Path, seed: int) -> None:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    for variant in VARIANTS:
        seed_all(seed)
        algorithm = ARPO.from_checkpoint(folder / variant / "checkpoint")
        seen = more(algorithm, Run(folder / variant / "resumed"))
        algorithm.stop()
        (folder / variant / "resumed.pkl").write_bytes(pickle.dumps(seen))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    print("done")
