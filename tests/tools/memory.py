"""Counts the memory of train.py's training on the shapes of published models, byte by byte.

This is what bench.py --memory prints. The model, the batch, the Trainer and its passes are those of
train.py; tensors are fake ones, with a size and no content, so that a 7B model takes no memory.
Two operations are what they are on a GPU: attention is the memory-efficient kernel's, which takes a
mask, and dropout keeps a byte for each number. What CUDA takes for itself is not in the counts.
"""

import contextlib
import importlib.util
import os
import tempfile
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import datasets
import torch
import transformers
from support.launch import load
from tools.shapes import (
    QWEN2_VL_2B,
    QWEN2_VL_7B,
    MadeUpFeatures,
    make_base,
    make_config,
    make_sample,
    without_weights,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

# peft knows a layer in 4 bits by its class; without bitsandbytes only 16 bits are counted
has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
if has_bitsandbytes:
    from bitsandbytes.nn import Linear4bit
else:
    Linear4bit = torch.nn.Module

GIB = 2**30
CONTEXT = 0.8  # GiB that CUDA takes for itself on a GPU
GPUS = (6, 8, 12, 16, 24, 80)  # GB
CAPTIONS = 5
CAPTION_TOKENS = 13  # with the end token
BATCH_SIZES = (1, 2, 4, 8, 16)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most that there ever were."""

    def __init__(self, learned: int) -> None:
        super().__init__()
        self.learned = learned  # how many tokens of a pass have a label
        self.now = 0
        self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        masked = operation is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool
        if masked and isinstance(args[0], FakeTensor):
            # which tokens have a label is a question of numbers; how many is known
            places = [torch.empty(self.learned, dtype=torch.long) for _ in range(args[1][0].dim())]
            args = (args[0], places)
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until nothing refers to it any more; a view has that of its base."""
        if storage in self.known:
            return
        self.known.add(storage)
        size = -(-storage.nbytes() // 512) * 512  # the allocator's smallest step
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, size)

    def remove(self, size: int) -> None:
        self.now -= size


def efficient_attention(query, key, value, attn_mask, dropout_p=0.0, scale=None, **options):
    """Compute attention as the GPU's kernel for masks does, which keeps no matrix of weights."""
    bias = torch.empty(attn_mask.shape, dtype=query.dtype).expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, scale=scale
    )[0]


def gpu_dropout(numbers, p=0.5, training=True, inplace=False):
    """Drop numbers as a GPU does, which keeps a byte for each."""
    return torch.native_dropout(numbers, p, training)[0] if training else numbers


class MultiplyIn4Bits(torch.autograd.Function):
    """Multiplies as bitsandbytes does: the weight is made whole for a moment, and never kept."""

    @staticmethod
    def forward(ctx, numbers, layer):
        ctx.layer = layer
        return torch.nn.functional.linear(numbers, layer.whole(numbers.dtype), layer.bias)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.layer.whole(gradient.dtype), None


