import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from rllib_arpo.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def options_by_command(group: Any, prefix: str = "") -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= options_by_command(command, f"{prefix}{name} ")
        else:
            found[prefix + name] = {o for p in command.params for o in p.opts}
    return found


OPTIONS = options_by_command(get_command(app))


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


def commands_in(text: str) -> Iterator[tuple[str, set[str]]]:
    """Name and options of each command, to the end of its line or quotation."""
    for words in re.findall(r"rllib-arpo ([^`\n]+)", text):
        first, second, *_ = [*words.split(), ""]
        name = f"{first} {second}" if f"{first} {second}" in OPTIONS else first
        assert name in OPTIONS, f"there is no command: rllib-arpo {words}"
        yield name, options_in(words)


@pytest.mark.timeout(600)
def test_the_program_in_the_readme_runs_as_printed(almanac_model, tmp_path):
    folder = tmp_path / "runs" / "quickstart"
    folder.mkdir(parents=True)
    (folder / "cold_start").symlink_to(almanac_model)
    program, _ = PROGRAMS  # the other one is in tests/serving
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=580,
        # Not the Ray of another test, which ends when that does.
        env=os.environ | {"RAY_ADDRESS": "local"},
    )
    assert done.returncode == 0, done.stderr
    assert 0.0 <= float(done.stdout.split()[-1]) <= 1.0
    assert (tmp_path / "runs" / "mine" / "model.safetensors").exists()


def test_the_readme_names_only_commands_options_and_files_that_exist():
    used = list(commands_in(README))
    assert {name for name, _ in used} >= {"train", "sft", "evaluate", "data check"}
    for name, options in used:
        assert options - OPTIONS[name] == set(), name
    assert options_in(README) - set().union(*OPTIONS.values()) == set()
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE))
    assert "quickstart" in targets
    assert {target for target in targets if f"\n{target}:" not in makefile} == set()
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert images
    assert [image for image in images if not (ROOT / image).exists()] == []
    assert len(README.splitlines()) < 120


def test_commands_in_a_text_are_found_with_all_their_options():
    text = (
        "Do `rllib-arpo view R --out O` or\nrllib-arpo data check F --json J --split S"
    )
    assert list(commands_in(text)) == [
        ("view", {"--out"}),
        ("data check", {"--json", "--split"}),
    ]
    with pytest.raises(AssertionError, match="there is no command: rllib-arpo trian"):
        list(commands_in("rllib-arpo trian --data D"))
