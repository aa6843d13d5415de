"""Every alarm rings when it should, keeps quiet when it should, and reaches people."""

import io
import json

import pytest
from ray.rllib.callbacks.callbacks import RLlibCallback
from rich.console import Console as RichConsole

from rllib_arpo import ARPO
from rllib_arpo.alarms import AlarmSettings, Watch, find_alarms
from rllib_arpo.errors import ConfigError
from rllib_arpo.progress import Console
from rllib_arpo.runs import Run, train
from tests.tiny_runs import arpo_config, running

# An iteration of a run that goes well.
GOOD = {
    "reward_mean": 0.6,
    "num_tool_calls": 400.0,
    "degenerate_group_share": 0.5,
    "branches_per_tree": 7.0,
    "refills_per_tree": 1.0,
    "num_branch_decisions": 300.0,
    "branch_wanted_share": 0.6,
    "truncated_share": 0.05,
    "sampler_logprob_difference": 1e-6,
    "entropy": 0.2,
    "tool_failure_share": 0.02,
}
# Name of the alarm, what rings it, a part of the message.
FAULTS = [
    ("no_tool_calls", {"num_tool_calls": 0.0}, "No trajectory called a tool"),
    (
        "equal_rewards",
        {"degenerate_group_share": 0.875, "reward_mean": -0.25},
        "In 88% of the groups all rewards are equal (mean reward -0.25; limit 80%)",
    ),
    (
        "only_fresh_roots",
        {"branches_per_tree": 0.0, "refills_per_tree": 8.0},
        "8.0 leaves per tree started again",
    ),
    ("branches_always", {"branch_wanted_share": 0.995}, "99.5% of 300 decisions"),
    ("branches_never", {"branch_wanted_share": 0.005}, "0.5% of 300 decisions"),
    ("truncation", {"truncated_share": 0.25}, "25% of the trajectories"),
    ("logprobs_apart", {"sampler_logprob_difference": 0.125}, "0.125 nats"),
    ("entropy_collapse", {"entropy": 0.004}, "0.004 nats per token"),
    ("tool_failures", {"tool_failure_share": 0.15}, "15% of 400 tool calls"),
]


def names(records, **kwargs) -> list[str]:
    return [alarm.name for alarm in find_alarms(records, **kwargs)]


@pytest.mark.parametrize(("name", "fault", "message"), FAULTS)
def test_a_fault_of_three_iterations_rings_its_alarm_alone(name, fault, message):
    (alarm,) = find_alarms([GOOD, *[GOOD | fault] * 3])
    assert alarm.name == name
    assert message in alarm.message
    assert alarm.advice


@pytest.mark.parametrize(("name", "fault", "message"), FAULTS)
def test_one_good_iteration_among_the_last_three_keeps_it_quiet(name, fault, message):
    bad = GOOD | fault
    assert names([bad, bad, GOOD]) == []
    assert names([bad, GOOD, bad]) == []
    assert names([bad, bad]) == []
    assert names([bad, GOOD, bad], settings=AlarmSettings(iterations=1)) == [name]


@pytest.mark.parametrize(
    "limit",
    [
        {"degenerate_group_share": 0.8},
        {"truncated_share": 0.2},
        {"sampler_logprob_difference": 0.05},
        {"entropy": 0.01},
        {"tool_failure_share": 0.1},
        {"branches_per_tree": 0.0, "refills_per_tree": 0.0},
        # Too few to say anything.
        {"num_tool_calls": 19.0, "tool_failure_share": 0.9},
        {"num_branch_decisions": 19.0, "branch_wanted_share": 1.0},
        {"num_branch_decisions": 0.0, "branch_wanted_share": 0.0},
    ],
)
def test_at_the_limit_nothing_rings(limit) -> None:
    assert names([GOOD | limit] * 3) == []


