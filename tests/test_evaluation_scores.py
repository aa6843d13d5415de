import pytest

from rllib_arpo.data.benchmarks import BENCHMARKS, BenchmarkTasks
from rllib_arpo.errors import DataError
from rllib_arpo.evaluation_scores import (
    compare_scores,
    failure_of,
    score_predictions,
    summarize,
)
from rllib_arpo.predictions import Prediction
from rllib_arpo.rewards.judge_prompt import JudgeCase, Verdict
from rllib_arpo.tree import Message, Task, ToolCall, Turn


def tasks_of(name: str, *answers: str, groups: tuple[str, ...] = ()) -> BenchmarkTasks:
    ability = {"gsm8k": "math", "hotpotqa": "qa", "gaia": "exact"}[name]
    tasks = [
        Task(
            task_id=f"{name}/{number}",
            messages=(Message(role="user", content=f"question {number}"),),
            answers=(answer,),
            ability=ability,
            metadata={"group": groups[number] if groups else ""},
        )
        for number, answer in enumerate(answers)
    ]
    return BenchmarkTasks(benchmark=BENCHMARKS[name], tasks=tasks, skipped={"old": 3})


def prediction(task_id: str = "gsm8k/0", answer: str | None = "2", **changed):
    fields = {
        "seed": 0,
        "sample": 0,
        "end": "no_answer" if answer is None else "answer",
        "well_formed": True,
        "tool_limit": False,
        "num_model_tokens": 10,
        "num_tool_tokens": 4,
        "turns": (),
    }
    return Prediction(task_id=task_id, answer=answer, **fields | changed)


def turns(*statuses: str) -> tuple[Turn, ...]:
    return tuple(
        Turn(
            text="",
            tool_call=ToolCall(name="python", arguments="", status=status),  # type: ignore[arg-type]
        )
        for status in statuses
    )


def answered(task_id: str, *answers: str | None, seed: int = 0) -> list[Prediction]:
    return [
        prediction(task_id, answer, seed=seed, sample=number)
        for number, answer in enumerate(answers)
    ]


class Judge:
    """Gives these verdicts, and keeps what it was asked."""

    def __init__(self, *verdicts: bool | None) -> None:
        self.verdicts = verdicts
        self.cases: list[JudgeCase] = []

    def ask_all(self, cases):
        self.cases += cases
        return [v if v is None else Verdict(correct=v) for v in self.verdicts]


@pytest.mark.parametrize(
    ("changed", "score", "cause"),
    [
        ({}, 1.0, None),
        ({}, 0.99, "wrong"),
        ({"well_formed": False}, 1.0, None),
        ({"well_formed": False}, 0.0, "badly formed"),
        ({"answer": None, "well_formed": False}, 0.0, "no answer"),
        ({"turns": turns("ok", "timeout"), "answer": None}, 0.0, "tool failure"),
        ({"turns": turns("unavailable")}, 0.0, "tool failure"),
        ({"turns": turns("ok", "error", "refused")}, 0.0, "wrong"),
        ({"turns": turns("timeout"), "tool_limit": True}, 0.0, "tool limit"),
        ({"tool_limit": True, "end": "length", "answer": None}, 0.0, "cut by length"),
        ({"end": "length"}, None, "unjudged"),
    ],
)
def test_the_first_cause_that_applies_is_why_an_answer_fails(changed, score, cause):
    assert failure_of(prediction(**changed), score) == cause


def test_mathematics_is_scored_by_value_and_qa_by_f1():
    loaded = tasks_of("gsm8k", "0.5", "15")
    scored = score_predictions(
        loaded,
        [*answered("gsm8k/0", r"\frac{1}{2}", "0.6"), *answered("gsm8k/1", "1.5")],
    )
    assert [one.score for one in scored] == [1.0, 0.0, 0.0]
    loaded = tasks_of("hotpotqa", "New York City")
    scored = score_predictions(loaded, answered("hotpotqa/0", "New York", None))
    # precision 2/2, recall 2/3: F1 = 4/5
    assert [one.score for one in scored] == [pytest.approx(0.8), 0.0]
    assert [one.failure for one in scored] == ["wrong", "no answer"]


def test_a_judge_is_asked_about_the_answers_that_want_one():
    loaded = tasks_of("gaia", "Paris", "Rome")
    predictions = [
        *answered("gaia/0", "the city of Paris", None),
        *answered("gaia/1", "Rom", "?"),
    ]
    judge = Judge(True, False, None)
    scored = score_predictions(loaded, predictions, judge=judge)
    causes = [one.failure for one in scored]
    assert causes == [None, "no answer", "wrong", "unjudged"]
    assert [case.answer for case in judge.cases] == ["the city of Paris", "Rom", "?"]
    assert judge.cases[1] == JudgeCase(
        question="question 1", accepted=("Rome",), answer="Rom"
    )
    summary = summarize(loaded, scored, ks=[1], judged=True)
    assert (summary.metric, summary.failures["unjudged"]) == ("judge", 1)
    # An answer that nobody judged is not right: (1/2 + 0/2)/2
    assert summary.pass_at_k[1].mean == 0.25


def test_without_a_judge_an_answer_must_be_the_accepted_one():
    loaded = tasks_of("gaia", "Paris", "Rome")
    predictions = [*answered("gaia/0", "paris"), *answered("gaia/1", "in Rome")]
    scored = score_predictions(loaded, predictions)
    assert [one.failure for one in scored] == [None, "wrong"]
    assert summarize(loaded, scored, ks=[1]).metric == "exact"


def test_a_judge_is_not_asked_where_a_rule_decides():
    judge = Judge()
    scored = score_predictions(
        tasks_of("gsm8k", "2"), answered("gsm8k/0", "2"), judge=judge
    )
    assert scored[0].right
    assert not judge.cases


