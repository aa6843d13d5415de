"""Train tool-using language models by reinforcement learning on Ray.

ARPO (Agentic Reinforced Policy Optimization, arXiv:2507.19849) as an RLlib
algorithm: trees of rollouts that branch where the model becomes uncertain after a
tool result.
"""

from ray.tune import register_trainable

from rllib_arpo.arpo import ARPO
from rllib_arpo.config import ARPOConfig
from rllib_arpo.envs.tool_use_env import ToolUseEnv
from rllib_arpo.sft import SFT, SFTConfig
from rllib_arpo.tree import Leaf, Message, RolloutTree, Segment, Task, Trajectory

__all__ = [
    "ARPO",
    "SFT",
    "ARPOConfig",
    "Leaf",
    "Message",
    "RolloutTree",
    "SFTConfig",
    "Segment",
    "Task",
    "ToolUseEnv",
    "Trajectory",
]
__version__ = "0.1.0"

register_trainable("ARPO", ARPO)
register_trainable("SFT", SFT)
