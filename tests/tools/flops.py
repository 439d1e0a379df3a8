"""Counts the arithmetic of a microbatch of the real Qwen2-VL-2B, without weights: what bench.py --flops prints."""

import os
import tempfile
from unittest.mock import patch

import torch
import transformers
from support.launch import load
from tools.recipes import SIDE, documented_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLForConditionalGeneration
from transformers.vision_utils import get_vision_position_ids

PROMPT_TOKENS, CAPTION_TOKENS = (
    126,
    12,
)  # a picture with the usual prompt; a COCO caption with its end token
REAL_SHAPE = {  # Qwen2-VL-2B-Instruct
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "mlp_ratio": 4,
        "num_heads": 16,
    },
    "vocab_size": 151936,
}
on_off = {True: "on", False: "off"}


def real_batch(train, variant, captions):
    """A batch of 4 pictures without content: on the meta device, but on the CPU what the model's code looks into."""
    images, prompt, caption = (SIDE // 28) ** 2, PROMPT_TOKENS - 1, CAPTION_TOKENS + 1
    # in train.py the prompt's last token comes before each caption
    kinds = [0] * prompt + [number for number in range(1, captions + 1) for _ in range(caption)]
    kinds = torch.tensor(
        [kinds if variant == "train.py" else kinds[: prompt + caption]] * 4
    )  # (4, tokens)
    nothing, grid = torch.zeros_like(kinds), torch.tensor([[1, SIDE // 14, SIDE // 14]] * 4)
    batch = {"input_ids": nothing, "labels": nothing, "image_grid_thw": grid}
    batch |= {"pixel_values": torch.empty(4 * 4 * images, 1176, device="meta")}
    if variant == "train.py":
        first = torch.nn.functional.pad(kinds.diff(), (1, 0)) != 0
        types = nothing.index_fill(1, torch.arange(15, 15 + images), 1)
        labels = nothing.masked_fill((kinds == 0) | first, -100)
        encoded = batch | {"captions": kinds, "mm_token_type_ids": types, "labels": labels}
        collator = train.CaptionCollator(None, transformers.Qwen2VLConfig(**REAL_SHAPE))
        with patch.object(collator, "encode", return_value=encoded):
            batch = collator([])
    batch = {"position_ids": nothing.expand(3, -1, -1)} | batch
    read = ("image_grid_thw", "logits_to_keep", "shift_labels")
    batch = {name: value if name in read else value.to("meta") for name, value in batch.items()}
    return batch | {"image_position_ids": get_vision_position_ids(grid, 2).to("meta")}


def count_flops(train, variant, captions, checkpointing):
    """FLOP of forward, recomputation and backward for 4 pictures: {"vision", "language", "head"}.

    On the meta device attention falls apart into its matrix products, which the counter knows: 2 forward, 4 backward.
    """
    config, model_class = transformers.Qwen2VLConfig(**REAL_SHAPE), Qwen2VLForConditionalGeneration

    def weightless(*args, dtype, **kwargs):
        with torch.device("meta"):
            return model_class._from_config(config, dtype=dtype)

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(model_class, "from_pretrained", weightless),
    ):
        config.save_pretrained(folder)
        with patch.object(train, "MODEL_FOLDER", folder):
            own = variant == "train.py"
            model = (
                train.load_model("cpu", torch.bfloat16)
                if own
                else documented_model(folder, torch.bfloat16)
            )
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()  # as the Trainer does
    batch = real_batch(train, variant, captions)
    # the check that pictures and image tokens match reads values, and there are none
    with (
        FlopCounterMode(display=False) as whole,
        patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1"),
    ):
        model(**batch, use_cache=False).loss.backward()
    with FlopCounterMode(display=False) as vision:
        visual = model.get_base_model().model.visual
        seen = visual(
            batch["pixel_values"], batch["image_grid_thw"], position_ids=batch["image_position_ids"]
        )
        if seen.pooler_output.requires_grad:
            seen.pooler_output.sum().backward()
    (head,) = (
        sum(ops.values())
        for name, ops in whole.get_flop_counts().items()
        if name.endswith("lm_head")
    )
    # what is left is the language model's: with recomputation the counter itself takes one module for another
    language = whole.get_total_flops() - vision.get_total_flops() - head
    return {"vision": vision.get_total_flops(), "language": language, "head": head}


def flops_table(captions=(1, 5), choices=(True, False)):
    """TFLOP of 4 pictures, real shape, by part; the documented recipe sees a picture anew for each caption."""
    train, rows = load("train.py", []), []
    for number in captions:
        for checkpointing in choices:
            for variant, passes in (("documented", number), ("train.py", 1)):
                counted = count_flops(train, variant, number, checkpointing)
                parts = {name: passes * part / 1e12 for name, part in counted.items()}
                total = {"TFLOP": sum(parts.values())}
                total |= {"a picture": total["TFLOP"] / 4, "a caption": total["TFLOP"] / 4 / number}
                row = {
                    "variant": variant,
                    "captions a picture": number,
                    "checkpointing": on_off[checkpointing],
                }
                rows.append(row | {name: f"{value:.3f}" for name, value in (parts | total).items()})
    return rows
