"""The four scripts one after the other, as a user runs them, and train.py stopped, resumed, finished and refused."""

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest
import torch
import transformers
from conftest import TESTS, command, run_and_stop, run_script, variables
from PIL import Image
from safetensors.torch import load_file
from support.hub import MODEL_ID, Hub
from support.scenes import all_scenes, write_folder
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

SCRIPTS = ("data2csv.py", "csv2json.py", "load_model.py")
SMALL = {  # constants of train.py for a run of seconds: 24 pictures to train on, 8 steps
    "IMAGE_SIZE": 112,
    "TEST_IMAGES": 6,
    "BATCH_SIZE": 2,
    "GRADIENT_ACCUMULATION": 3,
    "LEARNING_RATE": 0.01,
    "SAVE_STEPS": 2,
    "LOG_STEPS": 1,
    "SWANLAB_MODE": "local",
    "MAX_NEW_TOKENS": 24,
}
OUTPUT = Path("output/Qwen2-VL-2B")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A hub with 30 scenes of 2 captions each and the small model."""
    pictures = tmp_path_factory.mktemp("pictures")
    write_folder(pictures, random.Random(3).sample(all_scenes(), 30), captions_per_image=2)
    with Hub(pictures, {MODEL_ID: TESTS / "support/tiny_qwen2vl"}) as hub:
        yield hub
        assert hub.refusals() == [], "a script tried to leave this machine"


@pytest.fixture(scope="module")
def prepared(served, tmp_path_factory):
    """A folder after the first three scripts, run unmodified and with no constant set."""
    folder = tmp_path_factory.mktemp("work")
    for script in SCRIPTS:
        done = run_script(script, folder, served.environment())
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def train(folder: Path, hub: Hub, **constants) -> subprocess.CompletedProcess:
    return run_script(
        "train.py", folder, {"OMP_NUM_THREADS": "1", **hub.environment()}, **{**SMALL, **constants}
    )


def another(prepared: Path, tmp_path: Path) -> Path:
    """A fresh folder with what train.py reads."""
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("output", "swanlog"))
    return folder


@pytest.fixture(scope="module")
def undisturbed(prepared, served):
    """The folder after train.py, and what that printed; seconds.txt in it tells how long it took."""
    start = time.monotonic()
    done = train(prepared, served)
    assert done.returncode == 0, done.stdout + done.stderr
    (prepared / "seconds.txt").write_text(str(time.monotonic() - start))
    return prepared, done.stdout + done.stderr


def test_the_chain_leaves_what_it_promises(undisturbed):
    """Guards the whole mission: file names, formats and numbers that the documentation promises."""
    folder, printed = undisturbed
    records = json.loads((folder / "data_vl.json").read_text(encoding="utf-8"))
    assert [record["id"] for record in records] == [f"identity_{number}" for number in range(1, 61)]
    question = records[0]["conversations"][0]["value"]
    assert re.fullmatch(
        r"请描述这张图片: <\|vision_start\|>coco_2014_caption/\d+\.jpg<\|vision_end\|>", question
    )
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "report.html",
        "checkpoint-8",
    ):
        assert (folder / OUTPUT / name).exists(), name
    assert (
        "24 pictures to train on, 6 held out" in printed
        and "48 captions, 16 tokens a picture" in printed
    )
    assert "8 steps of 6 pictures" in printed and re.search(r"heaviest pass: [\d.]+ GiB", printed)
    line = r"'loss': '[\d.]+'.*'learning_rate': '[\d.]+'.*'pictures/s': '[\d.]+'.*'minutes left': '[\d.e-]+'"
    assert len(re.findall(line, printed)) == 8, "a line a log step"
    assert "| 8/8 [" in printed and "Captions now: " in printed, (
        "a bar for the training, and one for the captions"
    )
    assert printed.count("\x1b[A") == 0, "a bar below another bar moves the cursor up"
    assert (
        printed.count("'eval_loss'") == 3
        and "A sample, [[learned]]:" in printed
        and "<|im_end|>]]" in printed
    )
    assert "Warning" not in printed and "DROPPED" not in printed
    results = json.loads((folder / OUTPUT / "results.json").read_text(encoding="utf-8"))
    assert set(results["scores"]) == {"before", "after"} and len(results["captions"]) == 6
    assert all(
        row["before"]["caption"].startswith("The image shows a") for row in results["captions"]
    )
    assert all(
        row["human"][0].startswith("a ") and "<|" not in row["human"][0]
        for row in results["captions"]
    )
    run = json.loads((folder / OUTPUT / "run.json").read_text(encoding="utf-8"))
    assert "请描述这张图片: <|vision_start|><|image_pad|><|vision_end|>" in run["prompt"]
    assert run["constants"]["IMAGE_SIZE"] == 112
    assert run["versions"]["transformers"] and len(run["shape"]["the data"]) == 64
    assert list((folder / "swanlog").glob("run-*")), "the SwanLab run"


def last_state(folder: Path) -> dict:
    return json.loads(read_text(folder / OUTPUT / "checkpoint-8/trainer_state.json"))


def test_the_report_shows_it_all_in_one_file(undisturbed):
    """Guards what people look at: pictures, curves and captions in the file itself, and nothing fetched or run."""
    folder, _ = undisturbed
    report = (folder / OUTPUT / "report.html").read_text(encoding="utf-8")
    results = json.loads((folder / OUTPUT / "results.json").read_text(encoding="utf-8"))
    assert report.count("data:image/jpeg;base64,") == 6 + 5 + 5 and report.count("<svg") == 1
    assert not re.search(r"""<script|<link|(src|href)=["']?http""", report)
    drawn = re.findall(
        r"<!-- (.*?) -->", report
    )  # matplotlib notes beside the outlines what it wrote
    for label in (
        "loss",
        "eval_loss",
        "eval_CIDEr",
        "eval_BLEU-4",
        "eval_ROUGE-L",
        "learning_rate",
        "grad_norm",
    ):
        assert label in drawn, label
    assert {"words a caption", "people", "before", "after"} <= set(drawn), (
        "the histogram of caption lengths"
    )
    assert "CIDEr words that tell pictures apart" in report, "what the scores mean"
    for name, value in {
        "LEARNING_RATE": "0.01",
        "BATCH_SIZE": "2",
        "transformers": transformers.__version__,
    }.items():
        assert re.search(rf"<th>{name}</th>\s*<td>{re.escape(value)}</td>", report), "what made it"
    steps = [entry for entry in last_state(folder)["log_history"] if "eval_CIDEr" in entry]
    assert [entry["step"] for entry in steps] == [0, 4], (
        "the last evaluation comes behind the last checkpoint"
    )
    for value in (value for scores in results["scores"].values() for value in scores.values()):
        assert f"{value:.3f}" in report
    for row in results["captions"]:
        marked = [re.sub("</?b>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", report)]
        assert row["before"]["caption"] in marked and row["after"]["caption"] in marked
    assert "<b>large</b>" in report or "<b>small</b>" in report


