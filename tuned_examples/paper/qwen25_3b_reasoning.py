"""Qwen2.5-3B-Instruct on the 10,000 reasoning rows, two epochs.

rllib-arpo train tuned_examples/paper/qwen25_3b_reasoning.py --iterations 156
"""

from paper_base import iterations, paper_config

NUM_ITERATIONS = iterations(10_000, 2)

config = paper_config(
    model="Qwen/Qwen2.5-3B-Instruct",
    data="train_10k.parquet",
    max_prompt_tokens=1536,
    max_response_tokens=4096,
    max_tool_calls=3,
    max_result_tokens=1024,
)
