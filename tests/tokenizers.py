"""Small real tokenizers, trained in place: no download, a few milliseconds each.

`qwen_like` marks turns with <|im_start|> and <|im_end|> and adds no BOS;
`llama_like` adds a BOS to whatever it encodes, as Llama 3 does.
"""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "<think> I need to search for the height of vifel. </think>",
    "<search> height of vifel </search> <result> height vifel 44 </result>",
    "<python> print(44 * 2) </python> <result> 88 </result>",
    "<answer> The final answer is \\[ \\boxed{88} \\] </answer>",
    "What is the area of zepen minus 57? 0 1 2 3 4 5 6 7 8 9",
    "Error: the tool took too long. No results.",
] * 4

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}<|start_header_id|>"
    "{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def _train(special_tokens: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def qwen_like(
    vocab_size: int = 400, *, added_tokens: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's chat template.

    Args:
        vocab_size: without the added tokens; at least 259.
        added_tokens: strings that are one ordinary token each, for example tags.
    """
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train(names, vocab_size),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(list(added_tokens))
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def llama_like(
    vocab_size: int = 400, *, chat_template: bool = True
) -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts <|begin_of_text|> before everything it encodes."""
    names = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ]
    trained = _train(names, vocab_size)
    trained.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        additional_special_tokens=["<|start_header_id|>", "<|end_header_id|>"],
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        tokenizer.chat_template = LLAMA_TEMPLATE
    return tokenizer
