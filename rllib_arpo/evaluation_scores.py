"""From predictions to numbers: which are right, why the others are not, at what cost.

Pure functions over predictions, so the same ones can be scored again by another judge.

1. An answer counts whatever the format around it, as in the paper's evaluation; the
   format is a cause of failure only where the answer is not right.
2. An answer that a judge cannot judge is not right, and is counted as unjudged.
3. All answers to a task, of every seed, make one estimate of its pass@k; the seeds by
   themselves are given too, for they show what a second run would have said.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from rllib_arpo.data.benchmarks import BenchmarkTasks
from rllib_arpo.errors import DataError
from rllib_arpo.predictions import Prediction
from rllib_arpo.rewards.answers import accuracy
from rllib_arpo.rewards.judge_prompt import JudgeCase, Verdict
from rllib_arpo.statistics import (
    Comparison,
    Estimate,
    best_of_k,
    compare,
    mean_with_interval,
    pass_at_k,
)
from rllib_arpo.tree import Task, question

# An answer is right when its score is at least this; F1 is then 1, so all words agree.
RIGHT = 1.0

Failure = Literal[
    "unjudged",
    "cut by length",
    "tool limit",
    "tool failure",
    "no answer",
    "badly formed",
    "wrong",
]
FAILURES: tuple[Failure, ...] = get_args(Failure)


class Judging(Protocol):
    """What is asked of a `Judge`."""

    def ask_all(self, cases: Sequence[JudgeCase]) -> Sequence[Verdict | None]:
        """A verdict on each answer, None for one that it cannot judge."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A prediction and what it is worth.

    Attributes:
        prediction: as it was made.
        score: in [0, 1].
        failure: why it is not right, None when it is.
    """

    prediction: Prediction
    score: float
    failure: Failure | None

    @property
    def right(self) -> bool:
        """Whether it counts for pass@k."""
        return self.failure is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A part of a benchmark: a level, a category."""

    num_tasks: int
    pass_at_1: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What an evaluation says of a model on one benchmark.

    Attributes:
        title: of the benchmark.
        metric: "math", "f1" or "judge"; "exact" where a judge was wanted.
        num_tasks: asked.
        num_answers: to all of them.
        skipped: rows of the file that are no tasks, by reason.
        pass_at_k: k -> mean over tasks.
        pass_at_k_by_seed: k -> the same for each seed by itself.
        f1: mean score, for metric "f1" only.
        best_f1_at_k: k -> expected best score of k answers, for "f1" only.
        tool_calls_per_answer: executed ones.
        tool_calls_per_right_answer: all calls divided by the right answers; None
            without one.
        tokens_per_answer: written by the model.
        tokens_per_right_answer: as for calls.
        tool_tokens_per_answer: read from tools.
        failures: cause -> number of answers.
        groups: name -> part, where the benchmark has parts.
    """

    title: str
    metric: str
    num_tasks: int
    num_answers: int
    skipped: Mapping[str, int]
    pass_at_k: Mapping[int, Estimate]
    pass_at_k_by_seed: Mapping[int, Sequence[float]]
    f1: Estimate | None
    best_f1_at_k: Mapping[int, Estimate]
    tool_calls_per_answer: float
    tool_calls_per_right_answer: float | None
    tokens_per_answer: float
    tokens_per_right_answer: float | None
    tool_tokens_per_answer: float
    failures: Mapping[str, int]
    groups: Mapping[str, Group]

    @property
    def headline(self) -> float:
        """The number that the paper's tables give: F1, or pass@1."""
        return (self.f1 or self.pass_at_k[1]).mean


def score_predictions(
    loaded: BenchmarkTasks,
    predictions: Sequence[Prediction],
    *,
    judge: Judging | None = None,
) -> list[Scored]:
    """Score answers by the benchmark's metric.

    Args:
        loaded: the benchmark and its tasks.
        predictions: of those tasks.
        judge: asked about all answers at once where the metric is "judge".

    Returns:
        One for each prediction, in their order.

    Raises:
        DataError: a prediction is of no task.
    """
    tasks = {task.task_id: task for task in loaded.tasks}
    unknown = {p.task_id for p in predictions} - tasks.keys()
    if unknown:
        raise DataError(f"there are no tasks {sorted(unknown)[:3]}")
    given = [p for p in predictions if p.answer is not None]
    if loaded.benchmark.metric == "judge" and judge is not None:
        verdicts = judge.ask_all([_case(tasks[p.task_id], p) for p in given])
        scores = [None if one is None else float(one.correct) for one in verdicts]
    else:
        scores = [_accuracy(tasks[p.task_id], p) for p in given]
    by_key = {p.key: score for p, score in zip(given, scores, strict=True)}
    return [_scored(p, by_key.get(p.key, 0.0)) for p in predictions]


def _case(task: Task, prediction: Prediction) -> JudgeCase:
    return JudgeCase(
        question=question(task),
        accepted=task.answers,
        answer=str(prediction.answer),
    )


def _accuracy(task: Task, prediction: Prediction) -> float:
    return accuracy(str(prediction.answer), task.answers, ability=task.ability)


def _scored(prediction: Prediction, score: float | None) -> Scored:
    return Scored(
        prediction=prediction,
        score=score or 0.0,
        failure=failure_of(prediction, score),
    )


