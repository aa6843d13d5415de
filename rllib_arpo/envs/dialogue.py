r"""The dialogue: the paper's tags and chat templates, to and from tokens.

    <think> what to do </think> <search> query </search>
    <result> written by the tool, never by the model </result>
    <think> ... </think> <answer> \boxed{42} </answer>

A turn of the model ends with a closing tag of a tool or of the answer. Only the
model's own text is ever parsed. Differences from the released code of ARPO:

1. A closing tag without its opener is an error of that turn; it never reaches back
   to an earlier call or to the example in the system prompt.
2. Tool text cannot become a special token or a tag, gets no BOS, and is cut to a
   number of tokens, which it then says.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rllib_arpo.tree import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CUT_NOTICE = " ... [cut]"
MAX_CACHED_PROMPTS = 1024
# Text beyond this is dropped before it is encoded: encoding a flood takes seconds.
MAX_CHARS_PER_TOKEN = 16
SPECIAL_ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedTurn:
    """What one turn of the model says.

    Attributes:
        think: text of the last closed think block, None without one.
        tool: name of the called tool, None when the turn calls none.
        arguments: text between the tool's tags, stripped.
        malformed_call: whether the tool's tag was closed but not opened.
        ended: whether the turn ends the dialogue with `</answer>`.
        answer: the final answer, None when the turn gives none.
        errors: what breaks the format in this turn.
    """

    think: str | None = None
    tool: str | None = None
    arguments: str = ""
    malformed_call: bool = False
    ended: bool = False
    answer: str | None = None
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultTokens:
    """A tool result as the model reads it.

    Attributes:
        ids: [T] int32, tags included.
        text: what stands between the result tags.
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

    def decode(self, token_ids: NDArray[np.int32]) -> tuple[str, bool]:
        """Text of a turn, and whether it ended with an end-of-text token."""
        ...

    def parse(self, text: str) -> ParsedTurn:
        """Read one turn of the model; `text` must hold nothing else."""
        ...

    def format_errors(self, turns: Sequence[ParsedTurn]) -> tuple[str, ...]:
        """What breaks the format of a finished trajectory; empty when well formed."""
        ...

    def result_ids(self, text: str, max_tokens: int) -> ResultTokens:
        """Encode a tool result, at most `max_tokens` ids in all."""
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


