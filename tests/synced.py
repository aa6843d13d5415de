"""What is on the disk, and not only on its way there, when a name is given to it."""

import os
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """What is synced and renamed from here on.

    Attributes:
        synced: inodes.
        synced_before: by the name that a file gets, what was synced before.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: set[int] = set()
        self.synced_before: dict[str, set[int]] = {}
        fsync, replace = os.fsync, os.replace

        def noted_fsync(descriptor: int) -> None:
            fsync(descriptor)
            self.synced.add(os.fstat(descriptor).st_ino)

        def noted_replace(source: Any, target: Any) -> None:
            self.synced_before[Path(target).name] = set(self.synced)
            replace(source, target)

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "replace", noted_replace)

    def held(self, file: Path, *, before: Path) -> bool:
        """Whether a file was on the disk before another one got its name."""
        return file.stat().st_ino in self.synced_before.get(before.name, ())
