"""Applications on a Serve with others, each in a process of its own."""

import os
import subprocess
import sys

import pytest

from tests.scripts import ROOT

LIMIT_S = 600


@pytest.mark.slow
@pytest.mark.parametrize("script", ["two_apps.py", "declared_apps.py"])
def test_other_applications_of_a_serve_that_runs_stay_as_they_are(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "serving" / script)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
