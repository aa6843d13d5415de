"""The variables of a trajectory between two calls: one pickle, made by cloudpickle.

What cannot be pickled (generators, open files), or does not fit, is dropped and
named in a note. Unpickling may run code of the model's, which is why only a child
does it.
"""

import io
import pickle
import sys
import types
from typing import Any

import cloudpickle

MAX_NAMED = 5  # variables that a note names


class _MainGlobals:
    """In a pickle of functions, stands for the variables of `__main__` themselves.

    cloudpickle gives unpickled functions a copy of the globals that they use, so
    they would not see a variable that a later call sets.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return vars, (sys.modules["__main__"],)


def load(state: bytes) -> str:
    """Put variables back into `__main__`; a note when that fails."""
    if not state:
        return ""
    try:
        vars(sys.modules["__main__"]).update(pickle.loads(state))
    except BaseException as error:  # boundary: a pickle runs the model's code
        return f"(the variables of earlier calls are lost: {type(error).__name__})"
    return ""


def dump(namespace: dict[str, Any], max_bytes: int) -> tuple[bytes, str]:
    """The variables in `__main__` as a pickle, and a note on those that are not in it.

    Args:
        namespace: of `__main__`; what is not kept is deleted from it.
        max_bytes: of the pickle.
    """
    kept = {
        name: value
        for name, value in namespace.items()
        if isinstance(name, str) and not name.startswith("__")
    }
    state = _pickled(kept, namespace, max_bytes)
    if state is not None:
        return state, ""
    # Functions last: a pickle of them holds the variables that they use, so those
    # that cannot be pickled must be gone by then.
    dropped: list[str] = []
    size = 0
    code = (types.FunctionType, type)
    for name in sorted(kept, key=lambda name: isinstance(kept[name], code)):
        alone = _pickled({name: kept[name]}, namespace, max_bytes - size)
        if alone is None:
            dropped.append(name)
            del kept[name], namespace[name]
        else:
            size += len(alone)
    state = _pickled(kept, namespace, max_bytes)
    if state is None:
        return b"", _not_kept([*dropped, *kept])
    return state, _not_kept(dropped)


def _pickled(
    variables: dict[str, Any], namespace: dict[str, Any], max_bytes: int
) -> bytes | None:
    file = io.BytesIO()
    try:
        pickler = cloudpickle.Pickler(file)
        pickler.globals_ref[id(namespace)] = _MainGlobals()
        pickler.dump(variables)
    except BaseException:  # boundary: objects pickle themselves as they like
        return None
    return file.getvalue() if file.tell() <= max_bytes else None


def _not_kept(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    named = ", ".join(name[:40] for name in names[:MAX_NAMED])
    return f"(not kept for the next call: {named}{more})"
