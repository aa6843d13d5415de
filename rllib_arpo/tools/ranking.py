"""The best of many scores, in the same order every time."""

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1024


def best_first(
    scores: NDArray[np.floating], top_k: int, *, above: float = -np.inf
) -> NDArray[np.intp]:
    """Indices of the largest scores; equal ones in their own order.

    A score that is among the best is not below the k-th largest maximum of a block,
    for k blocks hold one each. Few scores pass that, so sorting them costs little.

    Args:
        scores: [N] at least one.
        top_k: most indices to return, at least 1.
        above: only scores above this one count.

    Returns:
        [<= top_k] indices.
    """
    maxima = np.maximum.reduceat(scores, np.arange(0, len(scores), _BLOCK))
    edge = above
    if len(maxima) > top_k:
        edge = np.partition(maxima, -top_k)[-top_k]
    passed = np.flatnonzero(scores >= edge if edge > above else scores > above)
    return passed[np.argsort(-scores[passed], kind="stable")][:top_k]
