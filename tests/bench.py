"""What train.py costs, beside the documented recipe of late 2024, TRL's SFTTrainer and ms-swift.

    python tests/bench.py --small    a small model with the real one's proportions, on one thread
                                     [--trl PYTHON] [--swift PYTHON] [--rounds 3]; an hour with both
    python tests/bench.py --flops    arithmetic of the real shapes, counted without any weights
    python tests/bench.py --memory   memory of 2B and 7B on a GPU, counted likewise; 10 minutes
    python tests/bench.py --gpu      the real 2B shape with random weights on the GPU; 20 minutes

Prints Markdown tables, every row measured in this run: each variant in a process and a folder of
its own, one after the other, several rounds; a row is the median of its rounds. Images are drawn
by scenes.py, the tokenizer is that of support/tiny_qwen2vl. train.py runs as it is, from main() to
the saved adapter; only captions and scores, which the others don't make, are left out.

TRL and ms-swift need other versions of some packages: PYTHON is the interpreter of an environment
in which one of them is installed (ms-swift 4, TRL 1). Without it there is no row for it.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch
import transformers
from support import scenes
from support.launch import load
from tools.flops import flops_table, on_off
from tools.memory import memory_table
from tools.recipes import IMAGES_PER_STEP, Run, choose_dtype, on_gpu
from tools.shapes import QWEN2_VL_2B, SMALL, make_config
from transformers import AutoModelForImageTextToText

# --------------------------------------------------------------------------------------------------
TESTS = Path(__file__).resolve().parent
TINY = TESTS / "support/tiny_qwen2vl"
FILE_SIDE = 480  # pixels of the images' files, about as COCO's; the model sees them at recipes.SIDE
IMAGES = 200  # that are trained on
ROUNDS = 3
STEPS = 3  # that are timed on a GPU, after one to warm up
ANSWER_TOKENS = {1: 8, 5: 43}  # of a scene's captions with what is around them, a mean
# --------------------------------------------------------------------------------------------------


# ---- What is trained on


def write_data(folder: Path, images: int) -> None:
    """Draw scenes, and write their captions as csv2json.py does: data_1.json and data_5.json."""
    rng = random.Random(0)
    records = {1: [], 5: []}
    for number, scene in enumerate(rng.choices(scenes.all_scenes(), k=images)):
        path = folder / f"{number}.jpg"
        scenes.draw(scene, rng, FILE_SIDE).save(path, quality=92)
        question = f"请描述这张图片: <|vision_start|>{path}<|vision_end|>"
        for captions, found in records.items():
            for text in scenes.terse(scene)[:captions]:
                turns = [{"from": "user", "value": question}, {"from": "assistant", "value": text}]
                found.append({"conversations": turns})
    for captions, found in records.items():
        text = json.dumps(found, ensure_ascii=False)
        (folder / f"data_{captions}.json").write_text(text, encoding="utf-8")


def write_model(folder: Path, shape: dict) -> None:
    """Write a model of this shape with random weights and the small tokenizer, as folder/model."""
    shutil.copytree(TINY, folder / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    own = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    # the tokenizer's own ids for images
    ids = {name: number for name, number in own.items() if name.endswith("_token_id")}
    config = make_config({**shape, **ids})
    for name in ("bos_token_id", "eos_token_id"):
        setattr(config.text_config, name, own[name])
    with torch.device("cuda" if on_gpu else "cpu"):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=choose_dtype())
    model.save_pretrained(folder / "model")
    # its own settings, not those that transformers derives
    shutil.copy(TINY / "generation_config.json", folder / "model")


@contextlib.contextmanager
def workshop(images: int, shape: dict) -> Iterator[Path]:
    """Make a folder with images, captions and model, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # train.py holds one out
        write_data(folder, images + 1)
        write_model(folder, shape)
        torch.cuda.empty_cache()
        yield folder


