"""What a served application is made of: models, keys, limits, number of replicas.

`serve run` gives every value as text, a YAML file and the command line give typed ones;
both become a `ServeArgs`.
"""

import json
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rllib_arpo.agents import AgentFlags, ToolFlags
from rllib_arpo.serving.access import keys_from_environment
from rllib_arpo.serving.agent import AnswerLimits
from rllib_arpo.serving.http_settings import MAX_IN_ALL, HttpSettings


def _from_text(value: Any) -> Any:
    """JSON of a text that is meant to be a list or mapping."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{value!r} is not JSON: {error}") from error


class ServedModel(BaseModel):
    """A model of the application.

    Attributes:
        name: what requests call it.
        checkpoint: its source, as in `rllib_arpo.agents.find_agent`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=256)
    checkpoint: str = Field(min_length=1)


class ServeArgs(BaseModel):
    """Arguments of `rllib_arpo.serving:build_app`.

    Attributes:
        checkpoint: source of the only model, named by its folder; or
        models: names and sources of several.
        engine, engine_kwargs, dtype: as in `AgentSettings`; None takes the source's.
        corpus, ..., max_result_tokens: tools and limits of Hugging Face folders.
        api_key_hashes: None takes `RLLIB_ARPO_API_KEYS` of the agent replica.
        admin_key_hash: None takes `RLLIB_ARPO_ADMIN_KEY` of the agent replica.
        max_request_s: seconds until an answer must be complete.
        min_engines, max_engines: replicas of each model's engine.
        min_agents, max_agents: replicas of the HTTP server.
        target_ongoing_requests: turns per engine, and requests per agent replica, to
            which the number of replicas is fitted.
        upscale_delay_s, downscale_delay_s: seconds that the load must have been too
            much, or little, before it is.
        max_queued_requests: that wait for a replica with room; further ones get 503.
        num_gpus: of each engine.
        poll_s: seconds between two looks at the aliases of a registry.
        mlflow: store that answers are traced in; None takes `MLFLOW_TRACKING_URI` of
            the agent replica, and traces none without it.
        trace_share: of the answers that are traced, from 0 to 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str | None = None
    models: Annotated[tuple[ServedModel, ...], BeforeValidator(_from_text)] = ()

    engine: str | None = None
    engine_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(_from_text)] = None
    dtype: str | None = None
    corpus: str | None = None
    search: str | None = None
    search_endpoint: str | None = None
    browse: bool | None = None
    python: str | None = None
    tool_cache: str | None = None
    dialogue: str | None = None
    max_response_tokens: PositiveInt | None = None
    max_tool_calls: NonNegativeInt | None = None
    max_result_tokens: PositiveInt | None = None

    api_key_hashes: Annotated[tuple[str, ...] | None, BeforeValidator(_from_text)] = (
        None
    )
    admin_key_hash: str | None = None
    max_body_bytes: PositiveInt = 1024 * 1024
    max_body_s: PositiveFloat = 30.0
    max_messages: PositiveInt = 256
    max_tokens: PositiveInt | None = None
    max_request_s: PositiveFloat = 600.0
    max_concurrent: PositiveInt = 256
    max_in_all: Annotated[PositiveInt, Field(le=MAX_IN_ALL)] = MAX_IN_ALL

    min_engines: PositiveInt = 1
    max_engines: PositiveInt = 1
    min_agents: PositiveInt = 1
    max_agents: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 32.0
    upscale_delay_s: NonNegativeFloat = 30.0
    downscale_delay_s: NonNegativeFloat = 600.0
    max_queued_requests: PositiveInt = 1024
    num_gpus: NonNegativeFloat = 0.0
    poll_s: PositiveFloat = 10.0
    mlflow: str | None = None
    trace_share: Annotated[float, Field(ge=0, le=1)] = 1.0

    @field_validator("api_key_hashes", mode="after")
    @classmethod
    def _no_empty_list(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return value or None

    @model_validator(mode="after")
    def _whole(self) -> "ServeArgs":
        if (self.checkpoint is None) == (not self.models):
            raise ValueError("give either `checkpoint` or `models`")
        names = [one.name for one in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"`models` ({names}) must have different names")
        for kind in ("engines", "agents"):
            least, most = (getattr(self, f"{end}_{kind}") for end in ("min", "max"))
            if most < least:
                raise ValueError(
                    f"`max_{kind}` ({most}) must be >= `min_{kind}` ({least})"
                )
        return self

    def flags(self) -> AgentFlags:
        """Those of `find_agent`."""
        names = (*ToolFlags.__annotations__, "engine", "engine_kwargs", "dtype")
        return AgentFlags(**{name: getattr(self, name) for name in names})

    def limits(self) -> AnswerLimits:
        """Of each answer."""
        return AnswerLimits(max_request_s=self.max_request_s)

    def http(self) -> HttpSettings:
        """Of the HTTP server; keys that are not given are those of the environment."""
        api_keys, admin_key = keys_from_environment()
        return HttpSettings(
            api_key_hashes=self.api_key_hashes or api_keys,
            admin_key_hash=self.admin_key_hash or admin_key,
            max_body_bytes=self.max_body_bytes,
            max_body_s=self.max_body_s,
            max_messages=self.max_messages,
            max_tokens=self.max_tokens,
            max_request_s=self.max_request_s,
            max_concurrent=self.max_concurrent,
            max_in_all=self.max_in_all,
        )
