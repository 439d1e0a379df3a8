"""train.py, model: kept features beside pixels, the adapter, other families, and the hardware."""

import contextlib
import copy
import gc
import json
import re
import shutil
import weakref
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.training import (
    MARKER,
    MODEL,
    about,
    largest_difference,
    make_samples,
    model_inputs,
    open_images,
    plain_captions,
    plain_losses,
    record,
    save_noise,
    take_gradients,
    write_records,
)
from transformers import AutoModelForImageTextToText

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # double precision has none

TALK = record(MARKER.format("two.jpg") + "What is it?", "a circle", "And the colour?", "pink")


@pytest.fixture
def samples(train, exact, image_folder):
    """A function from records about the images of image_folder to samples."""

    def samples(*records: dict) -> list[dict]:
        return make_samples(train, exact, image_folder, *records)

    return samples


@pytest.fixture
def few(samples) -> list[dict]:
    """Three samples: two captions of an image, and a conversation about another one."""
    return samples(about("one.jpg", "a red star"), about("one.jpg", "one star"), TALK)


# ---- Kept features


@pytest.fixture
def seeing_model(train, whole_model):
    """The whole model, the first layer of its tower a matrix product as in the tower's pass."""
    visual = whole_model.get_base_model().model.visual
    convolution = visual.patch_embed
    visual.patch_embed = train.as_matrix_product(convolution.proj).requires_grad_(False)
    yield whole_model
    visual.patch_embed = convolution


def see_in_the_pass(train, exact, samples: list[dict], inputs: dict) -> dict:
    """Return a pass with pixels in place of kept features."""
    images = [image for sample in samples for image in open_images(train, sample)]
    pixels = exact.processor.image_processor(images, do_resize=False, return_tensors="pt")
    tokens = inputs["input_ids"] == exact.processor.image_token_id
    others = {name: value for name, value in inputs.items() if name != "mm_encoder_outputs"}
    return {**others, **pixels, "mm_token_type_ids": tokens.int()}


def test_kept_features_are_the_tower_in_the_pass(train, exact, model, seeing_model, collator, few):
    """Loss and LoRA's gradients are those with the tower in the pass, to the last bit."""
    inputs = model_inputs(collator, collator.make_pass(few))
    loss = model(**inputs).loss
    loss.backward()
    kept = take_gradients(model)
    whole = seeing_model(**see_in_the_pass(train, exact, few, inputs)).loss
    whole.backward()
    seen = take_gradients(seeing_model)
    assert loss.item() == whole.item()
    assert largest_difference(kept, seen) == 0.0
    # as a control: features of the other image are seen at once
    batch = collator.make_pass(few)
    batch["features"] = batch["features"].flip(0)
    assert abs(model(**model_inputs(collator, batch)).loss.item() - loss.item()) > 1e-4


def test_captions_are_those_of_plain_generate(
    train, exact, model, whole_model, collator, samples, image_folder, monkeypatch
):
    """Captions from kept features, in batches of unequal rows, are those of pixels one by one.

    With the adapter, and without it.
    """
    monkeypatch.setattr(train, "MAX_NEW_TOKENS", 12)
    monkeypatch.setattr(train, "IMAGE_SIZE", None)
    monkeypatch.setattr(train, "MAX_PIXELS", 20 * 28 * 28)
    save_noise(image_folder / "wide.jpg", (300, 90))
    both = MARKER.format("one.jpg") + MARKER.format("two.jpg") + "Which is red?"
    data = samples(
        about("one.jpg", "x"),
        about("wide.jpg", "x", "What do you see here?"),
        record(both, "x"),
        TALK,
    )
    plain = plain_captions(train, exact, whole_model, data, limit=12)
    assert len(set(plain)) > 2
    for size in (1, 2, 8):
        monkeypatch.setattr(collator, "batch_size", size)
        found = train.generate_captions(model, collator, data, "Captions")
        assert [caption.text for caption in found] == plain
    with model.disable_adapter(), whole_model.disable_adapter():
        found = train.generate_captions(model, collator, data, "Captions")
        base = plain_captions(train, exact, whole_model, data, limit=12)
    assert [caption.text for caption in found] == base and base != plain


def test_captions_say_whether_they_ended(train, model, collator, few, monkeypatch):
    """One that was cut at MAX_NEW_TOKENS is told from one that ended by itself."""
    ended = []
    with model.disable_adapter():
        for limit in (2, 60):
            monkeypatch.setattr(train, "MAX_NEW_TOKENS", limit)
            [caption] = train.generate_captions(model, collator, few[:1], "Captions")
            ended.append(caption.ended)
            assert "<|" not in caption.text and caption.text == caption.text.strip()
    assert ended == [False, True]


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_captions_are_shared_out_and_come_back_in_order(
    train, model, collator, monkeypatch, processes
):
    """Each process has as many samples as the others, and all get all captions in order."""
    samples = [{"number": number} for number in range(5)]
    monkeypatch.setattr(collator, "batch_size", 2)

    def say_numbers(model, collator, batch: list[dict]) -> list[int]:
        return [sample["number"] for sample in batch]

    def share(index: int) -> list[int]:
        """Caption as one of the processes; returns what it gives to the others."""
        given = []
        state = SimpleNamespace(process_index=index, num_processes=processes)
        monkeypatch.setattr(train, "PartialState", lambda: state)
        monkeypatch.setattr(train, "gather_object", lambda ours: given.extend(ours) or ours)
        train.generate_captions(model, collator, samples, "Captions")
        return given[0]

    monkeypatch.setattr(train, "generate_batch", say_numbers)
    shares = [share(index) for index in range(processes)]
    assert len({len(each) for each in shares}) == 1
    monkeypatch.setattr(train, "gather_object", lambda ours: shares)
    assert train.generate_captions(model, collator, samples, "Captions") == list(range(5))