# ---- Runs, each in a process of its own


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of a run: whatever it keeps for later counts as written by it."""
    return {
        **os.environ,
        "PYTHONUTF8": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def start(run: Run, folder: Path, python: str = sys.executable) -> dict[str, float] | None:
    """Do a run; returns what it cost, None if it failed."""
    print(run, file=sys.stderr, flush=True)
    command = [python, str(TESTS / "tools/timed.py"), json.dumps(run._asdict()), str(folder)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        home = Path(name)
        began = time.monotonic()
        with open(home / "log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                cwd=home,
                env=environment(home),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.monotonic() - began
        if not (home / "cost.json").is_file():
            log = (home / "log").read_text(encoding="utf-8", errors="replace")
            print(f"Not in the table: {run}: {log[-2000:]}")
            return None
        cost = json.loads((home / "cost.json").read_text(encoding="utf-8"))
        written = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
        cost["wall"] = wall
        cost["cpu"] = usage.ru_utime + usage.ru_stime
        cost["written"] = written
        # an hour's table comes at its end; whoever stops it before has these
        print(json.dumps(cost), file=sys.stderr, flush=True)
        return cost


def time_runs(
    runs: list[Run], folder: Path, rounds: int, pythons: dict[str, str] | None = None
) -> list[tuple[Run, dict]]:
    """Do all runs in turns, several rounds; returns those that work with the medians of costs."""
    pythons = pythons or {}
    found = {run: [] for run in runs}
    for _ in range(rounds):
        for run in runs:
            cost = start(run, folder, pythons.get(run.variant, sys.executable))
            if cost:
                found[run].append(cost)
    results = []
    for run, costs in found.items():
        if costs:
            results.append((run, medians(costs)))
    return results


def medians(costs: list[dict]) -> dict:
    """Return the median of each number, and how many there were."""
    result = {"rounds": len(costs)}
    for name, value in costs[0].items():
        numbers = [cost[name] for cost in costs]
        result[name] = value if isinstance(value, str) else statistics.median(numbers)
    return result


# ---- --small


def small_runs(pythons: dict[str, str]) -> tuple[list[Run], list[Run]]:
    """Return the runs of every round, and those of one round alone, as they take long.

    The documented recipe and TRL would take five times as long with five captions, too.
    """
    runs = [
        Run("documented"),
        Run("train.py", checkpointing=False),
        Run("train.py", captions=5, checkpointing=False),
    ]
    long_runs = []
    if "TRL" in pythons:
        runs.append(Run("TRL"))
    if "ms-swift" in pythons:
        for checkpointing in (True, False):
            runs.append(Run("ms-swift", checkpointing=checkpointing))
            long_runs.append(Run("ms-swift", captions=5, checkpointing=checkpointing))
    return runs, long_runs


def small_tables(
    pythons: dict[str, str], images: int = IMAGES, rounds: int = ROUNDS
) -> tuple[list[dict], list[dict]]:
    """Return what two epochs and a step of 16 images cost, and what the data path costs."""
    runs, long_runs = small_runs(pythons)
    # one thread: what differs between the variants then is their work, not how they share it out
    os.environ["OMP_NUM_THREADS"] = "1"
    with workshop(images, SMALL) as folder:
        timed = time_runs(runs, folder, rounds, pythons)
        timed += time_runs(long_runs, folder, 1, pythons)
        data_path = measure_data_path(folder / "model")
    own = {run.captions: cost for run, cost in timed if run.variant == "train.py"}
    return [small_row(run, cost, own[run.captions]) for run, cost in timed], data_path


def small_row(run: Run, cost: dict, own: dict) -> dict:
    """Return a row; own is what train.py costs with as many captions per image."""
    return {
        "variant": run.variant,
        "checkpointing": on_off[run.checkpointing],
        "captions per image": run.captions,
        "steps": int(cost["steps"]),
        "s per step": f"{cost['step']:.2f}",
        "CPU s per step": f"{cost['step_cpu']:.2f}",
        "wait for a batch": f"{cost['wait_cpu'] / cost['step_cpu']:.1%}",
        "s for two epochs": f"{cost['wall']:.0f}",
        "CPU s for two epochs": f"{cost['cpu']:.0f}",
        "times train.py's": f"{cost['cpu'] / own['cpu']:.1f}",
        "s to the first step": f"{cost['first']:.1f}",
        "CPU s to it": f"{cost['first_cpu']:.1f}",
        "peak memory, MB": f"{cost['rss'] / 1e6:.0f}",
        "MB written": f"{cost['written'] / 1e6:.0f}",
        "rounds": cost["rounds"],
    }


def measure_data_path(model_folder: Path) -> list[dict]:
    """Return the rows of tools/data_path.py, measured in a process of its own."""
    command = [sys.executable, str(TESTS / "tools/data_path.py"), str(model_folder)]
    print("the data path", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---- --gpu


def gpu_runs(steps: int = STEPS) -> list[Run]:
    """Return the documented recipe, and train.py in every layout of 16 images per step."""
    runs = [Run("documented", steps=steps, count=True)]
    for captions in (1, 5):
        for batch in (4, 8, 16):
            for checkpointing in (True, False):
                runs.append(Run("train.py", captions, batch, checkpointing, steps, count=True))
    return runs


def estimate(run: Run, config: transformers.PreTrainedConfig) -> float:
    """Return the GiB that load_model.py announces for a training by train.py."""
    script = load("load_model.py", [f"ANSWER_TOKENS={ANSWER_TOKENS[run.captions]}"])
    with torch.device("meta"):  # shapes without numbers
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return script.training_memory(model, run.batch, run.checkpointing)


def matmul_rate(size: int) -> float:
    """Return the FLOP/s of the product of two size x size matrices."""
    device = "cuda" if on_gpu else "cpu"
    left, right = torch.randn(2, size, size, dtype=choose_dtype(), device=device)
    seconds = []
    for _ in range(25):
        before = time.perf_counter()
        left @ right
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - before)
    return 2 * size**3 / statistics.median(seconds[5:])


def gpu_table(
    runs: list[Run], shape: dict = QWEN2_VL_2B, rounds: int = ROUNDS
) -> tuple[list[dict], float]:
    """Return throughput, memory and load of the GPU; without one, a dry run on the CPU."""
    rate = matmul_rate(8192 if on_gpu else 512)
    most = IMAGES_PER_STEP * (max(run.steps for run in runs) + 2)
    with workshop(most, shape) as folder:
        timed = time_runs(runs, folder, rounds)
        config = transformers.AutoConfig.from_pretrained(folder / "model")
    return [gpu_row(run, cost, config, rate) for run, cost in timed], rate


def gpu_row(run: Run, cost: dict, config: transformers.PreTrainedConfig, rate: float) -> dict:
    """Return a row of the table for a GPU."""
    images = IMAGES_PER_STEP / cost["step"]
    own = run.variant == "train.py"
    return {
        "variant": run.variant,
        "images per pass": run.batch,
        "captions per image": run.captions,
        "checkpointing": on_off[run.checkpointing],
        "dtype": cost["dtype"].removeprefix("torch."),
        "images/s": f"{images:.2f}",
        "captions/s": f"{images * run.captions:.2f}",
        "estimate, GiB": f"{estimate(run, config):.2f}" if own else "-",
        "peak, GiB": f"{cost.get('peak', 0) / 2**30:.2f}",
        "reserved, GiB": f"{cost.get('reserved', 0) / 2**30:.2f}",
        "share of matmul rate": f"{cost['flops'] / cost['step'] / rate:.1%}",
        "wait for a batch, ms": f"{1000 * cost['wait_cpu']:.1f}",
    }


# ---- What is printed


def print_table(rows: list[dict]) -> None:
    """Print rows as Markdown."""
    names = list(rows[0])
    widths = []
    for name in names:
        widths.append(max(len(name), *(len(str(row[name])) for row in rows)))
    lines = [names, ["-" * width for width in widths]]
    lines += [[row[name] for name in names] for row in rows]
    for line in lines:
        cells = [str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("| " + " | ".join(cells) + " |")
    print()


def describe_machine(threads: int, pythons: dict[str, str]) -> str:
    """Return day, machine and versions that the numbers hold for."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(": ")[2]
    gpu = f", {torch.cuda.get_device_name()}" if on_gpu else ""
    lines = [
        f"{date.today()}, {platform.system()}, {cpu}, {os.cpu_count()} cores{gpu}, "
        f"threads: {threads}, load: {os.getloadavg()[0]:.1f}",
        f"Python {platform.python_version()}, {versions(sys.executable)}",
    ]
    for variant, python in pythons.items():
        lines.append(f"{variant} in an environment of its own: {versions(python)}")
    return "\n".join(lines) + "\n"


