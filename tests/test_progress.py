import io

from rich.console import Console as RichConsole

from rllib_arpo.progress import Console, live_headings, live_line

RECORD = {
    "iteration": 12,
    "reward_mean": 0.774,
    "accuracy": 0.71,
    "tool_calls_per_trajectory": 2.64,
    "branches_per_tree": 8.0,
    "entropy_after_tool": 0.0812,
    "entropy_elsewhere": 0.0239,
    "tokens_per_s": 5781.4,
}


def test_the_figures_of_an_iteration_stand_under_their_headings_on_one_line():
    headings, figures = live_headings(RECORD), live_line(RECORD)
    assert len(headings) == len(figures) <= 80
    assert figures.split() == [
        "12",
        "+0.77",
        "0.71",
        "2.64",
        "8.0",
        "0.081",
        "0.024",
        "5,781",
    ]
    end = headings.index("accuracy") + len("accuracy")
    assert figures[:end].endswith("0.71")


def test_what_was_not_measured_has_no_column():
    record = {"iteration": 1, "negative_log_likelihood": 1.25}
    assert live_headings(record).split() == ["iter", "nll"]
    assert live_line(record).split() == ["1", "1.250"]


def test_an_iteration_without_tool_calls_keeps_the_columns():
    without = {k: v for k, v in RECORD.items() if k != "entropy_after_tool"}
    assert live_headings(without) == live_headings(RECORD)
    assert len(live_line(without)) == len(live_line(RECORD))
    assert live_line(without).split()[5:7] == ["-", live_line(RECORD).split()[6]]


def test_what_an_evaluation_lacks_is_a_dash():
    screen = io.StringIO()
    console = Console(RichConsole(file=screen, width=100))
    values = {**RECORD, "format_error_share": 0.0, "response_tokens": 30.0}
    del values["entropy_after_tool"]
    before = {"sampled": values, "greedy": RECORD}
    after = {"sampled": {**values, "entropy_after_tool": 0.5}, "greedy": RECORD}
    console.before_and_after(before, after)
    (row,) = [r for r in screen.getvalue().splitlines() if "entropy after" in r]
    assert row.split("│")[2].strip() == "-" and "0.500" in row


def test_headings_are_printed_once():
    screen = io.StringIO()
    console = Console(RichConsole(file=screen, width=100))
    with console.progress(2, "stage") as advance:
        advance(RECORD)
        advance({**RECORD, "iteration": 13})
    lines = screen.getvalue().splitlines()
    assert sum(line.startswith("iter ") for line in lines) == 1
    assert sum("+0.77" in line for line in lines) == 2
