"""What all engines check when weights arrive: that they fit, and that they arrived.

A wrong weight does not crash anything: the engine samples from another policy than
the learner believes, and training goes astray without a word. So an engine refuses
arrays that do not fit its model, and after every update the EnvRunner lets it score a
fixed probe, whose log-probabilities the learner sent along.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from rllib_arpo.errors import WeightSyncError

# Mean |Δ log-probability| between two implementations of one model, several times
# what was measured: 4e-7 in float32 and 5e-3 in bfloat16 (vLLM against transformers).
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-2}
PROBE_LENGTH = 64
# Key of the probe in the state that goes from a learner to the EnvRunners.
WEIGHT_PROBE = "weight_probe"
# Key, beside the weights, of the name of the restore after which they were trained:
# two runs have the same versions, but not the same weights.
WEIGHTS_RESTORE = "restore"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightProbe:
    """A text and how the learner scores it with the weights that it sends.

    Attributes:
        token_ids: [T] int32.
        logprobs: [T-1] float32, log-probability of each token but the first given
            those before it, at temperature 1.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray


def probe_token_ids(vocab_size: int) -> np.ndarray:
    """[T] int32: the same tokens for every caller with this vocabulary."""
    rng = np.random.default_rng(vocab_size)
    return rng.integers(0, vocab_size, PROBE_LENGTH, dtype=np.int32)


def check_probe(probe: WeightProbe, scored: np.ndarray, *, dtype: str) -> float:
    """Compare an engine's scores with the learner's.

    Args:
        probe: the learner's.
        scored: [T-1] the engine's.
        dtype: of the engine's computation, a key of `TOLERANCE`.

    Returns:
        Mean |Δ log-probability|.

    Raises:
        WeightSyncError: they are apart.
    """
    error = float(np.abs(scored - probe.logprobs).mean())
    limit = TOLERANCE[dtype]
    if not error <= limit:
        raise WeightSyncError(
            f"after the update the engine scores the probe {error:.2g} away from the "
            f"learner (mean |Δ log-probability|, at most {limit:g} in {dtype}): it "
            "does not run the learner's weights. Compare the model folders, dtypes "
            "and library versions of engine and learner."
        )
    return error


def check_arrays(
    arrays: Mapping[str, np.ndarray],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    required: Iterable[Collection[str]],
    model: str,
) -> None:
    """Refuse weights that do not fit, before any is taken.

    Args:
        arrays: Hugging Face name -> array.
        shapes: of every name that the model knows, aliases of tied weights included.
        required: for each parameter its names, one of which must be given.
        model: its name, for the message.

    Raises:
        WeightSyncError: a name is unknown or missing, or a shape differs.
    """
    problems = [f"unknown {name}" for name in arrays if name not in shapes]
    problems += [
        f"missing {min(names)}"
        for names in required
        if not any(name in arrays for name in names)
    ]
    problems += [
        f"{name} has shape {array.shape}, expected {tuple(shapes[name])}"
        for name, array in arrays.items()
        if name in shapes and array.shape != tuple(shapes[name])
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WeightSyncError(
            f"the weights do not fit {model}: {'; '.join(problems[:8])}{more}; send "
            "every parameter once, under its Hugging Face name"
        )