def versions(python: str) -> str:
    """Return the versions of the packages that matter in an environment."""
    code = (
        "import importlib.metadata as m, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: pass"
    )
    packages = ["torch", "transformers", "peft", "accelerate", "datasets", "trl", "ms-swift"]
    done = subprocess.run(
        [python, "-c", code, *packages], capture_output=True, encoding="utf-8", check=True
    )
    return ", ".join(done.stdout.splitlines())


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choice = parser.add_mutually_exclusive_group(required=True)
    for name in ("--small", "--flops", "--memory", "--gpu"):
        choice.add_argument(name, action="store_true")
    parser.add_argument("--trl", metavar="PYTHON")
    parser.add_argument("--swift", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    chosen = parser.parse_args()
    pythons = {"TRL": chosen.trl, "ms-swift": chosen.swift}
    pythons = {variant: python for variant, python in pythons.items() if python}
    if chosen.gpu and not on_gpu:
        raise SystemExit("--gpu needs a CUDA GPU, and torch finds none on this machine.")
    if chosen.small:
        rows, data_path = small_tables(pythons, rounds=chosen.rounds)
        print(describe_machine(1, pythons))
        print_table(rows)
        print_table(data_path)
    elif chosen.flops:
        rows = flops_table()
        print(describe_machine(torch.get_num_threads(), {}))
        print_table(rows)
    elif chosen.memory:
        rows = memory_table()
        print(describe_machine(torch.get_num_threads(), {}))
        print_table(rows)
    else:
        rows, rate = gpu_table(gpu_runs(), rounds=chosen.rounds)
        print(describe_machine(torch.get_num_threads(), {}))
        print(f"{choose_dtype()} matrix product: {rate / 1e12:.0f} TFLOP/s\n")
        print_table(rows)


if __name__ == "__main__":
    main()
