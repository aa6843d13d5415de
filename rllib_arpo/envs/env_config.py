"""What stands in `env_config`: the defaults, and how each value is read and checked."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from rllib_arpo.envs.chat_dialogue import ChatTemplateDialogue
from rllib_arpo.envs.dialogue import Dialogue
from rllib_arpo.envs.tag_dialogue import TagDialogue
from rllib_arpo.errors import ConfigError
from rllib_arpo.imports import import_object
from rllib_arpo.rewards.reward import RewardFn, paper_reward
from rllib_arpo.tools.tool import Tool, ToolSpec, tool_spec
from rllib_arpo.tree import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ToolsOfTask = Callable[[Task], Sequence[Tool]]

DEFAULTS: dict[str, Any] = {
    "tokenizer": None,
    "tools": (),
    "tool_names": ("search", "python"),
    "tool_specs": None,
    "dialogue": "tags",
    "reward_fn": paper_reward,
    "reward_in_thread": None,
    "max_response_tokens": 1024,
    "max_tool_calls": 5,
    "max_result_tokens": 256,
    "tool_timeout_s": 30.0,
    "tool_retries": 1,
    "tool_retry_delay_s": 0.5,
}


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings; an unknown key is refused, for it is a setting without effect."""
    unknown = config.keys() - DEFAULTS.keys()
    if unknown:
        raise ConfigError(
            f"unknown keys in env_config: {sorted(unknown)}; known are "
            f"{sorted(DEFAULTS)}"
        )
    return DEFAULTS | dict(config)


def at_least(settings: Mapping[str, Any], key: str, least: int) -> int:
    """A whole number no smaller than `least`."""
    value = settings[key]
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"`{key}` ({value!r}) must be a whole number >= {least}")
    return value


def load_tokenizer(source: object) -> "PreTrainedTokenizerFast":
    """A fast tokenizer, loaded when a folder or name is given."""
    if isinstance(source, str):
        # Takes a second, which `import rllib_arpo` need not.
        from transformers import AutoTokenizer

        try:
            source = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no tokenizer in {source!r}: {error}") from error
    if not hasattr(source, "backend_tokenizer"):
        raise ConfigError(
            f"`tokenizer` ({source!r}) must be a folder, a name or a fast tokenizer"
        )
    return cast("PreTrainedTokenizerFast", source)


def load_tools(tools: Any) -> dict[str, Tool] | ToolsOfTask:
    """Tools by name, or the function that makes them for a task."""
    if callable(tools):
        return cast(ToolsOfTask, tools)
    listed = list(tools.values()) if isinstance(tools, Mapping) else list(tools)
    for tool in listed:
        if not isinstance(tool, Tool):
            raise ConfigError(
                f"{tool!r} is no tool: it needs name, description, call and fork"
            )
    by_name = {tool.name: tool for tool in listed}
    if len(by_name) < len(listed):
        raise ConfigError(f"two tools share a name: {[t.name for t in listed]}")
    if isinstance(tools, Mapping) and list(tools) != list(by_name):
        raise ConfigError(
            f"keys of `tools` {list(tools)} must equal the tools' names "
            f"{list(by_name)}, which are their tags"
        )
    return by_name


def load_tool_specs(
    specs: Any, tools: dict[str, Tool] | ToolsOfTask | None
) -> tuple[ToolSpec, ...] | None:
    """What the model is told about the tools, None where nobody says.

    Args:
        specs: `env_config["tool_specs"]`: specs, or mappings of their fields.
        tools: says it otherwise: the tools themselves, or `tool_specs` of the
            function that makes them; None when an environment makes its own.

    Raises:
        ConfigError: a spec is none, or two share a name.
    """
    if specs is None:
        if isinstance(tools, Mapping):
            return tuple(tool_spec(tool) for tool in tools.values())
        specs = getattr(tools, "tool_specs", None)
        if specs is None:
            return None
    try:
        known = tuple(
            spec if isinstance(spec, ToolSpec) else ToolSpec(**spec) for spec in specs
        )
    except TypeError as error:
        raise ConfigError(
            f"`tool_specs` ({specs!r}) must be a list of ToolSpec, or of mappings with "
            "name, description and parameters"
        ) from error
    names = [spec.name for spec in known]
    if len(set(names)) < len(names):
        raise ConfigError(f"`tool_specs`: two tools share a name: {names}")
    return known


def make_dialogue(
    dialogue: Any,
    tokenizer: "PreTrainedTokenizerFast",
    *,
    tool_names: Sequence[str],
    tool_specs: Sequence[ToolSpec] | None,
) -> Dialogue:
    """The dialogue that was given or described.

    Args:
        dialogue: a `Dialogue`, "tags", "chat_template", or a mapping of options with
            "type" one of them ("tags" when it is left out).
        tokenizer: makes the tokens.
        tool_names: tags of the tools.
        tool_specs: what a chat template tells the model of them, None if unknown.

    Raises:
        ConfigError: there is no such dialogue, or its options cannot work.
    """
    if isinstance(dialogue, Dialogue):
        return dialogue
    options = dict(dialogue) if isinstance(dialogue, Mapping) else {"type": dialogue}
    kind = options.pop("type", "tags")
    try:
        if kind == "tags":
            return TagDialogue(tokenizer, tool_names, **options)
        if kind == "chat_template":
            if tool_specs is None:
                raise ValueError(
                    "a chat template tells the model of its tools, but these depend on "
                    "the task: describe them in `tool_specs`"
                )
            return ChatTemplateDialogue(tokenizer, tool_specs, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`dialogue`: {error}") from error
    raise ConfigError(
        f"`dialogue` ({dialogue!r}) must be 'tags', 'chat_template', a mapping of "
        'their options with one of these as "type", or a Dialogue'
    )


def load_reward_fn(reward_fn: Any) -> RewardFn:
    """The reward function, imported when a path is given."""
    if callable(reward_fn):
        return cast(RewardFn, reward_fn)
    return cast(RewardFn, import_object(str(reward_fn), setting="reward_fn"))
