r"""The paper's tags, with any tokenizer.

    <think> what to do </think> <search> query </search>
    <result> written by the tool, never by the model </result>
    <think> ... </think> <answer> \boxed{42} </answer>

A turn of the model ends with a closing tag of a tool or of the answer.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rllib_arpo.envs.dialogue import (
    ParsedTurn,
    ResultTokens,
    boxed,
    trajectory_errors,
)
from rllib_arpo.envs.dialogue_tokens import DialogueTokens
from rllib_arpo.envs.tool_text import ToolText
from rllib_arpo.tools.tool import ToolSpec
from rllib_arpo.tree import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RESERVED = ("think", "answer", "result")


class TagDialogue:
    r"""Tool calls and answers between tags.

    A tokenizer with a chat template renders the prompt with it; otherwise the
    prompt is the contents of the messages joined by newlines, after a BOS if the
    tokenizer has one that it adds itself. What stands between a tool's tags is what
    it is given: a text, or a JSON object for a tool with other parameters.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        tools: names of the tools, which are their tags.
        require_think: a trajectory without a think block is badly formed.
        require_boxed: so is an answer without `\boxed{}`.
        result_template: what wraps a tool result, with one `{}`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        tools: Sequence[str] = ("search", "python"),
        *,
        require_think: bool = True,
        require_boxed: bool = True,
        result_template: str = "\n<result>\n{}\n</result>\n",
    ) -> None:
        reserved = set(RESERVED) & set(tools)
        if reserved:
            raise ValueError(f"tools cannot be named {sorted(reserved)}: reserved tags")
        if result_template.count("{}") != 1:
            raise ValueError("`result_template` must hold `{}` once")
        self.tokenizer = tokenizer
        self.tools = tuple(tools)
        self.require_think = require_think
        self.require_boxed = require_boxed
        self._result_template = result_template
        names = (*RESERVED, *self.tools)
        self._tag = re.compile(f"<(/?)({'|'.join(map(re.escape, names))})>")
        self._stop = tuple(f"</{name}>" for name in (*self.tools, "answer"))
        self._tokens = DialogueTokens(tokenizer)
        self._tool_text = ToolText(
            self._tokens,
            *result_template.split("{}"),
            tags=[f"<{slash}{name}>" for name in names for slash in ("", "/")],
        )

    @property
    def stop(self) -> tuple[str, ...]:
        """The closing tags of the tools and of the answer."""
        return self._stop

    def prompt_ids(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """[T] int32, read-only."""
        return self._tokens.prompt_ids(messages)

    def model_ids(self, text: str) -> NDArray[np.int32]:
        """[T] int32: a turn of the model written by somebody else (the cold start).

        Tags and special tokens in `text` become the real tokens.
        """
        return np.array(self._tokens.encode(text), np.int32)

    def decode(self, token_ids: NDArray[np.int32]) -> tuple[str, bool]:
        """Text without the end-of-text token, and whether there was one."""
        return self._tokens.decode_turn(token_ids)

    def parse(self, text: str, *, ended: bool = True) -> ParsedTurn:
        """Walk over the tags up to the first one that ends the turn.

        Inside a tool's block other opening tags are text, as in code. A second
        opener of the same tag starts the block again, and is an error. `ended` says
        nothing here: only a closing tag ends a turn well.
        """
        errors: list[str] = []
        think: str | None = None
        current: str | None = None
        start = 0
        for match in self._tag.finditer(text):
            closing, name = match.groups()
            if name == "result":
                if current not in self.tools:
                    errors.append("the model wrote a result tag")
                continue
            if not closing:
                if current in self.tools and name != current:
                    continue
                if current is not None:
                    errors.append(f"<{name}> inside <{current}>")
                current, start = name, match.end()
                continue
            if current != name:
                if current in self.tools and name == "think":
                    continue
                errors.append(f"</{name}> without <{name}>")
                if name == "think":
                    continue
                return _without_opener(name, think, errors)
            content = text[start : match.start()].strip()
            current = None
            if name == "think":
                think = content
            elif name == "answer":
                return self._answer(content, think, errors)
            else:
                return ParsedTurn(
                    think=think, tool=name, arguments=content, errors=tuple(errors)
                )
        if current is not None:
            errors.append(f"<{current}> is not closed")
        return ParsedTurn(think=think, errors=tuple(errors))

    def format_errors(self, turns: Sequence[ParsedTurn]) -> tuple[str, ...]:
        """Errors of all turns, and what the whole trajectory lacks."""
        return trajectory_errors(turns, require_think=self.require_think)

    def result_ids(
        self, text: str, max_tokens: int, *, turn_ended: bool = False
    ) -> ResultTokens:
        """Encode a tool result with its tags, at most `max_tokens` ids in all.

        Raises:
            ValueError: not even the tags and the notice of a cut fit.
        """
        return self._tool_text.encode(text, max_tokens)

    def with_tools(self, tools: Sequence[ToolSpec]) -> "TagDialogue":
        """The same dialogue with the tags of further tools.

        Raises:
            ValueError: a name is taken.
        """
        names = (*self.tools, *(tool.name for tool in tools))
        if len(set(names)) < len(names):
            raise ValueError(f"two tools share a name: {list(names)}")
        return TagDialogue(
            self.tokenizer,
            names,
            require_think=self.require_think,
            require_boxed=self.require_boxed,
            result_template=self._result_template,
        )

    def call_text(self, name: str, arguments: str) -> str:
        """A call as the model writes it, of what `ParsedTurn` holds of it."""
        return f"<{name}> {arguments} </{name}>"

    def _answer(self, content: str, think: str | None, errors: list[str]) -> ParsedTurn:
        answer = boxed(content)
        if answer is None:
            answer = content
            if self.require_boxed:
                errors.append("the answer has no \\boxed{}")
        if not answer:
            errors.append("the answer is empty")
        return ParsedTurn(
            think=think, ended=True, answer=answer or None, errors=tuple(errors)
        )


def _without_opener(name: str, think: str | None, errors: list[str]) -> ParsedTurn:
    """A turn that ends with the closing tag of a block that was never opened."""
    if name == "answer":
        return ParsedTurn(think=think, ended=True, errors=tuple(errors))
    return ParsedTurn(
        think=think,
        tool=name,
        refusal=f"the {name} tag was closed but not opened.",
        errors=tuple(errors),
    )
