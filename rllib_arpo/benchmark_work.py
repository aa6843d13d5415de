"""Which answers a benchmark wants of a model, and which of them are there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rllib_arpo.data.benchmarks import BenchmarkTasks
from rllib_arpo.engines.engine import SamplingParams
from rllib_arpo.errors import ConfigError
from rllib_arpo.predictions import (
    Header,
    Key,
    Prediction,
    PredictionFile,
    Wanted,
    fingerprint_of_tasks,
    read_predictions,
)

PREDICTIONS = "predictions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked of every model and benchmark.

    Attributes:
        ks: of pass@k.
        num_samples: answers per task and seed, at least as many as the largest k.
        seeds: of the repetitions.
        num_tasks: only the first so many, None for all.
    """

    ks: Sequence[int]
    num_samples: int
    seeds: Sequence[int]
    num_tasks: int | None

    def __post_init__(self) -> None:
        if self.num_samples < max(self.ks):
            raise ConfigError(
                f"--num-samples ({self.num_samples}) must be at least the largest of "
                f"--k ({max(self.ks)}): pass@k is estimated from the answers of a seed"
            )

    def wanted(self, loaded: BenchmarkTasks) -> list[Wanted]:
        """The answers of a benchmark, those to a task together for the prefix cache."""
        return [
            Wanted(task=task, seed=seed, sample=sample)
            for task in loaded.tasks[: self.num_tasks]
            for seed in self.seeds
            for sample in range(self.num_samples)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Budgets of an answer, None where the model's own run knows."""

    max_response_tokens: int | None
    max_tool_calls: int | None
    max_result_tokens: int | None


@dataclass(slots=True, kw_only=True)
class Work:
    """One benchmark and one model.

    Attributes:
        loaded: the benchmark and its tasks.
        header: what its answers have in common.
        wanted: the answers.
        sampling: how they are sampled.
        limits: their budgets.
        file: where they are; None for a baseline that is only read.
        found: predictions that are there.
    """

    loaded: BenchmarkTasks
    header: Header
    wanted: Sequence[Wanted]
    sampling: SamplingParams
    limits: Limits
    file: PredictionFile | None
    found: Mapping[Key, Prediction] = field(default_factory=dict)

    @property
    def missing(self) -> list[Wanted]:
        """Answers that are wanted and not there."""
        if self.file is None:
            return []
        there = self.file.predictions
        return [one for one in self.wanted if one.key not in there]

    @property
    def predictions(self) -> list[Prediction]:
        """Those that were wanted, in that order."""
        there = self.found if self.file is None else self.file.predictions
        return [there[one.key] for one in self.wanted]


def open_work(
    loaded: BenchmarkTasks,
    plan: Plan,
    out: Path,
    *,
    checkpoint: Path,
    fingerprint: str,
    sampling: SamplingParams,
    limits: Limits,
    settings: Mapping[str, Any],
) -> Work:
    """The work on a benchmark, with the answers that are there already.

    Args:
        loaded: the benchmark and its tasks.
        plan: which answers.
        out: folder of the evaluation.
        checkpoint: the model.
        fingerprint: of it.
        sampling: how to sample.
        limits: budgets of an answer.
        settings: what else an answer depends on.

    Raises:
        ConfigError: the folder holds answers that were made otherwise.
    """
    header = Header(
        benchmark=loaded.benchmark.name,
        checkpoint=str(checkpoint),
        fingerprint=fingerprint,
        tasks=fingerprint_of_tasks(loaded.tasks),
        settings={
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_response_tokens": limits.max_response_tokens,
            "max_tool_calls": limits.max_tool_calls,
            "max_result_tokens": limits.max_result_tokens,
            **settings,
        },
    )
    file = out / PREDICTIONS / f"{loaded.benchmark.name}.jsonl"
    return Work(
        loaded=loaded,
        header=header,
        wanted=plan.wanted(loaded),
        sampling=sampling,
        limits=limits,
        file=PredictionFile(file, header),
    )


def read_work(work: Work, out: Path) -> Work:
    """The answers of another model to the same tasks, from its evaluation's folder.

    Args:
        work: of the model that it is compared with.
        out: the folder.

    Raises:
        ConfigError: the benchmark is not there, or its tasks were others.
        DataError: the file holds something else.
    """
    name = work.loaded.benchmark.name
    file = out / PREDICTIONS / f"{name}.jsonl"
    if not file.is_file():
        raise ConfigError(f"--baseline: {out} holds no answers to {name}")
    header, predictions = read_predictions(file)
    if header.tasks != work.header.tasks:
        raise ConfigError(
            f"--baseline: {file} answers other tasks than are asked for here: compare "
            "models on the same file"
        )
    tasks = {one.task.task_id: one.task for one in work.wanted}
    found = {p.key: p for p in predictions if p.task_id in tasks}
    return Work(
        loaded=work.loaded,
        header=header,
        wanted=[
            Wanted(task=tasks[task], seed=seed, sample=sample)
            for task, seed, sample in found
        ],
        sampling=work.sampling,
        limits=work.limits,
        file=None,
        found=found,
    )
