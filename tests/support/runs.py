"""What tests of whole runs share: the constants of a small run, the folder it starts in, its files.

A run goes through the data in 8 steps: 24 images to train on, 6 held out, 2 captions each. The
fixtures that use this (served, prepared, undisturbed, run_train) are in conftest.py.
"""

import json
import random
import shutil
from pathlib import Path

from conftest import run_script
from safetensors.torch import load_file
from support.hub import Hub
from support.scenes import all_scenes, write_folder

OUTPUT = Path("output/Qwen2-VL-2B")
STEPS = 8
SMALL = {  # constants of train.py
    "DEVICE": "cpu",  # the same numbers on every machine
    "IMAGE_SIZE": 112,
    "TEST_IMAGES": 6,
    "IMAGES_PER_STEP": 6,
    "BATCH_SIZE": 2,
    "LEARNING_RATE": 0.01,
    "SAVE_STEPS": 2,
    "LOG_STEPS": 1,
    "TOWER_BATCH": 4,
    "SWANLAB_MODE": "local",
    "MAX_NEW_TOKENS": 24,
    # the small model has no answer to questions, and takes a second to show it
    "STYLE_PROMPT": None,
    "OTHER_QUESTIONS": [],
}


def write_images(folder: Path, count: int = 30, captions: int = 2) -> Path:
    """Write scenes and captions.csv as the hub serves them."""
    write_folder(folder, random.Random(3).sample(all_scenes(), count), captions_per_image=captions)
    return folder


def prepare(folder: Path, hub: Hub) -> Path:
    """Run the first three scripts, unmodified and with no constant set."""
    for script in ("data2csv.py", "csv2json.py", "load_model.py"):
        done = run_script(script, folder, hub.environment())
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def copy_project(folder: Path, target: Path, *left_out: str) -> Path:
    """Copy a project without the files of these patterns."""
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*left_out)))


def another(folder: Path, tmp_path: Path, *left_out: str) -> Path:
    """A fresh folder with what train.py reads: data, images and model."""
    return copy_project(folder, tmp_path / "work", "output", "swanlog", ".cache", *left_out)


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def read_results(folder: Path, output: Path | str = OUTPUT) -> dict:
    return json.loads(read_text(folder / output / "results.json"))


def read_state(folder: Path, output: Path | str = OUTPUT, step: int = STEPS) -> dict:
    """What the Trainer has written about a checkpoint."""
    return json.loads(read_text(folder / output / f"checkpoint-{step}/trainer_state.json"))


def same_adapter(folder: Path, other: Path) -> bool:
    """Tell whether two trainings ended at the same weights, to the last bit."""
    places = (folder, other)
    ours, theirs = (load_file(place / OUTPUT / "adapter_model.safetensors") for place in places)
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)