# ---- The tower's pass


def tower_inputs(train, base, samples: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    images = [image for sample in samples for image in train.images_of(sample)]
    pixels, grids = zip(*(train.prepare_pixels(image, base) for image in images), strict=True)
    return torch.cat(pixels), torch.cat(grids)


def test_the_patch_embedding_is_the_convolution(train, exact, whole_model, few):
    """As a matrix product the tower's first layer gives what its convolution gives."""
    pixels, _ = tower_inputs(train, exact, few)
    pixels = pixels.to(exact.dtype)
    convolution = whole_model.get_base_model().model.visual.patch_embed
    product = train.as_matrix_product(convolution.proj)
    expected = convolution(pixels)
    assert (product(pixels) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_where_images_end_may_be_told_to_the_tower(
    train, exact, samples, image_folder, monkeypatch
):
    """image_cu_seqlens, which spares the GPU 99 waits, changes nothing."""
    monkeypatch.setattr(train, "IMAGE_SIZE", None)
    save_noise(image_folder / "wide.jpg", (300, 90))
    data = samples(about("one.jpg", "x"), about("wide.jpg", "x"), about("two.jpg", "x"))
    pixels, grid = tower_inputs(train, exact, data)
    tower = train.load_tower(exact)
    ends = torch.nn.functional.pad(grid.prod(1).cumsum(0), (1, 0)).int()
    with torch.inference_mode():
        told = tower.get_image_features(pixels, grid, image_cu_seqlens=ends)
        found = tower.get_image_features(pixels, grid)
    for ours, theirs in zip(told.pooler_output, found.pooler_output, strict=True):
        assert torch.equal(ours, theirs)


def test_the_tower_comes_without_language_and_the_language_without_tower(train, base, model):
    """Neither part holds weights of the other. Otherwise both would stand on the GPU."""
    tower = train.load_tower(base)
    assert not hasattr(tower, "language_model") and not tower.training
    whole = AutoModelForImageTextToText.from_pretrained(MODEL)
    count = sum(weight.numel() for weight in whole.model.visual.parameters())
    embeddings = whole.model.language_model.embed_tokens.weight.numel()
    assert sum(weight.numel() for weight in tower.parameters()) <= count + embeddings
    assert not any("visual" in name for name, _ in model.named_parameters())
    plain = dict(whole.named_parameters())
    for name, weight in model.get_base_model().named_parameters():
        if "lora" not in name:
            name = name.replace(".base_layer", "")
            assert torch.equal(weight.float(), plain[name].float()), name


# ---- What is computed


@contextlib.contextmanager
def training_mode(train, model, checkpointing: bool):
    """Put the model into training mode as the Trainer does, without dropout."""
    rates = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            rates[module], module.p = module.p, 0.0
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
        model.eval()
        for module, rate in rates.items():
            module.p = rate


def test_checkpointing_changes_memory_only(train, model, collator, few):
    """With activations recomputed gradients stay the same, and none is lost."""
    inputs = model_inputs(collator, collator.make_pass(few))
    layer = model.get_base_model().model.language_model.layers[0]
    passes = []
    hook = layer.mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    gradients, counts = [], []
    for checkpointing in (False, True):
        passes.clear()
        with training_mode(train, model, checkpointing):
            model(**inputs).loss.backward()
        gradients.append(take_gradients(model))
        counts.append(len(passes))
    hook.remove()
    assert counts == [1, 2], "it does recompute"
    assert largest_difference(*gradients) < 1e-5
    assert all(gradient.any() for gradient in gradients[0].values())


def test_only_labelled_positions_reach_the_head(train, model, collator, few):
    """Logits are computed for learned tokens alone, and nothing of the tower is in the model.

    Otherwise logits of every token would cost half of a step.
    """
    batch = collator.make_pass(few)
    assert not batch["features"].requires_grad
    base = model.get_base_model()
    assert not hasattr(base.model, "visual")
    rows = []
    hook = base.lm_head.register_forward_hook(
        lambda module, inputs, output: rows.append(inputs[0].shape[-2])
    )
    with training_mode(train, model, checkpointing=True):
        model(**model_inputs(collator, batch)).loss.backward()
    hook.remove()
    assert rows == [batch["shift_labels"].numel()] == [int((batch["labels"] != -100).sum())]
    gradients = take_gradients(model)
    assert all("lora" in name for name in gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


class MatrixProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the dtypes of every matrix product, and counts copies to float32."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            self.dtypes.append({arg.dtype for arg in args if isinstance(arg, torch.Tensor)})
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def half(train, base):
    """The model in bfloat16, as on a GPU, and its collator."""
    half = base._replace(dtype=torch.bfloat16)
    model = train.load_model(half)
    return half, model, train.Collator(half, train.KeptFeatures(half), model)


def test_no_matrix_product_in_float32_under_autocast(train, half, image_folder):
    """All products are in bfloat16, though LoRA's weights are float32. Otherwise it is slow."""
    half, model, collator = half
    weights = {name: weight.dtype for name, weight in model.named_parameters()}
    assert {dtype for name, dtype in weights.items() if "lora" in name} == {torch.float32}
    assert {dtype for name, dtype in weights.items() if "lora" not in name} == {torch.bfloat16}
    data = make_samples(train, half, image_folder, about("one.jpg", "a star"), TALK)
    inputs = model_inputs(collator, collator.make_pass(data))
    with MatrixProducts() as products, half.autocast():
        model(**inputs).loss.backward()
    model.zero_grad()
    assert len(products.dtypes) > 50
    assert all(dtypes == {torch.bfloat16} for dtypes in products.dtypes)


def set_cast(model, on: bool) -> list:
    """Switch peft's cast of LoRA's inputs; returns what it was."""
    before = []
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            before.append(module.cast_input_dtype_enabled)
            module.cast_input_dtype_enabled = on
    return before


def test_the_cast_of_lora_inputs_is_off(train, base, half, image_folder):
    """LoRA's inputs are not copied to float32 and back; in float32 this changes nothing."""
    assert not any(set_cast(half[1], False)) and set_cast(half[1], False)
    model = train.load_model(base).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    collator = train.Collator(base, train.KeptFeatures(base), model)
    data = make_samples(train, base, image_folder, about("one.jpg", "a red star"), TALK)
    inputs = model_inputs(collator, collator.make_pass(data))
    found = []
    for cast in (False, True):
        set_cast(model, cast)
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss.item(), take_gradients(model)))
    assert found[0][0] == found[1][0]
    assert largest_difference(found[0][1], found[1][1]) == 0.0


# ---- The adapter


def test_the_adapter_stands_beside_every_target(train, model):
    """Each layer of the language model has LORA_TARGETS, of LORA_RANK, and nothing else learns."""
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    layers = len(model.get_base_model().model.language_model.layers)
    assert len(trained) == 2 * layers * len(train.LORA_TARGETS)
    shapes = {w.shape[0] for name, w in model.named_parameters() if "lora_A" in name}
    assert shapes == {train.LORA_RANK}


def test_a_target_that_no_layer_has_is_named(train, base, monkeypatch):
    """The sentence lists what the layers are called. Otherwise nothing would be learned."""
    monkeypatch.setattr(train, "LORA_TARGETS", ["q_proj", "query"])
    with pytest.raises(SystemExit, match="LORA_TARGETS names query, but .* called .*q_proj"):
        train.load_model(base)


def test_4_bits_without_bitsandbytes_is_one_sentence(train, monkeypatch):
    """The package is optional, and said before anything is loaded."""
    monkeypatch.setattr(train, "LOAD_IN_4BIT", True)
    available = "is_bitsandbytes_available"
    monkeypatch.setattr(train.transformers.utils, available, lambda: True)
    train.load_processor()
    monkeypatch.setattr(train.transformers.utils, available, lambda: False)
    with pytest.raises(SystemExit, match="LOAD_IN_4BIT = True needs bitsandbytes: pip install"):
        train.load_processor()
    monkeypatch.setattr(train, "LOAD_IN_4BIT", False)
    train.load_processor()


def save_adapter(model, folder: Path, base) -> Path:
    """Write an adapter of float32 as train.py does, from a model in double precision."""
    model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({name: weight.float() for name, weight in load_file(path).items()}, path)
    base.processor.save_pretrained(folder)
    return folder


def check_merged(train, base, model, folder: Path, monkeypatch) -> None:
    """Merge the adapter of a model by names, and compare with peft's own merge."""
    monkeypatch.setattr(train, "OUTPUT_FOLDER", str(save_adapter(model, folder / "output", base)))
    merged = folder / "merged"
    merged.mkdir()
    train.merge_adapter(merged)
    originals = {path.name for path in Path(train.MODEL_FOLDER).iterdir() if path.is_file()}
    assert {path.name for path in merged.iterdir()} == originals
    for path in Path(train.MODEL_FOLDER).glob("*.safetensors"):
        ours, theirs = load_file(merged / path.name), load_file(path)
        assert {name: (w.dtype, w.shape) for name, w in ours.items()} == {
            name: (w.dtype, w.shape) for name, w in theirs.items()
        }
        changed = {name for name in ours if not torch.equal(ours[name], theirs[name])}
        assert all(name.split(".")[-2] in train.LORA_TARGETS for name in changed)
        assert not any("visual" in name for name in changed)
    opened, report = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    plain = AutoModelForImageTextToText.from_pretrained(train.MODEL_FOLDER, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, folder / "output").merge_and_unload().state_dict()
    for name, weight in opened.state_dict().items():
        allowed = 0.01 * expected[name].abs().max()  # the files are bfloat16
        assert (weight.float() - expected[name]).abs().max() <= allowed, name


def test_the_merged_folder_is_the_original_with_other_weights(
    train, base, model, tmp_path, monkeypatch
):
    """Files, names and dtypes are the original's own; the weights are peft's own merge."""
    check_merged(train, base, model, tmp_path, monkeypatch)


# ---- Other families


@pytest.fixture(scope="module")
def family_folders(tmp_path_factory):
    """A function from the name of a family to the folder of its small random model."""
    from support.families import make_model

    made = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            made[family] = make_model(family, tmp_path_factory.mktemp("models") / family)
        return made[family]

    return folder_of


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def family(request, train, family_folders, image_folder, tmp_path, monkeypatch):
    """A small random model of another family, in double precision, in every form of it.

    Without tower and with it, with the same adapter, a collator, and samples of unequal images.
    """
    monkeypatch.setattr(train, "MODEL_FOLDER", str(family_folders(request.param)))
    monkeypatch.setattr(train, "IMAGE_SIZE", None)
    monkeypatch.setattr(train, "MAX_PIXELS", 16 * 28 * 28)
    base = train.Base(*train.load_processor(), torch.device("cpu"), torch.float64)
    model = train.load_model(base).eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForImageTextToText.from_pretrained(train.MODEL_FOLDER, dtype=torch.float64)
    whole = PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True).eval()
    save_noise(image_folder / "wide.jpg", (300, 90))
    both = MARKER.format("wide.jpg") + MARKER.format("two.jpg") + "Which is red?"
    data = make_samples(
        train,
        base,
        image_folder,
        about("one.jpg", "a red star"),
        about("one.jpg", "star"),
        about("wide.jpg", "noise"),
        record(both, "neither of them"),
        TALK,
    )
    collator = train.Collator(base, train.KeptFeatures(base), model)
    return SimpleNamespace(
        name=request.param, base=base, model=model, whole=whole, collator=collator, samples=data
    )


