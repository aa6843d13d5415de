import json
from dataclasses import replace

from rich.console import Console

from rllib_arpo.data.benchmarks import BENCHMARKS
from rllib_arpo.evaluation_report import Report, as_json, as_table, write_json
from rllib_arpo.evaluation_scores import FAILURES, Summary
from rllib_arpo.predictions import Header
from rllib_arpo.statistics import Comparison, Estimate


def estimate(mean: float) -> Estimate:
    return Estimate(mean=mean, low=mean - 0.1, high=mean + 0.1)


MATH = Summary(
    title=BENCHMARKS["gsm8k"].title,
    metric="math",
    num_tasks=1319,
    num_answers=2638,
    skipped={},
    pass_at_k={1: estimate(0.5), 2: estimate(0.625)},
    pass_at_k_by_seed={1: [0.5], 2: [0.625]},
    f1=None,
    best_f1_at_k={},
    tool_calls_per_answer=1.25,
    tool_calls_per_right_answer=2.5,
    tokens_per_answer=1234.0,
    tokens_per_right_answer=2468.0,
    tool_tokens_per_answer=300.0,
    failures=dict.fromkeys(FAILURES, 0) | {"wrong": 1319},
    groups={},
)
QA = replace(
    MATH,
    title="HotpotQA",
    metric="f1",
    f1=estimate(0.75),
    best_f1_at_k={1: estimate(0.75), 2: estimate(0.8)},
    tokens_per_right_answer=None,
)
HEADER = Header(
    benchmark="gsm8k",
    checkpoint="/models/a",
    fingerprint="f1",
    tasks="t1",
    settings={"temperature": 0.6},
)


def report(**changed) -> Report:
    fields = {
        "headers": {"gsm8k": HEADER, "hotpotqa": HEADER},
        "summaries": {"gsm8k": MATH, "hotpotqa": QA},
        "baseline_headers": {},
        "baseline": {},
        "comparisons": {},
        "num_samples": 2,
        "seeds": [5],
    }
    return Report(**fields | changed)


def printed(one: Report) -> str:
    console = Console(width=220)
    with console.capture() as capture:
        console.print(as_table(one))
    return capture.get()


def test_the_table_gives_percents_intervals_cost_and_causes():
    text = printed(report())
    gsm8k, interval = (
        line
        for line in text.splitlines()
        if "GSM8K" in line or ("[40.0, 60.0]" in line and "[65.0, 85.0]" not in line)
    )
    for words in (
        "1319",
        "50.0",
        "62.5",
        "1.25",
        "2.50",
        "1,234",
        "2,468",
        "wrong 50.0",
    ):
        assert words in gsm8k
    assert "[52.5, 72.5]" in interval
    hotpotqa = next(line for line in text.splitlines() if "HotpotQA" in line)
    assert "75.0" in hotpotqa
    assert "none" in hotpotqa
    # (0.5 + 0.75)/2: pass@1 of mathematics, F1 of QA
    average = next(line for line in text.splitlines() if "average" in line)
    assert "62.5" in average
    assert "vs. baseline" not in text


def test_a_comparison_stands_in_the_table_and_in_the_json():
    better = Comparison(
        difference=Estimate(mean=0.125, low=-0.05, high=0.3),
        p_value=0.031,
        test="mcnemar",
    )
    one = report(
        headers={"gsm8k": HEADER},
        summaries={"gsm8k": MATH},
        baseline_headers={"gsm8k": replace(HEADER, checkpoint="/models/b")},
        baseline={"gsm8k": MATH},
        comparisons={"gsm8k": {"pass@1": better}},
    )
    text = printed(one)
    for words in ("+12.5", "[-5.0, +30.0]", "0.031", "mcnemar"):
        assert words in text
    found = as_json(one)
    assert found["comparisons"]["gsm8k"]["pass@1"]["p_value"] == 0.031
    assert found["baseline"]["checkpoint"] == "/models/b"


def test_the_json_says_what_was_measured_and_how(tmp_path):
    file = tmp_path / "new" / "results.json"
    write_json(file, as_json(report()))
    found = json.loads(file.read_text())
    assert found["average"] == 0.625
    assert (found["seeds"], found["num_samples"]) == ([5], 2)
    assert found["fingerprint"] == "f1"
    hotpotqa = found["benchmarks"]["hotpotqa"]
    assert hotpotqa["headline"] == 0.75
    assert hotpotqa["best_f1_at_k"]["2"]["mean"] == 0.8
    assert hotpotqa["settings"] == {"temperature": 0.6}
    assert "baseline" not in found
    assert [one.name for one in file.parent.iterdir()] == ["results.json"]
