"""train.py, training: memory, signals, steps that fail, what is logged, saved, kept and resumed."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import posix
from safetensors.torch import load_file
from support.training import about, draw_scene, plain_losses, write_records

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

COLOURS = ["red", "green", "blue", "black", "white", "yellow", "pink"]
SMALL = {
    "IMAGES_PER_STEP": 4,  # of 8 images: 2 steps an epoch, 4 in all
    "TEST_IMAGES": 2,
    "EPOCHS": 2,
    "BATCH_SIZE": 2,
    "LEARNING_RATE": 0.01,
    "MAX_NEW_TOKENS": 2,
    "STYLE_PROMPT": None,
    "OTHER_QUESTIONS": [],
    "LOG_STEPS": 1,
    "SAVE_STEPS": 1,
}


def write_project(folder: Path) -> None:
    """Write ten images of stars and circles, and their JSON."""
    records = []
    for number in range(10):
        shape, colour = ("star", "circle")[number % 2], COLOURS[number % 7]
        draw_scene(folder / f"{number}.jpg", shape, colour, "purple")
        records.append(about(f"{number}.jpg", f"a {colour} {shape}"))
        if number % 3 == 0:
            records.append(about(f"{number}.jpg", f"one {shape} in {colour} on purple"))
    write_records(folder / "data.json", *records)
    (folder / "output").mkdir()


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    return folder


@pytest.fixture
def settings(train, project, tmp_path, monkeypatch) -> Path:
    """The constants of a small run, with OUTPUT_FOLDER in a place of its own; returns that."""
    output = tmp_path / "output"
    output.mkdir()
    values = {"DATA_JSON": str(project / "data.json"), "OUTPUT_FOLDER": str(output)}
    for name, value in {**SMALL, **values}.items():
        monkeypatch.setattr(train, name, value)
    # what is only for looking is tested in test_train_scores.py, and takes a second
    for name in ("show_results", "write_report"):
        monkeypatch.setattr(train, name, lambda results, state, run: None)
    return output


@pytest.fixture
def build(train, base, settings):
    """A function that sets up a training as train.py does, ready for train()."""

    def build(checkpoint: Path | None = None):
        features = train.KeptFeatures(base)
        tables = train.prepare_data(base, features, resuming=False)
        model = train.load_model(base)
        run = {**train.describe_run(), "question": "?", "prompt": "?", "size": "?"}
        collator = train.Collator(base, features, model)
        return train.build_trainer(model, collator, tables, run, checkpoint)

    return build


class Watch(transformers.TrainerCallback):
    """Notes after each step what the weights are and which images it saw."""

    def __init__(self, trainer):
        self.trainer, self.weights, self.images = trainer, [adapter_of(trainer)], []
        trainer.add_callback(self)

    def on_step_end(self, args, state, control, **_):
        self.weights.append(adapter_of(self.trainer))
        self.images.append(self.trainer.step_images)


def adapter_of(trainer) -> torch.Tensor:
    """Return all trained weights as one vector."""
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    return torch.cat([weight.detach().flatten() for weight in trained]).clone()


def logs_of(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---- The heaviest pass


@pytest.mark.parametrize("kinds", [1, 2])
def test_the_heaviest_pass_is_what_training_will_do(train, build, capsys, monkeypatch, kinds):
    """It is run in training mode, for all kinds of heavy batches, held-out ones included.

    Nothing of it is left. Otherwise memory runs out in the middle of a night.
    """
    trainer = build()
    chosen = train.heaviest
    monkeypatch.setattr(train, "heaviest", lambda table, size: chosen(table, size)[:1] * kinds)
    seen = []
    layer = trainer.model.get_base_model().model.language_model.layers[0]
    hook = layer.register_forward_hook(
        lambda module, inputs, output: seen.append((module.training, len(output)))
    )
    before = adapter_of(trainer)
    trainer.create_optimizer()
    train.HeaviestPass(trainer).on_train_begin(trainer.args, trainer.state, trainer.control)
    hook.remove()
    # twice, as gradients of the first are there in the second, then those that are held out
    learned = train.heaviest(trainer.train_dataset, 2)
    held_out = train.heaviest(trainer.eval_dataset, 2)
    assert seen == [(True, 2)] * 2 * len(learned) + [(False, 2)] * len(held_out)
    assert all(weight.grad is None for weight in trainer.model.parameters())
    assert torch.equal(adapter_of(trainer), before) and not trainer.optimizer.state
    printed = capsys.readouterr().out
    assert "2 images per pass, gradient checkpointing off" in printed
    assert re.search(r"the heaviest pass takes [\d.]+ GiB with Adam's state", printed)


def test_heavy_are_the_longest_and_those_with_most_to_learn(train):
    """Both orders are tried: a long question costs other memory than many answers."""
    rows = [
        {"tokens": 10, "learned": 9},
        {"tokens": 30, "learned": 1},
        {"tokens": 20, "learned": 5},
    ]
    table = train.datasets.Dataset.from_list(rows)
    assert train.heaviest(table, 1) == [[rows[1]], [rows[0]]]
    assert train.heaviest(table, 2) == [[rows[2], rows[1]], [rows[2], rows[0]]]
    [everything] = train.heaviest(table, 3)
    assert len(everything) == 3, "the same samples are tried once"
    assert len(train.heaviest(table, 8)) == 1


@pytest.mark.parametrize(("processes", "numbers"), [(1, 2), (2, 3)])
def test_memory_counts_what_the_first_step_adds(train, build, monkeypatch, processes, numbers):
    """Adam's two numbers per weight, and DDP's copy of the gradients, are not there yet."""
    trainer = build()
    trainer.create_optimizer()
    trained = train.trained_bytes(trainer.model)
    monkeypatch.setattr(type(trainer.args), "world_size", processes)
    monkeypatch.setattr(train, "peak_memory", lambda: 1000)
    heaviest = train.HeaviestPass(trainer)
    assert heaviest.measure(1) == 1000 + numbers * trained
    trainer.optimizer.state["something"] = 1
    assert heaviest.measure(1) == 1000 + (numbers - 2) * trained


GIB = 2**30
FREE = 10  # GiB; 9 of them are used


def meter(fixed: float, plain: float, recomputed: float, full: float = math.inf):
    """Return a GPU: GiB of a pass by number of images, and from how many on it runs out."""

    def measure(size: int, checkpointing: bool) -> float:
        needed = fixed + size * (recomputed if checkpointing else plain)
        if needed > full:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return needed

    return measure


CHOICES = {
    # name: (GPU, constants, what is chosen, which sizes are tried without and with checkpointing)
    "all fit": (meter(4, 0.1, 0.1), {}, (16, False), [1, 2, 4, 8, 16], []),
    "some fit": (meter(4, 0.5, 0.1), {}, (8, False), [1, 2, 4, 8], []),
    "one fits, more if recomputed": (meter(6, 2, 0.3), {}, (8, True), [1, 2], [1, 2, 4, 8]),
    "one fits, recomputed": (meter(8, 2, 0.6), {}, (1, True), [1], [1, 2]),
    "out of memory in a try": (meter(4, 2, 0.5, full=7), {}, (4, True), [1, 2], [1, 2, 4, 8]),
    "BATCH_SIZE of one's own": (
        meter(4, 0.5, 0.1),
        {"BATCH_SIZE": 4},
        (4, False),
        [4],
        [],
    ),
    "BATCH_SIZE that must be recomputed": (
        meter(4, 2, 0.1),
        {"BATCH_SIZE": 4},
        (4, True),
        [4],
        [4],
    ),
    "BATCH_SIZE = 1 that fits": (meter(4, 2, 0.1), {"BATCH_SIZE": 1}, (1, False), [1], []),
    "BATCH_SIZE above IMAGES_PER_STEP": (
        meter(4, 0.3, 0.1),
        {"BATCH_SIZE": 64},
        (16, False),
        [16],
        [],
    ),
    "recomputed as set": (
        meter(4, 0.1, 0.5),
        {"GRADIENT_CHECKPOINTING": True},
        (8, True),
        [],
        [1, 2, 4, 8],
    ),
    "never recomputed": (
        meter(6, 2, 0.1),
        {"GRADIENT_CHECKPOINTING": False},
        (1, False),
        [1, 2],
        [],
    ),
    "both as set": (
        meter(4, 2, 1),
        {"BATCH_SIZE": 4, "GRADIENT_CHECKPOINTING": True},
        (4, True),
        [],
        [],
    ),
}


@pytest.fixture
def choosing(train, monkeypatch):
    """A function that lets HeaviestPass choose on a GPU whose memory is a formula.

    Returns what was chosen, and the sizes tried without and with checkpointing before that.
    """

    def choose(measure, constants: dict, others=lambda ours: ours, share: int = 16):
        for name in ("BATCH_SIZE", "GRADIENT_CHECKPOINTING"):
            monkeypatch.setattr(train, name, constants.get(name, "auto"))
        monkeypatch.setattr(train, "free_memory", lambda: FREE * GIB)
        monkeypatch.setattr(train, "gather_object", others)
        size = constants.get("BATCH_SIZE", 4)
        trainer = SimpleNamespace(data_collator=SimpleNamespace(batch_size=size))
        heaviest = train.HeaviestPass(trainer)
        tried, now = {False: [], True: []}, [None]

        def measured(size: int) -> float:
            tried[now[0]].append(size)
            return measure(size, now[0]) * GIB

        monkeypatch.setattr(heaviest, "measure", measured)
        monkeypatch.setattr(heaviest, "set_checkpointing", lambda on: now.__setitem__(0, on))
        args = SimpleNamespace(device=torch.device("cuda"), per_device_train_batch_size=share)
        heaviest.on_train_begin(args, None, None)
        assert tried[now[0]].pop() == trainer.data_collator.batch_size, "measured once more"
        return (trainer.data_collator.batch_size, now[0]), tried[False], tried[True]

    return choose


@pytest.mark.parametrize("name", CHOICES)
def test_batch_size_and_checkpointing_are_what_memory_allows(choosing, capsys, name):
    """The largest that fits, without recomputing if possible, and what the user set stays.

    Otherwise a run is slower than it could be, or out of memory.
    """
    measure, constants, chosen, plain, recomputed = CHOICES[name]
    assert choosing(measure, constants) == (chosen, plain, recomputed)
    size, checkpointing = chosen
    needed = f"{measure(size, checkpointing):.2f}"
    said = f"{size} images per pass, gradient checkpointing {'on' if checkpointing else 'off'}"
    printed = capsys.readouterr().out
    assert printed.startswith(f"{said}: the heaviest pass takes {needed} GiB")
    assert "more than is free" not in printed


def test_no_more_is_tried_than_a_process_has_images(choosing):
    """With 3 images in a process, passes of 2 are the largest; with 1 nothing is recomputed."""
    small = meter(1, 0.1, 0.1)
    assert choosing(small, {}, share=3) == ((2, False), [1, 2], [])
    assert choosing(small, {}, share=1) == ((1, False), [1], [])


@pytest.mark.parametrize("constants", [{}, {"BATCH_SIZE": 8}, {"GRADIENT_CHECKPOINTING": False}])
def test_a_pass_that_does_not_fit_at_all_is_one_sentence(choosing, constants):
    """It says how much is free, what to lower, and what is switched off."""
    sentence = "does not fit into the 10.0 GiB that are free on the GPU"
    with pytest.raises(SystemExit, match=sentence) as error:
        choosing(meter(9.5, 1, 0.1), constants)
    off = constants.get("GRADIENT_CHECKPOINTING") is False
    assert ("GRADIENT_CHECKPOINTING = True" in str(error.value)) == off


def test_all_processes_choose_the_same(choosing):
    """The GPU with the least memory decides for all. Otherwise they wait for each other."""

    def beside_a_smaller_gpu(ours: list) -> list:
        [value] = ours
        return [value, 7 * GIB if value == FREE * GIB else value]  # of memory that is free

    def beside_more_learned(ours: list) -> list:
        [value] = ours
        return [value, value if value == FREE * GIB else 1.4 * value]  # of memory that is taken

    def beside_one_that_ran_out(ours: list) -> list:
        [value] = ours
        return [value, math.inf if value > 5 * GIB and value != FREE * GIB else value]

    gpu = meter(4, 0.2, 0.1)
    assert choosing(gpu, {})[0] == (16, False)
    assert choosing(gpu, {}, beside_a_smaller_gpu)[0] == (8, False)
    assert choosing(gpu, {}, beside_more_learned)[0] == (8, False)
    assert choosing(gpu, {}, beside_one_that_ran_out)[0] == (4, False)


def test_memory_that_windows_would_move_is_said(choosing, capsys):
    """More than is free is said: there the driver does not fail, but swaps, ten times slower."""
    constants = {"BATCH_SIZE": 4, "GRADIENT_CHECKPOINTING": False}
    choosing(meter(4, 2, 1), constants)
    printed = capsys.readouterr().out
    assert "That is more than is free. Lower BATCH_SIZE" in printed
    assert "or set GRADIENT_CHECKPOINTING = True" in printed
    # already on: no advice to switch it on
    choosing(meter(4, 2, 2), {**constants, "GRADIENT_CHECKPOINTING": True})
    printed = capsys.readouterr().out
    assert "Lower BATCH_SIZE, or training" in printed


# ---- Signals


@pytest.fixture
def handlers():
    """Put back what the signals did before."""
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


class Ended(Exception):
    """In place of os._exit."""


@pytest.fixture
def ended(train, monkeypatch) -> list[int]:
    """The code with which the script ended at once."""
    codes = []

    def end(code: int):
        codes.append(code)
        raise Ended

    monkeypatch.setattr(train.os, "_exit", end)
    return codes


def test_a_signal_before_training_ends_it_at_once(train, ended, capfd):
    """There is nothing to save yet. Otherwise Ctrl-C would wait for the check of a data set."""
    with pytest.raises(Ended):
        train.SaveAndStop().stop(signal.SIGTERM, None)
    assert ended == [128 + signal.SIGTERM]
    assert "Stopped. Finished files are kept. Run again" in capfd.readouterr().err


def test_the_second_signal_ends_it_at_once(train, ended, handlers, capfd):
    """The first one saves after the step, and says that once more means at once."""
    stopper = train.SaveAndStop()
    stopper.on_train_begin(None, None, None)
    stopper.stop(signal.SIGINT, None)
    assert ended == [] and "at once" in capfd.readouterr().err
    with pytest.raises(Ended):
        stopper.stop(signal.SIGINT, None)
    assert ended == [128 + signal.SIGINT]


@posix
def test_every_stop_signal_is_handled_but_nohups(train, handlers):
    """A closed terminal saves like Ctrl-C, unless SIGHUP is ignored on purpose, as nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stopper = train.SaveAndStop()
    stopper.on_train_begin(None, None, None)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stopper.on_train_begin(None, None, None)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        assert signal.getsignal(number) == stopper.stop


