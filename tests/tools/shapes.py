"""Shapes of published models, and train.py's model and batches in them, without any weights.

Nothing here allocates gigabytes: the models are made where the caller wants them, on the meta
device or as fake tensors, by train.py's own functions; only from_pretrained is replaced.
"""

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForImageTextToText

TEXT_TOKENS = 26  # of a prompt around its image: the chat template and the usual question
CAPTION_TOKENS = 12  # of a COCO caption with its end token, which is what is learned
IMAGE_SIDE = 280  # pixels
MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}

QWEN2_VL_2B = {
    "model_type": "qwen2_vl",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rope_scaling": MROPE,
    "tie_word_embeddings": True,
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
    "vocab_size": 151936,
    **IDS,
}
QWEN2_VL_7B = {
    **QWEN2_VL_2B,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16},
    "vocab_size": 152064,
}
QWEN2_5_VL_3B = {
    **QWEN2_VL_2B,
    "model_type": "qwen2_5_vl",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
    },
}
QWEN3_VL_2B = {
    "model_type": "qwen3_vl",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20]},
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 16,
    },
    **IDS,
}
# The 2B model with a 170th of its arithmetic, and the same shares of tower, layers and head
SMALL = {
    **QWEN2_VL_2B,
    "hidden_size": 256,
    "intermediate_size": 1488,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "vision_config": {"depth": 5, "embed_dim": 208, "hidden_size": 256, "num_heads": 4},
    "vocab_size": 5248,
}
# As small as works: for dry runs
TINY = {**SMALL, "num_hidden_layers": 2, "vocab_size": 512}
PUBLISHED = {
    "Qwen2-VL-2B": QWEN2_VL_2B,
    "Qwen2-VL-7B": QWEN2_VL_7B,
    "Qwen2.5-VL-3B": QWEN2_5_VL_3B,
    "Qwen3-VL-2B": QWEN3_VL_2B,
}


def make_shallow(shape: dict, layers: int) -> dict:
    """Return a shape with fewer layers, which is counted sooner: all widths are its own."""
    shallow = deepcopy(shape)
    shallow.get("text_config", shallow)["num_hidden_layers"] = layers
    shallow["vision_config"]["depth"] = layers
    if "deepstack_visual_indexes" in shallow["vision_config"]:
        shallow["vision_config"]["deepstack_visual_indexes"] = [0, 1, 2]
    return shallow


def make_config(shape: dict) -> transformers.PreTrainedConfig:
    """Return the configuration of a shape."""
    values = deepcopy(shape)
    return transformers.AutoConfig.for_model(values.pop("model_type"), **values)


def make_base(train: ModuleType, shape: dict, device: str, dtype: torch.dtype):
    """Return train.py's Base for a shape; of the processor what the collator asks it for."""
    config = make_config(shape)
    vision = config.vision_config
    image_processor = SimpleNamespace(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
    )
    processor = SimpleNamespace(
        image_token_id=config.image_token_id,
        image_processor=image_processor,
        tokenizer=SimpleNamespace(pad_token_id=0),
    )
    return train.Base(processor, config, torch.device(device), dtype)


@contextlib.contextmanager
def without_weights(device: str) -> Iterator[None]:
    """Let train.py load a model that was never saved: its shape on a device, its numbers anything.

    FakeTensorMode around it, or the meta device, keep it from taking memory.
    """

    def build(folder, config, dtype, **options):
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        return model, {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}

    with patch.object(AutoModelForImageTextToText, "from_pretrained", build):
        yield


class OnMeta(TorchDispatchMode):
    """Lets a model on the meta device read real numbers: positions, image sizes, where labels are.

    Some decide what is computed, so they have to be real; where they meet the model's own tensors
    they become as empty as those.
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        aten = torch.ops.aten
        # how much a mask selects is a question of numbers, so a mask keeps them
        if operation is aten._to_copy.default and args[0].dtype == torch.bool:
            return args[0].clone()
        masked = operation is aten.index.Tensor and args[1][0].dtype == torch.bool
        tensors = []
        tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
        devices = {tensor.device.type for tensor in tensors}
        if devices == {"cpu", "meta"} and not masked:
            args, kwargs = tree_map_only(torch.Tensor, lambda each: each.to("meta"), (args, kwargs))
        return operation(*args, **kwargs)


class MadeUpFeatures:
    """Stands for train.py's KeptFeatures: rows of the right shape for any image."""

    def __init__(self, base, device: str) -> None:
        self.base = base
        self.device = device
        self.hidden = base.config.text_config.hidden_size
        layers = len(getattr(base.config.vision_config, "deepstack_visual_indexes", []))
        self.width = self.hidden * (1 + layers)

    def tokens(self, image) -> int:
        return image.height * image.width // self.base.side**2

    def read(self, images: list) -> torch.Tensor:
        rows = sum(map(self.tokens, images))
        return torch.randn(rows, self.width, dtype=self.base.dtype, device=self.device)


def make_sample(
    train: ModuleType, base, captions: int, caption_tokens: int = CAPTION_TOKENS
) -> dict:
    """Return a row of train.py's table: an image in a prompt of usual length, with its captions."""
    side, _ = train.model_size(IMAGE_SIDE, IMAGE_SIDE, base.side)
    image = train.ImageFile("image.jpg", "digest", side, side)
    start = base.config.vision_start_token_id
    inner = [base.processor.image_token_id] * (side // base.side) ** 2
    # the template's beginning; behind the image its end, the last token being the line break
    prompt = [1] * (TEXT_TOKENS - 8) + [start, *inner, start + 1] + [1] * 6
    answers = [[2] * caption_tokens for _ in range(captions)]
    return {
        "images": [image._asdict()],
        "question": "",
        "prompt": prompt,
        "answers": answers,
        "references": ["a caption"] * captions,
        "tokens": len(prompt) - 1 + captions * (caption_tokens + 1),
        "learned": captions * caption_tokens,
    }