class TagDialogue:
    r"""The paper's tags, with any tokenizer.

    A tokenizer with a chat template renders the prompt with it; otherwise the
    prompt is the contents of the messages joined by newlines, after a BOS if the
    tokenizer has one that it adds itself.

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
        reserved = {"think", "answer", "result"} & set(tools)
        if reserved:
            raise ValueError(f"tools cannot be named {sorted(reserved)}: reserved tags")
        if result_template.count("{}") != 1:
            raise ValueError("`result_template` must hold `{}` once")
        self.tokenizer = tokenizer
        self.tools = tuple(tools)
        self.require_think = require_think
        self.require_boxed = require_boxed
        names = ("think", "answer", "result", *self.tools)
        self._tag = re.compile(f"<(/?)({'|'.join(map(re.escape, names))})>")
        self._stop = tuple(f"</{name}>" for name in (*self.tools, "answer"))
        self._prompts: dict[tuple[Message, ...], NDArray[np.int32]] = {}
        specials = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        tags = [f"<{slash}{name}>" for name in names for slash in ("", "/")]
        self._forbidden = _forbidden_ids(tokenizer, specials, tags)
        self._unsafe = re.compile("|".join(map(re.escape, (*tags, *specials))))
        self._ends = {specials[text] for text in SPECIAL_ENDS if text in specials}
        if isinstance(tokenizer.eos_token_id, int):
            self._ends.add(tokenizer.eos_token_id)
        before, after = result_template.split("{}")
        self._before = self._encode(before)
        self._after = self._encode(after)
        self._notice = self._encode(CUT_NOTICE)

    @property
    def stop(self) -> tuple[str, ...]:
        """The closing tags of the tools and of the answer."""
        return self._stop

    def prompt_ids(self, messages: Sequence[Message]) -> NDArray[np.int32]:
        """[T] int32, read-only and cached, for the prompt is encoded per path."""
        key = tuple(messages)
        if key not in self._prompts:
            if len(self._prompts) >= MAX_CACHED_PROMPTS:
                self._prompts.clear()
            ids = np.array(self._render(key), np.int32)
            ids.setflags(write=False)
            self._prompts[key] = ids
        return self._prompts[key]

    def model_ids(self, text: str) -> NDArray[np.int32]:
        """[T] int32: a turn of the model written by somebody else (the cold start).

        Tags and special tokens in `text` become the real tokens.
        """
        return np.array(self._encode(text), np.int32)

    def decode(self, token_ids: NDArray[np.int32]) -> tuple[str, bool]:
        """Text without the end-of-text token, and whether there was one."""
        ids = token_ids.tolist()
        ended = bool(ids) and ids[-1] in self._ends
        return self._decode(ids[:-1] if ended else ids), ended

    def parse(self, text: str) -> ParsedTurn:
        """Walk over the tags up to the first one that ends the turn.

        Inside a tool's block other opening tags are text, as in code. A second
        opener of the same tag starts the block again, and is an error.
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
                if name == "answer":
                    return ParsedTurn(think=think, ended=True, errors=tuple(errors))
                return ParsedTurn(
                    think=think,
                    tool=name,
                    malformed_call=True,
                    errors=tuple(errors),
                )
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
        errors = [error for turn in turns for error in turn.errors]
        if self.require_think and not any(turn.think is not None for turn in turns):
            errors.append("no <think> block")
        if not turns or turns[-1].answer is None:
            errors.append("no answer")
        return tuple(errors)

    def result_ids(self, text: str, max_tokens: int) -> ResultTokens:
        """Encode a tool result with its tags, at most `max_tokens` ids in all.

        Raises:
            ValueError: not even the tags and the notice of a cut fit.
        """
        room = max_tokens - len(self._before) - len(self._after)
        if room < len(self._notice):
            needed = max_tokens - room + len(self._notice)
            raise ValueError(
                f"a tool result of {max_tokens} tokens cannot hold its tags and the "
                f"notice that it was cut: allow at least {needed}"
            )
        max_chars = room * MAX_CHARS_PER_TOKEN
        truncated = len(text) > max_chars
        # A space behind the first character takes a tag's meaning and leaves it
        # readable; it cannot form another tag, for tags hold no space.
        text = self._unsafe.sub(lambda m: _break(m.group()), text[:max_chars])
        ids = [i for i in self._encode(text) if i not in self._forbidden]
        if truncated or len(ids) > room:
            truncated = True
            ids = ids[: room - len(self._notice)]
            text = self._decode(ids)
            while ids and text.endswith("\ufffd"):  # cut within a character
                ids.pop()
                text = self._decode(ids)
            text += CUT_NOTICE
            ids += self._notice
        ids = [*self._before, *ids, *self._after]
        return ResultTokens(ids=np.array(ids, np.int32), text=text, truncated=truncated)

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

    def _render(self, messages: tuple[Message, ...]) -> list[int]:
        if self.tokenizer.chat_template is None:
            text = "\n".join(message.content for message in messages)
            return list(self.tokenizer.encode(text))
        rendered = self.tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            tokenize=False,
            add_generation_prompt=True,
        )
        # The template writes BOS itself where the model wants one.
        return self._encode(str(rendered))

    def _encode(self, text: str) -> list[int]:
        encoding = self.tokenizer.backend_tokenizer.encode(
            text, add_special_tokens=False
        )
        return list(encoding.ids)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def _forbidden_ids(
    tokenizer: "PreTrainedTokenizerFast", specials: dict[str, int], tags: Sequence[str]
) -> frozenset[int]:
    """Special tokens, and tags that are one token: never part of a tool result."""
    ids = set(specials.values())
    for tag in tags:
        encoded = tokenizer.backend_tokenizer.encode(tag, add_special_tokens=False).ids
        if len(encoded) == 1:
            ids.add(encoded[0])
    return frozenset(ids)


def _break(tag: str) -> str:
    return f"{tag[:1]} {tag[1:]}"
