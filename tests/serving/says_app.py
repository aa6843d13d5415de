"""An application that says its `user_config`.

Serve builds one of a file in a process of its own: this imports nothing else.
"""

import os
from typing import Any

from ray import serve
from ray.serve import Application


@serve.deployment(ray_actor_options={"num_cpus": 0}, user_config={"says": "built"})
class Says:
    def reconfigure(self, config: dict[str, str]) -> None:
        self.says = config["says"]

    async def __call__(self, request: object) -> list[Any]:
        return [self.says, os.getpid()]


def build(args: dict[str, str]) -> Application:
    return Says.bind()