def test_families_learn_what_separate_samples_teach(train, family):
    """Kept features and shared prompts give loss and gradients of plain samples with pixels."""
    batch = family.collator.make_pass(family.samples)
    count = batch["shift_labels"].numel()
    inputs = model_inputs(family.collator, batch)
    loss = family.model(**inputs, num_items_in_batch=count).loss
    loss.backward()
    plain = plain_losses(train, family.base, family.whole, family.samples, count)
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    shared, separate = take_gradients(family.model), take_gradients(family.whole)
    assert largest_difference(shared, separate) < 1e-5
    causal = torch.ones_like(inputs["attention_mask"]).tril()
    wrong = family.model(**{**inputs, "attention_mask": causal}, num_items_in_batch=count).loss
    assert abs(wrong.item() - loss.item()) > 1e-3


def test_families_say_what_plain_generate_says(train, family, monkeypatch):
    """Captions from kept features, in one batch, are those of pixels one by one."""
    monkeypatch.setattr(train, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(family.collator, "batch_size", 8)
    found = train.generate_captions(family.model, family.collator, family.samples, "Captions")
    plain = plain_captions(train, family.base, family.whole, family.samples, limit=8)
    assert [caption.text for caption in found] == plain and len(set(plain)) > 2


def test_all_that_the_tower_returns_is_kept(train, family):
    """Qwen3-VL's deepstack features are kept beside the last layer's, each in its place."""
    [image] = train.images_of(family.samples[0])
    rows = family.collator.features.read([image])
    hidden = family.base.config.text_config.hidden_size
    layers = {"qwen2_5_vl": 1, "qwen3_vl": 3}[family.name]
    assert rows.shape == (image.height * image.width // family.base.side**2, layers * hidden)
    pixels, grid = train.prepare_pixels(image, family.base)
    with torch.inference_mode():
        seen = family.whole.get_base_model().model.get_image_features(pixels, grid)
    joined = train.join_features(rows, hidden)["image"]
    expected = [seen.pooler_output[0]]
    found = [joined.pooler_output[0]]
    if layers > 1:
        expected += [layer[0] for layer in seen.deepstack_features]
        found += [layer[0] for layer in joined.deepstack_features]
    assert len(found) == len(expected) == layers
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-9
    assert layers == 1 or (found[0] - found[1]).abs().max() > 1e-3


def test_the_adapter_opens_on_the_whole_model(family):
    """It has no part in the tower, though some towers have layers of the same names."""
    names = [name for name, _ in family.whole.named_parameters() if "lora" in name]
    ours = [name for name, _ in family.model.named_parameters() if "lora" in name]
    assert sorted(names) == sorted(ours) and not any("visual" in name for name in names)


def test_families_are_merged_by_name(train, family, tmp_path, monkeypatch):
    """The merged folder of another family opens whole, with peft's own merge as its weights."""
    check_merged(train, family.base, family.model, tmp_path / "merge", monkeypatch)


# ---- Model folders that can't be used


@pytest.fixture
def model_folder(train, tmp_path, monkeypatch) -> Path:
    """A copy of the small model as MODEL_FOLDER."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    monkeypatch.setattr(train, "MODEL_FOLDER", str(folder))
    return folder


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **values}), encoding="utf-8")


@pytest.mark.parametrize("model_type", ["qwen3_5", "llama", "qwen2_5_omni", 7])
def test_other_types_of_models_are_refused(train, model_folder, model_type):
    """One sentence names what it is and which work. Otherwise captions would see each other."""
    change_config(model_folder, model_type=model_type)
    with pytest.raises(SystemExit) as stopped:
        train.load_processor()
    sentence = str(stopped.value)
    assert sentence.startswith(f"{model_folder} can't be used: it is a {model_type} model. ")
    assert "Qwen2-VL, Qwen2.5-VL, Qwen3-VL" in sentence


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("name", ["Qwen2-VL-2B-Instruct-AWQ", "Qwen2-VL-2B-Instruct-GPTQ-Int4"])
def test_quantised_models_are_refused(train, model_folder, monkeypatch, key, name):
    """One sentence names the way: the plain model by its name, and LOAD_IN_4BIT."""
    change_config(model_folder, **{key: {"quant_method": "awq", "bits": 4}})
    with pytest.raises(SystemExit, match="is quantised .* Take the one it was made from"):
        train.load_processor()
    quantised = model_folder.rename(model_folder.with_name(name))
    monkeypatch.setattr(train, "MODEL_FOLDER", str(quantised))
    plain = re.escape(str(quantised.with_name("Qwen2-VL-2B-Instruct")))
    with pytest.raises(SystemExit, match=f"is quantised .* Take {plain} .*LOAD_IN_4BIT"):
        train.load_processor()


DAMAGED = {
    "no folder": lambda folder: shutil.rmtree(folder),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "half a config": lambda folder: (folder / "config.json").write_text('{"model_type": "qwen2'),
    "a list": lambda folder: (folder / "config.json").write_text("[]"),
    "half a tokenizer": lambda folder: (folder / "tokenizer.json").write_text('{"version": '),
    "half a preprocessor": lambda folder: (folder / "preprocessor_config.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_model_folder_is_one_sentence(train, model_folder, damage):
    """It names the folder and load_model.py, which repairs it."""
    DAMAGED[damage](model_folder)
    with pytest.raises(SystemExit, match="can't be used: .*Run load_model.py, or set MODEL_FOLDER"):
        train.load_processor()


def without_weights(path: Path, part: str) -> None:
    weights = load_file(path)
    save_file({name: w for name, w in weights.items() if part not in name}, path, {"format": "pt"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100_000])


FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("load", ["load_model", "load_tower"])
@pytest.mark.parametrize("file", FILES)
def test_cut_weights_are_one_sentence(train, base, model_folder, file, load):
    """load_model.py repairs them, and the sentence says so."""
    cut(model_folder / file)
    with pytest.raises(SystemExit, match="doesn't load: .*Run load_model.py again"):
        getattr(train, load)(base)


def test_missing_weights_are_one_sentence(train, base, model_folder):
    """A weight that no file holds is named. Otherwise it would be random."""
    for file in FILES:
        without_weights(model_folder / file, "layers.1.mlp.up_proj")
    index = model_folder / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    names = content["weight_map"]
    content["weight_map"] = {n: f for n, f in names.items() if "layers.1.mlp.up_proj" not in n}
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit, match="lacks weights .*layers.1.mlp.up_proj.*Run load_model.py"):
        train.load_model(base)


@pytest.mark.parametrize("load", ["load_model", "load_tower", "load_weights"])
def test_weights_without_a_place_are_one_sentence(train, base, model_folder, load):
    """What the model's description does not name is another model's. Otherwise it is left out."""
    path = model_folder / FILES[0]
    tensors = load_file(path)
    tensors["model.stranger.weight"] = torch.zeros(1)
    save_file(tensors, path, {"format": "pt"})
    index = model_folder / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"]["model.stranger.weight"] = path.name
    index.write_text(json.dumps(content), encoding="utf-8")
    arguments = (base, model_folder) if load == "load_weights" else (base,)
    with pytest.raises(SystemExit, match="no place for .*stranger.*Run load_model.py"):
        getattr(train, load)(*arguments)


def test_the_merged_model_is_proven_in_4_bits_where_the_training_was(train, base, monkeypatch):
    """A GPU that trains 7B in 4 bits has no room for it in 16. Otherwise merged/ never comes."""
    asked = []
    monkeypatch.setattr(train, "LOAD_IN_4BIT", True)
    monkeypatch.setattr(train, "load_tables", lambda: {"test": []})
    monkeypatch.setattr(train, "see_again", lambda *_: None)

    def load(*_, **options):
        asked.append(options["quantization_config"])
        raise GPU_ERRORS[0]

    monkeypatch.setattr(train.AutoModelForImageTextToText, "from_pretrained", load)
    for attempt in (lambda: train.prove_merged(MODEL, base), lambda: train.load_model(base)):
        with pytest.raises(SystemExit, match="The GPU can't take the model"):
            attempt()
    merged, trained = asked
    assert merged.load_in_4bit and merged.to_dict() == trained.to_dict()


@pytest.mark.parametrize("use", ["CAPTION", "SAVE_MERGED"])
def test_a_gpu_without_room_for_captions_is_one_sentence(train, base, tmp_path, monkeypatch, use):
    """The adapter is trained by then, and the advice is what helps. Otherwise: a traceback."""
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(train, "OUTPUT_FOLDER", str(tmp_path))
    monkeypatch.setattr(train, use, "images" if use == "CAPTION" else True)

    def fail(*_):
        raise GPU_ERRORS[0]

    monkeypatch.setattr(train, "caption_images", fail)
    monkeypatch.setattr(train, "save_merged", fail)
    with pytest.raises(SystemExit, match="The GPU can't take the captions .*BATCH_SIZE = 1"):
        train.use_result(base)


GPU_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
    torch.AcceleratorError("CUDA error: no kernel image is available for execution\nhint"),
]


@pytest.mark.parametrize("error", GPU_ERRORS)
@pytest.mark.parametrize("load", ["load_model", "load_tower"])
def test_errors_of_the_gpu_are_never_called_damage(train, base, monkeypatch, error, load):
    """A GPU that others fill is said to be so, and any other error stays what it is.

    Otherwise people download gigabytes for nothing.
    """

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(train.AutoModelForImageTextToText, "from_pretrained", fail)
    with pytest.raises((SystemExit, type(error))) as stopped:
        getattr(train, load)(base)
    sentence = str(stopped.value)
    if "out of memory" in str(error):
        assert sentence.startswith("The GPU can't take the model (CUDA out of memory")
        assert "nvidia-smi" in sentence and "\n" not in sentence
    else:
        assert stopped.value is error
    assert "load_model.py" not in sentence


@pytest.mark.parametrize("where", ["to the GPU", "in the pass"])
def test_a_gpu_without_room_for_the_tower_is_one_sentence(
    train, base, image_folder, tmp_path, monkeypatch, where
):
    """The advice fits the tower: other programs, or TOWER_BATCH."""
    monkeypatch.setattr(train, "CACHE_FOLDER", str(tmp_path / "cache"))

    def fail(*_, **__):
        raise GPU_ERRORS[0]

    if where == "to the GPU":
        monkeypatch.setattr(torch.nn.Module, "to", fail)
    else:
        monkeypatch.setattr(train, "see_batch", fail)
    image = train.inspect_image(str(image_folder / "one.jpg"), base.side)
    with pytest.raises(
        SystemExit, match="The GPU can.t take the vision tower .CUDA out .*TOWER_BATCH"
    ):
        train.see_images([image], train.KeptFeatures(base), base)


def test_an_earlier_model_is_gone_when_the_next_one_loads(train, base, monkeypatch):
    """Its collator knows itself. Otherwise both stand on the GPU, which has room for one."""
    model = train.load_model(base)
    collator = train.Collator(base, train.KeptFeatures(base), model)
    earlier = weakref.ref(model.get_base_model().model)
    found = []

    def load(*_, **__):
        found.append(earlier())
        raise GPU_ERRORS[0]

    monkeypatch.setattr(train.AutoModelForImageTextToText, "from_pretrained", load)
    gc.collect()
    gc.disable()
    try:
        del model, collator
        with pytest.raises(SystemExit):
            train.load_model(base)
    finally:
        gc.enable()
    assert found == [None]


# ---- Hardware


@pytest.fixture
def fake_gpu(monkeypatch):
    """torch as it would be on a machine with an H100; a test takes away what it needs."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in {
        "init": None,
        "get_device_capability": (9, 0),
        "get_arch_list": ["sm_75", "sm_80", "sm_90a", "sm_100f", "compute_120"],
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "mem_get_info": (70 * 2**30, 80 * 2**30),
        "memory_reserved": 2**30,
        "is_bf16_supported": True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)


@pytest.fixture
def state(train, monkeypatch) -> list[dict]:
    """What PartialState was asked for, in place of one that would look for a GPU."""
    asked = []

    def start(**options):
        asked.append(options)
        return SimpleNamespace(device=torch.device("cpu" if options.get("cpu") else "cuda", None))

    monkeypatch.setattr(train, "PartialState", start)
    return asked


@pytest.fixture
def large_config(base):
    """The configuration of a model with more than 200 million parameters."""
    config = copy.deepcopy(base.config)
    config.text_config.hidden_size = config.vision_config.hidden_size = 1536
    config.text_config.intermediate_size = 8960
    config.text_config.vocab_size = 151_936
    return config


def without_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)


