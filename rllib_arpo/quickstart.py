"""The main job: a model from nothing to an agent that looks things up and computes.

1. Build a tiny Qwen2 model and a tokenizer for the embedded world (`envs/almanac`).
2. Cold start: imitate imperfect traces (`SFT`), evaluate on held-out questions.
3. Reinforcement learning (`ARPO`), evaluate on the same questions.

Everything is what a large run uses: the same classes, engine, tools and checkpoints.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer

from rllib_arpo.arpo import ARPO
from rllib_arpo.config import ARPOConfig
from rllib_arpo.envs.almanac import AlmanacEnv, AlmanacWorld, Split
from rllib_arpo.envs.almanac_expert import AlmanacExpert
from rllib_arpo.envs.almanac_model import build_model, build_tokenizer
from rllib_arpo.envs.tag_dialogue import TagDialogue
from rllib_arpo.errors import ConfigError
from rllib_arpo.evaluation import evaluate
from rllib_arpo.memory import PeakMemory
from rllib_arpo.metrics import (
    ACCURACY,
    ENTROPY_AFTER_TOOL,
    ENTROPY_ELSEWHERE,
    TOOL_CALLS_PER_TRAJECTORY,
)
from rllib_arpo.progress import Console
from rllib_arpo.runs import ALARMS_FILE, Run, train
from rllib_arpo.sft import SFTConfig
from rllib_arpo.stop_signals import Stopped
from rllib_arpo.tracking.attach import stopping, track
from rllib_arpo.tracking.curves import METRICS_FILE
from rllib_arpo.tracking.mlflow import BUFFER_FOLDER
from rllib_arpo.tree import RolloutTree, Task

NUM_TRAIN_TASKS = 4_000
NUM_TRACES = 8_000
CLEAN_FRACTION = 0.35
SFT_BATCH = 16
SFT_STEPS_PER_ITERATION = 50
RL_TREES = 16
RL_STEPS_PER_ITERATION = 2
# The first things that a quick start makes; nothing else makes both.
MARKS = ("base", "sft")
REPLACED = (
    *("cold_start", "checkpoints", "trees", "model", BUFFER_FOLDER),
    *("config.json", "summary.json", METRICS_FILE, ALARMS_FILE),
    *MARKS,  # last, so that what a kill leaves has them still
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What may be chosen.

    Attributes:
        folder: of the run; what an earlier quick start left there is replaced, and
            nothing else.
        seed: of model, traces, tasks and sampling.
        engine: "torch" or "vllm", which samples for reinforcement learning.
        num_env_runners: sampling actors; 0 samples in this process.
        num_learners: learner actors; 0 learns in this process.
        sft_iterations: of 50 optimizer steps each.
        rl_iterations: of 16 trees each.
        num_test_tasks: held-out questions.
        mlflow: URI of the store to track both trainings in, "default" for the usual
            one; None: they are not tracked.
    """

    folder: Path
    seed: int = 0
    engine: str = "torch"
    num_env_runners: int = 0
    num_learners: int = 0
    sft_iterations: int = 24
    rl_iterations: int = 55
    num_test_tasks: int = 512
    mlflow: str | None = None


def almanac_tasks(split: Split, num: int) -> list[Task]:
    """Tasks of the embedded world, as a function that a config can hold."""
    return AlmanacWorld().tasks(split, num)


def almanac_traces(model: str, num: int, clean_fraction: float, seed: int) -> Any:
    """Traces of the expert for the cold start, encoded by `model`'s tokenizer."""
    env = AlmanacEnv({"tokenizer": model})
    assert isinstance(env.dialogue, TagDialogue)
    return AlmanacExpert(AlmanacWorld()).traces(
        num, dialogue=env.dialogue, seed=seed, clean_fraction=clean_fraction
    )


