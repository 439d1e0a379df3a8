"""train.py on a real GPU: what no CPU can show. Ends within 8 minutes on one.

    python -m pytest tests/test_gpu.py -s

Needs a CUDA GPU with 16 GB, 10 GB of disk and 12 GB of memory. The model has the shape of
Qwen2-VL-2B and random weights, the images are scenes. Without a GPU all of it is skipped.

What was tried, and what was not: nobody has run this file on a GPU yet. Each test was run on a CPU
with a small model (REHEARSE_GPU=1 does that, see Place; tests/test_gpu_rehearsal.py keeps it so),
which takes every branch here and in train.py but those inside CUDA. There the counts of memory are
those of a counter for CPU tensors, float16 is bfloat16, no synchronisation is ever reported, and
numbers are not compared with the GPU's limits. Not tried anywhere: CUDA's allocator and attention
kernels, cuDNN, GradScaler, bitsandbytes' CUDA kernels, and whether the limits below are right.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import bench
import pytest
import torch
from conftest import command, variables
from support.launch import load
from tools import memory, shapes
from tools.recipes import Run

REHEARSAL = os.environ.get("REHEARSE_GPU") == "1"
has_gpu = torch.cuda.is_available() and not REHEARSAL
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (has_gpu or REHEARSAL), reason="there is no CUDA GPU"),
]


class Place(NamedTuple):
    """Where the tests run: on a GPU with the real shape, or as a rehearsal on a CPU."""

    device: torch.device
    dtype: torch.dtype
    shape: dict
    half: torch.dtype  # of the test of float16, which no CPU trains in
    images: int  # of a pass


if has_gpu:
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    PLACE = Place(torch.device("cuda"), dtype, shapes.QWEN2_VL_2B, torch.float16, 4)
else:
    PLACE = Place(torch.device("cpu"), torch.float32, shapes.TINY, torch.bfloat16, 2)


class Meter:
    """Measures the memory of a GPU; in a rehearsal, of the tensors that are made on the CPU."""

    def __init__(self) -> None:
        self.live = None
        self.before = 0  # bytes that were taken before

    @contextlib.contextmanager
    def running(self) -> Iterator["Meter"]:
        gc.collect()  # a Trainer of the test before holds itself
        if has_gpu:
            torch.cuda.empty_cache()
            self.before = torch.cuda.memory_allocated()
            self.reset()
            yield self
        else:
            with memory.LiveBytes(learned=0) as self.live:
                yield self

    def reset(self) -> None:
        if has_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.live.peak = self.live.now

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if has_gpu else self.live.peak


@contextlib.contextmanager
def synchronisations() -> Iterator[list]:
    """Collect a warning for each moment at which the CPU waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if has_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            if has_gpu:
                torch.cuda.set_sync_debug_mode("default")


def count_synchronisations(caught: list) -> int:
    return sum("synchronizing" in str(warning.message) for warning in caught)


@pytest.fixture(scope="session")
def workshop() -> Iterator[Path]:
    """A folder with the model, 48 images and their captions."""
    with bench.workshop(47, PLACE.shape) as folder:
        yield folder


@pytest.fixture
def train(workshop, tmp_path, monkeypatch):
    """The script as a module, with the model of the workshop."""
    module = load("train.py", [])
    module.quiet_libraries()
    monkeypatch.chdir(tmp_path)
    module.MODEL_FOLDER = str(workshop / "model")
    module.DATA_JSON = str(workshop / "data_5.json")
    module.CACHE_FOLDER = str(tmp_path / "cache")
    module.TEST_IMAGES = 4
    module.SWANLAB_MODE = "disabled"
    return module


@pytest.fixture
def base(train):
    """Processor, shape, device and precision, as main() chooses them on a GPU."""
    processor, config = train.load_processor()
    device, dtype = train.choose_hardware(config)
    assert (device.type, dtype) == (PLACE.device.type, PLACE.dtype)
    return train.Base(processor, config, device, dtype)


