import json
import os
from pathlib import Path

import numpy as np
import pytest

from rllib_arpo.errors import ConfigError, DataError
from rllib_arpo.predictions import (
    Header,
    Prediction,
    PredictionFile,
    fingerprint_of_folder,
    fingerprint_of_tasks,
    prediction_of,
    read_predictions,
)
from rllib_arpo.tree import Leaf, Message, RolloutTree, Segment, Task, ToolCall, Turn

HEADER = Header(
    benchmark="gsm8k",
    checkpoint="/models/a",
    fingerprint="f1",
    tasks="t1",
    settings={"temperature": 0.6, "corpus": None},
)


def header(**changed) -> Header:
    fields = {name: getattr(HEADER, name) for name in HEADER.__slots__}
    return Header(**fields | changed)


def prediction(sample: int = 0, **changed) -> Prediction:
    fields = {
        "task_id": "gsm8k/0",
        "seed": 0,
        "answer": "2",
        "end": "answer",
        "well_formed": True,
        "tool_limit": False,
        "num_model_tokens": 3,
        "num_tool_tokens": 0,
        "turns": (),
    }
    return Prediction(sample=sample, **fields | changed)


def task(number: int = 0, answers: tuple[str, ...] = ("2",), system: str = "s") -> Task:
    messages = (
        Message(role="system", content=system),
        Message(role="user", content="1 + 1?"),
    )
    return Task(task_id=f"gsm8k/{number}", messages=messages, answers=answers)


def segment(role, parent, num_tokens, text="", call=None) -> Segment:
    return Segment(
        parent=parent,
        role=role,
        token_ids=np.zeros(num_tokens, np.int32),
        text=text,
        tool_call=call,
    )


def tree(*statuses: str, parts: dict[str, float] | None = None) -> RolloutTree:
    """A path of tool calls that ended so, and an answer."""
    segments = [segment("prompt", None, 7)]
    for status in statuses:
        call = ToolCall(name="python", arguments="1", status=status)  # type: ignore[arg-type]
        segments.append(segment("model", len(segments) - 1, 2, "<python>1</python>"))
        segments.append(segment("tool", len(segments) - 1, 5, "1", call))
    segments.append(segment("model", len(segments) - 1, 3, "<answer>2</answer>"))
    leaf = Leaf(
        segment=len(segments) - 1,
        reward=0.0,
        reward_parts={"accuracy": 0.0} if parts is None else parts,
        origin="initial",
        end="answer",
        answer="2",
    )
    return RolloutTree(task=task(), segments=tuple(segments), leaves=(leaf,))


def predicted(grown: RolloutTree, limit: int | None = 3) -> Prediction:
    return prediction_of(grown, seed=4, sample=1, max_tool_calls=limit)


def test_a_prediction_holds_the_turns_and_what_they_cost():
    found = predicted(tree("ok", "refused"))
    assert found.key == ("gsm8k/0", 4, 1)
    assert (found.answer, found.end) == ("2", "answer")
    assert (found.num_model_tokens, found.num_tool_tokens) == (7, 10)
    assert [turn.tool_result for turn in found.turns] == ["1", "1", None]
    assert [call.status for call in found.tool_calls] == ["ok"]
    assert found.turns[-1] == Turn(text="<answer>2</answer>")


@pytest.mark.parametrize(
    ("statuses", "limit", "reached"),
    [
        (("ok", "error", "refused"), 2, True),
        (("ok", "refused"), 2, False),  # there is no such tool
        (("ok", "ok"), 2, False),  # all used, and none was missed
        (("refused",), 0, True),
        (("refused",), None, False),
    ],
)
def test_the_tool_limit_is_reached_when_a_call_too_many_was_made(
    statuses, limit, reached
):
    assert predicted(tree(*statuses), limit).tool_limit is reached


def test_a_punished_format_is_badly_formed():
    assert not predicted(tree(parts={"format": -1.0})).well_formed
    assert predicted(tree(parts={"format": 0.0})).well_formed
    assert predicted(tree(parts={"reward": -1.0})).well_formed


