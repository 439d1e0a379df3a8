"""train.py: what the model is fed, what it learns from, and what is said when something can't work.

The small model has 16 image tokens at 112 x 112 pixels; the rows drawn below write them as "x16".
"""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import TESTS, run_script
from PIL import Image
from scenes import all_scenes, draw, is_held_out, terse

MODEL = TESTS / "tiny_qwen2vl"
SIDE = 112  # pixels: 4 x 4 image tokens
END = "<|im_end|>"
PROMPT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def train():
    """The script as a module, as a spawned worker process imports it."""
    spec = importlib.util.spec_from_file_location("train", TESTS.parent / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["train"] = module
    spec.loader.exec_module(module)
    module.MODEL_FOLDER, module.IMAGE_SIZE = str(MODEL), SIDE
    return module


@pytest.fixture(scope="module")
def collator(train):
    return train.CaptionCollator(*train.load_processor(), SIDE)


@pytest.fixture(scope="module")
def model(train):
    torch.manual_seed(0)
    model = train.load_model(torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide what the adapter's other half gets
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()  # no dropout: what is compared must be equal


@pytest.fixture
def pictures(tmp_path, train, monkeypatch):
    """Two scenes on disk, and DATA_JSON in their folder."""
    monkeypatch.setattr(train, "DATA_JSON", str(tmp_path / "data.json"))
    for name, scene in zip(("one.jpg", "two.jpg"), all_scenes()[::200], strict=False):
        draw(scene, random.Random(1)).save(tmp_path / name)
    return tmp_path


def record(*turns: str) -> dict:
    roles = ("user", "assistant") * len(turns)
    return {"conversations": [{"from": role, "value": turn} for role, turn in zip(roles, turns, strict=False)]}


def about(picture: str, answer: str) -> dict:
    return record(f"请描述这张图片: <|vision_start|>{picture}<|vision_end|>", answer)


def samples(train, collator, *records: dict) -> list[dict]:
    """Records through the same functions as main() sends them."""
    parsed = [train.parse_record(one, collator.processor) for one in records]
    gathered = {}
    for one in parsed:
        key = (*one["pictures"], *one["prompt"])
        gathered.setdefault(key, {**one, "answers": []})["answers"].append(one["answer"])
    return list(gathered.values())


def picture_row(collator, batch: dict, row: int) -> str:
    """A row of the batch as text: padding as _, supervised runs in [[ ]], image tokens as one x16."""
    tokenizer = collator.processor.tokenizer
    text, supervised = "", False
    for token, label, seen in zip(
        batch["input_ids"][row], batch["labels"][row], batch["attention_mask"][row, 0, -1], strict=True
    ):
        if (label >= 0) != supervised:
            text, supervised = text + ("]]" if supervised else "[["), not supervised
        text += tokenizer.decode([token])
        assert label in (-100, token)
    return (text + "]]" * supervised).replace("<|image_pad|>" * 16, "x16").replace(tokenizer.pad_token, "_")


def test_a_batch_of_two_pictures_token_by_token(train, collator, pictures):
    """Guards the labels: a prompt that is trained on, an end of turn that is not, a caption in the wrong row."""
    batch = collator(
        samples(
            train,
            collator,
            about("one.jpg", "a red star"),
            about("two.jpg", "a large blue circle on a pink background"),
            about("one.jpg", "red star"),
        )
    )
    prompt = f"{PROMPT}请描述这张图片: <|vision_start|>x16<|vision_end|>{ANSWER}"
    first, second = (picture_row(collator, batch, row).lstrip("_") for row in (0, 1))
    assert first == f"{prompt}[[a red star{END}]]\n[[red star{END}]]"
    assert second == f"{prompt}[[a large blue circle on a pink background{END}]]"


def test_who_sees_whom(train, collator, pictures):
    """Guards the mask: a caption that reads another caption of its picture copies it and learns nothing."""
    batch = collator(samples(train, collator, about("one.jpg", "red"), about("one.jpg", "star"), about("two.jpg", "x")))
    sees = batch["attention_mask"][0, 0]  # (T, T)
    labels = batch["labels"][0]
    starts = [index for index in range(1, len(labels)) if labels[index] >= 0 and labels[index - 1] < 0]
    first, second = starts[0] - 1, starts[1] - 1  # the line breaks before the two captions
    assert sees[first:second].tril(first - 1)[:, :first].all(), "the first caption sees the prompt"
    assert sees[second:, :first].all(), "the second caption sees the prompt"
    assert not sees[second:, first:second].any(), "the second caption must not see the first"
    assert not sees.triu(1).any(), "nobody sees the future"
    padded = batch["attention_mask"][1, 0]
    padding = int((batch["input_ids"][1] == collator.processor.tokenizer.pad_token_id).long().argmin())
    assert padding > 0 and not padded[padding:, :padding].any(), "nobody sees padding"
    assert padded.diagonal().all(), "a row without any True would turn into NaN"
    # both captions begin at the position behind the prompt
    assert batch["position_ids"][:, 0, first].tolist() == batch["position_ids"][:, 0, second].tolist()


def plain_loss(model, collator, one: dict, answer: str, count: int) -> torch.Tensor:
    """The loss of one caption as any textbook computes it: the processor's own batch, labels on the answer alone."""
    text = "".join(one["prompt"])
    images = [collator.open_picture(name) for name in one["pictures"]]
    whole = collator.processor(text=[text + answer], images=images, do_resize=False, return_tensors="pt")
    prompt = collator.processor(text=[text], images=images, do_resize=False, return_tensors="pt")
    labels = whole["input_ids"].clone()
    labels[:, : prompt["input_ids"].shape[1]] = -100
    return model(**whole, labels=labels, num_items_in_batch=count, use_cache=False).loss


def gradients(model) -> dict:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_loss_and_gradients_equal_the_plain_forward(train, collator, model, pictures):
    """Guards everything at once: positions, mask, label shift, kept logits. Off by one anywhere, this fails."""
    data = samples(
        train,
        collator,
        about("one.jpg", "a red star"),
        about("one.jpg", "one big star in front of blue"),
        about("one.jpg", "star"),
        about("two.jpg", "a small circle"),
        record("<|vision_start|>two.jpg<|vision_end|>What is it?", "a circle", "And the colour?", "pink"),
    )
    batch = collator(data)
    count = batch["shift_labels"].numel()
    loss = model(**batch, num_items_in_batch=count, use_cache=False).loss
    loss.backward()
    shared = gradients(model)
    plain = sum(plain_loss(model, collator, one, answer, count) for one in data[:2] for answer in one["answers"])
    talk = data[2]  # both its answers are supervised, so the first one is added as a conversation of its own
    plain = plain + plain_loss(model, collator, talk, talk["answers"][0], count)
    first_question = {**talk, "prompt": talk["prompt"][:1]}
    plain = plain + plain_loss(model, collator, first_question, talk["prompt"][1], count)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    plain.backward()
    separate = gradients(model)
    assert shared.keys() == separate.keys() and shared
    assert max((shared[name] - separate[name]).abs().max().item() for name in shared) < 1e-5
    # the negative controls: both mistakes are far outside the tolerance
    causal = torch.ones_like(batch["attention_mask"]).tril()
    assert abs(model(**{**batch, "attention_mask": causal}, num_items_in_batch=count).loss.item() - loss.item()) > 1e-2
    late = {**batch, "logits_to_keep": batch["logits_to_keep"].roll(1, 1)}
    assert abs(model(**late, num_items_in_batch=count).loss.item() - loss.item()) > 1e-2
