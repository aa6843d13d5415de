"""Errors of tools as strangers may read them: no paths, tracebacks or secrets."""

import os
import re

REMOVED = "[removed]"
MIN_SECRET_CHARS = 6

_TRACEBACK = re.compile(r"Traceback \(most recent call last\).*", re.DOTALL)
_RAISED = re.compile(r"\b[\w.]*(?:Error|Exception|Interrupt|Exit)\b(?:: [^\n]*)?")
_FRAME = re.compile(r'File "[^"]*"(?:, line \d+)?(?:, in \S+)?')
_QUOTED_PATH = re.compile(r"""(["'`])(?:~?/|[A-Za-z]:\\)[^"'`\n]*\1""")
_FILE_URL = re.compile(r"file://[^\s\"']*")
# At least two names, or a top folder of a system: "and/or" and "1/2" are no paths.
_PATH = re.compile(
    r"(?<![\w./:~])(?:~?(?:/[\w.@+%=,-]+){2,}/?"
    r"|~?/(?:root|home|etc|tmp|var|usr|opt|proc|sys|dev|mnt|srv|run|Users)\b/?)"
)
_WINDOWS_PATH = re.compile(r"\b[A-Za-z]:\\[^\s\"']+")
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")
_KEY_IN_URL = re.compile(r"(?i)([?&][\w-]*(?:key|token|secret)[\w-]*=)[^&\s]+")
_SECRET_NAME = re.compile(r"(?i)KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL")


def scrub(text: str) -> str:
    """Take out what tells of the server: paths, tracebacks, passwords and keys.

    Args:
        text: the error that a tool gave; it may hold anything.
    """
    for value in _secrets():
        text = text.replace(value, REMOVED)
    text = _TRACEBACK.sub(_last_raised, text)
    text = _FRAME.sub(REMOVED, text)
    text = _FILE_URL.sub(REMOVED, text)
    text = _QUOTED_PATH.sub(REMOVED, text)
    text = _PATH.sub(REMOVED, text)
    text = _WINDOWS_PATH.sub(REMOVED, text)
    text = _USER_INFO.sub(f"{REMOVED}@", text)
    return _KEY_IN_URL.sub(rf"\g<1>{REMOVED}", text)


def _last_raised(traceback: re.Match[str]) -> str:
    """The last exception that a traceback names; where it was raised is left out."""
    raised = _RAISED.findall(traceback[0])
    return raised[-1] if raised else REMOVED


def _secrets() -> list[str]:
    """Values of environment variables whose name says that they are secret."""
    values = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= MIN_SECRET_CHARS
    }
    return sorted(values, key=len, reverse=True)
