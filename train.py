"""Step 4 of 4: teach Qwen2-VL to caption images with LoRA, and show what it learned.

Reads   data_vl.json (from csv2json.py), the images it names, Qwen/Qwen2-VL-2B-Instruct/.
Writes  output/Qwen2-VL-2B/: report.html (open it in a browser; there after the first minutes,
        updated every epoch), the LoRA adapter, checkpoints, results.json; a SwanLab run.
Run     python train.py, on several GPUs torchrun --nproc_per_node=2 train.py.
        If interrupted, run it again to resume.
Takes   minutes for 500 images; needs a GPU with 8 GB, memory is measured before training starts.

Four words: a *record* is an entry of data_vl.json. An *example* is one answer with the images and
the text before it. A *sample* is the examples that share images and prompt, a row of the table.
A *batch* is samples padded to tensors.
"""

import base64
import builtins
import contextlib
import copy
import csv
import difflib
import functools
import gc
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import warnings
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path, PureWindowsPath
from types import FrameType
from typing import IO, Annotated, Any, Literal, NamedTuple, NoReturn, get_type_hints

import datasets
import jinja2
import numpy
import pandas
import peft
import psutil
import regex
import requests
import swanlab
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce, send_to_device
from markupsafe import Markup
from matplotlib import pyplot
from PIL import ExifTags, Image, ImageOps
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pydantic import AfterValidator, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError
from qwen_vl_utils import smart_resize
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

PathText = Annotated[str, AfterValidator(lambda path: check_path(path))]
Texts = Annotated[list[str], Field(min_length=1)]
Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"]
ImageFormats = Annotated[list[Format], Field(min_length=1)]
QuestionText = Annotated[str, AfterValidator(lambda text: check_question(text))]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, lt=1e6)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
ImageSide = Annotated[int, Field(ge=56, le=3584)]
Pixels = Annotated[int, Field(ge=56 * 56, le=3584 * 3584)]

# --------------------------------------------------------------------------------------------------
# Data
DATA_JSON: PathText = "data_vl.json"  # relative image paths in it count from its folder
TEST_JSON: PathText | None = None  # held-out records of your own; None: TEST_IMAGES of DATA_JSON
TEST_IMAGES: PositiveInt = 50  # images held out with all their captions; more: less noisy scores
ON_BAD_SAMPLE: Literal["stop", "drop"] = "stop"  # what to do with unusable records and images
IMAGE_FORMATS: ImageFormats = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]  # Pillow's names
IMAGE_SIZE: ImageSide | None = 280  # side in pixels (280: 100 tokens); None keeps the image's own
MAX_PIXELS: Pixels = 400 * 28 * 28  # with IMAGE_SIZE = None, larger images are shrunk to this
MAX_LENGTH: PositiveInt = 2048  # tokens of a sample: images, prompt and captions

# Model and adapter
MODEL_FOLDER: PathText = "Qwen/Qwen2-VL-2B-Instruct"  # written by load_model.py
LOAD_IN_4BIT: bool = False  # quarters the memory of the weights; needs bitsandbytes
LORA_RANK: PositiveInt = 64  # width of the adapter, usually 8 to 64
LORA_ALPHA: Positive = 16  # the adapter's output is scaled by LORA_ALPHA / LORA_RANK
LORA_DROPOUT: Share = 0.05  # dropout probability of the adapter's inputs
# Layers of the language model that get an adapter
LORA_TARGETS: Texts = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Optimisation
EPOCHS: PositiveInt = 2  # how often each training image is seen
IMAGES_PER_STEP: PositiveInt = 16  # images per optimizer step, each with all its captions
LEARNING_RATE: Positive = 1e-4  # peak; 1e-5 to 5e-4 is usual for LoRA
WARMUP: Share = 0.03  # share of the steps in which the rate rises; then it falls to 0 in a line
SEED: Seed = 42  # of the split, the order, the adapter's first weights and its dropout

# Hardware
DEVICE: Literal["auto", "cpu"] = "auto"  # "cpu" trains without a GPU, which takes days
BATCH_SIZE: PositiveInt | Literal["auto"] = "auto"  # images per pass; "auto": what memory allows
# True recomputes activations: a third slower, several GB less. "auto": only where memory needs it
GRADIENT_CHECKPOINTING: bool | Literal["auto"] = "auto"
TOWER_BATCH: PositiveInt = 16  # images per pass of the vision tower
IMAGE_THREADS: PositiveInt = 8  # threads that open images
CACHE_FOLDER: PathText = ".cache/features"  # the vision tower's output, 300 KB per image

# Evaluation
# Asked of the base model too, in the captions' language: tells style from skill. None leaves it out
STYLE_PROMPT: QuestionText | None = "Describe this image in one short sentence."
# Not trained on: the report shows whether the model can still answer them. [] leaves them out
OTHER_QUESTIONS: list[QuestionText] = [
    "What colours do you see?",
    "Is this indoors or outdoors, and why?",
]
MAX_NEW_TOKENS: PositiveInt = 128  # a caption that does not end by itself is cut here
SAMPLES_SHOWN: PositiveInt = 5  # held-out images shown in the terminal and in SwanLab
KEEP: Literal["best", "last"] = "best"  # the adapter of the best or of the last evaluation

# Saving and logging
OUTPUT_FOLDER: PathText = "output/Qwen2-VL-2B"  # one run per folder
LOG_STEPS: PositiveInt = 5  # optimizer steps between log lines
SAVE_STEPS: PositiveInt = 100  # steps between checkpoints; the end of an epoch is always saved
KEEP_CHECKPOINTS: PositiveInt = 2  # older ones are deleted
SWANLAB_MODE: Literal["auto", "online", "local", "offline", "disabled"] = "auto"
SWANLAB_PROJECT: str = "Qwen2-VL-finetune"
SWANLAB_EXPERIMENT: str = "qwen2vl-coco2014"
SWANLAB_TIMEOUT: Positive = 90  # seconds to wait for SwanLab at the start and at the end
SHARE_MACHINE_INFO: bool = False  # True uploads host name, folders, command line, git address

# Using the result: set these after the training too, and run train.py again
CAPTION: PathText | None = None  # an image, a folder, or a CSV with image_path (and question)
SAVE_MERGED: bool = False  # also write a whole model, for vLLM or llama.cpp
# --------------------------------------------------------------------------------------------------

# Constants that a resumed run may change, because the weights don't depend on them. Of DATA_JSON
# and TEST_JSON the content is compared.
MAY_CHANGE = {
    "DATA_JSON", "TEST_JSON", "ON_BAD_SAMPLE", "IMAGE_FORMATS", "DEVICE", "BATCH_SIZE",
    "GRADIENT_CHECKPOINTING", "TOWER_BATCH", "IMAGE_THREADS", "CACHE_FOLDER", "STYLE_PROMPT",
    "OTHER_QUESTIONS", "MAX_NEW_TOKENS", "SAMPLES_SHOWN", "OUTPUT_FOLDER", "LOG_STEPS",
    "SAVE_STEPS", "KEEP_CHECKPOINTS", "SWANLAB_MODE", "SWANLAB_PROJECT", "SWANLAB_EXPERIMENT",
    "SWANLAB_TIMEOUT", "SHARE_MACHINE_INFO", "CAPTION", "SAVE_MERGED",
}  # fmt: skip
SUPPORTED_MODELS = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
# What the name of a quantised model ends in: -AWQ, -GPTQ-Int4, -FP8, -unsloth-bnb-4bit, ...
QUANTISED = re.compile(r"(-unsloth)?-(AWQ|GPTQ|FP8|NVFP4|MXFP4|bnb|Int[48]|[48]bit)\b.*$", re.I)
# Not blanks and controls, nor what has no ink: zero-width space, Hangul filler, empty Braille cell
# (\p{C} as a whole would be wrong: emoji that are younger than the package count as unassigned)
VISIBLE = regex.compile(r"[^\p{Z}\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}\u2800]")
IMAGE_MARKER = re.compile(r"<\|vision_start\|>(.*?)<\|vision_end\|>", re.DOTALL)
SPECIAL_TOKEN = re.compile(r"<\|\w+\|>")  # what only the chat template may write
END_OF_TURN = "<|im_end|>"  # the chat template ends every turn with it
IGNORE = -100  # label of a token that is not learned
PADDING, PROMPT = -1, 0  # owners of tokens; caption number k owns its tokens as k = 1, 2, ...
PORTION = 5000  # samples that are made into a table at a time
IS_MAIN = os.environ.get("RANK", "0") == "0"  # one of several processes speaks for all
USES_FSDP = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # set by accelerate launch


# ---- Shared with the other scripts ---------------------------------------------------------------


def check_path(path: str) -> str:
    """Expand ~ in a path constant, and refuse text that can't be a path here."""
    # "e:\new" is a line break between "e:" and "ew": Python reads \n as one character
    if not path.strip() or any(ord(character) < 32 for character in path):
        raise ValueError(r'it should be a path, such as "e:/LLM/new" or r"e:\LLM\new"')
    if os.name != "nt" and PureWindowsPath(path).drive:
        raise ValueError("it should be a path of this system, which has no drives")
    return os.path.expanduser(path)


