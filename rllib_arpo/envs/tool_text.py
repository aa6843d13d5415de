"""Tool text on its way to the model: made harmless, framed, and cut to its room.

The text and its frame are encoded together, so the tokens are those that the model's
own template gives. A text that is too long ends at a sentence or line if one ends in
the last quarter of its room, and says that it was cut.
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from rllib_arpo.envs.dialogue import ResultTokens
from rllib_arpo.envs.dialogue_tokens import DialogueTokens, any_of, break_up

if TYPE_CHECKING:
    from tokenizers import Encoding

CUT_NOTICE = " ... [cut]"
# Text beyond this is dropped before it is encoded: encoding a flood takes seconds.
MAX_CHARS_PER_TOKEN = 16
# A cut goes back at most this share of the text to the end of a sentence.
SENTENCE_SHARE = 0.25

# The three characters are the full stop, ! and ? of Chinese.
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|[\u3002\uff01\uff1f]|(?=\n)")


class ToolText:
    """Encodes tool text between two fixed pieces.

    Args:
        tokens: the tokenizer.
        before: what stands before the text.
        after: what stands behind it.
        tags: texts that tool text must not hold, besides the control tokens.
    """

    def __init__(
        self, tokens: DialogueTokens, before: str, after: str, tags: Iterable[str]
    ) -> None:
        self._backend = tokens.tokenizer.backend_tokenizer
        self._before = before
        self._after = after
        unsafe = {*tags, *tokens.controls}
        self._unsafe = any_of(unsafe)
        single = [ids for text in unsafe if len(ids := tokens.encode(text)) == 1]
        self._forbidden = {*tokens.controls.values(), *(ids[0] for ids in single)}
        self._least = len(self._framed(CUT_NOTICE))

    def encode(self, text: str, max_tokens: int) -> ResultTokens:
        """Encode `text` in its frame, at most `max_tokens` ids in all.

        Raises:
            ValueError: not even the frame and the notice of a cut fit.
        """
        if max_tokens < self._least:
            raise ValueError(
                f"a tool result of {max_tokens} tokens cannot hold what frames it and "
                f"the notice that it was cut: allow at least {self._least}"
            )
        max_chars = max_tokens * MAX_CHARS_PER_TOKEN
        flooded = len(text) > max_chars
        text, encoding = self._harmless(text[:max_chars])
        starts = [start for start, _ in encoding.offsets]
        if not flooded and len(starts) <= max_tokens:
            ids = self._framed(text)
            if len(ids) <= max_tokens:
                return _result(ids, text, truncated=False)
        # The frame and the notice are `least` tokens together; one or two more where
        # they meet the text.
        keep = max_tokens - self._least
        while True:
            end = starts[keep] if keep < len(starts) else len(text)
            shown = _whole_sentences(text, end) + CUT_NOTICE
            ids = self._framed(shown)
            if len(ids) <= max_tokens:
                return _result(ids, shown, truncated=True)
            keep -= 1

    def _harmless(self, text: str) -> "tuple[str, Encoding]":
        """`text` without a forbidden tag or token, and its encoding.

        Breaking them up by their spelling is enough unless the tokenizer normalises
        what it reads, so its own verdict counts: what still becomes a control token
        is taken out.
        """
        while True:
            text = break_up(self._unsafe, text)
            encoding = self._backend.encode(text, add_special_tokens=False)
            spans = [
                span
                for number, span in zip(encoding.ids, encoding.offsets, strict=True)
                if number in self._forbidden
            ]
            if not spans:
                return text, encoding
            for start, end in reversed(spans):
                text = text[:start] + text[end:]

    def _framed(self, text: str) -> list[int]:
        whole = self._before + text + self._after
        return self._backend.encode(whole, add_special_tokens=False).ids


def _result(ids: list[int], text: str, *, truncated: bool) -> ResultTokens:
    return ResultTokens(ids=np.array(ids, np.int32), text=text, truncated=truncated)


def _whole_sentences(text: str, end: int) -> str:
    """`text[:end]`, or less: up to where a sentence or line ends not far before."""
    least = int(end * (1 - SENTENCE_SHARE))
    ends = [match.end() for match in _SENTENCE_END.finditer(text, least, end + 1)]
    whole = max((place for place in ends if place <= end), default=end)
    return text[:whole].rstrip()
