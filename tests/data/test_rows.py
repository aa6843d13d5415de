import json
from pathlib import Path

import pytest

from rllib_arpo.data.data_file import DataFile
from rllib_arpo.data.datasets import load_tasks
from rllib_arpo.errors import ConfigError, DataError, RowError
from rllib_arpo.tree import Message, question

PROBLEM = {"problem": "1 + 1?", "final": {"value": "2"}, "kind": "sum", "level": "easy"}


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only_task(path: Path, row, **reading):
    (task,) = load_tasks(DataFile(write(path / "r.jsonl", row), **reading))
    return task


def test_columns_of_any_name_and_depth_are_mapped(tmp_path):
    task = only_task(
        tmp_path,
        PROBLEM,
        columns={
            "question": "problem",
            "answer": "final.value",
            "ability": "kind",
            "source": "level",
        },
    )
    assert task.messages == (Message(role="user", content="1 + 1?"),)
    assert (task.answers, task.ability, task.source) == (("2",), "sum", "easy")


def test_a_column_with_dots_in_its_name_is_found(tmp_path):
    row = {"a.b": "1 + 1?", "answer": 2}
    task = only_task(tmp_path, row, columns={"question": "a.b"})
    assert task.messages[0].content == "1 + 1?"


def test_a_constant_ability_and_source_hold_for_all_rows(tmp_path):
    row = PROBLEM | {"answer": "2", "ability": "qa", "data_source": "x"}
    task = only_task(tmp_path, row, ability="math", source="numina")
    assert (task.ability, task.source) == ("math", "numina")


def test_the_config_s_prompts_frame_the_row_s_question(tmp_path):
    prompt = [
        {"role": "system", "content": "old"},
        {"role": "user", "content": "1 + 1?"},
    ]
    task = only_task(
        tmp_path,
        {"prompt": prompt, "answer": "2"},
        system_prompt="new",
        prompt_template=r"{question} Put it into \boxed{}.",
    )
    assert task.messages == (
        Message(role="system", content="new"),
        Message(role="user", content=r"1 + 1? Put it into \boxed{}."),
    )
    assert question(task) == "1 + 1?"


@pytest.mark.parametrize(
    ("answers", "given", "accepted"),
    [
        ("gsm8k", "1 + 1 = <<1+1=2>>2\n#### 2,000", ("2,000",)),
        ("gsm8k", 7, ("7",)),
        ("list", "['New York', \"NYC\", 3]", ("New York", "NYC", "3")),
        ("list", r"['\dfrac{1}{2}']", (r"\dfrac{1}{2}",)),
        ("list", ["a", "b"], ("a", "b")),
        ("plain", "['a']", ("['a']",)),
        ("plain", 0.5, ("0.5",)),
    ],
)
def test_answers_are_read_in_the_format_that_is_named(
    tmp_path, answers, given, accepted
):
    row = {"question": "?", "answer": given}
    assert only_task(tmp_path, row, answers=answers).answers == accepted


@pytest.mark.parametrize(
    ("answers", "given", "problem"),
    [
        ("gsm8k", "no mark", "no answer after '####'"),
        ("gsm8k", "work #### ", "no answer after '####'"),
        ("list", "a, b", "is no list"),
        ("list", "{'a': 1}", "is no list"),
        ("list", "[]", "at least one"),
        ("list", "[" * 10_000, "is no list"),
        ("plain", float("nan"), "NaN"),
        ("plain", True, "expected text or a number"),
        ("plain", "half \ud83d", "surrogate"),
    ],
)
def test_answers_in_another_format_are_refused(tmp_path, answers, given, problem):
    with pytest.raises(RowError, match=problem) as refusal:
        only_task(tmp_path, {"question": "?", "answer": given}, answers=answers)
    assert (refusal.value.row, refusal.value.field) == (0, "answer")


@pytest.mark.parametrize("path", ["final.number", "nothing", "problem.text"])
def test_a_mapped_field_that_a_row_lacks_is_named(tmp_path, path):
    with pytest.raises(RowError, match="`columns` names it for 'answer'") as refusal:
        only_task(tmp_path, PROBLEM, columns={"answer": path})
    assert refusal.value.field == path


def test_a_long_value_is_cut_in_the_message(tmp_path):
    with pytest.raises(RowError, match="expected role") as refusal:
        only_task(tmp_path, {"prompt": ["x" * 100_000], "answer": "2"})
    assert len(str(refusal.value)) < 400


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path, caplog):
    good = {"question": "?", "answer": "2"}
    path = write(tmp_path / "r.jsonl", good, {"question": "?"}, good, 3)
    path.write_text(path.read_text() + '{"question": \n')
    with pytest.raises(DataError, match="row 1, `answer`"):
        load_tasks(path)
    tasks = load_tasks(DataFile(path, on_bad_row="skip"))
    assert [task.task_id for task in tasks] == ["r/0", "r/2"]
    assert tasks.num_skipped == 3
    assert "row 1, `answer`" in caplog.text
    assert "row 4: no JSON" in caplog.text
    assert "3 bad rows are left out, 2 kept" in caplog.text


def test_a_file_without_one_good_row_is_refused(tmp_path):
    path = write(tmp_path / "r.jsonl", {"question": "?"})
    with pytest.raises(DataError, match=r"no good row \(.*row 0, `answer`"):
        load_tasks(DataFile(path, on_bad_row="skip"))


def test_many_warnings_become_one(tmp_path, caplog):
    blank = {"question": "?", "answer": " "}
    load_tasks(write(tmp_path / "r.jsonl", *[blank] * 30))
    assert len(caplog.records) == 6
    assert "25 more rows" in caplog.text


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        ({"columns": {"questions": "q"}}, "questions"),
        ({"answers": "csv"}, "'plain', 'gsm8k', 'list'"),
        ({"on_bad_row": "ignore"}, "'error', 'skip'"),
        ({"prompt_template": "Answer: "}, r"must hold \{question\}"),
    ],
)
def test_a_reading_that_cannot_work_is_refused(reading, message):
    with pytest.raises(ConfigError, match=message):
        DataFile("r.jsonl", **reading)
