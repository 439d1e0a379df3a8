"""Run one training of bench.py in this process, and write what it cost to cost.json.

    PYTHON tests/tools/timed.py '{"variant": "train.py"}' FOLDER

FOLDER holds the model and data_1.json, data_5.json; everything is written to the current folder.
PYTHON may belong to another environment, in which TRL or ms-swift is installed.
"""

import contextlib
import functools
import json
import os
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
from tools.recipes import (
    SIDE,
    Run,
    choose_dtype,
    on_gpu,
    run_documented,
    run_swift,
    run_trl,
)


class Enough(BaseException):  # no error: train.py prints errors and ends
    """Ends a training that has been timed."""


class Stopwatch(transformers.TrainerCallback):
    """Times the optimizer steps of any Trainer in this process, from end to end."""

    def __init__(self, run: Run) -> None:
        """Stand in the way of every Trainer that will be made."""
        self.run = run
        self.ends = []  # wall clock at the end of each step
        self.cpu_ends = []  # CPU time of this process at the end of each step
        self.waits = []  # CPU time until a step had its batch
        self.flops = 0
        self.found = {}
        self.watch_trainers()
        self.time_batches()
        self.count_steps()

    def watch_trainers(self) -> None:
        """Join every Trainer; ms-swift makes its own list of the default callbacks."""
        build = transformers.Trainer.__init__

        @functools.wraps(build)  # ms-swift looks at its parameters
        def build_watched(trainer, *args, **kwargs):
            build(trainer, *args, **kwargs)
            trainer.add_callback(self)

        transformers.Trainer.__init__ = build_watched

    def time_batches(self) -> None:
        """Take the time that the Trainer waits for the batches of a step."""
        fetch = transformers.Trainer.get_batch_samples

        def timed_fetch(*args, **kwargs):
            start = time.process_time()
            batches = fetch(*args, **kwargs)
            self.waits.append(time.process_time() - start)
            return batches

        transformers.Trainer.get_batch_samples = timed_fetch

    def count_steps(self) -> None:
        """Count the arithmetic of the step behind those that are timed, if that is wanted."""
        step = transformers.Trainer.training_step

        def counted_step(*args, **kwargs):
            if not self.ends:
                check_input(args[1], args[2], self.run)
            counts = self.run.count and len(self.ends) > self.run.steps
            counting = FlopCounterMode(display=False) if counts else contextlib.nullcontext()
            with counting as counter:
                loss = step(*args, **kwargs)
            self.flops += counter.get_total_flops() if counts else 0
            return loss

        transformers.Trainer.training_step = counted_step

    def on_evaluate(self, args, state, control, **kwargs):
        """Refuse an evaluation: it is no part of what is timed."""
        raise RuntimeError("an evaluation is no part of what is timed")

    def on_train_begin(self, args, state, control, **kwargs):
        """Note how many steps are to come."""
        self.found["max_steps"] = state.max_steps

    def on_step_end(self, args, state, control, **kwargs):
        """Note the time; end the training if enough of it was seen."""
        if on_gpu:
            torch.cuda.synchronize()
        self.ends.append(time.time())
        self.cpu_ends.append(time.process_time())
        if self.run.steps == 0:
            return
        if len(self.ends) == self.run.steps + 1 and on_gpu:
            self.found["peak"] = torch.cuda.max_memory_allocated()
            self.found["reserved"] = torch.cuda.max_memory_reserved()
        if len(self.ends) == self.run.steps + 1 + self.run.count:
            raise Enough

    def result(self) -> dict[str, float]:
        """Return seconds, CPU seconds, FLOP and bytes; the first step warms up."""
        last = self.run.steps + 1 if self.run.steps else len(self.ends)
        if len(self.ends) < max(2, last):
            raise RuntimeError(f"{self.run.variant} ended after {len(self.ends)} steps")
        return {
            **self.found,
            "steps": len(self.ends),
            "first": self.ends[0] - psutil.Process().create_time(),
            "first_cpu": self.cpu_ends[0],
            "step": median_difference(self.ends[:last]),
            "step_cpu": median_difference(self.cpu_ends[:last]),
            "wait_cpu": statistics.median(self.waits[1:last]),
            "flops": self.flops,
            "rss": peak_rss(),
        }


def check_input(model: torch.nn.Module, batch: dict, run: Run) -> None:
    """Stop if the images of a pass are not as large as everybody's: less work is no speed."""
    if "passes" in batch:  # train.py's step, which is cut into passes behind this
        return
    images = (batch["input_ids"] == model.config.image_token_id).sum().item()
    expected = run.batch * (SIDE // 28) ** 2
    if images != expected:
        raise RuntimeError(f"a pass has {images} image tokens, not {expected}")


def median_difference(times: list[float]) -> float:
    """Return the median of the times between one and the next."""
    return statistics.median(after - before for before, after in pairwise(times))


def peak_rss() -> int:
    """Return the most bytes of memory that this process ever held."""
    # Linux' getrusage() would count the process that started this one as well
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


def read_records(folder: Path, captions: int) -> list[dict]:
    """Return as many records as train.py trains on: all but those of one image, held out."""
    return json.loads((folder / f"data_{captions}.json").read_text(encoding="utf-8"))[:-captions]


def run_train_py(run: Run, folder: Path) -> None:
    """Run train.py itself, from main() to the saved adapter; only nothing is captioned."""
    from support.launch import load

    train = load("train.py", [])
    train.DATA_JSON = str(folder / f"data_{run.captions}.json")
    train.MODEL_FOLDER = str(folder / "model")
    train.TEST_IMAGES = 1
    train.BATCH_SIZE = run.batch
    train.GRADIENT_CHECKPOINTING = run.checkpointing
    train.SWANLAB_MODE = "disabled"
    make_arguments = train.training_arguments

    def without_evaluation(*args):
        arguments = make_arguments(*args)
        arguments.eval_strategy = "no"
        arguments.eval_on_start = False
        return arguments

    def save_unjudged(trainer):
        """Save the adapter: save_result takes what an evaluation kept, and there is none."""
        trainer.model.save_pretrained(train.OUTPUT_FOLDER)
        trainer.data_collator.base.processor.save_pretrained(train.OUTPUT_FOLDER)

    train.training_arguments = without_evaluation
    train.save_result = save_unjudged
    train.leave = lambda code: None  # so that cost.json can be written
    train.main()


def main() -> None:
    """Do one run, and write what it cost."""
    run, folder = Run(**json.loads(sys.argv[1])), Path(sys.argv[2])
    # what train.py does for itself: on an H100 cuDNN's attention plans each new shape anew, and at
    # some lengths its gradients are NaN (pytorch#196678)
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.set_seed(0)
    watch = Stopwatch(run)
    recipes = {"documented": run_documented, "TRL": run_trl, "ms-swift": run_swift}
    with contextlib.suppress(Enough):
        if run.variant == "train.py":
            run_train_py(run, folder)
        else:
            recipes[run.variant](run, read_records(folder, run.captions), folder / "model")
    cost = {**watch.result(), "dtype": str(choose_dtype())}
    Path("cost.json").write_text(json.dumps(cost), encoding="utf-8")
    # no time for the ends of other people's threads
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
