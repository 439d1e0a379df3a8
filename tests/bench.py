"""What train.py costs, beside the recipe that tutorials of late 2024 document and, where installed, TRL's SFTTrainer.

    python tests/bench.py --tiny     a small model on one CPU thread: time, memory, disk; takes 10 minutes
    python tests/bench.py --flops    arithmetic of the real 2B shape, counted without any weights; 1 minute
    python tests/bench.py --gpu      the real 2B shape with random weights on the CUDA card; 20 minutes, 5 GB of disk

Prints Markdown tables, every row measured in this run: each variant in a process and a folder of its own, one after the
other, ROUNDS times over; a row is the median of its rounds. Pictures are drawn by scenes.py, the tokenizer is that of
support/tiny_qwen2vl. train.py runs as it is, from main(); only the captions before its first step, which the others
don't write, are left out.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, pairwise, repeat
from pathlib import Path
from unittest.mock import patch

import datasets
import psutil
import torch
import transformers
from support import scenes
from support.launch import load
from tools.flops import REAL_SHAPE, flops_table, on_off
from tools.recipes import dtype, on_card, run_documented, run_trl
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLForConditionalGeneration

# ---------------------------------------------------------------------------------------------------------------------
TINY = Path(__file__).resolve().parent / "support/tiny_qwen2vl"
FILE_SIDE = (
    480  # pixels of the pictures' files, about as COCO's; the model sees them at recipes.SIDE
)
ROUNDS, STEPS = 3, 3  # a process does one optimizer step to warm up and STEPS that are timed
PICTURES = 200  # that are trained on while the time to the first step is taken
ANSWER_TOKENS = {
    1: 8,
    5: 43,
}  # of a scene's captions with what is around them, a mean: for load_model.py's estimate
LOADER_SAMPLES, LOADER_BATCHES = (200, 2_000, 20_000), 100
TINY_SHAPE = {
    "vocab_size": 151936,
    "num_hidden_layers": 4,
    "vision_config": {"depth": 4},
}  # a small model, real words
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One variant in one configuration."""

    variant: str  # "documented", "train.py" or "TRL"
    captions: int = 1  # of a picture
    batch: int = 4
    accumulation: int = 4
    checkpointing: bool = True  # of train.py; the others have it on
    steps: int = STEPS
    count: bool = False  # count the arithmetic of one more step


class Enough(BaseException):  # no error: train.py tells of errors and ends
    """Ends a training that has been timed."""


class Stopwatch(transformers.TrainerCallback):
    """Times the optimizer steps of any Trainer in this process, from the end of one to the end of the next."""

    def __init__(self, run):
        self.run, self.ends, self.waits, self.flops, self.found = run, [], [], 0, {}
        transformers.trainer.DEFAULT_CALLBACKS.append(self)
        fetch, step = transformers.Trainer.get_batch_samples, transformers.Trainer.training_step

        def timed_fetch(*args, **kwargs):
            start = time.perf_counter()
            batches = fetch(*args, **kwargs)
            self.waits.append(time.perf_counter() - start)
            return batches

        def counted_step(*args, **kwargs):
            counts = len(self.ends) > run.steps
            with FlopCounterMode(display=False) if counts else contextlib.nullcontext() as counter:
                loss = step(*args, **kwargs)
            self.flops += counter.get_total_flops() if counts else 0
            return loss

        transformers.Trainer.get_batch_samples, transformers.Trainer.training_step = (
            timed_fetch,
            counted_step,
        )

    def on_evaluate(self, args, state, control, **kwargs):
        raise RuntimeError("an evaluation is no part of what is timed")

    def on_step_end(self, args, state, control, **kwargs):
        if on_card:
            torch.cuda.synchronize()
        self.ends.append(time.time())
        if len(self.ends) == self.run.steps + 1 and on_card:
            self.found["peak"] = torch.cuda.max_memory_allocated()
            self.found["reserved"] = torch.cuda.max_memory_reserved()
        if len(self.ends) == self.run.steps + 1 + self.run.count:
            raise Enough

    def result(self):
        """Seconds to the end of the first step, of a step and of its wait for pictures; FLOP of a step; bytes."""
        first = self.ends[0] - psutil.Process().create_time()
        step = statistics.median(
            after - before for before, after in pairwise(self.ends[: self.run.steps + 1])
        )
        wait = statistics.median(self.waits[1 : self.run.steps + 1])
        return self.found | {
            "first": first,
            "step": step,
            "wait": wait,
            "flops": self.flops,
            "rss": peak_rss(),
        }


