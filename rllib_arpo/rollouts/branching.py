"""When a path branches, and how many leaves a tree may have: pure maths.

After a tool result the path goes on; when its first k tokens are out, their mean
entropy is compared with the path's own entropy at the start of its answer.

Where this differs from the paper (arXiv:2507.19849, section 3.1) or its code:
1. ΔH is a mean over the k tokens, divided by ln V. The paper's text divides a sum
   by V, which makes |ΔH| < 0.002 for a vocabulary of 150k.
2. Entropies are exact over the full vocabulary, not over the top 10 tokens.
3. A branch starts where the entropy was measured, at the end of the tool result;
   the released code branches after the next one.
4. Random rules draw from a seed of the tree, never from global state.
5. A refused call (none left, no such tool, not readable) is no tool result: nothing
   was executed, and the path does not branch there. The released code ends a path
   at its limit, and does not see the others as calls.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from rllib_arpo.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchPoint:
    """What a branching rule may look at.

    Attributes:
        entropy: H_t, mean over the first k tokens after the tool result, / ln V.
        initial_entropy: H_initial of the same path, / ln V.
        entropy_change: ΔH_t = H_t - H_initial.
        probability: P_t = clip(α + β·ΔH_t, 0, 1).
        base: α.
        threshold: τ.
        drawn: a uniform number in [0, 1), seeded by tree, path and turn.
        num_tool_calls: executed tool calls on this path so far.
    """

    entropy: float
    initial_entropy: float
    entropy_change: float
    probability: float
    base: float
    threshold: float
    drawn: float
    num_tool_calls: int


BranchRule = Callable[[BranchPoint], bool]


def threshold(point: BranchPoint) -> bool:
    """Branch if P_t > τ (the paper's rule)."""
    return point.probability > point.threshold


def bernoulli(point: BranchPoint) -> bool:
    """Branch with probability P_t (what the released code meant)."""
    return point.drawn < point.probability


def random(point: BranchPoint) -> bool:
    """Branch with probability α whatever the entropy: the missing ablation."""
    return point.drawn < point.base


def always(point: BranchPoint) -> bool:
    """Branch after every tool result while the budget lasts."""
    return True


def never(point: BranchPoint) -> bool:
    """Never branch: independent rollouts, as in GRPO."""
    return False


BRANCH_RULES: dict[str, BranchRule] = {
    rule.__name__: rule for rule in (threshold, bernoulli, random, always, never)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSettings:
    """Shape of a tree; the names and defaults of the paper's appendix C.2.

    Attributes:
        group_size: M, leaves per tree.
        num_initial_rollouts: N, paths that start at the prompt.
        branch_factor: Z, paths that leave a branch point (2 = one extra).
        branch_rule: decides at each tool result; see `BRANCH_RULES`.
        branch_base: α.
        branch_entropy_weight: β.
        branch_threshold: τ.
        entropy_probe_tokens: k.

    Raises:
        ConfigError: the numbers contradict each other.
    """

    group_size: int = 16
    num_initial_rollouts: int = 8
    branch_factor: int = 2
    branch_rule: BranchRule = threshold
    branch_base: float = 0.5
    branch_entropy_weight: float = 0.2
    branch_threshold: float = 0.5
    entropy_probe_tokens: int = 20

    def __post_init__(self) -> None:
        if not 1 <= self.num_initial_rollouts <= self.group_size:
            raise ConfigError(
                f"`num_initial_rollouts` ({self.num_initial_rollouts}) must be between "
                f"1 and `group_size` ({self.group_size}): a tree starts from that many "
                "of its leaves. Lower the first or raise the second."
            )
        if self.branch_factor < 2:
            raise ConfigError(
                f"`branch_factor` ({self.branch_factor}) must be at least 2: the path "
                "that goes on counts. To switch branching off use "
                '`branch_rule="never"`.'
            )
        if not 0.0 <= self.branch_base <= 1.0:
            raise ConfigError(
                f"`branch_base` ({self.branch_base}) must be a probability in [0, 1]."
            )
        if self.entropy_probe_tokens < 1:
            raise ConfigError(
                f"`entropy_probe_tokens` ({self.entropy_probe_tokens}) must be at "
                "least 1: the entropy is a mean over that many tokens."
            )


def mean_entropy(entropies: np.ndarray, *, num_tokens: int, vocab_size: int) -> float:
    """Mean entropy of the first tokens of a segment.

        H = (1/k) Σ_{t≤k} H_t / ln V        ARPO, arXiv:2507.19849, section 3.1

    Args:
        entropies: [T] nats, at least one.
        num_tokens: k; a shorter segment gives the mean over what it has.
        vocab_size: V, at least 2.

    Returns:
        A number in [0, 1].
    """
    return float(entropies[:num_tokens].mean()) / math.log(vocab_size)


def branch_probability(entropy_change: float, *, base: float, weight: float) -> float:
    """Chance that a path branches after a tool result.

        P_t = clip(α + β·ΔH_t, 0, 1)        ARPO, arXiv:2507.19849, section 3.1

    Args:
        entropy_change: ΔH_t in units of ln V, in [-1, 1].
        base: α, the chance when the entropy did not change.
        weight: β, chance added per unit of ΔH.
    """
    return min(max(base + weight * entropy_change, 0.0), 1.0)


class LeafBudget:
    """Counts the leaves of one tree: never more than M, and M at the end.

    A path that is running counts as one leaf from the moment that it is granted.
    Extra paths are granted in the order in which they are asked for, until
    Ẑ = M - N (section 3.1); what is left when all paths have ended becomes fresh
    roots.
    """

    def __init__(self, settings: TreeSettings) -> None:
        self._free = settings.group_size
        # A rule that never branches would leave M - N leaves for a second wave.
        self.num_initial = (
            settings.group_size
            if settings.branch_rule is never
            else settings.num_initial_rollouts
        )

    @property
    def free(self) -> int:
        """Leaves that nobody has been granted."""
        return self._free

    def take(self, wanted: int) -> int:
        """Grant up to `wanted` leaves and return how many."""
        granted = min(wanted, self._free)
        self._free -= granted
        return granted


def derive_seed(*parts: int | str | tuple[int, ...]) -> int:
    """A 63-bit seed that depends on all `parts` and on nothing else."""
    digest = blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def derive_uniform(*parts: int | str | tuple[int, ...]) -> float:
    """A number in [0, 1) that depends on all `parts` and on nothing else."""
    return (derive_seed(*parts) >> 10) / (1 << 53)
