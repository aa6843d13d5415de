#!/bin/sh
# Starts a run, or goes on with it: what a job runs that may be started again.
#
#     train.sh CONFIG.py FOLDER ITERATIONS [more options of `rllib-arpo train`]
set -eu
config=$1 folder=$2 iterations=$3
shift 3
if ls -d "$folder"/checkpoints/iteration_* >/dev/null 2>&1; then
    exec rllib-arpo train --resume "$folder" --iterations "$iterations"
fi
# A run that was lost before its first checkpoint has nothing to go on from.
rm -f "$folder/metrics.jsonl"
exec rllib-arpo train "$config" --out "$folder" --iterations "$iterations" "$@"
