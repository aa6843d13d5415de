"""One learner step on rows of trees against rows of paths: time and memory.

    headline    prompt 200; 8 pairs of leaves share 150 tokens and own 150 each
    light       prompt 100; 4 of 12 roots branch once, late: little is shared
    search      prompt 150; 8 roots call a tool twice, branch after the second call
    deep        prompt 100; a trunk of 300, then 16 leaves of 100: 80 % is shared
    binary      prompt 80; four levels of branching, 80 tokens each: 80 % is shared

A step is a whole `update()`: packing, forward, backward, AdamW, on a Qwen2 of hidden
512 with 4 layers and vocabulary 8,192. Both packings alternate; medians are compared.
Memory is the peak of a step over what stood before it, each in a process of its own.

`logits_memory_ratio` is such a peak at a vocabulary of 151,936 and a row of 4,096
tokens, over that of a step that makes all logits at once.

    OMP_NUM_THREADS=1 python benchmarks/learner_packing.py --json learner_packing.json
    python benchmarks/learner_packing.py --gpu
"""

import argparse
import logging
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from report import print_table_and_write
from transformers import Qwen2Config, Qwen2ForCausalLM

from rllib_arpo import ARPOConfig, RolloutTree, Task
from rllib_arpo.envs.spaces import TokenSequence
from rllib_arpo.learner import scoring
from rllib_arpo.learner.torch_learner import ARPOTorchLearner
from rllib_arpo.learner.training_data import TreeTrainingData
from rllib_arpo.tree import Leaf, Segment

PACKINGS = ("paths", "tree")
SPEED_MODEL = {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 4}
LOGITS_MODEL = {"vocab_size": 151_936, "hidden_size": 256, "num_hidden_layers": 2}
LOGITS_TOKENS = 4096
TASK = Task(task_id="benchmark", messages=(), answers=("",))


class Grower:
    """Builds a tree of random tokens, segment by segment."""

    def __init__(self, prompt: int, *, vocab_size: int = 8192) -> None:
        self.rng = np.random.default_rng(0)
        self.vocab_size = vocab_size
        self.segments: list[Segment] = []
        self.leaves: list[Leaf] = []
        self.add(None, "prompt", prompt)

    def add(self, parent: int | None, role: Any, length: int) -> int:
        written = length if role == "model" else 0
        self.segments.append(
            Segment(
                parent=parent,
                role=role,
                token_ids=self.rng.integers(0, self.vocab_size, length, np.int32),
                logprobs=np.full(written, -np.log(self.vocab_size), np.float32),
                entropies=np.zeros(written, np.float32),
                policy_versions=np.zeros(written, np.int32),
            )
        )
        return len(self.segments) - 1

    def end(self, parent: int, length: int) -> None:
        reward = float(self.rng.integers(0, 2))
        self.leaves.append(
            Leaf(
                segment=self.add(parent, "model", length),
                reward=reward,
                reward_parts={"reward": reward},
                origin="initial",
                end="answer",
            )
        )

    def tree(self) -> RolloutTree:
        return RolloutTree(
            task=TASK, segments=tuple(self.segments), leaves=tuple(self.leaves)
        )


def headline() -> RolloutTree:
    grower = Grower(200)
    for _ in range(8):
        trunk = grower.add(0, "model", 150)
        grower.end(trunk, 150)
        grower.end(trunk, 150)
    return grower.tree()


def light() -> RolloutTree:
    grower = Grower(100)
    for root in range(12):
        trunk = grower.add(grower.add(0, "model", 200), "tool", 100)
        for _ in range(2 if root < 4 else 1):
            grower.end(trunk, 150)
    return grower.tree()


def search() -> RolloutTree:
    grower = Grower(150)
    for _ in range(8):
        trunk = 0
        for _ in range(2):
            trunk = grower.add(grower.add(trunk, "model", 60), "tool", 100)
        grower.end(trunk, 180)
        grower.end(trunk, 180)
    return grower.tree()


def deep() -> RolloutTree:
    grower = Grower(100)
    trunk = grower.add(0, "model", 300)
    for _ in range(16):
        grower.end(trunk, 100)
    return grower.tree()


def binary() -> RolloutTree:
    grower = Grower(80)
    level = [0]
    for _ in range(3):
        level = [grower.add(p, "model", 80) for p in level for _ in range(2)]
    for parent in level:
        grower.end(parent, 80)
        grower.end(parent, 80)
    return grower.tree()


def two_paths() -> RolloutTree:
    """Two rows of `LOGITS_TOKENS` tokens: alone, one would have advantage 0."""
    grower = Grower(64, vocab_size=LOGITS_MODEL["vocab_size"])
    for _ in range(2):
        grower.end(0, LOGITS_TOKENS - 64)
    return grower.tree()


SHAPES: dict[str, Callable[[], RolloutTree]] = {
    shape.__name__: shape for shape in (headline, light, search, deep, binary)
}


