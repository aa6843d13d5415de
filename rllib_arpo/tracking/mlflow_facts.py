"""What is said of a run once: its parameters, and its tags."""

import hashlib
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rllib_arpo.config import ARPOConfig
from rllib_arpo.runs import changed_settings

# Text for people; the rest of a config's numbers are the user's own.
MAX_LISTED = 20


def parameters(config: Any) -> dict[str, str]:
    """What the user set, as MLflow's parameters: nested settings by dotted names."""
    changed = (
        changed_settings(config) if isinstance(config, ARPOConfig) else dict(config)
    )
    changed.pop("callbacks_class", None)
    return _flat(changed)


def git_tags() -> dict[str, str]:
    """The commit of the working folder, and whether files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit, "git_changed": str(changed).lower()}


def file_tags(files: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of files by their names; what is no local file is left out."""
    tags = {}
    for file in map(Path, files):
        if file.is_file():
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            tags[f"data.{file.name}"] = f"sha256:{digest}"
    return tags


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name.lstrip('_')}.")
        elif not callable(value) or isinstance(value, type):
            flat[f"{prefix}{name.lstrip('_')}"] = _text(value)
        else:
            flat[f"{prefix}{name.lstrip('_')}"] = getattr(
                value, "__qualname__", type(value).__name__
            )
    return flat


def _text(value: Any) -> str:
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, list | tuple) and len(value) > MAX_LISTED:
        return f"{len(value)} items"
    return str(value)
