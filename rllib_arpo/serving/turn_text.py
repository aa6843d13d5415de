"""The text of a turn while it is sampled: only what cannot change any more is shown.

Three things hold text back: a character whose bytes are not all there, a tag that may
be about to end the turn or a thought, and the beginning of a stop text of the client.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rllib_arpo.envs.dialogue import Dialogue

THINK, THINK_END = "<think>", "</think>"
BROKEN = "\ufffd"  # what bytes that are no character are decoded to


def starts_thinking(dialogue: Dialogue) -> bool:
    """Whether the prompt has opened the think block already, as some templates do."""
    return dialogue.parse(f"a{THINK_END}").think is not None


@dataclass(slots=True)
class TurnReader:
    """Reads one turn, token by token.

    Attributes:
        dialogue: decodes the tokens.
        stop: texts of the client that end the turn and are cut from it.
        token_ids: all so far.
        cut: where the first stop text begins, None without one.
    """

    dialogue: Dialogue
    stop: Sequence[str] = ()
    token_ids: list[int] = field(default_factory=list)
    cut: int | None = None
    _text: str = ""
    _shown: int = 0
    # The tokens from `_window` to `_read` are decoded again with the new ones, for
    # some tokenizers write a token differently at the beginning of a text.
    _window: int = 0
    _read: int = 0

    def feed(self, token_ids: Sequence[int]) -> str:
        """Take more tokens and give the text that is certain by now."""
        self.token_ids += token_ids
        known = self._decode(self._window, self._read)
        text = self._decode(self._window, len(self.token_ids))
        if len(text) > len(known) and not text.endswith(BROKEN):
            self._text += text[len(known) :]
            self._window, self._read = self._read, len(self.token_ids)
        return self._show(len(self._text) - self._held_back())

    def finish(self) -> str:
        """The rest of the turn's text."""
        self._text = self._decode(0, len(self.token_ids))
        return self._show(len(self._text))

    @property
    def text(self) -> str:
        """All the text that was shown."""
        return self._text[: self._shown]

    @property
    def ended_by_token(self) -> bool:
        """Whether the last token is the end of text."""
        return self.dialogue.decode(np.array(self.token_ids, np.int32))[1]

    def _decode(self, start: int, end: int) -> str:
        ids = np.array(self.token_ids[start:end], np.int32)
        return self.dialogue.decode(ids)[0]

    def _show(self, end: int) -> str:
        if self.cut is None and self.stop:
            # A stop text that begins before `_shown` would have been held back.
            places = [self._text.find(stop, self._shown) for stop in self.stop]
            self.cut = min((place for place in places if place >= 0), default=None)
        if self.cut is not None:
            end = self.cut
        piece = self._text[self._shown : end]
        self._shown = max(end, self._shown)
        return piece

    def _held_back(self) -> int:
        return max((overlap(self._text, stop) for stop in self.stop), default=0)


@dataclass(slots=True)
class ThoughtReader:
    """Finds what stands between think tags, while it is written.

    Attributes:
        inside: whether the text begins inside a think block.
        follows: whether there were thoughts before, in earlier turns.
    """

    inside: bool = False
    follows: bool = False
    _rest: str = ""
    _space: str = ""
    _begun: bool = False

    def feed(self, text: str) -> str:
        """Take more text and give the thoughts in it that are certain."""
        self._rest += text
        thoughts = ""
        while True:
            tag = THINK_END if self.inside else THINK
            before, found, after = self._rest.partition(tag)
            if not found:
                break
            if self.inside:
                thoughts += self._think(before)
            self.inside = not self.inside
            self._rest, self._space, self._begun = after, "", False
        certain = len(self._rest) - overlap(self._rest, tag)
        if self.inside:
            thoughts += self._think(self._rest[:certain])
        self._rest = self._rest[certain:]
        return thoughts

    def finish(self) -> str:
        """The rest, when the turn is over."""
        return self._think(self._rest) if self.inside else ""

    def _think(self, text: str) -> str:
        """`text` without the white space around the block's text."""
        text = self._space + text
        if not self._begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown and not self._begun:
            gap = "\n\n" if self.follows else ""
            self._begun = self.follows = True
            return gap + shown
        return shown


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag`, not all."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
