"""Whether bubblewrap works here at all, asked without our own way of calling it."""

import shutil
import subprocess

import pytest


def _problem() -> str | None:
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    tried = subprocess.run(
        ["bwrap", "--unshare-all", "--unshare-user", "--ro-bind", "/", "/", "true"],
        capture_output=True,
        text=True,
    )
    return None if tried.returncode == 0 else tried.stderr.strip()


_found = _problem()
needs_bubblewrap = pytest.mark.skipif(
    _found is not None, reason=f"no sandbox: {_found}"
)
