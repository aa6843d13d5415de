"""A tokenizer as a dialogue uses it: it adds nothing by itself and hides nothing.

Encoding adds no BOS (the chat template writes one where the model wants it), decoding
keeps special tokens, and what looks like a special token in a text that somebody else
wrote can be broken up, so that it stays text.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rllib_arpo.tree import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of all cached prompts together, and of one: others are encoded whenever they come.
MAX_CACHED_TOKENS = 2**20
MAX_CACHED_PROMPT = 2**14
SPECIAL_ENDS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
)


class DialogueTokens:
    """Text to tokens and back.

    Args:
        tokenizer: a fast Hugging Face tokenizer.

    Attributes:
        special: special tokens, text to id.
        controls: those, and other added tokens that look like a tag, as Qwen's
            `<tool_call>`, which is not called special.
        ends: ids that end a turn of the model. A chat template may have one more.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special = {t.content: i for i, t in added.items() if t.special}
        self.controls = self.special | {
            token.content: number
            for number, token in added.items()
            if re.fullmatch(r"<.+>", token.content)
        }
        self.ends = {
            self.special[text] for text in SPECIAL_ENDS if text in self.special
        }
        if isinstance(tokenizer.eos_token_id, int):
            self.ends.add(tokenizer.eos_token_id)
        self._special = any_of(self.special)
        self._prompts: dict[tuple[Message, ...], NDArray[np.int32]] = {}
        self._num_cached = 0

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; tags and special tokens in it become the real ones."""
        return self.tokenizer.backend_tokenizer.encode(
            text, add_special_tokens=False
        ).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included."""
        return self.tokenizer.backend_tokenizer.decode(
            list(ids), skip_special_tokens=False
        )

    def decode_turn(self, token_ids: NDArray[np.int32]) -> tuple[str, bool]:
        """Text without the end-of-text token, and whether there was one."""
        ids = token_ids.tolist()
        ended = bool(ids) and ids[-1] in self.ends
        return self.decode(ids[:-1] if ended else ids), ended

    def prompt_ids(
        self, messages: Sequence[Message], **template: Any
    ) -> NDArray[np.int32]:
        """[T] int32, read-only and cached, for the prompt is encoded per path.

        A special token in a user's message is broken up: it comes from the data and
        means nothing there. A system message is the operator's and stays as it is.

        Args:
            messages: the task's.
            template: variables of the chat template, the same in every call.
        """
        key = tuple(messages)
        ids = self._prompts.get(key)
        if ids is not None:
            return ids
        ids = np.array(self._encode_prompt(key, template), np.int32)
        ids.setflags(write=False)
        if len(ids) <= MAX_CACHED_PROMPT:
            if self._num_cached + len(ids) > MAX_CACHED_TOKENS:
                self._prompts.clear()
                self._num_cached = 0
            self._prompts[key] = ids
            self._num_cached += len(ids)
        return ids

    def render(
        self, messages: Sequence[dict[str, Any]], *, to_model: bool, **template: Any
    ) -> str:
        """Text of a chat; `to_model` ends it where the model starts to write."""
        rendered = self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=to_model,
            **template,
        )
        return str(rendered)

    def _encode_prompt(
        self, messages: Sequence[Message], template: dict[str, Any]
    ) -> list[int]:
        chat = [
            {
                "role": message.role,
                "content": break_up(self._special, message.content)
                if message.role == "user"
                else message.content,
            }
            for message in messages
        ]
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer.encode("\n".join(m["content"] for m in chat)))
        # The template writes BOS itself where the model wants one.
        return self.encode(self.render(chat, to_model=True, **template))


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds each of `texts`, the longest first."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def break_up(found: re.Pattern[str], text: str) -> str:
    """Take the meaning of what the pattern finds, and leave it readable.

    A space behind its first character does that: `<|im_end|>` becomes `< |im_end|>`.
    The space cannot form another tag, for tags hold none.
    """
    return found.sub(lambda match: f"{match[0][:1]} {match[0][1:]}", text)