class LinearIn4Bits(Linear4bit):
    """Stands for bitsandbytes' layer, whose own tensors can't be fake."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.compute_dtype = layer.weight.dtype
        self.bias = layer.bias
        # half a byte each, 8 bits to scale each 64 of them, 32 bits to scale each 256 scales
        numbers = layer.weight.numel()
        size = numbers // 2 + numbers // 64 + 4 * (numbers // 64 // 256) + 2 * 4 * 256
        stored = torch.empty(size, dtype=torch.uint8, device=layer.weight.device)
        self.weight = torch.nn.Parameter(stored, requires_grad=False)
        self.weight.compress_statistics = True
        self.weight.quant_type = "nf4"

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=dtype)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        dtype = numbers.dtype
        product = MultiplyIn4Bits.apply(numbers.to(self.compute_dtype), self)
        return product.to(dtype)


def store_in_4_bits(model: torch.nn.Module) -> None:
    """Store the language layers in 4 bits, as LOAD_IN_4BIT does."""
    for module in list(model.model.language_model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, torch.nn.Linear):
                setattr(module, name, LinearIn4Bits(layer))
    model.is_loaded_in_4bit = True  # peft asks


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let a CPU's autocast, attention and dropout be those of a GPU."""
    functional = torch.nn.functional
    enabled = torch.is_autocast_enabled

    with contextlib.ExitStack() as patches:
        patches.enter_context(
            patch.object(functional, "scaled_dot_product_attention", efficient_attention)
        )
        patches.enter_context(patch.object(functional, "dropout", gpu_dropout))
        # peft asks without naming a device, and means the GPU
        patches.enter_context(
            patch.object(torch, "is_autocast_enabled", lambda device="cpu": enabled(device))
        )
        patches.enter_context(patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1"))
        patches.enter_context(patch.object(torch.cuda, "is_available", lambda: False))
        yield


def load_model(train: ModuleType, base, four_bits: bool) -> torch.nn.Module:
    """Let train.py load its model on the meta device, then take it among the fake tensors.

    There it could not be made: peft moves layers, which fake tensors don't let it.
    """
    build = AutoModelForImageTextToText.from_config

    def build_in_4_bits(*args, **options):
        model = build(*args, **options)
        store_in_4_bits(model)
        return model

    with _disable_current_modes(), without_weights("meta"), contextlib.ExitStack() as patches:
        if four_bits:
            patches.enter_context(
                patch.object(AutoModelForImageTextToText, "from_config", build_in_4_bits)
            )
        model = train.load_model(base._replace(device=torch.device("meta")))
    model.to_empty(device="cpu")
    whole = model.get_base_model()
    whole.tie_weights()
    whole.is_loaded_in_4bit = False  # the Trainer would look for bitsandbytes' own
    return model


def build_collator(train: ModuleType, base, model: torch.nn.Module):
    """Return train.py's collator with made-up features; it makes real tensors in any mode."""
    collator = train.Collator(base, MadeUpFeatures(base, "cpu"), model)
    make_pass = collator.make_pass

    def make_real_pass(samples: list[dict]) -> dict:
        # tokens and labels are real numbers, which the collator looks at
        with _disable_current_modes():
            return make_pass(samples)

    collator.make_pass = make_real_pass
    return collator


def build_trainer(train: ModuleType, base, model: torch.nn.Module, samples: list[dict], folder):
    """Return train.py's Trainer as it is after its preparation, without reports and evaluation."""
    collator = build_collator(train, base, model)
    arguments = train.training_arguments(base, len(samples), None)
    arguments.output_dir = folder
    table = datasets.Dataset.from_list(samples)
    # fake weights can't be moved, and real ones are where they should be
    with patch.object(transformers.Trainer, "_move_model_to_device"):
        trainer = train.CaptionTrainer(
            judge=None,
            run={},
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=table,
            eval_dataset=table,
        )
    trainer.create_optimizer()
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model, device_placement=False)
    return trainer


