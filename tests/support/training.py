"""What the tests of train.py share: records, the way to the model's input, plain forward passes.

The small model has 16 image tokens at 112 x 112 pixels; rows are drawn with "x16" in their place.
"""

import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from support.scenes import Scene, draw

if TYPE_CHECKING:
    import torch  # takes seconds to import, and most tests need none

MODEL = Path(__file__).parent / "tiny_qwen2vl"
SIDE = 112  # pixels: 4 x 4 image tokens
END = "<|im_end|>"
MARKER = "<|vision_start|>{}<|vision_end|>"
# What the chat template writes before a question, and between a question and its answer
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ASK = "<|im_end|>\n<|im_start|>assistant\n"


def draw_scene(path: Path, shape: str, colour: str, background: str) -> Path:
    """Save the image of a large figure on a plain background."""
    draw(Scene(shape, colour, "large", background), random.Random(1)).save(path)
    return path


def save_noise(path: Path, size: tuple[int, int], **options) -> Path:
    """Save noise of a size (width, height): no two files have equal content."""
    Image.effect_noise(size, 40).convert("RGB").save(path, **options)
    return path


def record(*texts: str) -> dict:
    """Return a conversation in which user and assistant say the texts in turn."""
    turns = []
    for number, text in enumerate(texts):
        turns.append({"from": "assistant" if number % 2 else "user", "value": text})
    return {"conversations": turns}


def about(image: str, answer: str, question: str = "请描述这张图片: ") -> dict:
    """Return a conversation of one question about one image."""
    return record(question + MARKER.format(image), answer)


def write_records(path: Path, *records: dict) -> Path:
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def make_samples(train, base, folder: Path, *records: dict) -> list[dict]:
    """Send records the way that train.py sends them: JSON, examples, vision tower, table."""
    examples = train.read_examples(str(write_records(folder / "data.json", *records)), base)
    images = [image for example in examples for image in example.images]
    assert train.see_images(images, train.KeptFeatures(base), base) == {}
    return train.gather_samples(examples).to_list()


def model_inputs(collator, batch: dict) -> dict:
    """Return what the Trainer gives the model of a training pass."""
    import train  # the module that the fixture of this name has made

    return train.model_inputs(batch, collator.features.hidden)


def draw_row(collator, batch: dict, row: int) -> str:
    """Draw a row of a batch: padding as _, what is learned in [[ ]], image tokens as x16."""
    tokenizer = collator.base.processor.tokenizer
    text, learned = "", False
    for token, label in zip(batch["input_ids"][row], batch["labels"][row], strict=True):
        assert label in (-100, token), "a label is the token itself"
        if (label >= 0) != learned:
            learned = not learned
            text += "[[" if learned else "]]"
        text += tokenizer.decode([token])
    if learned:
        text += "]]"
    return text.replace("<|image_pad|>" * 16, "x16").replace(tokenizer.pad_token, "_")


def open_images(train, sample: dict) -> list[Image.Image]:
    """Open the images of a sample as the tower saw them."""
    return [
        train.open_image(each.path, each.height, each.width) for each in train.images_of(sample)
    ]


def prompt_text(base, sample: dict) -> str:
    """Return the prompt of a sample as a processor takes it: one image token for each image."""
    return re.sub(r"(<\|image_pad\|>)+", r"\1", base.processor.decode(sample["prompt"]))


def encode_plainly(train, base, sample: dict, answer: str = "") -> dict:
    """Return prompt and answer as the processor itself encodes them, pixels included."""
    text = prompt_text(base, sample) + answer
    images = open_images(train, sample)
    return base.processor(text=[text], images=images, do_resize=False, return_tensors="pt")


def plain_loss(train, base, whole_model, sample: dict, answer: str, count: int) -> "torch.Tensor":
    """Return the loss of one caption as a textbook computes it: pixels in, nothing shared."""
    asked = encode_plainly(train, base, sample)["input_ids"].shape[1]
    inputs = encode_plainly(train, base, sample, answer)
    labels = inputs["input_ids"].clone()
    labels[:, :asked] = -100
    options = {"labels": labels, "num_items_in_batch": count, "use_cache": False}
    return whole_model(**inputs, **options).loss


def plain_losses(train, base, whole_model, samples: list[dict], count: int) -> "torch.Tensor":
    """Return the sum of plain_loss over all captions of samples."""
    losses = []
    for sample in samples:
        for answer in base.processor.batch_decode(sample["answers"]):
            losses.append(plain_loss(train, base, whole_model, sample, answer, count))
    return sum(losses)


def plain_captions(train, base, whole_model, samples: list[dict], limit: int) -> list[str]:
    """Return what the whole model says to pixels, one sample at a time."""
    said = []
    for sample in samples:
        inputs = encode_plainly(train, base, sample)
        tokens = whole_model.generate(**inputs, max_new_tokens=limit, do_sample=False)
        answer = tokens[0, inputs["input_ids"].shape[1] :]
        said.append(base.processor.decode(answer, skip_special_tokens=True).strip())
    return said


def take_gradients(model) -> dict[str, "torch.Tensor"]:
    """Return the gradients of all trained weights, and forget them."""
    found = {}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            found[name] = weight.grad.clone()
    model.zero_grad()
    return found


def largest_difference(ours: dict, theirs: dict) -> float:
    """Return how far two sets of tensors of the same names lie apart."""
    assert ours.keys() == theirs.keys() and ours
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)
