"""A model that writes whole answers, right and wrong ones, and calls a tool.

Each of `PHRASES` is one token. A Qwen2 without attention and feed-forward sees only the
last token: after anything it thinks, and after that it draws one of the others.
"""

from pathlib import Path

import torch

from tests.models import tiny_model
from tests.tokenizers import qwen_like

THINK = "<think>I know.</think>"
ENDINGS = {
    "<answer>\\boxed{2}</answer>": 8.0,
    "<answer>\\boxed{3 bears}</answer>": 7.6,
    "<python>1 + 1</python>": 7.8,
}
PHRASES = (THINK, *ENDINGS)


def save_writer(folder: Path, *, favor: float = 0.0) -> Path:
    """Write it as a Hugging Face folder.

    Args:
        folder: to write to.
        favor: added to the logit of the first ending; 100 makes it certain.
    """
    tokenizer = qwen_like()
    tokenizer.add_tokens(list(PHRASES))
    think, *endings = tokenizer.convert_tokens_to_ids(list(PHRASES))
    model = tiny_model(vocab_size=len(tokenizer), tied=False, max_positions=8192)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
        # The last norm makes a unit vector of d dimensions √d long.
        size = embedding.shape[1] ** 0.5
        embedding[:, 0] = 1.0
        embedding[think, 0], embedding[think, 1] = 0.0, 1.0
        head[think, 0] = 40.0 / size
        for token, logit in zip(endings, ENDINGS.values(), strict=True):
            head[token, 1] = (logit + 30.0) / size
        head[endings[0], 1] += favor / size
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
