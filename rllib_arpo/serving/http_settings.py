"""What the HTTP server allows; can be pickled, holds no key in plain text."""

from dataclasses import dataclass
from hashlib import sha256

from rllib_arpo.errors import ConfigError

# SHA-256 of an empty key, which every client could show.
OF_NOTHING = sha256(b"").hexdigest()
# Fewer than Serve lets through to a replica, so that the refusal is an error object.
MAX_IN_ALL = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """Who may ask, and how much.

    Limits hold for each replica of the server: two replicas allow twice as many
    requests at once.

    Attributes:
        api_key_hashes: SHA-256 of the keys, in hex, as `hash_key` gives them; without
            any only clients of this machine are answered.
        admin_key_hash: of the key for `POST /admin/reload`, which is off without it.
        max_body_bytes: longest body of a request.
        max_body_s: seconds until all of it must be there.
        max_messages: most messages of a conversation.
        max_tokens: most tokens of an answer, whatever the request says; None leaves it
            to the agent.
        max_request_s: seconds after which an answer is given up.
        max_concurrent: answers to one key at once, `n` to a request; clients without a
            key count as one.
        max_in_all: answers at once, whoever asks.
    """

    api_key_hashes: tuple[str, ...] = ()
    admin_key_hash: str | None = None
    max_body_bytes: int = 1024 * 1024
    max_body_s: float = 30.0
    max_messages: int = 256
    max_tokens: int | None = None
    max_request_s: float = 600.0
    max_concurrent: int = 256
    max_in_all: int = MAX_IN_ALL

    def __post_init__(self) -> None:
        for name in (
            "max_body_bytes",
            "max_body_s",
            "max_messages",
            "max_request_s",
            "max_concurrent",
            "max_in_all",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"`{name}` ({getattr(self, name)}) must be > 0")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(
                f"`max_tokens` ({self.max_tokens}) must be >= 1, or None for no limit"
            )
        for one in (*self.api_key_hashes, self.admin_key_hash):
            if one == OF_NOTHING:
                raise ConfigError("a key is empty")
            if one is not None and not _is_hash(one):
                raise ConfigError(
                    f"a key's hash has {len(one)} characters, not 64 hex digits: give "
                    "`hash_key(key)`, not the key"
                )


def _is_hash(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
