"""The answers of an evaluation, on disk as they come.

    {"format": 1, "benchmark": "gsm8k", "checkpoint": ..., "settings": {...}}
    {"task_id": "gsm8k/0", "seed": 0, "sample": 0, "answer": "18", "turns": [...], ...}

The first line says what all answers of the file have in common. A run that was killed
goes on in the same file, and one of another model or with other settings is refused.
Turns and tool calls are kept, so that answers can be read, and scored again.
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rllib_arpo.errors import ConfigError, DataError
from rllib_arpo.tree import (
    LeafEnd,
    RolloutTree,
    Segment,
    Task,
    ToolCall,
    Turn,
    count_tool_calls,
    path,
)

FORMAT = 1
# Bytes from either end of a file of weights that its fingerprint covers.
FINGERPRINTED_BYTES = 1 << 20
# Task, seed, number of the answer.
Key = tuple[str, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One answer of a model to a task.

    Attributes:
        task_id: of the task.
        seed: of the repetition.
        sample: number of the answer among those of the seed, from 0.
        answer: None when there is none.
        end: why the trajectory ended.
        well_formed: whether the reward did not punish the format.
        tool_limit: whether a tool call was refused because all were used.
        num_model_tokens: written by the model.
        num_tool_tokens: tool results, tags included.
        turns: in order.
    """

    task_id: str
    seed: int
    sample: int
    answer: str | None
    end: LeafEnd
    well_formed: bool
    tool_limit: bool
    num_model_tokens: int
    num_tool_tokens: int
    turns: tuple[Turn, ...]

    @property
    def key(self) -> Key:
        """What tells it from all other predictions of a file."""
        return self.task_id, self.seed, self.sample

    @property
    def tool_calls(self) -> list[ToolCall]:
        """Those that were executed."""
        calls = (turn.tool_call for turn in self.turns)
        return [call for call in calls if call and call.status != "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """An answer that is asked for.

    Attributes:
        task: the question.
        seed: of the repetition.
        sample: number of the answer among those of the seed, from 0.
    """

    task: Task
    seed: int
    sample: int

    @property
    def key(self) -> Key:
        """That of the prediction."""
        return self.task.task_id, self.seed, self.sample


def prediction_of(
    tree: RolloutTree, *, seed: int, sample: int, max_tool_calls: int | None
) -> Prediction:
    """The answer of a tree's first leaf.

    Args:
        tree: with one leaf.
        seed: of the repetition.
        sample: number of the answer.
        max_tool_calls: the environment's, None when it has no limit.
    """
    (leaf,) = tree.leaves
    segments = [tree.segments[index] for index in path(tree, leaf)[1:]]
    return Prediction(
        task_id=tree.task.task_id,
        seed=seed,
        sample=sample,
        answer=leaf.answer,
        end=leaf.end,
        well_formed=leaf.reward_parts.get("format", 0.0) >= 0,
        tool_limit=_limit_reached(segments, max_tool_calls),
        num_model_tokens=_num_tokens(segments, "model"),
        num_tool_tokens=_num_tokens(segments, "tool"),
        turns=_turns(segments),
    )


def _num_tokens(segments: Sequence[Segment], role: str) -> int:
    return sum(len(segment.token_ids) for segment in segments if segment.role == role)


def _limit_reached(segments: Sequence[Segment], limit: int | None) -> bool:
    refused = any(s.tool_call and s.tool_call.status == "refused" for s in segments)
    return limit is not None and refused and count_tool_calls(segments) >= limit


def _turns(segments: Sequence[Segment]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for segment in segments:
        if segment.role == "model":
            turns.append(Turn(text=segment.text))
        else:
            turns[-1] = Turn(
                text=turns[-1].text,
                tool_call=segment.tool_call,
                tool_result=segment.text,
            )
    return tuple(turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What all predictions of a file have in common.

    Attributes:
        benchmark: its name.
        checkpoint: where the model was; it may have been moved since.
        fingerprint: of the model.
        tasks: fingerprint of the benchmark's tasks.
        settings: all else that an answer depends on.
    """

    benchmark: str
    checkpoint: str
    fingerprint: str
    tasks: str
    settings: Mapping[str, Any]


class PredictionFile:
    """Predictions that are there, and those that come.

    Args:
        file: read if it is there; what a killed run wrote of its last line is dropped.
        header: of the predictions that come.

    Raises:
        ConfigError: those that are there have another header.
        DataError: the file holds something else.
    """

    def __init__(self, file: Path, header: Header) -> None:
        self.file = file
        self.predictions: dict[Key, Prediction] = {}
        if file.is_file():
            drop_partial_line(file)
        if file.is_file() and file.stat().st_size:
            found, predictions = read_predictions(file)
            self.predictions = {one.key: one for one in predictions}
            if predictions:
                _refuse_mix(file, found, header)
        if not self.predictions:
            # A run that failed before its first answer binds nobody.
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"")
            self._write([{"format": FORMAT, **asdict(header)}])

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Write predictions; when it returns they are on the disk."""
        new = list(predictions)
        self._write([asdict(prediction) for prediction in new])
        self.predictions |= {one.key: one for one in new}

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self.file.open("ab") as file:
            # Half of a surrogate pair, as a cut tool result may hold, is no UTF-8.
            file.write(text.encode(errors="replace"))
            file.flush()
            os.fsync(file.fileno())


def read_predictions(file: Path) -> tuple[Header, list[Prediction]]:
    """Header and predictions of a file.

    Raises:
        DataError: it is no such file.
    """
    lines = file.read_text(encoding="utf-8").split("\n")
    try:
        head, *rows = [json.loads(line) for line in lines if line]
        if head.pop("format") != FORMAT:
            raise ValueError(f"the format is not {FORMAT}")
        return Header(**head), [_prediction(row) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file} holds no predictions: {error}") from error


def drop_partial_line(file: Path) -> None:
    """Cut a last line that has no end: its writer was killed."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with file.open("r+b") as opened:
            opened.truncate(whole)


