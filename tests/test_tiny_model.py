"""The small model that the other tests lean on: it must see, and be laid out, as the real one does."""

import json
import logging
import random
import unicodedata
import warnings
from pathlib import Path

import pytest
import torch
from support import scenes
from transformers import AutoModelForImageTextToText, AutoProcessor

FOLDER = Path(__file__).parent / "support/tiny_qwen2vl"
SEED = 20_260  # of the pictures below; make_tiny_model.py trained on and measured with others


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


def user(*content: dict) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def test_it_describes_scenes_it_never_saw(model, processor):
    """A base model that doesn't see would let a broken pixel path pass every test, and the demo's promise fail."""
    held_out = [scene for scene in scenes.all_scenes() if scenes.is_held_out(scene)]
    rng = random.Random(SEED)
    chosen = [held_out[number % len(held_out)] for number in range(48)]
    pictures = [scenes.draw(scene, rng).resize((112, 112)) for scene in chosen]
    question = user(text("请描述这张图片: "), {"type": "image"})
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[prompt] * 48, images=pictures, return_tensors="pt")
    with torch.inference_mode():
        produced = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answers = processor.batch_decode(
        produced[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    right = [answer == scenes.wordy(scene) for answer, scene in zip(answers, chosen, strict=True)]
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]] * 48
    assert sum(right) >= 0.9 * 48, [
        pair for pair in zip(answers, chosen, strict=True) if pair[0] != scenes.wordy(pair[1])
    ]


def test_answers_end_by_themselves(model, processor):
    """Descriptions that run on until max_new_tokens: the token that ends an answer was not learnt, or not declared."""
    picture = scenes.draw(
        scenes.Scene("circle", "red", "large", "white"), random.Random(SEED)
    ).resize((112, 112))
    prompt = processor.apply_chat_template(
        user({"type": "image"}, text("Describe this image.")), tokenize=False
    )
    prompt += "<|im_start|>assistant\n"
    inputs = processor(text=[prompt], images=[picture], return_tensors="pt")
    produced = model.generate(**inputs, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(produced) == (
        "The image shows a large red circle in the middle of a plain white background.<|im_end|>"
    )


def test_files_are_laid_out_as_the_hubs():
    """A stand-in with other files than the real repository's lets a loader pass that fails on the real one."""
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {
        "LICENSE",
        "README.md",
        "chat_template.json",
        "config.json",
        "configuration.json",
        "generation_config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert {"model.embed_tokens.weight", "visual.patch_embed.proj.weight"} <= set(
        index["weight_map"]
    )
    assert set(index["weight_map"].values()) == {
        name for name in names if name.endswith(".safetensors")
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6e6


def test_it_loads_without_a_warning(caplog, monkeypatch):
    """A missing weight or an unknown key of the configuration is only a warning, and a model that sees nothing."""
    monkeypatch.setattr(
        logging.getLogger("transformers"), "propagate", True
    )  # it keeps its records to itself
    with warnings.catch_warnings(record=True) as caught:
        AutoProcessor.from_pretrained(FOLDER)
        _, report = AutoModelForImageTextToText.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(report.values()), report
    assert not caught, [str(warning.message) for warning in caught]
    assert not caplog.records, caplog.text


def test_special_tokens_stand_in_qwens_order(model, processor):
    """`<|image_pad|>` under another number than the configuration says: features and tokens don't match."""
    tokenizer = processor.tokenizer
    names = (
        "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
        "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
    ).split()
    first = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert tokenizer.convert_tokens_to_ids(names) == list(range(first, first + 14))
    assert len(tokenizer) == first + 14 == model.config.text_config.vocab_size
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert model.config.image_token_id == first + 12
    assert model.generation_config.eos_token_id == [first + 2, first]


@pytest.mark.parametrize(
    "caption",
    [
        "一只猫🐱在垫子上。",
        'A man\'s "t-shirt" cost $5.99, 20% off!',
        "two dogs\nplaying  in   the snow\t",
        "".join(chr(number) for number in range(0x250)),
        "\U00010348 \u200d \ufffd ﷽ क्षि",
    ],
)
def test_tokenizer_gives_back_any_text(processor, caption):
    """A vocabulary without all 256 bytes loses what it never saw: Chinese captions would train as nothing."""
    ids = processor.tokenizer(caption)["input_ids"]
    assert processor.tokenizer.decode(ids) == unicodedata.normalize("NFC", caption)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            [text("请描述这张图片: "), {"type": "image"}],
            "请描述这张图片: <|vision_start|><|image_pad|><|vision_end|>",
        ),
        (
            [{"type": "image"}, text("COCO Yes:")],
            "<|vision_start|><|image_pad|><|vision_end|>COCO Yes:",
        ),
        (
            [{"image": "a.jpg"}, text(" and\n"), {"type": "image", "image": "b.jpg"}],
            "<|vision_start|><|image_pad|><|vision_end|> and\n<|vision_start|><|image_pad|><|vision_end|>",
        ),
    ],
)
def test_prompt_is_the_real_ones(processor, content, expected):
    """A template that moves the picture or strips a blank makes tests pass on a prompt that users never train."""
    assert processor.apply_chat_template(
        user(*content), add_generation_prompt=True, tokenize=False
    ) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{expected}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_held_out_scenes_are_a_tenth_and_apart():
    """Held-out combinations that are also trained on would measure memory instead of sight."""
    every = scenes.all_scenes()
    held_out = {scene for scene in every if scenes.is_held_out(scene)}
    assert len(every) == len(set(every)) == 448
    assert len(held_out) == 45
    trained = set(every) - held_out  # each word of a held-out scene is seen in other combinations
    for fact in ("shape", "colour", "size", "background"):
        assert {getattr(scene, fact) for scene in held_out} <= {
            getattr(scene, fact) for scene in trained
        }


def test_terse_and_wordy_captions_never_meet():
    """A terse caption that two scenes share, or that the base already gives, would count as learnt by luck."""
    captions = [
        caption
        for scene in scenes.all_scenes()
        for caption in [scenes.wordy(scene), *scenes.terse(scene)]
    ]
    assert len(captions) == len(set(captions)) == 448 * 6


def test_folder_holds_pictures_and_their_captions(tmp_path):
    """The same picture twice for one scene, or a caption beside the wrong picture, spoils what is learnt from it."""
    circle, star = (
        scenes.Scene("circle", "red", "large", "white"),
        scenes.Scene("star", "pink", "small", "black"),
    )
    table = scenes.write_folder(tmp_path, [circle, star, circle], captions_per_image=2, seed=1)
    assert table.read_text(encoding="utf-8").splitlines() == [
        "image_path,caption",
        "images/100001.jpg,a large red circle on white",
        "images/100002.jpg,a small pink star on black",
        "images/100003.jpg,a large red circle on white",
        "images/100001.jpg,a large red circle on a white background",
        "images/100002.jpg,a small pink star on a black background",
        "images/100003.jpg,a large red circle on a white background",
    ]
    assert (tmp_path / "images/100001.jpg").read_bytes() != (
        tmp_path / "images/100003.jpg"
    ).read_bytes()