@pytest.fixture
def sample(train, base):
    """An image with five captions as long as COCO's: 190 tokens, a row of 192."""
    made_up = make_base_with_ids(train, base)
    return shapes.make_sample(train, made_up, 5)


def make_base_with_ids(train, base):
    """Return a base whose processor says what make_sample asks for."""
    made_up = shapes.make_base(train, PLACE.shape, "cpu", base.dtype)
    made_up.processor.image_token_id = base.processor.image_token_id
    made_up.config.vision_start_token_id = base.config.vision_start_token_id
    return made_up


def make_trainer(train, base, sample, folder, images: int):
    """Return train.py's Trainer for passes of so many images, its model on the GPU."""
    model = train.load_model(base)
    trainer = memory.build_trainer(train, base, model, [sample] * images, str(folder))
    trainer.data_collator.batch_size = images
    return trainer


def make_massive(model: torch.nn.Module) -> None:
    """Let every attention score be near -140: such rows make cuDNN's gradients NaN.

    The models have this by themselves, in a few heads. The dimension is one that rotary embeddings
    hardly turn, so that the scores are alike at all distances.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        for projection, sign in ((attention.q_proj, 1), (attention.k_proj, -1)):
            bias = projection.base_layer.bias.data.view(-1, attention.head_dim)
            bias[:, attention.head_dim // 2 - 1] = 40.0 * sign


def trained_gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.requires_grad]


def test_gradients_are_finite_where_cudnn_gives_nan(train, base, sample, tmp_path):
    """At 192 tokens (64 mod 128) with massive activations, loss and gradients are finite.

    cuDNN's attention, which an H100 would take by itself, gives NaN there (pytorch#196678).
    """
    trainer = make_trainer(train, base, sample, tmp_path, PLACE.images)
    make_massive(trainer.model.get_base_model())
    batch = trainer.data_collator.make_pass([sample] * PLACE.images)
    assert batch["input_ids"].shape[1] % 128 == 64
    trainer.try_pass([sample] * PLACE.images)
    gradients = trained_gradients(trainer.model)
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    if has_gpu:
        assert not torch.backends.cuda.cudnn_sdp_enabled()


def estimate(base, images: int, checkpointing: bool) -> float:
    """Return the GiB that load_model.py announces for five captions per image."""
    script = load("load_model.py", [])
    with torch.device("meta"):
        model = memory.AutoModelForImageTextToText.from_config(base.config, dtype=torch.bfloat16)
    return script.training_memory(model, images, checkpointing)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("images", [1, 4])
def test_memory_is_as_estimated(train, base, sample, tmp_path, images, checkpointing):
    """The peak of a step's second pass and of Adam is within 10 % of load_model.py's estimate."""
    expected = estimate(base, images, checkpointing)
    meter = Meter()
    with meter.running():
        trainer = make_trainer(train, base, sample, tmp_path, images)
        train.HeaviestPass(trainer).set_checkpointing(checkpointing)
        for _ in range(2):
            meter.reset()
            for _ in range(2):
                trainer.try_pass([sample] * images)
            trainer.optimizer.step()
            trainer.model.zero_grad()
        peak = meter.peak()
        announced = measure(train, trainer, meter, images)
    own = (peak - meter.before) / 2**30
    print(f"{images} images, checkpointing {checkpointing}: estimate {expected:.2f} GiB, ", end="")
    print(f"measured {own:.2f}, {announced / peak:.1%} of it announced before training")
    assert own > 0
    assert announced == pytest.approx(peak, rel=0.03)
    if has_gpu:
        assert own == pytest.approx(expected, rel=0.1)


def measure(train, trainer, meter: Meter, images: int) -> int:
    """Return the bytes that train.py's own trial announces."""
    reset_peak, peak_memory = train.reset_peak, train.peak_memory
    if not has_gpu:
        train.reset_peak, train.peak_memory = meter.reset, meter.peak
    try:
        return train.HeaviestPass(trainer).measure(images)
    finally:
        train.reset_peak, train.peak_memory = reset_peak, peak_memory


