"""Whole runs of train.py behind the three other scripts: what one leaves, and how it is resumed."""

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TESTS, command, posix, variables
from PIL import Image
from safetensors.torch import load_file
from support.runs import (
    OUTPUT,
    SMALL,
    STEPS,
    another,
    copy_project,
    read_results,
    read_state,
    read_text,
    same_adapter,
)

pytestmark = pytest.mark.slow
FINISHED = re.compile(r"holds this run, finished")


@pytest.fixture
def project(prepared, tmp_path) -> Path:
    """A fresh folder with data, images and model."""
    return another(prepared, tmp_path)


@pytest.fixture
def start(train_runner, served):
    """A function that begins a run of train.py in a process of its own."""
    environment = {"OMP_NUM_THREADS": "1", **served.environment()}

    def start(folder: Path, **options):
        return train_runner.start(folder, environment, **{**SMALL, **options})

    return start


# ---- What a run leaves


def test_the_chain_leaves_what_it_promises(undisturbed):
    """File names, formats and numbers are those that the documentation promises."""
    folder, printed = undisturbed
    records = json.loads(read_text(folder / "data_vl.json"))
    assert [record["id"] for record in records] == [f"identity_{number}" for number in range(1, 61)]
    question = records[0]["conversations"][0]["value"]
    image = r"<\|vision_start\|>coco_2014_caption/\d+\.jpg<\|vision_end\|>"
    assert re.fullmatch("请描述这张图片: " + image, question)
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "README.md",
        "report.html",
        "results.json",
        "run.json",
        "checkpoint-6",
        "checkpoint-8",
    ):
        assert (folder / OUTPUT / name).exists(), name
    assert not (folder / OUTPUT / "checkpoint-4").exists(), "KEEP_CHECKPOINTS = 2"
    assert not list((folder / OUTPUT).rglob("*.tmp"))
    assert list((folder / "swanlog").glob("run-*")), "the SwanLab run"
    run = json.loads(read_text(folder / OUTPUT / "run.json"))
    assert "请描述这张图片: <|vision_start|><|image_pad|><|vision_end|>" in run["prompt"]
    assert run["constants"]["IMAGE_SIZE"] == 112
    assert run["versions"]["transformers"] == transformers.__version__
    assert len(run["data"]) == 64
    assert "Warning" not in printed and "Traceback" not in printed


def test_the_results_are_of_all_held_out_images(undisturbed):
    """results.json has the base model's wordy captions, people's terse ones, and the scores."""
    results = read_results(undisturbed[0])
    assert set(results["scores"]) == {"base", "fine_tuned"}
    assert len({row["images"][0]["digest"] for row in results["captions"]}) == 6
    for row in results["captions"]:
        assert row["base"]["text"].startswith("The image shows a")
        assert len(row["references"]) == 2
        assert row["references"][0].startswith("a ") and "<|" not in row["references"][0]
    assert results["scores"]["fine_tuned"] != results["scores"]["base"]


def test_what_is_printed_tells_what_happens(undisturbed):
    """Numbers before the work starts, a line for each log, one bar, a sample with what is learned.

    Otherwise whoever watches the terminal learns too late what goes wrong.
    """
    _, printed = undisturbed
    assert "The vision tower has to see 30 images" in printed
    assert "24 samples with 48 captions to train on, 6 samples held out" in printed
    assert "At most 16 tokens per image" in printed
    assert f"2 epochs of 4 steps with 6 images each: {STEPS} steps" in printed
    assert re.search(r"the heaviest pass takes [\d.]+ GiB", printed)
    assert re.search(r"\[\[.*<\|im_end\|>\]\]", printed)
    line = r"step \d/8 \| loss [\d.]+ \| lr [\d.e-]+ \| gradient [\d.]+ \| [\d.]+ images/s \| "
    assert len(re.findall(line, printed)) == STEPS
    assert len(re.findall(r"step \d/8 \| held-out loss", printed)) == 3, "at first, each epoch"
    assert "| 8/8 [" in printed and "Captions: " in printed, "bars for steps and captions"
    assert "\x1b[A" not in printed, "a bar below another one moves the cursor up"


