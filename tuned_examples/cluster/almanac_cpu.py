"""The embedded world on a cluster without GPUs: two EnvRunners, two learners.

    rllib-arpo train tuned_examples/cluster/almanac_cpu.py \
        --model /shared/cold_start --out /shared/runs/almanac --iterations 5

A first run on a new cluster, in minutes: it needs 5 CPUs and no data. The model is
the cold start that `make quickstart` writes, copied to where all nodes see it.
"""

from pathlib import Path

from rllib_arpo.quickstart import Settings, arpo_config

COLD_START = Path("runs/quickstart/cold_start").absolute()

config = arpo_config(
    str(COLD_START),
    Settings(folder=COLD_START.parent, num_env_runners=2, num_learners=2),
)
# With two runners the order of arrival is never the same.
config.debugging(deterministic=False)
config.learners(num_cpus_per_learner=1)