def check_constants() -> None:
    """Stop with one sentence if a constant at the top has an impossible value."""
    script = sys.modules[__name__]
    for name, rule in get_type_hints(script, include_extras=True).items():
        value = getattr(script, name)
        try:
            checked = TypeAdapter(rule, config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            reasons = [each["msg"].removeprefix("Value error, ") for each in error.errors()]
            reason = re.sub(r"\b(Input|String|List) should", "it should", " or ".join(reasons))
            raise SystemExit(
                f"{name} = {value!r} at the top of {Path(__file__).name} can't work: {reason}."
            ) from None
        setattr(script, name, checked)  # a path with ~ expanded, all else as it was


def prepare_console() -> None:
    """Let print and progress bars work on every console: code pages, notebooks, pythonw."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # pythonw.exe has no console
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # a notebook's stream has no such method
            # Line by line, or what was printed to a log file is lost when the script is stopped
            stream.reconfigure(errors="replace", line_buffering=True)


def handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call handler on Ctrl-C, kill, a closed terminal, and Ctrl-Break on Windows."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)  # Windows lacks SIGHUP, the others SIGBREAK
        # nohup ignores SIGHUP on purpose: leave it ignored
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """End the script at once, without waiting for its threads."""
    if number == signal.SIGINT and "get_ipython" in dir(builtins):
        raise KeyboardInterrupt  # ends a notebook's cell, and not the notebook
    with contextlib.suppress(OSError):  # pythonw.exe and a closed terminal take no text
        os.write(2, b"\nStopped. Finished files are kept. Run again to continue.\n")
    os._exit(128 + number)


def check_writable(folder: str | Path) -> None:
    """Make a folder, and stop with one sentence if nothing can be written to it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise SystemExit(
            f"Can't write to {Path(folder).absolute()} ({reason}). "
            f"Choose another folder at the top of {Path(__file__).name}."
        ) from None


@contextlib.contextmanager
def write_atomically(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file that replaces path once it is whole and on the disk."""
    unfinished = Path(f"{path}.tmp")
    encoding = None if "b" in mode else "utf-8"
    newline = None if "b" in mode else "\n"
    try:
        with open(unfinished, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave an empty file under the new name
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


# ---- The run: what made it, and where it stopped -------------------------------------------------


@contextlib.contextmanager
def explain_full_disk(folder: str = "") -> Iterator[None]:
    """Stop with one sentence if a file can't be written to a folder, or else OUTPUT_FOLDER."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:200]
        if isinstance(error, RuntimeError):  # PyTorch's writer of archives says it like that
            if "inline_container" not in reason:
                raise
            reason = "is the disk full?"
        raise SystemExit(
            f"{folder or OUTPUT_FOLDER} can't be written ({reason}). What is there is kept. Free "
            "some space, and run again to resume."
        ) from None


def describe_run() -> dict:
    """Return what makes this run: constants, versions, and the hash of its data."""
    script = sys.modules[__name__]
    data = hashlib.sha256()
    for path in filter(None, (DATA_JSON, TEST_JSON)):
        try:
            data.update(Path(path).read_bytes())
        except OSError as error:
            raise SystemExit(
                f"{path} can't be read ({error.strerror}). Run csv2json.py, or set DATA_JSON and "
                "TEST_JSON."
            ) from None
    return {
        "constants": {name: getattr(script, name) for name in get_type_hints(script)},
        "versions": {each.__name__: each.__version__ for each in (torch, transformers, peft)},
        "data": data.hexdigest(),
    }


def refuse_another_run(run: dict) -> None:
    """Stop if OUTPUT_FOLDER holds a run made with other constants or other data."""
    folder = Path(OUTPUT_FOLDER)
    if not find_checkpoints() and not is_finished():
        return  # nothing was trained there
    try:
        old = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        before = {"the data": old["data"], **old["constants"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise SystemExit(
            f"{folder} holds checkpoints of another program, or its run.json is damaged. "
            "Set OUTPUT_FOLDER to a new folder."
        ) from None
    changes = []
    # Whatever is not in MAY_CHANGE, a constant that somebody adds included
    for name, value in {"the data": run["data"], **run["constants"]}.items():
        if name not in MAY_CHANGE and before.get(name) != value:
            changes.append(f"{name} was {before.get(name)!r} and is {value!r} now")
    if changes:
        raise SystemExit(
            f"{folder} holds another run ({'; '.join(changes)}). Set OUTPUT_FOLDER to a new "
            "folder, or undo the change."
        )


@explain_full_disk()
def save_json(path: Path, content: Any, indent: int | None = None) -> None:  # noqa: ANN401
    """Write a JSON file that is whole or absent, whenever the script is killed."""
    with write_atomically(path) as file:
        json.dump(content, file, ensure_ascii=False, indent=indent)


def is_finished() -> bool:
    """Tell whether the run in OUTPUT_FOLDER was trained to its end: this file is written last."""
    return (Path(OUTPUT_FOLDER) / "results.json").is_file()


def find_checkpoints() -> list[Path]:
    """Return the checkpoints in OUTPUT_FOLDER, the oldest first."""
    checkpoints = {}
    for folder in Path(OUTPUT_FOLDER).glob("*"):
        # "checkpoint-4-best" is a copy that the user made, and not ours to delete
        found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if found:
            checkpoints[int(found[1])] = folder
    return [checkpoints[step] for step in sorted(checkpoints)]


def last_checkpoint() -> Path | None:
    """Return the newest whole checkpoint; name those that are left out."""
    for checkpoint in reversed(find_checkpoints()):
        damage = find_damage(checkpoint)
        if not damage:
            return checkpoint
        print(f"{checkpoint} is left out: {damage}.")
    return None


def find_damage(checkpoint: Path) -> str:
    """Return what is wrong with a checkpoint, "" for nothing; reads every file of it."""
    names = ["trainer_state.json", "scheduler.pt", "adapter_model.safetensors", "optimizer.pt"]
    if (checkpoint / "optimizer_0").is_dir():  # FSDP writes folders with a shard per process
        names[2:] = ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"]
    for name in names:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    for path in sorted(checkpoint.rglob("*")):
        if path.name == ".metadata" and not any(path.parent.glob("*.distcp")):
            return f"{path.parent.name} has no shards"
        if path.is_file() and is_damaged(path):
            return f"{path.name} is damaged"
    return ""


def is_damaged(path: Path) -> bool:
    """Tell whether a file is empty, or not what its name says."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            safe_open(path, framework="pt")
        elif path.suffix in (".pt", ".pth", ".bin"):  # PyTorch's files are zip archives
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is not None
        return path.stat().st_size == 0
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return True


# ---- Hardware ------------------------------------------------------------------------------------


class Base(NamedTuple):
    """The base model: what reads its input, its shape, and where it runs in which precision."""

    processor: transformers.ProcessorMixin  # tokenizer, chat template and image processor
    config: PreTrainedConfig
    device: torch.device
    dtype: torch.dtype  # of the frozen weights; the adapter is float32 in any case

    @property
    def patch(self) -> int:
        """Return the side in pixels of the squares that the vision tower cuts an image into."""
        return self.processor.image_processor.patch_size

    @property
    def side(self) -> int:
        """Return the side in pixels of the square that becomes one image token."""
        return self.patch * self.processor.image_processor.merge_size

    def autocast(self) -> contextlib.AbstractContextManager:
        """Compute in the precision of the frozen weights."""
        reduced = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=reduced)


def load_processor() -> tuple[transformers.ProcessorMixin, PreTrainedConfig]:
    """Load processor and configuration of MODEL_FOLDER; no weights yet."""
    if LOAD_IN_4BIT and not transformers.utils.is_bitsandbytes_available():
        raise SystemExit(
            "LOAD_IN_4BIT = True needs bitsandbytes: pip install -U bitsandbytes, or set it to "
            "False."
        )
    try:
        raw = json.loads((Path(MODEL_FOLDER) / "config.json").read_text(encoding="utf-8"))
        if raw["model_type"] not in SUPPORTED_MODELS:
            raise ValueError(f"it is a {raw['model_type']} model")
        if raw.get("quantization_config") or raw.get("compression_config"):
            plain = QUANTISED.sub("", MODEL_FOLDER)
            instead = plain if plain != MODEL_FOLDER else "the one it was made from"
            raise SystemExit(
                f"{MODEL_FOLDER} is quantised and can't be trained. Take {instead} as MODEL_ID in "
                "load_model.py and as MODEL_FOLDER here, and set LOAD_IN_4BIT = True if the GPU "
                "has too little memory for it."
            )
        processor = transformers.AutoProcessor.from_pretrained(MODEL_FOLDER)
        return processor, transformers.AutoConfig.from_pretrained(MODEL_FOLDER)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"{MODEL_FOLDER} can't be used: {error}. Run load_model.py, or set MODEL_FOLDER to a "
            f"model of {', '.join(SUPPORTED_MODELS.values())}."
        ) from None


def check_launcher() -> None:
    """Stop if this is one of several processes that don't know their GPU or their share."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if (processes > 1 or not IS_MAIN) and "LOCAL_RANK" not in os.environ:
        raise SystemExit(
            "RANK or WORLD_SIZE is set, but not LOCAL_RANK: this process would wait for others "
            "for ever. Start with torchrun, or unset them."
        )
    if IMAGES_PER_STEP % processes:
        raise SystemExit(
            f"IMAGES_PER_STEP = {IMAGES_PER_STEP} can't be shared by {processes} processes. "
            f"Set it to a multiple of {processes}."
        )


def why_no_gpu() -> str:
    """Return why no NVIDIA GPU can be used, and what to do; "" if one can."""
    version = torch.__version__.partition("+")[0]
    # torch 2.14 is published for CUDA 12.6 (cu126), 13.0 (cu130) and 13.2 (cu132)
    older = f"the cu126 build of torch {version} and its torchvision (pytorch.org has the command)"
    if torch.version.cuda is None:
        return f"this torch has no CUDA. Install a CUDA build: with a driver before 580, {older}"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        if "too old" in str(error):
            cuda = torch.version.cuda
            if cuda.startswith("12"):
                return f"the driver is too old for CUDA {cuda}. Update it"
            return f"the driver is too old for CUDA {cuda}. Update it to 580, or install {older}"
        return f"torch finds none ({str(error).partition('.')[0]}). See what nvidia-smi says"
    major, minor = torch.cuda.get_device_capability()
    # Such as sm_75 and sm_90a
    oldest = min(map(int, re.findall(r"sm_(\d+)", " ".join(torch.cuda.get_arch_list()))))
    if 10 * major + minor < oldest:
        name = torch.cuda.get_device_name()
        return (
            f"{name} (sm_{major}{minor}) is older than this torch supports (sm_{oldest}: T4, RTX "
            f"20xx or newer). It may work with {older}"
        )
    return ""


@contextlib.contextmanager
def needs_gpu_memory(what: str, advice: str) -> Iterator[None]:
    """Stop with advice if the GPU is full or taken; leave other errors as they are."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        if not re.search("out of memory|busy", reason):
            raise
        raise SystemExit(
            f"The GPU can't take {what} ({reason}). Close other programs that use it "
            f"(nvidia-smi lists them){advice}."
        ) from None


@needs_gpu_memory("this script", advice="")
def choose_hardware(config: PreTrainedConfig) -> tuple[torch.device, torch.dtype]:
    """Choose device and precision; stop if a large model would have to train on the CPU."""
    problem = "as DEVICE says" if DEVICE == "cpu" else why_no_gpu()
    # NCCL gives up after 10 minutes, but one process may check a large data set for longer
    patience = timedelta(hours=3)
    if problem:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
        if DEVICE != "cpu" and billions > 0.2:
            raise SystemExit(
                f'No usable GPU: {problem}. (DEVICE = "cpu" trains these {billions:.1f} billion '
                "parameters on the CPU all the same, in days.)"
            )
        print(f"Training on the CPU in float32: {problem}.")
        return PartialState(cpu=True, timeout=patience).device, torch.float32
    device = PartialState(timeout=patience).device
    free = free_memory()
    # cuDNN's attention gives NaN gradients on H100 at some lengths (pytorch#196678), and makes a
    # new plan for each of the many shapes here, up to a second each
    torch.backends.cuda.enable_cudnn_sdp(False)
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    print(f"{torch.cuda.get_device_name(device)}, {dtype}, {free / 2**30:.1f} GiB free.")
    return device, dtype


def free_memory() -> int:
    """Return the bytes of the GPU that this process has or can still take."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


def peak_memory() -> int:
    """Return the most bytes that this process took since reset_peak(), of the GPU if any."""
    return torch.cuda.max_memory_allocated() or psutil.Process().memory_info().rss


def reset_peak() -> None:
    """Count peak_memory() from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


# ---- Data: records -> examples -> samples --------------------------------------------------------


class ImageFile(NamedTuple):
    """An image as the model will see it. Equal content is the same image, whatever its name."""

    path: str
    digest: str = ""  # SHA-256 of the file
    height: int = 0  # in pixels, as resized
    width: int = 0
    problem: str = ""  # why it can't be used


class Turn(NamedTuple):
    """A question, with its images as <|vision_start|>path<|vision_end|>, and its answer."""

    question: str
    answer: str


class Example(NamedTuple):
    """An answer to learn, with everything before it in its conversation."""

    images: tuple[ImageFile, ...]
    question: str  # the last one, with its images as markers without a name
    prompt: list[int]  # token ids up to the answer
    answer: list[int]  # token ids, <|im_end|> included
    reference: str  # the answer as text


def model_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Return the height and width to which an image is resized, multiples of side.

    Raises ValueError for shapes that the model can't see.
    """
    if IMAGE_SIZE:
        square = math.ceil(IMAGE_SIZE / side) * side
        return square, square
    height, width = smart_resize(height, width, factor=side, max_pixels=MAX_PIXELS)
    if min(height, width) < side or max(height, width) > 200 * min(height, width):
        raise ValueError(
            f"it would be resized to {width}x{height}: the model takes no side under {side} and no "
            "ratio over 200"
        )
    return height, width


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return height and width as people see the image; most formats need no decoding for it."""
    width, height = image.size
    # Cameras store a turned image with a note, which Pillow heeds only in a TIFF
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
    return (width, height) if turned and image.format != "TIFF" else (height, width)


def inspect_image(path: str, side: int) -> ImageFile:
    """Read an image file: the hash of its content, and the size that the model will see."""
    if not os.path.exists(path):
        return ImageFile(path, problem=describe_missing(Path(path)))
    if not os.path.isfile(path):  # opening a named pipe would wait for ever
        return ImageFile(path, problem=f"image is a folder or a device, not a file: {path}")
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            size = model_size(*upright_size(image), side)
    except Exception as error:  # Pillow raises a dozen kinds of errors on damaged files
        return ImageFile(path, problem=f"{path} can't be opened: {error}")
    return ImageFile(path, hashlib.sha256(content).hexdigest(), *size)


def describe_missing(file: Path) -> str:
    """Return the reason for an image that isn't there, with the file that was perhaps meant."""
    if file.is_symlink():
        return f"image is a link to a file that is missing: {file}"
    found = Path(file.anchor)
    for name in file.parts[1:]:
        if not os.path.exists(found / name):
            name = find_similar(found, name)
        found /= name
    if not found.is_file():
        return f"image is missing: {file}"
    same = unicodedata.normalize("NFC", str(file)) == unicodedata.normalize("NFC", str(found))
    hint = " (it looks the same, but its accents are other Unicode characters)" if same else ""
    return f"image is missing: {file}. Did you mean {found}?{hint}"


@functools.cache
def find_similar(folder: Path, name: str) -> str:
    """Return the name in a folder that was perhaps meant; without one, the name as it is."""
    names = list_folder(folder)
    spelling = plain_spelling(name)
    # Comparing each with each would take hours in a large folder
    if spelling in names or len(names) > 1000:
        return names.get(spelling, name)
    # 2.jpg is another image than 1.jpg, not a misspelling
    digits = re.findall(r"\d", name)
    candidates = [other for other in names if re.findall(r"\d", other) == digits]
    similar = difflib.get_close_matches(spelling, candidates, n=1, cutoff=0.9)
    return names[similar[0]] if similar else name


@functools.cache
def list_folder(folder: Path) -> dict[str, str]:
    """Return the names in a folder by their plain spelling."""
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    return {plain_spelling(name): name for name in names}


def plain_spelling(name: str) -> str:
    """Return a name in lower case and in one Unicode form: macOS takes é apart, e and an accent."""
    return unicodedata.normalize("NFC", name).casefold()


def inspect_images(paths: Iterable[str], side: int) -> dict[str, ImageFile]:
    """Inspect images in threads; returns them by path."""
    paths = sorted(set(paths))
    inspect_one = functools.partial(inspect_image, side=side)
    with ThreadPoolExecutor(IMAGE_THREADS) as pool:
        results = pool.map(inspect_one, paths)
        bar = tqdm(results, "Inspecting images", len(paths), unit=" images", disable=not IS_MAIN)
        return dict(zip(paths, bar, strict=True))


def locate_image(name: str, home: Path) -> str:
    """Return the absolute path of an image that is named relative to home.

    Raises ValueError for what is not a path on this machine.
    """
    name = name.strip().replace("\\", "/")
    if not name or "\0" in name:
        raise ValueError("names an image whose path is empty or has a NUL character")
    # Windows would log in to the computer of a // path with the user's name
    if "://" in name or name.startswith(("//", "data:")):
        raise ValueError(f"{name} is an address: download the image and name its file")
    return os.path.abspath(home / name)


def read_turns(record: Any) -> list[Turn]:  # noqa: ANN401, a record can be anything at all
    """Return the turns of a record, or raise ValueError if it can't be trained on."""
    try:
        roles = [turn["from"] for turn in record["conversations"]]
        texts = [turn["value"] for turn in record["conversations"]]
        "".join(texts).encode("utf-8")  # half of a surrogate pair is no text
    except (KeyError, TypeError, AttributeError):
        raise ValueError('is not {"conversations": [{"from": ..., "value": ...}]}') from None
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError("has turns that are not user, assistant, user, assistant, ...")
    turns = list(map(Turn, texts[::2], texts[1::2]))
    if not IMAGE_MARKER.search(turns[0].question):
        raise ValueError("names no image in its first question")
    for question, answer in turns:
        if shows_nothing(answer):
            raise ValueError("has an empty answer")
        forged = SPECIAL_TOKEN.search(IMAGE_MARKER.sub("", question) + "\n" + answer)
        if forged:
            raise ValueError(f"contains {forged[0]}, which only the chat template may write")
    return turns


def shows_nothing(text: str) -> bool:
    """Tell whether text is empty or has only blanks and characters that nobody sees."""
    return not VISIBLE.search(text)


# The tokenizer makes a number anew each time, 28 bytes: of a prompt's 137 tokens 100 are equal
same_number = functools.cache(int)


@functools.lru_cache(maxsize=1000)  # nearly all records ask the same question
def encode_prompts(
    processor: transformers.ProcessorMixin, questions: tuple[str, ...]
) -> list[list[int]]:
    r"""Return the token ids that the chat template writes before each answer.

    The first is "<|im_start|>user\nquestion<|im_end|>\n<|im_start|>assistant\n", the next ones
    begin with the line break behind the answer before. Encoded apart, as generation sees them.
    """
    # Stands for an answer: a special token, so no question contains it
    gap = "<|endoftext|>"
    messages = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": gap})
    *pieces, _ = processor.apply_chat_template(messages, tokenize=False).split(gap)
    encode = functools.partial(processor.tokenizer.encode, add_special_tokens=False)
    # <|im_end|> belongs to the answer before: the model has to learn to end it
    return [[*map(same_number, encode(piece.removeprefix(END_OF_TURN)))] for piece in pieces]


def show_images(question: str, images: Iterable[ImageFile], base: Base) -> str:
    """Return a question with the tokens of its images in place of their names."""
    counts = iter([image.height * image.width // base.side**2 for image in images])

    def tokens(_: re.Match) -> str:
        return f"<|vision_start|>{'<|image_pad|>' * next(counts)}<|vision_end|>"

    return IMAGE_MARKER.sub(tokens, question)


def make_examples(turns: list[Turn], images: dict[str, ImageFile], base: Base) -> list[Example]:
    """Turn a conversation into as many examples as it has answers; images are found by name.

    Raises ValueError for an image that can't be used and for too many tokens.
    """
    questions, seen, problems = [], [], []
    for turn in turns:
        shown = [images[name] for name in IMAGE_MARKER.findall(turn.question)]
        problems += [image.problem for image in shown if image.problem]
        questions.append(show_images(turn.question, shown, base))
        seen.append((*seen[-1], *shown) if seen else tuple(shown))
    if problems:
        raise ValueError(f"names an image that can't be used: {'; '.join(problems)}")
    # Much faster than the tokenizer's own encode, which matters for 414,113 captions
    encode = base.processor.tokenizer.backend_tokenizer.encode
    examples, prompt = [], []
    pieces = encode_prompts(base.processor, tuple(questions))
    for turn, piece, until_here in zip(turns, pieces, seen, strict=True):
        # One list for all that ask the same: 414,113 lists of their own would fill the memory
        prompt = prompt + piece if prompt else piece
        answer = encode(turn.answer + END_OF_TURN, add_special_tokens=False).ids
        count = len(prompt) + len(answer)
        if count > MAX_LENGTH:
            raise ValueError(f"has {count} tokens, more than MAX_LENGTH = {MAX_LENGTH}")
        question = IMAGE_MARKER.sub("<|vision_start|><|vision_end|>", turn.question)
        examples.append(Example(until_here, question, prompt, answer, turn.answer))
        prompt = prompt + answer
    return examples


def read_examples(path: str, base: Base) -> list[Example]:
    """Read the examples of a JSON; list unusable records, then stop or drop them."""
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not records or not isinstance(records, list):
            raise ValueError("it is not a list of conversations")
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"{path} can't be used ({error}). Run csv2json.py, or set DATA_JSON and TEST_JSON."
        ) from None
    home = Path(path).parent.resolve()
    # First the text of all records, then their images in threads, then the tokens
    conversations, problems, paths = [], [], {}
    for number, record in enumerate(records, start=1):
        try:
            turns = read_turns(record)
            for turn in turns:
                for name in IMAGE_MARKER.findall(turn.question):
                    paths[name] = locate_image(name, home)
            conversations.append((number, turns))
        except ValueError as reason:
            problems.append(f"record {number} {reason}")
    total = len(records)
    del records  # conversations has what is needed: for all of COCO that frees half a GB
    inspected = inspect_images(paths.values(), base.side)
    images = {name: inspected[path] for name, path in paths.items()}
    examples = []
    for number, turns in tqdm(conversations, "Checking records", unit=" records"):
        try:
            examples += make_examples(turns, images, base)
        except ValueError as reason:
            problems.append(f"record {number} {reason}")
    refuse_or_drop(problems, f"{len(problems)} of {total} records of {path}", examples)
    return examples


def refuse_or_drop(problems: list[str], what: str, left: list[Example]) -> None:
    """List what can't be used; stop if ON_BAD_SAMPLE says so, or if nothing is left."""
    if not problems:
        return
    print(f"{what} can't be used:", *problems, sep="\n  ")
    if ON_BAD_SAMPLE == "stop" or not left:
        raise SystemExit(
            f'{what} can\'t be used ({problems[0]}). Fix them, or set ON_BAD_SAMPLE = "drop" to '
            "train without them."
        )


def drop_unseen(examples: list[Example], problems: dict[str, str]) -> list[Example]:
    """Leave out the examples whose images can't be opened, as ON_BAD_SAMPLE says."""
    left, reasons = [], {}
    for example in examples:
        bad = [image.digest for image in example.images if image.digest in problems]
        for digest in bad:
            reasons[digest] = problems[digest]
        if not bad:
            left.append(example)
    refuse_or_drop(list(reasons.values()), f"{len(reasons)} images", left)
    return left


def split_by_image(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Hold out TEST_IMAGES images with all that is said about them: (training, held out).

    Those whose hash is smallest are held out, so the same on every run and in every folder.
    """
    digests = {image.digest for example in examples for image in example.images}
    if len(digests) < 2:
        raise SystemExit(f"{DATA_JSON} has a single image, and none to hold out beside it.")
    wanted = min(TEST_IMAGES, max(1, len(digests) // 5))
    if wanted < TEST_IMAGES:
        print(f"Of {len(digests)} images {wanted} are held out, not TEST_IMAGES = {TEST_IMAGES}.")

    def rank(digest: str) -> bytes:
        return hashlib.sha256(f"{SEED}:{digest}".encode()).digest()

    held_out = set(sorted(digests, key=rank)[:wanted])
    training, test, size = examples, [], 0
    # A conversation about several images takes all of them along
    while size < len(held_out):
        size = len(held_out)
        training, test = [], []
        for example in examples:
            involved = {image.digest for image in example.images}
            (training if held_out.isdisjoint(involved) else test).append(example)
        held_out.update(image.digest for example in test for image in example.images)
    if not training:
        raise SystemExit(
            f"Holding out {wanted} of {len(digests)} images leaves none to train on, because "
            "conversations share their images. Lower TEST_IMAGES."
        )
    return training, test


def refuse_shared_images(training: list[Example], test: list[Example]) -> None:
    """Stop if an image is on both sides: its scores would tell nothing."""
    trained_on = {image.digest: image.path for example in training for image in example.images}
    for example in test:
        for image in example.images:
            if image.digest in trained_on:
                raise SystemExit(
                    f"{image.path} of {TEST_JSON} is also trained on, as "
                    f"{trained_on[image.digest]} of {DATA_JSON}. Remove it from one of them."
                )


def refuse_another_split(held_out: set[ImageFile], test: list[Example]) -> None:
    """Stop if a resumed run would hold out other images than before."""
    before = {image.digest for image in held_out}
    now = {image.digest for example in test for image in example.images}
    if before and before != now:
        raise SystemExit(
            f"{OUTPUT_FOLDER} was begun with other held-out images, and has learned some of these. "
            "Bring back the images that are missing, or set OUTPUT_FOLDER to a new folder."
        )


def gather_samples(examples: list[Example]) -> datasets.Dataset:
    """Gather the examples that share images and prompt, up to MAX_LENGTH tokens together.

    A row has: images (the fields of each ImageFile), question, prompt (token ids), answers (token
    ids of each), references (text of each), tokens (of the whole sample), learned (tokens of its
    answers).
    """
    samples, latest = [], {}
    for example in examples:
        key = (example.images, tuple(example.prompt))
        # Each answer has a line break of its own in front
        cost = 1 + len(example.answer)
        if key not in latest or latest[key]["tokens"] + cost > MAX_LENGTH:
            latest[key] = {
                "images": [image._asdict() for image in example.images],
                "question": example.question,
                "prompt": example.prompt,
                "answers": [],
                "references": [],
                "tokens": len(example.prompt) - 1,
                "learned": 0,
            }
            samples.append(latest[key])
        sample = latest[key]
        sample["answers"].append(example.answer)
        sample["references"].append(example.reference)
        sample["tokens"] += cost
        sample["learned"] += len(example.answer)
    # In portions, because from_list copies what it gets: most of a GB for all of COCO
    portions = []
    for start in range(0, len(samples), PORTION):
        portions.append(datasets.Dataset.from_list(samples[start : start + PORTION]))
    return datasets.concatenate_datasets(portions)


def images_of(sample: dict) -> list[ImageFile]:
    """Return the images of a sample."""
    return [ImageFile(**fields) for fields in sample["images"]]


def load_tables() -> datasets.DatasetDict | None:
    """Return the tables of an earlier start of this run, or None if there are none."""
    try:
        tables = datasets.load_from_disk(Path(OUTPUT_FOLDER) / "table")
        return tables if tables["train"][0] and tables["test"][0] else None
    except (OSError, ValueError, KeyError, IndexError):
        return None  # missing or damaged: made anew


@explain_full_disk()
def save_tables(training: list[Example], test: list[Example]) -> None:
    """Write the tables to disk, from where they are read without filling the memory."""
    folder, unfinished = Path(OUTPUT_FOLDER) / "table", Path(OUTPUT_FOLDER) / "table.tmp"
    tables = datasets.DatasetDict(train=gather_samples(training), test=gather_samples(test))
    tables.save_to_disk(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


# ---- Seeing: every image goes through the vision tower once --------------------------------------


def open_image(file: str | IO[bytes], height: int, width: int) -> Image.Image:
    """Open an image as people see it, in RGB, resized to what the model sees.

    Turned as its camera noted, transparent parts white, the first frame of an animation. Raises
    OSError or ValueError if it can't be shown like that.
    """
    with Image.open(file, formats=IMAGE_FORMATS) as image:
        if image.mode[0] in "IF":  # in RGB all above 255 would become white
            raise ValueError("it has more than 8 bits per colour: save it with 8")
        # A JPEG can be decoded at half, a quarter or an eighth, which is much faster
        image.draft(None, (max(height, width), max(height, width)))
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


class KeptFeatures:
    """The vision tower's output, a file in CACHE_FOLDER for each image.

    The tower is frozen, so its output for an image is a constant. A file holds it as raw numbers
    (image tokens, width). Its name is a hash of all it depends on: another model, size or image
    never meets old features. It is whole or absent, whenever the script is killed.
    """

    def __init__(self, base: Base) -> None:
        """Find out what the features of all images depend on."""
        self.side = base.side
        self.dtype = base.dtype
        self.hidden = base.config.text_config.hidden_size
        # Qwen3-VL adds the output of some earlier layers, side by side in a row
        extra_layers = len(getattr(base.config.vision_config, "deepstack_visual_indexes", []))
        self.width = self.hidden * (1 + extra_layers)
        versions = (torch.__version__, transformers.__version__, Image.__version__)
        rule = hashlib.sha256(f"{versions} {base.dtype} {inspect.getsource(open_image)}".encode())
        for path in sorted(Path(MODEL_FOLDER).glob("*.safetensors")):
            status = path.stat()
            rule.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        # transformers 5 itself writes the last one in place of the second
        for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
            path = Path(MODEL_FOLDER) / name
            if path.is_file():
                rule.update(path.read_bytes())
        self.rule = rule.hexdigest()

    def path(self, image: ImageFile) -> Path:
        """Return the file of an image, whether it exists or not."""
        key = f"{self.rule} {image.digest} {image.height} {image.width}"
        name = hashlib.sha256(key.encode()).hexdigest()
        return Path(CACHE_FOLDER) / name[:2] / name[2:]

    def tokens(self, image: ImageFile) -> int:
        """Return how many tokens an image becomes."""
        return image.height * image.width // self.side**2

    def size(self, image: ImageFile) -> int:
        """Return the bytes of an image's file."""
        return self.tokens(image) * self.width * self.dtype.itemsize

    def holds(self, image: ImageFile) -> bool:
        """Tell whether the features of an image are there."""
        path = self.path(image)
        return path.is_file() and path.stat().st_size == self.size(image)

    def write(self, image: ImageFile, rows: torch.Tensor) -> None:
        """Keep the features (image tokens, width) of an image."""
        path = self.path(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another run may write the same file at the same time
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            unfinished.write_bytes(
                rows.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
            )
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def read(self, images: list[ImageFile]) -> torch.Tensor:
        """Return the features (image tokens, width) of images, one after the other."""
        counts = [self.tokens(image) for image in images]
        features = torch.empty(sum(counts), self.width, dtype=self.dtype)
        for image, rows in zip(images, features.split(counts), strict=True):
            # A plain read: a file that is cut short while it is mapped would kill the process
            with open(self.path(image), "rb", buffering=0) as file:
                if file.readinto(rows.view(torch.uint8).numpy()) != rows.nbytes:
                    raise OSError(f"{file.name} was cut short: delete it and run again")
        return features


class EncoderOutput(NamedTuple):
    """What the language model takes as the vision tower's output, in place of pixels."""

    pooler_output: list[torch.Tensor]  # (image tokens, hidden)
    deepstack_features: list[list[torch.Tensor]]  # for each extra layer (image tokens, hidden)


def split_features(output: Any) -> list[torch.Tensor]:  # noqa: ANN401, a class per model family
    """Return the tower's output for each image as (image tokens, width)."""
    layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    return [torch.cat(parts, dim=-1) for parts in zip(*layers, strict=True)]


def join_features(features: torch.Tensor, hidden: int) -> dict[str, EncoderOutput]:
    """Return features (image tokens, width) as the model's argument mm_encoder_outputs."""
    last, *extra = features.split(hidden, dim=-1)
    return {"image": EncoderOutput([last], [[layer] for layer in extra])}


def as_matrix_product(convolution: torch.nn.Conv3d) -> torch.nn.Linear:
    """Return the tower's first layer, a convolution without overlap, as a matrix product.

    cuDNN has slow kernels for it: up to seconds per call on an H100.
    """
    weight = convolution.weight.flatten(1)  # (hidden, numbers of a patch)
    product = torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    product.weight = torch.nn.Parameter(weight)
    product.bias = convolution.bias
    return product


@needs_gpu_memory("the model", advice=", or set LOAD_IN_4BIT = True")
def load_weights(
    base: Base, folder: str | Path, left_out: str | None = None, **options: Any
) -> PreTrainedModel:
    """Load what base.config describes from a folder; stop with the cause if that fails.

    Every weight in the folder must have its place, but for those with left_out in their names.
    """
    gc.collect()  # else an earlier model is still there, whose Trainer or collator knows itself
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder,
            config=base.config,
            dtype=base.dtype,
            device_map=base.device,
            use_safetensors=True,  # a pickle could run any code
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise SystemExit(
            f"{folder} doesn't load: {error}. Run load_model.py again, it repairs the files."
        ) from None
    # A weight of another shape is as good as none
    missing = sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])])
    if missing:
        raise SystemExit(f"{folder} lacks weights ({missing[:3]}). Run load_model.py again.")
    unexpected = sorted(report["unexpected_keys"])
    if left_out:
        unexpected = [name for name in unexpected if left_out not in name]
    if unexpected:
        raise SystemExit(
            f"{folder} has weights that its model has no place for ({unexpected[:3]}). Run "
            "load_model.py again."
        )
    return model


def load_tower(base: Base) -> torch.nn.Module:
    """Load the vision tower: the model without its language layers."""
    config = copy.deepcopy(base.config)
    config.text_config.num_hidden_layers = 0
    config.text_config.layer_types = []
    on_cpu = base._replace(config=config, device=torch.device("cpu"))
    tower = load_weights(on_cpu, MODEL_FOLDER, left_out="language_model.layers.").model
    del tower.language_model
    tower.visual.patch_embed = as_matrix_product(tower.visual.patch_embed.proj)
    return tower.to(base.device).eval()


def prepare_pixels(image: ImageFile, base: Base) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image's pixel_values (patches, numbers of a patch) and image_grid_thw (1, 3).

    Raises ValueError with the reason if it can't be opened.
    """
    try:
        content = Path(image.path).read_bytes()
        if hashlib.sha256(content).hexdigest() != image.digest:
            raise ValueError("the file has changed since it was inspected")
        pixels = open_image(io.BytesIO(content), image.height, image.width)
    except Exception as error:  # Pillow raises a dozen kinds of errors on damaged files
        raise ValueError(f"{image.path} can't be opened: {error}") from None
    inputs = base.processor.image_processor([pixels], do_resize=False, return_tensors="pt")
    return inputs["pixel_values"], inputs["image_grid_thw"]


def open_ahead(images: list[ImageFile], base: Base) -> Iterator[tuple[ImageFile, Future]]:
    """Yield images with their pixels, which threads open while the tower is busy."""
    with ThreadPoolExecutor(IMAGE_THREADS) as pool:
        waiting = deque()
        for image in images:
            waiting.append((image, pool.submit(prepare_pixels, image, base)))
            # A bounded number: all of COCO at once would fill the memory
            if len(waiting) > 2 * TOWER_BATCH + IMAGE_THREADS:
                yield waiting.popleft()
        yield from waiting


@needs_gpu_memory("the vision tower", advice=", or lower TOWER_BATCH")
def see_images(images: Iterable[ImageFile], features: KeptFeatures, base: Base) -> dict[str, str]:
    """Run the vision tower over every image that it has not seen yet, each once.

    Several processes share the images of process 0. Returns the reason for each that can't be
    opened, by digest, the same in all processes.
    """
    distinct = {(image.digest, image.height, image.width): image for image in images}
    unseen = [image for image in distinct.values() if not features.holds(image)]
    # What process 0 found: another run may add to the folder at the same time
    [unseen] = broadcast_object_list([unseen])
    if not unseen:
        return {}
    check_cache_disk(unseen, features)
    state = PartialState()
    ours = unseen[state.process_index :: state.num_processes]
    problems = {}
    tower = load_tower(base)
    with tqdm(desc="Seeing images", total=len(ours), unit=" images", disable=not IS_MAIN) as bar:
        opened = open_ahead(ours, base)
        while batch := list(itertools.islice(opened, TOWER_BATCH)):
            problems.update(see_batch(batch, tower, features))
            bar.update(len(batch))
    for others in gather_object([problems]):
        problems.update(others)
    return problems


@torch.inference_mode()
def see_batch(
    batch: list[tuple[ImageFile, Future]], tower: torch.nn.Module, features: KeptFeatures
) -> dict[str, str]:
    """Run the tower over opened images and keep its output; return why others failed to open."""
    problems, images, pixels, grids = {}, [], [], []
    for image, future in batch:
        try:
            values, grid = future.result()
        except ValueError as reason:
            problems[image.digest] = str(reason)
            continue
        images.append(image)
        pixels.append(values)
        grids.append(grid)
    if not images:
        return problems
    device = next(tower.parameters()).device
    grid = torch.cat(grids)  # (images, 3): frames, rows and columns of patches
    output = tower.get_image_features(
        torch.cat(pixels).to(device),  # (patches of all images, numbers of a patch)
        grid.to(device),
        # Where each image ends; on the CPU, or every layer would wait for the GPU to tell
        image_cu_seqlens=torch.nn.functional.pad(grid.prod(1).cumsum(0), (1, 0)).int(),
    )
    with explain_full_disk(CACHE_FOLDER):
        for image, rows in zip(images, split_features(output), strict=True):
            features.write(image, rows)
    return problems


def check_cache_disk(images: list[ImageFile], features: KeptFeatures) -> None:
    """Say how much will be kept in CACHE_FOLDER, which has to have room for it."""
    check_writable(CACHE_FOLDER)
    needed = sum(features.size(image) for image in images)
    print(
        f"The vision tower has to see {len(images):,} images. Its output takes "
        f"{needed / 1e9:.2f} GB in {CACHE_FOLDER}."
    )
    check_disk(CACHE_FOLDER, needed, "the vision tower's output")


def check_disk(folder: str, needed: int, what: str) -> None:
    """Stop if a folder's disk has no room for so many bytes: out of space, half a file is left."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(
            f"Not enough disk space for {what} in {folder}: {needed / 1e9:.2f} GB are needed, "
            f"{free / 1e9:.2f} GB are free. Free some, or set another folder, and run again."
        )


# ---- Batches: samples -> tensors -----------------------------------------------------------------


class Layout(NamedTuple):
    """The tokens of a sample, T in all, as tensors."""

    tokens: torch.Tensor  # (T,)
    labels: torch.Tensor  # (T,), IGNORE where nothing is learned
    owners: torch.Tensor  # (T,), PROMPT or the number of the caption
    positions: torch.Tensor  # (T, 3): frame, row and column of a token, equal for text


class Collator:
    r"""Turn samples into the model's input, for training and for captioning.

    All captions of an image share one row, so that image and prompt are computed once:

        prompt without its last "\n" | "\n" caption 1 <|im_end|> | "\n" caption 2 <|im_end|> | ...

    A caption attends to the prompt and to itself, never to another caption, and its positions
    continue where the prompt ends. Loss and gradients are therefore those of separate rows. The
    line break that ends the prompt is repeated before each caption, to predict its first token.
    """

    def __init__(self, base: Base, features: KeptFeatures, model: torch.nn.Module) -> None:
        """Take the model's own rule for positions, which differs by model family."""
        self.base = base
        self.features = features
        self.padding = base.processor.tokenizer.pad_token_id
        self.batch_size = 4 if BATCH_SIZE == "auto" else BATCH_SIZE
        whole = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        self.find_positions = whole.model.get_rope_index
        # Nearly all prompts are alike
        self.prompt_positions = functools.lru_cache(maxsize=4096)(self.locate_prompt)

    def locate_prompt(self, prompt: tuple[int, ...], *images: ImageFile) -> torch.Tensor:
        """Return the positions (P, 3) of a prompt of P tokens with these images."""
        tokens = torch.tensor([prompt])  # (1, P)
        positions, _ = self.find_positions(
            input_ids=tokens,
            mm_token_type_ids=(tokens == self.base.processor.image_token_id).int(),
            image_grid_thw=self.grids(images),
        )
        return positions[:, 0].T

    def grids(self, images: Iterable[ImageFile]) -> torch.Tensor:
        """Return image_grid_thw (images, 3): frames, rows and columns of patches."""
        patch = self.base.patch
        return torch.tensor([[1, each.height // patch, each.width // patch] for each in images])

    def lay_out(self, sample: dict, with_answers: bool) -> Layout:
        """Lay out a sample: the prompt and, for training, all its captions."""
        prompt = sample["prompt"]
        # Without what differs from image to image
        shapes = [each._replace(path="", digest="") for each in images_of(sample)]
        positions = self.prompt_positions(tuple(prompt), *shapes)
        tokens = prompt[:-1]
        labels = [IGNORE] * len(tokens)
        owners = [PROMPT] * len(tokens)
        places = []
        # What the model is to say has no tokens yet
        answers = sample["answers"] if with_answers else [[]]
        for number, answer in enumerate(answers, start=1):
            tokens = [*tokens, prompt[-1], *answer]
            labels = [*labels, IGNORE, *answer]
            owners += [number] * (1 + len(answer))
            places += range(1 + len(answer))
        # Each caption continues where the prompt ends, whatever stands between
        captions = positions[-1] + to_tensor(places)[:, None]  # (tokens of all captions, 3)
        return Layout(
            to_tensor(tokens),
            to_tensor(labels),
            to_tensor(owners),
            torch.cat([positions[:-1], captions]),
        )

    def make_batch(self, samples: list[dict], with_answers: bool) -> dict:
        """Turn B samples into tensors of T tokens, padded on the left; T is a multiple of 8."""
        rows = [self.lay_out(sample, with_answers) for sample in samples]
        tokens, labels, owners, positions = zip(*rows, strict=True)
        tokens = pad_left(tokens, self.padding)
        images = list(itertools.chain.from_iterable(map(images_of, samples)))
        features = self.features.read(images)
        # The model checks this too, but would make the GPU wait for it
        if (tokens == self.base.processor.image_token_id).sum() != len(features):
            raise ValueError("image tokens and kept features do not match")
        return {
            "input_ids": tokens,  # (B, T)
            "labels": pad_left(labels, IGNORE),  # (B, T)
            "owners": pad_left(owners, PADDING),  # (B, T)
            "position_ids": pad_left(positions, 0).permute(2, 0, 1),  # (3, B, T)
            "grids": self.grids(images),  # (images, 3)
            "features": features,  # (image tokens of all rows, width)
            "names": [image.path for image in images],
        }

    def make_pass(self, samples: list[dict]) -> dict:
        """Return a training batch; only logits that predict a label will be computed.

        logits_to_keep (B, T) is True at these N tokens, shift_labels (N,) is what they predict.
        """
        batch = self.make_batch(samples, with_answers=True)
        # The logits at a token predict the next one
        next_labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
        batch["logits_to_keep"] = next_labels != IGNORE
        batch["shift_labels"] = next_labels[batch["logits_to_keep"]]
        return batch

    def __call__(self, samples: list[dict]) -> dict:
        """Return an optimizer step's batch: passes of at most batch_size samples.

        The Trainer counts shift_labels, so that the loss is a mean over all tokens of the step.
        """
        starts = range(0, len(samples), self.batch_size)
        passes = [self.make_pass(samples[each : each + self.batch_size]) for each in starts]
        labels = torch.cat([each["shift_labels"] for each in passes])
        return {"labels": labels, "shift_labels": labels, "passes": passes}


def to_tensor(numbers: list[int]) -> torch.Tensor:
    """Turn a list into a tensor, several times as fast as torch.tensor does."""
    return torch.from_numpy(numpy.array(numbers))


def pad_left(rows: tuple[torch.Tensor, ...], value: int) -> torch.Tensor:
    """Stack rows (T, ...) of different T, filled up on the left to a multiple of 8: (B, T, ...).

    Attention needs such a length, and would copy what has another.
    """
    longest = max(rows, key=len)
    whole = longest.new_full((math.ceil(len(longest) / 8) * 8, *longest.shape[1:]), value)
    padded = torch.nn.utils.rnn.pad_sequence(
        [*rows, whole], batch_first=True, padding_value=value, padding_side="left"
    )
    return padded[:-1]


def model_inputs(batch: dict, hidden: int) -> dict:
    """Return what the model takes, from a batch that is where the model is.

    attention_mask (B, 1, T, T) is True where a token (row) sees another (column).
    """
    owners = batch["owners"]  # (B, T)
    query, key = owners[:, :, None], owners[:, None, :]
    # Padding sees padding: attention over a row without any True would be NaN
    mask = ((query == key) | (key == PROMPT)).tril()  # (B, T, T)
    return {
        "input_ids": batch["input_ids"],
        "labels": batch["labels"],
        "attention_mask": mask[:, None],
        "position_ids": batch["position_ids"],
        "logits_to_keep": batch["logits_to_keep"],
        "shift_labels": batch["shift_labels"],
        "mm_encoder_outputs": join_features(batch["features"], hidden),
        "use_cache": False,
    }


# ---- Model: the language model with an adapter ---------------------------------------------------


def load_model(base: Base, adapter: Path | None = None) -> peft.PeftModel:
    """Load the language model with a LoRA adapter: a new one to train, or one from a folder.

    The vision tower stays on the disk: the model reads what it saw.
    """
    config = copy.deepcopy(base.config)
    config.vision_config.depth = 0
    # FSDP moves each GPU's share of the weights there by itself
    device = torch.device("cpu") if USES_FSDP and not adapter else base.device
    model = load_weights(
        base._replace(config=config, device=device),
        MODEL_FOLDER,
        left_out="visual.blocks.",
        quantization_config=choose_quantisation(base),
    )
    del model.model.visual
    forget_missing_classes(model)
    model.config.text_config.use_cache = False  # in training; generate() sets its own
    if adapter:
        return peft.PeftModel.from_pretrained(model, adapter)
    check_lora_targets(model)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=LORA_DROPOUT,
        target_modules=LORA_TARGETS,
        # For whoever puts the adapter on a whole model: some towers have layers of these names
        exclude_modules=r".*visual.*",
    )
    model = peft.get_peft_model(model, lora)
    for module in model.modules():
        # LoRA would copy its input to float32, and autocast would copy it back: 0.7 GB at batch 4
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    return model


def choose_quantisation(base: Base) -> transformers.BitsAndBytesConfig | None:
    """Return how weights are quantised while they are loaded, None for not at all."""
    if not LOAD_IN_4BIT:
        return None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=base.dtype,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )


def forget_missing_classes(model: torch.nn.Module) -> None:
    """Take classes that have no module out of the lists in which FSDP looks them up."""
    present = {type(module).__name__ for module in model.modules()}
    for module in model.modules():
        names = getattr(module, "_no_split_modules", None)
        if names:
            module._no_split_modules = [name for name in names if name in present]


def check_lora_targets(model: torch.nn.Module) -> None:
    """Stop if LORA_TARGETS names a layer that the language model does not have."""
    modules = model.model.language_model.named_modules()
    layers = {name.rpartition(".")[2] for name, each in modules if hasattr(each, "in_features")}
    unknown = sorted(set(LORA_TARGETS) - layers)
    if unknown:
        raise SystemExit(
            f"LORA_TARGETS names {unknown[0]}, but the language model's layers are called "
            f"{', '.join(sorted(layers))}."
        )


def overflows(model: torch.nn.Module, collator: Collator, sample: dict) -> bool:
    """Tell whether float16 can't hold the model's numbers: loss or gradients are not finite."""
    batch = send_to_device(collator.make_pass([sample]), collator.base.device)
    with collator.base.autocast():
        loss = model.train()(**model_inputs(batch, collator.features.hidden)).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return not all(tensor.isfinite().all() for tensor in [loss, *gradients])


# ---- Judging: captions of held-out images, and their scores --------------------------------------

COLUMNS = {
    "base": "base",
    "base_short": "base, asked for one short sentence",
    "fine_tuned": "fine-tuned",
}
SCORE_NAMES = {
    "CIDEr": "rewards words that distinguish an image from the others",
    "BLEU-4": "rewards matching sequences of four words",
    "ROUGE-L": "rewards the longest common sequence of words",
    "exact match": "share of captions that are letter for letter a reference",
    "repeated": "share of captions that another image got as well (lower is better)",
    "words per caption": "as a comparison: {reference_words:.1f} in the references",
    "ended by itself": "share of captions that were not cut at MAX_NEW_TOKENS",
}
# Scripts without blanks between words: each character counts as a word. \p{M} are accents and
# vowels that are written as marks.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}--\p{M}]\p{M}*"
WORD = regex.compile(rf"(?V1){UNSPACED}|(?:(?!{UNSPACED})[\p{{L}}\p{{N}}]\p{{M}}*)+")
FORMULA_SIGN = regex.compile(r"[\p{Sm}\\{}_^]")  # such as + = < and LaTeX's \ { } _ ^
WORD_OR_SIGN = regex.compile(rf"{WORD.pattern}|[^\s\p{{L}}\p{{N}}\p{{M}}\p{{Cc}}\p{{Cf}}]")


class Caption(NamedTuple):
    """What the model said, and whether it ended by itself."""

    text: str
    ended: bool


def check_question(text: str) -> str:
    """Refuse a question with what only the chat template may write: it would forge a turn."""
    forged = SPECIAL_TOKEN.search(text)
    if forged:
        raise ValueError(f"it contains {forged[0]}, which only the chat template may write")
    return text


def held_out_questions(table: datasets.Dataset) -> list[dict]:
    """Return a sample for each question of a table, where one with many captions has several."""
    questions = {}
    for sample in table:
        key = json.dumps([sample["images"], sample["prompt"]])
        question = questions.setdefault(key, {**sample, "references": []})
        question["references"] += sample["references"]
    return list(questions.values())


def ask_instead(sample: dict, text: str, base: Base) -> dict:
    """Return a sample that asks another question about the same images."""
    images = images_of(sample)
    marked = text
    if not IMAGE_MARKER.search(text):
        marked += "<|vision_start|><|vision_end|>" * len(images)
    [prompt] = encode_prompts(base.processor, (show_images(marked, images, base),))
    return {**sample, "question": text, "prompt": prompt}


def generate_captions(
    model: torch.nn.Module, collator: Collator, samples: list[dict], title: str
) -> list[Caption]:
    """Let the model answer samples, greedily; several processes share them and all get all."""
    model.eval()
    captions = []
    total = math.ceil(len(samples) / PartialState().num_processes)
    # The bar of the training stays where it is
    options = {"unit": " images", "position": 0, "leave": False}
    with tqdm(desc=title, total=total, disable=not IS_MAIN or not samples, **options) as bar:
        for _, batch in share_out(samples, collator.batch_size):
            captions += generate_batch(model, collator, batch)
            bar.update(len(batch))
    shares = gather_object([captions])
    in_order = itertools.chain.from_iterable(zip(*shares, strict=True))
    return list(in_order)[: len(samples)]


def share_out(
    samples: list[dict] | datasets.Dataset, size: int
) -> Iterator[tuple[range, list[dict]]]:
    """Yield this process's batches of samples, and their numbers; as many in each process.

    Under FSDP each needs the others for every pass. Numbers beyond the samples only fill up.
    """
    state = PartialState()
    whole = math.ceil(len(samples) / state.num_processes) * state.num_processes
    ours = range(state.process_index, whole, state.num_processes)
    for start in range(0, len(ours), size):
        numbers = ours[start : start + size]
        yield numbers, [samples[number % len(samples)] for number in numbers]


@torch.inference_mode()
def generate_batch(
    model: torch.nn.Module, collator: Collator, samples: list[dict]
) -> list[Caption]:
    """Let the model answer a batch of samples."""
    base = collator.base
    tokenizer = base.processor.tokenizer
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    batch = send_to_device(collator.make_batch(samples, with_answers=False), base.device)
    with base.autocast():
        tokens = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=(batch["owners"] != PADDING).long(),  # (B, T)
            mm_token_type_ids=(batch["input_ids"] == base.processor.image_token_id).int(),
            image_grid_thw=batch["grids"],
            mm_encoder_outputs=join_features(batch["features"], collator.features.hidden),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            eos_token_id=end,
            pad_token_id=collator.padding,
        )  # (B, T + new tokens)
    answers = tokens[:, batch["input_ids"].shape[1] :].tolist()
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [Caption(text.strip(), end in ids) for text, ids in zip(texts, answers, strict=True)]


def find_words(text: str, prose: bool) -> list[str]:
    """Split a text into words as COCO's scores do: lower case, without punctuation.

    Without prose, as in formulas, signs count too.
    """
    pattern = WORD if prose else WORD_OR_SIGN
    return pattern.findall(unicodedata.normalize("NFC", text.lower()))


def same_letters(text: str) -> str:
    """Return a text as it comes back from the model: one way to write é, no blanks at its ends."""
    return unicodedata.normalize("NFC", text).strip()


def are_prose(texts: list[str]) -> bool:
    """Tell whether texts are sentences, rather than labels or formulas."""
    sentences = 0
    for text in texts:
        words = len(find_words(text, prose=True))
        sentences += words > 2 and 3 * len(FORMULA_SIGN.findall(text)) < words
    return sentences > len(texts) / 2


class Scores:
    """How captions agree with what people wrote: COCO's own CIDEr, BLEU-4 and ROUGE-L, and more.

    Every reference counts. A score that can't mean anything with these references is left out, and
    notes says why.
    """

    def __init__(self, references: list[list[str]], images: list | None = None) -> None:
        """Take the references of each question, and a key of its image; None: all images differ."""
        self.references = references
        self.images = images or list(range(len(references)))
        self.prose = are_prose(list(itertools.chain.from_iterable(references)))
        self.words = [list(map(self.tokenize, texts)) for texts in references]
        counts = [len(text.split()) for text in itertools.chain.from_iterable(self.words)]
        self.reference_words = sum(counts) / len(counts)
        self.notes = {}
        if max(counts) == 0:
            for name in ("CIDEr", "BLEU-4", "ROUGE-L"):
                self.notes[name] = "the references have no words"
        # Never a silent 0: what do captions get that repeat a reference?
        perfect, _ = self.score([Caption(texts[0], ended=True) for texts in references])
        if perfect.get("CIDEr") == 0:
            self.notes["CIDEr"] = "it needs images whose references differ"
        if "BLEU-4" in perfect and (self.reference_words < 4 or perfect["BLEU-4"] < 0.5):
            self.notes["BLEU-4"] = "most references are shorter than four words"

    @property
    def headline(self) -> str:
        """Return the score that decides which evaluation was the best."""
        labels = self.reference_words <= 3
        return "exact match" if labels or "CIDEr" in self.notes else "CIDEr"

    def tokenize(self, text: str) -> str:
        """Return the words of a text, separated by blanks."""
        return " ".join(find_words(text, self.prose))

    def score(self, captions: list[Caption]) -> tuple[dict[str, float], list[float]]:
        """Return the scores of the captions together, and the CIDEr of each."""
        said = {number: [self.tokenize(each.text)] for number, each in enumerate(captions)}
        people = dict(enumerate(self.words))
        scores, ciders = {}, [0.0] * len(captions)
        if "CIDEr" not in self.notes:
            scores["CIDEr"], each = Cider().compute_score(people, said)
            ciders = each.tolist()
        if "BLEU-4" not in self.notes:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints its lengths
                scores["BLEU-4"] = Bleu(4).compute_score(people, said)[0][3]
        if "ROUGE-L" not in self.notes:
            scores["ROUGE-L"] = Rouge().compute_score(people, said)[0]
        shares = Counter()
        said_of = defaultdict(set)
        for caption, image in zip(captions, self.images, strict=True):
            said_of[caption.text].add(image)
        for caption, texts in zip(captions, self.references, strict=True):
            shares["exact match"] += same_letters(caption.text) in map(same_letters, texts)
            shares["repeated"] += len(said_of[caption.text]) > 1
            shares["words per caption"] += len(find_words(caption.text, self.prose))
            shares["ended by itself"] += caption.ended
        for name, count in shares.items():
            scores[name] = count / len(captions)
        return {name: float(value) for name, value in scores.items()}, ciders


def interval(values: list[float], images: list) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by resampling the images that the values are of.

    The values of single images are resampled, not the images with document frequencies of their
    own, which would move with every draw. Several questions about an image are drawn together.
    """
    groups = defaultdict(list)
    for value, image in zip(values, images, strict=True):
        groups[image].append(value)
    sums = numpy.array([sum(group) for group in groups.values()])
    counts = numpy.array([len(group) for group in groups.values()])
    # 2,000 draws move its ends by about a hundredth of its width
    draws = numpy.random.default_rng(SEED).integers(len(sums), size=(2000, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = numpy.percentile(means, [2.5, 97.5])
    return float(low), float(high)


class Judge:
    """Compare the base model with the fine-tuned one on the held-out questions."""

    def __init__(self, table: datasets.Dataset, collator: Collator) -> None:
        """Take the questions from the table of held-out samples."""
        self.collator = collator
        self.samples = held_out_questions(table)
        by_image = {}
        images = []
        for sample in self.samples:
            images.append(tuple(image.digest for image in images_of(sample)))
            by_image.setdefault(images[-1], sample)
        self.scores = Scores([sample["references"] for sample in self.samples], images)
        # A few of the images, with questions that were not trained on
        pairs = itertools.product(OTHER_QUESTIONS, list(by_image.values())[:3])
        self.others = [ask_instead(sample, text, collator.base) for text, sample in pairs]

    def caption_base(self, model: peft.PeftModel) -> dict[str, list[Caption]]:
        """Caption with the untouched base model, once for all evaluations and resumes."""
        path = Path(OUTPUT_FOLDER) / "base.json"
        asked = {"base": self.samples, "others": self.others}
        if STYLE_PROMPT:
            base = self.collator.base
            asked["base_short"] = [ask_instead(each, STYLE_PROMPT, base) for each in self.samples]
        # Whatever else says something else
        key = [asked, MAX_NEW_TOKENS, LOAD_IN_4BIT, self.collator.features.rule]
        key = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        with contextlib.suppress(OSError, ValueError, KeyError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == key:
                return {name: list(itertools.starmap(Caption, kept[name])) for name in asked}
        PartialState().wait_for_everyone()  # all have looked before the first one writes
        captions = {}
        with model.disable_adapter():
            for name, samples in asked.items():
                title = f"Captions of the base ({name})"
                captions[name] = generate_captions(model, self.collator, samples, title)
        if IS_MAIN:
            save_json(path, {"key": key, **captions})
        return captions

    def judge(self, model: peft.PeftModel, trained: bool) -> dict:
        """Return scores and captions; an adapter that was not trained yet changes nothing."""
        captions = self.caption_base(model)
        base_others = others = captions.pop("others")
        # The adapter's second matrix is zero at first
        captions["fine_tuned"] = captions["base"]
        if trained:
            ask = functools.partial(generate_captions, model, self.collator)
            captions["fine_tuned"] = ask(self.samples, "Captions")
            others = ask(self.others, "Other questions")
        results = self.compare(captions)
        for sample, before, now in zip(self.others, base_others, others, strict=True):
            row = {"images": sample["images"], "question": sample["question"]}
            results["others"].append({**row, "base": before.text, "fine_tuned": now.text})
        return results

    def compare(self, captions: dict[str, list[Caption]]) -> dict:
        """Return scores, their intervals, and a row for each question with all captions."""
        results = {
            "images": len(set(self.scores.images)),
            "headline": self.scores.headline,
            "notes": self.scores.notes,
            "reference_words": self.scores.reference_words,
            "scores": {},
            "intervals": {},
            "captions": [],
            "others": [],
        }
        ciders = {}
        for column, said in captions.items():
            results["scores"][column], ciders[column] = self.scores.score(said)
            results["intervals"][column] = interval(ciders[column], self.scores.images)
        gains = numpy.subtract(ciders["fine_tuned"], ciders["base"]).tolist()
        results["gain"] = [sum(gains) / len(gains), *interval(gains, self.scores.images)]
        for number, sample in enumerate(self.samples):
            row = {name: sample[name] for name in ("images", "question", "references")}
            for column, said in captions.items():
                row[column] = {**said[number]._asdict(), "CIDEr": ciders[column][number]}
            results["captions"].append(row)
        return results


# ---- Report: what people look at -----------------------------------------------------------------

REPORT = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
  body { font-family: sans-serif; max-width: 1400px; margin: 2em auto; padding: 0 1em }
  table { border-collapse: collapse; margin: 1em 0 }
  td, th { padding: 6px 12px; text-align: left; vertical-align: top }
  tr { border-bottom: 1px solid #ddd }
  td.number { text-align: right; font-variant-numeric: tabular-nums }
  img { width: 200px; border-radius: 4px }
  svg { width: 100%; height: auto }
  b { background: #c8f0c8; font-weight: normal }
  .quiet { color: #777 }
</style>
</head>
<body>

<h1>{{ title }}</h1>
<p>{{ summary }}</p>

<table>
  <tr>
    <th></th>
    {% for column in results.scores %}<th>{{ columns[column] }}</th>{% endfor %}
    <th></th>
  </tr>
  {% for name, meaning in score_names.items() %}
  <tr>
    <th>{{ name }}</th>
    {% for column, scores in results.scores.items() %}
    <td class="number">
      {% if name in scores %}{{ "%.3f" | format(scores[name]) }}{% else %}-{% endif %}
      {% if name == "CIDEr" and name in scores %}
      <span class="quiet">({{ "%.2f to %.2f" | format(*results.intervals[column]) }})</span>
      {% endif %}
    </td>
    {% endfor %}
    <td class="quiet">
      {% if name in results.notes %}means nothing here: {{ results.notes[name] }}
      {% else %}{{ meaning.format(**results) }}{% endif %}
    </td>
  </tr>
  {% endfor %}
</table>
<p class="quiet">Higher is better where not said otherwise. In brackets the 95 % interval: another
{{ results.images }} images would probably give a value within it. CIDEr can only be
compared between equally many images.</p>

{{ curves }}

{% for heading, rows in galleries.items() %}
<h2>{{ heading }}</h2>
<table>
  <tr>
    <th>image</th>
    {% if with_questions %}<th>question</th>{% endif %}
    <th>references</th>
    {% for column in results.scores %}<th>{{ columns[column] }}</th>{% endfor %}
    <th>CIDEr</th>
  </tr>
  {% for row in rows %}
  <tr>
    <td>{% for image in row.images %}{{ image | thumbnail }}{% endfor %}</td>
    {% if with_questions %}<td>{{ row.question | plain }}</td>{% endif %}
    <td>{% for reference in row.references %}{{ reference }}<br>{% endfor %}</td>
    {% for column in results.scores %}
    <td>{{ row[column].text | mark_words_of(row.references) }}</td>
    {% endfor %}
    <td class="number">{{ "%.3f" | format(row.fine_tuned.CIDEr) }}</td>
  </tr>
  {% endfor %}
</table>
{% endfor %}

{% if results.others %}
<h2>Questions that were not trained on</h2>
<p class="quiet">A model that answers these like a caption has forgotten how to answer.</p>
<table>
  <tr><th>image</th><th>question</th><th>base</th><th>fine-tuned</th></tr>
  {% for row in results.others %}
  <tr>
    <td>{% for image in row.images %}{{ image | thumbnail }}{% endfor %}</td>
    <td>{{ row.question }}</td><td>{{ row.base }}</td><td>{{ row.fine_tuned }}</td>
  </tr>
  {% endfor %}
</table>
{% endif %}

<h2>Settings</h2>
<table>
  {% for name, value in settings.items() %}
  <tr><th>{{ name }}</th><td>{{ value }}</td></tr>
  {% endfor %}
</table>
</body>
</html>
"""


def mark_words_of(caption: str, references: list[str]) -> Markup:
    """Return a caption as HTML; words that people used as well are highlighted."""
    used = set()
    for text in references:
        used.update(find_words(text, prose=True))
    marked, end = Markup(""), 0
    for match in WORD.finditer(caption):
        marked += caption[end : match.start()]
        shared = match[0].lower() in used
        marked += Markup("<b>{}</b>").format(match[0]) if shared else match[0]
        end = match.end()
    return marked + caption[end:]


def make_thumbnail(image: dict) -> Markup:
    """Return an image as HTML that holds the image itself, as the model saw it."""
    try:
        shown = open_image(image["path"], image["height"], image["width"])
    except Exception as error:  # moved, deleted or damaged since the model saw it
        return Markup("<p>{} ({})</p>").format(image["path"], error)
    jpeg = io.BytesIO()
    ImageOps.contain(shown, (280, 280)).save(jpeg, format="JPEG")  # 500 of them make 11 MB
    content = base64.b64encode(jpeg.getvalue()).decode()
    return Markup('<img alt="" src="data:image/jpeg;base64,{}">').format(content)


def draw_curves(results: dict, state: State) -> Markup:
    """Draw the course of the training, and how long the captions are, as SVG."""
    history = pandas.DataFrame(state.log_history).groupby("step").first()
    panels = {
        "loss": ["loss", "eval_loss"],
        "CIDEr": ["eval_CIDEr"],
        "BLEU-4 and ROUGE-L": ["eval_BLEU-4", "eval_ROUGE-L"],
        "learning rate": ["learning_rate"],
        "gradient norm": ["grad_norm"],
    }
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8))
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            if name in history:
                points = history[name].dropna()
                label = name.replace("eval_loss", "held-out loss").removeprefix("eval_")
                axis.plot(points.index, points, marker=".", label=label.replace("_", " "))
        axis.set(title=title, xlabel="step")
        axis.legend(handles=axis.lines)
    lengths = defaultdict(list)
    for row in results["captions"]:
        for text in row["references"]:
            lengths["references"].append(len(find_words(text, prose=True)))
        for column in results["scores"]:
            lengths[COLUMNS[column]].append(len(find_words(row[column]["text"], prose=True)))
    longest = max(map(max, lengths.values()))
    for name, values in lengths.items():
        shares = numpy.bincount(values, minlength=longest + 1) / len(values)
        axes[1, 2].plot(shares, label=name)
    axes[1, 2].set(title="caption length", xlabel="words per caption", ylabel="share")
    axes[1, 2].legend()
    svg = io.StringIO()
    figure.tight_layout()
    figure.savefig(svg, format="svg")
    pyplot.close(figure)
    return Markup("<svg" + svg.getvalue().partition("<svg")[2])


