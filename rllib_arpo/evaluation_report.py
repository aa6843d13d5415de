"""An evaluation as one table and one JSON file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from rllib_arpo.evaluation_scores import Scored, Summary
from rllib_arpo.predictions import Header
from rllib_arpo.rewards.judge import Judge
from rllib_arpo.statistics import Comparison, Estimate
from rllib_arpo.storage import write_output


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that an evaluation says.

    Attributes:
        headers: benchmark -> what its answers have in common.
        summaries: benchmark -> numbers.
        baseline_headers: the same of the checkpoint it is compared with; may be empty.
        baseline: its numbers.
        comparisons: benchmark -> "pass@1" or "f1" -> paired test.
        num_samples: answers per task and seed.
        seeds: of the repetitions.
        judge: which judged, and what it has cost; None where none did.
    """

    headers: Mapping[str, Header]
    summaries: Mapping[str, Summary]
    baseline_headers: Mapping[str, Header]
    baseline: Mapping[str, Summary]
    comparisons: Mapping[str, Mapping[str, Comparison]]
    num_samples: int
    seeds: Sequence[int]
    judge: Judge | None = None


def as_json(report: Report) -> dict[str, Any]:
    """The report as objects, lists, texts and numbers.

    `average` is the mean of the benchmarks' headlines, as in the paper's tables.
    """
    result: dict[str, Any] = {
        "seeds": list(report.seeds),
        "num_samples": report.num_samples,
        **_part(report.headers, report.summaries),
    }
    if report.judge is not None:
        result["judge"] = {
            "model": report.judge.model,
            "url": report.judge.base_url,
            **asdict(report.judge.usage),
        }
    if report.baseline:
        result["baseline"] = _part(report.baseline_headers, report.baseline)
        result["comparisons"] = {
            name: {metric: asdict(one) for metric, one in by_metric.items()}
            for name, by_metric in report.comparisons.items()
        }
    return result


def _part(
    headers: Mapping[str, Header], summaries: Mapping[str, Summary]
) -> dict[str, Any]:
    first = next(iter(headers.values()))
    return {
        "checkpoint": first.checkpoint,
        "fingerprint": first.fingerprint,
        "average": average(summaries),
        "benchmarks": {
            name: {
                **asdict(summary),
                "headline": summary.headline,
                "tasks_fingerprint": headers[name].tasks,
                "settings": dict(headers[name].settings),
            }
            for name, summary in summaries.items()
        },
    }


def average(summaries: Mapping[str, Summary]) -> float:
    """Mean of the headlines."""
    headlines = [summary.headline for summary in summaries.values()]
    return math.fsum(headlines) / len(headlines)


def write_json(file: Path, value: object) -> None:
    """Write a file and its folder, whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    write_output(file, json.dumps(value, indent=2) + "\n")


def write_scores(file: Path, scored: Sequence[Scored]) -> None:
    """What each answer is worth and why, a line each.

    Raises:
        CheckpointError: the file cannot be written.
    """
    lines = [
        json.dumps(
            {
                "task_id": one.prediction.task_id,
                "seed": one.prediction.seed,
                "sample": one.prediction.sample,
                "answer": one.prediction.answer,
                "score": one.score,
                "failure": one.failure,
            }
        )
        for one in scored
    ]
    write_output(file, "\n".join([*lines, ""]))


def as_table(report: Report) -> Table:
    """One row per benchmark, shares in percent, 95 % intervals in brackets."""
    ks = next(iter(report.summaries.values())).pass_at_k
    with_f1 = any(summary.f1 for summary in report.summaries.values())
    table = Table(
        title=f"answers per task and seed: {report.num_samples}, seeds: "
        f"{len(report.seeds)}; % and 95 % intervals over tasks"
    )
    table.add_column("benchmark")
    columns = ["tasks", *(f"pass@{k}" for k in ks)]
    columns += ["F1"] if with_f1 else []
    if report.comparisons:
        columns += ["vs. baseline", "p"]
    columns += ["calls", "per right", "tokens", "per right"]
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("failures, % of answers")
    for name, summary in report.summaries.items():
        cells = [
            summary.title,
            str(summary.num_tasks),
            *(_share(one) for one in summary.pass_at_k.values()),
        ]
        if with_f1:
            cells.append(_share(summary.f1) if summary.f1 else "")
        if report.comparisons:
            cells += _compared(report.comparisons[name])
        table.add_row(*cells, *_cost(summary), _failures(summary))
    if len(report.summaries) > 1:
        table.add_section()
        label = "average, F1 for QA" if with_f1 else "average"
        table.add_row(label, "", f"{100 * average(report.summaries):.1f}")
    return table


def _share(estimate: Estimate) -> str:
    return (
        f"{100 * estimate.mean:.1f}\n"
        f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
    ).replace("[", "\\[")


def _compared(comparisons: Mapping[str, Comparison]) -> list[str]:
    """By F1 where there is one: it is what the paper's tables give."""
    one = comparisons.get("f1") or comparisons["pass@1"]
    found = one.difference
    shown = (
        f"{100 * found.mean:+.1f}\n\\[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    )
    return [shown, f"{one.p_value:.3f}\n{one.test}"]


def _cost(summary: Summary) -> list[str]:
    pairs = (
        (summary.tool_calls_per_answer, ".2f"),
        (summary.tool_calls_per_right_answer, ".2f"),
        (summary.tokens_per_answer, ",.0f"),
        (summary.tokens_per_right_answer, ",.0f"),
    )
    return ["none" if value is None else format(value, form) for value, form in pairs]


def _failures(summary: Summary) -> str:
    found = {cause: n for cause, n in summary.failures.items() if n}
    shares = [
        f"{cause} {100 * n / summary.num_answers:.1f}" for cause, n in found.items()
    ]
    return "\n".join(shares) or "none"
