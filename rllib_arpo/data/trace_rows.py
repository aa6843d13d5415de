r"""Rows of traces to chats: the layouts that files of dialogues come in.

    messages        [{"role": "user", "content": ...}, ...], OpenAI's; `tool_calls` of
                    an assistant are written out as the chat templates do
    conversations   [{"from": "human", "value": ...}, ...], ShareGPT's, maybe `system`
    instruction     with `output`, maybe `input`, `system` and `history`, Alpaca's

The paper's cold start (Tool-Star) has whole dialogues in one `output`, tool results
between `<result>` tags: these are taken apart, for the model must not learn to write
results.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rllib_arpo.data.rows import Row

ChatRole = Literal["system", "user", "assistant", "tool"]

ROLES: dict[str, ChatRole] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class ChatMessage(NamedTuple):
    """One message and its place in the row, for errors."""

    role: ChatRole
    content: str
    place: str


def chat_messages(row: Row, *, tools: Sequence[str]) -> list[ChatMessage]:
    """The chat of a row, tool results as messages of their own.

    Args:
        row: in one of the layouts above.
        tools: tags after whose end a `<result>` block is a tool's.

    Raises:
        DataError: the row has none of the layouts, or a message is wrong.
    """
    if "messages" in row.fields or not {"conversations", "instruction"} & set(
        row.fields
    ):
        messages = _listed(row, "messages", "role", "content")
    elif "conversations" in row.fields:
        messages = [*_system(row), *_listed(row, "conversations", "from", "value")]
    else:
        messages = list(_alpaca(row))
    results = re.compile(
        rf"(</(?:{'|'.join(map(re.escape, tools))})>)\s*<result>(.*?)</result>",
        re.DOTALL,
    )
    return [part for message in messages for part in _without_results(message, results)]


def _listed(row: Row, field: str, role_key: str, text_key: str) -> list[ChatMessage]:
    given = row.fields.get(field)
    if not isinstance(given, list) or not given:
        raise row.error(field, f"expected a list of messages, got {given!r}")
    messages: list[ChatMessage] = []
    for number, message in enumerate(given):
        place = f"{field}[{number}]"
        if not isinstance(message, Mapping):
            raise row.error(
                place, f"expected {role_key} and {text_key}, got {message!r}"
            )
        role = message.get(role_key)
        if role not in ROLES:
            raise row.error(f"{place}.{role_key}", f"{role!r} is none of {list(ROLES)}")
        content = message.get(text_key)
        if message.get("tool_calls"):
            content = _with_calls(row, place, content, message["tool_calls"])
        messages.append(_message(row, ROLES[role], content, f"{place}.{text_key}"))
    return messages


def _message(row: Row, role: ChatRole, content: Any, place: str) -> ChatMessage:
    # A tool may have nothing to say; a turn or a prompt may not.
    if not isinstance(content, str) or not (content.strip() or role == "tool"):
        raise row.error(place, f"expected text, got {content!r}")
    return ChatMessage(role, content, place)


def _system(row: Row) -> Iterator[ChatMessage]:
    if row.fields.get("system"):
        yield _message(row, "system", row.fields["system"], "system")


def _alpaca(row: Row) -> Iterator[ChatMessage]:
    yield from _system(row)
    for number, pair in enumerate(row.fields.get("history") or ()):
        place = f"history[{number}]"
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise row.error(place, f"expected a question and its answer, got {pair!r}")
        yield _message(row, "user", pair[0], place)
        yield _message(row, "assistant", pair[1], place)
    question = row.fields["instruction"]
    if isinstance(question, str) and row.fields.get("input"):
        question = f"{question}\n{row.fields['input']}"
    yield _message(row, "user", question, "instruction")
    yield _message(row, "assistant", row.fields.get("output"), "output")


def _with_calls(row: Row, place: str, content: Any, calls: Iterable[Any]) -> str:
    """OpenAI's `tool_calls` as Hermes' JSON in tags, behind the text."""
    parts = [content] if isinstance(content, str) and content else []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise row.error(f"{place}.tool_calls", f"expected a function, got {call!r}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise row.error(
                    f"{place}.tool_calls", f"arguments are no JSON: {error}"
                ) from error
        text = json.dumps(
            {"name": function["name"], "arguments": arguments}, ensure_ascii=False
        )
        parts.append(f"<tool_call>\n{text}\n</tool_call>")
    return "\n".join(parts)


def _without_results(
    message: ChatMessage, results: re.Pattern[str]
) -> Iterator[ChatMessage]:
    """A message of the assistant, cut where tool results stand in it."""
    start = 0
    if message.role == "assistant":
        for match in results.finditer(message.content):
            turn = message.content[start : match.end(1)]
            yield ChatMessage("assistant", turn.strip(), message.place)
            yield ChatMessage("tool", match.group(2).strip(), message.place)
            start = match.end()
    rest = message.content[start:]
    yield (
        message if start == 0 else ChatMessage("assistant", rest.strip(), message.place)
    )
