import shutil
import subprocess
import sys

import pytest

from tests.scripts import LIMIT_S, ROOT, environment

ALONE = ["unshare", "--map-root-user", "--net"]


def can_be_alone() -> bool:
    if shutil.which(ALONE[0]) is None:
        return False
    return subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not can_be_alone(), reason="no network of its own: `unshare --net`")
def test_both_ends_notice_that_the_other_node_has_vanished() -> None:
    """Without a word of it, as after a power cut: no connection is closed."""
    seen = subprocess.run(
        [*ALONE, sys.executable, "-m", "tests.serving.vanishing_node"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert seen.stdout.split() == ["lost", "left"], seen.stderr
