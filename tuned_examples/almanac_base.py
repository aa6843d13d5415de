"""What the tuned examples share: tasks, model, optimizer and RLlib's example flags.

Each example sets only what makes its method. They start from the cold start that
`make quickstart` writes.
"""

import sys
from pathlib import Path

from ray.rllib.examples.utils import (
    add_rllib_example_script_args,
    run_rllib_example_script_experiment,
)

from rllib_arpo import ARPOConfig
from rllib_arpo.quickstart import Settings
from rllib_arpo.quickstart import arpo_config as quickstart_config

COLD_START = Path("runs/quickstart/cold_start")
# Mean return of the training rollouts: accuracy plus 0.1 where both tools were used.
STOP_REWARD = 0.75
STOP_ITERATIONS = 60


def almanac_config(model: Path = COLD_START) -> ARPOConfig:
    """The quickstart's settings; `model` may be missing until the config is built."""
    # Tune runs trials in folders of their own, so the path must be absolute.
    return quickstart_config(
        str(model.absolute()), Settings(folder=model.parent, seed=0)
    )


def run(config: ARPOConfig) -> None:
    """Parse RLlib's example flags and `--model`, then train until a criterion holds."""
    parser = add_rllib_example_script_args(
        default_reward=STOP_REWARD,
        default_iters=STOP_ITERATIONS,
        default_timesteps=10_000_000,
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=COLD_START,
        help="Folder of the model to start from; `make quickstart` writes one.",
    )
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        sys.exit(
            f"Error: no model in {args.model}: run `make quickstart`, which writes "
            f"{COLD_START}, or give --model FOLDER"
        )
    model = str(args.model.absolute())
    config.rl_module(model_config={**config.model_config, "model": model})
    run_rllib_example_script_experiment(config, args)
