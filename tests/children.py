"""Processes that the tests' own process has started."""

import psutil


def children_running(word: str) -> list[psutil.Process]:
    """Children whose command line holds `word`.

    A child that has ended and was not waited for, as Ray leaves some, has none.
    """
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and word in " ".join(child.cmdline())
    ]