def peak_rss():
    """Most bytes of RAM this process ever held; Linux' getrusage() would count the process that started it as well."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return 1024 * int(line.split()[1])


def pixel_bytes(folder):
    """Bytes of the data-set files below a folder that hold pixels."""
    files = ((file, datasets.Dataset.from_file(str(file))) for file in folder.rglob("*.arrow"))
    return sum(file.stat().st_size for file, table in files if "pixel_values" in table.column_names)


def read_records(folder, captions):
    """As many records as train.py trains on: all but those of one picture, which it holds out."""
    return json.loads((folder / f"data_{captions}.json").read_text(encoding="utf-8"))[:-captions]


def run_train_py(run, folder):
    """train.py itself, from main(): what it does before the first step counts, but for the captions of the model."""
    train = load("train.py", [])
    train.DATA_JSON, train.MODEL_FOLDER = (
        str(folder / f"data_{run.captions}.json"),
        str(folder / "model"),
    )
    train.BATCH_SIZE, train.GRADIENT_ACCUMULATION = run.batch, run.accumulation
    train.GRADIENT_CHECKPOINTING, train.TEST_IMAGES, train.SWANLAB_MODE = (
        run.checkpointing,
        1,
        "disabled",
    )
    build_trainer = train.build_trainer

    def build_without_captions(*args):
        trainer = build_trainer(*args)
        trainer.args.eval_on_start = False
        trainer.logged = (
            time.monotonic(),
            0,
        )  # what an evaluation leaves: training's time counts from there
        return trainer

    train.build_trainer = build_without_captions
    train.main()


def time_run(run, folder):
    """In a child process: do a run in the current folder until it has been timed."""
    watch = Stopwatch(run)
    try:
        if run.variant == "train.py":
            run_train_py(run, folder)
        else:
            recipe = {"documented": run_documented, "TRL": run_trl}[run.variant]
            recipe(run, read_records(folder, run.captions), folder / "model")
    except Enough:
        return watch.result() | {"pixels": pixel_bytes(Path.cwd())}
    raise RuntimeError(f"{run.variant} ended before {run.steps + 1} steps")


def weigh_loader(samples, folder):
    """In a child process: most RAM of train.py's loader (two worker processes) and of the process that holds it."""
    train, records = load("train.py", []), read_records(folder, 1)
    train.MODEL_FOLDER, train.DATA_JSON, train.IMAGE_FOLDERS = (
        str(folder / "model"),
        "data_vl.json",
        [str(folder)],
    )
    many = [json.loads(json.dumps(records[number % len(records)])) for number in range(samples)]
    for number, record in enumerate(
        many
    ):  # two records of one picture and one prompt would become one sample
        record["conversations"][0]["value"] = f"{number}: {record['conversations'][0]['value']}"
    Path(train.DATA_JSON).write_text(json.dumps(many), encoding="utf-8")
    processor, config = train.load_processor()
    train.split_by_picture = lambda conversations: (
        conversations,
        conversations[:1],
    )  # none is held out
    table = train.prepare_tables(processor, resuming=None)["train"]
    workers = {"num_workers": 2, "multiprocessing_context": "spawn", "persistent_workers": True}
    loader = DataLoader(
        table, 4, shuffle=True, collate_fn=train.CaptionCollator(processor, config), **workers
    )
    peak = 0
    for _ in islice(chain.from_iterable(repeat(loader)), LOADER_BATCHES):
        children = [
            child
            for child in psutil.Process().children()
            if "spawn_main" in " ".join(child.cmdline())
        ]
        peak = max(peak, sum(child.memory_info().rss for child in children))
    heads = ("samples", "peak RSS of 2 loader workers, MB", "of the main process, MB")
    return dict(
        zip(heads, (f"{len(table):,}", f"{peak / 1e6:.0f}", f"{peak_rss() / 1e6:.0f}"), strict=True)
    )


def work_in(cwd, task, what, folder):
    os.chdir(cwd)
    with contextlib.redirect_stdout(sys.stderr):  # what the programs say is no part of the table
        return task(what, folder)