def write_report(results: dict, state: State, run: dict) -> Path:
    """Write report.html: scores, curves, images with their captions, and all settings."""
    rows = results["captions"]
    ranked = sorted(rows, key=lambda row: row["fine_tuned"]["CIDEr"])
    judged_on = f"{results['images']} held-out images"
    if len(rows) > results["images"]:
        judged_on += f" with {len(rows)} questions"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["mark_words_of"] = mark_words_of
    environment.filters["plain"] = lambda question: IMAGE_MARKER.sub(" ", question).strip()
    environment.filters["thumbnail"] = make_thumbnail
    page = environment.from_string(REPORT).render(
        title=describe_results(results),
        summary=f"{judged_on}, step {results['step']} of {state.max_steps}",
        columns=COLUMNS,
        score_names=SCORE_NAMES,
        results=results,
        curves=draw_curves(results, state),
        galleries={"Best five": ranked[:-6:-1], "Worst five": ranked[:5], "All": rows},
        with_questions=len({row["question"] for row in rows}) > 1,
        settings={**run["versions"], **run["constants"]},
    )
    path = Path(OUTPUT_FOLDER).absolute() / "report.html"
    with write_atomically(path) as file:
        file.write(page)
    return path


def describe_results(results: dict) -> str:
    """Return the headline of an evaluation in one line."""
    name = results["headline"]
    before = results["scores"]["base"][name]
    now = results["scores"]["fine_tuned"][name]
    text = f"{name} {before:.3f} before, {now:.3f} now"
    if name != "CIDEr":
        return text
    return text + " (gain {:+.3f}, 95 % interval {:+.3f} to {:+.3f})".format(*results["gain"])