def test_predictions_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "predictions" / "gsm8k.jsonl"
    written = [predicted(tree("ok", "timeout")), prediction(answer="a\u2028\n\ud800")]
    PredictionFile(file, HEADER).append(written)
    found, predictions = read_predictions(file)
    assert found == HEADER
    # Half a surrogate pair is no text that a file can hold.
    assert predictions[0] == written[0]
    assert predictions[1].answer == "a\u2028\n?"


def test_a_killed_run_goes_on_after_its_last_whole_line(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    PredictionFile(file, HEADER).append([prediction(0), prediction(1)])
    whole = file.read_bytes()
    PredictionFile(file, HEADER).append([prediction(2)])
    for size in range(len(whole), file.stat().st_size):
        os.truncate(file, size)
        again = PredictionFile(file, HEADER)
        assert [key[2] for key in again.predictions] == [0, 1]
        assert file.read_bytes() == whole
        again.append([prediction(2)])


def test_a_run_killed_before_its_first_line_begins_anew(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    for content in ("", '{"format": 1, "bench'):
        file.write_text(content)
        assert not PredictionFile(file, HEADER).predictions
        assert read_predictions(file) == (HEADER, [])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"fingerprint": "f2"}, r"model \(f1 and f2\)"),
        ({"tasks": "t2"}, r"tasks \(t1 and t2\)"),
        (
            {"settings": {"temperature": 1.0, "corpus": None}},
            r"temperature \(0\.6 and 1\.0\)",
        ),
        (
            {"settings": {"temperature": 0.6, "corpus": "docs"}},
            r"corpus \(None and docs\)",
        ),
    ],
)
def test_answers_that_were_made_otherwise_are_not_mixed(changed, named, tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    PredictionFile(file, HEADER).append([prediction()])
    content = file.read_bytes()
    with pytest.raises(ConfigError, match=f"here: {named}. Choose another folder"):
        PredictionFile(file, header(**changed))
    assert file.read_bytes() == content


def test_a_run_that_gave_no_answer_binds_nobody(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    PredictionFile(file, HEADER)
    other = header(settings={"temperature": 1.0})
    PredictionFile(file, other).append([prediction()])
    assert read_predictions(file) == (other, [prediction()])


def test_a_model_that_was_moved_is_the_same(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    PredictionFile(file, HEADER).append([prediction()])
    moved = PredictionFile(file, header(checkpoint="/elsewhere"))
    assert len(moved.predictions) == 1


@pytest.mark.parametrize(
    "content", ["text\n", "[1]\n", '{"a": 1}\n', '{"format": 2}\n', "null\n"]
)
def test_another_file_is_refused(content, tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match="holds no predictions"):
        PredictionFile(file, HEADER)


def test_a_prediction_that_lacks_a_field_is_refused(tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    PredictionFile(file, HEADER).append([prediction()])
    head, row = file.read_text().splitlines()
    fields = json.loads(row)
    del fields["turns"]
    file.write_text(f"{head}\n{json.dumps(fields)}\n")
    with pytest.raises(DataError, match="holds no predictions"):
        read_predictions(file)


def test_tasks_have_a_fingerprint_of_what_is_asked():
    first = fingerprint_of_tasks([task(0), task(1)])
    assert first == fingerprint_of_tasks([task(0), task(1)])
    assert first != fingerprint_of_tasks([task(1), task(0)])
    assert first != fingerprint_of_tasks([task(0), task(1, answers=("2", "two"))])
    # The system message tells how to talk, and two models may differ in that.
    assert first == fingerprint_of_tasks([task(0, system="other"), task(1)])


def test_a_model_has_a_fingerprint_of_its_files(tmp_path):
    def written(name: str, weights: bytes) -> Path:
        folder = tmp_path / name
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "weights.bin").write_bytes(weights)
        (folder / "config.json").write_text("{}")
        return folder

    big = bytes(3 << 20)
    first = fingerprint_of_folder(written("a", big))
    assert first == fingerprint_of_folder(written("b", big))
    assert first != fingerprint_of_folder(written("c", big[:-1] + b"x"))
    assert first != fingerprint_of_folder(written("d", b"x" + big[1:]))
    assert first != fingerprint_of_folder(written("e", big + b"\0"))
