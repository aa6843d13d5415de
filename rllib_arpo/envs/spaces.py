"""A gymnasium space for token sequences of any length.

`gymnasium.spaces.Sequence` describes tuples of samples; prompts, turns and tool
results are plain int32 arrays, so they get a space of their own.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray


class TokenSequence(gymnasium.Space[NDArray[np.int32]]):
    """1-D int32 arrays of token ids below `vocab_size`, of any length.

    Args:
        vocab_size: number of tokens, ids run from 0 to `vocab_size - 1`.
        max_sample_length: longest array that `sample` draws.
        seed: of `sample`.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        max_sample_length: int = 16,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        if vocab_size < 1:
            raise ValueError(f"`vocab_size` ({vocab_size}) must be at least 1")
        self.vocab_size = int(vocab_size)
        self.max_sample_length = int(max_sample_length)
        super().__init__(shape=None, dtype=np.int32, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        """False: arrays differ in length."""
        return False

    def sample(self, mask: None = None, probability: None = None) -> NDArray[np.int32]:
        """Between 0 and `max_sample_length` random ids; masks are not supported."""
        if mask is not None or probability is not None:
            raise ValueError("TokenSequence samples without masks")
        length = int(self.np_random.integers(self.max_sample_length + 1))
        return self.np_random.integers(self.vocab_size, size=length, dtype=np.int32)

    def contains(self, x: Any) -> bool:
        """Whether `x` is a 1-D int32 array of ids in range; empty ones are."""
        return (
            isinstance(x, np.ndarray)
            and x.ndim == 1
            and x.dtype == np.int32
            and (x.size == 0 or (int(x.min()) >= 0 and int(x.max()) < self.vocab_size))
        )

    def to_jsonable(self, sample_n: Sequence[NDArray[np.int32]]) -> list[list[int]]:
        """Lists of ids."""
        return [sample.tolist() for sample in sample_n]

    def from_jsonable(self, sample_n: list[list[int]]) -> list[NDArray[np.int32]]:
        """Arrays from lists of ids."""
        return [np.array(sample, np.int32) for sample in sample_n]

    def __repr__(self) -> str:
        return f"TokenSequence({self.vocab_size})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenSequence) and other.vocab_size == self.vocab_size

    def __hash__(self) -> int:
        return hash((TokenSequence, self.vocab_size))