def print_results(results: dict, report: Path | None) -> None:
    """Print scores and some captions to the terminal."""
    lines = [""]
    for row in results["captions"][:SAMPLES_SHOWN]:
        for column in results["scores"]:
            lines.append(f"{column + ':':12}{row[column]['text']}")
        lines += [f"{'reference:':12}{row['references'][0]}", ""]
    table = pandas.DataFrame(results["scores"], index=list(SCORE_NAMES))
    lines.append(table.to_string(float_format="{:.3f}".format, na_rep="-", col_space=12))
    for name, reason in results["notes"].items():
        lines.append(f"{name} means nothing here: {reason}.")
    lines.append(describe_results(results))
    if report:
        lines.append(f"See {report}")
    tqdm.write("\n".join(lines))


# ---- Training ------------------------------------------------------------------------------------


class SaveAndStop(transformers.TrainerCallback):
    """Save at the end of each epoch; on Ctrl-C and the like finish the step, save it and stop."""

    training = False  # whether there is something to save
    number = 0  # of the signal that asked to stop

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; before training, and the second time, end the script at once."""
        if self.number or not self.training:
            stop(number, frame)
        self.number = number
        with contextlib.suppress(OSError):  # pythonw.exe has nothing to write to
            os.write(2, b"\nStopping after this step, which will be saved. Once more: at once.\n")

    def on_train_begin(self, args: Arguments, state: State, control: Control, **_: Any) -> None:
        """From now on there is something to save."""
        self.training = True
        handle_stop_signals(self.stop)  # again: SwanLab has set its own

    def on_step_end(self, args: Arguments, state: State, control: Control, **_: Any) -> None:
        """Stop all processes if one of them was asked to."""
        number = self.number
        if args.world_size > 1:
            number = reduce(torch.tensor(number, device=args.device), "sum").item()
        if number:
            control.should_training_stop = True
        if number or state.epoch.is_integer():
            control.should_save = True

    def on_epoch_end(self, args: Arguments, state: State, control: Control, **_: Any) -> None:
        """Don't evaluate half an epoch, nor when it has to stop: the next start does it."""
        stopping = control.should_training_stop and state.global_step < state.max_steps
        if stopping or not state.epoch.is_integer():
            control.should_evaluate = False