def test_without_tool_calls_nobody_asks_why_no_tree_branched() -> None:
    silent = GOOD | {
        "num_tool_calls": 0.0,
        "num_branch_decisions": 0.0,
        "branch_wanted_share": 0.0,
        "branches_per_tree": 0.0,
        "refills_per_tree": 8.0,
    }
    assert names([silent] * 3) == ["no_tool_calls"]


@pytest.mark.parametrize(
    ("rule", "fault", "by_threshold"),
    [
        ("always", {"branch_wanted_share": 1.0}, "branches_always"),
        ("never", {"branch_wanted_share": 0.0}, "branches_never"),
    ],
)
def test_a_rule_that_means_it_is_not_blamed(rule, fault, by_threshold) -> None:
    records = [GOOD | fault] * 3
    assert names(records) == [by_threshold]
    assert names(records, branch_rule=rule) == []


def test_a_record_without_the_metrics_rings_nothing() -> None:
    assert names([{"negative_log_likelihood": 0.3}] * 3) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"iterations": 0}, r"`AlarmSettings.iterations` \(0\) must be >= 1"),
        ({"max_truncated_share": 20}, r"max_truncated_share` \(20\) must be a share"),
        ({"min_entropy": -0.1}, r"min_entropy` \(-0.1\) must be >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message) -> None:
    with pytest.raises(ConfigError, match=message):
        AlarmSettings(**setting)


def result_of(record) -> dict:
    learned = {key: record[key] for key in ("entropy", "sampler_logprob_difference")}
    return {"env_runners": record, "learners": {"default_policy": learned}}


def test_a_watch_that_is_restored_goes_on_counting() -> None:
    bad = result_of(GOOD | {"truncated_share": 0.3})
    watch = Watch(AlarmSettings())
    assert watch.look(bad) == watch.look(bad) == []
    restored = Watch(AlarmSettings())
    restored.set_state(watch.get_state())
    (alarm,) = restored.look(bad)
    assert alarm["name"] == "truncation"
    assert restored.look(result_of(GOOD)) == []
    assert Watch(None).look(bad) == []


class Seen(RLlibCallback):
    """A user's own callback."""

    names: list[list[str]] = []  # noqa: RUF012  of the class: RLlib makes the instance

    def on_train_result(self, *, result, **kwargs) -> None:
        self.names.append([alarm["name"] for alarm in result["alarms"]])


@pytest.mark.usefixtures("ray_session")
def test_a_model_that_calls_no_tool_rings_in_result_callback_file_and_terminal(
    almanac_model, tmp_path
) -> None:
    Seen.names.clear()
    config = (
        arpo_config(almanac_model)
        .reporting(alarms=AlarmSettings(iterations=2, max_truncated_share=1.0))
        .callbacks(Seen)
    )
    run = Run(tmp_path / "run")
    said = io.StringIO()
    terminal = Console(RichConsole(file=said, width=200))
    with running(config) as algorithm:
        train(
            algorithm,
            run,
            num_iterations=3,
            stage="ARPO",
            on_iteration=lambda record: None,
            on_alarm=terminal.alarm,
            checkpoint_interval=3,
        )
    assert Seen.names == [[], ["no_tool_calls"], ["no_tool_calls"]]
    written = (run.folder / "alarms.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in written] == [2, 3]
    assert json.loads(written[0]).keys() == {"iteration", "name", "message", "advice"}
    text = said.getvalue()
    assert text.count("Alarm (iteration") == 1
    assert "(iteration 2, no_tool_calls): No trajectory called a tool" in text
    restored = ARPO.from_checkpoint(str(run.checkpoint))
    try:
        assert [alarm["name"] for alarm in restored.train()["alarms"]] == [
            "no_tool_calls"
        ]
    finally:
        restored.stop()


@pytest.mark.usefixtures("ray_session")
def test_without_settings_nothing_rings(almanac_model) -> None:
    with running(arpo_config(almanac_model).reporting(alarms=None)) as algorithm:
        results = [algorithm.train() for _ in range(3)]
    assert [result["alarms"] for result in results] == [[], [], []]