def test_batch_size_auto_fits_and_fills(train, base, sample, tmp_path, monkeypatch):
    """Of 1 to 16 images per pass "auto" takes the most that fit: twice as many would not."""
    trainer = make_trainer(train, base, sample, tmp_path, 16)
    trial = train.HeaviestPass(trainer)
    meter = Meter()
    with meter.running():
        if not has_gpu:
            monkeypatch.setattr(train, "reset_peak", meter.reset)
            monkeypatch.setattr(train, "peak_memory", meter.peak)
        trial.set_checkpointing(False)
        peaks = {size: trial.measure(size) for size in (1, 2, 4, 8)}
        # between what 4 and 8 images take
        limit = (peaks[4] + peaks[8]) / 2
        size, checkpointing = trial.choose(limit, 16)
        assert (size, checkpointing) == (4, False)
        # not even two images fit: recompute, which takes less
        trial.set_checkpointing(True)
        recomputed = trial.measure(2)
        limit = (max(recomputed, peaks[1]) + peaks[2]) / 2
        size, checkpointing = trial.choose(limit, 16)
        assert checkpointing and size >= 2
        trial.set_checkpointing(checkpointing)
        assert trial.measure(size) <= limit
    print({size: f"{peak / 2**30:.2f} GiB" for size, peak in peaks.items()})


def test_float16_trains_or_says_so(train, base, sample, tmp_path):
    """On a GPU without bfloat16: float16 where loss and gradients stay finite, else float32."""
    base = base._replace(dtype=PLACE.half)
    model = train.load_model(base)
    collator = memory.build_collator(train, base, model)
    overflowed = train.overflows(model, collator, sample)
    print(f"{PLACE.half} overflows: {overflowed}")
    del model, collator
    if overflowed:
        base = base._replace(dtype=torch.float32)
    trainer = make_trainer(train, base, sample, tmp_path, PLACE.images)
    scaler = trainer.accelerator.scaler
    assert (scaler is not None) == (base.dtype == torch.float16)
    batch = trainer.data_collator([sample] * PLACE.images)
    batch = train.send_to_device(batch, base.device)
    loss = trainer.training_step(trainer.model_wrapped, batch, batch["labels"].numel())
    assert loss.isfinite()