def test_the_base_model_is_captioned_untouched(undisturbed):
    """Guards "before": captions of the base model must not know anything of the adapter, nor of other pixels."""
    folder, _ = undisturbed
    results = json.loads((folder / OUTPUT / "results.json").read_text(encoding="utf-8"))
    model_folder = folder / "Qwen/Qwen2-VL-2B-Instruct"
    processor = AutoProcessor.from_pretrained(model_folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32)
    row = results["captions"][0]
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "请描述这张图片: "}, {"type": "image"}],
        }
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    picture = Image.open(row["pictures"][0]).convert("RGB").resize((112, 112))
    inputs = processor(text=[text], images=[picture], do_resize=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert processor.decode(output, skip_special_tokens=True) == row["before"]["caption"]


def test_started_again_it_says_so_and_does_not_train(undisturbed, served):
    """Guards an hour of work: a finished run is not trained again, nor on top of itself."""
    folder, _ = undisturbed
    before = {
        name: (folder / OUTPUT / name).stat().st_mtime_ns
        for name in ("adapter_model.safetensors", "run.json")
    }
    done = train(
        folder, served, MAX_NEW_TOKENS=5
    )  # shapes no training, and isn't what made the adapter either
    assert done.returncode == 0 and "holds this run, finished" in done.stdout
    assert before == {name: (folder / OUTPUT / name).stat().st_mtime_ns for name in before}


def test_killed_while_it_captions_it_only_captions(undisturbed, served, tmp_path):
    """Guards the last minutes: a run that was trained, but not judged, is judged, and not trained again."""
    folder = tmp_path / "work"
    shutil.copytree(
        undisturbed[0], folder, ignore=shutil.ignore_patterns("swanlog", "results.json")
    )
    done = train(folder, served)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 steps of 6 pictures; at step 8\n" in done.stdout and "'loss'" not in done.stdout
    texts = [
        (place / OUTPUT / "results.json").read_text(encoding="utf-8")
        for place in (folder, undisturbed[0])
    ]
    assert json.loads(texts[0])["scores"] == json.loads(texts[1])["scores"]
    assert "Checking" not in done.stderr, "the data was checked once"


@pytest.mark.parametrize("gone", ["nothing", "checkpoint-*", "results.json"])
def test_other_constants_are_not_mixed_in(undisturbed, served, tmp_path, gone):
    """Guards a resume that ignores the changed learning rate: the Trainer itself would go on with the old one."""
    folder = tmp_path / "work"
    shutil.copytree(undisturbed[0], folder, ignore=shutil.ignore_patterns("swanlog", gone))
    done = train(folder, served, LEARNING_RATE=0.02)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "LEARNING_RATE was 0.01, is 0.02" in done.stderr and "set OUTPUT_FOLDER" in done.stderr


@pytest.mark.parametrize(
    ("workers", "step"), [(0, 4), (2, 6)], ids=["between epochs", "in an epoch, with workers"]
)
def test_killed_and_run_again_it_ends_where_an_undisturbed_run_ends(
    undisturbed, served, tmp_path, workers, step
):
    """Guards resuming: the same weights to the last bit, dropout on, from the last checkpoint that is complete."""
    folder = another(undisturbed[0], tmp_path)
    environment = variables({"OMP_NUM_THREADS": "1", **served.environment()})
    killed = command("train.py", **{**SMALL, "DATALOADER_WORKERS": workers})
    checkpoint, half = (
        folder / OUTPUT / f"checkpoint-{step}",
        folder / OUTPUT / f"checkpoint-{step + 2}",
    )
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(
            killed, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        while '"trial_params"' not in read_text(checkpoint / "trainer_state.json"):  # its last line
            assert run.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        os.killpg(run.pid, 9)
        run.wait()
    shutil.rmtree(half, ignore_errors=True)  # as a kill in the middle of saving leaves it:
    shutil.copytree(checkpoint, half, ignore=shutil.ignore_patterns("trainer_state.json"))
    done = train(folder, served, DATALOADER_WORKERS=workers)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"checkpoint-{step + 2} is incomplete" in done.stdout
    assert f"8 steps of 6 pictures; at step {step}\n" in done.stdout
    assert same_adapter(folder, undisturbed[0])


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def same_adapter(folder: Path, other: Path) -> bool:
    """Whether two trainings ended at the same weights, to the last bit."""
    ours, theirs = (
        load_file(place / OUTPUT / "adapter_model.safetensors") for place in (folder, other)
    )
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_at_random_moments_it_ends_where_an_undisturbed_run_ends(
    undisturbed, served, tmp_path
):
    """Guards a night on a rented card that is taken away again and again: 6 kills, or TRAIN_KILLS of them."""
    folder, moments = another(undisturbed[0], tmp_path), random.Random(7)
    seconds = float((folder / "seconds.txt").read_text())
    environment = {"OMP_NUM_THREADS": "1", **served.environment()}
    kills = int(os.environ.get("TRAIN_KILLS", 6))
    killed = 0
    for number in range(kills):
        constants = {**SMALL, "DATALOADER_WORKERS": 2 * (number % 2)}
        killed += (
            run_and_stop(
                "train.py", folder, environment, seconds * moments.uniform(0.45, 0.85), **constants
            ).returncode
            == -9
        )
    assert killed >= kills / 2, "half of them at least must have met it alive"
    done = train(folder, served)
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_adapter(folder, undisturbed[0])
    assert not list((folder / OUTPUT).rglob("*.tmp"))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_stopped_by_signals_it_loses_no_step(undisturbed, served, tmp_path):
    """Guards Ctrl-C and a scheduler's SIGTERM to all processes: the step is saved, a sentence told, no traceback."""
    folder = another(undisturbed[0], tmp_path)
    environment = variables({"OMP_NUM_THREADS": "1", **served.environment()})
    moments = [
        ("Checking", SIGINT),
        ("'loss'", SIGINT),
        ("'loss'", SIGTERM),
        ("A sample", SIGTERM),
        ("'loss'", SIGTERM),
    ]
    last = 0
    for number, (sign, sent) in enumerate(moments):
        with open(tmp_path / "log", "w+", encoding="utf-8") as log:
            constants = {**SMALL, "DATALOADER_WORKERS": 2 * (number % 2)}
            options = {
                "cwd": folder,
                "env": environment,
                "stdout": log,
                "stderr": log,
                "start_new_session": True,
            }
            run = subprocess.Popen(command("train.py", **constants), **options)
            while (
                sign not in (printed := (tmp_path / "log").read_text(encoding="utf-8"))
                and run.poll() is None
            ):
                time.sleep(0.01)
            os.killpg(run.pid, sent)
            code = run.wait(timeout=60)
        printed = (tmp_path / "log").read_text(encoding="utf-8")
        assert code == 128 + sent and "Traceback" not in printed, printed
        if sign == "'loss'":
            step = int(re.search(r"Stopped at step (\d+), which is saved", printed)[1])
            assert (
                step > last
                and (folder / OUTPUT / f"checkpoint-{step}" / "trainer_state.json").is_file()
            )
            last = step
        else:
            assert "Stopped. Run it again to go on." in printed
    done = train(folder, served)
    assert done.returncode == 0 and f"8 steps of 6 pictures; at step {last}\n" in done.stdout, (
        done.stdout
    )
    assert same_adapter(folder, undisturbed[0])


def test_an_error_ends_it_though_workers_live(undisturbed, served, tmp_path):
    """Guards the card: workers that let signals pass once kept a failed process, and its memory, for ever."""
    folder = another(undisturbed[0], tmp_path)
    (folder / OUTPUT / "report.html").mkdir(parents=True)  # nothing can be written in its place
    done = train(folder, served, DATALOADER_WORKERS=2)
    assert done.returncode == 1 and "IsADirectoryError" in done.stderr


def test_weights_that_broke_are_told_in_a_sentence(undisturbed, served, tmp_path):
    """Guards against a traceback of safetensors: load_model.py is who mends them."""
    folder = another(undisturbed[0], tmp_path)
    weights = folder / "Qwen/Qwen2-VL-2B-Instruct/model-00001-of-00002.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    done = train(folder, served)
    assert (
        done.returncode == 1
        and "Traceback" not in done.stderr
        and "load_model.py run again mends it" in done.stderr
    )


@pytest.mark.skipif(
    not importlib.util.find_spec("bitsandbytes"),
    reason="bitsandbytes, which is optional, is not here",
)
def test_the_base_model_in_4_bits_learns_as_well(undisturbed, served, tmp_path):
    """Guards LOAD_IN_4BIT: vision left as it is, an adapter that fits the whole model; bitsandbytes is real."""
    folder = another(undisturbed[0], tmp_path)
    environment = variables({"OMP_NUM_THREADS": "1", **served.environment()})
    python, *script = command("train.py", **{**SMALL, "LOAD_IN_4BIT": True})
    line = [python, str(TESTS / "support/on_a_plain_cpu.py"), *script]
    options = {
        "cwd": folder,
        "env": environment,
        "capture_output": True,
        "encoding": "utf-8",
        "timeout": 200,
    }
    done = subprocess.run(line, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in 4 bits: q_proj k_proj v_proj o_proj gate_proj up_proj down_proj\n" in done.stderr
    places = (undisturbed[0], folder)
    whole, four = (
        [e["eval_loss"] for e in last_state(f)["log_history"] if "eval_loss" in e] for f in places
    )
    assert len(four) == 2 and 0 < abs(four[0] - whole[0]) < 0.1, "the same model, nearly"
    assert four[1] < four[0] - 1, "it learns"
    ours, theirs = (load_file(place / OUTPUT / "adapter_model.safetensors") for place in places)
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }


def follow_readme(part: int, folder: Path, hub: Hub) -> tuple[list[str], str]:
    """Run README's code in a folder after train.py: what it says of a held-out picture, and what train.py said."""
    readme = (TESTS.parent / "README.md").read_text(encoding="utf-8").split("\n# English\n")[part]
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL))
    row = json.loads((folder / OUTPUT / "results.json").read_text(encoding="utf-8"))["captions"][0]
    assert code.count('"coco_2014_caption/9.jpg"') == 1 and "merged" in code
    code = code.replace('"coco_2014_caption/9.jpg"', repr(row["pictures"][0]))
    code = code.replace("128", str(SMALL["MAX_NEW_TOKENS"]))
    environment = variables({"OMP_NUM_THREADS": "1", **hub.environment()})
    options = {
        "cwd": folder,
        "env": environment,
        "capture_output": True,
        "encoding": "utf-8",
        "timeout": 200,
    }
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    return [line.strip() for line in done.stdout.splitlines()], row["after"]["caption"]