def fingerprint_of_tasks(tasks: Sequence[Task]) -> str:
    """Changes when a question or an accepted answer does.

    The system message is the dialogue's, which two models need not share.
    """
    digest = blake2b(digest_size=8)
    for task in tasks:
        asked = [m.content for m in task.messages if m.role != "system"]
        digest.update(repr((task.task_id, asked, task.answers)).encode())
    return digest.hexdigest()


def fingerprint_of_folder(folder: Path) -> str:
    """Changes when a model does: names and sizes of its files, and their two ends.

    Training moves every weight, so that the first and last megabyte of a file tell
    checkpoints apart; all of 16 GB would take a minute.
    """
    digest = blake2b(digest_size=8)
    for file in sorted(one for one in folder.rglob("*") if one.is_file()):
        size = file.stat().st_size
        digest.update(repr((str(file.relative_to(folder)), size)).encode())
        with file.open("rb") as opened:
            digest.update(opened.read(FINGERPRINTED_BYTES))
            opened.seek(max(size - FINGERPRINTED_BYTES, 0))
            digest.update(opened.read(FINGERPRINTED_BYTES))
    return digest.hexdigest()


def differences(
    ours: Header, theirs: Header, *, besides: Collection[str] = ()
) -> list[str]:
    """What two headers differ in, as "name (theirs and ours)".

    Args:
        ours: a header.
        theirs: another; where the model was does not count.
        besides: what may differ.
    """
    pairs = [
        ("model", theirs.fingerprint, ours.fingerprint),
        ("tasks", theirs.tasks, ours.tasks),
        *(
            (name, theirs.settings.get(name), ours.settings.get(name))
            for name in sorted({*ours.settings, *theirs.settings})
        ),
    ]
    return [
        f"{name} ({old} and {new})"
        for name, old, new in pairs
        if old != new and name not in besides
    ]


def _refuse_mix(file: Path, found: Header, wanted: Header) -> None:
    unlike = differences(wanted, found)
    if unlike:
        raise ConfigError(
            f"{file} holds answers made otherwise, of {found.checkpoint}; there and "
            f"here: {', '.join(unlike)}. Choose another folder with --out, or repeat "
            "the command as it was"
        )


def _prediction(row: Mapping[str, Any]) -> Prediction:
    turns = tuple(
        Turn(
            text=turn["text"],
            tool_call=ToolCall(**turn["tool_call"]) if turn["tool_call"] else None,
            tool_result=turn["tool_result"],
        )
        for turn in row["turns"]
    )
    return Prediction(**{**row, "turns": turns})