def step_end(train, stopper, epoch: float, processes: int = 1) -> SimpleNamespace:
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    args = SimpleNamespace(world_size=processes, device=torch.device("cpu"))
    stopper.on_step_end(args, SimpleNamespace(epoch=epoch), control)
    return control


def test_epochs_are_saved_and_half_of_one_is_not_judged(train):
    """The end of an epoch is always saved; one that was stopped is judged when it is resumed."""
    stopper = train.SaveAndStop()
    assert not step_end(train, stopper, 0.5).should_save
    assert step_end(train, stopper, 1.0).should_save
    stopper.number = signal.SIGTERM
    control = step_end(train, stopper, 1.5)
    assert control.should_save and control.should_training_stop
    # stopped within an epoch, at its end, and in the last step of all
    for epoch, stopped, step, judged in (
        (1.5, True, 6, False),
        (2.0, False, 8, True),
        (2.0, True, 8, False),
        (3.0, True, 12, True),
    ):
        control = SimpleNamespace(should_evaluate=True, should_training_stop=stopped)
        state = SimpleNamespace(epoch=epoch, global_step=step, max_steps=12)
        stopper.on_epoch_end(None, state, control)
        assert control.should_evaluate == judged


def test_processes_stop_together(train, monkeypatch):
    """One that was asked to stop stops all. Otherwise the others would wait for it."""
    monkeypatch.setattr(train, "reduce", lambda number, how: number + signal.SIGTERM)
    control = step_end(train, train.SaveAndStop(), 0.5, processes=2)
    assert control.should_training_stop and control.should_save


