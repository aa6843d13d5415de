r"""What may be said about a model from a few answers to each of a few tasks.

The tasks are a sample of the tasks one might have asked, so every interval and test
here is over tasks; the answers to one task are averaged first.

1. pass@k is the unbiased estimator; 1 - (1 - c/n)^k, which many use, is too low.
2. The paper and its code give one number of one run; here each has an interval, and
   two checkpoints are compared task by task.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
NUM_RESAMPLES = 9999
# Resamples in memory at a time: 5,000 tasks take 10 MB.
BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over tasks and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A mean of paired differences, and whether it may be chance.

    Attributes:
        difference: its 95 % confidence interval included.
        p_value: two-sided; how often a difference as large comes up if there is none.
        test: "mcnemar" or "permutation".
    """

    difference: Estimate
    p_value: float
    test: str


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """Chance that at least one of k answers is right, from n answers of which c are.

        pass@k = 1 - C(n-c, k) / C(n, k)    Chen et al., arXiv:2107.03374, eq. 1

    Args:
        num_correct: c, at most n.
        num_samples: n.
        k: at most n.

    Raises:
        ValueError: the numbers cannot be.
    """
    if not 0 <= num_correct <= num_samples >= k >= 1:
        raise ValueError(
            f"pass@k needs 0 <= c ({num_correct}) <= n ({num_samples}) and "
            f"1 <= k ({k}) <= n"
        )
    # Whole numbers, so that nothing overflows or cancels.
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def best_of_k(scores: Sequence[float], k: int) -> float:
    """Expected best score of k answers drawn from n without replacement.

        best@k = Σ_i s_(i) · C(i-1, k-1) / C(n, k),  s_(1) <= ... <= s_(n)

    pass@k for scores that are no longer only 0 or 1: s_(i) is the best of k exactly
    when the other k-1 are among the i-1 below it. For 0 and 1 the two are equal.

    Args:
        scores: [n], at least k.
        k: at least 1.

    Raises:
        ValueError: there are fewer than k scores.
    """
    if not 1 <= k <= len(scores):
        raise ValueError(f"best@k needs 1 <= k ({k}) <= n ({len(scores)})")
    ways = [math.comb(below, k - 1) for below in range(len(scores))]
    total = math.comb(len(scores), k)
    return math.fsum(
        score * (way / total) for score, way in zip(sorted(scores), ways, strict=True)
    )


def mean_with_interval(values: Sequence[float], *, seed: int = 0) -> Estimate:
    """Mean over tasks and its 95 % confidence interval.

    When every value is 0 or 1 (one answer per task, say) this is Wilson's interval
    (1927), which is right for few tasks and does not shrink to a point at 0 % or
    100 %, as the bootstrap does. Otherwise the percentile bootstrap over tasks (Efron
    & Tibshirani, 1993, chapter 13).

    Args:
        values: [tasks] in [0, 1], at least one.
        seed: of the bootstrap; same seed and values, same interval.
    """
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if np.isin(array, (0.0, 1.0)).all():
        counted = stats.binomtest(int(array.sum()), len(array))
        low, high = counted.proportion_ci(CONFIDENCE, method="wilson")
        return Estimate(mean=mean, low=float(low), high=float(high))
    if len(array) == 1:
        return Estimate(mean=mean, low=0.0, high=1.0)
    low, high = _bootstrap(array, seed)
    return Estimate(mean=mean, low=low, high=high)


def compare(
    values: Sequence[float], baseline: Sequence[float], *, seed: int = 0
) -> Comparison:
    """Whether a model is better than another on the same tasks.

    When every value is 0 or 1, McNemar's exact test (1947): of the tasks that only one
    of the two got right, each had an even chance. Otherwise the sign-flip permutation
    test of the mean difference (Fisher, 1935), exact for few tasks. The interval of
    the difference is the percentile bootstrap over tasks.

    Args:
        values: [tasks] in [0, 1], the mean of each task's answers.
        baseline: [tasks] of the other model, in the same order.
        seed: of the resampling.

    Raises:
        ValueError: there are no tasks, or not as many of each.
    """
    ours, theirs = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    if ours.shape != theirs.shape or not len(ours):
        raise ValueError(
            f"a paired test needs the same tasks, got {len(ours)} and {len(theirs)}"
        )
    differences = ours - theirs
    if np.isin(ours, (0.0, 1.0)).all() and np.isin(theirs, (0.0, 1.0)).all():
        test, p_value = "mcnemar", _mcnemar(differences)
    else:
        test, p_value = "permutation", _sign_flips(differences, seed)
    mean = float(differences.mean())
    low, high = _bootstrap(differences, seed) if len(differences) > 1 else (-1.0, 1.0)
    difference = Estimate(mean=mean, low=low, high=high)
    return Comparison(difference=difference, p_value=p_value, test=test)


def _mcnemar(differences: NDArray[np.float64]) -> float:
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    if better + worse == 0:
        return 1.0
    return float(stats.binomtest(better, better + worse).pvalue)


def _sign_flips(differences: NDArray[np.float64], seed: int) -> float:
    # Where a task makes no difference its sign makes none.
    told_apart = differences[differences != 0]
    if not len(told_apart):
        return 1.0
    result = stats.permutation_test(
        (told_apart,),
        _mean,
        permutation_type="samples",
        n_resamples=NUM_RESAMPLES,
        batch=BATCH,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _bootstrap(array: NDArray[np.float64], seed: int) -> tuple[float, float]:
    if np.ptp(array) == 0:
        return float(array[0]), float(array[0])
    result = stats.bootstrap(
        (array,),
        _mean,
        confidence_level=CONFIDENCE,
        n_resamples=NUM_RESAMPLES,
        batch=BATCH,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)


def _mean(values: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    return values.mean(axis=axis)
