r"""What a dialogue is: how messages, turns and tool results become tokens and back.

There are two: the paper's tags (`tag_dialogue.py`) and the model's own chat template
with tool calls in JSON (`chat_dialogue.py`). Both keep these rules, which the released
code of ARPO breaks:

1. Token in, token out: what the model sampled is never encoded again.
2. Only the model's own text is parsed; a tag in a tool result is text, and a closing
   tag without its opener never reaches back to an earlier call or to the prompt.
3. Tool text cannot become a control token or a tag, gets no BOS, and is cut to a
   number of tokens, which it then says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rllib_arpo.tree import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTurn:
    """What one turn of the model says.

    Attributes:
        think: text of the last closed think block, None without one.
        tool: name of the called tool, None when the turn calls none.
        arguments: what the tool is given, stripped.
        refusal: why the call cannot be made, for the model to read; None for a call
            that can.
        ended: whether the turn ends the dialogue.
        answer: the final answer, None when the turn gives none.
        errors: what breaks the format in this turn.
    """

    think: str | None = None
    tool: str | None = None
    arguments: str = ""
    refusal: str | None = None
    ended: bool = False
    answer: str | None = None
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultTokens:
    """A tool result as the model reads it.

    Attributes:
        ids: [T] int32, what frames the text included.
        text: the tool's text alone, as the model reads it.
        truncated: whether it was cut to the token cap.
    """

    ids: NDArray[np.int32]
    text: str
    truncated: bool


@runtime_checkable
class Dialogue(Protocol):
    """How messages, turns and tool results become tokens and back."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a turn of the model."""
        ...

    def prompt_ids(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """[T] int32: the prompt up to where the model starts to write."""
        ...

    def model_ids(self, text: str) -> NDArray[np.int32]:
        """[T] int32: a whole turn written by somebody else (the cold start).

        Tags and special tokens in `text` become the real tokens.
        """
        ...

    def decode(self, token_ids: NDArray[np.int32]) -> tuple[str, bool]:
        """Text of a turn, and whether it ended with an end-of-text token."""
        ...

    def parse(self, text: str, *, ended: bool = True) -> ParsedTurn:
        """Read one turn of the model; `text` must hold nothing else.

        Args:
            text: as `decode` gives it.
            ended: whether an end-of-text token closed the turn. Without one, a turn
                that calls no tool was cut, and in a chat template is no answer.
        """
        ...

    def format_errors(self, turns: Sequence[ParsedTurn]) -> tuple[str, ...]:
        """What breaks the format of a finished trajectory; empty when well formed."""
        ...

    def result_ids(
        self, text: str, max_tokens: int, *, turn_ended: bool = False
    ) -> ResultTokens:
        """Encode a tool result, at most `max_tokens` ids in all.

        Args:
            text: what the tool returned.
            max_tokens: cap, what frames the text included.
            turn_ended: whether the model's turn holds its end-of-text token already.

        Raises:
            ValueError: not even the frame and the notice of a cut fit.
        """
        ...


def boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` with balanced braces, None without one."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for position in range(start + len("\\boxed"), len(text)):
            if text[position] == "{":
                depth += 1
            elif text[position] == "}":
                depth -= 1
                if depth == 0:
                    return text[start + len("\\boxed{") : position].strip()
        start = text.rfind("\\boxed{", 0, start)
    return None


def trajectory_errors(
    turns: Sequence[ParsedTurn], *, require_think: bool
) -> tuple[str, ...]:
    """Errors of all turns, and what the whole trajectory lacks."""
    errors = [error for turn in turns for error in turn.errors]
    if require_think and not any(turn.think is not None for turn in turns):
        errors.append("no <think> block")
    if not turns or turns[-1].answer is None:
        errors.append("no answer")
    return tuple(errors)