@pytest.mark.parametrize("part", [0, 1], ids=["Chinese", "English"])
def test_readme_captions_a_picture(undisturbed, served, part):
    """Guards the first thing a user does afterwards: README's code gives what the evaluation gave, merged or not."""
    said, caption = follow_readme(part, undisturbed[0], served)
    assert said == [caption] * 2


def test_pictures_keep_their_size(undisturbed, served, tmp_path):
    """Guards IMAGE_SIZE = None from the JSON to README's code: one size in training and another one afterwards."""
    folder = another(undisturbed[0], tmp_path)
    for number, path in enumerate(sorted((folder / "coco_2014_caption").glob("[0-9]*.jpg"))):
        with Image.open(path) as image:
            image.resize((224, 100 + 28 * (number % 5))).save(path)
    done = train(
        folder, served, IMAGE_SIZE=None, MAX_PIXELS=50 * 28 * 28, DATALOADER_WORKERS=2, EPOCHS=1
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "48 captions, 50 tokens a picture at most" in done.stdout
        or "48 captions, 48 tokens" in done.stdout
    )
    assert "DROPPED" not in done.stderr
    said, caption = follow_readme(1, folder, served)
    assert said == [caption] * 2


def test_readme_names_what_exists():
    """Guards README against rot: scripts, pins and pictures that it names are those of the project."""
    root = TESTS.parent
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"@\w", readme), "a number that nobody has filled in"
    for script in set(re.findall(r"(?:tests/)?\w+\.py", readme)):
        assert (root / script).is_file(), script
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", readme):
        assert (root / picture).is_file(), picture
    pins = dict(
        re.findall(
            r"^([\w-]+)(?:\[\w+\])?==([\d.]+)",
            (root / "requirements.txt").read_text(),
            re.MULTILINE,
        )
    )
    table = readme[readme.index("## 版本") : readme.index("## 参考资料")]
    named = re.findall(
        r"^\| ([\w-]+(?:、[\w-]+)*) \| [^|]* \| (\d[\d.]*(?:、\d[\d.]*)*) \|", table, re.MULTILINE
    )
    assert len(named) >= 7
    for packages, versions in named:
        for package, version in zip(packages.split("、"), versions.split("、"), strict=True):
            assert pins[package] == version, package


def test_the_rehearsal_keeps_its_promise(tmp_path):
    """Guards README's claim: terse captions exactly right on at least 90 % of unseen scenes, before on none."""
    options = {
        "cwd": tmp_path,
        "env": variables({"TMPDIR": str(tmp_path)}),
        "capture_output": True,
        "encoding": "utf-8",
    }
    done = subprocess.run([sys.executable, str(TESTS / "demo.py")], timeout=580, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = re.search(r"exactly right +([\d.]+) \| ([\d.]+)", done.stdout).groups()
    assert float(before) == 0 and float(after) >= 0.9
