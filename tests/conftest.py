"""What the tests share.

A script runs as a user runs it, in a folder of its own, with the stand-in hub as its network.
"""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support import launch
from support.hub import MODEL_ID, Hub
from support.training import MODEL, SIDE, draw_scene

TESTS = Path(__file__).resolve().parent
TIMEOUT = 300  # seconds a script may take in a test

posix = pytest.mark.posix


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds, alone or with those beside it")
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU, skipped without one")
    config.addinivalue_line("markers", "posix: needs POSIX signals, pipes or limits")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked posix on Windows."""
    for item in items:
        if os.name == "nt" and item.get_closest_marker("posix"):
            item.add_marker(pytest.mark.skip(reason="signals, pipes and limits are POSIX here"))


def command(script: str, **constants) -> list[str]:
    """Return the command line that runs `script` with these constants."""
    values = [
        f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in constants.items()
    ]
    return [sys.executable, str(TESTS / "support/launch.py"), script, *values]


def variables(env: dict[str, str]) -> dict[str, str]:
    """Return this environment with `env` on top; scripts print in UTF-8 on every system."""
    return {**os.environ, "PYTHONUTF8": "1", **env}


def run_script(
    script: str, cwd: Path, env: dict[str, str], timeout: float = TIMEOUT, **constants
) -> subprocess.CompletedProcess:
    """Run `script` in the folder `cwd` through launch.py, with `env` from Hub.environment()."""
    return subprocess.run(
        command(script, **constants),
        cwd=cwd,
        env=variables(env),
        timeout=timeout,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )


def run_and_stop(
    script: str,
    cwd: Path,
    env: dict[str, str],
    seconds: float,
    sent: signal.Signals = signal.SIGKILL,
    **constants,
) -> subprocess.CompletedProcess:
    """Run `script`, signal it and its workers after `seconds` as Ctrl-C does, return the rest.

    A script that is done by then simply ends; one that outlives the signal by a minute fails the
    test. POSIX only.
    """
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "encoding": "utf-8",
        "errors": "replace",
    }
    run = subprocess.Popen(
        command(script, **constants), cwd=cwd, env=variables(env), start_new_session=True, **options
    )
    try:
        output = run.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, sent)
        try:
            output = run.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            raise AssertionError(
                f"{script} outlived {sent.name} by a minute: {run.communicate()}"
            ) from None
    return subprocess.CompletedProcess(run.args, run.returncode, *output)


def write_images(
    folder: Path, rows: list[tuple[str, str]], size: tuple[int, int] = (64, 48)
) -> Path:
    """Write a folder as the hub serves it: captions.csv with `rows`, one small JPEG per path."""
    (folder / "images").mkdir(parents=True)
    with open(folder / "captions.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image_path", "caption"), *rows])
    for number, path in enumerate(dict.fromkeys(path for path, _ in rows)):
        # noise gives a file large enough to be cut in the middle
        image = Image.effect_noise(size, 40).convert("RGB")
        image.paste((number * 40 % 256, number * 90 % 256, 200), (8, 8, 40, 32))
        image.save(folder / path, "JPEG", quality=90)
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


CAPTIONS = [
    ("images/57870.jpg", "A restaurant has modern wooden tables and chairs."),
    ("images/57870.jpg", "A long restaurant table with rattan rounded back chairs."),
    ("images/384029.jpg", " A man preparing desserts in a kitchen covered in frosting. "),
    ("images/222016.jpg", "a big red telephone booth that a man is standing in\n"),
    ("images/384029.jpg", 'A chef says "done", wipes a plate,\r\nand smiles.'),
    ("images/520950.jpg", "the kitchen is full of spices on the rack"),
    ("images/69675.jpg", "厨房里有一张桌子，上面放着一盘水果。"),
    ("images/57870.jpg", "a long table with a plant on top of it"),
    ("images/547471.jpg", "A tan toilet and sink combination in a small room."),
]


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """Six small images, one with three captions and one with two, as quirky as the real text."""
    return write_images(tmp_path / "served", CAPTIONS)


@pytest.fixture
def hub(hub_folder: Path):
    """A hub that serves hub_folder; at the end the guard must have had nothing to refuse."""
    with Hub(hub_folder) as server:
        yield server
        assert server.refusals() == [], "a script tried to leave this machine"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The empty folder that a user starts in."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


# ---- train.py as a module, and the small model. Tests change its constants by monkeypatch alone.
# torch and its like take seconds to import, so the fixtures import them: most tests need none.


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    """train.py as a module that trains the small model on images of 112 x 112 pixels."""
    from accelerate import PartialState

    script = launch.load("train.py", [])
    script.quiet_libraries()
    PartialState(cpu=True)
    script.MODEL_FOLDER, script.IMAGE_SIZE = str(MODEL), SIDE
    script.CACHE_FOLDER = str(tmp_path_factory.mktemp("features"))
    return script


@pytest.fixture(scope="session")
def base(train):
    """The small model's processor and shape, on the CPU in float32, as train.py runs there."""
    import torch

    return train.Base(*train.load_processor(), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def exact(base):
    """The same in double precision: what should be equal differs by rounding alone."""
    import torch

    return base._replace(dtype=torch.float64)


@pytest.fixture(scope="session")
def model(train, exact):
    """The language model with a LoRA adapter that changes what it says, without dropout."""
    import torch

    model = train.load_model(exact).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        # zero at first, which would hide what the adapter's other half gets
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=1.0, generator=generator)
    return model


