r"""The model's own chat template, with tool calls in JSON (Qwen, Hermes).

    <think>what to do</think>
    <tool_call>
    {"name": "search", "arguments": {"query": "height of vifel"}}
    </tool_call>

The template tells the model of its tools in the prompt. A turn ends at the first
`</tool_call>`, or with the end-of-text token, and is then the answer: what stands in
the last `\boxed{}`, or in an `<answer>` block, or all of it after the thoughts.

The tokens of a whole conversation are those of the template's own rendering, as long
as the model writes as the template does. Known differences: what the model wrote stays
as it was sampled (no spaces of its JSON are changed, no thoughts of earlier turns taken
out, which some templates do), and so do spaces and line ends around a tool's text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rllib_arpo.envs.chat_template import (
    CALL,
    CALL_END,
    template_pieces,
    template_tools,
)
from rllib_arpo.envs.dialogue import (
    ParsedTurn,
    ResultTokens,
    boxed,
    trajectory_errors,
)
from rllib_arpo.envs.dialogue_tokens import DialogueTokens
from rllib_arpo.envs.json_call import UNREADABLE, read_call
from rllib_arpo.envs.tool_text import ToolText
from rllib_arpo.tools.tool import ToolSpec, only_text_parameter
from rllib_arpo.tree import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TAGS = tuple(
    f"<{slash}{name}>"
    for name in ("think", "tool_call", "tool_response", "answer")
    for slash in ("", "/")
)

_TAG = re.compile(r"<(/?)(think|tool_call|tool_response)>")
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*)</answer>", re.DOTALL)


class ChatTemplateDialogue:
    r"""Tool calls and answers as the model's chat template has them.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a template for tool calls.
        tools: the tools, at least one.
        require_think: a trajectory without a think block is badly formed.
        require_boxed: so is an answer without `\boxed{}`; where there is no
            `<answer>` block either, it is then no answer.
        template_kwargs: variables of the template, as `{"enable_thinking": False}`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        tools: Sequence[ToolSpec],
        *,
        require_think: bool = True,
        require_boxed: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not tools:
            raise ValueError("a chat template with tool calls needs at least one tool")
        self.tokenizer = tokenizer
        self.tools = tuple(tool.name for tool in tools)
        self.require_think = require_think
        self.require_boxed = require_boxed
        self._specs = {tool.name: tool for tool in tools}
        self._template_kwargs = dict(template_kwargs or {})
        self._variables = {**self._template_kwargs, "tools": template_tools(tools)}
        self._tokens = DialogueTokens(tokenizer)
        pieces = template_pieces(self._tokens, tools, template_kwargs or {})
        self._turn_end = pieces.turn_end
        self._tokens.ends.add(self._tokens.special[self._turn_end])
        # What the model goes on from: some templates open the think block for it.
        head = pieces.after_result.rstrip()
        self._opening = "<think>" if head.endswith("<think>") else ""
        if require_think and head.endswith("</think>"):
            raise ValueError(
                "the chat template closes the think block before the model writes: "
                "set `require_think` to False"
            )
        before, after = pieces.before_result, pieces.after_result
        self._tool_text = ToolText(self._tokens, before, after, TAGS)
        self._tool_text_after_end = ToolText(
            self._tokens, before.removeprefix(self._turn_end), after, TAGS
        )

    @property
    def stop(self) -> tuple[str, ...]:
        """The end of a tool call, and the token that ends a turn.

        That token is not the end of text of a base model, so it is named here.
        """
        return (CALL_END, self._turn_end)

    def prompt_ids(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """[T] int32, read-only; the tools stand where the template puts them."""
        return self._tokens.prompt_ids(messages, **self._variables)

    def model_ids(self, text: str) -> NDArray[np.int32]:
        """[T] int32: a whole turn written by somebody else (the cold start).

        A turn without a tool call gets the token that ends it, for the model has to
        learn to write it.
        """
        if not text.endswith((CALL_END, self._turn_end)):
            text += self._turn_end
        return np.array(self._tokens.encode(text), np.int32)

    def decode(self, token_ids: NDArray[np.int32]) -> tuple[str, bool]:
        """Text without the end-of-text token, and whether there was one."""
        return self._tokens.decode_turn(token_ids)

    def parse(self, text: str, *, ended: bool = True) -> ParsedTurn:
        """Thoughts, then a tool call or the answer.

        A turn that neither calls a tool nor `ended` was cut, and gives no answer.
        """
        errors: list[str] = []
        turn, closing, _ = text.partition(CALL_END)
        think, rest, call = _split(self._opening + turn, errors)
        written = turn.removesuffix(call or "")
        errors += [f"the model wrote {s}" for s in self._tokens.special if s in written]
        if closing:
            return self._call(call, think, errors)
        if call is not None:
            errors.append(f"{CALL} is not closed")
            return ParsedTurn(think=think, ended=ended, errors=tuple(errors))
        if not ended:
            return ParsedTurn(think=think, errors=tuple(errors))
        return self._answer(rest, think, errors)

    def format_errors(self, turns: Sequence[ParsedTurn]) -> tuple[str, ...]:
        """Errors of all turns, and what the whole trajectory lacks."""
        return trajectory_errors(turns, require_think=self.require_think)

    def result_ids(
        self, text: str, max_tokens: int, *, turn_ended: bool = False
    ) -> ResultTokens:
        """Encode a tool result as the template does, from the end of the call on.

        Raises:
            ValueError: not even what frames it and the notice of a cut fit.
        """
        tool_text = self._tool_text_after_end if turn_ended else self._tool_text
        return tool_text.encode(text, max_tokens)

    def with_tools(self, tools: Sequence[ToolSpec]) -> "ChatTemplateDialogue":
        """The same dialogue with further tools.

        Raises:
            ValueError: a name is taken, or the template cannot render the tools.
        """
        specs = (*self._specs.values(), *tools)
        if len({spec.name for spec in specs}) < len(specs):
            raise ValueError(f"two tools share a name: {[s.name for s in specs]}")
        return ChatTemplateDialogue(
            self.tokenizer,
            specs,
            require_think=self.require_think,
            require_boxed=self.require_boxed,
            template_kwargs=self._template_kwargs,
        )

    def call_text(self, name: str, arguments: str) -> str:
        """A call as the model writes it, of what `ParsedTurn` holds of it."""
        spec = self._specs.get(name)
        parameter = only_text_parameter(spec.parameters) if spec else None
        if parameter is not None:
            arguments = json.dumps({parameter: arguments}, ensure_ascii=False)
        head = f'{{"name": {json.dumps(name)}, "arguments": {arguments}}}'
        return f"{CALL}\n{head}\n{CALL_END}"

    def _call(
        self, text: str | None, think: str | None, errors: list[str]
    ) -> ParsedTurn:
        if text is None:
            return ParsedTurn(
                think=think,
                tool=UNREADABLE,
                refusal="the tool_call tag was closed but not opened.",
                errors=(*errors, f"{CALL_END} without {CALL}"),
            )
        call = read_call(text, self._specs)
        if call.problem is not None:
            errors.append("the tool call cannot be made")
        return ParsedTurn(
            think=think,
            tool=call.name,
            arguments=call.arguments,
            refusal=call.problem,
            errors=tuple(errors),
        )

    def _answer(self, text: str, think: str | None, errors: list[str]) -> ParsedTurn:
        blocks = _ANSWER.findall(text)
        content = blocks[-1] if blocks else text
        answer = boxed(content)
        if answer is None:
            answer = content.strip() if blocks or not self.require_boxed else ""
            if self.require_boxed:
                errors.append("the answer has no \\boxed{}")
        if not answer and not (self.require_boxed and not blocks):
            errors.append("the answer is empty")
        return ParsedTurn(
            think=think, ended=True, answer=answer or None, errors=tuple(errors)
        )


def _split(text: str, errors: list[str]) -> tuple[str | None, str, str | None]:
    """The last thoughts, the text after them, and what follows an open tool call.

    A call inside an open think block is made, and is an error; a call that a closed
    one speaks of is part of the thoughts. Inside a call every tag is text, as in code.
    """
    think: str | None = None
    think_at: int | None = None
    call_at: int | None = None
    rest_at = 0
    for match in _TAG.finditer(text):
        closing, name = match.groups()
        if name == "tool_response":
            errors.append("the model wrote a result tag")
        elif name == "tool_call":
            call_at = match.end()
            if think_at is None:
                break
        elif not closing:
            if think_at is not None:
                errors.append("<think> inside <think>")
            think_at = match.end()
        elif think_at is None:
            errors.append("</think> without <think>")
        else:
            think = text[think_at : match.start()].strip()
            think_at, call_at, rest_at = None, None, match.end()
    if think_at is not None:
        errors.append(
            "<think> is not closed" if call_at is None else f"{CALL} inside <think>"
        )
        return think, "", text[call_at:] if call_at is not None else None
    if call_at is not None:
        return think, text[rest_at : call_at - len(CALL)], text[call_at:]
    return think, text[rest_at:], None
