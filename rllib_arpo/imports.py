"""Objects named by an import path, "package.module:name", in configs and flags."""

import importlib
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