def test_the_report_shows_it_all_in_one_file(undisturbed):
    """Images, curves and captions are in the file itself, and nothing is fetched or run.

    Otherwise a report that is sent to somebody shows holes, or tells a server who reads it.
    """
    folder, _ = undisturbed
    report = read_text(folder / OUTPUT / "report.html")
    results = read_results(folder)
    assert report.count("data:image/jpeg;base64,") == 6 + 5 + 5
    assert report.count("<svg") == 1
    assert not re.search(r"""<script|<link|(src|href)=["']?http""", report)
    drawn = re.findall(r"<!-- (.*?) -->", report)  # matplotlib notes here what it drew as outlines
    curves = {"loss", "held-out loss", "CIDEr", "BLEU-4", "ROUGE-L", "learning rate"}
    lengths = {"words per caption", "references", "base", "fine-tuned"}
    assert curves | {"grad norm"} | lengths <= set(drawn)
    settings = {"LEARNING_RATE": "0.01", "BATCH_SIZE": "2", "torch": torch.__version__}
    for name, value in settings.items():
        assert re.search(rf"<th>{name}</th>\s*<td>{re.escape(value)}</td>", report), name
    for scores in results["scores"].values():
        for value in scores.values():
            assert f"{value:.3f}" in report
    cells = [re.sub("</?b>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", report)]
    for row in results["captions"]:
        assert row["base"]["text"] in cells and row["fine_tuned"]["text"] in cells
    assert re.search("<b>(large|small)</b>", report), "words that people used are marked"


def plain_captions(folder: Path, rows: list[dict]) -> list[str]:
    """What the base model says of images by the library alone, nothing of train.py in the way."""
    model_folder = folder / "Qwen/Qwen2-VL-2B-Instruct"
    processor = transformers.AutoProcessor.from_pretrained(model_folder)
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        model_folder, dtype=torch.float32
    )
    content = [{"type": "text", "text": "请描述这张图片: "}, {"type": "image"}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    captions = []
    for row in rows:
        [seen] = row["images"]
        image = Image.open(seen["path"]).convert("RGB").resize((seen["width"], seen["height"]))
        inputs = processor(text=[text], images=[image], do_resize=False, return_tensors="pt")
        tokens = model.generate(
            **inputs, max_new_tokens=SMALL["MAX_NEW_TOKENS"], do_sample=False, eos_token_id=None
        )
        answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :])
        captions.append(answer.partition("<|im_end|>")[0])
    return captions


def test_the_base_model_is_captioned_untouched(undisturbed):
    """Captions "before" are those of the library itself: no adapter, the same pixels."""
    folder, _ = undisturbed
    rows = read_results(folder)["captions"]
    assert {(row["images"][0]["width"], row["images"][0]["height"]) for row in rows} == {(112, 112)}
    assert plain_captions(folder, rows) == [row["base"]["text"] for row in rows]


def test_images_keep_their_size(project, run_train):
    """With IMAGE_SIZE = None images of many shapes are trained on as they are."""
    for number, path in enumerate(sorted((project / "coco_2014_caption").glob("[0-9]*.jpg"))):
        with Image.open(path) as image:
            image.resize((224, 112 + 28 * (number % 5))).save(path)
    done = run_train(project, IMAGE_SIZE=None, MAX_PIXELS=50 * 28 * 28, EPOCHS=1)
    assert done.returncode == 0, done.stdout + done.stderr
    # 224 x 196 pixels are 8 x 7 image tokens, more than 50
    assert re.search("At most (48|49|50) tokens per image", done.stdout)
    rows = read_results(project)["captions"]
    assert len({(row["images"][0]["width"], row["images"][0]["height"]) for row in rows}) > 2
    whole = [row for row in rows if row["images"][0]["width"] == 224]
    for row in whole:
        with Image.open(row["images"][0]["path"]) as image:
            assert image.height == row["images"][0]["height"], "neither shrunk nor padded"
    assert plain_captions(project, rows) == [row["base"]["text"] for row in rows]


