"""A small tokenizer in the files that Hugging Face's have."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "to", "man", "who", "ate", "it", "all"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_tokenizer(folder: Path, pair: str = "[CLS] $A [SEP] $B:1 [SEP]:1", pad: str | None = "[PAD]") -> Path:
    """Write a tokenizer of words that pads and truncates to 8 by itself, as some published ones do; `pad` pads."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=pair,
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    inner.enable_padding(length=8)
    inner.enable_truncation(8)
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=pad,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    return folder
