"""The small model that the other tests need: it sees, and is laid out, as the real one is."""

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
SEED = 20_260  # of the images below; make_tiny_model.py trained on and measured with others


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
    """It describes nine in ten images of held-out scenes to the letter.

    Otherwise a broken way of the pixels would pass every test.
    """
    held_out = [scene for scene in scenes.all_scenes() if scenes.is_held_out(scene)]
    rng = random.Random(SEED)
    chosen = [held_out[number % len(held_out)] for number in range(48)]
    images = [scenes.draw(scene, rng).resize((112, 112)) for scene in chosen]
    question = user(text("请描述这张图片: "), {"type": "image"})
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[prompt] * 48, images=images, return_tensors="pt")
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
    """A description ends with the token that ends an answer, long before max_new_tokens."""
    scene = scenes.Scene("circle", "red", "large", "white")
    image = scenes.draw(scene, random.Random(SEED)).resize((112, 112))
    prompt = processor.apply_chat_template(
        user({"type": "image"}, text("Describe this image.")), tokenize=False
    )
    prompt += "<|im_start|>assistant\n"
    inputs = processor(text=[prompt], images=[image], return_tensors="pt")
    produced = model.generate(**inputs, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(produced) == (
        "The image shows a large red circle in the middle of a plain white background.<|im_end|>"
    )


def test_files_are_laid_out_as_the_hubs():
    """The folder has the files of the real repository, and stays small.

    Otherwise a loader passes that fails on the real one.
    """
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
    """Processor and model load without a warning, and no weight is missing.

    Otherwise a missing weight is only a warning, and a model that sees nothing.
    """
    # transformers keeps its records to itself
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings(record=True) as caught:
        AutoProcessor.from_pretrained(FOLDER)
        _, report = AutoModelForImageTextToText.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(report.values()), report
    assert not caught, [str(warning.message) for warning in caught]
    assert not caplog.records, caplog.text


def test_special_tokens_stand_in_qwens_order(model, processor):
    """The 14 special tokens have ids in Qwen's order, the same as in the configuration.

    Otherwise features and image tokens don't match.
    """
    tokenizer = processor.tokenizer
    names = (
        "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> "
        "<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> "
        "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
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
    """Encoded and decoded, any text comes back.

    Otherwise the vocabulary loses what it never saw, Chinese captions for example.
    """
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
            "<|vision_start|><|image_pad|><|vision_end|> and\n"
            "<|vision_start|><|image_pad|><|vision_end|>",
        ),
    ],
)
def test_prompt_is_the_real_ones(processor, content, expected):
    """The template keeps images and blanks in their places, as the real one does.

    Otherwise tests pass on a prompt that users never train.
    """
    prompt = processor.apply_chat_template(
        user(*content), add_generation_prompt=True, tokenize=False
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{expected}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_held_out_scenes_are_a_tenth_and_apart():
    """45 of the 448 scenes are held out, and each of their words is seen in other scenes.

    Otherwise a test measures memory instead of sight.
    """
    every = scenes.all_scenes()
    held_out = {scene for scene in every if scenes.is_held_out(scene)}
    assert len(every) == len(set(every)) == 448
    assert len(held_out) == 45
    trained = set(every) - held_out
    for fact in ("shape", "colour", "size", "background"):
        seen = {getattr(scene, fact) for scene in trained}
        assert {getattr(scene, fact) for scene in held_out} <= seen


def test_terse_and_wordy_captions_never_meet():
    """No caption belongs to two scenes, and no terse one is a wordy one.

    Otherwise a caption counts as learnt by luck.
    """
    captions = [
        caption
        for scene in scenes.all_scenes()
        for caption in [scenes.wordy(scene), *scenes.terse(scene)]
    ]
    assert len(captions) == len(set(captions)) == 448 * 6


def test_folder_holds_images_and_their_captions(tmp_path):
    """Each caption stands beside its own image, and a scene given twice gets two images."""
    circle = scenes.Scene("circle", "red", "large", "white")
    star = scenes.Scene("star", "pink", "small", "black")
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
    first, second = (tmp_path / f"images/{number}.jpg" for number in (100001, 100003))
    assert first.read_bytes() != second.read_bytes()
