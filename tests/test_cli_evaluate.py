"""`rllib-arpo evaluate --benchmark`: killed, resumed, compared, judged."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from rllib_arpo.cli import main
from tests.commands import LIMIT_S, run, start
from tests.locked_runs import locked_by_another
from tests.rewards.judge_server import endpoint, verdicts
from tests.writer_model import save_writer

QUESTIONS = 6
BENCHMARKS = ("gsm8k", "hotpotqa", "gaia")
FLAGS = (
    *("--benchmark", "gsm8k,hotpotqa,gaia", "--benchmark-dir", "."),
    *("--k", "1,3", "--seeds", "2", "--max-tool-calls", "2"),
)
# 3 benchmarks, 6 questions, 2 seeds, 3 answers
NUM_ANSWERS = 108


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and three benchmarks; a third of the writer's endings is right."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_writer(folder / "writer")
    save_writer(folder / "better", favor=100.0)
    numbers = range(QUESTIONS)
    write_rows(
        folder / "gsm8k.jsonl",
        [{"question": f"{n} + 1?", "answer": "1 + 1 = 2\n#### 2"} for n in numbers],
    )
    write_rows(
        folder / "hotpotqa.jsonl",
        [{"question": f"Who is {n}?", "answer": ["2 bears"]} for n in numbers],
    )
    gaia = [
        {"Question": f"Who is {n}?", "Final answer": "two", "Level": n % 2 + 1}
        for n in numbers
    ]
    write_rows(folder / "gaia.jsonl", [*gaia, gaia[0] | {"file_name": "a.png"}])
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> str:
    """What an evaluation that nobody disturbs prints."""
    return run("evaluate", "writer", *FLAGS, "--out", "whole", folder=place)


@pytest.fixture(scope="module")
def left_by_kill(place: Path) -> dict[str, str]:
    """What stands in the predictions' files after SIGKILL in the middle."""
    words = ["--out", "killed", "--answers-at-once", "1", "--json", "killed.json"]
    process = start("evaluate", "writer", *FLAGS, *words, folder=place)
    folder = place / "killed" / "predictions"
    deadline = time.monotonic() + LIMIT_S
    while num_lines(folder / "gsm8k.jsonl") < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -9
    return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def resumed(place: Path, left_by_kill: dict[str, str]) -> str:
    words = ["--out", "killed", "--answers-at-once", "7", "--json", "killed.json"]
    return run("evaluate", "writer", *FLAGS, *words, folder=place)


@pytest.fixture(scope="module")
def compared(place: Path, whole: str) -> str:
    words = ["--out", "better_out", "--baseline", "whole", "--json", "better.json"]
    return run("evaluate", "better", *FLAGS, *words, folder=place)


