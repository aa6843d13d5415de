"""Applications beside ours on the same Serve."""

import os
import subprocess
import sys

import pytest

from tests.scripts import ROOT

LIMIT_S = 240


@pytest.mark.slow
def test_other_applications_of_a_serve_that_runs_stay_as_they_are() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "serving" / "two_apps.py")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
