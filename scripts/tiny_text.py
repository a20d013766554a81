"""The words of the tiny world as token ids: the tokenizer of every embedded pipeline."""

from collections.abc import Sequence

from tiny_world import UNKNOWN, WORDS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast


def build_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """One token per word of the grammar, lower case, closed by `</s>`.

    Args:
        length: `model_max_length`, to which pipelines pad or cut.
    """
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", UNKNOWN, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token=UNKNOWN,
        model_max_length=length,
    )


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of an embedding for it, a multiple of eight as GPUs like them."""
    return -(-len(tokenizer) // 8) * 8


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], length: int) -> Tensor:
    """Ids `[texts, length]`, padded with zeros."""
    return tokenizer(list(texts), padding="max_length", max_length=length, return_tensors="pt").input_ids
