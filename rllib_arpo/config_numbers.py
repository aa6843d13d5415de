"""Which numbers the settings of `ARPOConfig` take, one line for each setting.

They are checked before all else, so that further checks may compare them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """An interval of finite numbers.

        Numbers(low=0, high=1, without_low=True)      (0, 1]

    Attributes:
        low: its lower end.
        high: its upper end.
        without_low: whether the lower end is left out.
        without_high: whether the upper end is left out.
        whole: whether only whole numbers are in it.
        none: what None is for, which is then allowed besides.
        hint: what else to say of a number that is refused.
    """

    low: float = -math.inf
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False
    whole: bool = False
    none: str = ""
    hint: str = ""

    def holds(self, value: object) -> bool:
        """Whether a setting may have that value."""
        if value is None:
            return bool(self.none)
        if not isinstance(value, Integral if self.whole else Real):
            return False
        number = float(value)
        return (
            math.isfinite(number)
            and self.low <= number <= self.high
            and not (self.without_low and number == self.low)
            and not (self.without_high and number == self.high)
        )

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if math.isfinite(self.high):
            left = "(" if self.without_low else "["
            right = ")" if self.without_high else "]"
            kind += f" in {left}{self.low:g}, {self.high:g}{right}"
        elif math.isfinite(self.low):
            kind += f" {'>' if self.without_low else '>='} {self.low:g}"
        none = f", or None {self.none}" if self.none else ""
        hint = f"; {self.hint}" if self.hint else ""
        return f"{kind}{none}{hint}"


OFF = "to switch it off"

OF_SAMPLING = {
    "num_env_runners": Numbers(low=0, whole=True, hint="0 samples in the driver"),
    "group_size": Numbers(low=1, whole=True),
    "num_initial_rollouts": Numbers(whole=True),
    "branch_factor": Numbers(whole=True),
    "branch_base": Numbers(),
    "branch_entropy_weight": Numbers(),
    "branch_threshold": Numbers(),
    "entropy_probe_tokens": Numbers(whole=True),
    "max_tool_failure_share": Numbers(low=0, high=1, none=OFF),
    "temperature": Numbers(low=0),
    "top_p": Numbers(low=0, high=1, without_low=True),
    "top_k": Numbers(low=0, whole=True, hint="0 keeps all tokens"),
    "num_saved_trees": Numbers(low=0, whole=True, none="for all"),
}

OF_TRAINING = {
    "num_learners": Numbers(low=0, whole=True, hint="0 learns in the driver"),
    "lr": Numbers(low=0),
    "train_batch_size_per_learner": Numbers(low=1, whole=True),
    "num_epochs": Numbers(low=1, whole=True),
    "clip_param": Numbers(low=0, high=1, without_low=True, without_high=True),
    "clip_param_high": Numbers(none="for the same bound on both sides"),
    "dual_clip": Numbers(low=1, without_low=True, none=OFF),
    "kl_coeff": Numbers(low=0, hint="0 takes no penalty"),
    "entropy_coeff": Numbers(),
    "tis_cap": Numbers(low=1, none=OFF),
    "muon_lr": Numbers(low=0),
    "weight_decay": Numbers(low=0),
    "lr_warmup_steps": Numbers(low=0, whole=True),
    "lr_total_steps": Numbers(low=1, whole=True, none='with `lr_schedule="constant"`'),
    "grad_clip": Numbers(low=0, without_low=True, none=OFF),
    "max_tokens_per_row": Numbers(
        low=1, whole=True, none="for `max_tokens_per_microbatch`"
    ),
    "max_tokens_per_microbatch": Numbers(low=1, whole=True),
    "max_skipped_steps": Numbers(
        low=0, whole=True, hint="0 stops at the first gradient that is not finite"
    ),
    "max_dynamic_sampling_rounds": Numbers(low=0, whole=True),
    "max_policy_lag": Numbers(low=0, whole=True, hint="0 is the synchronous algorithm"),
    "max_concurrent_trees": Numbers(
        low=1, whole=True, none="for an EnvRunner's share of a batch"
    ),
}

# Of each of the two.
BETA = Numbers(low=0, high=1, without_high=True)


def number_faults(config: object, expected: Mapping[str, Numbers]) -> Iterator[str]:
    """One message for each setting that has none of its numbers.

    Args:
        config: whose attributes are looked at.
        expected: by the name of the setting.
    """
    for name, numbers in expected.items():
        value = getattr(config, name)
        if not numbers.holds(value):
            yield f"`{name}` ({value!r}) must be {numbers}."


def betas_faults(betas: object) -> Iterator[str]:
    """A message if these are no `adam_betas`."""
    pair = betas if isinstance(betas, tuple | list) else ()
    if len(pair) != 2 or not all(map(BETA.holds, pair)):
        yield f"`adam_betas` ({betas!r}) must be two numbers in [0, 1): β₁ and β₂."
