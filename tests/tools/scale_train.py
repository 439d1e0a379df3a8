"""train.py on as many captions as COCO has: seconds to data and first step, memory, and a resume.

    python tests/tools/scale_train.py [IMAGES ...]

For each number (500, 5,000 and 82,783 without one) it makes up so many images with 5 captions each
in a temporary folder, runs train.py there until its first step is logged, stops it by Ctrl-C, and
does the same once more, from the checkpoint. The model has the real one's width, so that its kept
features have the real size (twice that, as a CPU has float32), and a single layer. These features
are made up too: files of the right size that take no space on the disk, but for a few images that
the tower does see. 82,783 images take 6 GB of disk. Memory is what /proc calls PSS. Linux only.
"""

import contextlib
import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
import bench
from conftest import command, variables
from support.launch import load
from support.scenes import all_scenes, terse
from tools.scale_data2csv import made_up_image
from tools.shapes import SMALL

SIZES = (500, 5_000, 82_783)  # images; the last one is COCO 2014's training set
SEEN = 32  # images whose features are really computed
# the real model's width, and little else
WIDE = {
    **SMALL,
    "hidden_size": 1536,
    "intermediate_size": 64,
    "num_attention_heads": 12,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "vision_config": {"depth": 1, "embed_dim": 64, "hidden_size": 1536, "num_heads": 2},
    "vocab_size": 512,
}
CONSTANTS = {
    "SWANLAB_MODE": "disabled",
    "MODEL_FOLDER": "model",
    "MAX_NEW_TOKENS": 8,
    "STYLE_PROMPT": None,
    "OTHER_QUESTIONS": [],
    "LOG_STEPS": 1,
}
QUESTION = "请描述这张图片: <|vision_start|>{}<|vision_end|>"
# what train.py prints when something is reached
SIGNS = {
    "A sample, what is learned": "data",
    "images per pass": "training",
    "| loss ": "first step",
}


class Start(NamedTuple):
    """What one start of train.py cost."""

    seconds: dict[str, float]  # until each of SIGNS
    before: int  # MB of memory, at the most, until the data is there
    after: int  # MB of memory, at the most, from then on
    growth: int  # MB by which memory grew from the data to the end


def with_comment(jpeg: bytes, text: str) -> bytes:
    """Return a JPEG with a comment in it: equal content would be one image."""
    comment = text.encode()
    size = (len(comment) + 2).to_bytes(2, "big")
    # behind the two bytes with which every JPEG begins
    return jpeg[:2] + b"\xff\xfe" + size + comment + jpeg[2:]


def make_up(folder: Path, images: int) -> int:
    """Write data_vl.json, its images, the model and the features; returns the features' bytes."""
    bench.write_model(folder, WIDE)
    train = load("train.py", [])
    train.MODEL_FOLDER = str(folder / "model")
    train.CACHE_FOLDER = str(folder / ".cache/features")
    processor, config = train.load_processor()
    base = train.Base(processor, config, torch.device("cpu"), torch.float32)
    features = train.KeptFeatures(base)
    rng, scenes, records = random.Random(0), all_scenes(), []
    (folder / "coco_2014_caption").mkdir()
    jpegs = [made_up_image((640, 480)) for _ in range(8)]
    total = 0
    for number in range(images):
        name = f"coco_2014_caption/{number}.jpg"
        content = with_comment(jpegs[number % len(jpegs)], str(number))
        (folder / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        image = train.ImageFile(str(folder / name), digest, 280, 280)
        total += features.size(image)
        if number >= SEEN:
            make_up_features(features, image)
        for text in terse(rng.choice(scenes)):
            question = {"from": "user", "value": QUESTION.format(name)}
            turns = [question, {"from": "assistant", "value": text}]
            records.append({"id": f"identity_{len(records) + 1}", "conversations": turns})
    text = json.dumps(records, ensure_ascii=False, indent=2)
    (folder / "data_vl.json").write_text(text, encoding="utf-8")
    return total


def make_up_features(features: object, image: object) -> None:
    """Make the file of an image's features, a hole of the right size."""
    path = features.path(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(features.size(image))


def memory(pid: int) -> int:
    """Return the proportional set size of a process in MB."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Pss: +(\d+) kB", rollup, re.MULTILINE)[1]) // 1024


class Watch:
    """Takes the memory of a process, until it is over."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.over = False
        self.readings = []  # (time, MB)
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self) -> None:
        while not self.over:
            # it may have ended while it is looked at
            with contextlib.suppress(OSError, TypeError):
                self.readings.append((time.monotonic(), memory(self.pid)))
            # each look stops the process for a moment
            time.sleep(0.3)

    def stop(self) -> None:
        self.over = True
        self.thread.join()


def measure(folder: Path) -> Start:
    """Run train.py to its first step and stop it."""
    environment = variables(
        {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    )
    began, seconds, printed = time.monotonic(), {}, ""
    run = subprocess.Popen(
        command("train.py", **CONSTANTS),
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    watch = Watch(run.pid)
    for line in run.stdout:
        printed += line
        for sign, name in SIGNS.items():
            if sign in line and name not in seconds:
                seconds[name] = time.monotonic() - began
                if name == "first step":
                    run.send_signal(signal.SIGINT)
    code = run.wait()
    watch.stop()
    if code != 128 + signal.SIGINT:
        raise SystemExit(f"train.py ended with {code}:\n{printed[-3000:]}")
    data_there = began + seconds["data"]
    before = [size for moment, size in watch.readings if moment <= data_there]
    after = [size for moment, size in watch.readings if moment > data_there]
    trained = began + seconds["training"]
    training = [size for moment, size in watch.readings if moment > trained]
    return Start(seconds, max(before), max(after), max(training) - training[0])


def report(images: int) -> list[dict]:
    """Return the rows for so many images: a fresh start and a resumed one."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.monotonic()
        total = make_up(folder, images)
        print(f"{images:,} images made up in {time.monotonic() - began:.0f} s", file=sys.stderr)
        for start in ("fresh", "resumed"):
            found = measure(folder)
            table = folder / "output/Qwen2-VL-2B/table"
            size = sum(path.stat().st_size for path in table.rglob("*") if path.is_file())
            rows.append(
                {
                    "captions": f"{5 * images:,}",
                    "JSON, MB": f"{(folder / 'data_vl.json').stat().st_size / 1e6:.0f}",
                    "features, GB": f"{total / 1e9:.2f}",
                    "table, MB": f"{size / 1e6:.0f}",
                    "start": start,
                    "data after, s": f"{found.seconds['data']:.1f}",
                    "training after, s": f"{found.seconds['training']:.1f}",
                    "first step after, s": f"{found.seconds['first step']:.1f}",
                    "peak until data, MB": found.before,
                    "peak behind it, MB": found.after,
                    "growth in training, MB": found.growth,
                }
            )
    return rows


def main() -> None:
    """Measure all sizes, and print the table."""
    sizes = [int(size) for size in sys.argv[1:]] or SIZES
    rows = []
    for images in sizes:
        rows += report(images)
    print(bench.describe_machine(1, {}))
    bench.print_table(rows)


if __name__ == "__main__":
    main()
