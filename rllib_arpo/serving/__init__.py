"""Agents behind OpenAI's chat API, on Ray Serve.

serve run rllib_arpo.serving:build_app checkpoint=runs/quickstart
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rllib_arpo.serving.app import build_app
    from rllib_arpo.serving.serve_args import ServeArgs

__all__ = ["ServeArgs", "build_app"]


def __getattr__(name: str) -> Any:
    # Serve starts threads and reads settings when it is imported.
    if name == "build_app":
        from rllib_arpo.serving.app import build_app

        return build_app
    if name == "ServeArgs":
        from rllib_arpo.serving.serve_args import ServeArgs

        return ServeArgs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
