"""Trees of any shape, for properties."""

import numpy as np
from hypothesis import strategies as st

from rllib_arpo.tree import RolloutTree
from tests.learner.helpers import TASK, leaf, segment


@st.composite
def any_tree(draw: st.DrawFn, *, vocab_size: int = 32) -> RolloutTree:
    """Any parents, roles and lengths (also none); leaves also inside the tree."""
    num_segments = draw(st.integers(2, 9))
    parents = [draw(st.integers(0, i - 1)) for i in range(1, num_segments)]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))

    def tokens() -> list[int]:
        length = draw(st.integers(0, 4))
        return rng.integers(0, vocab_size, length).tolist()

    segments = [segment(None, "prompt", tokens())]
    for parent in parents:
        role, ids = draw(st.sampled_from(["model", "model", "tool"])), tokens()
        segments.append(segment(parent, role, ids, -rng.uniform(2, 5, len(ids))))
    tips = set(range(num_segments)) - set(parents)
    more = draw(st.sets(st.sampled_from(range(num_segments)), max_size=2))
    rewards = st.sampled_from([0.0, 0.5, 1.0])
    return RolloutTree(
        task=TASK,
        segments=tuple(segments),
        leaves=tuple(leaf(tip, draw(rewards)) for tip in sorted(tips | more)),
    )
