"""Qwen3-14B on the 1,071 deep-search rows, five epochs, as its script has it.

    rllib-arpo train tuned_examples/paper/qwen3_14b_deep_search.py --iterations 83

The paper speaks of 16 GPUs and the settings of the 8B model; the script, of one node
and smaller groups and batches.
"""

from paper_base import iterations, paper_config

BATCH = 64
NUM_ITERATIONS = iterations(1_071, 5, BATCH)

config = paper_config(
    model="Qwen/Qwen3-14B",
    data="hard_search_1k.parquet",
    max_prompt_tokens=2000,
    max_response_tokens=6192,
    max_tool_calls=6,
    max_result_tokens=1536,
    browse=True,
    group_size=12,
    num_initial_rollouts=6,
    batch=BATCH,
    minibatch=8,
)
