"""Processes that the tests' own process has started."""

import contextlib

import psutil


def children_running(word: str) -> list[psutil.Process]:
    """Children whose command line holds `word`.

    A child that has ended has none, whether it was waited for or not.
    """
    return [c for c in psutil.Process().children() if word in command_line(c)]


def command_line(process: psutil.Process) -> str:
    """Empty for a process that has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""