def failure_of(prediction: Prediction, score: float | None) -> Failure | None:
    """Why an answer is not right: the first of `FAILURES` that applies.

    Args:
        prediction: the answer.
        score: None when nobody could judge it.
    """
    if score is None:
        return "unjudged"
    if score >= RIGHT:
        return None
    statuses = {call.status for call in prediction.tool_calls}
    applies: Mapping[Failure, bool] = {
        "cut by length": prediction.end == "length",
        "tool limit": prediction.tool_limit,
        "tool failure": not statuses.isdisjoint({"unavailable", "timeout"}),
        "no answer": prediction.answer is None,
        "badly formed": not prediction.well_formed,
    }
    for cause, found in applies.items():
        if found:
            return cause
    return "wrong"


def summarize(
    loaded: BenchmarkTasks,
    scored: Sequence[Scored],
    *,
    ks: Sequence[int],
    judged: bool = False,
    seed: int = 0,
) -> Summary:
    """Numbers of one benchmark.

    Args:
        loaded: the benchmark and its tasks.
        scored: answers, as many to each task that was asked, at least one.
        ks: of pass@k; none above the number of answers of a seed.
        judged: whether a judge scored those that want one.
        seed: of the bootstrap.
    """
    by_task = _by_task(scored)
    answers = [*by_task.values()]
    metric = loaded.benchmark.metric
    num_right = sum(one.right for one in scored)
    calls = sum(len(one.prediction.tool_calls) for one in scored)
    tokens = sum(one.prediction.num_model_tokens for one in scored)
    tool_tokens = sum(one.prediction.num_tool_tokens for one in scored)
    causes = Counter(one.failure for one in scored)
    ks = sorted({1, *ks})
    return Summary(
        title=loaded.benchmark.title,
        metric="exact" if metric == "judge" and not judged else metric,
        num_tasks=len(by_task),
        num_answers=len(scored),
        skipped=loaded.skipped,
        pass_at_k={k: mean_with_interval(_passes(answers, k), seed=seed) for k in ks},
        pass_at_k_by_seed={k: _pass_at_k_by_seed(scored, k) for k in ks},
        f1=_best(answers, 1, seed) if metric == "f1" else None,
        best_f1_at_k={k: _best(answers, k, seed) for k in ks if metric == "f1"},
        tool_calls_per_answer=calls / len(scored),
        tool_calls_per_right_answer=calls / num_right if num_right else None,
        tokens_per_answer=tokens / len(scored),
        tokens_per_right_answer=tokens / num_right if num_right else None,
        tool_tokens_per_answer=tool_tokens / len(scored),
        failures={cause: causes[cause] for cause in FAILURES},
        groups=_groups(loaded.tasks, by_task),
    )


def compare_scores(
    scored: Sequence[Scored], baseline: Sequence[Scored], *, by_f1: bool, seed: int = 0
) -> dict[str, Comparison]:
    """Two models on the same tasks, each task by the mean of its answers.

    Args:
        scored: of the model.
        baseline: of the other model, for the same tasks.
        by_f1: compare the scores too, not only the right answers.
        seed: of the resampling.

    Returns:
        "pass@1", and "f1" if asked -> the comparison.

    Raises:
        DataError: the tasks differ.
    """
    ours, theirs = _by_task(scored), _by_task(baseline)
    if ours.keys() != theirs.keys():
        raise DataError(
            f"{len(ours)} tasks cannot be compared with {len(theirs)}, of which "
            f"{len(ours.keys() & theirs.keys())} are the same: answer the same tasks, "
            "with the same --num-tasks"
        )
    pairs = [(ours[task], theirs[task]) for task in ours]
    found = {
        "pass@1": compare(
            [_passes([own], 1)[0] for own, _ in pairs],
            [_passes([other], 1)[0] for _, other in pairs],
            seed=seed,
        )
    }
    if by_f1:
        found["f1"] = compare(
            [best_of_k(_scores(own), 1) for own, _ in pairs],
            [best_of_k(_scores(other), 1) for _, other in pairs],
            seed=seed,
        )
    return found


def _by_task(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    by_task: dict[str, list[Scored]] = {}
    for one in scored:
        by_task.setdefault(one.prediction.task_id, []).append(one)
    return by_task


def _scores(answers: Sequence[Scored]) -> list[float]:
    return [one.score for one in answers]


def _passes(answers: Sequence[Sequence[Scored]], k: int) -> list[float]:
    """pass@k of each task."""
    return [pass_at_k(sum(one.right for one in own), len(own), k) for own in answers]


def _best(answers: Sequence[Sequence[Scored]], k: int, seed: int) -> Estimate:
    best = [best_of_k(_scores(own), k) for own in answers]
    return mean_with_interval(best, seed=seed)


def _pass_at_k_by_seed(scored: Sequence[Scored], k: int) -> list[float]:
    by_seed: dict[int, list[Scored]] = {}
    for one in scored:
        by_seed.setdefault(one.prediction.seed, []).append(one)
    passes = [_passes([*_by_task(by_seed[s]).values()], k) for s in sorted(by_seed)]
    return [math.fsum(own) / len(own) for own in passes]


def _groups(
    tasks: Sequence[Task], by_task: Mapping[str, Sequence[Scored]]
) -> dict[str, Group]:
    passes: dict[str, list[float]] = {}
    for task in tasks:
        name = str(task.metadata.get("group") or "")
        if name and task.task_id in by_task:
            passes.setdefault(name, []).extend(_passes([by_task[task.task_id]], 1))
    return {
        name: Group(num_tasks=len(own), pass_at_1=math.fsum(own) / len(own))
        for name, own in sorted(passes.items())
    }