class LogLine(transformers.ProgressCallback):
    """Show one bar, and one readable line per log."""

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Show no second bar."""

    def on_log(self, args: Arguments, state: State, control: Control, logs: dict, **_: Any) -> None:
        """Print a line such as step 120/500 | loss 2.345 | lr 9.1e-05 | 12.3 images/s | ..."""
        if self.training_bar is None:
            return
        form = {
            "loss": "loss {:.3f}",
            "learning_rate": "lr {:.1e}",
            "grad_norm": "gradient {:.2f}",
            "images_per_second": "{:.1f} images/s",
            "memory_gib": "{:.1f} GiB",
            "minutes_left": "{:.0f} min left",
            "eval_loss": "held-out loss {:.3f}",
        }
        parts = [text.format(logs[name]) for name, text in form.items() if name in logs]
        if parts:
            step = f"step {state.global_step}/{state.max_steps}"
            self.training_bar.write(" | ".join([step, *parts]))


class HeaviestPass(transformers.TrainerCallback):
    """Try the heaviest pass before the first step, and choose batch size and checkpointing.

    Two kinds of samples are heavy: the longest ones, and those with the most learned tokens, each
    of which has a logit for every word of the vocabulary.
    """

    def __init__(self, trainer: "CaptionTrainer") -> None:
        """Take the trainer, whose loss is what will be computed."""
        self.trainer = trainer
        self.collator = trainer.data_collator

    def on_train_begin(self, args: Arguments, state: State, control: Control, **_: Any) -> None:
        """Choose, and print what the training will need."""
        on_gpu = args.device.type == "cuda"
        # A CPU has no such limit, and no number as exact; of several GPUs the fullest counts
        free = min(gather_object([free_memory()])) if on_gpu else math.inf
        size = min(self.collator.batch_size, args.per_device_train_batch_size)
        checkpointing = GRADIENT_CHECKPOINTING is True
        if on_gpu and "auto" in (BATCH_SIZE, GRADIENT_CHECKPOINTING):
            size, checkpointing = self.choose(0.9 * free, args.per_device_train_batch_size)
        self.collator.batch_size = size
        self.set_checkpointing(checkpointing)
        needed = self.measure(size)
        reset_peak()
        print(
            f"{size} images per pass, gradient checkpointing {'on' if checkpointing else 'off'}: "
            f"the heaviest pass takes {needed / 2**30:.2f} GiB with Adam's state."
        )
        if needed > 0.95 * free:
            # Windows and WSL don't fail, but move what does not fit to main memory
            recompute = "" if checkpointing else " or set GRADIENT_CHECKPOINTING = True"
            print(
                f"That is more than is free. Lower BATCH_SIZE{recompute}, or training will be very "
                "slow."
            )

    def choose(self, limit: float, share: int) -> tuple[int, bool]:
        """Return batch size and checkpointing: the largest that fits, if need be recomputed."""
        if BATCH_SIZE != "auto":
            sizes = [min(BATCH_SIZE, share)]
        else:
            sizes = [2**power for power in range(share.bit_length())]
        tries = [False, True] if GRADIENT_CHECKPOINTING == "auto" else [GRADIENT_CHECKPOINTING]
        for checkpointing in tries:
            self.set_checkpointing(checkpointing)
            best = self.largest_that_fits(sizes, limit)
            # A single image per pass keeps no GPU busy: recompute instead, if more are wanted
            if best > 1 or best == sizes[-1]:
                return best, checkpointing
        if best:
            return best, checkpointing
        recompute = "" if checkpointing else "set GRADIENT_CHECKPOINTING = True, "
        raise SystemExit(
            f"A pass of {sizes[0]} images does not fit into the {limit / 0.9 / 2**30:.1f} GiB that "
            "are free on the GPU. Close other programs that use it (nvidia-smi lists them), "
            f"{recompute}lower BATCH_SIZE, IMAGE_SIZE or MAX_LENGTH, or set LOAD_IN_4BIT = True."
        )

    def largest_that_fits(self, sizes: list[int], limit: float) -> int:
        """Try growing batch sizes; return the last one within the limit, 0 if there is none."""
        best, peaks = 0, []
        for size in sizes:
            # A line through the last two predicts the next: a try may not run out of memory
            if len(peaks) > 1 and peaks[-1] + 2 * (peaks[-1] - peaks[-2]) > limit:
                break
            try:
                peak = self.measure(size)
            except torch.OutOfMemoryError:
                peak = math.inf
            peaks.append(max(gather_object([peak])))  # all processes choose the same
            if peaks[-1] > limit:
                break
            best = size
        torch.cuda.empty_cache()
        return best

    def set_checkpointing(self, on: bool) -> None:
        """Recompute the activations of each layer in the backward pass, or keep them."""
        model = self.trainer.model
        if on:
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:
            model.activation_checkpointing_disable()

    def measure(self, size: int) -> int:
        """Return the peak bytes of training passes with so many samples, Adam's state included."""
        trainer = self.trainer
        trained = trained_bytes(trainer.model)
        # Adam makes its two numbers per weight in the first step, DDP its buckets in the first pass
        missing = 0 if trainer.optimizer.state else 2 * trained
        if trainer.args.world_size > 1:
            missing += trained
        reset_peak()
        try:
            for samples in heaviest(trainer.train_dataset, size):
                # From the second pass on there are gradients to add to
                trainer.try_pass(samples)
                trainer.try_pass(samples)
            # An evaluation needs less, unless its samples are much heavier
            for samples in heaviest(trainer.eval_dataset, size):
                trainer.token_losses(self.collator.make_pass(samples))
        finally:
            trainer.model.zero_grad()
        return peak_memory() + missing


