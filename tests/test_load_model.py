"""load_model.py: what it fetches, what it doesn't fetch twice, how it resumes, and what it says about the model."""

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import scenes
import torch
from conftest import TESTS, command, run_script, variables
from hub import MODEL_ID, Hub
from launch import load
from transformers import AutoProcessor, Qwen2VLConfig

TINY = TESTS / "tiny_qwen2vl"
FOLDER = Path("Qwen/Qwen2-VL-2B-Instruct")
FILE_PATH = f"/api/v1/models/{MODEL_ID}/repo?"
SHARD = "model-00001-of-00002.safetensors"

# Qwen2-VL-2B-Instruct's own shape, for the numbers that a card must have room for.
REAL_SHAPE = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 1536},
}


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a model folder, but for the record that load_model.py adds."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".complete.json"}


def fetched(hub: Hub) -> list[str]:
    """Names of the files that the hub was asked for, in order."""
    return [path.rpartition("FilePath=")[2] for path in hub.requests if path.startswith(FILE_PATH)]


def one_sentence(done: subprocess.CompletedProcess) -> str:
    """What a refused run ended with: the last line on stderr, and no traceback above it."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A folder after one run, the hub that served it (closed since), and what the run printed."""
    work, repository = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("repository") / "model"
    shutil.copytree(TINY, repository)
    (repository / "pytorch_model.bin").write_bytes(b"a pickle that nobody should load")
    with Hub(models={MODEL_ID: repository}) as hub:
        done = run_script("load_model.py", work, hub.environment())
        assert done.returncode == 0, done.stdout + done.stderr
        assert hub.refusals() == []
    return SimpleNamespace(work=work, hub=hub, stdout=done.stdout)


@pytest.fixture
def work(first_run, tmp_path):
    """A copy of that folder, to be damaged."""
    return shutil.copytree(first_run.work, tmp_path / "work")


@pytest.fixture
def model_hub():
    with Hub(models={MODEL_ID: TINY}) as hub:
        yield hub
        assert hub.refusals() == [], "a script tried to leave this machine"


@pytest.fixture(scope="module")
def script():
    """load_model.py as a module of this process, for what needs neither network nor a process of its own."""
    return load("load_model.py", [])


def test_files_land_where_documented(first_run):
    """The client's cache_dir puts the files under models/Qwen--.../snapshots/master, where train.py doesn't look."""
    assert contents(first_run.work / FOLDER) == contents(TINY)  # the pickle is not among them
    assert {path.name for path in first_run.work.iterdir()} == {"Qwen", ".cache"}
    assert sorted(fetched(first_run.hub)) == sorted(contents(TINY))  # each once


def test_what_the_run_shows(first_run):
    """Parts that don't add up to the whole mean that a tied weight was counted twice or a part forgotten."""
    lines = [line.removesuffix(" parameters") for line in first_run.stdout.splitlines() if "parameters" in line]
    *parts, whole = [int(line.split()[-1].replace(",", "")) for line in lines]
    weights = [file.stat().st_size for file in TINY.glob("*.safetensors")]
    assert sum(parts) == whole and len(parts) == 5 and parts[-1] == 0
    assert 0.97 < 2 * whole / sum(weights) <= 1  # two bytes each; the rest are the names of the tensors
    assert "torch.bfloat16" in first_run.stdout and "transformers 5." in first_run.stdout
    assert torch.cuda.is_available() or "no caption: that takes a CUDA card" in first_run.stdout


def test_second_run_needs_no_network(first_run, work):
    """The client lists the repository even when every file is there, so it fails on a train."""
    done = run_script("load_model.py", work, first_run.hub.environment())  # that hub is closed
    assert done.returncode == 0, done.stderr
    assert "is complete" in done.stdout and "no network is used" in done.stdout
    assert "retry" not in done.stderr and not (work / FOLDER / ".complete.json.tmp").exists()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [{SHARD: flip}, {"config.json": Path.unlink, "tokenizer.json": cut}])
def test_damaged_files_are_fetched_again(model_hub, work, damage):
    """A flipped bit keeps a file's size, and a model with one wrong weight loads without a word."""
    for name, spoil in damage.items():
        spoil(work / FOLDER / name)
    done = run_script("load_model.py", work, model_hub.environment())
    assert done.returncode == 0, done.stderr
    assert sorted(fetched(model_hub)) == sorted(damage)
    assert contents(work / FOLDER) == contents(TINY)


@pytest.mark.skipif(os.name == "nt", reason="no signals on Windows")
def test_cut_off_downloads_resume(folder, tmp_path):
    """4 GB from the start after each broken connection never end on a slow line; Ctrl-C is no crash."""
    repository = shutil.copytree(TINY, tmp_path / "repository")
    (repository / "large.dat").write_bytes(random.Random(0).randbytes(2**25))
    ranges, stalled, go_on = [], threading.Event(), threading.Event()

    def stall(handler):
        """The first half of what was asked for, then nothing more for as long as the client lives."""
        ranges.append(handler.headers.get("Range"))
        handler.answer(share=1 / 2)
        handler.wfile.flush()
        stalled.set()
        go_on.wait(30)

    def note(handler):
        ranges.append(handler.headers.get("Range"))
        handler.answer()

    with Hub(models={MODEL_ID: repository}) as hub:
        path = f"{FILE_PATH}Revision=master&FilePath=large.dat"
        partial = folder / FOLDER / "large.dat.incomplete"
        for ending, least in ((signal.SIGINT, 2**23), (signal.SIGKILL, 2**23 + 2**22)):
            stalled.clear()
            go_on.clear()
            hub.faults[path] = stall
            process = subprocess.Popen(
                command("load_model.py"),
                cwd=folder,
                env=variables(hub.environment()),
                stderr=subprocess.PIPE,
                text=True,
            )
            assert stalled.wait(60)
            deadline = time.monotonic() + 20
            while not (partial.exists() and partial.stat().st_size >= least) and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(ending)
            go_on.set()
            said = process.communicate(timeout=60)[1]
            assert partial.stat().st_size >= least
            if ending == signal.SIGINT:
                assert process.returncode == 1 and "Traceback" not in said and "Interrupted." in said
        hub.faults[path] = note
        hub.requests.clear()
        done = run_script("load_model.py", folder, hub.environment())
    assert done.returncode == 0, done.stderr
    assert fetched(hub) == ["large.dat"]
    starts = [int(value.removeprefix("bytes=").rstrip("-")) for value in ranges if value]
    assert ranges[0] is None and starts == sorted(starts) and starts[-1] >= 2**23 + 2**22
    assert contents(folder / FOLDER) == contents(repository)


