"""Counts the arithmetic of a pass over 4 images on the shapes of published models, without weights.

This is what bench.py --flops prints. The model, the vision tower and the batch are made by the
functions of train.py; on the meta device attention falls apart into its matrix products, which the
counter knows: two forward, four backward.
"""

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import torch
import transformers
from support.launch import load
from tools.recipes import documented_model
from tools.shapes import (
    CAPTION_TOKENS,
    IMAGE_SIDE,
    PUBLISHED,
    QWEN2_VL_2B,
    TEXT_TOKENS,
    MadeUpFeatures,
    OnMeta,
    make_base,
    make_config,
    make_sample,
    without_weights,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLForConditionalGeneration

IMAGES = 4
on_off = {True: "on", False: "off"}


class Count(NamedTuple):
    """FLOP of the parts of a model, forward, recomputation and backward together."""

    vision: int
    language: int
    head: int

    def total(self) -> int:
        return self.vision + self.language + self.head


@contextlib.contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Count the arithmetic of a model on the meta device, fed with real or empty tensors."""
    # the model checks that image tokens and features match, which is a question of numbers
    unchecked = patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1")
    with unchecked, OnMeta(), FlopCounterMode(display=False) as counter:
        yield counter


def count_training(
    train: ModuleType, shape: dict, captions: int, checkpointing: bool, images: int = IMAGES
) -> Count:
    """Count a training pass of train.py: the tower is not in it."""
    base = make_base(train, shape, "meta", torch.bfloat16)
    with without_weights("meta"):
        model = train.load_model(base).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    collator = train.Collator(base, MadeUpFeatures(base, "meta"), model)
    batch = collator.make_pass([make_sample(train, base, captions)] * images)
    inputs = train.model_inputs(batch, collator.features.hidden)
    with counting() as counter:
        model(**inputs).loss.backward()
    head = head_flops(counter)
    return Count(0, counter.get_total_flops() - head, head)


def count_seeing(train: ModuleType, shape: dict, images: int = IMAGES) -> Count:
    """Count what train.py's pass over the images costs, once for all epochs and captions."""
    base = make_base(train, shape, "meta", torch.bfloat16)
    with without_weights("meta"):
        tower = train.load_tower(base)
    side, _ = train.model_size(IMAGE_SIDE, IMAGE_SIDE, base.side)
    patches = side // base.patch
    grid = torch.tensor([[1, patches, patches]] * images)
    # a patch has 3 colours and, as still images are doubled, 2 frames
    pixels = torch.empty(images * patches**2, 3 * 2 * base.patch**2, device="meta")
    with torch.inference_mode(), counting() as counter:
        tower.get_image_features(pixels, grid)
    return Count(counter.get_total_flops(), 0, 0)


def head_flops(counter: FlopCounterMode) -> int:
    """Return the part of the output head."""
    for name, operations in counter.get_flop_counts().items():
        if name.endswith("lm_head"):
            return sum(operations.values())
    raise ValueError("the model has no lm_head")


def count_documented(shape: dict, checkpointing: bool, images: int = IMAGES) -> Count:
    """Count a pass of the documented recipe, which has one caption for each of its images."""
    config = make_config(shape)

    def weightless(*args, dtype, **options):
        with torch.device("meta"):
            return Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype)

    with patch.object(Qwen2VLForConditionalGeneration, "from_pretrained", weightless):
        model = documented_model("", torch.bfloat16).train()
    if checkpointing:
        model.activation_checkpointing_enable()  # as the Trainer does
    side = IMAGE_SIDE // 14
    tokens = TEXT_TOKENS + side**2 // 4 + CAPTION_TOKENS
    nothing = torch.zeros(images, tokens, dtype=torch.long)
    grid = torch.tensor([[1, side, side]] * images)
    pixels = torch.empty(images * side**2, 1176, device="meta")
    batch = {
        "input_ids": nothing,
        "labels": nothing,
        "position_ids": nothing.expand(3, -1, -1),
        "image_grid_thw": grid,
        "pixel_values": pixels,
    }
    with counting() as whole:
        model(**batch, use_cache=False).loss.backward()
    with counting() as vision:
        seen = model.get_base_model().model.visual(pixels, grid)
        # the recipe has the tower in its graph, frozen as it is
        if seen.pooler_output.requires_grad:
            seen.pooler_output.sum().backward()
    tower, head = vision.get_total_flops(), head_flops(whole)
    return Count(tower, whole.get_total_flops() - tower - head, head)


def table_row(model: str, what: str, captions: int, checkpointing: str, count: Count) -> dict:
    """Return a row of the table, in TFLOP."""
    row = {
        "model": model,
        "variant": what,
        "captions per image": captions,
        "checkpointing": checkpointing,
    }
    for name, part in zip(count._fields, count, strict=True):
        row[name] = f"{part / 1e12:.2f}"
    row["TFLOP"] = f"{count.total() / 1e12:.2f}"
    row["per caption"] = f"{count.total() / 1e12 / IMAGES / captions:.3f}"
    return row


def flops_table(shapes: dict[str, dict] = PUBLISHED) -> list[dict]:
    """Return what 4 images cost; the documented recipe sees an image anew for each caption."""
    train = load("train.py", [])
    transformers.logging.set_verbosity_error()
    rows = []
    for name, shape in shapes.items():
        for captions in (1, 5):
            for checkpointing in (True, False):
                state = on_off[checkpointing]
                if shape is QWEN2_VL_2B:
                    single = count_documented(shape, checkpointing)
                    count = Count(*(captions * part for part in single))
                    rows.append(table_row(name, "documented", captions, state, count))
                count = count_training(train, shape, captions, checkpointing)
                rows.append(table_row(name, "train.py", captions, state, count))
        seeing = count_seeing(train, shape)
        rows.append(table_row(name, "train.py's pass over the images", 1, "-", seeing))
    return rows
