"""Traces for the cold start: dialogues written by an expert, as trees of one leaf.

A jsonl row holds the chat, `{"messages": [{"role": ..., "content": ...}, ...]}`:

    system, user    the prompt, rendered by the chat template
    assistant       one turn of the model, up to the closing tag of its tool or answer
    tool            what that tool answered, without the result tags

Assistant turns alone carry loss. A tool result is encoded as the environment does
it, so the model is taught on the very tokens that it will meet in a rollout.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from rllib_arpo.data.datasets import Row, jsonl_rows
from rllib_arpo.envs.dialogue import TagDialogue
from rllib_arpo.envs.env_config import DEFAULTS, load_tokenizer
from rllib_arpo.errors import DataError
from rllib_arpo.tree import Leaf, Message, RolloutTree, Segment, Task, ToolCall

Part = tuple[Literal["model", "tool"], str]

PROMPT_ROLES = ("system", "user")
ROLES = (*PROMPT_ROLES, "assistant", "tool")
MAX_RESULT_TOKENS: int = DEFAULTS["max_result_tokens"]


def load_traces(
    file: str | Path, model: str, tool_names: Sequence[str]
) -> list[RolloutTree]:
    """Read traces from a .jsonl file.

    Args:
        file: one chat per line.
        model: folder or hub name of the tokenizer that encodes them.
        tool_names: tags of the tools that the traces call.

    Raises:
        DataError: the file is missing, empty or of another kind, or a row is wrong;
            names file, row (from 0) and field.
        ConfigError: `model` holds no fast tokenizer.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{path} is no file")
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: expected a .jsonl file of traces")
    dialogue = TagDialogue(load_tokenizer(model), tool_names)
    trees = [
        _trace(Row(path, number, fields), dialogue)
        for number, fields in enumerate(jsonl_rows(path))
    ]
    if not trees:
        raise DataError(f"{path} holds no rows")
    return trees


def trace_tree(
    task: Task,
    parts: Sequence[Part],
    dialogue: TagDialogue,
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


def _trace(row: Row, dialogue: TagDialogue) -> RolloutTree:
    messages = list(_messages(row))
    num_prompt = next(
        (i for i, (role, _) in enumerate(messages) if role not in PROMPT_ROLES),
        len(messages),
    )
    if num_prompt == 0 or messages[num_prompt - 1][0] != "user":
        raise row.error("messages", "the prompt must end with a user's message")
    prompt: list[Message] = []
    parts: list[Part] = []
    for role, content in messages[:num_prompt]:
        assert role == "system" or role == "user"
        prompt.append(Message(role=role, content=content))
    for number, (role, content) in enumerate(messages[num_prompt:], num_prompt):
        last = number == len(messages) - 1
        parts.append(_part(row, f"messages[{number}]", role, content, parts))
        if role == "assistant":
            _check_turn(row, f"messages[{number}].content", content, dialogue, last)
    if not parts or parts[-1][0] != "model":
        raise row.error("messages", "the last message must be the assistant's")
    answer = dialogue.parse(parts[-1][1]).answer
    task = Task(
        task_id=f"{row.path.stem}/{row.number}",
        messages=tuple(prompt),
        answers=(answer or "",),
        source=row.path.stem,
    )
    return trace_tree(task, parts, dialogue)


def _messages(row: Row) -> Iterator[tuple[str, str]]:
    """Role and content of every message."""
    messages = row.fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise row.error("messages", f"expected a list of messages, got {messages!r}")
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise row.error(place, f"expected role and content, got {message!r}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise row.error(f"{place}.role", f"{role!r} is none of {list(ROLES)}")
        # A tool may have nothing to say; a turn or a prompt may not.
        if not isinstance(content, str) or not (content.strip() or role == "tool"):
            raise row.error(f"{place}.content", f"expected text, got {content!r}")
        yield role, content


def _part(
    row: Row, place: str, role: str, content: str, before: Sequence[Part]
) -> Part:
    """The part of a message, if its role may follow the parts before it."""
    expected = "tool" if before and before[-1][0] == "model" else "assistant"
    if role != expected:
        raise row.error(f"{place}.role", f"{role!r} where {expected!r} must stand")
    if role == "tool":
        return ("tool", content)
    # Generation stops at the closing tag, so what follows is never sampled.
    return ("model", content.rstrip())


def _check_turn(
    row: Row, place: str, content: str, dialogue: TagDialogue, last: bool
) -> None:
    """Refuse a turn that no rollout could contain."""
    turn = dialogue.parse(content)
    if turn.errors:
        raise row.error(place, "; ".join(turn.errors))
    if last and not turn.ended:
        raise row.error(place, "the last turn holds no <answer> ... </answer>")
    if not last and turn.tool is None:
        names = ", ".join(dialogue.tools)
        raise row.error(place, f"calls none of the tools {names}, but a result follows")
    if not content.rstrip().endswith(dialogue.stop):
        raise row.error(place, "text follows the closing tag that ends the turn")
