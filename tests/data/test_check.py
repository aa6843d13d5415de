import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from rllib_arpo.cli import main
from rllib_arpo.cli_data import data_app
from rllib_arpo.data.check import check_data
from rllib_arpo.data.data_file import DataFile
from rllib_arpo.data.overlaps import BenchmarkQuestions, normalized
from rllib_arpo.errors import ConfigError, DataError
from rllib_arpo.tree import Message, Task
from tests.tokenizers import qwen_like

LONG = (
    "Each morning Aya takes a nine kilometer walk and stops at a coffee shop "
    "afterwards to read the newspaper of the day"
)


def row(question="1 + 1?", answer: object = "2", **more) -> dict:
    return {"question": question, "answer": answer, "ability": "math", **more}


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def found(report, kind) -> list[tuple[int, str]]:
    return [(one.row, one.problem) for one in report.of_kind(kind)]


def test_every_bad_row_is_named_with_its_kind(tmp_path):
    path = write(
        tmp_path / "r.jsonl",
        row("a", r"\frac{1}{2}"),
        row("b", " "),
        row("c", r"\frac{1}{"),
        {"question": "d"},
        row("e", [r"\frac{1}{", "3"]),
        row("f", "nobody knows", ability="numeric"),
    )
    report = check_data(DataFile(path))
    assert found(report, "bad_row") == [
        (3, "`answer` expected text or a number, got None")
    ]
    assert found(report, "blank_answer") == [
        (1, "`answer` is blank, so no answer can be right")
    ]
    assert [number for number, _ in found(report, "unparsable_answer")] == [2, 5]
    assert (report.num_rows, report.num_tasks, report.num_bad) == (6, 5, 4)


def test_rows_are_counted_by_source_and_ability(tmp_path):
    rows = [
        row("a", data_source="x"),
        row("b", data_source="y"),
        row("c", "Paris", ability="qa", data_source="y"),
    ]
    report = check_data(DataFile(write(tmp_path / "r.jsonl", *rows)))
    assert report.by_source == {"y": 2, "x": 1}
    assert report.by_ability == {"math": 2, "qa": 1}
    assert report.findings == ()


def test_prompts_are_measured_in_words_or_in_the_model_s_tokens(tmp_path):
    rows = [row(" ".join(["a"] * length)) for length in range(1, 22)]
    path = write(tmp_path / "r.jsonl", *rows)
    in_words = check_data(DataFile(path))
    assert in_words.length_unit == "words"
    # lengths 1, 2, ..., 21: the middle one is 11, and 95 % of 20 steps lead to 20
    assert in_words.prompt_lengths == {"min": 1, "median": 11, "p95": 20, "max": 21}
    tokenizer = qwen_like()
    tokenizer.save_pretrained(tmp_path / "model")
    in_tokens = check_data(DataFile(path), model=str(tmp_path / "model"))
    assert in_tokens.length_unit == "tokens"
    shortest = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    assert in_tokens.prompt_lengths["min"] == len(tokenizer.encode(str(shortest)))


def test_a_question_that_came_before_is_named_whatever_its_spelling(tmp_path):
    path = write(
        tmp_path / "r.jsonl",
        row("What is  1+1?"),
        row("what is 1 + 1"),
        row("What is 1 - 1?"),
        row("What is \uff11+\uff11?"),
    )
    assert found(check_data(DataFile(path)), "duplicate") == [
        (1, "the question of row 0"),
        (3, "the question of row 0"),
    ]


def test_a_benchmark_s_question_is_found_whole_or_within_another(tmp_path):
    benchmark = write(
        tmp_path / "bench.jsonl",
        {"question": "Who wrote it?", "answer": "x"},
        {"question": LONG, "answer": "x"},
    )
    path = write(
        tmp_path / "r.jsonl",
        row("who wrote it"),
        row(f"Here is a story. {LONG}. How long was she away?"),
        row("Aya goes for a walk."),
    )
    report = check_data(DataFile(path), benchmarks=[DataFile(benchmark)])
    assert found(report, "overlap") == [
        (0, "the question of bench/0"),
        (1, "100% of the question of bench/1, word for word"),
    ]


def test_half_of_a_benchmark_s_sequences_make_an_overlap():
    # 22 words hold 10 sequences of 13; the first 17 words hold 5 of them, 16 hold 4.
    words = LONG.split()
    assert len(words) == 22
    task = Task(
        task_id="b/0",
        messages=(Message(role="user", content=LONG),),
        answers=("x",),
    )
    known = BenchmarkQuestions([task])
    assert known.find(normalized(" ".join(words[:17]))) is not None
    assert known.find(normalized(" ".join(words[:16]))) is None


def test_a_file_that_holds_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no rows"):
        check_data(DataFile(write(tmp_path / "r.jsonl")))


def check(*words):
    return CliRunner().invoke(data_app, ["check", *map(str, words)])


def test_the_command_ends_with_0_when_no_row_is_bad(tmp_path):
    path = write(tmp_path / "r.jsonl", row("a"), row("a"))
    result = check(path)
    assert result.exit_code == 0, result.output
    assert "1 duplicates of an earlier question" in result.output
    assert "words of a prompt, median" in result.output


def test_the_command_names_bad_rows_and_ends_with_1(tmp_path):
    bad = [{"question": str(number)} for number in range(30)]
    path = write(tmp_path / "r.jsonl", row(), *bad)
    result = check(path, "--json", tmp_path / "out.json")
    assert result.exit_code == 1
    assert f"{path}, row 20: `answer` expected text" in result.output
    assert "row 21:" not in result.output
    assert "10 more" in result.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert [one["row"] for one in written["findings"]["bad_row"]] == [*range(1, 31)]
    assert (written["num_rows"], written["num_bad"]) == (31, 30)


def test_the_command_reads_other_layouts(tmp_path):
    path = write(tmp_path / "r.jsonl", {"q": "1 + 1?", "a": {"text": "so #### 2"}})
    columns = ["--column", "question=q", "--column", "answer=a.text"]
    result = check(path, *columns, "--answers", "gsm8k", "--ability", "math")
    assert result.exit_code == 0, result.output
    assert "ability math" in result.output
    wrong = check(path, "--column", "question")
    assert isinstance(wrong.exception, ConfigError)


def test_the_command_line_refuses_a_missing_file_with_code_2(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["rllib-arpo", "data", "check", "none.jsonl"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "Error: none.jsonl is no file" in capsys.readouterr().err


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data in {SHARED}")
def test_the_paper_s_row_with_a_blank_answer_is_named(tmp_path):
    rows = pq.read_table(SHARED / "train_10k.parquet").slice(5270, 10)
    pq.write_table(rows, tmp_path / "part.parquet")
    report = check_data(DataFile(tmp_path / "part.parquet"))
    assert [number for number, _ in found(report, "blank_answer")] == [4]  # 5274
    assert report.num_tasks == 10