def start(task, what, folder):
    """Return task(what, folder), done in a process and a working folder of its own."""
    print(task.__name__, what, file=sys.stderr)
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cwd,
        ProcessPoolExecutor(1, spawn) as child,
    ):
        return child.submit(work_in, cwd, task, what, folder).result()


def time_runs(runs, folder, rounds):
    """Do all runs, rounds times over; return [(run, median of each value)] of those that the memory allows."""
    results = [(run, []) for run in runs]
    for run, found in results * rounds:
        try:
            found.append(start(time_run, run, folder))
        except (
            SystemExit,
            torch.OutOfMemoryError,
        ) as reason:  # of train.py, before its first step; of the others
            print(f"Not in the table: {run}: {reason}\n")
    results = [(run, found) for run, found in results if found]
    return [
        (run, {name: statistics.median(one[name] for one in found) for name in found[0]})
        for run, found in results
    ]


def write_data(folder, pictures):
    """Scenes as pictures, and data_1.json and data_5.json with their captions in the form that csv2json.py gives."""
    rng, records = random.Random(0), {1: [], 5: []}
    for number, scene in enumerate(rng.choices(scenes.all_scenes(), k=pictures)):
        path = folder / f"{number}.jpg"
        scenes.draw(scene, rng, FILE_SIDE).save(path, quality=92)
        question = {
            "from": "user",
            "value": f"请描述这张图片: <|vision_start|>{path}<|vision_end|>",
        }
        for captions in records:
            answers = (
                {"from": "assistant", "value": text} for text in scenes.terse(scene)[:captions]
            )
            records[captions] += [{"conversations": [question, answer]} for answer in answers]
    for captions, of_all in records.items():
        (folder / f"data_{captions}.json").write_text(json.dumps(of_all), encoding="utf-8")


def write_model(folder, shape):
    """A model of this shape with random weights and the small model's tokenizer, as folder/model."""
    shutil.copytree(TINY, folder / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    own = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    config = own | shape | {"vision_config": own["vision_config"] | shape.get("vision_config", {})}
    with torch.device("cuda" if on_card else "cpu"):
        model = Qwen2VLForConditionalGeneration._from_config(
            transformers.Qwen2VLConfig(**config), dtype=dtype
        )
    model.save_pretrained(folder / "model")


@contextlib.contextmanager
def workshop(pictures, shape):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        write_data(Path(folder), pictures)
        write_model(Path(folder), shape)
        torch.cuda.empty_cache()
        yield Path(folder)


def tiny_tables(pictures=PICTURES, rounds=ROUNDS, loader_samples=LOADER_SAMPLES):
    """What an optimizer step of 16 pictures costs, and the RAM of the loader."""
    runs = [
        Run("documented"),
        Run("train.py", checkpointing=False),
        Run("train.py", 5, checkpointing=False),
    ]
    runs += [Run("TRL")] if importlib.util.find_spec("trl") else []
    rows = []
    with workshop(pictures + 1, TINY_SHAPE) as folder, patch.dict(os.environ, OMP_NUM_THREADS="1"):
        timed = time_runs(runs, folder, rounds)
        loaders = [start(weigh_loader, samples, folder) for samples in loader_samples]
    (_, base), *_ = timed
    for run, found in timed:
        caption = found["step"] / 16 / run.captions
        row = {
            "variant": run.variant,
            "captions a picture": run.captions,
            "s a step": f"{found['step']:.2f}",
        }
        row |= {
            "s a caption": f"{caption:.3f}",
            "times faster": f"{base['step'] / 16 / caption:.1f}",
        }
        row |= {
            "s to the first step": f"{found['first']:.1f}",
            "sooner": f"{base['first'] / found['first']:.1f}",
        }
        row |= {
            "peak RSS, MB": f"{found['rss'] / 1e6:.0f}",
            "MB written for pixels": f"{found['pixels'] / 1e6:.0f}",
        }
        rows.append(row)
    return rows, loaders


def gpu_runs():
    """The documented recipe, and train.py in every layout of 16 pictures a step."""
    layouts = [
        (c, layout, on)
        for c in (1, 5)
        for layout in ((4, 4), (8, 2), (16, 1))
        for on in (True, False)
    ]
    own = [Run("train.py", c, *layout, checkpointing=on, count=True) for c, layout, on in layouts]
    return [Run("documented", count=True), *own]


def estimate(run, config):
    """GiB that load_model.py announces for a training by train.py."""
    script = load("load_model.py", [f"ANSWER_TOKENS={ANSWER_TOKENS[run.captions]}"])
    with torch.device("meta"):  # shapes without numbers
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype)
    return script.training_memory(model, run.batch, run.checkpointing)