def test_4_bits(train, base, sample, tmp_path, monkeypatch):
    """LOAD_IN_4BIT stores the language layers in a third of the memory, and trains."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # on a CPU it would pack weights for prediction, and can't train on after that
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    plain = train.load_model(base).get_base_model().model.language_model.layers
    whole = sum(p.nbytes for name, p in plain.named_parameters() if "lora" not in name)
    del plain
    monkeypatch.setattr(train, "LOAD_IN_4BIT", True)
    trainer = make_trainer(train, base, sample, tmp_path, PLACE.images)
    layers = trainer.model.get_base_model().model.language_model.layers
    small = sum(p.nbytes for name, p in layers.named_parameters() if "lora" not in name)
    assert small < whole / 3
    trainer.try_pass([sample] * PLACE.images)
    assert all(gradient.isfinite().all() for gradient in trained_gradients(trainer.model))


def test_the_gpu_is_not_waited_for(train, base, sample, tmp_path):
    """A step waits for the GPU where it has to, and nowhere else.

    Per pass twice, as the tokens with a label are looked up in both directions; per step where
    loss and gradient are looked at, and where the clip is computed.
    """
    trainer = make_trainer(train, base, sample, tmp_path, 2 * PLACE.images)
    trainer.data_collator.batch_size = PLACE.images
    batch = trainer.data_collator([sample] * 2 * PLACE.images)
    batch = train.send_to_device(batch, base.device)
    count = batch["labels"].numel()
    trainer.training_step(trainer.model_wrapped, batch, count)  # warms up
    trainer.model.zero_grad()
    with synchronisations() as caught:
        trainer.training_step(trainer.model_wrapped, batch, count)
        norm = trainer._clip_grad_norm(trainer.model_wrapped)
        trainer.optimizer.step()
    assert norm.isfinite()
    waits = count_synchronisations(caught)
    print(f"{waits} synchronisations in a step of 2 passes")
    assert waits <= 2 * 2 + 4


def test_the_tower_is_not_waited_for(train, base, workshop, tmp_path):
    """The pass over the images waits once per image, for its features, not once per layer."""
    examples = train.read_examples(train.DATA_JSON, base)
    images = sorted({image for example in examples for image in example.images})[:16]
    features = train.KeptFeatures(base)
    tower = train.load_tower(base)
    batch = list(train.open_ahead(images, base))
    train.see_batch(batch, tower, features)  # warms up
    with synchronisations() as caught:
        problems = train.see_batch(batch, tower, features)
    assert problems == {} and all(map(features.holds, images))
    waits = count_synchronisations(caught)
    print(f"{waits} synchronisations for {len(images)} images")
    # the size of each image is looked at, too
    assert waits <= 2 * len(images) + 16


CONSTANTS = {
    "SWANLAB_MODE": "disabled",
    "TEST_IMAGES": 4,
    "MAX_NEW_TOKENS": 8,
    "OTHER_QUESTIONS": [],
    "LEARNING_RATE": 1e-3,  # high, so that a few steps show that it learns
    "SAVE_STEPS": 1,
    "LOG_STEPS": 1,
}


def start_train_py(workshop: Path, folder: Path) -> subprocess.Popen:
    """Start train.py as a user does, its output in folder/log."""
    constants = {
        **CONSTANTS,
        "DATA_JSON": str(workshop / "data_5.json"),
        "MODEL_FOLDER": str(workshop / "model"),
    }
    with open(folder / "log", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            command("train.py", **constants),
            cwd=folder,
            env=variables({"HF_HUB_OFFLINE": "1"}),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def wait_for_checkpoint(folder: Path, run: subprocess.Popen, seconds: float) -> None:
    """Wait until a whole checkpoint is there."""
    deadline = time.monotonic() + seconds
    while not list(folder.glob("output/*/checkpoint-*/trainer_state.json")):
        assert run.poll() is None, (folder / "log").read_text(encoding="utf-8")[-3000:]
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.1)


def test_killed_and_resumed_with_captions_before_and_after(workshop, tmp_path):
    """A run that is killed resumes where it was saved, and captions before and after it."""
    run = start_train_py(workshop, tmp_path)
    wait_for_checkpoint(tmp_path, run, 200)
    run.send_signal(signal.SIGKILL)
    run.wait()
    base = (tmp_path / "output/Qwen2-VL-2B/base.json").read_text(encoding="utf-8")
    resumed = start_train_py(workshop, tmp_path)
    log = (tmp_path / "log").read_text(encoding="utf-8", errors="replace")
    assert resumed.wait(200) == 0, log[-3000:]
    folder = tmp_path / "output/Qwen2-VL-2B"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    # the base model was captioned once, before the kill
    assert (folder / "base.json").read_text(encoding="utf-8") == base
    assert len(results["captions"]) == 4
    for row in results["captions"]:
        for column in ("base", "base_short", "fine_tuned"):
            assert isinstance(row[column]["text"], str)
    assert (folder / "report.html").is_file()
    assert (folder / "adapter_model.safetensors").is_file()
    [state] = sorted(folder.glob("checkpoint-*/trainer_state.json"))[-1:]
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) > 2 and losses[-1] < losses[0]


def test_images_per_second(workshop):
    """train.py trains more images per second than the documented recipe."""
    runs = [Run("documented", steps=2), Run("train.py", steps=2, batch=16, checkpointing=False)]
    costs = [bench.start(run, workshop) for run in runs]
    documented, own = [16 / cost["step"] for cost in costs]
    print(f"{own:.1f} images/s, documented recipe {documented:.1f}")
    if has_gpu:
        assert own > documented
