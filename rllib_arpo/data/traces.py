"""Traces for the cold start: dialogues written by others, as trees of one leaf.

A row is a chat, in one of the layouts of `trace_rows.py`:

    system, user    the prompt, rendered by the chat template
    assistant       one turn of the model, up to the end of its tool call or answer
    tool            what that tool answered

Assistant turns alone carry loss. A tool result is encoded as the environment does
it, so the model is taught on the very tokens that it will meet in a rollout.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from rllib_arpo.data.data_file import BadRowRule
from rllib_arpo.data.files import jsonl_rows
from rllib_arpo.data.rows import Row
from rllib_arpo.data.trace_rows import ChatMessage, chat_messages
from rllib_arpo.envs.dialogue import Dialogue
from rllib_arpo.envs.env_config import DEFAULTS, load_tokenizer, make_dialogue
from rllib_arpo.errors import DataError
from rllib_arpo.tools.tool import ToolSpec
from rllib_arpo.tree import Leaf, Message, RolloutTree, Segment, Task, ToolCall

Part = tuple[Literal["model", "tool"], str]

MAX_RESULT_TOKENS: int = DEFAULTS["max_result_tokens"]

logger = logging.getLogger(__name__)


def load_traces(
    file: str | Path,
    model: str,
    tool_names: Sequence[str],
    *,
    dialogue: Any = "tags",
    tool_specs: Sequence[ToolSpec] | None = None,
    max_result_tokens: int = MAX_RESULT_TOKENS,
    max_tokens: int | None = None,
    on_bad_row: BadRowRule = "error",
) -> list[RolloutTree]:
    """Read traces from a .jsonl file, or a .json file that holds a list.

    Args:
        file: one chat per row.
        model: folder or hub name of the tokenizer that encodes them.
        tool_names: of the tools that the traces call.
        dialogue: as in `env_config`.
        tool_specs: what a chat template tells the model of the tools.
        max_result_tokens: cap of a tool result, as in the environment.
        max_tokens: a longer trace is a bad row.
        on_bad_row: "skip" leaves bad rows out, and logs how many.

    Raises:
        DataError: the file is missing, empty or of another kind, or a row is wrong;
            names file, row (from 0) and field.
        ConfigError: `model` holds no fast tokenizer.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{path} is no file")
    encoder = make_dialogue(
        dialogue,
        load_tokenizer(model),
        tool_names=tool_names,
        tool_specs=tool_specs,
    )
    trees: list[RolloutTree] = []
    bad: list[DataError] = []
    for number, fields in enumerate(_rows(path)):
        try:
            row = Row(path, number, fields)
            tree = _trace(row, encoder, tool_names, max_result_tokens)
            if max_tokens is not None and tree.num_tokens > max_tokens:
                raise row.error(
                    "", f"{tree.num_tokens} tokens are more than {max_tokens}"
                )
            trees.append(tree)
        except DataError as error:
            if on_bad_row == "error":
                raise
            bad.append(error)
    if bad:
        logger.warning(
            "left out %d of %d traces; the first: %s",
            len(bad),
            len(bad) + len(trees),
            bad[0],
        )
    if not trees:
        raise DataError(
            f"{path} holds no rows" + (f" that fit: {bad[0]}" if bad else "")
        )
    return trees


def _rows(path: Path) -> Iterator[object]:
    if path.suffix == ".jsonl":
        yield from jsonl_rows(path)
    elif path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: no JSON: {error}") from error
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a list of rows")
        yield from rows
    else:
        raise DataError(f"{path}: expected a .jsonl or .json file of traces")


