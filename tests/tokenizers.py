"""Small real tokenizers, trained in place: no download, a few milliseconds each.

`qwen_like` marks turns with <|im_start|> and <|im_end|> and adds no BOS;
`llama_like` adds a BOS to whatever it encodes, as Llama 3 does. The templates with
tools render what the models' own templates do (Qwen2.5-Instruct, Qwen3, and Hermes on
Llama 3's tokens).
"""

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "<think> I need to search for the height of vifel. </think>",
    "<search> height of vifel </search> <result> height vifel 44 </result>",
    "<python> print(44 * 2) </python> <result> 88 </result>",
    "<answer> The final answer is \\[ \\boxed{88} \\] </answer>",
    "What is the area of zepen minus 57? 0 1 2 3 4 5 6 7 8 9",
    "Error: the tool took too long. No results.",
] * 4
CHAT_CORPUS = [
    *CORPUS,
    'system\nYou are a helpful assistant.\nuser\n<tool_response>\nvifel is 44.\n"a"\n',
    '\n{"name": "search", "arguments": {"query": "height of vifel"}}\n',
    "</tool_response>\nassistant\n<think>\nI search.\n</think>\n\n",
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


def _kept(template: str) -> str:
    """Line ends behind a block, which the templates' environment leaves out."""
    return template.replace("%}\n", "%}{{ '\\n' }}")


_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n"
    "<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
_CALL = (
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}\n</tool_call>"
)
# Results that follow each other share one turn of the user.
_RESULT = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "<|im_start|>user{% endif %}\n<tool_response>\n{{ message.content }}"
    "\n</tool_response>{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}"
    "<|im_end|>\n{% endif %}"
)
QWEN25_TOOLS_TEMPLATE = (
    "{% set system = messages[0].content if messages[0].role == 'system' else "
    "'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}"
    "<|im_start|>system\n{{ system }}{% if tools %}\n\n" + _TOOLS + "{% endif %}"
    "<|im_end|>\n{% for message in messages %}{% if message.role == 'tool' %}"
    + _RESULT
    + "{% elif message.role == 'assistant' and message.tool_calls %}"
    "<|im_start|>assistant{% if message.content %}\n{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls %}\n" + _CALL + "{% endfor %}<|im_end|>\n"
    "{% elif message.role != 'system' or not loop.first %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3 keeps the thoughts that follow the last question and drops earlier ones.
QWEN3_TOOLS_TEMPLATE = (
    "{% set ns = namespace(last=-1) %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    + _TOOLS
    + "<|im_end|>\n{% elif messages[0].role == 'system' %}"
    "<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message.role == 'tool' %}"
    + _RESULT
    + "{% elif message.role == 'assistant' %}{% set content = message.content %}"
    "{% set thoughts = '' %}{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "<think>\n{{ thoughts }}\n</think>\n\n{% endif %}{{ content }}"
    "{% for call in message.tool_calls or [] %}"
    "{% if content or not loop.first %}{{ '\n' }}{% endif %}"
    + _CALL
    + "{% endfor %}<|im_end|>\n{% elif message.role == 'user' or not loop.first %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
HERMES_TEMPLATE = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + _TOOLS + "\n"
    "<|eot_id|>{% for message in messages %}<|start_header_id|>{{ message.role }}"
    "<|end_header_id|>\n\n{% if message.role == 'tool' %}<tool_response>\n"
    "{{ message.content }}\n</tool_response>{% else %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{% if message.content or not loop.first %}{{ '\n' }}{% endif %}" + _CALL + ""
    "{% endfor %}{% endif %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# What Qwen2.5 and Qwen3 split text at: punctuation takes line ends with it.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _train(
    special_tokens: list[str], vocab_size: int, corpus: list[str] = CORPUS
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if corpus is CHAT_CORPUS:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _qwen(trained: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )


QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def qwen_like(
    vocab_size: int = 400, *, added_tokens: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's chat template.

    Args:
        vocab_size: without the added tokens; at least 259.
        added_tokens: strings that are one ordinary token each, for example tags.
    """
    tokenizer = _qwen(_train(QWEN_SPECIAL, vocab_size))
    tokenizer.add_tokens(list(added_tokens))
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def qwen25_with_tools(vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """As Qwen2.5-Instruct: calls are single tokens, but not special ones."""
    tokenizer = _qwen(_train(QWEN_SPECIAL, vocab_size, CHAT_CORPUS))
    tokenizer.add_tokens(_ordinary("tool_call"))
    tokenizer.chat_template = _kept(QWEN25_TOOLS_TEMPLATE)
    return tokenizer


def phi_with_tools(vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """As Phi's: a turn ends with a token that is not the end of text."""
    special = ["<|endoftext|>", "<|im_start|>", "<|end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_train(special, vocab_size, CHAT_CORPUS),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|end|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(_ordinary("tool_call"))
    template = QWEN25_TOOLS_TEMPLATE.replace("<|im_end|>", "<|end|>")
    tokenizer.chat_template = _kept(template)
    return tokenizer


def qwen3_with_tools(vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """As Qwen3: thoughts and results have their own tokens, too."""
    tokenizer = _qwen(_train(QWEN_SPECIAL, vocab_size, CHAT_CORPUS))
    tokenizer.add_tokens(_ordinary("tool_call", "tool_response", "think"))
    tokenizer.chat_template = _kept(QWEN3_TOOLS_TEMPLATE)
    return tokenizer


def _ordinary(*names: str) -> list[AddedToken]:
    tags = [f"<{slash}{name}>" for name in names for slash in ("", "/")]
    return [AddedToken(tag, normalized=False, special=False) for tag in tags]


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


def llama_with_tools() -> PreTrainedTokenizerFast:
    """`llama_like` with tool calls as Hermes writes them."""
    tokenizer = llama_like()
    tokenizer.chat_template = _kept(HERMES_TEMPLATE)
    return tokenizer