def failing_start(text: str):
    def change(monkeypatch):
        def fail():
            raise RuntimeError(text)

        monkeypatch.setattr(torch.cuda, "init", fail)

    return change


def old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100-SXM2-16GB")


NO_GPU = {
    "a torch without CUDA": (without_cuda, ["this torch has no CUDA", "cu126"]),
    "a driver too old": (
        failing_start("The NVIDIA driver on your system is too old (found version 12080)."),
        ["the driver is too old for CUDA 13.0", "580", "cu126"],
    ),
    "no driver": (
        failing_start("Found no NVIDIA driver on your system. Please check that you have one."),
        ["torch finds none (Found no NVIDIA driver on your system)", "nvidia-smi"],
    ),
    "no GPU": (
        failing_start("No CUDA GPUs are available"),
        ["torch finds none (No CUDA GPUs are available)", "nvidia-smi"],
    ),
    "a GPU too old": (
        old_gpu,
        ["Tesla V100-SXM2-16GB (sm_70) is older than this torch supports (sm_75", "cu126"],
    ),
}


def test_who_has_the_older_build_is_not_told_to_install_it(train, fake_gpu, monkeypatch):
    """Only a newer driver helps then."""
    failing_start("The NVIDIA driver on your system is too old (found version 11040).")(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert train.why_no_gpu() == "the driver is too old for CUDA 12.6. Update it"


@pytest.mark.parametrize("what", NO_GPU)
def test_why_no_gpu_is_used_is_said(
    train, base, large_config, fake_gpu, state, what, monkeypatch, capsys
):
    """Each cause has its sentence; a large model stops there, a small one trains on the CPU.

    Otherwise a model of two billion parameters starts on a CPU, and runs for days.
    """
    change, expected = NO_GPU[what]
    change(monkeypatch)
    reason = train.why_no_gpu()
    for part in expected:
        assert part in reason
    with pytest.raises(SystemExit) as stopped:
        train.choose_hardware(large_config)
    assert str(stopped.value).startswith(f"No usable GPU: {reason}. ")
    assert 'DEVICE = "cpu"' in str(stopped.value) and state == []
    device, dtype = train.choose_hardware(base.config)
    assert (device.type, dtype) == ("cpu", torch.float32)
    said = capsys.readouterr().out
    assert "on the CPU in float32" in said and reason in said


def test_device_cpu_starts_a_large_model_all_the_same(
    train, large_config, fake_gpu, state, monkeypatch, capsys
):
    """DEVICE = "cpu" is obeyed, on a machine with a GPU as well."""
    monkeypatch.setattr(train, "DEVICE", "cpu")
    device, dtype = train.choose_hardware(large_config)
    assert (device.type, dtype) == ("cpu", torch.float32) and state[0]["cpu"]
    said = capsys.readouterr().out
    assert "on the CPU in float32" in said and "as DEVICE says" in said


@pytest.mark.parametrize("bfloat16", [True, False])
def test_a_gpu_is_used_with_its_own_precision(
    train, large_config, fake_gpu, state, monkeypatch, capsys, bfloat16
):
    """bfloat16 where the GPU has it, float16 elsewhere; cuDNN's attention is off; it is said."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        device, dtype = train.choose_hardware(large_config)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert train.why_no_gpu() == "" and device.type == "cuda"
    assert dtype == (torch.bfloat16 if bfloat16 else torch.float16)
    said = capsys.readouterr().out
    assert said == f"NVIDIA H100 80GB HBM3, {dtype}, 71.0 GiB free.\n"
    # one process may check data for longer than NCCL's own 10 minutes
    assert state[0]["timeout"] > timedelta(hours=1)


@pytest.mark.parametrize(
    "reason", ["out of memory", "all CUDA-capable devices are busy or unavailable"]
)
def test_a_gpu_that_others_use_is_one_sentence(
    train, large_config, fake_gpu, state, monkeypatch, reason
):
    """Where not even its context fits, the first call fails: the sentence says what to close."""

    def fail():
        raise torch.AcceleratorError(f"CUDA error: {reason}\nCUDA kernel errors might be")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    sentence = f"The GPU can't take this script .CUDA error: {reason}.*Close other programs"
    with pytest.raises(SystemExit, match=sentence):
        train.choose_hardware(large_config)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK or WORLD_SIZE is set, but not LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "RANK or WORLD_SIZE is set, but not LOCAL_RANK"),
        ({"RANK": "1"}, "RANK or WORLD_SIZE is set, but not LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}, "can't be shared by 3 processes"),
    ],
)
def test_a_launch_that_would_wait_for_ever_is_refused(train, monkeypatch, variables, sentence):
    """Half a launcher's variables, or images that can't be shared evenly, are one sentence."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # found out when the module is imported
    monkeypatch.setattr(train, "IS_MAIN", variables.get("RANK", "0") == "0")
    with pytest.raises(SystemExit, match=sentence):
        train.check_launcher()


@pytest.mark.parametrize("processes", [None, "1", "2", "16"])
def test_a_launch_that_works_is_accepted(train, monkeypatch, processes):
    """One process, and numbers of processes that share IMAGES_PER_STEP evenly."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
        if processes:
            monkeypatch.setenv(name, processes if name == "WORLD_SIZE" else "0")
    train.check_launcher()


# ---- float16


@pytest.mark.parametrize("fault", ["nothing", "loss", "gradient"])
def test_numbers_that_float16_cannot_hold_are_found(train, model, collator, few, fault):
    """A loss or a gradient that is not finite shows before the first step; nothing of it stays."""
    layer = model.get_base_model().model.language_model.layers[1]
    weight = next(each for each in model.parameters() if each.requires_grad)
    hook = None
    if fault == "loss":
        hook = layer.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    if fault == "gradient":
        hook = weight.register_hook(lambda gradient: gradient * float("nan"))
    try:
        assert train.overflows(model, collator, few[0]) == (fault != "nothing")
    finally:
        model.eval()
        if hook:
            hook.remove()
    assert all(weight.grad is None for weight in model.parameters())


def test_float32_takes_the_place_of_float16_from_the_beginning(
    train, base, image_folder, tmp_path, monkeypatch, capsys
):
    """Where float16 overflows, features, model and later captions are made in float32.

    Otherwise the numbers that overflowed in the tower would be learned from.
    """
    path = write_records(image_folder / "data.json", about("one.jpg", "x"), about("two.jpg", "y"))
    folder = tmp_path / "output"
    folder.mkdir()
    for name, value in (("DATA_JSON", str(path)), ("OUTPUT_FOLDER", str(folder))):
        monkeypatch.setattr(train, name, value)
    made, used = [], []
    monkeypatch.setattr(train, "overflows", lambda model, collator, sample: True)
    monkeypatch.setattr(train, "announce", lambda tables, trainer: None)
    monkeypatch.setattr(train, "train_and_watch", lambda *_: None)

    def build_trainer(model, collator, tables, run, checkpoint):
        made.append((model, collator, run))
        return SimpleNamespace(add_callback=lambda callback: None)

    monkeypatch.setattr(train, "build_trainer", build_trainer)
    half = base._replace(dtype=torch.float16)
    train.train_adapter(half, train.describe_run(), stopper=None)
    [(model, collator, run)] = made
    assert "float16 can't hold this model's numbers" in capsys.readouterr().out
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert collator.base.dtype == collator.features.dtype == torch.float32
    for example in train.read_examples(str(path), base):
        assert all(map(collator.features.holds, example.images))
    monkeypatch.setattr(train, "CAPTION", "one.jpg")
    monkeypatch.setattr(train, "caption_images", lambda base, run: used.append(base.dtype))
    train.use_result(half)
    train.use_result(half._replace(dtype=torch.bfloat16))
    assert used == [torch.float32, torch.bfloat16]


# ---- Questions of one's own, after the training


def test_every_csv_that_excel_writes_is_read(train, tmp_path, monkeypatch):
    """CAPTION takes semicolons and tabs as csv2json.py does, and says what to do about GBK."""
    table = tmp_path / "table.csv"
    monkeypatch.setattr(train, "CAPTION", str(table))
    for separator in ",;\t":
        rows = f"image_path{separator}question\none.jpg{separator}图中有什么？\n"
        table.write_text(rows, encoding="utf-8-sig")
        [request] = train.read_requests()
        assert (request.name, request.question) == ("one.jpg", "图中有什么？")
    table.write_text(rows, encoding="gbk")
    with pytest.raises(SystemExit, match="can't be read.*'CSV UTF-8'"):
        train.read_requests()


def test_questions_of_a_csv_may_not_forge_a_turn(train, tmp_path, monkeypatch):
    """A question is text. Otherwise a row would end the captions of all others in a traceback."""
    table = tmp_path / "table.csv"
    monkeypatch.setattr(train, "CAPTION", str(table))
    rows = 'image_path,question\none.jpg," What colour, please? "\nsub\\two.jpg,\n'
    table.write_text(rows, encoding="utf-8-sig")
    one, two = train.read_requests()
    assert (one.name, one.question) == ("one.jpg", "What colour, please?")
    assert (two.path, two.question) == (str(tmp_path / "sub/two.jpg"), "")
    table.write_text(rows + "three.jpg,Is it?<|im_end|>\n", encoding="utf-8")
    with pytest.raises(
        SystemExit, match="three.jpg, row 3, can't be asked: it contains <.im_end.>"
    ):
        train.read_requests()


TABLES = {
    "Image_Path,question\none.jpg,\n": "has the columns .*There must be one image_path",
    "image_path,Question\none.jpg,Red?\n": "has the columns .*perhaps one question",
    "image_path,question,question\none.jpg,Red?,Blue?\n": "has the columns .*perhaps one question",
    "image_path,question\none.jpg,Is it red, or blue?\n": "row 1, can't be asked: put text with",
    'image_path,question\none.jpg,"Red?\ntwo.jpg,\n': "row that begins on line 2: .*a quote",
}


@pytest.mark.parametrize("table", TABLES)
def test_a_csv_that_says_something_else_is_refused(train, tmp_path, monkeypatch, table):
    """As csv2json.py refuses it. Otherwise questions are lost or cut without a word."""
    path = tmp_path / "table.csv"
    path.write_text(table, encoding="utf-8")
    monkeypatch.setattr(train, "CAPTION", str(path))
    with pytest.raises(SystemExit, match=TABLES[table]):
        train.read_requests()


def test_paths_of_a_csv_are_those_of_the_json(train, tmp_path, monkeypatch, capsys):
    """Blanks at the ends go, and other computers are asked for nothing: such rows are named."""
    path = tmp_path / "table.csv"
    rows = "one.jpg ,\n//host/share/two.jpg,\nhttp://host/three.jpg,\n,\nfour.jpg,\u200b\n"
    path.write_text("image_path,question\n" + rows, encoding="utf-8")
    monkeypatch.setattr(train, "CAPTION", str(path))
    found = [(request.path, request.question) for request in train.read_requests()]
    assert found == [(str(tmp_path / "one.jpg"), ""), (str(tmp_path / "four.jpg"), "")]
    printed = capsys.readouterr().out
    assert printed.count("Left out: row ") == 3
    assert "row 2 //host/share/two.jpg is an address" in printed
    assert "row 4 names an image whose path is empty" in printed


def test_unfinished_captions_are_those_that_process_0_found(
    train, base, image_folder, tmp_path, monkeypatch
):
    """It deletes the file in the end. Otherwise a slower process captions alone, and never ends."""
    path = str(image_folder / "one.jpg")
    for name, value in {
        "OUTPUT_FOLDER": tmp_path,
        "CACHE_FOLDER": tmp_path,
        "CAPTION": path,
    }.items():
        monkeypatch.setattr(train, name, str(value))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    found = {train.Request(path, path, "", train.inspect_image(path, base.side).digest): "a star"}
    monkeypatch.setattr(train, "load_model", lambda base, adapter: None)
    monkeypatch.setattr(train, "Collator", lambda *_: SimpleNamespace(batch_size=1))
    monkeypatch.setattr(train, "generate_captions", lambda *_: pytest.fail("captioned again"))
    monkeypatch.setattr(
        train, "broadcast_object_list", lambda ours: ours if isinstance(ours[0], list) else [found]
    )
    train.caption_images(base, {"question": f"{MARKER}What is it?"})
    assert (tmp_path / "captions.csv").read_text("utf-8").endswith(f"{path},,a star\n")


def test_captions_of_another_adapter_or_setting_are_made_anew(train, base, tmp_path, monkeypatch):
    """captions.part holds what an interrupted start made. Otherwise old captions would be mixed in.

    An image that has changed is another one, too.
    """
    monkeypatch.setattr(train, "OUTPUT_FOLDER", str(tmp_path))
    adapter = tmp_path / "adapter_model.safetensors"
    adapter.write_bytes(b"one")
    features = train.KeptFeatures(base)
    request = train.Request("one.jpg", "/one.jpg", "", "digest")
    key = train.hash_settings(features)
    part = tmp_path / "captions.part"
    train.save_json(part, {"key": key, "captions": [(request, "a star")]})
    assert train.read_unfinished(part, train.hash_settings(features)) == {request: "a star"}
    assert request._replace(digest="another") not in train.read_unfinished(part, key)
    keys = {key}
    for name, value in {"MAX_NEW_TOKENS": 3, "LOAD_IN_4BIT": True}.items():
        with monkeypatch.context() as patch:
            patch.setattr(train, name, value)
            keys.add(train.hash_settings(features))
    adapter.write_bytes(b"two")
    keys.add(train.hash_settings(features))
    assert len(keys) == 4 and train.read_unfinished(part, train.hash_settings(features)) == {}
    part.write_text("[1]", encoding="utf-8")
    assert train.read_unfinished(part, key) == {}


def test_a_question_about_several_images_is_not_asked_about_one(
    train, base, image_folder, monkeypatch
):
    """The sentence says what to do. Otherwise the first caption ends in a traceback."""
    monkeypatch.setattr(train, "CAPTION", str(image_folder / "one.jpg"))
    with pytest.raises(SystemExit, match="The training asked about several images at once"):
        train.caption_images(base, {"question": f"{MARKER}{MARKER} The same?"})