def test_unknown_model(model_hub, folder):
    """A typo in MODEL_ID ended in a page of the client's traceback."""
    done = run_script("load_model.py", folder, model_hub.environment(), MODEL_ID="Qwen/Qwen2-LV-2B", MODEL_FOLDER="m")
    assert "check MODEL_ID and REVISION" in one_sentence(done)
    assert not (folder / "m").exists()


def test_filled_by_hand_without_network(first_run, work):
    """A folder copied from a colleague works on a machine without network; that nobody verified it is said."""
    (work / FOLDER / ".complete.json").unlink()
    done = run_script("load_model.py", work, first_run.hub.environment())
    assert done.returncode == 0, done.stderr
    assert "NOT VERIFIED" in done.stdout
    assert not (work / FOLDER / ".complete.json").exists()


def test_nothing_there_without_network(script, monkeypatch, tmp_path):
    """Without network and without model there is nothing to go on with; nor with files known to be damaged."""
    monkeypatch.setattr(script, "MODEL_FOLDER", str(tmp_path))
    monkeypatch.setattr(script, "fetch", lambda: (_ for _ in ()).throw(ConnectionError("refused\nby somebody")))
    with pytest.raises(SystemExit, match="run again, it resumes: refused$"):
        script.ensure_model()
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    script.ensure_model()
    record = {"model": MODEL_ID, "revision": "master", "files": {"config.json": {"size": 1, "sha256": None}}}
    (tmp_path / ".complete.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="run again"):
        script.ensure_model()


def test_disk_too_small(script, monkeypatch, tmp_path):
    """A disk that is full after 3 of 4 GB costs an hour; the listing tells the size beforehand."""
    file = SimpleNamespace(path="model.safetensors", size=10**18, sha256=None, is_dir=False)
    pickle = SimpleNamespace(path="old/pytorch_model.bin", size=10**18, sha256=None, is_dir=False)
    hub_api = SimpleNamespace(list_repo_files=lambda *_, **__: [file, pickle])
    monkeypatch.setattr(script, "HubApi", lambda: hub_api)
    monkeypatch.setattr(script, "MODEL_FOLDER", str(tmp_path / "model"))
    with pytest.raises(SystemExit, match="1000000000.0 GB are needed"):
        script.fetch()


def test_other_and_broken_models(script, monkeypatch, tmp_path):
    """from_pretrained fills what is missing with random numbers and goes on: the training then learns from noise."""
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    monkeypatch.setattr(script, "MODEL_FOLDER", str(model))
    config = json.loads((model / "config.json").read_text())

    (model / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(SystemExit, match="of type llama, not qwen2_vl"):
        script.load()

    deeper = {**config, "num_hidden_layers": config["num_hidden_layers"] + 1}
    (model / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(SystemExit, match="no whole Qwen2-VL: missing_keys"):
        script.load()

    (model / "config.json").write_text(json.dumps(config))
    (model / SHARD).write_bytes((model / SHARD).read_bytes()[:-1000])
    with pytest.raises(SystemExit, match="doesn't load: run again"):
        script.load()


def test_memory_table(script, monkeypatch):
    """A table that says 5 GB where the card needs 9 leads into the very error that it should prevent."""
    monkeypatch.setattr(script, "ANSWER_TOKENS", 14)  # one caption a picture, as was counted
    with torch.device("meta"):  # shapes without numbers: 4 GB that nobody allocates
        real = script.Qwen2VLForConditionalGeneration._from_config(Qwen2VLConfig(**REAL_SHAPE), dtype=torch.bfloat16)
    assert script.count_parameters(real) == 2_208_985_600
    assert script.training_memory(real, 0, True) == pytest.approx(4.11 + 1.10, abs=0.02)  # weights; LoRA and its Adam
    counted = {(4, True): 5.4, (16, True): 5.9, (4, False): 8.2, (16, False): 18.9}  # GiB, operation by operation
    for (batch_size, checkpointing), expected in counted.items():
        estimate = script.training_memory(real, batch_size, checkpointing)
        assert estimate == pytest.approx(expected, rel=0.15), (batch_size, checkpointing)


def test_caption_describes_the_picture(script, monkeypatch, tmp_path):
    """Prompt and picture put together wrongly still give fluent text, about nothing that is in the picture."""
    monkeypatch.setattr(script, "MODEL_FOLDER", str(TINY))
    monkeypatch.setattr(script, "IMAGE_SIZE", 112)
    model, processor = script.load().float(), AutoProcessor.from_pretrained(TINY, local_files_only=True)
    rng = random.Random(5)
    for scene in (scenes.Scene("circle", "red", "large", "white"), scenes.Scene("square", "blue", "large", "yellow")):
        scenes.draw(scene, rng).save(tmp_path / "picture.jpg")
        assert script.caption(model, processor, tmp_path / "picture.jpg") == scenes.wordy(scene)