def matmul_rate(size):
    """FLOP/s of the product of two size x size matrices."""
    left, right = (
        torch.randn(size, size, dtype=dtype, device="cuda" if on_card else "cpu") for _ in range(2)
    )
    seconds = []
    for _ in range(25):
        before = time.perf_counter()
        left @ right
        torch.cuda.synchronize() if on_card else None
        seconds.append(time.perf_counter() - before)
    return 2 * size**3 / statistics.median(seconds[5:])


def gpu_table(runs, shape=REAL_SHAPE, rounds=ROUNDS):
    """Throughput, memory and load of the card; without a card, a dry run on the CPU."""
    rate, rows = matmul_rate(8192 if on_card else 512), []
    most = max(run.batch * run.accumulation * (run.steps + 2) for run in runs)
    with workshop(most + 1, shape) as folder:
        timed, config = (
            time_runs(runs, folder, rounds),
            transformers.Qwen2VLConfig.from_pretrained(folder / "model"),
        )
    for run, found in timed:
        pictures = run.batch * run.accumulation / found["step"]
        row = {
            "variant": run.variant,
            "layout": f"{run.batch}x{run.accumulation}",
            "captions a picture": run.captions,
        }
        row |= {"checkpointing": on_off[run.checkpointing], "samples/s": f"{pictures:.2f}"}
        row |= {"captions/s": f"{pictures * run.captions:.2f}"}
        row |= {
            "estimate, GiB": f"{estimate(run, config):.2f}" if run.variant == "train.py" else "-"
        }
        row |= {
            f"{name}, GiB": f"{found.get(name, 0) / 2**30:.2f}" for name in ("peak", "reserved")
        }
        row |= {"share of matmul rate": f"{found['flops'] / found['step'] / rate:.1%}"}
        rows.append(row | {"loader wait a step, ms": f"{1000 * found['wait']:.0f}"})
    return rows, rate


def print_table(rows):
    widths = {name: max(len(str(row[name])) for row in [*rows, {name: name}]) for name in rows[0]}
    for row in (
        {name: name for name in widths},
        {name: "-" * width for name, width in widths.items()},
        *rows,
    ):
        print(
            "| " + " | ".join(str(row[name]).ljust(width) for name, width in widths.items()) + " |"
        )


def machine(threads):
    """The machine and the versions that the numbers hold for."""
    names = []
    if Path("/proc/cpuinfo").is_file():
        names = [
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    cpu = names[0].partition(": ")[2] if names else platform.processor()
    card = f", {torch.cuda.get_device_name()}" if on_card else ""
    packages = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")
    versions = [
        f"{one} {importlib.metadata.version(one)}"
        for one in packages
        if importlib.util.find_spec(one)
    ]
    text = f"{platform.system()}, {cpu}, {os.cpu_count()} cores{card}; threads: {threads}"
    return f"{text}\nPython {platform.python_version()}, {', '.join(versions)}\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choice = parser.add_mutually_exclusive_group(required=True)
    for name in ("--tiny", "--flops", "--gpu"):
        choice.add_argument(name, action="store_true")
    chosen = parser.parse_args()
    if chosen.tiny:
        rows, loaders = tiny_tables()
        print(machine(1))
        print_table(rows)
        print("" if importlib.util.find_spec("trl") else "\nTRL is not installed: no row for it.\n")
        print_table(loaders)
    elif chosen.flops:
        print(machine(torch.get_num_threads()))
        print_table(flops_table())
    elif not on_card:
        raise SystemExit("--gpu needs a CUDA card, and torch finds none on this machine.")
    else:
        rows, rate = gpu_table(gpu_runs())
        print(
            machine(torch.get_num_threads()),
            f"bf16 matrix product: {rate / 1e12:.0f} TFLOP/s\n",
            sep="",
        )
        print_table(rows)


if __name__ == "__main__":
    main()
