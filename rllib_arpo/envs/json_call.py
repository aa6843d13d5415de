"""Tool calls in JSON, `{"name": ..., "arguments": {...}}`, as models write them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rllib_arpo.tools.tool import ToolSpec, only_text_parameter

UNREADABLE = "tool_call"


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonCall:
    """One call as it was read.

    Attributes:
        name: the tool's, `UNREADABLE` when the call names none.
        arguments: the one text of a tool with a single text parameter, else a JSON
            object; empty when they cannot be read.
        problem: why the call cannot be made, for the model to read.
    """

    name: str = UNREADABLE
    arguments: str = ""
    problem: str | None = None


def read_call(text: str, tools: Mapping[str, ToolSpec]) -> JsonCall:
    """Read what stands between the tags of a call.

    Args:
        text: written by a model, so it may be anything.
        tools: those that may be called, by name.
    """
    try:
        call = json.loads(text)
    except json.JSONDecodeError as error:
        return JsonCall(problem=f"the tool call is not JSON: {error}.")
    except (ValueError, RecursionError):  # a number or a nest too large to read
        return JsonCall(problem="the tool call cannot be read.")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return JsonCall(
            problem='a tool call is {"name": <text>, "arguments": {...}}, this is not.'
        )
    name = call["name"]
    if name not in tools:
        known = ", ".join(tools)
        return JsonCall(
            name=name, problem=f"there is no tool named {name}; there is {known}."
        )
    arguments = _as_object(call.get("arguments", {}))
    if arguments is None:
        return JsonCall(
            name=name, problem=f"the arguments of {name} must be a JSON object."
        )
    parameter = only_text_parameter(tools[name].parameters)
    if parameter is None:
        return JsonCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))
    value = arguments.get(parameter)
    if arguments.keys() != {parameter} or not isinstance(value, str):
        return JsonCall(
            name=name,
            problem=f'the arguments of {name} must be {{"{parameter}": <text>}}.',
        )
    return JsonCall(name=name, arguments=value.strip())


def _as_object(arguments: Any) -> dict[str, Any] | None:
    """Arguments as an object; some models write it as a string, once more encoded."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return arguments if isinstance(arguments, dict) else None
