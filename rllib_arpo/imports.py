"""Imports that may fail for a reason that a user can mend.

Objects named by an import path, "package.module:name", in configs and flags; and the
packages of extras.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rllib_arpo.errors import ConfigError


def import_object(path: str, *, setting: str) -> Any:
    """The object at "package.module:name".

    Args:
        path: the import path.
        setting: name of the setting that holds it, for the error.

    Raises:
        ConfigError: the path is malformed, or there is no such module or name.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not name:
        raise ConfigError(
            f'{setting}: "{path}" is not an import path; write "package.module:name".'
        )
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f'{setting}: cannot import "{path}": {error}.') from error


@contextmanager
def from_extra(extra: str, *, what: str) -> Iterator[None]:
    """Imports within need packages that only an extra installs.

    Args:
        extra: its name.
        what: what needs it, for the error.

    Raises:
        ConfigError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ConfigError(
            f'{what} needs the package {package}: pip install "rllib_arpo[{extra}]"'
        ) from error