@posix
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_training_has_saved_its_step(
    train, build, settings, handlers, monkeypatch, capsys, sent
):
    """A signal in a step: the step is finished and saved, and a sentence says which it was."""
    monkeypatch.setattr(train, "SAVE_STEPS", 100)
    monkeypatch.setattr(train, "start_swanlab", lambda run: None)
    trainer = build()
    stopper = train.SaveAndStop()
    trainer.add_callback(stopper)

    class Sender(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                os.kill(os.getpid(), sent)

    trainer.add_callback(Sender())
    with pytest.raises(SystemExit) as stopped:
        train.train_and_watch(trainer, None, stopper)
    assert stopped.value.code == 128 + sent
    assert "Stopped at step 3, which is saved. Run again to resume." in capsys.readouterr().out
    assert train.last_checkpoint() == settings / "checkpoint-3"
    assert not train.is_finished()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "The GPU can't take "),
        (RuntimeError("sizes differ"), None),
        (KeyError("images"), None),
    ],
)
def test_advice_follows_the_cause(train, build, monkeypatch, error, sentence):
    """Only a GPU out of memory gets advice about memory; any other error stays what it is."""
    monkeypatch.setattr(train, "start_swanlab", lambda run: None)
    failures = []
    monkeypatch.setattr(train, "finish_swanlab", failures.append)
    trainer = build()

    def fail(**_):
        raise error

    monkeypatch.setattr(trainer, "train", fail)
    stopper = train.SaveAndStop()
    with pytest.raises(SystemExit if sentence else type(error)) as stopped:
        train.train_and_watch(trainer, None, stopper)
    if sentence:
        assert sentence in str(stopped.value) and "BATCH_SIZE" in str(stopped.value)
    assert [type(failure) for failure in failures] == [stopped.type], "SwanLab hears of it"


# ---- Steps


class Spoiled(torch.autograd.Function):
    """A number that is as it was, whose gradient is not."""

    @staticmethod
    def forward(context, number):
        return number.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


def spoil(train, monkeypatch, trainer, steps: set[int]) -> None:
    """Let the gradients of some steps be NaN behind a finite loss."""
    compute_loss = train.CaptionTrainer.compute_loss

    def spoiled(self, *args, **options):
        loss = compute_loss(self, *args, **options)
        step = trainer.state.global_step + 1
        return Spoiled.apply(loss) if step in steps and self.model.training else loss

    monkeypatch.setattr(train.CaptionTrainer, "compute_loss", spoiled)


def test_a_step_without_finite_gradient_is_left_out(train, build, monkeypatch, capsys):
    """It is named with its images, changes no weight, and the training continues to its end.

    Otherwise all weights are NaN one step later, and every resume ends there again.
    """
    trainer = build()
    watch = Watch(trainer)
    spoil(train, monkeypatch, trainer, {2})
    trainer.train()
    assert trainer.state.global_step == 4
    lines = capsys.readouterr().out.splitlines()
    said = lines.index("Step 2 is left out: its gradient is not finite. It saw:")
    assert sorted(lines[said + 1].strip().split(", ")) == sorted(watch.images[1])
    assert len(watch.images[1]) == 4
    assert torch.equal(watch.weights[2], watch.weights[1])
    assert not torch.equal(watch.weights[3], watch.weights[2])
    assert all(weights.isfinite().all() for weights in watch.weights)
    assert all(math.isfinite(loss) for loss in logs_of(trainer, "loss"))


