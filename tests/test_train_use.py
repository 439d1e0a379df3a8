"""What comes after a training of train.py: captions of one's own images, a merged model, a report.

Whole runs on the small model, each a process of its own. The units are in test_train_*.py.
"""

import csv
import html
import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import posix, run_script
from PIL import Image
from safetensors.torch import load_file
from support.page import Page
from support.runs import OUTPUT, SMALL, another, copy_project, read_results, read_text
from support.training import about, write_records

pytestmark = pytest.mark.slow

IMAGES = "coco_2014_caption"
MODEL_FOLDER = Path("Qwen/Qwen2-VL-2B-Instruct")
ASKED = "What is in the middle?"


def read_captions(folder: Path) -> list[dict[str, str]]:
    """Return the rows of captions.csv, which begins with the mark that Excel looks for."""
    content = (folder / OUTPUT / "captions.csv").read_bytes()
    assert content.startswith("\ufeffimage_path,question,caption\n".encode())
    return list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))


def read_report(folder: Path) -> str:
    return html.unescape(read_text(folder / OUTPUT / "report.html"))


def write_table(path: Path, *rows: tuple[str, ...]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def same_weights(path: Path, other: Path) -> bool:
    """Tell whether two adapters are equal to the last bit."""
    ours, theirs = load_file(path), load_file(other)
    return ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def kill_train(train_runner, served) -> Callable:
    """A function that starts train.py in a folder, and kills it at a call of a function."""

    def kill(folder: Path, function: str, number: int = 1, **constants) -> None:
        environment = {"OMP_NUM_THREADS": "1", **served.environment()}
        at = (function, number, "SIGKILL")
        done = train_runner.end(train_runner.start(folder, environment, at=at, **SMALL | constants))
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr

    return kill


# ---- CAPTION


@pytest.fixture(scope="module")
def finished(undisturbed, tmp_path_factory) -> Path:
    """A folder after a training. Its captions.csv is of the test that ran last."""
    return copy_project(undisturbed[0], tmp_path_factory.mktemp("finished") / "work")


@pytest.fixture(scope="module")
def of_all_images(finished, run_train) -> tuple[list[dict[str, str]], str]:
    """Rows of captions.csv after CAPTION named the folder of all images, and what was printed.

    In the folder are a table too, and an image that can't be opened.
    """
    broken = finished / IMAGES / "0broken.jpg"
    broken.write_bytes(b"\xff\xd8 half a download")
    write_table(finished / IMAGES / "notes.csv", ("image_path",))
    done = run_train(finished, CAPTION=IMAGES)
    broken.unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    return read_captions(finished), done.stdout


def test_all_images_of_a_folder_are_captioned(of_all_images, finished):
    """Their names come in order, what is no image is passed over, and a bad one is named."""
    rows, printed = of_all_images
    names = sorted(f"{IMAGES}/{path.name}" for path in (finished / IMAGES).glob("*.jpg"))
    assert [row["image_path"] for row in rows] == names and len(names) == 31
    assert {row["question"] for row in rows} == {""}
    assert "Left out: " in printed and "0broken.jpg can't be opened" in printed
    assert "notes.csv" not in printed
    assert "holds this run, finished" in printed and "31 captions are in" in printed


def test_captions_are_those_of_the_evaluation(of_all_images, finished):
    """The same image gets the caption that results.json has of it."""
    said = {row["image_path"]: row["caption"] for row in of_all_images[0]}
    rows = read_results(finished)["captions"]
    assert len(rows) == 6
    for row in rows:
        name = Path(row["images"][0]["path"]).name
        assert said[f"{IMAGES}/{name}"] == row["fine_tuned"]["text"]


def test_one_image_is_captioned(of_all_images, finished, run_train):
    """CAPTION may be the path of an image, with ~ or without."""
    wanted = of_all_images[0][7]
    done = run_train(finished, CAPTION=wanted["image_path"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_captions(finished) == [wanted]


def test_rows_of_a_table_are_captioned(of_all_images, finished, run_train, served):
    """Paths count from the table, each row may ask its own question, and the order is kept."""
    one, two = (Path(row["image_path"]).name for row in of_all_images[0][:2])
    mine = finished / "mine"
    mine.mkdir()
    shutil.copy(finished / IMAGES / one, mine / "图片, 1.jpg")
    rows = [
        (f"..\\{IMAGES}\\{two}", ""),
        ("图片, 1.jpg", ASKED),
        ("gone.jpg", ""),
        ("", ""),
        ("图片, 1.jpg", ""),
        (f"../{IMAGES}/{two}", ASKED),
        ("图片, 1.jpg", ASKED),
    ]
    write_table(mine / "table.csv", ("image_path", "question"), *rows)
    done = run_train(finished, CAPTION="mine/table.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    captions = read_captions(finished)
    assert [(row["image_path"], row["question"]) for row in captions] == rows[:2] + rows[4:]
    said = [row["caption"] for row in captions]
    usual = [row["caption"] for row in of_all_images[0][:2]]
    assert (said[0], said[2]) == (usual[1], usual[0])
    assert said[1] == said[4] and said[1] != said[2], "another question, another answer"
    assert "Left out: image is missing: " in done.stdout and "gone.jpg" in done.stdout
    assert "Left out: row 4 names an image whose path is empty" in done.stdout


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ("no_such_folder", "no_such_folder is missing"),
        ("no_such_table.csv", "no_such_table.csv is missing"),
        ("captions.csv", "There must be one image_path"),
        ("gbk.csv", "can't be read"),
        ("empty", "names no image"),
        ("empty.csv", "names no image"),
    ],
)
def test_what_can_not_be_captioned_is_refused_before_the_training(
    prepared, run_train, tmp_path, named, reason
):
    """Otherwise a misspelt name would be found after hours."""
    folder = another(prepared, tmp_path)
    write_table(folder / "captions.csv", ("image", "caption"), ("1.jpg", "a cat"))
    write_table(folder / "empty.csv", ("image_path", "caption"))
    (folder / "gbk.csv").write_text("image_path\n苹果.jpg\n", encoding="gbk")
    (folder / "empty").mkdir()
    done = run_train(folder, CAPTION=named)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"CAPTION = '{named}'") and reason in done.stderr
    assert not (folder / OUTPUT / "table").exists(), "nothing was begun"


@posix
def test_killed_it_captions_the_rest(of_all_images, finished, run_train, kill_train):
    """Captions made before a kill are kept, and those of smaller batches are the same."""
    part = finished / OUTPUT / "captions.part"
    (finished / OUTPUT / "captions.csv").unlink()
    kill_train(finished, "generate_captions", 3, CAPTION=IMAGES, BATCH_SIZE=1)
    kept = len(json.loads(part.read_text(encoding="utf-8"))["captions"])
    assert 0 < kept < 31 and not (finished / OUTPUT / "captions.csv").exists()
    done = run_train(finished, CAPTION=IMAGES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Captions from 1 of {31 - kept}" in done.stderr
    assert read_captions(finished) == of_all_images[0]
    assert not part.exists()


def test_a_table_that_can_not_be_replaced_costs_no_captions(of_all_images, finished, run_train):
    """As when Excel has it open: it is named, and the next run only writes it."""
    path = finished / OUTPUT / "captions.csv"
    path.unlink(missing_ok=True)
    path.mkdir()
    done = run_train(finished, CAPTION=IMAGES)
    path.rmdir()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "captions.csv can't be written (" in done.stderr
    done = run_train(finished, CAPTION=IMAGES)
    assert done.returncode == 0 and "Captions from" not in done.stderr
    assert read_captions(finished) == of_all_images[0]


# ---- SAVE_MERGED


@pytest.fixture(scope="module")
def merged(finished, run_train) -> tuple[Path, str]:
    """The whole model, and what was printed. The features of the training are gone."""
    shutil.rmtree(finished / ".cache/features")
    done = run_train(finished, SAVE_MERGED=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return finished / OUTPUT / "merged", done.stdout


def open_whole(folder: Path):
    """Open a whole model afresh, with its processor. Every key must have its place."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="float32", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model, AutoProcessor.from_pretrained(folder)


def say(model, processor, folder: Path, image: Image.Image) -> str:
    """Return what a whole model says to an image when asked as in training."""
    prompt = json.loads(read_text(folder / OUTPUT / "run.json"))["prompt"]
    inputs = processor(text=[prompt], images=[image], do_resize=False, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=SMALL["MAX_NEW_TOKENS"], do_sample=False)
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.decode(answer, skip_special_tokens=True).strip()


def open_held_out(train, row: dict) -> Image.Image:
    """Open the image of a row of results.json as the model saw it."""
    [image] = row["images"]
    return train.open_image(image["path"], image["height"], image["width"])


def share_of_equal(train, folder: Path, model, processor) -> float:
    """Return the share of results.json's captions that a whole model repeats."""
    rows = read_results(folder)["captions"]
    equal = 0
    for row in rows:
        said = say(model, processor, folder, open_held_out(train, row))
        equal += said == row["fine_tuned"]["text"]
    return equal / len(rows)


def test_the_merged_model_says_what_the_adapter_says(merged, finished, train):
    """The printed share is what a program gets that knows nothing of adapters."""
    folder, printed = merged
    [share] = re.findall(r"is whole: ([\d.]+)% of its captions equal the adapter's", printed)
    ours = share_of_equal(train, finished, *open_whole(folder))
    assert f"{ours:.1%}" == f"{share}%" and ours >= 0.8
    base = share_of_equal(train, finished, *open_whole(finished / MODEL_FOLDER))
    assert base < 0.2, "the base model says something else"


def test_the_merged_model_is_the_original_with_other_weights(merged, finished):
    """All other files are equal to the last byte, weights have the same names and types."""
    folder, _ = merged
    names = {path.name for path in (finished / MODEL_FOLDER).glob("[!.]*")}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        if name.endswith(".safetensors"):
            ours, theirs = load_file(folder / name), load_file(finished / MODEL_FOLDER / name)
            assert {key: (w.dtype, w.shape) for key, w in ours.items()} == {
                key: (w.dtype, w.shape) for key, w in theirs.items()
            }
        else:
            assert (folder / name).read_bytes() == (finished / MODEL_FOLDER / name).read_bytes()


def test_a_merged_model_is_not_written_twice(merged, finished, run_train):
    """It says so, and leaves the folder alone."""
    folder, _ = merged
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = run_train(finished, SAVE_MERGED=True)
    assert done.returncode == 0 and "is there already. Delete it" in done.stdout
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_merged_model_that_can_not_be_proven_is_not_called_merged(finished, run_train, tmp_path):
    """Where a held-out image is gone, it is named, and merged/ is not there."""
    folder = copy_project(finished, tmp_path / "work", "merged", "swanlog", ".cache")
    [image] = read_results(folder)["captions"][0]["images"]
    path = Path(image["path"])
    path.rename(path.with_name("away"))
    try:
        done = run_train(folder, SAVE_MERGED=True)
    finally:
        path.with_name("away").rename(path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "lacks what the model saw" in done.stderr and path.name in done.stderr
    assert not (folder / OUTPUT / "merged").exists()


@posix
@pytest.mark.parametrize("moment", [("save_file", 2), ("prove_merged", 1)])
def test_killed_while_it_merges_it_leaves_nothing_half(
    merged, finished, run_train, kill_train, tmp_path, moment
):
    """merged/ is there when it is whole and proven, and the next run writes it."""
    folder = copy_project(finished, tmp_path / "work", "merged", "swanlog")
    kill_train(folder, *moment, SAVE_MERGED=True)
    assert not (folder / OUTPUT / "merged").exists()
    assert (folder / OUTPUT / "merged.tmp").exists(), "the kill came inside"
    done = run_train(folder, SAVE_MERGED=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / OUTPUT / "merged.tmp").exists()
    for path in (folder / OUTPUT / "merged").iterdir():
        assert path.read_bytes() == (merged[0] / path.name).read_bytes()


# ---- KEEP and TEST_JSON


@pytest.fixture(scope="module")
def own_test_set(undisturbed, prepared, tmp_path_factory) -> Path:
    """A folder with a test.json of its own, whose references are the sentences of the base model.

    A training on short captions leads away from them: the first evaluation is the best.
    """
    folder = another(prepared, tmp_path_factory.mktemp("own"))
    held_out = []
    for row in read_results(undisturbed[0])["captions"]:
        name = f"{IMAGES}/{Path(row['images'][0]['path']).name}"
        held_out.append(about(name, row["base"]["text"]))
    names = [each["conversations"][0]["value"] for each in held_out]
    records = json.loads(read_text(folder / "data_vl.json"))
    others = [each for each in records if each["conversations"][0]["value"] not in names]
    write_records(folder / "test.json", *held_out)
    write_records(folder / "data_vl.json", *others)
    return folder


WORSENS = {"TEST_JSON": "test.json", "EPOCHS": 3, "LEARNING_RATE": 0.004}
FIRST, LAST = 4, 12  # steps after which it is judged: the best one, and the last one


@pytest.fixture(scope="module")
def kept_last(own_test_set, run_train, tmp_path_factory) -> Path:
    """A folder after a training with KEEP = "last" that kept all its checkpoints."""
    folder = copy_project(own_test_set, tmp_path_factory.mktemp("last") / "work")
    done = run_train(folder, **WORSENS, KEEP="last", KEEP_CHECKPOINTS=9)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def kept_best(own_test_set, run_train, kill_train, tmp_path_factory) -> tuple[Path, str]:
    """A folder after the same training with KEEP = "best", and what was printed.

    One checkpoint was kept at a time, and it was killed before it wrote the result.
    """
    folder = copy_project(own_test_set, tmp_path_factory.mktemp("best") / "work")
    constants = {**WORSENS, "KEEP": "best", "KEEP_CHECKPOINTS": 1}
    if os.name == "posix":
        kill_train(folder, "save_result", **constants)
        checkpoints = [path.name for path in (folder / OUTPUT).glob("checkpoint-*")]
        assert checkpoints == [f"checkpoint-{LAST}"]
        assert not (folder / OUTPUT / "results.json").exists()
    done = run_train(folder, **constants)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_the_last_adapter_is_kept_on_request(kept_last):
    """With KEEP = "last" adapter, scores and report are those of the last evaluation."""
    results = read_results(kept_last)
    assert results["step"] == LAST
    adapter = kept_last / OUTPUT / "adapter_model.safetensors"
    last = kept_last / OUTPUT / f"checkpoint-{LAST}" / adapter.name
    assert same_weights(adapter, last)
    assert f"step {LAST} of {LAST}" in read_report(kept_last)


def test_the_best_adapter_is_kept(kept_best, kept_last):
    """A kill, a resume and the deletion of its checkpoint don't lose it."""
    folder, _ = kept_best
    results = read_results(folder)
    assert results["step"] == FIRST
    name = "adapter_model.safetensors"
    first = kept_last / OUTPUT / f"checkpoint-{FIRST}" / name
    last = kept_last / OUTPUT / f"checkpoint-{LAST}" / name
    assert same_weights(folder / OUTPUT / name, first) and not same_weights(first, last)
    scores = [read_results(each)["scores"]["fine_tuned"]["CIDEr"] for each in (folder, kept_last)]
    assert scores[0] > scores[1]


def test_the_best_evaluation_is_named_and_shown(kept_best):
    """Terminal, report, model card and SwanLab are about the adapter that is there."""
    folder, printed = kept_best
    assert f"Step {FIRST} had the highest CIDEr: its adapter is kept." in printed
    report = read_report(folder)
    assert f"step {FIRST} of {LAST}" in report
    cells = Page(read_text(folder / OUTPUT / "report.html")).cells
    for row in read_results(folder)["captions"]:
        assert row["fine_tuned"]["text"] in cells
    assert f"after step\n{FIRST}:" in read_text(folder / OUTPUT / "README.md")
    entry = re.compile(rf"adapter of step:\n.*\n.*\n *value: {FIRST}\n")
    configs = map(read_text, (folder / "swanlog").glob("run-*/files/config.yaml"))
    assert any(map(entry.search, configs))


def test_a_test_set_of_ones_own_is_the_one_that_is_judged(kept_last, undisturbed):
    """All of TEST_JSON is held out, and nothing of DATA_JSON."""
    rows = read_results(kept_last)["captions"]
    expected = read_results(undisturbed[0])["captions"]
    assert len(rows) == len(expected)
    for ours, theirs in zip(rows, expected, strict=True):
        assert Path(ours["images"][0]["path"]).name == Path(theirs["images"][0]["path"]).name
        assert ours["references"] == [theirs["base"]["text"]]


def test_an_image_on_both_sides_is_refused_by_name(own_test_set, run_train, tmp_path):
    """A copy under another name is found as well. Otherwise its score would tell nothing."""
    folder = copy_project(own_test_set, tmp_path / "work")
    records = json.loads(read_text(folder / "data_vl.json"))
    [name] = re.findall(r"\|>(.*)<\|", records[0]["conversations"][0]["value"])
    shutil.copy(folder / name, folder / "copy.jpg")
    write_records(folder / "test.json", about("copy.jpg", "a copy"))
    done = run_train(folder, TEST_JSON="test.json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    sentence = rf"copy\.jpg of test\.json is also trained on, as .*{name} of data_vl\.json\."
    assert re.search(sentence, done.stderr)


# ---- STYLE_PROMPT, OTHER_QUESTIONS, questions of one's own


QUESTIONS = ["What is it?", "Describe the figure, please:"]
OTHERS = ["What colours do you see?", "Is it <b>large</b>?"]


@pytest.fixture(scope="module")
def asked(prepared, served, run_train, tmp_path_factory) -> Path:
    """A folder after a training whose table has a question for each image."""
    folder = another(prepared, tmp_path_factory.mktemp("asked"))
    with open(folder / "coco-2024-dataset.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table = [("image_path", "question", "caption")]
    for row in rows:
        number = int(Path(row["image_path"]).stem)
        table.append((row["image_path"], QUESTIONS[number % 3 == 0], row["caption"]))
    write_table(folder / "questions.csv", *table)
    done = run_script("csv2json.py", folder, served.environment(), CSV_PATH="questions.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    style = "Describe this image in one short sentence."
    done = run_train(folder, EPOCHS=1, STYLE_PROMPT=style, OTHER_QUESTIONS=OTHERS)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_style_is_told_from_skill_on_request(asked, undisturbed):
    """STYLE_PROMPT adds a column of the base model; None leaves it out."""
    column = "base, asked for one short sentence"
    assert list(read_results(asked)["scores"]) == ["base", "base_short", "fine_tuned"]
    assert column in Page(read_text(asked / OUTPUT / "report.html")).cells
    rows = read_results(asked)["captions"]
    assert any(row["base"]["text"] != row["base_short"]["text"] for row in rows)
    assert list(read_results(undisturbed[0])["scores"]) == ["base", "fine_tuned"]
    assert column not in Page(read_text(undisturbed[0] / OUTPUT / "report.html")).cells


def test_other_questions_are_shown(asked, undisturbed):
    """Three images with each question, base beside fine-tuned; [] leaves them out."""
    others = read_results(asked)["others"]
    assert [row["question"] for row in others] == [OTHERS[0]] * 3 + [OTHERS[1]] * 3
    cells = Page(read_text(asked / OUTPUT / "report.html")).cells
    for row in others:
        assert row["question"] in cells and row["base"] in cells and row["fine_tuned"] in cells
    heading = "Questions that were not trained on"
    assert heading in read_report(asked) and heading not in read_report(undisturbed[0])


def test_each_row_is_asked_its_own_question(asked, run_train):
    """Questions go from the table to training, report and captions."""
    rows = read_results(asked)["captions"]
    found = [row["question"].partition("<|")[0] for row in rows]
    for row, question in zip(rows, found, strict=True):
        number = int(Path(row["images"][0]["path"]).stem)
        assert question == QUESTIONS[number % 3 == 0]
    assert len(set(found)) == 2
    cells = Page(read_text(asked / OUTPUT / "report.html")).cells
    assert set(QUESTIONS) <= set(cells)
    run = json.loads(read_text(asked / OUTPUT / "run.json"))
    assert QUESTIONS[0] in run["prompt"] and QUESTIONS[1] not in run["prompt"]
    names = [f"{IMAGES}/{Path(row['images'][0]['path']).name}" for row in rows]
    write_table(asked / "mine.csv", ("image_path", "question"), *zip(names, found, strict=True))
    done = run_train(asked, CAPTION="mine.csv", EPOCHS=1)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [row["caption"] for row in read_captions(asked)]
    assert said == [row["fine_tuned"]["text"] for row in rows]


# ---- Model card


def test_the_model_card_is_about_this_run(undisturbed):
    """README.md beside the adapter has its scores, prompt, size and settings."""
    folder, _ = undisturbed
    card = read_text(folder / OUTPUT / "README.md")
    assert card.startswith(f"---\nbase_model: {MODEL_FOLDER.as_posix()}\nlibrary_name: peft\n---\n")
    results = read_results(folder)
    values = [f"{scores['CIDEr']:.3f}" for scores in results["scores"].values()]
    assert f"| CIDEr | {' | '.join(values)} |" in card
    run = json.loads(read_text(folder / OUTPUT / "run.json"))
    assert run["prompt"].replace("\n", "\\n") in card and "112x112 pixels" in card
    assert "* LEARNING_RATE: 0.01" in card


# ---- Other families


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def family(request, prepared, run_train, tmp_path_factory) -> tuple[Path, str]:
    """A folder after the whole chain with a small random model of another family."""
    from support.families import make_model

    folder = another(prepared, tmp_path_factory.mktemp(request.param), "Qwen")
    make_model(request.param, folder / "model", dtype=torch.float32)
    constants = {"MODEL_FOLDER": "model", "CAPTION": IMAGES, "SAVE_MERGED": True}
    done = run_train(folder, **constants, SWANLAB_MODE="disabled", EPOCHS=1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / "swanlog").exists(), "disabled"
    return folder, done.stdout


def test_another_family_is_trained_and_used(family, train):
    """Adapter and merged model open again and say what the evaluation and CAPTION said."""
    from peft import PeftModel

    folder, printed = family
    results = read_results(folder)
    said = {row["image_path"]: row["caption"] for row in read_captions(folder)}
    for row in results["captions"]:
        name = Path(row["images"][0]["path"]).name
        assert said[f"{IMAGES}/{name}"] == row["fine_tuned"]["text"]
    assert results["scores"]["base"] != results["scores"]["fine_tuned"]
    assert len(set(said.values())) > 1, "it depends on the image"
    base, processor = open_whole(folder / "model")
    adapted = PeftModel.from_pretrained(base, folder / OUTPUT)
    assert share_of_equal(train, folder, adapted, processor) >= 0.8
    [share] = re.findall(r"is whole: ([\d.]+)% of its captions", printed)
    ours = share_of_equal(train, folder, *open_whole(folder / OUTPUT / "merged"))
    assert f"{ours:.1%}" == f"{share}%" and ours >= 0.8
    model_type = json.loads(read_text(folder / "model/config.json"))["model_type"]
    rounded = "IMAGE_SIZE = 112 is not a multiple of 32: 128 is used." in printed
    assert rounded == (model_type == "qwen3_vl")
