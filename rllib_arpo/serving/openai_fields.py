"""What the wire types share: what is refused, how strictly, and the error that says so.

Names of alternatives (a text or a list, the roles) begin with "@" in pydantic's places,
so that `field_of` can leave them out.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from rllib_arpo.errors import ARPOError

MAX_SCHEMA_DEPTH = 32


class InvalidRequestError(ARPOError, ValueError):
    """A request that cannot be answered; the client can repair it.

    Args:
        message: what is wrong and what is expected.
        param: dotted field, None when the request as a whole is meant.
        code: a word for programs, or None.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class UnknownModelError(InvalidRequestError):
    """The request names a model that is not served."""


def field_of(location: Sequence[str | int]) -> str:
    """Dotted field of a pydantic error's `loc`; names of alternatives are left out.

    `("body", "messages", 0, "@user", "content")` is `messages.0.content`.
    """
    parts = [str(part) for part in location if not str(part).startswith("@")]
    return ".".join(parts[1:] if parts[:1] == ["body"] else parts)


def only(reason: str, *neutral: Any) -> BeforeValidator:
    """Refuse all values but None and `neutral`, and say why."""

    def check(value: Any) -> Any:
        # False and 0 are equal, but not the same JSON.
        kind = isinstance(value, bool)
        allowed = [one for one in neutral if isinstance(one, bool) == kind]
        if value is None or value in allowed:
            return value
        why = {"why": reason}
        raise PydanticCustomError("unsupported", "not supported: {why}", why)

    return BeforeValidator(check)


def text_or_list(value: Any) -> str:
    """Which of two alternatives a value is meant to be."""
    return "@list" if isinstance(value, list) else "@text"


def shallow(value: Any) -> Any:
    """Refuse JSON that nests so deep that templates cannot render it."""
    level = [value]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [child for one in level for child in _children(one)]
        if not level:
            return value
    raise PydanticCustomError(
        "too_deep", "nests more than {depth} levels", {"depth": MAX_SCHEMA_DEPTH}
    )


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


class RequestModel(BaseModel):
    """What a client writes: nothing unknown, nothing converted."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False
    )


class EchoModel(BaseModel):
    """What a server gave and a client sends back, with what else it found there."""

    model_config = ConfigDict(
        extra="ignore", strict=True, frozen=True, allow_inf_nan=False
    )


class ReplyModel(BaseModel):
    """What the server writes."""

    model_config = ConfigDict(frozen=True)