def test_a_prediction_of_no_task_is_refused():
    with pytest.raises(DataError, match=r"there are no tasks \['gsm8k/7'\]"):
        score_predictions(tasks_of("gsm8k", "2"), answered("gsm8k/7", "2"))


def test_a_summary_is_over_tasks_and_all_seeds():
    loaded = tasks_of("gsm8k", "2", "2")
    predictions = [
        *answered("gsm8k/0", "2", "1", seed=0),
        *answered("gsm8k/0", "2", "2", seed=1),
        *answered("gsm8k/1", "1", "1", seed=0),
        *answered("gsm8k/1", "2", None, seed=1),
    ]
    scored = score_predictions(loaded, predictions)
    summary = summarize(loaded, scored, ks=[2])
    assert (summary.num_tasks, summary.num_answers) == (2, 8)
    # pass@1: (3/4 + 1/4)/2; pass@2: 1 - C(1,2)/C(4,2) = 1 and 1 - C(3,2)/6 = 1/2
    assert summary.pass_at_k[1].mean == pytest.approx(0.5)
    assert summary.pass_at_k[2].mean == pytest.approx(0.75)
    # seed 0: (1/2 + 0)/2 and (1 + 0)/2; seed 1: (1 + 1/2)/2 and (1 + 1)/2
    assert summary.pass_at_k_by_seed[1] == pytest.approx([0.25, 0.75])
    assert summary.pass_at_k_by_seed[2] == pytest.approx([0.5, 1.0])
    assert summary.failures["wrong"] == 3
    assert summary.failures["no answer"] == 1
    assert sum(summary.failures.values()) == 4
    assert summary.skipped == {"old": 3}
    assert summary.f1 is None
    assert summary.headline == summary.pass_at_k[1].mean


def test_f1_is_summed_up_beside_right_answers():
    loaded = tasks_of("hotpotqa", "New York City", "Rome")
    predictions = [
        *answered("hotpotqa/0", "New York", "New York City"),
        *answered("hotpotqa/1", "Paris", "Rome now"),
    ]
    scored = score_predictions(loaded, predictions)
    summary = summarize(loaded, scored, ks=[1, 2])
    assert summary.f1 is not None
    # ((0.8 + 1)/2 + (0 + 2/3)/2)/2; best of two: (1 + 2/3)/2
    assert summary.f1.mean == pytest.approx((0.9 + 1 / 3) / 2)
    assert summary.best_f1_at_k[2].mean == pytest.approx(5 / 6)
    assert summary.pass_at_k[2].mean == 0.5
    assert summary.headline == summary.f1.mean


def test_cost_is_given_per_answer_and_per_right_answer():
    loaded = tasks_of("gsm8k", "2", "2")
    predictions = [
        prediction("gsm8k/0", "2", turns=turns("ok", "refused")),
        prediction("gsm8k/1", "1", turns=turns("ok", "error"), num_model_tokens=30),
    ]
    summary = summarize(loaded, score_predictions(loaded, predictions), ks=[1])
    # three executed calls and 40 tokens for two answers, of which one is right
    assert summary.tool_calls_per_answer == 1.5
    assert summary.tool_calls_per_right_answer == 3
    assert summary.tokens_per_answer == 20
    assert summary.tokens_per_right_answer == 40
    assert summary.tool_tokens_per_answer == 4


def test_without_a_right_answer_there_is_no_cost_of_one():
    loaded = tasks_of("gsm8k", "2")
    scored = score_predictions(loaded, answered("gsm8k/0", "1"))
    summary = summarize(loaded, scored, ks=[1])
    assert summary.tokens_per_right_answer is None
    assert summary.tool_calls_per_right_answer is None


def test_parts_of_a_benchmark_are_told_apart():
    loaded = tasks_of("gaia", "a", "b", "c", groups=("2", "1", "2"))
    predictions = [*answered("gaia/0", "a"), *answered("gaia/2", "a")]
    groups = summarize(loaded, score_predictions(loaded, predictions), ks=[1]).groups
    # Task 1 was not asked, and level 1 has no other.
    assert {name: (g.num_tasks, g.pass_at_1) for name, g in groups.items()} == {
        "2": (2, 0.5)
    }


def test_models_are_compared_on_the_same_tasks():
    loaded = tasks_of("hotpotqa", *["gold one"] * 9)
    good = [p for n in range(9) for p in answered(f"hotpotqa/{n}", "gold one")]
    bad = [p for n in range(9) for p in answered(f"hotpotqa/{n}", "gold")]
    found = compare_scores(
        score_predictions(loaded, good), score_predictions(loaded, bad), by_f1=True
    )
    assert found["pass@1"].test == "mcnemar"
    assert found["pass@1"].p_value == pytest.approx(2 / 2**9)
    assert found["pass@1"].difference.mean == 1.0
    # F1 of "gold": precision 1, recall 1/2
    assert found["f1"].difference.mean == pytest.approx(1 / 3)
    assert found["f1"].p_value == pytest.approx(2 / 2**9)
    assert "f1" not in compare_scores(
        score_predictions(loaded, good), score_predictions(loaded, bad), by_f1=False
    )


def test_models_with_other_tasks_are_not_compared():
    loaded = tasks_of("gsm8k", "2", "2")
    ours = score_predictions(loaded, answered("gsm8k/0", "2"))
    both = [*answered("gsm8k/0", "2"), *answered("gsm8k/1", "2")]
    theirs = score_predictions(loaded, both)
    with pytest.raises(DataError, match="1 tasks cannot be compared with 2"):
        compare_scores(ours, theirs, by_f1=False)
