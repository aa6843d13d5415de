import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert 0.0 <= float(done.stdout.split()[-1]) <= 1.0
    assert (tmp_path / "runs" / "mine" / "model.safetensors").exists()


def test_the_readme_names_only_commands_options_and_files_that_exist():
    help_text = subprocess.run(
        [sys.executable, "-m", "rllib_arpo.cli", "train", "--help"],
        capture_output=True,
        text=True,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin"},
    ).stdout
    for option in set(re.findall(r"rllib-arpo train[^\n]*?(--[a-z-]+)", README)):
        assert option in help_text
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE)):
        assert f"\n{target}:" in makefile
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / image).exists()
    assert len(README.splitlines()) < 120