def test_three_steps_in_a_row_without_finite_gradient_stop_it(
    train, build, settings, monkeypatch, capsys
):
    """Then something else is wrong, and the last checkpoint is whole."""
    trainer = build()
    spoil(train, monkeypatch, trainer, {2, 3, 4})
    with pytest.raises(SystemExit, match="Three steps in a row had no finite gradient"):
        trainer.train()
    assert capsys.readouterr().out.count("is left out") == 3
    checkpoint = train.last_checkpoint()
    assert checkpoint == settings / "checkpoint-3"
    weights = load_file(checkpoint / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_steps_left_out_are_counted_in_a_row(train, build, monkeypatch):
    """One good step between them, and training continues."""
    monkeypatch.setattr(train, "EPOCHS", 3)
    trainer = build()
    spoil(train, monkeypatch, trainer, {1, 2, 4, 5})
    trainer.train()
    assert trainer.state.global_step == 6


def test_under_float16_losses_that_are_not_finite_stop_it(
    train, build, settings, monkeypatch, capsys
):
    """A lower scale helps gradients, but no loss. Otherwise it ends, and has learned nothing."""
    trainer = build()
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    original = trainer.compute_loss

    def spoilt(*args, **options):
        loss = original(*args, **options)
        return loss * math.nan if trainer.state.global_step >= 1 else loss

    monkeypatch.setattr(trainer, "compute_loss", spoilt)
    with pytest.raises(SystemExit, match="Three steps in a row had no finite gradient"):
        trainer.train()
    printed = capsys.readouterr().out
    assert printed.count("is left out: its loss is not finite. It saw:") == 3
    assert not train.is_finished()


def test_images_of_all_processes_are_named(train, build, monkeypatch, capsys):
    """The gradient is that of all of them. Otherwise those of an innocent process are blamed."""
    trainer = build()
    spoil(train, monkeypatch, trainer, {2})

    def gather(ours):
        return [*ours, "another.jpg"] if isinstance(ours[0], str) else ours

    monkeypatch.setattr(train, "gather_object", gather)
    trainer.train()
    assert "another.jpg" in capsys.readouterr().out


def test_under_float16_the_scaler_leaves_steps_out(train, build, monkeypatch, capsys):
    """With a GradScaler a step is left out by the scaler, which lowers its scale, and never stops.

    Otherwise a run would end that the scaler would have saved.
    """
    trainer = build()
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    watch = Watch(trainer)
    spoil(train, monkeypatch, trainer, {1, 2, 3})
    trainer.train()
    assert trainer.state.global_step == 4 and accelerator.scaler.get_scale() == 1024 / 8
    printed = capsys.readouterr().out
    for step, scale in ((1, 1024.0), (2, 512.0), (3, 256.0)):
        assert f"Step {step} is left out: float16 overflowed at loss scale {scale}." in printed
    assert torch.equal(watch.weights[3], watch.weights[0])
    assert not torch.equal(watch.weights[4], watch.weights[3])
    assert watch.weights[4].isfinite().all()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_it_with_its_images(
    train, build, settings, monkeypatch, value
):
    """Step and images are named, before any weight has changed. Otherwise NaN is saved."""
    trainer = build()
    watch = Watch(trainer)
    compute_loss = train.CaptionTrainer.compute_loss

    def fail(self, *args, **options):
        loss = compute_loss(self, *args, **options)
        return loss * float(value) if trainer.state.global_step == 2 else loss

    monkeypatch.setattr(train.CaptionTrainer, "compute_loss", fail)
    with pytest.raises(SystemExit, match=f"^The loss is {value} in step 3, on ") as stopped:
        trainer.train()
    names = re.findall(r"[^ ,]+\.jpg", str(stopped.value))
    assert len(names) == 4 and set(names) == set(trainer.step_images)
    assert "Look at these images and their captions" in str(stopped.value)
    assert len(watch.weights) == 3 and watch.weights[-1].isfinite().all()
    assert train.last_checkpoint() == settings / "checkpoint-2"


@pytest.mark.parametrize("warmup", [0, 0.03, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 200])
def test_no_step_has_a_rate_of_zero(train, monkeypatch, warmup, steps):
    """The rate rises over WARMUP and falls in a line, and each step learns something.

    Otherwise in a run of two steps the first one would learn nothing.
    """
    monkeypatch.setattr(train, "WARMUP", warmup)
    trainer = object.__new__(train.CaptionTrainer)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = trainer.create_scheduler(steps, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert min(rates) > 0 and max(rates) <= 2
    assert scheduler.get_last_lr()[0] == 0, "it ends at 0, when there is no step any more"
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if steps == 200 and warmup < 0.5:
        assert max(rates) == pytest.approx(2, rel=0.01) and peak <= 2 + 200 * warmup


def test_each_step_of_a_tiny_run_learns(train, build, monkeypatch):
    """Every step changes the weights, and every rate that is logged is above 0."""
    monkeypatch.setattr(train, "WARMUP", 0.03)
    trainer = build()
    watch = Watch(trainer)
    trainer.train()
    rates = logs_of(trainer, "learning_rate")
    assert len(rates) == 4 and min(rates) > 0
    for before, after in zip(watch.weights, watch.weights[1:], strict=False):
        assert not torch.equal(before, after)


def test_a_step_sees_as_many_images_as_the_others(train, build, monkeypatch):
    """The last step of an epoch is filled up, and each image is seen at least once an epoch."""
    monkeypatch.setattr(train, "IMAGES_PER_STEP", 3)
    trainer = build()
    watch = Watch(trainer)
    trainer.train()
    assert [len(images) for images in watch.images] == [3] * 6
    everything = {image["path"] for row in trainer.train_dataset for image in row["images"]}
    assert set(sum(watch.images[:3], [])) == set(sum(watch.images[3:], [])) == everything
    assert watch.images[:3] != watch.images[3:], "in another order"


@pytest.mark.slow
def test_batch_size_changes_nothing_of_what_is_learned(train, build, monkeypatch):
    """With passes of 1, 2 or 4 images the same steps give the same losses and weights."""
    monkeypatch.setattr(train, "LORA_DROPOUT", 0.0)
    found = []
    for size in (1, 2, 4):
        monkeypatch.setattr(train, "BATCH_SIZE", size)
        transformers.set_seed(0)
        trainer = build()
        watch = Watch(trainer)
        trainer.train()
        found.append((logs_of(trainer, "loss"), watch.images))
    for losses, images in found[1:]:
        assert images == found[0][1]
        assert losses == pytest.approx(found[0][0], rel=1e-3)


@pytest.mark.parametrize(
    ("samples", "processes", "images"),
    [
        (500, 1, 16),
        (500, 4, 4),
        (10, 1, 10),
        (10, 4, 3),
        (5, 1, 5),
        (5, 4, 2),
        (1, 1, 1),
        (1, 4, 1),
    ],
)
def test_a_step_has_as_many_images_on_any_number_of_gpus(
    train, base, settings, monkeypatch, samples, processes, images
):
    """IMAGES_PER_STEP is shared by the processes; small data are seen whole in each step.

    So the steps are as many, and a run may be resumed on another number of GPUs.
    """
    monkeypatch.setattr(train, "IMAGES_PER_STEP", 16)
    monkeypatch.setattr(train, "LOG_STEPS", 100)
    monkeypatch.setattr(train, "PartialState", lambda: SimpleNamespace(num_processes=processes))
    arguments = train.training_arguments(base, samples, None)
    assert arguments.per_device_train_batch_size == images
    steps = math.ceil(samples / (images * processes))
    assert steps == math.ceil(samples / 16)
    assert 1 <= arguments.logging_steps <= steps, "at least once per epoch"
    assert arguments.dataloader_num_workers == 0, "no worker processes: there is nothing to open"
    assert not arguments.logging_nan_inf_filter, "it would wait for the GPU in every step"


def test_something_is_logged_in_every_epoch(train, build, monkeypatch):
    """However large LOG_STEPS is. Otherwise small data would show no loss at all."""
    monkeypatch.setattr(train, "LOG_STEPS", 500)
    trainer = build()
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert steps == [2, 4]
    assert len(logs_of(trainer, "eval_loss")) == 3, "before, and after each epoch"


def test_so_few_steps_are_said_to_teach_little(train, build, capsys, monkeypatch):
    """The numbers of the run are printed, with what to change where there are few steps."""
    trainer = build()
    tables = {"train": trainer.train_dataset, "test": trainer.eval_dataset}
    train.announce(tables, trainer)
    printed = capsys.readouterr().out
    captions = sum(map(len, trainer.train_dataset["references"]))
    assert f"8 samples with {captions} captions to train on, 2 samples held out" in printed
    assert "At most 16 tokens per image." in printed
    assert "2 epochs of 2 steps with 4 images each: 4 steps" in printed
    assert "Only 4 steps: that teaches little. Take more images, a higher EPOCHS" in printed
    monkeypatch.setattr(train, "EPOCHS", 10)
    train.announce(tables, trainer)
    assert "teaches little" not in capsys.readouterr().out


# ---- What is logged


def test_speed_leaves_evaluations_out(train, monkeypatch):
    """Images per second and minutes left are those of the training between two lines.

    SwanLab gets curves and nothing else.
    """
    trainer, lines, points = object.__new__(train.CaptionTrainer), [], []
    trainer.args = SimpleNamespace(per_device_train_batch_size=8, world_size=2)
    monkeypatch.setattr(transformers.Trainer, "log", lambda self, logs: lines.append(logs))
    monkeypatch.setattr(train.swanlab, "has_run", lambda: True)
    monkeypatch.setattr(
        train.swanlab, "log", lambda numbers, step: points.append((step, sorted(numbers)))
    )

    def log(second: float, step: int, **logs) -> None:
        monkeypatch.setattr(train.time, "monotonic", lambda: second)
        trainer.state = SimpleNamespace(global_step=step, max_steps=40)
        trainer.log(logs)
        train.SwanLabCurves().on_log(None, trainer.state, None, logs)

    trainer.clock = (90, 0)  # as the first step sets it
    log(100, 5, loss=2.0, grad_norm=1.0, epoch=0.5)  # 10 seconds for 5 steps
    assert lines[-1]["images_per_second"] == 16 / 2
    assert lines[-1]["minutes_left"] == 2 * 35 / 60
    assert lines[-1]["memory_gib"] > 0
    log(110, 10, eval_loss=1.0, **{"eval_BLEU-4": 0.3})
    trainer.clock = (700, 10)  # as the first step after an evaluation sets it again
    log(720, 15, loss=1.0, learning_rate=1e-4)  # 20 seconds for 5 steps
    assert lines[-1]["minutes_left"] == 4 * 25 / 60
    log(730, 15, train_runtime=9.0, epoch=2.0)  # nothing of it is a curve
    speed = ["train/images per second", "train/memory GiB"]
    assert points == [
        (5, ["train/gradient norm", speed[0], "train/loss", speed[1]]),
        (10, ["eval/BLEU-4", "eval/loss"]),
        (15, [speed[0], "train/learning rate", "train/loss", speed[1]]),
    ]


def test_the_clock_stands_still_while_captions_are_made(train, build, monkeypatch):
    """An evaluation resets the clock, and the next step starts it again."""
    trainer = build()
    clocks = []

    class Reader(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **_):
            clocks.append(trainer.clock)

        def on_step_end(self, args, state, control, **_):
            clocks.append(trainer.clock[1])

    trainer.add_callback(Reader())
    trainer.train()
    # before; two steps, each logged; after the epoch; and again
    assert clocks == [None, 0, 1, None, 2, 3, None]


def test_a_line_reads_like_a_sentence(train, monkeypatch):
    """A log is one line with names and units, above the one bar of the training."""
    line = train.LogLine()
    written = []
    state = SimpleNamespace(global_step=120, max_steps=500)
    logs = {
        "loss": 2.3451,
        "grad_norm": 0.517,
        "learning_rate": 9.1e-05,
        "images_per_second": 12.34,
        "memory_gib": 5.43,
        "minutes_left": 3.2,
        "epoch": 1.0,
    }
    line.on_log(None, state, None, logs)  # no bar in the other processes
    line.training_bar = SimpleNamespace(write=written.append)
    line.on_log(None, state, None, logs)
    line.on_log(None, state, None, {"eval_loss": 1.5, "eval_CIDEr": 0.7})
    line.on_log(None, state, None, {"train_runtime": 3.0})
    assert written == [
        "step 120/500 | loss 2.345 | lr 9.1e-05 | gradient 0.52 | 12.3 images/s | 5.4 GiB | "
        "3 min left",
        "step 120/500 | held-out loss 1.500",
    ]


def test_one_bar_is_shown(train, build):
    """The library's own bar and table of metrics are gone, ours is there once."""
    callbacks = [type(each).__name__ for each in build().callback_handler.callbacks]
    assert callbacks.count("LogLine") == 1
    assert not {"ProgressCallback", "PrinterCallback", "SwanLabCallback"} & set(callbacks)


# ---- The held-out loss


def test_the_held_out_loss_is_the_mean_over_tokens(
    train, build, model, whole_model, exact, monkeypatch
):
    """It is that of plain samples, for any number of images per pass and of processes."""
    trainer = build()
    rows = trainer.eval_dataset.to_list() + trainer.train_dataset.to_list()[:3]
    trainer.eval_dataset = train.datasets.Dataset.from_list(rows)
    count = sum(row["learned"] for row in rows)
    assert len({row["learned"] for row in rows}) > 1
    with trainer.model.disable_adapter(), whole_model.disable_adapter():
        plain = plain_losses(train, exact, whole_model, rows, count).item()
        for size in (1, 2, 8):
            monkeypatch.setattr(trainer.data_collator, "batch_size", size)
            assert trainer.held_out_loss() == pytest.approx(plain, abs=1e-5)
        sums = []
        monkeypatch.setattr(train, "gather_object", lambda ours: sums.extend(ours) or ours)
        for index in range(3):
            state = SimpleNamespace(process_index=index, num_processes=3)
            monkeypatch.setattr(train, "PartialState", lambda state=state: state)
            trainer.held_out_loss()
    total, tokens = map(sum, zip(*sums, strict=True))
    assert tokens == count and total / tokens == pytest.approx(plain, abs=1e-5)


# ---- What is kept


def evaluation(
    train, trainer, score: float, epoch: float, step: int, headline: str = "CIDEr"
) -> None:
    """Let an evaluation end with this CIDEr, and the fewer exact matches the higher it is."""
    trainer.state.epoch, trainer.state.global_step = epoch, step
    scores = {"CIDEr": score, "exact match": 1 - score}
    trainer.results = {
        "headline": headline,
        "scores": {"base": scores, "fine_tuned": scores},
        "captions": [],
        "step": step,
    }
    trainer.keep_adapter()


def kept_step(settings: Path) -> int:
    return json.loads((settings / "kept/results.json").read_text(encoding="utf-8"))["step"]


def test_the_adapter_of_the_best_evaluation_is_kept(train, build, settings):
    """A worse one does not replace it, of equals the later stays, half an epoch never counts."""
    trainer = build()
    evaluation(train, trainer, 9.0, 0.0, step=0)
    assert not (settings / "kept").exists(), "nothing was trained yet"
    kept = []
    moments = [(0.5, 1.0, 2), (0.4, 2.0, 4), (0.9, 2.5, 5), (0.5, 3.0, 6), (0.7, 4.0, 8)]
    for score, epoch, step in moments:
        evaluation(train, trainer, score, epoch, step)
        kept.append(kept_step(settings))
    assert kept == [2, 2, 2, 6, 8]
    assert not (settings / "kept.tmp").exists()


def test_the_best_is_judged_by_the_headline(train, build, settings):
    """Where that is exact match, as for labels, CIDEr does not count."""
    trainer, kept = build(), []
    for score, epoch, step in ((0.9, 1.0, 2), (0.1, 2.0, 4), (0.5, 3.0, 6)):
        evaluation(train, trainer, score, epoch, step, headline="exact match")
        kept.append(kept_step(settings))
    assert kept == [2, 4, 4]


def test_a_resume_knows_the_best_so_far(train, build, settings):
    """It reads what was kept. A damaged one is replaced."""
    trainer = build()
    evaluation(train, trainer, 0.5, 1.0, 2)
    again = build()
    evaluation(train, again, 0.4, 2.0, 4)
    assert kept_step(settings) == 2
    (settings / "kept/results.json").write_text('{"scores": ')
    evaluation(train, again, 0.4, 3.0, 6)
    assert kept_step(settings) == 6


def test_a_new_run_forgets_what_another_one_kept(train, base, settings, monkeypatch):
    """Without a checkpoint nothing is kept. Otherwise an old adapter could be called the best."""
    (settings / "kept").mkdir()
    (settings / "kept/results.json").write_text("{}")
    monkeypatch.setattr(train, "announce", lambda tables, trainer: None)
    monkeypatch.setattr(train, "train_and_watch", lambda *_: None)
    train.train_adapter(base, train.describe_run(), train.SaveAndStop())
    assert not (settings / "kept").exists()


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_result_is_the_best_or_the_last(train, build, settings, monkeypatch, keep):
    """KEEP says whose adapter and scores are the result."""
    monkeypatch.setattr(train, "KEEP", keep)
    trainer = build()
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    for score, epoch, step in ((0.5, 1.0, 2), (0.4, 2.0, 4)):
        trained[0].data.fill_(step)
        evaluation(train, trainer, score, epoch, step)
    train.save_result(trainer)
    results = json.loads((settings / "results.json").read_text(encoding="utf-8"))
    assert results["step"] == {"best": 2, "last": 4}[keep]
    weights = load_file(settings / "adapter_model.safetensors")
    name = next(iter(name for name, w in trainer.model.named_parameters() if w.requires_grad))
    saved = weights[name.replace(".default", "")]
    assert saved.unique().tolist() == [results["step"]]
    assert train.is_finished() and (settings / "README.md").is_file()
    assert not list(settings.rglob("*.tmp"))


def test_the_result_counts_when_all_of_it_is_there(train, build, settings, monkeypatch):
    """results.json comes last: a kill before it leaves a run that is resumed."""
    trainer = build()
    evaluation(train, trainer, 0.5, 1.0, 2)
    replace, moved = os.replace, []

    def note(source: str, target: str):
        moved.append(os.path.basename(target))
        assert not train.is_finished(), f"{target} comes too late"
        return replace(source, target)

    monkeypatch.setattr(train.os, "replace", note)
    train.save_result(trainer)
    assert moved[-1] == "results.json" and "adapter_model.safetensors" in moved
    assert train.is_finished()


@posix
def test_adapter_files_have_the_permissions_of_the_others(train, build, settings):
    """Another user's server can read the adapter where it can read its configuration."""
    trainer = build()
    trainer.train()
    train.save_result(trainer)
    files = [*settings.rglob("adapter_model.safetensors"), *settings.glob("*.json")]
    assert len(files) > 5
    modes = {oct(path.stat().st_mode & 0o777) for path in files}
    assert len(modes) == 1, modes


def test_an_adapter_that_is_not_finite_is_not_saved(train, build, settings):
    """The checkpoint before stays. Otherwise each resume would begin with NaN."""
    trainer = build()
    trainer.train()
    trainer.state.global_step = 5
    weight = next(weight for weight in trainer.model.parameters() if weight.requires_grad)
    weight.data[0, 0] = float("nan")
    with pytest.raises(SystemExit, match="no longer finite"):
        trainer._save_checkpoint(trainer.model, trial=None)
    assert train.last_checkpoint() == settings / "checkpoint-4"


@pytest.mark.parametrize("when", ["before training", "before a save"])
def test_a_full_disk_is_said_before_half_a_checkpoint_is_written(
    train, build, settings, monkeypatch, when
):
    """The space needed is said. Otherwise half a file is left, and an error about positions."""
    trainer = build()
    trainer.create_optimizer()
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(
        SystemExit, match="Not enough disk space for checkpoints in .* GB are needed"
    ):
        if when == "before training":
            tables = {"train": trainer.train_dataset, "test": trainer.eval_dataset}
            train.announce(tables, trainer)
        else:
            trainer._save_checkpoint(trainer.model, trial=None)
    assert train.find_checkpoints() == []


@pytest.mark.parametrize("what", ["JSON", "captions"])
def test_a_disk_that_runs_full_later_is_one_sentence(train, settings, monkeypatch, what):
    """What is written beside the checkpoints says so too. Otherwise a run ends in a traceback."""

    def fail(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.os, "fsync", fail)
    with pytest.raises(SystemExit, match="can't be written .No space left on device"):
        if what == "JSON":
            train.save_json(settings / "base.json", {})
        else:
            train.write_captions([])
    assert list(settings.iterdir()) == []


def test_a_resume_needs_no_room_for_checkpoints_that_are_there(train, build, settings, monkeypatch):
    """What was saved already is not counted again. Otherwise a resume is refused on a full disk."""
    trainer = build()
    for step in range(train.KEEP_CHECKPOINTS):
        (settings / f"checkpoint-{step + 1}").mkdir()
    one = 3 * train.trained_bytes(trainer.model) + 2**24
    tables = {"train": trainer.train_dataset, "test": trainer.eval_dataset}
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: SimpleNamespace(free=one))
    train.announce(tables, trainer)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: SimpleNamespace(free=one - 1))
    with pytest.raises(SystemExit, match="Not enough disk space for checkpoints"):
        train.announce(tables, trainer)


