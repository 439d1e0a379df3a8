"""Small random models of the other families that train.py supports, as folders on the disk.

Tokenizer and chat template are the small Qwen2-VL's own: what is tested is that features, positions
and mask reach another architecture, not what it says.
"""

import json
import shutil
from pathlib import Path

import torch
import transformers
from support.training import MODEL
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

FAMILIES = ["qwen2_5_vl", "qwen3_vl"]
TEXT_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "generation_config.json",
]
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    "initializer_range": 0.2,  # wide, so that what it says depends on what it sees
}
VISION = {
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
}


def make_qwen2_5_vl(shared: dict) -> PreTrainedModel:
    """Return a Qwen2.5-VL: windows of 4 x 4 patches in all layers of the tower but one."""
    vision = {**VISION, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(vision_config=vision, **shared)
    return Qwen2_5_VLForConditionalGeneration(config)


def make_qwen3_vl(shared: dict) -> PreTrainedModel:
    """Return a Qwen3-VL: two more layers of the tower go to the language model, patches are 16."""
    vision = {**VISION, "patch_size": 16, "num_position_embeddings": 256}
    vision["deepstack_visual_indexes"] = [0, 1]
    shared["text_config"]["head_dim"] = 16
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, **shared))


def make_model(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a random model of a family into a folder, and return the folder.

    What it says is so close to chance that rounding merged weights to bfloat16 changes it.
    """
    folder.mkdir(parents=True)
    for name in TEXT_FILES:
        shutil.copy(MODEL / name, folder)
    own = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    text = {**TEXT, "vocab_size": own["vocab_size"]}
    shared = {"text_config": text, "tie_word_embeddings": True}
    for name in ("vision_start", "vision_end", "image", "video"):
        shared[f"{name}_token_id"] = own[f"{name}_token_id"]
    for name in ("bos_token_id", "eos_token_id"):
        text[name] = own[name]
    torch.manual_seed(0)
    model = {"qwen2_5_vl": make_qwen2_5_vl, "qwen3_vl": make_qwen3_vl}[family](shared)
    model.to(dtype).save_pretrained(folder)

    vision = model.config.vision_config
    processor = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[family]
    images = json.loads((MODEL / "preprocessor_config.json").read_text(encoding="utf-8"))
    images.update(patch_size=vision.patch_size, processor_class=processor)
    (folder / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["processor_class"] = processor
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    loaded = transformers.AutoProcessor.from_pretrained(folder)
    assert type(loaded).__name__ == processor
    assert loaded.image_processor.patch_size == vision.patch_size
    return folder