# ---- Started again


def test_started_again_it_says_so_and_does_not_train(undisturbed, run_train, tmp_path):
    """A finished run is not trained again, nor on top of itself: an hour of work would be lost."""
    folder = copy_project(undisturbed[0], tmp_path / "work")
    names = ("adapter_model.safetensors", "run.json", "results.json")
    before = {name: (folder / OUTPUT / name).stat().st_mtime_ns for name in names}
    # a constant that shapes no weights
    done = run_train(folder, MAX_NEW_TOKENS=5)
    assert done.returncode == 0 and FINISHED.search(done.stdout)
    assert {name: (folder / OUTPUT / name).stat().st_mtime_ns for name in names} == before


@pytest.mark.parametrize("gone", ["nothing", "checkpoint-*", "results.json"])
def test_other_constants_are_not_mixed_in(undisturbed, run_train, tmp_path, gone):
    """A changed learning rate is refused, in a finished folder and in one to be resumed.

    Otherwise the Trainer would take the old one from the checkpoint, without a word.
    """
    folder = copy_project(undisturbed[0], tmp_path / "work", gone)
    done = run_train(folder, LEARNING_RATE=0.02)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "LEARNING_RATE was 0.01 and is 0.02 now" in done.stderr
    assert "Set OUTPUT_FOLDER" in done.stderr


