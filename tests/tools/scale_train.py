"""train.py on as many captions as COCO has: seconds to the first step, memory of each process, size of the table.

    python tests/tools/scale_train.py [PICTURES]

makes up PICTURES pictures (82,783 without a number: hard links to 8 files) with 5 captions each in a temporary folder,
runs train.py there with the small model and 2 workers until its first step is logged, stops it by Ctrl-C, and does the
same once more, from the checkpoint. Memory is what /proc calls PSS: shared pages count in equal parts. Linux only.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
from conftest import TESTS, command, variables
from support.scenes import all_scenes, terse
from tools.scale_data2csv import IMAGES, made_up_picture

CONSTANTS = {
    "SWANLAB_MODE": "disabled",
    "DATALOADER_WORKERS": 2,
    "MAX_NEW_TOKENS": 8,
    "LOG_STEPS": 1,
}
QUESTION = "请描述这张图片: <|vision_start|>{}<|vision_end|>"


def make_up(folder: Path, pictures: int) -> None:
    """Write data_vl.json, the pictures it names and the small model, as the first three scripts leave them."""
    rng, scenes, records = random.Random(0), all_scenes(), []
    shutil.copytree(TESTS / "support/tiny_qwen2vl", folder / "Qwen/Qwen2-VL-2B-Instruct")
    (folder / "coco_2014_caption").mkdir()
    sources = [folder / f"{number}.jpg" for number in range(8)]
    for source in sources:
        source.write_bytes(made_up_picture((640, 480)))
    for number in range(pictures):
        name = f"coco_2014_caption/{number}.jpg"
        os.link(sources[number % len(sources)], folder / name)
        for caption in terse(rng.choice(scenes)):
            turns = [
                {"from": "user", "value": QUESTION.format(name)},
                {"from": "assistant", "value": caption},
            ]
            records.append({"id": f"identity_{len(records) + 1}", "conversations": turns})
    (folder / "data_vl.json").write_text(
        json.dumps(records, ensure_ascii=False, indent=2), encoding="utf-8"
    )


def memory(pid: int) -> int:
    """The proportional set size of a process in MB."""
    return (
        int(
            re.search(
                r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE
            )[1]
        )
        // 1024
    )


def watch(run: subprocess.Popen, peaks: dict[int, int]) -> None:
    """Keep the peak of each process of the run, until it is over."""
    while run.poll() is None:
        try:
            for process in [
                psutil.Process(run.pid),
                *psutil.Process(run.pid).children(recursive=True),
            ]:
                peaks[process.pid] = max(memory(process.pid), peaks.get(process.pid, 0))
        except (OSError, psutil.NoSuchProcess, TypeError):
            pass  # it ended while it was looked at
        time.sleep(0.1)


def measure(folder: Path) -> tuple[float, float, int, list[int]]:
    """Run to the first step; returns the seconds to the data's end and to that step, MB of main and of the workers."""
    environment = variables(
        {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    )
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    began, seconds, peaks = time.monotonic(), {}, {}
    run = subprocess.Popen(command("train.py", **CONSTANTS), cwd=folder, env=environment, **options)
    threading.Thread(target=watch, args=(run, peaks), daemon=True).start()
    printed = ""
    for line in run.stdout:
        printed += line
        for sign in ("A sample", "'loss'"):
            if sign in line and sign not in seconds:
                seconds[sign] = time.monotonic() - began
                if sign == "'loss'":
                    run.send_signal(signal.SIGINT)
    if run.wait() != 128 + signal.SIGINT:
        raise SystemExit(printed)
    main = peaks.pop(run.pid)
    return seconds["A sample"], seconds["'loss'"], main, sorted(peaks.values())


def main() -> None:
    pictures = int(sys.argv[1]) if len(sys.argv) > 1 else IMAGES
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_up(folder, pictures)
        print(
            f"{pictures:,} pictures, {(folder / 'data_vl.json').stat().st_size / 1e6:.1f} MB of JSON",
            flush=True,
        )
        for start in ("fresh", "resumed"):
            data, first, own, workers = measure(folder)
            print(
                f"{start}: table after {data:.1f} s, first step after {first:.1f} s; {own} MB, workers {workers}"
            )
        table = sum(path.stat().st_size for path in folder.rglob("table/**/*") if path.is_file())
        print(f"table: {table / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