@pytest.fixture(scope="session")
def whole_model(train, exact, model, tmp_path_factory):
    """The model as the library loads it, vision tower included, with the adapter of `model`."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    plain = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=exact.dtype)
    return PeftModel.from_pretrained(plain, folder, is_trainable=True).eval()


@pytest.fixture(scope="session")
def collator(train, exact, model):
    return train.Collator(exact, train.KeptFeatures(exact), model)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder with one.jpg, a red star on blue, and two.jpg, a pink circle on black."""
    folder = tmp_path / "images"
    folder.mkdir()
    draw_scene(folder / "one.jpg", "star", "red", "blue")
    draw_scene(folder / "two.jpg", "circle", "pink", "black")
    return folder


# ---- Whole runs of the four scripts on the small model, one project for the whole session.


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A hub with 30 scenes of 2 captions each and the small model."""
    from support import runs

    images = runs.write_images(tmp_path_factory.mktemp("served"))
    with Hub(images, {MODEL_ID: MODEL}) as hub:
        yield hub
        assert hub.refusals() == [], "a script tried to leave this machine"


@pytest.fixture(scope="session")
def prepared(served, tmp_path_factory) -> Path:
    """A folder after the first three scripts. Copy it: see runs.another()."""
    from support import runs

    return runs.prepare(tmp_path_factory.mktemp("prepared"), served)


@pytest.fixture(scope="session")
def train_runner(served):
    """train.py imported once, with each run a process of its own."""
    from support.fork_runner import Runner

    runner = Runner("train.py", {"OMP_NUM_THREADS": "1", **served.environment()})
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def run_train(train_runner, served):
    """A function that runs train.py in a folder with the constants of a small run."""
    from support import runs

    def run(folder: Path, **constants) -> subprocess.CompletedProcess:
        environment = {"OMP_NUM_THREADS": "1", **served.environment()}
        return train_runner(folder, environment, **{**runs.SMALL, **constants})

    return run


@pytest.fixture(scope="session")
def undisturbed(prepared, served, tmp_path_factory) -> tuple[Path, str]:
    """A folder after a run of train.py as a user starts it, and what that printed. Only read it."""
    from support import runs

    folder = runs.another(prepared, tmp_path_factory.mktemp("undisturbed"))
    environment = {"OMP_NUM_THREADS": "1", **served.environment()}
    done = run_script("train.py", folder, environment, **runs.SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout + done.stderr
