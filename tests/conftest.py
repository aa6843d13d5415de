import pytest
from transformers import PreTrainedTokenizerFast

from tests.tokenizers import llama_like, qwen_like


@pytest.fixture(scope="session")
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return qwen_like()


@pytest.fixture(scope="session")
def llama_tokenizer() -> PreTrainedTokenizerFast:
    return llama_like()
