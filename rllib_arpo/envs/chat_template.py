"""What a chat template writes between the model's turns, found by rendering it.

A conversation with known texts is rendered, and what stands around them is taken. So
every template that writes tool calls as Hermes and Qwen do is served, whatever tokens
it marks turns with:

    <tool_call>
    {"name": "search", "arguments": {"query": "..."}}
    </tool_call><|im_end|>            from here on, the environment writes
    <|im_start|>user
    <tool_response>
    ...
    </tool_response><|im_end|>
    <|im_start|>assistant             here the model goes on
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rllib_arpo.envs.dialogue_tokens import DialogueTokens
from rllib_arpo.tools.tool import ToolSpec

CALL, CALL_END = "<tool_call>", "</tool_call>"
USE_TAGS = "use dialogue='tags' with this tokenizer"

_QUESTION = "What is it?"
# Quotes and a line end: a template that escapes results does not show them as they are.
_TEXT = 'sentinel "one"\nand two'


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplatePieces:
    """What stands around the texts of a conversation.

    Attributes:
        turn_end: special token that ends a turn of the model.
        before_result: from the end of a call up to the tool's text; begins with
            `turn_end`.
        after_result: from the tool's text up to where the model goes on.
    """

    turn_end: str
    before_result: str
    after_result: str


def template_tools(tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
    """Tools as chat templates read them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": dict(tool.parameters),
            },
        }
        for tool in tools
    ]


def template_pieces(
    tokens: DialogueTokens, tools: Sequence[ToolSpec], variables: Mapping[str, Any]
) -> TemplatePieces:
    """Render a conversation and take it apart.

    Args:
        tokens: the tokenizer, with a chat template.
        tools: the tools, at least one.
        variables: further variables of the template.

    Raises:
        ValueError: the template cannot render a tool call, or not as expected.
    """
    # With transformers, which is at work here already.
    from jinja2 import TemplateError

    if tokens.tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer has no chat template; {USE_TAGS}")
    options = {**variables, "tools": template_tools(tools)}
    user = {"role": "user", "content": _QUESTION}
    try:
        answered = tokens.render(
            [user, {"role": "assistant", "content": _TEXT}], to_model=False, **options
        )
        called = tokens.render(
            [user, *_call_and_result(tools[0].name)], to_model=True, **options
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"the chat template cannot render a tool call ({error}); {USE_TAGS}"
        ) from error
    _check_tools(called, tools)
    turn_end = _first_special(tokens, _around(answered, _TEXT)[1])
    before, after = _around(called, _TEXT)
    call, closing, before = before.rpartition(CALL_END)
    _check_call(call, closing, tools[0].name)
    if not before.startswith(turn_end):
        raise ValueError(
            f"the chat template ends a tool call with {before[:20]!r} and not with "
            f"{turn_end!r}; {USE_TAGS}"
        )
    return TemplatePieces(turn_end=turn_end, before_result=before, after_result=after)


def _call_and_result(name: str) -> list[dict[str, Any]]:
    function = {"name": name, "arguments": {"a": 1}}
    call = {"id": "call00001", "type": "function", "function": function}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": name, "tool_call_id": "call00001", "content": _TEXT},
    ]


def _around(rendered: str, text: str) -> tuple[str, str]:
    if rendered.count(text) != 1:
        raise ValueError(
            f"the chat template does not show a message as it is; {USE_TAGS}"
        )
    before, _, after = rendered.partition(text)
    return before, after


def _first_special(tokens: DialogueTokens, text: str) -> str:
    """The special token that `text` begins with."""
    for special in sorted(tokens.special, key=len, reverse=True):
        if text.startswith(special):
            return special
    raise ValueError(
        f"the chat template ends a turn with {text[:20]!r} and no special token; "
        f"{USE_TAGS}"
    )


def _check_tools(rendered: str, tools: Sequence[ToolSpec]) -> None:
    prompt = rendered.partition(_QUESTION)[0]
    missing = [tool.name for tool in tools if tool.name not in prompt]
    if missing:
        raise ValueError(
            f"the chat template does not tell the model of the tools {missing}; "
            f"{USE_TAGS}"
        )


def _check_call(before: str, closing: str, name: str) -> None:
    """Refuse templates that write calls in another way than they will be read."""
    _, opening, written = before.rpartition(CALL)
    try:
        call = json.loads(written)
    except ValueError:
        call = None
    if not (opening and closing and call == {"name": name, "arguments": {"a": 1}}):
        raise ValueError(
            "the chat template does not write a tool call as JSON with name and "
            f"arguments between {CALL} and {CALL_END}; {USE_TAGS}"
        )