def heaviest(table: datasets.Dataset, size: int) -> list[list[dict]]:
    """Return the longest samples, and those with the most learned tokens if they are others."""
    chosen = {}
    for column in ("tokens", "learned"):
        rows = numpy.argsort(table[column][:], kind="stable")[-size:]
        chosen[frozenset(rows.tolist())] = table.select(rows).to_list()
    return list(chosen.values())


class CaptionTrainer(transformers.Trainer):
    """The Hugging Face Trainer, for batches that are cut into passes, with its own evaluation."""

    def __init__(self, judge: Judge, run: dict, **options: Any) -> None:
        """Set up the Trainer; judge compares the captions, run is what the report says of it."""
        super().__init__(**options)
        self.judge = judge
        self.run = run
        self.hidden = self.data_collator.features.hidden
        # Qwen2.5-VL and Qwen3-VL don't say so, but do take the number of tokens of a whole step
        self.model_accepts_loss_kwargs = True
        self.results = {}  # of the latest evaluation
        self.step_images = []  # names of those in the current step
        self.loss_is_finite = True  # in the current step
        self.skipped = 0  # steps in a row without finite gradients
        self.clock = None  # (seconds, step) where the pace is counted from

    # What a step sees

    def _get_train_sampler(self, dataset: Any = None) -> torch.utils.data.Sampler:  # noqa: ANN401
        """Shuffle, and fill up the last step of an epoch so that all steps have as many images."""
        # accelerate would fill it up too, but by another number for each number of GPUs
        step = self.args.per_device_train_batch_size * self.args.world_size
        whole = math.ceil(len(self.train_dataset) / step) * step
        return torch.utils.data.RandomSampler(self.train_dataset, num_samples=whole)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """Let the rate rise over WARMUP of the steps, then fall to 0; no step has a rate of 0."""
        # The library's own schedule starts with a step at rate 0
        warmup = math.ceil(WARMUP * num_training_steps)

        def factor(step: int) -> float:
            rising = (step + 1) / (warmup + 1)
            falling = (num_training_steps - step) / max(1, num_training_steps - warmup)
            return max(0.0, min(rising, falling, 1.0))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: torch.nn.Module, inputs: dict, count: int) -> torch.Tensor:
        """Run the passes of a step of count tokens and add up their gradients and losses."""
        # So that a resumed run draws the same dropout
        torch.manual_seed(hash((SEED, self.state.global_step, self.args.process_index)))
        self.clock = self.clock or (time.monotonic(), self.state.global_step)
        self.step_images = sum((each["names"] for each in inputs["passes"]), [])
        *others, last = inputs["passes"]
        losses = []
        for batch in others:
            # Several processes exchange their gradients once, in the last pass
            with self.accelerator.no_sync(model):
                losses.append(super().training_step(model, batch, count))
        losses.append(super().training_step(model, last, count))
        loss = torch.stack(losses).sum()
        self.loss_is_finite = bool(loss.isfinite())
        # Under float16 a single step may be lost
        if not self.loss_is_finite and self.accelerator.scaler is None:
            raise SystemExit(
                f"The loss is {loss.item()} in step {self.state.global_step + 1}, on "
                f"{', '.join(self.step_images)}. Look at these images and their captions, or "
                "lower LEARNING_RATE with a new OUTPUT_FOLDER. The checkpoints are kept."
            )
        return loss

    def compute_loss(self, model: torch.nn.Module, inputs: dict, **options: Any) -> torch.Tensor:
        """Return the loss of a pass: its sum over tokens, divided by those of the whole step."""
        return super().compute_loss(model, model_inputs(inputs, self.hidden), **options)

    def try_pass(self, samples: list[dict]) -> None:
        """Run a training pass whose gradients are thrown away by the caller."""
        batch = send_to_device(self.data_collator.make_pass(samples), self.args.device)
        count = batch["shift_labels"].numel()
        self.model.train()
        with self.compute_loss_context_manager():
            loss = self.compute_loss(self.model, batch, num_items_in_batch=count)
        loss.backward()

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Clip the gradients; leave out a step whose gradients are not finite, in all processes."""
        norm = super()._clip_grad_norm(model)
        if math.isfinite(norm.item()):
            self.skipped = 0
            return norm
        step = self.state.global_step + 1
        scaler = self.accelerator.scaler
        finite_losses = all(gather_object([self.loss_is_finite]))
        # The scaler leaves the step out itself and scales the loss less, which helps gradients only
        if scaler is not None and finite_losses:
            scale = scaler.get_scale()
            tqdm.write(f"Step {step} is left out: float16 overflowed at loss scale {scale}.")
            return norm
        self.skipped += 1
        what = "gradient" if finite_losses else "loss"
        tqdm.write(f"Step {step} is left out: its {what} is not finite. It saw:")
        tqdm.write("  " + ", ".join(gather_object(self.step_images)))
        if self.skipped == 3:
            raise SystemExit(
                "Three steps in a row had no finite gradient. Look at these images and their "
                "captions, or lower LEARNING_RATE with a new OUTPUT_FOLDER. The checkpoints are "
                "kept."
            )
        model.zero_grad()  # the optimizer passes over weights without a gradient
        return norm

    # What is logged, judged and kept

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add speed and memory of the training to the Trainer's numbers."""
        if "loss" in logs and self.clock:
            now, step = time.monotonic(), self.state.global_step
            pace = (now - self.clock[0]) / max(1, step - self.clock[1])  # seconds per step
            images = self.args.per_device_train_batch_size * self.args.world_size
            logs["images_per_second"] = images / pace
            logs["memory_gib"] = peak_memory() / 2**30
            logs["minutes_left"] = pace * (self.state.max_steps - step) / 60
            self.clock = (now, step)
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def token_losses(self, batch: dict) -> torch.Tensor:
        """Return the loss of each learned token (N,) of a pass."""
        self.model.eval()
        inputs = model_inputs(send_to_device(batch, self.args.device), self.hidden)
        with self.compute_loss_context_manager():
            logits = self.model_wrapped(**inputs).logits  # (N, vocabulary)
        cross_entropy = torch.nn.functional.cross_entropy
        return cross_entropy(logits.float(), inputs["shift_labels"], reduction="none").cpu()

    def held_out_loss(self) -> float:
        """Return the mean loss over all tokens that are held out.

        Added up token by token, so the same for any number of processes and images per pass.
        """
        total, count = 0.0, 0
        for numbers, samples in share_out(self.eval_dataset, self.data_collator.batch_size):
            batch = self.data_collator.make_pass(samples)
            losses = self.token_losses(batch)  # (N,)
            # Samples that only fill up do not count
            rows = batch["logits_to_keep"].nonzero()[:, 0]  # (N,), the sample of each token
            real = torch.tensor(numbers)[rows] < len(self.eval_dataset)  # (N,)
            total += losses[real].double().sum().item()
            count += int(real.sum())
        total, count = numpy.sum(gather_object([(total, count)]), axis=0)
        return float(total / count)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compare the captions of the held-out images; the Trainer calls this each epoch."""
        step = self.state.global_step
        metrics = {"eval_loss": self.held_out_loss()}
        self.results = self.judge.judge(self.model, trained=step > 0)
        self.results["step"] = step
        for name, value in self.results["scores"]["fine_tuned"].items():
            metrics[f"eval_{name}"] = value
        self.log(metrics)
        self.keep_adapter()
        if IS_MAIN:
            show_results(self.results, self.state, self.run)
        self.clock = None  # the time of an evaluation is no training
        reset_peak()
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @explain_full_disk()
    def keep_adapter(self) -> None:
        """Keep the adapter and its results in OUTPUT_FOLDER/kept, if KEEP wants this one."""
        epoch_ended = self.state.global_step and float(self.state.epoch).is_integer()
        if not epoch_ended:
            return
        folder, unfinished = Path(OUTPUT_FOLDER) / "kept", Path(OUTPUT_FOLDER) / "kept.tmp"
        score = self.results["scores"]["fine_tuned"][self.results["headline"]]
        best = -math.inf
        with contextlib.suppress(OSError, ValueError, KeyError):
            kept = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            best = kept["scores"]["fine_tuned"][self.results["headline"]]
        PartialState().wait_for_everyone()  # all have looked before the first one writes
        # Of equals the later one: its loss has seen more
        if KEEP == "best" and score < best:
            return
        # FSDP gathers the weights from all processes
        weights = self.accelerator.get_state_dict(self.model_wrapped)
        if IS_MAIN:
            shutil.rmtree(unfinished, ignore_errors=True)
            model = self.accelerator.unwrap_model(self.model)
            model.save_pretrained(unfinished, state_dict=weights)
            self.data_collator.base.processor.save_pretrained(unfinished)
            share_with_others(unfinished / "adapter_model.safetensors")
            write_model_card(unfinished, self.results, self.run)
            save_json(unfinished / "results.json", self.results, indent=2)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)

    @explain_full_disk()
    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:  # noqa: ANN401
        """Write a checkpoint to the disk, and only then delete the oldest one."""
        self.check_room(checkpoints=1)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not all(parameter.isfinite().all() for parameter in trained):
            raise SystemExit(
                "The adapter's weights are no longer finite. The last checkpoint is kept. Lower "
                "LEARNING_RATE, with a new OUTPUT_FOLDER."
            )
        super()._save_checkpoint(model, trial)
        # Each process has written its part
        PartialState().wait_for_everyone()
        if IS_MAIN:
            newest = Path(OUTPUT_FOLDER) / f"checkpoint-{self.state.global_step}"
            for path in newest.glob("*.safetensors"):
                share_with_others(path)
            flush_to_disk(newest)
            older = [checkpoint for checkpoint in find_checkpoints() if checkpoint != newest]
            for checkpoint in older[: max(0, len(older) + 1 - KEEP_CHECKPOINTS)]:
                shutil.rmtree(checkpoint, ignore_errors=True)

    def check_room(self, checkpoints: int) -> None:
        """Stop if so many checkpoints don't fit on the disk."""
        # Adam keeps two numbers for each weight
        needed = checkpoints * (3 * trained_bytes(self.model) + 2**24)
        check_disk(OUTPUT_FOLDER, needed, "checkpoints")


