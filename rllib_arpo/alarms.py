"""Alarms: what goes wrong in a run without stopping it.

Each rule looks at one iteration's record. It rings when the record and those right
before it (`AlarmSettings.iterations` in all) break it, so that one noisy iteration
does not cry wolf. A rule whose metrics a record lacks is silent, and so is one whose
cause another alarm tells already: without tool calls no tree can branch.

    records ──> find_alarms ──> Alarm(name, message, advice)
    result  ──> Watch.look ──> result["alarms"], alarms.jsonl, the terminal
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, LEARNER_RESULTS

from rllib_arpo.errors import ConfigError
from rllib_arpo.metrics import (
    BRANCH_WANTED_SHARE,
    BRANCHES_PER_TREE,
    DEGENERATE_GROUP_SHARE,
    ENTROPY,
    NUM_BRANCH_DECISIONS,
    NUM_TOOL_CALLS,
    REFILLS_PER_TREE,
    REWARD_MEAN,
    SAMPLER_LOGPROB_DIFFERENCE,
    TOOL_FAILURE_SHARE,
    TRUNCATED_SHARE,
)

if TYPE_CHECKING:
    from rllib_arpo.config_settings import ARPOSettings

# Key of a result.
ALARMS = "alarms"

Record = Mapping[str, Any]

# A share of fewer says nothing.
MIN_EVENTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One thing that goes wrong.

    Attributes:
        name: of the rule, for tags and filters.
        message: what was measured in the newest iteration, and what it means.
        advice: what to try.
    """

    name: str
    message: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmSettings:
    """When an alarm rings.

    Attributes:
        iterations: in a row that must break a rule.
        max_equal_reward_share: of the groups.
        min_branch_share: of the decisions in which the rule wants a branch; at or
            below it "branches never" rings.
        max_branch_share: at or above it "branches always" rings.
        max_truncated_share: of the trajectories.
        max_logprob_difference: mean |Δ| in nats between the sampler's and the
            learner's log-probability of a sampled token.
        min_entropy: mean of a sampled token, in nats.
        max_tool_failure_share: of the tool calls. `ARPOConfig` has a setting of the
            same name, which stops the run; this one should be lower.

    Raises:
        ConfigError: a number is out of range.
    """

    iterations: int = 3
    max_equal_reward_share: float = 0.8
    min_branch_share: float = 0.01
    max_branch_share: float = 0.99
    max_truncated_share: float = 0.2
    max_logprob_difference: float = 0.05
    min_entropy: float = 0.01
    max_tool_failure_share: float = 0.1

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ConfigError(
                f"`AlarmSettings.iterations` ({self.iterations}) must be >= 1. To "
                "switch alarms off use `.reporting(alarms=None)`."
            )
        for name, value in asdict(self).items():
            if name.endswith("_share") and not 0.0 <= value <= 1.0:
                raise ConfigError(
                    f"`AlarmSettings.{name}` ({value}) must be a share in [0, 1]."
                )
            if value < 0:
                raise ConfigError(f"`AlarmSettings.{name}` ({value}) must be >= 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """A rule over one record.

    Attributes:
        name: of the alarm.
        keys: metrics that a record must have.
        broken: whether a record breaks it.
        message, advice: formats over the record's metrics and `settings`.
        unless: branch rules that mean it to be so.
    """

    name: str
    keys: tuple[str, ...]
    broken: Callable[[Record, AlarmSettings], bool]
    message: str
    advice: str
    unless: tuple[str, ...] = ()


_RULES = (
    _Rule(
        name="no_tool_calls",
        keys=(NUM_TOOL_CALLS,),
        broken=lambda record, _: record[NUM_TOOL_CALLS] == 0,
        message="No trajectory called a tool: the model does not write the calls that "
        "the dialogue reads, so it cannot branch and learns to answer without tools.",
        advice="Look at a saved tree. Give the model a cold start by SFT on traces "
        "with calls, or check that `dialogue` fits the model's own call format.",
    ),
    _Rule(
        name="equal_rewards",
        keys=(DEGENERATE_GROUP_SHARE, REWARD_MEAN),
        broken=lambda record, settings: (
            record[DEGENERATE_GROUP_SHARE] > settings.max_equal_reward_share
        ),
        message="In {degenerate_group_share:.0%} of the groups all rewards are equal "
        "(mean reward {reward_mean:+.2f}; limit "
        "{settings.max_equal_reward_share:.0%}): such a group has no gradient.",
        advice="If the reward is low the tasks are too hard or the reward is broken: "
        "take easier tasks or a longer cold start. If it is high they are solved: "
        "take harder ones. Else raise `group_size`, or set `dynamic_sampling=True`.",
    ),
    _Rule(
        name="only_fresh_roots",
        keys=(BRANCHES_PER_TREE, REFILLS_PER_TREE, NUM_TOOL_CALLS),
        broken=lambda record, _: (
            record[BRANCHES_PER_TREE] == 0
            and record[REFILLS_PER_TREE] > 0
            and record[NUM_TOOL_CALLS] > 0
        ),
        message="No tree branched; {refills_per_tree:.1f} leaves per tree started "
        "again from the prompt: this is GRPO at the price of a second wave.",
        advice="Lower `branch_threshold` or raise `branch_base`, or take "
        '`branch_rule="bernoulli"`. If branches are not wanted, '
        '`branch_rule="never"` starts all leaves at once.',
        unless=("never",),
    ),
    _Rule(
        name="branches_always",
        keys=(BRANCH_WANTED_SHARE, NUM_BRANCH_DECISIONS),
        broken=lambda record, settings: (
            record[NUM_BRANCH_DECISIONS] >= MIN_EVENTS
            and record[BRANCH_WANTED_SHARE] >= settings.max_branch_share
        ),
        message="The rule asked for a branch in {branch_wanted_share:.1%} of "
        "{num_branch_decisions:.0f} decisions: entropy makes no difference, the first "
        "tool results take the whole budget.",
        advice="Raise `branch_threshold` or lower `branch_base`, so that only tool "
        "results after which the entropy rises branch.",
        unless=("always",),
    ),
    _Rule(
        name="branches_never",
        keys=(BRANCH_WANTED_SHARE, NUM_BRANCH_DECISIONS),
        broken=lambda record, settings: (
            record[NUM_BRANCH_DECISIONS] >= MIN_EVENTS
            and record[BRANCH_WANTED_SHARE] <= settings.min_branch_share
        ),
        message="The rule asked for a branch in {branch_wanted_share:.1%} of "
        "{num_branch_decisions:.0f} decisions: the entropy after a tool result "
        "does not reach it.",
        advice="Lower `branch_threshold`, raise `branch_base` or "
        "`branch_entropy_weight`, or look at fewer tokens (`entropy_probe_tokens`).",
        unless=("never",),
    ),
    _Rule(
        name="truncation",
        keys=(TRUNCATED_SHARE,),
        broken=lambda record, settings: (
            record[TRUNCATED_SHARE] > settings.max_truncated_share
        ),
        message="{truncated_share:.0%} of the trajectories ended at the token limit "
        "(limit {settings.max_truncated_share:.0%}): they are scored as wrong, "
        "whatever they were about to say.",
        advice="Raise `max_response_tokens`, cap tool results (`max_result_tokens`), "
        "or teach short answers by an overlong penalty (`overlong_buffer_tokens`).",
    ),
    _Rule(
        name="logprobs_apart",
        keys=(SAMPLER_LOGPROB_DIFFERENCE,),
        broken=lambda record, settings: (
            record[SAMPLER_LOGPROB_DIFFERENCE] > settings.max_logprob_difference
        ),
        message="The sampler's and the learner's log-probabilities of a token differ "
        "by {sampler_logprob_difference:.3g} nats on average (limit "
        "{settings.max_logprob_difference:.3g}): the update is for another policy "
        "than the one that sampled.",
        advice="Use the same `dtype` for both, check that weights are synced "
        "(`weight_probe_error`), lower `max_policy_lag`, or correct for it by "
        '`tis_cap=2.0` with `old_logprobs="recompute"`.',
    ),
    _Rule(
        name="entropy_collapse",
        keys=(ENTROPY,),
        broken=lambda record, settings: record[ENTROPY] < settings.min_entropy,
        message="The policy's entropy is {entropy:.2g} nats per token (limit "
        "{settings.min_entropy:.2g}): rollouts of a group are nearly the same, and "
        "exploration has ended.",
        advice="Stop if the accuracy is where you want it. Else go back to an "
        "earlier checkpoint with a lower `lr`, a higher `clip_param_high` (0.28), a "
        "small `entropy_coeff` (0.001) or a `kl_coeff`.",
    ),
    _Rule(
        name="tool_failures",
        keys=(TOOL_FAILURE_SHARE, NUM_TOOL_CALLS),
        broken=lambda record, settings: (
            record[NUM_TOOL_CALLS] >= MIN_EVENTS
            and record[TOOL_FAILURE_SHARE] > settings.max_tool_failure_share
        ),
        message="{tool_failure_share:.0%} of {num_tool_calls:.0f} tool calls failed "
        "or timed out (limit {settings.max_tool_failure_share:.0%}): the model is "
        "punished for what its tools do.",
        advice="Check the tools' servers, their rate limits and `timeout_s`; allow "
        "more attempts or fewer calls at a time.",
    ),
)


def find_alarms(
    records: Sequence[Record],
    settings: AlarmSettings | None = None,
    *,
    branch_rule: str = "threshold",
) -> list[Alarm]:
    """The alarms that ring after the last of `records`.

    Args:
        records: flat metrics (as in `metrics.jsonl`), one per iteration, in order.
        settings: the defaults when None.
        branch_rule: name of the run's rule: one that never or always branches is not
            blamed for it.

    Returns:
        In the order of the rules; empty while there are fewer records than
        `settings.iterations`.
    """
    settings = settings or AlarmSettings()
    last = records[-settings.iterations :]
    if len(last) < settings.iterations:
        return []
    return [
        Alarm(
            name=rule.name,
            message=rule.message.format(**last[-1], settings=settings),
            advice=rule.advice,
        )
        for rule in _RULES
        if branch_rule not in rule.unless
        and all(
            record.keys() >= {*rule.keys} and rule.broken(record, settings)
            for record in last
        )
    ]


class Watch:
    """Remembers the last iterations of a run and says what rings.

    Args:
        settings: when an alarm rings; None: never.
        branch_rule: name of the run's rule, see `find_alarms`.
    """

    def __init__(
        self, settings: AlarmSettings | None, *, branch_rule: str = "threshold"
    ) -> None:
        self._settings = settings
        self._branch_rule = branch_rule
        self._records: deque[Record] = deque(
            maxlen=settings.iterations if settings is not None else 0
        )

    @classmethod
    def of(cls, config: "ARPOSettings") -> "Watch":
        """The watch that a config asks for."""
        rule = config.branch_rule
        name = rule if isinstance(rule, str) else getattr(rule, "__name__", "")
        return cls(config.alarms, branch_rule=name.rpartition(":")[2])

    def look(self, result: Mapping[str, Any]) -> list[dict[str, str]]:
        """Take an iteration's result and return what rings, as plain dicts.

        Args:
            result: of `Algorithm.train()`.
        """
        if self._settings is None:
            return []
        self._records.append(_watched(result))
        found = find_alarms(
            list(self._records), self._settings, branch_rule=self._branch_rule
        )
        return [asdict(alarm) for alarm in found]

    def get_state(self) -> list[dict[str, float]]:
        """What a checkpoint keeps: the numbers of the last iterations."""
        return [dict(record) for record in self._records]

    def set_state(self, state: Sequence[Record]) -> None:
        """Go on from what `get_state` returned."""
        self._records.clear()
        self._records.extend(state)


def _watched(result: Mapping[str, Any]) -> dict[str, float]:
    sampled = result.get(ENV_RUNNER_RESULTS, {})
    learned = result.get(LEARNER_RESULTS, {}).get(DEFAULT_MODULE_ID, {})
    keys = {key for rule in _RULES for key in rule.keys}
    return {
        key: float(value)
        for values in (sampled, learned)
        for key, value in values.items()
        if key in keys
    }