def num_lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def predictions(out: Path) -> dict[tuple, dict]:
    """By benchmark, task, seed and number; without times."""
    found = {}
    for name in BENCHMARKS:
        lines = (out / "predictions" / f"{name}.jsonl").read_text().splitlines()
        for row in map(json.loads, lines[1:]):
            for turn in row["turns"]:
                if turn["tool_call"] is not None:
                    del turn["tool_call"]["latency_s"]
            key = (row["task_id"], row["seed"], row["sample"])
            assert key not in found
            found[key] = row
    return found


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def words_of(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.slow
def test_an_evaluation_fills_its_folder_and_prints_one_table(place, whole):
    assert len(predictions(place / "whole")) == NUM_ANSWERS
    numbers = results(place / "whole")
    assert list(numbers["benchmarks"]) == list(BENCHMARKS)
    assert numbers["seeds"] == [0, 1]
    gsm8k, hotpotqa, gaia = numbers["benchmarks"].values()
    assert gsm8k["num_tasks"] == QUESTIONS
    assert gsm8k["num_answers"] == 6 * QUESTIONS
    assert 0 < gsm8k["pass_at_k"]["1"]["mean"] < gsm8k["pass_at_k"]["3"]["mean"] <= 1
    assert gsm8k["tool_calls_per_answer"] > 0
    # "2" has an F1 of 2/3 with "2 bears", and "3 bears" one of 1/2
    assert 1 / 2 < hotpotqa["f1"]["mean"] < 2 / 3
    assert hotpotqa["pass_at_k"]["3"]["mean"] == 0
    assert hotpotqa["headline"] == hotpotqa["f1"]["mean"]
    assert gaia["metric"] == "exact"
    assert gaia["skipped"] == {"needs a file": 1}
    assert list(gaia["groups"]) == ["1", "2"]
    settings = gsm8k["settings"]
    assert (settings["temperature"], settings["top_p"]) == (0.6, 0.95)
    assert (settings["max_response_tokens"], settings["max_tool_calls"]) == (4096, 2)
    assert gaia["settings"]["max_response_tokens"] == 8192
    for words in ("GSM8K", "HotpotQA", "pass@1", "pass@3", "F1", "per right", "wrong"):
        assert words in whole
    assert f"{NUM_ANSWERS}/{NUM_ANSWERS}" in whole


@pytest.mark.slow
def test_predictions_hold_what_was_said_and_done(place, whole):
    rows = predictions(place / "whole").values()
    assert {row["answer"] for row in rows} == {"2", "3 bears"}
    limited = [row for row in rows if row["tool_limit"]]
    assert limited
    for row in limited:
        calls = [turn["tool_call"] for turn in row["turns"] if turn["tool_call"]]
        assert [call["status"] for call in calls[:3]] == ["ok", "ok", "refused"]
        assert row["turns"][0]["tool_result"] == "2"
        assert row["num_tool_tokens"] > 0
    # Seeds and numbers give other answers, and so do tasks.
    for place_of_key in range(3):
        answers: dict[object, list[str]] = {}
        for row in sorted(rows, key=lambda r: (r["task_id"], r["seed"], r["sample"])):
            key = (row["task_id"], row["seed"], row["sample"])[place_of_key]
            answers.setdefault(key, []).append(repr(row["turns"]))
        assert len({tuple(own) for own in answers.values()}) == len(answers)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_ends_as_one_that_never_was(
    place, whole, left_by_kill, resumed
):
    num_left = sum(text.count("\n{") for text in left_by_kill.values())
    assert 3 <= num_left < NUM_ANSWERS
    assert f"{num_left} of {NUM_ANSWERS} answers are there already" in resumed
    kept = (place / "killed" / "predictions" / "gsm8k.jsonl").read_text()
    whole_lines = left_by_kill["gsm8k.jsonl"].rpartition("\n")[0]
    assert kept.startswith(whole_lines)
    assert predictions(place / "killed") == predictions(place / "whole")
    assert results(place / "killed") == results(place / "whole")
    assert json.loads((place / "killed.json").read_text()) == results(place / "killed")


@pytest.mark.slow
def test_two_checkpoints_are_compared_task_by_task(place, compared):
    numbers = json.loads((place / "better.json").read_text())
    gsm8k = numbers["comparisons"]["gsm8k"]["pass@1"]
    old = numbers["baseline"]["benchmarks"]["gsm8k"]["pass_at_k"]["1"]["mean"]
    assert numbers["benchmarks"]["gsm8k"]["pass_at_k"]["1"]["mean"] == 1.0
    assert gsm8k["difference"]["mean"] == pytest.approx(1.0 - old)
    assert 0 < gsm8k["difference"]["low"] <= gsm8k["difference"]["mean"]
    # Better at all of 6 tasks: of 2⁶ signs only two are as extreme.
    assert gsm8k["p_value"] == pytest.approx(2 / 2**QUESTIONS)
    assert gsm8k["test"] == "permutation"
    assert numbers["comparisons"]["hotpotqa"].keys() == {"pass@1", "f1"}
    assert numbers["baseline"]["checkpoint"] == str(place / "writer")
    assert "vs. baseline" in compared
    assert "0.031" in compared


def refused(words: list[str], monkeypatch, capsys) -> str:
    """What a command that is a mistake says; in this process."""
    monkeypatch.setattr(sys, "argv", ["rllib-arpo", "evaluate", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return words_of(capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["better"], "model ("),
        (["writer", "--temperature", "1"], "temperature (0.6 and 1.0)"),
        (["writer", "--python", "subprocess"], "python (embedded and subprocess)"),
        (["writer", "--max-tool-calls", "3"], "max_tool_calls (2 and 3)"),
    ],
)
def test_answers_of_other_settings_are_not_mixed(
    words, message, place, whole, monkeypatch, capsys
):
    monkeypatch.chdir(place)
    said = refused(
        [words[0], *FLAGS, *words[1:], "--out", "whole"], monkeypatch, capsys
    )
    assert message in said
    assert "Choose another folder with --out" in said


@pytest.mark.slow
def test_a_judge_scores_again_what_was_answered_and_is_asked_once(
    place, whole, monkeypatch, capsys
):
    monkeypatch.chdir(place)
    shutil.copytree(place / "whole", place / "judged")
    yes = '{"reason": "it is two", "verdict": "correct"}'
    no = '{"reason": "it is not", "verdict": "incorrect"}'

    def reply_to(request: dict):
        said = json.loads(request["messages"][-1]["content"])["response"]
        return verdicts(yes if said == "2" else no)(request)

    with endpoint(reply_to) as served:
        words = ["--judge", "m", "--judge-url", served.base_url, "--judge-key", ""]
        argv = ["rllib-arpo", "evaluate", "writer", *FLAGS, "--out", "judged", *words]
        for _ in range(2):
            monkeypatch.setattr(sys, "argv", argv)
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == 0, capsys.readouterr().err
    answers = [
        row["answer"]
        for key, row in predictions(place / "judged").items()
        if key[0].startswith("gaia")
    ]
    numbers = results(place / "judged")
    gaia = numbers["benchmarks"]["gaia"]
    assert gaia["metric"] == "judge"
    right = answers.count("2") / len(answers)
    assert gaia["pass_at_k"]["1"]["mean"] == pytest.approx(right)
    # Each question with each of the two answers, however often it was given.
    assert len(served.requests) <= 2 * QUESTIONS
    assert numbers["judge"]["num_cached"] == numbers["judge"]["num_cases"] == 36
    scores = (place / "judged" / "scores" / "gaia.jsonl").read_text().splitlines()
    assert {(s["answer"], s["failure"]) for s in map(json.loads, scores)} == {
        ("2", None),
        ("3 bears", "wrong"),
    }


MISTAKES = {
    "writer --seeds 2": "--seeds has no effect with no --benchmark",
    "writer --benchmark gsm8k --data gsm8k.jsonl": "--data has no effect with --bench",
    "writer --benchmark gsm8k --benchmark-dir . --k 1,x": '--k ("1,x") must be whole',
    "writer --benchmark gsm8k --benchmark-dir . --k 0,1": '--k ("0,1") must be whole',
    "writer --benchmark gsm8k --benchmark-dir . --k 3 --num-samples 2": (
        "--num-samples (2) must be at least the largest of --k (3)"
    ),
    "writer --benchmark gsm9k": 'there is no benchmark "gsm9k"',
    "writer --benchmark aime24 --benchmark-dir .": "must hold one file aime24.jsonl",
    "writer --benchmark gsm8k=hotpotqa.jsonl": "hotpotqa.jsonl, row 0, `answer`",
    "writer --dialogue xml": '--dialogue ("xml") must be one of',
    "writer --num-env-runners -1": "Invalid value for '--num-env-runners'",
    "writer --engine vllmm": "`engine` ('vllmm') must be one of 'torch', 'vllm'.",
    "nowhere --json gsm8k.jsonl/x.json": "--json gsm8k.jsonl/x.json cannot be written",
    "nowhere --benchmark gsm8k --json writer": "--json writer is a folder: give a file",
    "nowhere --benchmark gsm8k --benchmark-dir .": "nowhere holds no checkpoint",
    "writer --benchmark gsm8k --benchmark-dir . --baseline .": ". holds no checkpoint",
    "writer --benchmark gaia --benchmark-dir . --judge-url http://x": (
        "--judge-url has no effect with no --judge"
    ),
    "writer --benchmark gsm8k --benchmark-dir . --judge m --judge-key PATH": (
        "--judge has no effect with gsm8k, which are scored by rule"
    ),
    "writer --benchmark gaia --benchmark-dir . --judge m --judge-key NO_SUCH_KEY": (
        "the environment holds no NO_SUCH_KEY"
    ),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_found_before_anything_starts(words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    said = refused(words.split(), monkeypatch, capsys)
    assert said.startswith("Error: ")
    assert MISTAKES[words] in said


def test_an_evaluation_that_another_process_makes_is_left_alone(
    place, monkeypatch, capsys
):
    monkeypatch.chdir(place)
    words = ["writer", "--benchmark", "gsm8k", "--benchmark-dir", ".", "--out", "held"]
    with locked_by_another(place / "held"):
        said = refused(words, monkeypatch, capsys)
    assert "another process evaluates in held (" in said
    assert [file.name for file in (place / "held").iterdir()] == ["lock"]


@pytest.mark.slow
def test_a_baseline_must_have_answered_the_same(place, whole, monkeypatch, capsys):
    monkeypatch.chdir(place)
    rows = [{"question": "Another?", "answer": "#### 3"}]
    write_rows(place / "other.jsonl", rows)
    common = ["better", "--baseline", "whole", "--out", "other_out", "--benchmark"]
    said = refused([*common, "gsm8k=other.jsonl"], monkeypatch, capsys)
    assert "answers other tasks than are asked for here" in said
    write_rows(place / "aime24.jsonl", [{"problem": "1 + 1?", "answer": "2"}])
    said = refused([*common, "aime24=aime24.jsonl"], monkeypatch, capsys)
    assert "whole holds no answers to aime24" in said