def trained_bytes(model: torch.nn.Module) -> int:
    """Return the size of the weights that are trained."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def share_with_others(path: Path) -> None:
    """Let those read a file who can read its neighbour: safetensors' are for their owner alone."""
    shutil.copymode(path.with_name("adapter_config.json"), path)


def flush_to_disk(folder: Path) -> None:
    """Wait until all files of a folder have reached the disk: a power cut may come."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def show_results(results: dict, state: State, run: dict) -> None:
    """Show an evaluation in report.html, in SwanLab and in the terminal."""
    report = None
    with only_for_looking("report.html can't be written"):
        report = write_report(results, state, run)
    with only_for_looking("SwanLab does not take the samples"):
        log_samples(results, state.global_step)
    print_results(results, report)


@contextlib.contextmanager
def only_for_looking(fault: str) -> Iterator[None]:
    """Say what goes wrong, and continue: it is tried again after the next epoch."""
    try:
        yield
    except Exception as error:  # SwanLab alone raises dozens of kinds
        tqdm.write(f"{fault} ({error!r}). Training continues.")


def build_trainer(
    model: peft.PeftModel,
    collator: Collator,
    tables: datasets.DatasetDict,
    run: dict,
    checkpoint: Path | None,
) -> CaptionTrainer:
    """Set up the Hugging Face Trainer, with one callback for each duty."""
    trainer = CaptionTrainer(
        judge=Judge(tables["test"], collator),
        run=run,
        model=model,
        args=training_arguments(collator.base, len(tables["train"]), checkpoint),
        data_collator=collator,
        train_dataset=tables["train"],
        eval_dataset=tables["test"],
    )
    # LogLine is one too: the original has to go first
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.add_callback(HeaviestPass(trainer))
    trainer.add_callback(LogLine())
    trainer.add_callback(SwanLabCurves())
    return trainer


def training_arguments(base: Base, samples: int, checkpoint: Path | None) -> Arguments:
    """Return the Trainer's arguments for so many samples to train on."""
    processes = PartialState().num_processes
    # Where there are fewer images than a step takes, each step sees all of them
    images = min(IMAGES_PER_STEP // processes, math.ceil(samples / processes))
    steps = math.ceil(samples / (images * processes))
    epoch = 0.0
    if checkpoint:
        epoch = State.load_from_json(str(checkpoint / "trainer_state.json")).epoch
    arguments = Arguments(
        output_dir=OUTPUT_FOLDER,
        seed=SEED,
        use_cpu=base.device.type == "cpu",
        bf16=base.dtype == torch.bfloat16,
        fp16=base.dtype == torch.float16,
        # Batches. The collator cuts the images of a step into passes, so that BATCH_SIZE changes
        # nothing else; a step sees as many images on any number of GPUs.
        per_device_train_batch_size=images,
        remove_unused_columns=False,  # the collator needs the whole sample
        dataloader_pin_memory=base.device.type == "cuda",
        ddp_find_unused_parameters=False,
        # Optimisation
        num_train_epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        # Evaluation: at the start too, unless it resumes within an epoch
        eval_strategy="epoch",
        eval_on_start=epoch.is_integer(),
        # Logging: at least once per epoch; training_step looks for infinite losses itself
        logging_steps=min(LOG_STEPS, steps),
        logging_nan_inf_filter=False,
        disable_tqdm=False,
        # Checkpoints: CaptionTrainer deletes the older ones
        save_steps=SAVE_STEPS,
    )
    arguments._n_gpu = 1  # one process, one GPU: keep the Trainer from using DataParallel
    return arguments


def announce(tables: datasets.DatasetDict, trainer: CaptionTrainer) -> None:
    """Print the numbers that follow from constants and data, before the work starts."""
    train = tables["train"]
    captions = sum(map(len, train["references"]))
    images = itertools.chain.from_iterable(map(images_of, train))
    most_tokens = max(map(trainer.data_collator.features.tokens, images))
    images = trainer.args.per_device_train_batch_size * trainer.args.world_size
    steps = math.ceil(len(train) / images)
    trainable, total = trainer.model.get_nb_trainable_parameters()
    print(
        f"{len(train)} samples with {captions} captions to train on, {len(tables['test'])} samples "
        f"held out. At most {most_tokens} tokens per image."
    )
    print(f"{trainable:,} parameters are trained, {total - trainable:,} are frozen.")
    print(
        f"{EPOCHS} epochs of {steps} steps with {images} images each: {EPOCHS * steps} steps. "
        f"Results go to {Path(OUTPUT_FOLDER).absolute()}"
    )
    trainer.check_room(KEEP_CHECKPOINTS + 1 - len(find_checkpoints()))
    if EPOCHS * steps < 20:
        print(
            f"Only {EPOCHS * steps} steps: that teaches little. Take more images, a higher EPOCHS, "
            "or a lower IMAGES_PER_STEP."
        )


# ---- SwanLab -------------------------------------------------------------------------------------


# What SwanLab shows of the Trainer's numbers; the others make no useful curves
CURVES = {
    "loss": "train/loss",
    "grad_norm": "train/gradient norm",
    "learning_rate": "train/learning rate",
    "images_per_second": "train/images per second",
    "memory_gib": "train/memory GiB",
}


class SwanLabCurves(transformers.TrainerCallback):
    """Send the curves that people look at to SwanLab.

    SwanLab's own callback also sends the Trainer's arguments, which hold the names of folders.
    """

    def on_log(self, args: Arguments, state: State, control: Control, logs: dict, **_: Any) -> None:
        """Send what is logged, if there is a SwanLab run."""
        points = {}
        for name, value in logs.items():
            if name in CURVES:
                points[CURVES[name]] = value
            elif name.startswith("eval_"):
                points[name.replace("eval_", "eval/", 1)] = value
        if points and swanlab.has_run():
            with only_for_looking("SwanLab does not take the numbers"):
                swanlab.log(points, step=state.global_step)


def start_swanlab(run: dict) -> None:
    """Start a SwanLab run. Whatever is wrong with SwanLab is printed, and training continues."""
    drop_unreadable_variables()
    config = public_settings(run)
    if SHARE_MACHINE_INFO:
        config = {**run["versions"], **run["constants"]}
    # Offline: recorded on disk, for swanlab sync to upload later
    for mode in (SWANLAB_MODE, "offline"):
        try:
            settings = swanlab.Settings(
                interactive=False,  # it asks for no key
                probe=swanlab.Settings.Probe(
                    runtime=SHARE_MACHINE_INFO,
                    git=SHARE_MACHINE_INFO,
                    requirements=SHARE_MACHINE_INFO,
                    swanlab=SHARE_MACHINE_INFO,
                ),
                terminal=swanlab.Settings.Terminal(proxy_type="none"),
            )
            if mode == "auto":
                logged_in = "online" if settings.api_key else "local"
                mode = os.environ.get("SWANLAB_MODE") or logged_in
            if mode == "online":  # a start that hangs would let no other begin
                requests.head(settings.api_host, timeout=min(10, SWANLAB_TIMEOUT))
            within(
                SWANLAB_TIMEOUT,
                swanlab.init,
                project=SWANLAB_PROJECT,
                name=SWANLAB_EXPERIMENT,
                config=config,
                mode=mode,
                settings=settings,
            )
            return
        except Exception as error:  # SwanLab raises dozens of kinds, and none may stop a training
            print(f"SwanLab does not start in mode {mode}: {error!r}")


def is_path(name: str) -> bool:
    """Tell whether a constant is a path."""
    rule = get_type_hints(sys.modules[__name__], include_extras=True).get(name)
    return rule in (PathText, PathText | None)


def public_settings(run: dict) -> dict:
    """Return versions and constants without paths, which may hold a person's name."""
    settings = {**run["versions"], **run["constants"]}
    return {name: value for name, value in settings.items() if not is_path(name)}


def drop_unreadable_variables() -> None:
    """Leave out environment variables that stop SwanLab from starting, such as SWANLAB_PROJECT."""
    variables = {name: os.environ[name] for name in os.environ if name.startswith("SWANLAB_")}
    for name in variables:
        del os.environ[name]
    for name, value in variables.items():
        os.environ[name] = value
        try:
            swanlab.Settings(interactive=False)
        except ValueError:
            del os.environ[name]
            print(f"SwanLab can't read the environment variable {name}: left out for this run.")


def within(seconds: float, function: Callable, **options: Any) -> None:
    """Call a function that may never return; raise its error, or TimeoutError after seconds."""
    outcome = {}

    def call() -> None:
        try:
            function(**options)
        except BaseException as error:  # carried over to the thread that waits
            outcome["error"] = error

    # A thread of a pool would be waited for when the script ends
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    if "error" in outcome:
        raise outcome["error"]


def finish_swanlab(failure: BaseException | None) -> None:
    """Finish the run; if SwanLab does not answer, say how to upload it later."""
    if not swanlab.has_run():
        return
    run = swanlab.get_run()
    advice = f"Upload it later: swanlab sync {run.dir} --id {run.id}"
    # Its text may name folders
    end = {"state": "crashed", "error": type(failure).__name__} if failure else {}
    try:
        within(SWANLAB_TIMEOUT, swanlab.finish, **end)
    except Exception as error:  # whatever it is, the training is over
        print(f"SwanLab did not finish ({error!r}). {advice}", flush=True)
        if isinstance(failure, SystemExit):
            print(failure, file=sys.stderr, flush=True)
            leave(failure.code)
        elif failure:
            traceback.print_exception(failure)
            leave(1)


def leave(code: int | str | None) -> None:
    """End the process at once if threads of libraries would keep it alive or abort it.

    SwanLab's keep it alive if it did not finish. Those of a process group, which FSDP never lets
    go of, may abort it while Python ends.
    """
    if swanlab.has_run() or PartialState().num_processes > 1:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def log_samples(results: dict, step: int) -> None:
    """Show a few held-out images with their captions in SwanLab."""
    if not swanlab.has_run():
        return
    images, texts = [], []
    for row in results["captions"][:SAMPLES_SHOWN]:
        lines = [f"{column}: {row[column]['text']}" for column in results["scores"]]
        caption = "\n".join([*lines, f"reference: {row['references'][0]}"])
        first = row["images"][0]
        image = open_image(first["path"], first["height"], first["width"])
        images.append(swanlab.Image(image, caption=caption, file_type="jpg"))
        texts.append(swanlab.Text(caption, caption=caption[:50]))
    swanlab.log({"samples": images, "captions": texts}, step=step)
    swanlab.config.update({"adapter of step": results["step"]})


# ---- Using the result ----------------------------------------------------------------------------

MODEL_CARD = """\
---
base_model: {{ base_model }}
library_name: peft
---
# LoRA adapter for {{ base_model }}

Made by train.py, and judged on {{ results.images }} held-out images after step
{{ results.step }}:

| score |{% for column in results.scores %} {{ columns[column] }} |{% endfor %}

|---|{{ "---|" * (results.scores | length) }}
{% for name in score_names %}
| {{ name }}{% for scores in results.scores.values() %} | \
{{ "%.3f" | format(scores[name]) if name in scores else "-" }}{% endfor %} |
{% endfor %}

Ask it as it was trained: with the prompt `{{ prompt }}` and images of
{{ run.size }}. To caption images with it, set `CAPTION` at the top of train.py.

{% for name, value in settings.items() %}
* {{ name }}: {{ value }}
{% endfor %}
"""


def write_model_card(folder: Path, results: dict, run: dict) -> None:
    """Write README.md beside the adapter: what it is, how good, and how to ask it."""
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.ChainableUndefined)
    card = environment.from_string(MODEL_CARD).render(
        base_model="/".join(Path(MODEL_FOLDER).parts[-2:]),
        results=results,
        columns=COLUMNS,
        score_names=SCORE_NAMES,
        run=run,
        prompt=run["prompt"].replace("\n", "\\n"),
        settings=public_settings(run),
    )
    with write_atomically(folder / "README.md") as file:
        file.write(card)


class Request(NamedTuple):
    """An image to caption."""

    name: str  # as the user gave it
    path: str
    question: str  # "" for that of the training
    digest: str = ""  # SHA-256 of the file


def read_requests() -> list[Request]:
    """Return what CAPTION names: an image, the images of a folder, or the rows of a CSV."""
    source = Path(CAPTION)
    if not source.exists():
        raise SystemExit(f"CAPTION = {CAPTION!r} names no image: {source.absolute()} is missing.")
    if source.is_dir():
        Image.init()
        known = {end for end, kind in Image.EXTENSION.items() if kind in IMAGE_FORMATS}
        files = sorted(path for path in source.iterdir() if path.suffix.lower() in known)
        wanted = [Request(path.as_posix(), os.path.abspath(path), "") for path in files]
    elif source.suffix.lower() == ".csv":
        wanted = read_csv_requests(source)
    else:
        wanted = [Request(CAPTION, os.path.abspath(source), "")]
    if not wanted:
        raise SystemExit(f"CAPTION = {CAPTION!r} names no image.")
    return wanted


def read_csv_requests(source: Path) -> list[Request]:
    """Return the images and questions that a CSV names, relative to its folder."""
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            # Excel writes semicolons where the comma is the decimal sign
            separator = max(",;\t", key=header.count)
            file.seek(0)
            reader = csv.DictReader(file, restval="", delimiter=separator, strict=True)
            rows = list(reader)
    except OSError as error:
        raise SystemExit(f"CAPTION = {CAPTION!r} can't be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise SystemExit(
            f"CAPTION = {CAPTION!r} can't be read: {error}. In Excel, save it as 'CSV UTF-8'."
        ) from None
    except csv.Error as error:
        raise SystemExit(
            f"CAPTION = {CAPTION!r}, in the row that begins on line {reader.line_num + 1}: "
            f"{error}. Is a quote missing its partner?"
        ) from None
    check_caption_columns(list(reader.fieldnames or []))
    wanted = []
    for number, row in enumerate(rows, start=1):
        question = read_question(number, row)
        try:
            path = locate_image(row["image_path"], source.parent.resolve())
            wanted.append(Request(row["image_path"], path, question))
        except ValueError as reason:
            print(f"Left out: row {number} {reason}.")
    return wanted


def check_caption_columns(names: list[str]) -> None:
    """Stop if the columns are not called as they must be."""
    for column in ("image_path", "question"):
        # Without case, blanks, underscores and characters that nobody sees
        letters = column.replace("_", "")
        alike = [name for name in names if "".join(filter(str.isalnum, name)).lower() == letters]
        if alike == [column] or (not alike and column == "question"):
            continue
        raise SystemExit(
            f"CAPTION = {CAPTION!r} has the columns {names}. There must be one image_path, and "
            "perhaps one question, written exactly so."
        )


def read_question(number: int, row: dict) -> str:
    """Return the question of a row of CAPTION's CSV, "" if it has none of its own."""
    question = row.get("question", "").strip()
    try:
        if None in row:
            raise ValueError('put text with commas in straight double quotes (")')
        return "" if shows_nothing(question) else check_question(question)
    except ValueError as reason:
        raise SystemExit(
            f"CAPTION = {CAPTION!r}: the question about {row['image_path']}, row {number}, can't "
            f"be asked: {reason}."
        ) from None