def test_another_experiment_sees_no_image_again(undisturbed, start, train_runner, tmp_path):
    """A second run with another learning rate starts without the vision tower."""
    folder = copy_project(undisturbed[0], tmp_path / "work")
    run = start(
        folder,
        at=("load_tower", 1, "SIGKILL"),
        OUTPUT_FOLDER="output/another",
        LEARNING_RATE=0.02,
        EPOCHS=1,
    )
    done = train_runner.end(run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vision tower" not in done.stdout and "Seeing images" not in done.stderr
    base = [row["base"]["text"] for row in read_results(undisturbed[0])["captions"]]
    again = [row["base"]["text"] for row in read_results(folder, "output/another")["captions"]]
    assert again == base


# ---- Killed, and run again

MOMENTS = {  # the functions at whose start it is killed, one after the other, and which call of it
    "seeing": [
        ("see_images", 1),
        ("see_batch", 3),
        ("os.replace", 5),  # features that lack their name
        ("see_batch", 2),
        ("save_tables", 1),
        ("shutil.rmtree", 1),  # tables that lack their name
        ("load_model", 1),
    ],
    "the first epoch": [
        ("generate_batch", 2),
        ("CaptionTrainer.training_step", 1),
        ("CaptionTrainer._save_optimizer_and_scheduler", 1),  # half of the first checkpoint
        ("flush_to_disk", 1),
        ("CaptionTrainer.training_step", 2),
        ("CaptionTrainer._save_optimizer_and_scheduler", 1),  # half of a later one
        ("CaptionTrainer.evaluate", 1),
        ("generate_batch", 2),
        ("CaptionTrainer.keep_adapter", 1),
        ("write_report", 1),
    ],
    "the last epoch": [
        ("CaptionTrainer.training_step", 5),
        ("CaptionTrainer.training_step", 4),
        ("CaptionTrainer.held_out_loss", 1),
        ("generate_batch", 2),
        ("share_with_others", 1),  # an adapter that stands beside no results
        ("write_report", 1),
        ("save_result", 1),
    ],
}


@posix
@pytest.mark.parametrize("when", MOMENTS)
def test_killed_and_run_again_it_ends_where_an_undisturbed_run_ends(
    undisturbed, project, start, train_runner, run_train, when
):
    """The adapter is equal to the last bit, dropout on, and so are the results."""
    for moment in MOMENTS[when]:
        done = train_runner.end(start(project, at=(*moment, "SIGKILL")))
        assert done.returncode == -signal.SIGKILL, f"{moment} never came: {done.stderr}"
        assert not (project / OUTPUT / "results.json").exists()
    done = run_train(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_end(project, undisturbed[0])


def assert_same_end(folder: Path, other: Path) -> None:
    """What a run leaves, whatever happened on its way: weights, scores, captions, whole files."""
    assert same_adapter(folder, other)
    assert without_folders(read_results(folder)) == without_folders(read_results(other))
    assert losses(folder) == losses(other)
    assert not list((folder / OUTPUT).rglob("*.tmp"))


def without_folders(results: dict) -> dict:
    """The results of a run, images named by their file alone."""
    for row in results["captions"]:
        for image in row["images"]:
            image["path"] = Path(image["path"]).name
    return results


def losses(folder: Path, kind: str = "loss") -> list[tuple[int, float]]:
    """The losses that were logged, each with its step."""
    history = read_state(folder)["log_history"]
    return [(entry["step"], entry[kind]) for entry in history if kind in entry]


@posix
def test_killed_while_files_get_their_names_it_is_resumed(
    undisturbed, start, train_runner, tmp_path
):
    """A trained run is judged and saved, and not trained again, whenever it is killed in that.

    Otherwise a run could count as finished with half of its files.
    """
    folder = copy_project(undisturbed[0], tmp_path / "work", "results.json", "kept", "swanlog")
    # each third of the files that are finished
    for number in range(1, 100, 3):
        done = train_runner.end(start(folder, at=("os.replace", number, "SIGKILL")))
        assert "| loss" not in done.stdout and "Inspecting" not in done.stderr
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        assert not FINISHED.search(done.stdout)
    assert number > 10
    assert_same_end(folder, undisturbed[0])


@posix
def test_killed_at_random_moments_it_ends_where_an_undisturbed_run_ends(
    undisturbed, project, start, train_runner, run_train
):
    """A night on a rented machine that is taken away again and again: 5 kills, or TRAIN_KILLS."""
    moments, killed = random.Random(7), 0
    while killed < int(os.environ.get("TRAIN_KILLS", 5)):
        run = start(project)
        time.sleep(moments.uniform(0.1, 3))
        os.kill(run.pid, signal.SIGKILL)
        done = train_runner.end(run)
        if done.returncode == -signal.SIGKILL:
            killed += 1
            continue
        assert done.returncode == 0, done.stdout + done.stderr
        assert_same_end(project, undisturbed[0])
        shutil.rmtree(project / OUTPUT)
    done = run_train(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_end(project, undisturbed[0])


def test_half_a_checkpoint_is_left_out_by_name(undisturbed, run_train, tmp_path):
    """A newer checkpoint without its last file does not keep a run from its older one."""
    folder = copy_project(undisturbed[0], tmp_path / "work", "results.json", "kept", "swanlog")
    (folder / OUTPUT / "checkpoint-8/trainer_state.json").unlink()
    done = run_train(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checkpoint-8 is left out: trainer_state.json is missing" in done.stdout
    assert "step 6/8 | loss" not in done.stdout and "step 7/8 | loss" in done.stdout
    assert_same_end(folder, undisturbed[0])


# ---- Told to stop


@posix
def test_stopped_by_signals_it_loses_no_step(undisturbed, project, start, train_runner, run_train):
    """The step is saved, a sentence told, and the run resumed behind it, again and again."""
    for sent in ("SIGTERM", "SIGINT", "SIGHUP"):
        done = train_runner.end(start(project, at=("see_batch", 2, sent)))
        assert done.returncode == 128 + getattr(signal, sent)
        assert "Stopped. Finished files are kept. Run again to continue." in done.stderr
    step = 0
    # the second time at the end of an epoch: it is judged by the next start
    for calls, sent in ((1, "SIGINT"), (3, "SIGTERM"), (1, "SIGHUP")):
        step += calls
        done = train_runner.end(start(project, at=("CaptionTrainer.training_step", calls, sent)))
        assert done.returncode == 128 + getattr(signal, sent), done.stdout + done.stderr
        assert "Stopping after this step, which will be saved" in done.stderr
        assert f"Stopped at step {step}, which is saved. Run again to resume." in done.stdout
        assert "Traceback" not in done.stderr
        assert "held-out loss" not in done.stdout.partition(f"step {step}/8 | loss")[2]
        assert ("step 4/8 | held-out loss" in done.stdout) == (step == 5)
        assert (project / OUTPUT / f"checkpoint-{step}/trainer_state.json").is_file()
    done = run_train(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 5/8 | loss" not in done.stdout and "step 6/8 | loss" in done.stdout
    assert_same_end(project, undisturbed[0])


@posix
@pytest.mark.parametrize("gone", ["the terminal", "tee"])
def test_without_a_console_the_step_is_saved(project, served, gone):
    """A closed terminal takes no text, nor does a tee that ended with Ctrl-C.

    Otherwise the next line that is logged ends the training before the step is saved.
    """
    constants = {**SMALL, "SAVE_STEPS": 100, "IMAGES_PER_STEP": 1, "BATCH_SIZE": 1}
    line = command("train.py", **constants)
    environment = variables({"OMP_NUM_THREADS": "1", **served.environment()})
    child, console = os.forkpty()
    if child == 0:
        os.chdir(project)
        if gone == "tee":
            line = ["/bin/sh", "-c", '"$@" 2>&1 | cat', "-", *line]
        os.execve(line[0], line, environment)
    printed = b""
    while b"| loss" not in printed:
        printed += os.read(console, 1000)
    if gone == "tee":
        os.write(console, b"\x03")  # Ctrl-C, for all that run in the terminal
        with contextlib.suppress(OSError):  # the end
            while piece := os.read(console, 1000):
                printed += piece
    os.close(console)
    _, ended = os.waitpid(child, 0)
    if gone == "the terminal":
        assert os.waitstatus_to_exitcode(ended) == 128 + signal.SIGHUP, printed.decode()
    [checkpoint] = (project / OUTPUT).glob("checkpoint-*")
    assert (checkpoint / "trainer_state.json").is_file()


@posix
def test_under_nohup_a_closed_terminal_stops_nothing(undisturbed, start, train_runner, tmp_path):
    """nohup ignores SIGHUP, and train.py leaves that so."""
    folder = copy_project(undisturbed[0], tmp_path / "work", "results.json", "kept", "*-8")
    moment = ("CaptionTrainer.training_step", 1, "SIGHUP")
    done = train_runner.end(start(folder, at=moment, ignore=("SIGHUP",)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 8/8 | loss" in done.stdout and "Stopping" not in done.stderr
    assert_same_end(folder, undisturbed[0])


# ---- What goes wrong


def test_an_error_ends_it(project, served):
    """An error in training ends the process, though SwanLab's threads live: no GPU stays taken."""
    log = project / "log"
    with open(log, "w", encoding="utf-8") as out:
        run = subprocess.Popen(
            command("train.py", **{**SMALL, "EPOCHS": 500}),
            cwd=project,
            env=variables({"OMP_NUM_THREADS": "1", **served.environment()}),
            stdout=out,
            stderr=out,
        )
    try:
        while "| loss" not in read_text(log):
            assert run.poll() is None, read_text(log)
            time.sleep(0.05)
        shutil.rmtree(project / ".cache", ignore_errors=True)
        assert run.wait(100) == 1
    finally:
        run.kill()
    assert "No such file" in read_text(log)


def test_weights_that_broke_are_told_in_a_sentence(project, run_train):
    """A cut file of the model names load_model.py, which repairs it."""
    weights = project / "Qwen/Qwen2-VL-2B-Instruct/model-00001-of-00002.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    done = run_train(project)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Run load_model.py again" in done.stderr


def test_a_training_that_explodes_stops_in_a_sentence(project, run_train):
    """A learning rate far too high ends as advice about it, and not as a traceback."""
    done = run_train(project, LEARNING_RATE=9e5)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search("The loss is|no finite gradient|no longer finite", done.stderr)
    assert "LEARNING_RATE" in done.stderr and "OUTPUT_FOLDER" in done.stderr


@posix
@pytest.mark.parametrize("fault", ["full disk", "a folder of its name"])
def test_a_report_that_cannot_be_written_stops_nothing(
    undisturbed, start, train_runner, tmp_path, fault
):
    """The report is for looking at: the training continues, and says what was wrong."""
    left_out = ("results.json", "kept", "report.html", "*-8")
    folder = copy_project(undisturbed[0], tmp_path / "work", *left_out)
    moment = ("write_report", 1, "full disk")
    if fault != "full disk":
        (folder / OUTPUT / "report.html").mkdir()
        moment = None
    done = train_runner.end(start(folder, at=moment))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report.html can't be written" in done.stdout
    assert not (folder / OUTPUT / "report.html").is_file()
    assert_same_end(folder, undisturbed[0])


FULL = {  # the function that meets a full disk, and which call of it
    "the table": ("save_tables", 1),
    "a checkpoint": ("CaptionTrainer._save_checkpoint", 2),
    "the optimizer's state": ("CaptionTrainer._save_optimizer_and_scheduler", 1),
    "the best adapter": ("CaptionTrainer.keep_adapter", 1),
    "the result": ("save_result", 1),
}


@posix
def test_a_disk_that_fills_up_is_one_sentence(undisturbed, project, start, train_runner, run_train):
    """Wherever it happens, the run is resumed from the checkpoint before when there is room."""
    for place, moment in FULL.items():
        done = train_runner.end(start(project, at=(*moment, "full disk")))
        assert done.returncode == 1 and "Traceback" not in done.stderr, place
        assert "can't be written (" in done.stderr, place
        assert "run again to resume" in done.stderr, place
    done = run_train(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| loss" not in done.stdout, "each of them went on where the one before had saved"
    assert_same_end(project, undisturbed[0])


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is optional")
def test_the_base_model_in_4_bits_learns_as_well(undisturbed, project, served):
    """LOAD_IN_4BIT trains an adapter of the same shape on nearly the same model.

    bitsandbytes is real here, on a CPU.
    """
    python, *script = command("train.py", **{**SMALL, "LOAD_IN_4BIT": True})
    done = subprocess.run(
        [python, str(TESTS / "support/on_a_plain_cpu.py"), *script],
        cwd=project,
        env=variables({"OMP_NUM_THREADS": "1", **served.environment()}),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    layers = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert f"in 4 bits: {layers}\n" in done.stderr
    whole, four = (losses(place, "eval_loss") for place in (undisturbed[0], project))
    assert 0 < abs(four[0][1] - whole[0][1]) < 0.1, "nearly the same model"
    assert four[-1][1] < four[0][1] - 1, "it learns"
    ours, theirs = (
        load_file(place / OUTPUT / "adapter_model.safetensors")
        for place in (project, undisturbed[0])
    )
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.items()}


def test_the_rehearsal_keeps_its_promise(tmp_path):
    """tests/demo.py teaches terse captions, exactly right on 90 % of scenes that it never saw."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "demo.py")],
        cwd=tmp_path,
        env=variables({"TMPDIR": str(tmp_path)}),
        capture_output=True,
        encoding="utf-8",
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = re.search(r"exact match +([\d.]+) \| ([\d.]+)", done.stdout).groups()
    assert float(before) == 0 and float(after) >= 0.9
    before, after = re.search(r"CIDEr +([\d.]+) \| ([\d.]+)", done.stdout).groups()
    assert float(after) > 5 * float(before)