def trace_tree(
    task: Task,
    parts: Sequence[Part],
    dialogue: Dialogue,
    *,
    max_result_tokens: int = MAX_RESULT_TOKENS,
    seed: int = 0,
) -> RolloutTree:
    r"""A dialogue that somebody else wrote, as a tree with one leaf of reward 0.

        [("model", "<search> depth vifel</search>"),
         ("tool", " depth vifel 44"),
         ("model", r"<answer>\boxed{44}</answer>")]

    Args:
        task: its messages are the prompt.
        parts: turns and tool results in order, the first and the last the model's.
        dialogue: makes the tokens.
        max_result_tokens: cap of a tool result, as in the environment.
        seed: recorded in the tree.
    """
    segments = [
        Segment(
            parent=None,
            role="prompt",
            token_ids=dialogue.prompt_ids(task.messages),
            text="\n".join(message.content for message in task.messages),
        )
    ]
    call: ToolCall | None = None
    answer: str | None = None
    for role, text in parts:
        parent = len(segments) - 1
        if role == "model":
            turn = dialogue.parse(text)
            answer = turn.answer
            if turn.tool is not None:
                call = ToolCall(name=turn.tool, arguments=turn.arguments, status="ok")
            segment = Segment(
                parent=parent,
                role=role,
                token_ids=dialogue.model_ids(text),
                finish_reason="stop",
                text=text,
            )
        else:
            result = dialogue.result_ids(text, max_result_tokens)
            segment = Segment(
                parent=parent,
                role=role,
                token_ids=result.ids,
                tool_call=call,
                text=result.text,
            )
        segments.append(segment)
    leaf = Leaf(
        segment=len(segments) - 1,
        reward=0.0,
        reward_parts={},
        origin="initial",
        end="answer",
        answer=answer,
    )
    return RolloutTree(task=task, segments=tuple(segments), leaves=(leaf,), seed=seed)


def _trace(
    row: Row, dialogue: Dialogue, tools: Sequence[str], max_result_tokens: int
) -> RolloutTree:
    messages = chat_messages(row, tools=tools)
    # What came before the last question is part of the prompt.
    asked = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
    written = messages[asked + 1 :]
    if asked < 0:
        raise row.error("", "the prompt must end with a user's message")
    prompt: list[Message] = []
    for message in messages[: asked + 1]:
        if message.role == "tool":
            raise row.error(message.place, "a tool's result before the last question")
        prompt.append(Message(role=message.role, content=message.content))
    for before, message in pairwise([messages[asked], *written]):
        expected = "tool" if before.role == "assistant" else "assistant"
        if message.role != expected:
            raise row.error(
                message.place, f"{message.role!r} where {expected!r} must stand"
            )
    if not written or written[-1].role != "assistant":
        raise row.error("", "the last message must be the assistant's")
    parts: list[Part] = []
    for message in written:
        if message.role == "tool":
            parts.append(("tool", message.content))
            continue
        _check_turn(row, message, dialogue, tools, last=message is written[-1])
        # Generation stops at the closing tag, so what follows is never sampled.
        parts.append(("model", message.content.rstrip()))
    task = Task(
        task_id=f"{row.path.stem}/{row.number}",
        messages=tuple(prompt),
        answers=(dialogue.parse(parts[-1][1]).answer or "",),
        source=row.path.stem,
    )
    return trace_tree(task, parts, dialogue, max_result_tokens=max_result_tokens)


def _check_turn(
    row: Row,
    message: ChatMessage,
    dialogue: Dialogue,
    tools: Sequence[str],
    *,
    last: bool,
) -> None:
    """Refuse a turn that no rollout could contain."""
    text = message.content.rstrip()
    turn = dialogue.parse(text)
    if turn.errors:
        raise row.error(message.place, "; ".join(turn.errors))
    if last and turn.answer is None:
        raise row.error(message.place, "the last turn gives no answer")
    if not last and turn.tool is None:
        names = ", ".join(tools)
        raise row.error(
            message.place, f"calls none of the tools {names}, but a result follows"
        )
    written, ended = dialogue.decode(dialogue.model_ids(text))
    if not written.endswith(dialogue.stop) and not (ended and turn.tool is None):
        raise row.error(message.place, "text follows the closing tag of the turn")