class Training:
    """A training of train.py that is only counted: one shape, one precision, one kind of batch."""

    def __init__(self, train: ModuleType, shape: dict, four_bits: bool = False) -> None:
        self.train = train
        self.shape = shape
        self.four_bits = four_bits
        self.base = make_base(train, shape, "cpu", torch.bfloat16)
        self.sample = make_sample(train, self.base, CAPTIONS, CAPTION_TOKENS)

    @contextlib.contextmanager
    def start(self, images: int, checkpointing: bool) -> Iterator:
        """Make the Trainer among fake tensors; yields it with the counter of its bytes."""
        samples = [self.sample] * images
        train = self.train
        # FakeTensorMode stands below: everything that the counter sees is fake already
        with (
            tempfile.TemporaryDirectory() as folder,
            FakeTensorMode(allow_non_fake_inputs=True),
            LiveBytes(images * self.sample["learned"]) as live,
            as_on_a_gpu(),
            patch.object(train, "BATCH_SIZE", images),
            patch.object(train, "IMAGES_PER_STEP", images),
        ):
            model = load_model(train, self.base, self.four_bits)
            trainer = build_trainer(train, self.base, model, samples, folder)
            train.HeaviestPass(trainer).set_checkpointing(checkpointing)
            yield trainer, live

    def count(self, images: int, checkpointing: bool) -> float:
        """Return the GiB at the peak of a step's second pass, Adam's numbers being there."""
        with self.start(images, checkpointing) as (trainer, live):
            trained = [p for p in trainer.model.parameters() if p.requires_grad]
            adam = [[torch.empty_like(parameter) for _ in range(2)] for parameter in trained]
            batch = trainer.data_collator.make_pass([self.sample] * images)
            count = 2 * images * self.sample["learned"]
            for _ in range(2):
                live.peak = live.now
                # CaptionTrainer's own looks whether the loss is finite, which has no answer here
                step = super(self.train.CaptionTrainer, trainer).training_step
                step(trainer.model_wrapped, batch, count)
            del adam
            return live.peak / GIB

    def measure(self, images: int, checkpointing: bool) -> float:
        """Return the GiB that train.py's own HeaviestPass announces."""
        with self.start(images, checkpointing) as (trainer, live):

            def reset_peak():
                live.peak = live.now

            with (
                patch.object(self.train, "reset_peak", reset_peak),
                patch.object(self.train, "peak_memory", lambda: live.peak),
            ):
                return self.train.HeaviestPass(trainer).measure(images) / GIB


class Setting(NamedTuple):
    """What a table's row is about."""

    model: str
    four_bits: bool
    rank: int
    checkpointing: bool


SHAPES = {"Qwen2-VL-2B": QWEN2_VL_2B, "Qwen2-VL-7B": QWEN2_VL_7B}
SETTINGS = [
    Setting(model, four_bits, 64, checkpointing)
    for model in SHAPES
    for four_bits in (False, True)
    for checkpointing in (False, True)
]
# a smaller adapter takes a large part off a large model
SETTINGS.append(Setting("Qwen2-VL-7B", True, 16, True))


def count_setting(train: ModuleType, setting: Setting, images: int) -> float:
    """Return the GiB of a setting with so many images per pass."""
    with patch.object(train, "LORA_RANK", setting.rank):
        training = Training(train, SHAPES[setting.model], setting.four_bits)
        return training.count(images, setting.checkpointing)


def estimate_setting(script: ModuleType, setting: Setting, images: int) -> float:
    """Return the GiB that load_model.py announces for a setting."""
    config = make_config(SHAPES[setting.model])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    with patch.object(script, "LORA_RANK", setting.rank):
        return script.training_memory(model, images, setting.checkpointing, setting.four_bits)


def smallest_gpu(gib: float) -> str:
    """Return the smallest GPU, by its gigabytes, on which so much fits beside CUDA's own."""
    for size in GPUS:
        if gib + CONTEXT <= size:
            return f"{size} GB"
    return "-"


def memory_table(
    settings: list[Setting] = SETTINGS, batch_sizes: tuple[int, ...] = BATCH_SIZES
) -> list[dict]:
    """Return what is counted, what load_model.py estimates, and which GPU it takes."""
    train, script = load("train.py", []), load("load_model.py", [])
    train.quiet_libraries()
    rows = []
    for setting in settings:
        if setting.four_bits and not has_bitsandbytes:
            print(f"Not in the table, as bitsandbytes is not installed: {setting}\n")
            continue
        for images in batch_sizes:
            counted = count_setting(train, setting, images)
            estimated = estimate_setting(script, setting, images)
            rows.append(
                {
                    "model": setting.model,
                    "weights": "4 bits" if setting.four_bits else "bfloat16",
                    "LORA_RANK": setting.rank,
                    "checkpointing": "on" if setting.checkpointing else "off",
                    "images per pass": images,
                    "counted, GiB": f"{counted:.2f}",
                    "estimate, GiB": f"{estimated:.2f}",
                    "off by": f"{estimated / counted - 1:+.1%}",
                    "fits a GPU of": smallest_gpu(counted),
                }
            )
    return rows