def sft_config(model: str, settings: Settings) -> SFTConfig:
    """The cold start's settings."""
    learners = max(settings.num_learners, 1)
    steps = SFT_STEPS_PER_ITERATION
    return _on_this_machine(
        SFTConfig()
        .environment(
            env=AlmanacEnv,
            train_traces=partial(
                almanac_traces, model, NUM_TRACES, CLEAN_FRACTION, settings.seed
            ),
            eval_tasks=partial(almanac_tasks, "test", settings.num_test_tasks),
        )
        .rl_module(model_config={"model": model})
        .debugging(deterministic=True)
        .training(
            train_batch_size_per_learner=SFT_BATCH * steps // learners,
            minibatch_size=SFT_BATCH // learners,
            optimizer="muon",
            muon_lr=3e-3,
            lr=3e-3,
            adam_betas=(0.9, 0.95),
            weight_decay=0.0,
            lr_schedule="linear",
            lr_warmup_steps=min(20, settings.sft_iterations * steps // 2),
            lr_total_steps=settings.sft_iterations * steps,
        ),
        settings,
    )


def arpo_config(model: str, settings: Settings) -> ARPOConfig:
    """Reinforcement learning's settings."""
    learners = max(settings.num_learners, 1)
    steps = RL_STEPS_PER_ITERATION
    return _on_this_machine(
        ARPOConfig()
        .environment(
            env=AlmanacEnv,
            train_tasks=partial(almanac_tasks, "train", NUM_TRAIN_TASKS),
            eval_tasks=partial(almanac_tasks, "test", settings.num_test_tasks),
        )
        .rl_module(model_config={"model": model})
        .tree_rollout(
            group_size=16,
            num_initial_rollouts=8,
            branch_rule="threshold",
            # A turn of this agent is short: about ten tokens.
            entropy_probe_tokens=8,
        )
        .engine(settings.engine, log_dir=str(settings.folder.absolute() / "logs"))
        .debugging(deterministic=settings.engine == "torch")
        .training(
            train_batch_size_per_learner=RL_TREES // learners,
            minibatch_size=RL_TREES // steps // learners,
            lr=1e-3,
            adam_betas=(0.9, 0.99),
            weight_decay=0.0,
            lr_schedule="linear",
            lr_warmup_steps=min(3, settings.rl_iterations // 2) * steps,
            lr_total_steps=settings.rl_iterations * steps,
            clip_param=0.2,
            clip_param_high=0.28,
        ),
        settings,
    )


Config = TypeVar("Config", bound=ARPOConfig)


def _on_this_machine(config: Config, settings: Settings) -> Config:
    return (
        config.training(max_tokens_per_microbatch=4096, grad_clip=1.0)
        .evaluation(evaluation_duration=settings.num_test_tasks)
        .env_runners(num_env_runners=settings.num_env_runners)
        .learners(num_learners=settings.num_learners)
        .debugging(seed=settings.seed, log_level="ERROR")
    )


def quickstart(settings: Settings, console: Console) -> dict[str, Any]:
    """Run the main job and return what `summary.json` holds.

    Raises:
        ConfigError: the folder holds something else than a quick start, or another
            process trains there.
        Exit: a signal ended a training; its code says which.
    """
    refuse_other(settings.folder)
    run = Run(settings.folder, resume=True)
    with run.held():
        try:
            return _quickstart(run, settings, console)
        except Stopped as stopped:
            console.say(
                "Stopped. To start again: "
                f"rllib-arpo quickstart --out {settings.folder}"
            )
            raise typer.Exit(stopped.exit_code) from None


def refuse_other(folder: Path) -> None:
    """Refuse a folder with anything that a quick start replaces and did not make.

    Raises:
        ConfigError: names what is there.
    """
    found = [name for name in REPLACED if (folder / name).exists()]
    if found and not all((folder / name).is_dir() for name in MARKS):
        raise ConfigError(
            f"{folder} holds {', '.join(found)}, which no quick start made and this "
            "one would replace: choose another --out"
        )


def _clear(folder: Path) -> None:
    for name in REPLACED:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for name in MARKS:
        (folder / name).mkdir(parents=True, exist_ok=True)


def _quickstart(run: Run, settings: Settings, console: Console) -> dict[str, Any]:
    _clear(run.folder)
    # On matrices this small a second thread costs more than it computes.
    torch.set_num_threads(1)
    start = time.monotonic()
    with PeakMemory() as memory:
        base = str(run.folder / "base")
        console.stage("Build a tiny model and its tokenizer")
        build_model(build_tokenizer(AlmanacWorld(), base), base, seed=settings.seed)
        cold, cold_model = _cold_start(base, run, settings, console)
        final, trees = _reinforce(cold_model, run, settings, console)
    summary = {
        "seed": settings.seed,
        "seconds": round(time.monotonic() - start, 1),
        "peak_memory_mb": round(memory.peak_mb),
        "accuracy_cold_start": cold["sampled"][ACCURACY],
        "accuracy_final": final["sampled"][ACCURACY],
        "greedy_cold_start": cold["greedy"][ACCURACY],
        "greedy_final": final["greedy"][ACCURACY],
        **{
            name: final["sampled"][name]
            for name in (
                TOOL_CALLS_PER_TRAJECTORY,
                ENTROPY_AFTER_TOOL,
                ENTROPY_ELSEWHERE,
            )
            if name in final["sampled"]
        },
    }
    run.write_json("summary.json", summary)
    curves = run.plot()
    console.examples(trees)
    console.before_and_after(cold, final)
    console.say(
        f"{summary['seconds']:.0f} s, at most {summary['peak_memory_mb']} MB. "
        f"Curves: {curves}. Model: {run.model}."
    )
    return summary


Evaluations = dict[str, Mapping[str, float]]


def _cold_start(
    base: str, run: Run, settings: Settings, console: Console
) -> tuple[Evaluations, str]:
    console.stage("Cold start: imitate an expert that makes mistakes")
    sft = Run(run.folder / "sft")
    config = sft_config(base, settings)
    # What is registered is the agent that comes out of it all.
    _track(config, sft, settings, settings.sft_iterations, registered_model=None)
    with stopping(config.build_algo()) as algorithm:
        with console.progress(settings.sft_iterations, "cold start") as progress:
            train(
                algorithm,
                sft,
                num_iterations=settings.sft_iterations,
                stage="cold start",
                on_iteration=progress,
                on_alarm=console.alarm,
                checkpoint_interval=settings.sft_iterations,
            )
        evaluation, _ = _evaluate(algorithm, console)
        model = str(algorithm.save_pretrained(run.folder / "cold_start"))
    return evaluation, model


def _reinforce(
    model: str, run: Run, settings: Settings, console: Console
) -> tuple[Evaluations, Sequence[RolloutTree]]:
    console.stage("Reinforcement learning: ARPO")
    config = arpo_config(model, settings)
    run.write_config(config)
    _track(config, run, settings, settings.rl_iterations)
    with console.waiting(f"Start the actors and the engine ({config.engine_name})"):
        algorithm = config.build_algo()
    with stopping(algorithm):
        with console.progress(settings.rl_iterations, "ARPO") as progress:
            train(
                algorithm,
                run,
                num_iterations=settings.rl_iterations,
                stage="ARPO",
                on_iteration=progress,
                on_alarm=console.alarm,
                checkpoint_interval=settings.rl_iterations,
            )
        evaluation, trees = _evaluate(algorithm, console)
        algorithm.save_pretrained(run.model)
    return evaluation, trees


def _track(
    config: ARPOConfig, run: Run, settings: Settings, iterations: int, **options: Any
) -> None:
    """Let MLflow have a training, with an evaluation at its end."""
    if settings.mlflow is None:
        return
    name = run.folder.relative_to(settings.folder.absolute().parent).as_posix()
    track(config, run.folder, settings.mlflow, name=name, **options)
    config.evaluation(evaluation_interval=iterations)


def _evaluate(
    algorithm: ARPO, console: Console
) -> tuple[Evaluations, Sequence[RolloutTree]]:
    """Held-out questions at temperature 1 and greedily; three examples."""
    tasks = algorithm.eval_tasks
    console.stage(f"Evaluate on {len(tasks)} held-out questions, sampled and greedy")
    with console.count(2 * len(tasks), "answers") as advance:
        sampled = evaluate(algorithm, tasks, temperature=1.0, on_progress=advance)
        greedy = evaluate(algorithm, tasks, temperature=0.0, on_progress=advance)
    return {"sampled": sampled.metrics, "greedy": greedy.metrics}, sampled.trees[:3]