def caption_images(base: Base, run: dict) -> None:
    """Caption what CAPTION names with the trained adapter, into OUTPUT_FOLDER/captions.csv.

    Through the same functions as in training, so with the same prompt and pixels.
    """
    wanted = read_requests()
    several = len(IMAGE_MARKER.findall(run["question"])) > 1
    if several and not all(request.question for request in wanted):
        raise SystemExit(
            "The training asked about several images at once. Give each image that CAPTION names "
            "a question of its own, in a CSV with the columns image_path and question."
        )
    features = KeptFeatures(base)
    images = see_requested([request.path for request in wanted], features, base)
    wanted = [
        request._replace(digest=images[request.path].digest)
        for request in wanted
        if request.path in images
    ]
    if not wanted:
        raise SystemExit(f"CAPTION = {CAPTION!r} has no image that can be captioned.")
    model = load_model(base, adapter=Path(OUTPUT_FOLDER))
    collator = Collator(base, features, model)
    unfinished = Path(OUTPUT_FOLDER) / "captions.part"
    key = hash_settings(features)
    # What process 0 found: it deletes the file in the end, perhaps before others look
    [captions] = broadcast_object_list([read_unfinished(unfinished, key)])
    waiting = [request for request in wanted if request not in captions]
    portion = 8 * collator.batch_size * PartialState().num_processes
    for start in range(0, len(waiting), portion):
        part = waiting[start : start + portion]
        samples = []
        for request in part:
            sample = {"images": [images[request.path]._asdict()]}
            samples.append(ask_instead(sample, request.question or run["question"], base))
        title = f"Captions from {start + 1} of {len(waiting)}"
        said = generate_captions(model, collator, samples, title)
        captions.update(zip(part, [caption.text for caption in said], strict=True))
        if IS_MAIN:
            save_json(unfinished, {"key": key, "captions": list(captions.items())})
    if IS_MAIN:
        write_captions([(request, captions[request]) for request in wanted])
        unfinished.unlink(missing_ok=True)


def hash_settings(features: KeptFeatures) -> str:
    """Return a hash of all that captions depend on, beside image and question."""
    adapter = (Path(OUTPUT_FOLDER) / "adapter_model.safetensors").read_bytes()
    settings = f"{features.rule} {LOAD_IN_4BIT} {MAX_NEW_TOKENS}".encode()
    return hashlib.sha256(settings + adapter).hexdigest()


def read_unfinished(path: Path, key: str) -> dict[Request, str]:
    """Return what an interrupted start has captioned, if with the same adapter and settings."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return {Request(*request): caption for request, caption in kept["captions"]}
    return {}


def see_requested(paths: list[str], features: KeptFeatures, base: Base) -> dict[str, ImageFile]:
    """Return the images that can be captioned, by path; name the others."""
    inspected = inspect_images(paths, base.side)
    whole = [image for image in inspected.values() if not image.problem]
    problems = see_images(whole, features, base)
    images = {}
    for path, image in inspected.items():
        problem = image.problem or problems.get(image.digest)
        if problem:
            print(f"Left out: {problem}.")
        else:
            images[path] = image
    return images


def write_captions(rows: list[tuple[Request, str]]) -> None:
    """Write captions.csv, in the order in which the images were named."""
    path = Path(OUTPUT_FOLDER) / "captions.csv"
    try:
        with write_atomically(path) as file:
            file.write("\ufeff")  # tells Excel that this is UTF-8
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["image_path", "question", "caption"])
            for request, caption in rows:
                table.writerow([request.name, request.question, caption])
    except OSError as error:
        raise SystemExit(
            f"{path} can't be written ({error.strerror}). If it is open in Excel, close it there, "
            "and run again: the captions are kept."
        ) from None
    print(f"{len(rows)} captions are in {path.absolute()}")


def merge_adapter(folder: Path) -> None:
    """Write the model's own files with the adapter added to the weights that it stands beside.

    Weights keep their names and dtype, all other files are the original's own, so that programs
    for the original read this as well. No model is built.
    """
    adapter_config = json.loads((Path(OUTPUT_FOLDER) / "adapter_config.json").read_text("utf-8"))
    scale = adapter_config["lora_alpha"] / adapter_config["r"]
    pairs = read_lora_pairs(Path(OUTPUT_FOLDER) / "adapter_model.safetensors")
    merged = set()
    # File by file: never more than one in memory
    for path in sorted(Path(MODEL_FOLDER).iterdir()):
        if path.suffix != ".safetensors":
            if path.is_file() and not path.name.startswith("."):  # not our own records
                shutil.copy(path, folder)
            continue
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, weight in tensors.items():
            layer = layer_name(name)
            if layer in pairs and "visual" not in name:
                down, up = pairs[layer]
                change = scale * (up.float() @ down.float())
                tensors[name] = (weight.float() + change).to(weight.dtype).contiguous()
                merged.add(layer)
        save_file(tensors, folder / path.name, metadata)
        shutil.copymode(path, folder / path.name)
    if merged != set(pairs):
        raise ValueError(f"no weights for {sorted(set(pairs) - merged)[:3]} in {MODEL_FOLDER}")


def layer_name(name: str) -> str:
    """Return what a weight is called in all versions, such as layers.0.mlp.up_proj.weight."""
    found = re.search(r"layers\.\d+\..*", name)
    return found[0] if found else ""


def read_lora_pairs(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the adapter's two matrices for each layer: (rank, in) and (out, rank)."""
    pairs = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no dictionary
            if ".lora_A." in name:
                down = file.get_tensor(name)
                up = file.get_tensor(name.replace(".lora_A.", ".lora_B."))
                pairs[layer_name(name.replace(".lora_A.", "."))] = (down, up)
    return pairs


def save_merged(base: Base) -> None:
    """Write OUTPUT_FOLDER/merged, a whole model, and prove that it says what the adapter says."""
    folder, unfinished = Path(OUTPUT_FOLDER) / "merged", Path(OUTPUT_FOLDER) / "merged.tmp"
    if folder.is_dir():
        print(f"{folder} is there already. Delete it to have it written again.")
        return
    if IS_MAIN:
        shutil.rmtree(unfinished, ignore_errors=True)
        size = sum(path.stat().st_size for path in Path(MODEL_FOLDER).glob("*.safetensors"))
        check_disk(OUTPUT_FOLDER, 1.02 * size, "the merged model")
        unfinished.mkdir()
        print(f"Merging the adapter into a copy of {MODEL_FOLDER}.")
        merge_adapter(unfinished)
    PartialState().wait_for_everyone()
    share = prove_merged(unfinished, base)
    if IS_MAIN:
        os.replace(unfinished, folder)
    print(f"{folder.absolute()} is whole: {share:.1%} of its captions equal the adapter's.")


def prove_merged(folder: Path, base: Base) -> float:
    """Open a merged model afresh; return the share of held-out captions that are the adapter's."""
    features = KeptFeatures(base)
    samples = held_out_questions(load_tables()["test"])
    see_again(samples, features, base)
    # In 4 bits where the training was: the GPU may have no room for more
    model = load_weights(base, folder, quantization_config=choose_quantisation(base))
    collator = Collator(base, features, model)
    said = generate_captions(model, collator, samples, "Captions of the merged model")
    results = json.loads((Path(OUTPUT_FOLDER) / "results.json").read_text(encoding="utf-8"))
    pairs = zip(said, results["captions"], strict=True)
    equal = [caption.text == row["fine_tuned"]["text"] for caption, row in pairs]
    return sum(equal) / len(equal)


# ---- The story -----------------------------------------------------------------------------------


class LastingStream:
    """A console that may go away while the training runs: then what is printed is lost.

    A terminal is closed, tee ends with Ctrl-C, or the disk of a log file is full: the step has to
    be saved all the same.
    """

    def __init__(self, stream: IO) -> None:
        """Wrap stdout or stderr."""
        self.stream = stream

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Behave as the stream does in all else."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text if the console still takes it."""
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Pass on what was written if the console still takes it."""
        with contextlib.suppress(OSError):
            self.stream.flush()


def outlive_console() -> None:
    """Let no print or progress bar raise an error because the console is gone."""
    sys.stdout = LastingStream(sys.stdout)
    sys.stderr = LastingStream(sys.stderr)


def quiet_libraries() -> None:
    """Silence what is said to developers, and let one process speak for all."""
    if not IS_MAIN:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other
    # The tower, which LoRA must leave out, is not in the model anyway
    warnings.filterwarnings("ignore", message=".*exclude_modules")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    pyplot.switch_backend("agg")  # draws without a screen
    # The collator checks that image tokens and features match, without making the GPU wait
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    if sys.platform == "linux":
        # The lengths of batches differ: without this, the GPU's memory falls into pieces
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def prepare_data(base: Base, features: KeptFeatures, resuming: bool) -> datasets.DatasetDict:
    """Check the data, let the tower see all images, split, and write the tables."""
    tables = load_tables() if resuming else None
    held_out = set()
    if tables:
        for sample in tables["test"]:
            held_out.update(images_of(sample))
        # A project that was moved has its images elsewhere now, and the report shows them
        images = itertools.chain.from_iterable(map(images_of, itertools.chain(*tables.values())))
        if any(os.path.isfile(image.path) for image in images):
            see_again(itertools.chain(*tables.values()), features, base)
            return tables
    del tables  # Windows can't replace files that are open
    training, test, images = [], [], []
    if IS_MAIN:
        training = read_examples(DATA_JSON, base)
        test = read_examples(TEST_JSON, base) if TEST_JSON else []
        images = sorted({image for example in training + test for image in example.images})
    else:
        print("Waiting while process 0 checks the data.", file=sys.stderr, flush=True)
    problems = see_images(images, features, base)
    if IS_MAIN:
        training = drop_unseen(training, problems)
        test = drop_unseen(test, problems)
        if TEST_JSON:
            refuse_shared_images(training, test)
        else:
            training, test = split_by_image(training)
        refuse_another_split(held_out, test)
        save_tables(training, test)
    PartialState().wait_for_everyone()
    return load_tables()


def see_again(samples: Iterable[dict], features: KeptFeatures, base: Base) -> None:
    """Let the tower see the images of samples whose features are no longer in CACHE_FOLDER."""
    images = itertools.chain.from_iterable(map(images_of, samples))
    problems = see_images(images, features, base)
    if problems:
        raise SystemExit(
            f"{next(iter(problems.values()))}, and {CACHE_FOLDER} lacks what the model saw. Bring "
            "the image back, or set OUTPUT_FOLDER to a new folder."
        )


def print_sample(sample: dict, base: Base) -> None:
    """Show what is learned of a sample, marked by [[ ]]."""
    print("A sample, what is learned in [[ ]]:")
    answers = base.processor.batch_decode(sample["answers"])
    print(describe_prompt(sample, base) + "".join(f"[[{answer}]]\n" for answer in answers))


def describe_prompt(sample: dict, base: Base) -> str:
    """Return the prompt of a sample as text, the many tokens of an image as one."""
    text = base.processor.decode(sample["prompt"])
    return re.sub(r"(<\|image_pad\|>)+", r"<|image_pad|>", text)


def describe_size(base: Base) -> str:
    """Return in words to what size images are brought."""
    if IMAGE_SIZE:
        square, _ = model_size(1, 1, base.side)
        if square != IMAGE_SIZE:
            print(f"IMAGE_SIZE = {IMAGE_SIZE} is not a multiple of {base.side}: {square} is used.")
        return f"{square}x{square} pixels"
    return f"their own size, at most {MAX_PIXELS:,} pixels"


def train_adapter(base: Base, run: dict, stopper: SaveAndStop) -> None:
    """Train, judge and save the adapter, from the last checkpoint if there is one."""
    checkpoint = last_checkpoint()
    features = KeptFeatures(base)
    tables = prepare_data(base, features, resuming=bool(checkpoint))
    asked = tables["train"]["question"][:]
    run["question"], _ = Counter(asked).most_common(1)[0]
    sample = tables["train"][asked.index(run["question"])]
    run["prompt"] = describe_prompt(sample, base)
    run["size"] = describe_size(base)
    run["dtype"] = str(base.dtype)
    if IS_MAIN:
        save_json(Path(OUTPUT_FOLDER) / "run.json", run, indent=2)
        if not checkpoint:  # what was kept there is another run's
            shutil.rmtree(Path(OUTPUT_FOLDER) / "kept", ignore_errors=True)
    print_sample(sample, base)
    model = load_model(base)
    collator = Collator(base, features, model)
    if base.dtype == torch.float16 and not USES_FSDP and overflows(model, collator, sample):
        print("float16 can't hold this model's numbers on this GPU: float32 is used instead.")
        del model, collator
        # From the beginning: the vision tower's numbers may be too large as well
        train_adapter(base._replace(dtype=torch.float32), run, stopper)
        return
    trainer = build_trainer(model, collator, tables, run, checkpoint)
    trainer.add_callback(stopper)
    announce(tables, trainer)
    train_and_watch(trainer, checkpoint, stopper)


def train_and_watch(trainer: CaptionTrainer, checkpoint: Path | None, stopper: SaveAndStop) -> None:
    """Train and save, with a SwanLab run around it; advice follows the cause of an error."""
    if IS_MAIN:
        start_swanlab(trainer.run)
    advice = ", lower BATCH_SIZE or set GRADIENT_CHECKPOINTING = True, and run again to resume"
    try:
        with needs_gpu_memory("the training", advice):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        stopper.training = False
        step = trainer.state.global_step
        if step < trainer.state.max_steps:
            print(f"Stopped at step {step}, which is saved. Run again to resume.")
            # Where another process was asked to stop, this one has no number
            raise SystemExit(128 + (stopper.number or signal.SIGTERM))
        if IS_MAIN:
            save_result(trainer)
    finally:
        finish_swanlab(sys.exception())


@explain_full_disk()
def save_result(trainer: CaptionTrainer) -> None:
    """Copy what was kept to OUTPUT_FOLDER, and show it if it was not the last evaluation."""
    kept = Path(OUTPUT_FOLDER) / "kept"
    results = json.loads((kept / "results.json").read_text(encoding="utf-8"))
    if results["step"] != trainer.results["step"]:
        print(f"Step {results['step']} had the highest {results['headline']}: its adapter is kept.")
        show_results(results, trainer.state, trainer.run)
    # results.json last, for with it the run counts as finished
    for path in sorted(kept.iterdir(), key=lambda path: path.name == "results.json"):
        with write_atomically(Path(OUTPUT_FOLDER) / path.name, "wb") as file:
            file.write(path.read_bytes())


def use_result(base: Base) -> None:
    """Do with a finished adapter what CAPTION and SAVE_MERGED ask for."""
    run = json.loads((Path(OUTPUT_FOLDER) / "run.json").read_text(encoding="utf-8"))
    # Float16 could not hold this model's numbers
    if base.dtype == torch.float16 and run.get("dtype") == "torch.float32":
        base = base._replace(dtype=torch.float32)
    with needs_gpu_memory("the captions", advice=", or set BATCH_SIZE = 1"):
        if CAPTION:
            caption_images(base, run)
        if SAVE_MERGED:
            save_merged(base)


def main() -> None:
    """Train the adapter, unless it is trained already, and use it."""
    prepare_console()
    outlive_console()
    check_constants()
    check_launcher()
    quiet_libraries()
    stopper = SaveAndStop()
    handle_stop_signals(stopper.stop)
    transformers.set_seed(SEED)
    processor, config = load_processor()
    check_writable(OUTPUT_FOLDER)
    run = describe_run()
    refuse_another_run(run)
    if CAPTION:
        read_requests()  # a misspelt path is named now, and not after the training
    base = Base(processor, config, *choose_hardware(config))
    if is_finished():
        print(f"{OUTPUT_FOLDER} holds this run, finished: open report.html there.")
    else:
        train_adapter(base, run, stopper)
    use_result(base)
    # Process 0 writes last: if another one failed at its end, torchrun would kill it meanwhile
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