def save_model(folder: Path, settings: dict[str, int]) -> str:
    torch.manual_seed(0)
    hidden = settings["hidden_size"]
    config = Qwen2Config(
        **settings,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=LOGITS_TOKENS,
        tie_word_embeddings=True,
    )
    config.bos_token_id = config.eos_token_id = None
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def build_learner(model: str, packing: str, **settings: Any) -> ARPOTorchLearner:
    gpu = settings.pop("gpu", False)
    space = TokenSequence(8192)
    config = (
        ARPOConfig()
        .rl_module(
            model_config={"model": model, "dtype": "bfloat16" if gpu else "float32"}
        )
        .training(
            packing=packing,
            train_batch_size_per_learner=1,
            minibatch_size=1,
            lr=1e-6,
            **settings,
        )
        .learners(num_learners=0, num_gpus_per_learner=int(gpu))
    )
    learner: Any = config.build_learner(spaces={DEFAULT_MODULE_ID: (space, space)})
    return learner


def step(learner: ARPOTorchLearner, tree: RolloutTree) -> tuple[float, int]:
    """Seconds of one update, and the tokens that went through the model."""
    episodes: Any = [tree]
    start = time.perf_counter()
    result = learner.update(training_data=TreeTrainingData(episodes=episodes))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    metrics = MetricsLogger.peek_results(result)[DEFAULT_MODULE_ID]
    return taken, int(metrics["tokens_processed"])


def status(name: str) -> int:
    """Kilobytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(name))


def peak_of_step(model: str, packing: str, shape: str, plain: bool) -> int:
    """Peak bytes of a step over what stood before it; in a process of its own.

    The second step counts: the first also makes the optimizer's state.
    """
    if plain:
        scoring.MAX_LOGITS = sys.maxsize
    if shape == "logits":
        learner = build_learner(model, packing, max_tokens_per_microbatch=LOGITS_TOKENS)
        tree = two_paths()
    else:
        learner, tree = build_learner(model, packing), SHAPES[shape]()
    step(learner, tree)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    step(learner, tree)
    return (status("VmHWM") - before) * 1024


def in_a_process(*args: Any) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_of_step, args)


def measure(model: str, shape: str, repetitions: int, gpu: bool) -> dict[str, Any]:
    tree = SHAPES[shape]()
    learners = {p: build_learner(model, p, gpu=gpu) for p in PACKINGS}
    seconds: dict[str, list[float]] = {p: [] for p in PACKINGS}
    tokens: dict[str, int] = {}
    for repetition in range(repetitions + 1):
        for packing, learner in learners.items():
            taken, tokens[packing] = step(learner, tree)
            if repetition:  # the first warms up
                seconds[packing].append(taken)
    slow, fast = median(seconds["paths"]), median(seconds["tree"])
    return {
        "shape": shape,
        "paths_tokens": tokens["paths"],
        "tree_tokens": tokens["tree"],
        "unique": tree.num_tokens,
        "token_ratio": tokens["paths"] / tree.num_tokens,
        "paths_s": slow,
        "tree_s": fast,
        "speedup": slow / fast,
    }


def memory_on_gpu(model: str, shape: str) -> float:
    peaks = []
    for packing in PACKINGS:
        learner = build_learner(model, packing, gpu=True)
        step(learner, SHAPES[shape]())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(learner, SHAPES[shape]())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    return peaks[1] / peaks[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args(arguments)
    logging.getLogger("ray").setLevel(logging.ERROR)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        speed_model = save_model(Path(folder) / "speed", SPEED_MODEL)
        for shape in options.shapes:
            row = measure(speed_model, shape, options.repetitions, options.gpu)
            if options.gpu:
                row["memory"] = memory_on_gpu(speed_model, shape)
            else:
                paths, tree = (
                    in_a_process(speed_model, p, shape, False) for p in PACKINGS
                )
                row["memory"] = tree / paths
            rows.append(row)
        figures = {
            "speedup": rows[0]["speedup"],
            "slowest_speedup": min(row["speedup"] for row in rows),
            "token_ratio": rows[0]["token_ratio"],
            "peak_memory_ratio": max(row["memory"] for row in rows),
            "speedup_over_token_ratio": min(
                row["speedup"] / row["token_ratio"] for row in rows
            ),
        }
        if not options.gpu:
            logits_model = save_model(Path(folder) / "logits", LOGITS_MODEL)
            ours, plain = (
                in_a_process(logits_model, "paths", "logits", plain)
                for plain in (False, True)
            )
            figures["logits_memory_ratio"] = ours / plain
            figures["logits_peak_gb"] = ours / 1e9
            figures["logits_peak_plain_gb"] = plain / 1e9
    print_table_and_write(rows, figures, options.json)


if __name__ == "__main__":
    main()