def test_old_checkpoints_go_when_the_new_one_is_on_the_disk(train, build, settings, monkeypatch):
    """KEEP_CHECKPOINTS stay, a copy that the user made stays, and nothing goes before the flush."""
    copy = settings / "checkpoint-2-best"
    flush, there = train.flush_to_disk, []

    def note(folder):
        flush(folder)
        if folder in train.find_checkpoints():
            there.append((folder.name, [path.name for path in train.find_checkpoints()]))
        if folder.name == "checkpoint-2":
            shutil.copytree(folder, copy)

    monkeypatch.setattr(train, "flush_to_disk", note)
    build().train()
    names = [f"checkpoint-{step}" for step in range(1, 5)]
    assert there == [
        (names[0], names[:1]),
        (names[1], names[:2]),
        (names[2], names[:3]),
        (names[3], names[1:]),
    ]
    assert [path.name for path in train.find_checkpoints()] == names[2:]
    assert copy.is_dir()


# ---- Checkpoints


@pytest.fixture(scope="module")
def trained(train, base, project, tmp_path_factory) -> Path:
    """OUTPUT_FOLDER after a run of four steps, with two checkpoints."""
    output = tmp_path_factory.mktemp("trained") / "output"
    output.mkdir()
    values = {"DATA_JSON": str(project / "data.json"), "OUTPUT_FOLDER": str(output)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SMALL, **values}.items():
            patch.setattr(train, name, value)
        for name in ("show_results", "write_report"):
            patch.setattr(train, name, lambda results, state, run: None)
        features = train.KeptFeatures(base)
        tables = train.prepare_data(base, features, resuming=False)
        model = train.load_model(base)
        collator = train.Collator(base, features, model)
        run = {**train.describe_run(), "question": "?", "prompt": "?", "size": "?"}
        train.build_trainer(model, collator, tables, run, None).train()
        (output / "run.json").write_text(json.dumps(run), encoding="utf-8")
    return output


