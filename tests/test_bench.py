"""bench.py: the comparison is fair, arithmetic and memory are within their targets, tables appear.

What takes an hour (--small with the others' environments) isn't run here.
"""

import json
import subprocess
import sys

import bench
import pytest
import torch
from support.launch import load
from tools import flops, memory, recipes, shapes
from tools.recipes import Run


@pytest.fixture(scope="module")
def train():
    return load("train.py", [])


# ---- A fair comparison


def test_the_documented_recipe_learns_the_same_captions(tmp_path, monkeypatch, train):
    """The recipe's loss is that of train.py's batch, up to the token that ends an answer.

    Otherwise it sees another prompt, image or label, and beating it would prove nothing.
    """
    bench.write_data(tmp_path, 3)
    records = json.loads((tmp_path / "data_1.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(train, "MODEL_FOLDER", str(bench.TINY))
    monkeypatch.setattr(train, "CACHE_FOLDER", str(tmp_path / "cache"))
    processor, config = train.load_processor()
    base = train.Base(processor, config, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    whole = recipes.documented_model(bench.TINY, torch.float32).eval()
    model = train.load_model(base).eval()
    features = train.KeptFeatures(base)
    documented = [recipes.documented_sample(record, processor) for record in records]
    documented = recipes.DocumentedCollator(processor.tokenizer, padding=True)(documented)

    def own_loss() -> float:
        examples = train.read_examples(str(tmp_path / "data_1.json"), base)
        images = [image for example in examples for image in example.images]
        assert train.see_images(images, features, base) == {}
        batch = train.Collator(base, features, model).make_pass(
            train.gather_samples(examples).to_list()
        )
        return model(**train.model_inputs(batch, features.hidden)).loss.item()

    with torch.no_grad():
        theirs = whole(**documented).loss.item()
        ours = own_loss()
        # the recipe ends an answer with <|endoftext|>, the chat template with <|im_end|>
        monkeypatch.setattr(train, "END_OF_TURN", "<|endoftext|>")
        encode = train.encode_prompts.__wrapped__
        monkeypatch.setattr(train, "encode_prompts", encode)
        assert own_loss() == pytest.approx(theirs, abs=1e-4)
    assert abs(ours - theirs) > 1e-3, "the end token is part of the loss"


@pytest.mark.slow
def test_the_small_model_has_the_real_proportions(train):
    """Tower, language layers and head have the shares of a step's arithmetic that the 2B model has.

    Otherwise the table shows what a model of another shape costs: with a tower of a few percent,
    what train.py saves of it could not be seen.
    """

    def shares(shape: dict) -> list[float]:
        step = flops.count_training(train, shape, 1, checkpointing=False)
        seeing = flops.count_seeing(train, shape)
        parts = [seeing.vision, step.language, step.head]
        return [part / sum(parts) for part in parts]

    assert shares(shapes.SMALL) == pytest.approx(shares(shapes.QWEN2_VL_2B), rel=0.03)


def test_swift_is_asked_for_the_same_work():
    """ms-swift gets train.py's adapter, pixels and batches, and both forms of checkpointing."""
    command = recipes.swift_command(Run("ms-swift", checkpointing=False), "data", "model")
    assert "--gradient_checkpointing=false" in command
    assert "--max_pixels=78400" in command
    assert "--lora_rank=64" in command and set(recipes.TARGETS) <= set(command)
    assert "--per_device_train_batch_size=4" in command
    assert "--gradient_accumulation_steps=4" in command


# ---- Arithmetic


@pytest.mark.slow
def test_arithmetic_of_the_real_shape(train):
    """A pass of 4 images stays within its TFLOP: no tower in it, logits only where a label is.

    At most 3.4 with one caption each: 3.2 for their tokens, the rest for padding to a multiple
    of 8.
    """
    shape = shapes.QWEN2_VL_2B
    documented = flops.count_documented(shape, checkpointing=True).total() / 1e12
    single = flops.count_training(train, shape, 1, checkpointing=False)
    shared = flops.count_training(train, shape, 5, checkpointing=False).total() / 1e12
    seeing = flops.count_seeing(train, shape).total() / 1e12
    assert 10.9 < documented < 11.4
    assert single.total() / 1e12 <= 3.4
    assert shared <= 4.7
    assert seeing <= 2.2
    # 4 images, forward and backward
    assert single.head == 4 * 4 * shapes.CAPTION_TOKENS * 1536 * 151936


@pytest.mark.slow
def test_arithmetic_of_the_other_shapes(train):
    """All published shapes can be counted, and more captions cost less than more images."""
    few_layers = {
        name: shapes.make_shallow(shape, layers=3) for name, shape in shapes.PUBLISHED.items()
    }
    rows = flops.flops_table(few_layers)
    assert {row["model"] for row in rows} == set(shapes.PUBLISHED)
    for row in rows:
        assert float(row["TFLOP"]) > 0
    own = [row for row in rows if row["variant"] == "train.py"]
    for single, five in zip(own[0::4] + own[1::4], own[2::4] + own[3::4], strict=True):
        assert float(five["TFLOP"]) < 3 * float(single["TFLOP"])


# ---- Memory


def skip_without_bitsandbytes(four_bits: bool) -> None:
    if four_bits and not memory.has_bitsandbytes:
        pytest.skip("bitsandbytes is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("four_bits", [False, True])
def test_the_trial_pass_announces_what_training_takes(train, four_bits, checkpointing):
    """HeaviestPass.measure is within 2 % of a step's second pass with Adam's numbers there.

    Otherwise BATCH_SIZE = "auto" takes what does not fit, or leaves memory unused.
    """
    skip_without_bitsandbytes(four_bits)
    shape = shapes.make_shallow(shapes.QWEN2_VL_2B, layers=6)
    training = memory.Training(train, shape, four_bits)
    counted = training.count(4, checkpointing)
    assert training.measure(4, checkpointing) == pytest.approx(counted, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("setting", memory.SETTINGS, ids=str)
def test_the_estimate_of_load_model_py(train, setting, monkeypatch):
    """load_model.py's estimate is within 5 % of the bytes that train.py's training takes.

    Otherwise people buy, rent or configure by a table that is wrong. All layers of 7B would take
    minutes.
    """
    script = load("load_model.py", [])
    skip_without_bitsandbytes(setting.four_bits)
    few_layers = shapes.make_shallow(shapes.QWEN2_VL_7B, layers=4)
    monkeypatch.setitem(memory.SHAPES, "Qwen2-VL-7B", few_layers)
    for images in (16,) if setting.model == "Qwen2-VL-2B" else (1, 16):
        counted = memory.count_setting(train, setting, images)
        estimated = memory.estimate_setting(script, setting, images)
        assert estimated == pytest.approx(counted, rel=0.05), images


def test_live_bytes():
    """The counter knows what is alive: views, what is freed, what a graph keeps."""
    with memory.FakeTensorMode(), memory.LiveBytes(learned=0) as live:
        kept = torch.empty(1024, 1024)
        view = kept[:512]
        assert live.now == 4 * 2**20
        kept.requires_grad_()
        product = kept.exp()  # needs its result for the gradient
        twice = product * 2
        del product
        assert live.now == 3 * 4 * 2**20
        del twice
        assert live.now == 4 * 2**20
        del kept
        assert live.now == 4 * 2**20
        del view
        assert live.now == 0
    assert live.peak == 3 * 4 * 2**20


# ---- Tables


def check_run(cost: dict | None) -> None:
    assert cost and cost["steps"] > 1
    for name in ("step", "step_cpu", "first", "rss", "wall", "cpu", "written"):
        assert cost[name] > 0, name


@pytest.mark.slow
def test_the_small_table(tmp_path):
    """train.py trains two epochs from main() to its adapter, and the data path is timed."""
    with bench.workshop(32, shapes.TINY) as folder:
        cost = bench.start(Run("train.py", 5, checkpointing=False), folder)
        rows = bench.measure_data_path(folder / "model")
    check_run(cost)
    assert cost["steps"] == 4
    row = bench.small_row(Run("train.py", 5, checkpointing=False), {**cost, "rounds": 1}, cost)
    assert row["times train.py's"] == "1.0"
    assert {row["what"].split()[0] for row in rows} == {"a", "inspect", "open"}


@pytest.mark.slow
def test_table_for_a_gpu_as_a_dry_run():
    """Each variant trains, is timed and counted, as on a machine with a GPU.

    A run that starts with captions is none of that: it fails, and is not in the table.
    """
    runs = [Run("documented", steps=1, count=True)]
    runs += [Run("train.py", captions=5, batch=8, steps=1, count=True)]
    rows, rate = bench.gpu_table(runs, shape=shapes.TINY, rounds=1)
    assert rate > 0
    names = ("variant", "images per pass", "captions per image", "dtype")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("documented", 4, 1, "float32"),
        ("train.py", 8, 5, "float32"),
    ]
    assert rows[0]["estimate, GiB"] == "-" and float(rows[1]["estimate, GiB"]) >= 0
    for row in rows:
        assert float(row["images/s"]) > 0 and float(row["share of matmul rate"].rstrip("%")) > 0
    captions = float(rows[1]["captions/s"])
    assert captions == pytest.approx(5 * float(rows[1]["images/s"]), abs=0.05)


def test_layouts_for_a_gpu():
    """train.py is measured with 4, 8 and 16 images per pass, with and without checkpointing."""
    runs = [run for run in bench.gpu_runs() if run.variant == "train.py"]
    layouts = {(run.captions, run.batch, run.checkpointing) for run in runs}
    assert layouts == {(c, b, on) for c in (1, 5) for b in (4, 8, 16) for on in (True, False)}
    assert all(run.batch * run.accumulation == recipes.IMAGES_PER_STEP for run in runs)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    """A command that can't work answers with one sentence: no traceback, no empty table."""
    command = [sys.executable, bench.__file__, "--gpu"]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert ended.returncode != 0 and ended.stdout == ""
    last = ended.stderr.strip().splitlines()[-1]
    assert last == "--gpu needs a CUDA GPU, and torch finds none on this machine."