@pytest.fixture
def checkpoints(trained, settings) -> Path:
    """A copy of that folder as OUTPUT_FOLDER."""
    shutil.copytree(trained, settings, dirs_exist_ok=True)
    return settings


def test_a_merged_model_is_proven_without_a_cache(train, base, checkpoints, tmp_path, monkeypatch):
    """The tower sees the held-out images again. Otherwise SAVE_MERGED ends in a traceback."""
    shutil.copy(checkpoints / "kept/results.json", checkpoints)
    monkeypatch.setattr(train, "CACHE_FOLDER", str(tmp_path / "another cache"))
    # the model without its adapter says the same only by chance
    assert 0 <= train.prove_merged(Path(train.MODEL_FOLDER), base) <= 1
    assert list((tmp_path / "another cache").rglob("*"))


NEEDED = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"]
FILES = [*NEEDED, "adapter_config.json", "rng_state.pth", "training_args.bin"]


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "last byte"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_left_out_by_name(train, checkpoints, capsys, name, damage):
    """The one before is taken, and the file at fault is named. Otherwise no start resumes."""
    files = {path.name for path in (checkpoints / "checkpoint-4").iterdir()}
    assert files == {*FILES, "README.md"}, "each file of a checkpoint is tried"
    path = checkpoints / "checkpoint-4" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(
            {"empty": b"", "cut": content[: len(content) // 2]}.get(damage, content[:-1])
        )
    harmless = (name not in NEEDED and damage == "gone") or (
        name.endswith(".json") and damage == "last byte" and content.endswith(b"\n")
    )
    found = train.last_checkpoint()
    printed = capsys.readouterr().out
    if harmless:
        assert found == checkpoints / "checkpoint-4" and printed == ""
    else:
        assert found == checkpoints / "checkpoint-3"
        reason = "missing" if damage == "gone" else "damaged"
        assert printed == f"{checkpoints / 'checkpoint-4'} is left out: {name} is {reason}.\n"


SHARDS = [
    "optimizer_0/.metadata",
    "optimizer_0/__0_0.distcp",
    "pytorch_model_fsdp_0/.metadata",
    "pytorch_model_fsdp_0/__0_0.distcp",
]


@pytest.mark.parametrize("damage", ["gone", "empty"])
@pytest.mark.parametrize("name", SHARDS)
def test_a_damaged_checkpoint_of_fsdp_is_left_out(train, checkpoints, capsys, name, damage):
    """Its parts lie in folders. Otherwise each start would end in a traceback."""
    folder = checkpoints / "checkpoint-4"
    for shard in SHARDS:
        (folder / shard).parent.mkdir(exist_ok=True)
        (folder / shard).write_bytes(b"numbers")
    assert train.last_checkpoint() == folder
    if damage == "empty":
        (folder / name).write_bytes(b"")
    else:
        (folder / name).unlink()
    assert train.last_checkpoint() == checkpoints / "checkpoint-3"
    assert f"{folder} is left out: " in capsys.readouterr().out


def test_a_byte_that_changed_is_found(train, checkpoints, capsys):
    """PyTorch's archives hold checksums, and they are compared."""
    path = checkpoints / "checkpoint-4/optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert train.last_checkpoint() == checkpoints / "checkpoint-3"
    assert "optimizer.pt is damaged" in capsys.readouterr().out


def test_without_a_whole_checkpoint_it_begins_anew(train, checkpoints, capsys):
    """All that are left out are named."""
    for step in (3, 4):
        (checkpoints / f"checkpoint-{step}/optimizer.pt").unlink()
    assert train.last_checkpoint() is None
    printed = capsys.readouterr().out
    assert printed.count("optimizer.pt is missing") == 2


@pytest.mark.parametrize(
    "name", ["checkpoint-9-best", "checkpoint-9 copy", "my-checkpoint-9", "kept"]
)
def test_copies_of_checkpoints_are_left_alone(train, checkpoints, name):
    """Only folders named checkpoint-NUMBER are resumed and deleted: a copy is the user's own."""
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / name, dirs_exist_ok=True)
    assert [path.name for path in train.find_checkpoints()] == ["checkpoint-3", "checkpoint-4"]
    assert train.last_checkpoint() == checkpoints / "checkpoint-4"


def test_checkpoints_are_ordered_by_number(train, checkpoints):
    """Step 10 comes after step 9."""
    for step in (10, 9):
        shutil.copytree(checkpoints / "checkpoint-4", checkpoints / f"checkpoint-{step}")
    names = [path.name for path in train.find_checkpoints()]
    assert names == ["checkpoint-3", "checkpoint-4", "checkpoint-9", "checkpoint-10"]
    assert train.last_checkpoint().name == "checkpoint-10"


@pytest.mark.parametrize(("step", "judged"), [(3, False), (4, True)])
def test_a_resume_judges_what_is_still_to_be_judged(train, base, checkpoints, step, judged):
    """After a kill behind an epoch its evaluation comes first; within one there is none."""
    arguments = train.training_arguments(base, 8, checkpoints / f"checkpoint-{step}")
    assert arguments.eval_on_start == judged
    assert train.training_arguments(base, 8, None).eval_on_start


@pytest.mark.parametrize(
    "gone", [None, "adapter_config.json", "rng_state.pth", "training_args.bin"]
)
def test_a_resumed_run_ends_where_an_undisturbed_one_ends(train, build, trained, checkpoints, gone):
    """From the last whole checkpoint, with dropout, to the same weights bit by bit.

    What may be missing from a whole checkpoint is not needed for that.
    """
    shutil.rmtree(checkpoints / "checkpoint-4")
    if gone:
        (checkpoints / "checkpoint-3" / gone).unlink()
    checkpoint = train.last_checkpoint()
    trainer = build(checkpoint)
    watch = Watch(trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert len(watch.images) == 1, "the last step of four"
    path = "checkpoint-4/adapter_model.safetensors"
    ours, theirs = load_file(checkpoints / path), load_file(trained / path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- Another run in the same folder

DAMAGED_RUNS = {
    "no run.json": None,
    "empty": "",
    "cut": '{"constants": {"EPOCHS": 2',
    "another version's": "{}",
    "no object": "[]",
    "constants that are no object": '{"data": "", "constants": []}',
}


@pytest.mark.parametrize("what", DAMAGED_RUNS)
def test_checkpoints_of_somebody_else_are_one_sentence(train, checkpoints, what):
    """The tutorial's own output, or a damaged run.json: nothing of it is written over."""
    path = checkpoints / "run.json"
    path.unlink()
    if DAMAGED_RUNS[what] is not None:
        path.write_text(DAMAGED_RUNS[what], encoding="utf-8")
    with pytest.raises(SystemExit, match="holds checkpoints of another program, or its run.json"):
        train.refuse_another_run(train.describe_run())


def test_the_same_run_is_resumed(train, checkpoints):
    """Nothing has changed, and nothing is said."""
    train.refuse_another_run(train.describe_run())


@pytest.mark.parametrize(
    ("name", "value"),
    [("LEARNING_RATE", 0.02), ("SEED", 7), ("LORA_TARGETS", ["q_proj"]), ("IMAGE_SIZE", 140)],
)
def test_a_changed_constant_is_named(train, checkpoints, monkeypatch, name, value):
    """Its old and its new value are said. Otherwise the Trainer keeps the old one."""
    before = getattr(train, name)
    monkeypatch.setattr(train, name, value)
    sentence = re.escape(f"{name} was {before!r} and is {value!r} now")
    with pytest.raises(SystemExit, match=f"holds another run .*{sentence}.*Set OUTPUT_FOLDER"):
        train.refuse_another_run(train.describe_run())


def test_changed_data_are_named(train, checkpoints, tmp_path, monkeypatch):
    """A JSON of other content is another run; the same content elsewhere is not."""
    moved = tmp_path / "moved.json"
    shutil.copy(train.DATA_JSON, moved)
    monkeypatch.setattr(train, "DATA_JSON", str(moved))
    train.refuse_another_run(train.describe_run())
    moved.write_text("[]", encoding="utf-8")
    with pytest.raises(SystemExit, match="holds another run .*the data was "):
        train.refuse_another_run(train.describe_run())
    moved.unlink()
    with pytest.raises(SystemExit, match="moved.json can't be read .*Run csv2json.py, or set"):
        train.describe_run()


@pytest.mark.parametrize("name", ["BATCH_SIZE", "DEVICE", "LOG_STEPS", "SWANLAB_MODE", "CAPTION"])
def test_what_weights_do_not_depend_on_may_change(train, checkpoints, monkeypatch, name):
    """A resume on another GPU may have other passes, logs and uses."""
    values = {"BATCH_SIZE": 8, "DEVICE": "cpu", "LOG_STEPS": 50, "SWANLAB_MODE": "offline"}
    monkeypatch.setattr(train, name, values.get(name, "images"))
    train.refuse_another_run(train.describe_run())


def test_a_folder_in_which_nothing_was_trained_is_free(train, settings, monkeypatch):
    """A start that ended before its first checkpoint binds nobody."""
    (settings / "run.json").write_text("{}", encoding="utf-8")
    train.refuse_another_run(train.describe_run())
    (settings / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit, match="holds checkpoints of another program"):
        train.refuse_another_run(train.describe_run())
