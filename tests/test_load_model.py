"""load_model.py: what it fetches, what it doesn't fetch twice, how it resumes, and what it says about the model."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import TESTS, run_script, variables
from safetensors.torch import load_file, save_file
from support.hub import MODEL_ID, Hub, as_json, cut_short, describe, html, status
from support.launch import like, load
from transformers import Qwen2VLConfig

TINY = TESTS / "support/tiny_qwen2vl"
FOLDER = Path("Qwen/Qwen2-VL-2B-Instruct")
LISTING = f"/api/v1/models/{MODEL_ID}/repo/files"
FILE = f"/api/v1/models/{MODEL_ID}/repo?Revision=master&FilePath="
SHARD = "model-00001-of-00002.safetensors"
TOKEN = "ms-8f1e0c7d-a-secret-of-the-user"
posix = pytest.mark.skipif(os.name == "nt", reason="signals and links as POSIX has them")

# The published shapes, for the numbers that a card must have room for; what they share first.
SHAPE = {"num_hidden_layers": 28, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
VISION = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16}
SHAPE_2B = SHAPE | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "vision_config": VISION | {"hidden_size": 1536},
}
SHAPE_7B = SHAPE | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "vision_config": VISION | {"hidden_size": 3584},
}


# Many runs of one script whose imports take 5 s: a process imports it once, then each run is a fork of that process.


class Runner:
    """Runs load_model.py; its constants, folder and environment are each run's own, and so are its files on disk."""

    def __init__(self):
        if os.name == "nt":  # no fork: each run is a process of its own
            return
        with Hub() as hub:  # the guard, and what transformers reads when it is imported
            environment = variables({**hub.environment(), "PYTHONUNBUFFERED": ""})  # as at a user's
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)
        self.process.stdout.readline()  # ready: what is timed from now on are the runs

    def ask(self, **job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, work: Path, env: dict[str, str], **constants) -> SimpleNamespace:
        """A run that goes on by itself: its pid, and the paths of what it prints."""
        out, err = work.with_name(f"{work.name}.out"), work.with_name(f"{work.name}.err")
        pid = self.ask(cwd=str(work), env=env, constants=constants, out=str(out), err=str(err))
        return SimpleNamespace(pid=pid, out=out, err=err)

    def end(self, run: SimpleNamespace, timeout: float = 60) -> subprocess.CompletedProcess:
        code = self.ask(wait=run.pid, timeout=timeout)
        return subprocess.CompletedProcess(
            [], code, run.out.read_text("utf-8"), run.err.read_text("utf-8")
        )

    def __call__(self, work: Path, hub: Hub, env: dict[str, str] | None = None, **constants):
        """One run from start to end, against a hub that is up or was."""
        env = {**hub.environment(), **(env or {})}
        if os.name == "nt":
            return run_script("load_model.py", work, env, **constants)
        return self.end(self.start(work, env, **constants))


def serve_runner() -> None:
    """The runner's process: one line of stdin a job, one line of stdout an answer."""
    script = load("load_model.py", [])
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(reap(job["wait"], time.monotonic() + job["timeout"]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            os.chdir(job["cwd"])
            os.environ.update(job["env"])
            for number, path in ((1, job["out"]), (2, job["err"])):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            for name, value in job["constants"].items():
                setattr(script, name, like(getattr(script, name), value))
            os._exit(run_main(script))


def run_main(script) -> int:
    """The exit code that the interpreter would give."""
    try:
        script.main()
        code = 0
    except SystemExit as error:
        code = 1
        print(error.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def reap(pid: int, deadline: float) -> int:
    """The exit code of a run, which is killed if it takes too long."""
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(done[1])


@pytest.fixture(scope="module")
def runner():
    runner = Runner()
    yield runner
    if os.name != "nt":
        runner.process.stdin.close()
        assert runner.process.wait(10) == 0


# What the tests compare


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a model folder, but for the record that load_model.py adds."""
    return {
        file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".complete.json"
    }


def fetched(hub: Hub) -> list[str]:
    """Names of the files that the hub was asked for, in order."""
    return [path.removeprefix(FILE) for path in hub.requests if path.startswith(FILE)]


def one_sentence(done: subprocess.CompletedProcess) -> str:
    """What a refused run ended with: the last line on stderr, and no traceback above it."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A folder after one run on a repository with traps, the hub that served it (closed since), what was printed."""
    work, repository = (
        tmp_path_factory.mktemp("first"),
        tmp_path_factory.mktemp("repository") / "model",
    )
    shutil.copytree(TINY, repository)
    for name in ("pytorch_model.bin", "model.pt", "old/model.ckpt", "modeling_trap.py"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text(f"open({str(work / 'trapped')!r}, 'w')")
    config = json.loads((TINY / "config.json").read_text())
    classes = {"AutoModel": "modeling_trap.Trap", "AutoConfig": "modeling_trap.Trap"}
    (repository / "config.json").write_text(json.dumps({**config, "auto_map": classes}))
    with Hub(models={MODEL_ID: repository}) as hub:
        environment = {**hub.environment(), "MODELSCOPE_API_TOKEN": TOKEN}
        done = run_script("load_model.py", work, environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert hub.refusals() == []
        written = [
            file for folder in (work, hub.temporary) for file in folder.rglob("*") if file.is_file()
        ]
        leaks = [str(file) for file in written if TOKEN.encode() in file.read_bytes()]
    return SimpleNamespace(work=work, hub=hub, repository=repository, done=done, leaks=leaks)


@pytest.fixture
def whole(runner, folder):
    """A folder with the whole model and its record."""
    with Hub(models={MODEL_ID: TINY}) as hub:
        assert runner(folder, hub).returncode == 0
    return folder


@pytest.fixture
def model_hub():
    with Hub(models={MODEL_ID: TINY}) as hub:
        yield hub
        assert hub.refusals() == [], "a script tried to leave this machine"


@pytest.fixture
def closed_hub():
    """Where nothing listens any more."""
    with Hub() as hub:
        pass
    return hub


@pytest.fixture(scope="module")
def script():
    """load_model.py as a module of this process, for what needs neither network nor a process of its own."""
    return load("load_model.py", [])


# A whole download


def test_files_land_where_documented(first_run):
    """The client's cache_dir puts the files under models/Qwen--.../snapshots/master, where train.py doesn't look."""
    wanted = set(contents(TINY))
    assert contents(first_run.work / FOLDER) == {
        name: (first_run.repository / name).read_bytes() for name in wanted
    }
    assert {path.name for path in first_run.work.iterdir()} == {"Qwen", ".cache"}
    assert sorted(fetched(first_run.hub)) == sorted(
        wanted
    )  # each once; neither a pickle nor code among them


def test_no_token_leaks(first_run):
    """A token in a log that is pasted into a forum, or in a folder that is shared, opens the user's account."""
    assert TOKEN not in first_run.done.stdout + first_run.done.stderr
    assert first_run.leaks == []


def test_what_the_run_shows(first_run):
    """Parts that don't add up to the whole mean that a tied weight was counted twice or a part forgotten."""
    stdout = first_run.done.stdout
    lines = [
        line.removesuffix(" parameters")
        for line in stdout.splitlines()
        if line.endswith(" parameters")
    ]
    *parts, total = [int(line.split()[-1].replace(",", "")) for line in lines]
    weights = [file.stat().st_size for file in TINY.glob("*.safetensors")]
    assert sum(parts) == total and len(parts) == 4 and parts[-1] == 0
    assert (
        0.97 < 2 * total / sum(weights) <= 1
    )  # two bytes each; the rest are the names of the tensors
    assert "torch.bfloat16" in stdout and "transformers 5." in stdout


def test_second_run_needs_no_network(runner, whole, closed_hub):
    """The client lists the repository even when every file is there, so it fails on a train."""
    done = runner(whole, closed_hub)
    assert done.returncode == 0, done.stderr
    assert "is complete" in done.stdout and "no network is used" in done.stdout
    assert "retry" not in done.stderr and "M/2." in done.stderr  # the bar counts bytes, not files


def test_verifying_is_seen_to_move(script, monkeypatch, tmp_path):
    """A bar that moves by files stands still for the half minute that one file of 4 GB takes."""
    moves = []
    bar = SimpleNamespace(update=moves.append, __enter__=lambda: bar)
    monkeypatch.setattr(script, "MODEL_FOLDER", str(tmp_path))
    (tmp_path / "large").write_bytes(bytes(5_000_000))
    assert script.is_whole("large", 5_000_000, None, bar)
    assert len(moves) >= 4 and sum(moves) == 5_000_000
    assert not script.is_whole(
        "large", 5_000_001, None, bar
    )  # a hub that gives no sum still gives the size


# Faults of the network


def once(fault: Callable) -> Callable:
    """A fault that is gone the second time."""
    return lambda handler, left=[fault]: left.pop()(handler) if left else handler.answer()  # noqa: B006


def other_bytes(handler) -> None:
    """A file of the right length with the wrong contents, as a broken mirror has it."""
    size = (TINY / handler.path.removeprefix(FILE)).stat().st_size
    handler.send(200, b"?" * size, "application/octet-stream")


def stall(handler) -> None:
    """The headers and half of the file, then nothing for as long as the client waits."""
    handler.connection.settimeout(20)
    handler.answer(share=1 / 2)
    handler.wfile.flush()
    handler.rfile.read(1)  # until it hangs up


def drip(handler) -> None:
    """The headers, then a byte now and then: a timeout between two bytes never strikes."""
    content = (TINY / handler.path.removeprefix(FILE)).read_bytes()
    handler.send(200, io.BytesIO(), "application/octet-stream", length=len(content))
    for number in range(100):
        handler.wfile.write(content[number : number + 1])
        handler.wfile.flush()
        time.sleep(0.1)


def test_faults_that_pass(runner, folder, model_hub):
    """One cut connection, one broken answer or one overloaded server in an hour must not end a download."""
    model_hub.faults[FILE + SHARD] = once(cut_short)
    model_hub.faults[FILE + "tokenizer.json"] = once(other_bytes)
    model_hub.faults[FILE + "vocab.json"] = once(status(503))
    done = runner(folder, model_hub)
    assert done.returncode == 0, done.stderr
    assert contents(folder / FOLDER) == contents(TINY)
    assert [fetched(model_hub).count(name) for name in (SHARD, "tokenizer.json", "vocab.json")] == [
        2,
        2,
        2,
    ]


@pytest.mark.parametrize(
    ("path", "fault", "said"),
    [
        (LISTING, status(404), "Check MODEL_ID"),
        (LISTING, status(401), "Check MODEL_ID"),
        (LISTING, status(500), "Mend this and run again"),
        (LISTING, html, "page to log in"),
        (LISTING, lambda handler: handler.send(200, as_json({"Files": []})), "no config.json"),
        (FILE + SHARD, status(404), f"Not all files arrived, .* {SHARD}: .*404"),
        (FILE + SHARD, other_bytes, f"Not all files arrived, .* {SHARD}: .*Hash mismatch"),
        (FILE + SHARD, stall, f"Not all files arrived, .* {SHARD}"),
        (FILE + SHARD, drip, f"Not all files arrived, .* {SHARD}"),
    ],
    ids="listing-404 listing-401 listing-500 listing-html listing-empty 404 checksum stall drip".split(),
)
def test_faults_that_stay(runner, folder, model_hub, path, fault, said):
    """A traceback, a wait without an end, or a model with a hole: none of them tells the user what to do."""
    model_hub.faults[path] = fault
    hurry = {
        "REPO_TREE_PAGE_MAX_ATTEMPTS": "2",
        "DOWNLOAD_MAX_RETRIES": "1",
        "DOWNLOAD_LOW_SPEED_WINDOW_SECONDS": "1",
    }
    start = time.monotonic()
    done = runner(
        folder,
        model_hub,
        {f"MODELSCOPE_{name}": value for name, value in hurry.items()},
        STALL_SECONDS=1,
    )
    assert re.search(said, one_sentence(done)) and time.monotonic() - start < 15
    assert not (folder / FOLDER / ".complete.json").exists()
    if path == LISTING:
        return
    assert SHARD not in contents(folder / FOLDER)
    if fault in (stall, drip):
        assert f"{SHARD} (" in done.stderr and "retrying" in done.stderr  # the waiting is seen
    model_hub.faults.clear()
    model_hub.requests.clear()
    done = runner(folder, model_hub)
    assert done.returncode == 0 and fetched(model_hub) == [SHARD]
    assert contents(folder / FOLDER) == contents(TINY)


def test_nothing_there_without_network(runner, folder, closed_hub):
    """Without network and without model there is nothing to go on with."""
    done = runner(folder, closed_hub, {"MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "2"})
    assert "Mend this and run again" in one_sentence(done) and "retry in" in done.stderr


def test_filled_by_hand_without_network(runner, whole, closed_hub):
    """A folder copied from a colleague works on a machine without network; that nobody verified it is said."""
    (whole / FOLDER / ".complete.json").unlink()
    done = runner(whole, closed_hub, {"MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1"})
    assert done.returncode == 0, done.stderr
    assert "NOT VERIFIED" in done.stdout
    assert not (whole / FOLDER / ".complete.json").exists()


def test_limits_of_the_waiting(script, monkeypatch, tmp_path):
    """The client gives a file an hour: 4 GB on a line of 1 MB/s never arrive in one run. It must read our limits."""
    for name in ("MODELSCOPE_DOWNLOAD_TIMEOUT", "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(script, "MODEL_FOLDER", str(tmp_path))
    monkeypatch.setattr(script, "fetch", lambda hub: None)
    script.ensure_model()
    limits = {"TIMEOUT": script.STALL_SECONDS, "TOTAL_TIMEOUT": script.FILE_HOURS * 3600}
    fresh = "from modelscope_hub.constants import DOWNLOAD_{0}; print(DOWNLOAD_{0})"
    for name, limit in limits.items():
        assert (
            subprocess.check_output([sys.executable, "-c", fresh.format(name)], text=True)
            == f"{limit}\n"
        )


# Faults of the disk


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    "damage",
    [{SHARD: flip}, {"config.json": Path.unlink, "tokenizer.json": cut}],
    ids=["bit", "gone and cut"],
)
def test_damaged_files_are_fetched_again(runner, model_hub, whole, damage):
    """A flipped bit keeps a file's size, and a model with one wrong weight loads without a word."""
    for name, spoil in damage.items():
        spoil(whole / FOLDER / name)
    done = runner(whole, model_hub)
    assert done.returncode == 0, done.stderr
    assert sorted(fetched(model_hub)) == sorted(damage)
    assert contents(whole / FOLDER) == contents(TINY)


def test_damaged_without_network(runner, whole, closed_hub):
    """What is known to be damaged is no folder filled by hand: loading it would train on noise."""
    flip(whole / FOLDER / SHARD)
    done = runner(whole, closed_hub, {"MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1"})
    assert "Mend this and run again" in one_sentence(done) and f"altered: {SHARD}" in done.stdout


def test_disk_too_small(script, monkeypatch, tmp_path):
    """A disk that is full after 3 of 4 GB costs an hour; the listing tells the size beforehand."""
    names = {"config.json": 1, "model.safetensors": 10**18, "old/pytorch_model.bin": 10**18}
    files = [
        SimpleNamespace(path=name, size=size, sha256=None, is_dir=False)
        for name, size in names.items()
    ]
    monkeypatch.setattr(script, "MODEL_FOLDER", str(tmp_path / "model"))
    with pytest.raises(SystemExit, match="1000000000.0 GB are needed"):
        script.fetch(SimpleNamespace(list_repo_files=lambda *_, **__: files))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_disk_full_on_the_way(runner, folder, model_hub):
    """Another program may fill the disk meanwhile; with room again, what arrived is not fetched a second time."""
    partial = folder / FOLDER / f"{SHARD}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.symlink_to("/dev/full")
    assert f"{SHARD}: [Errno 28] No space left" in one_sentence(runner(folder, model_hub))
    partial.unlink()
    model_hub.requests.clear()
    assert runner(folder, model_hub).returncode == 0
    assert fetched(model_hub) == [SHARD] and contents(folder / FOLDER) == contents(TINY)


@pytest.mark.parametrize(
    "place", ["taken", "taken/model", pytest.param("/proc/model", marks=posix)]
)
def test_folder_that_cannot_be(runner, folder, model_hub, place):
    """A file where the folder should be, or a disk that can't be written, ended in a traceback."""
    (folder / "taken").write_text("mine")
    done = runner(folder, model_hub, MODEL_FOLDER=place)
    assert re.search(
        r"Mend this and run again.*\[\w+ \d+\]", one_sentence(done)
    ) and place in one_sentence(done)
    assert (folder / "taken").read_text() == "mine" and fetched(model_hub) == []


def test_what_an_older_client_left(runner, folder, model_hub):
    """modelscope 1.18 with cache_dir="./" fetched into this very folder: whole files are kept, halves are not."""
    model, temporary = folder / FOLDER, folder / "._____temp" / FOLDER
    shutil.copytree(TINY, model)
    shutil.copytree(TINY, temporary)
    (model / SHARD).unlink()
    cut(temporary / SHARD)
    cut(model / "vocab.json")
    (model / ".msc").write_bytes(b"its index")
    done = runner(folder, model_hub)
    assert done.returncode == 0, done.stderr
    assert sorted(fetched(model_hub)) == [SHARD, "vocab.json"]
    assert contents(model) == {**contents(TINY), ".msc": b"its index"}


@posix
def test_links_are_not_written_through(runner, whole, model_hub, tmp_path):
    """Weights that are links into another program's cache: mending our copy must not overwrite theirs."""
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    (whole / FOLDER / SHARD).unlink()
    (whole / FOLDER / SHARD).symlink_to(theirs)
    elsewhere = shutil.move(whole / FOLDER, tmp_path / "large disk")
    (whole / FOLDER).symlink_to(elsewhere)  # the whole folder on another disk is nothing unusual
    assert runner(whole, model_hub).returncode == 0
    assert theirs.read_text() == "theirs" and contents(whole / FOLDER) == contents(TINY)


# What is refused


@pytest.mark.parametrize(
    "path", ["../../escaped.json", "{tmp}/escaped.json", "..\\..\\escaped.json", "C:escaped.json"]
)
def test_nothing_is_written_outside(runner, folder, model_hub, tmp_path, path):
    """The client writes wherever the listing says: a hub, or who sits between, could replace a file of the user's."""
    path = path.format(tmp=tmp_path)
    files = [describe(file.name, file) for file in TINY.iterdir()]
    files.append({"Path": path, "Name": "escaped.json", "Type": "blob", "Size": 2, "Sha256": None})
    model_hub.faults[LISTING] = lambda handler: handler.send(
        200, as_json({"Files": files}), "application/json"
    )
    before = sorted(tmp_path.rglob("*"))
    done = runner(folder, model_hub)
    assert "would land outside" in one_sentence(done)
    assert [
        path
        for path in sorted(tmp_path.rglob("*"))
        if path not in before and path.parent != tmp_path
    ] == []
    assert fetched(model_hub) == []


def test_unknown_model(runner, model_hub, folder):
    """A typo in MODEL_ID ended in a page of the client's traceback."""
    done = runner(folder, model_hub, MODEL_ID="Qwen/Qwen2-LV-2B", MODEL_FOLDER="m")
    assert "Check MODEL_ID = Qwen/Qwen2-LV-2B" in one_sentence(done)
    assert not (folder / "m").exists()


def test_another_model_is_not_replaced(runner, whole, model_hub):
    """MODEL_ID changed, MODEL_FOLDER forgotten: the second model must not overwrite the first, which took an hour."""
    model_hub.models["Qwen/Qwen2-VL-7B-Instruct"] = TINY
    done = runner(whole, model_hub, MODEL_ID="Qwen/Qwen2-VL-7B-Instruct")
    assert "change MODEL_FOLDER" in one_sentence(done) and model_hub.requests == []
    done = runner(whole, model_hub, MODEL_ID="Qwen/Qwen2-VL-7B-Instruct", MODEL_FOLDER="seven")
    assert done.returncode == 0 and contents(whole / "seven") == contents(TINY)


BAD = {
    "MODEL_ID": ["Qwen2-VL-2B-Instruct", "/Qwen", 7, "a/b/c"],
    "REVISION": ["", None],
    "MODEL_FOLDER": ["", 3],
    "RECORD_FILE": ["", None],
    "CACHE_FOLDER": ["", None],
    "WANTED_FILES": ["*.json", [], [1]],
    "DOWNLOAD_THREADS": [0, "4", True],
    "STALL_SECONDS": [0, 1.5],
    "FILE_HOURS": [0, -1],
    "IMAGE_SIZE": [281, 28, "280"],
    "BATCH_SIZES": [[], [0], ["4"], [1.5], 4, None],
    "LORA_RANK": [0, 0.5],
    "TEXT_TOKENS": [0],
    "ANSWER_TOKENS": [-1],
}


def test_constants_are_checked(script, monkeypatch):
    """A typo in a constant must be told by name at once, not after an hour of downloading."""
    script.check_constants()
    assert {name for name in vars(script) if name.isupper()} == set(BAD)
    assert (
        script.MODEL_FOLDER == script.MODEL_ID
    )  # a user who changes only the second keeps both models
    assert f'MODEL_FOLDER = "{script.MODEL_FOLDER}"' in (TESTS.parent / "train.py").read_text(
        encoding="utf-8"
    )
    for name, values in BAD.items():
        for value in values:
            with (
                monkeypatch.context() as patch,
                pytest.raises(SystemExit, match=f"^{name} = .*must be") as told,
            ):
                patch.setattr(script, name, value)
                script.check_constants()
            assert repr(value) in str(told.value)


def test_constants_are_checked_first(runner, folder, model_hub):
    """main() has to ask for that check before it asks the hub."""
    assert "LORA_RANK = 0 at the top of load_model.py" in one_sentence(
        runner(folder, model_hub, LORA_RANK=0)
    )
    assert model_hub.requests == []


# Stopped on the way


class Slow:
    """A file that takes its time, so that a download of 3 MB lasts."""

    def __init__(self, file, pause: float):
        self.file, self.pause = file, pause

    def write(self, piece: bytes) -> None:
        self.file.write(piece)
        self.file.flush()
        time.sleep(self.pause)

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def slow(pause: float) -> Callable:
    """Answers in pieces of 64 KB with a pause after each."""

    def fault(handler) -> None:
        handler.wfile = Slow(getattr(handler.wfile, "file", handler.wfile), pause)
        handler.answer()

    return fault


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a model folder, the record among them."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@posix
def test_killed_at_any_moment(runner, model_hub, tmp_path):
    """Power cuts and the kernel's killer come at any moment: the next run must end where this one would have."""
    model_hub.faults[FILE] = slow(0.04)
    works = [tmp_path / str(number) for number in range(21)]
    for work in works:
        work.mkdir()
    start = time.monotonic()
    undisturbed = runner(works[0], model_hub)
    lasts = time.monotonic() - start
    assert undisturbed.returncode == 0, undisturbed.stderr
    expected = everything(works[0] / FOLDER)
    rng = random.Random(2014)
    left = []
    for work in works[1:]:
        run = runner.start(work, model_hub.environment())
        time.sleep(rng.uniform(0, lasts))
        os.kill(run.pid, signal.SIGKILL)
        assert runner.end(run).returncode in (-signal.SIGKILL, 0)
        left.append(sum(map(len, everything(work / FOLDER).values())))
    assert len(set(left)) >= 5, (
        left
    )  # the moments were different ones, most of them while files arrived
    model_hub.faults.clear()
    for batch in (works[first : first + 4] for first in range(1, 21, 4)):
        runs = [runner.start(work, model_hub.environment()) for work in batch]
        assert [runner.end(run).returncode for run in runs] == [0] * 4
        assert [everything(work / FOLDER) == expected for work in batch] == [True] * 4


@posix
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize(
    "moment", ["asking the hub", "still to come", "verifying", "no network is used"]
)
def test_stopped_with_one_sentence(runner, whole, model_hub, sent, moment):
    """A traceback, or a wait for the download under way, is no answer to Ctrl-C; nor is a spoilt folder."""
    model_hub.faults[FILE] = slow(0.2)
    expected, record = everything(whole / FOLDER), whole / FOLDER / ".complete.json"
    if moment in ("asking the hub", "still to come"):
        shutil.rmtree(whole / FOLDER)
    if moment == "asking the hub":
        model_hub.faults[LISTING] = stall
    if moment == "verifying":  # a second of it: zeros, which take no room
        with open(whole / FOLDER / "large", "wb") as file:
            file.truncate(2**31)
        files = {"large": {"size": 2**31, "sha256": "0" * 64}}
        record.write_text(json.dumps({"model": MODEL_ID, "revision": "master", "files": files}))
    run = runner.start(whole, model_hub.environment())
    deadline = time.monotonic() + 20
    while moment not in run.out.read_text("utf-8") + run.err.read_text("utf-8"):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.1)
    os.kill(run.pid, sent)
    start = time.monotonic()
    done = runner.end(run)
    assert time.monotonic() - start < 1
    assert done.returncode == 128 + sent and "Traceback" not in done.stderr
    assert done.stderr.endswith(
        "\nStopped. What arrived is kept: run again, it goes on where it was.\n"
    )
    model_hub.faults.clear()
    if moment == "verifying":
        (whole / FOLDER / "large").unlink()
        record.write_bytes(expected[".complete.json"])
    assert runner(whole, model_hub).returncode == 0
    assert everything(whole / FOLDER) == expected


@posix
def test_a_resumed_file_is_not_fetched_from_its_start(runner, folder, model_hub):
    """4 GB from the start after each broken connection never end on a slow line."""
    ranges = []
    model_hub.faults[FILE + SHARD] = slow(0.1)
    run = runner.start(folder, model_hub.environment())
    partial = folder / FOLDER / f"{SHARD}.incomplete"
    while not (partial.exists() and partial.stat().st_size > 500_000):
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    runner.end(run)
    model_hub.faults[FILE + SHARD] = lambda handler: (
        ranges.append(handler.headers["Range"]),
        handler.answer(),
    )
    model_hub.requests.clear()
    assert runner(folder, model_hub).returncode == 0
    assert (
        fetched(model_hub) == [SHARD]
        and int(ranges[0].removeprefix("bytes=").rstrip("-")) > 500_000
    )
    assert contents(folder / FOLDER) == contents(TINY)


# The model


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
    with pytest.raises(SystemExit, match="doesn't load, a new run mends it"):
        script.load()


def test_untied_output_head(script, monkeypatch, tmp_path, capsys):
    """The 7B model has an output head of its own, in its last shard: it must load, and be counted."""
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    monkeypatch.setattr(script, "MODEL_FOLDER", str(model))
    with pytest.raises(SystemExit, match=r"missing_keys \['lm_head.weight'\]"):
        script.load()
    index = json.loads((model / "model.safetensors.index.json").read_text())
    embeddings = next(name for name in index["weight_map"] if name.endswith("embed_tokens.weight"))
    head = load_file(model / index["weight_map"][embeddings])[embeddings]
    save_file(
        {"lm_head.weight": head + 1}, model / "model-00003-of-00003.safetensors", {"format": "pt"}
    )
    index["weight_map"]["lm_head.weight"] = "model-00003-of-00003.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = script.load()
    assert torch.equal(loaded.lm_head.weight, head + 1)
    script.print_parts(loaded)
    assert re.search(rf"output head +{head.numel():,} parameters", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("shape", "parts", "lora"),
    [
        (SHAPE_2B, [665_271_296, 233_373_696, 1_310_340_608, 0], 73_859_072),
        (SHAPE_7B, [675_759_104, 544_997_376, 6_525_621_760, 544_997_376], 161_480_704),
    ],
    ids=["2B", "7B"],
)
def test_published_shapes(script, capsys, shape, parts, lora):
    """A table that says 5 GB where the card needs 9 leads into the very error that it should prevent."""
    with torch.device("meta"):  # shapes without numbers: 16 GB that nobody allocates
        model = script.Qwen2VLForConditionalGeneration._from_config(
            Qwen2VLConfig(**deepcopy(shape)), dtype=torch.bfloat16
        )
        fixed = script.training_memory(model, 0, True) * 2**30
        script.print_parts(model)
        script.print_memory(model)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=script.LORA_RANK, target_modules=targets)
        )
    printed = capsys.readouterr().out
    counts = [
        int(line.split()[-2].replace(",", ""))
        for line in printed.splitlines()
        if line.endswith(" parameters")
    ]
    assert counts == [*parts, sum(parts)]
    assert adapted.get_nb_trainable_parameters()[0] == lora
    assert fixed == pytest.approx(2 * sum(parts) + 16 * lora)
    rows = [
        [float(cell) for cell in re.findall(r"\d+\.\d", line)]
        for line in printed.splitlines()
        if " | " in line
    ]
    assert [len(row) for row in rows] == [0, 2, 2, 2, 2]
    assert all(with_it < without for with_it, without in rows[1:]) and sorted(rows[1:]) == rows[1:]


def test_memory_as_counted(script, monkeypatch):
    """The estimate against the bytes that were counted, operation by operation, with one caption a picture."""
    monkeypatch.setattr(script, "ANSWER_TOKENS", 14)
    with torch.device("meta"):
        model = script.Qwen2VLForConditionalGeneration._from_config(
            Qwen2VLConfig(**deepcopy(SHAPE_2B)), dtype=torch.bfloat16
        )
    counted = {(4, True): 5.4, (16, True): 5.9, (4, False): 8.2, (16, False): 18.9}  # GiB
    for (batch_size, checkpointing), expected in counted.items():
        estimate = script.training_memory(model, batch_size, checkpointing)
        assert estimate == pytest.approx(expected, rel=0.15), (batch_size, checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_against_a_pass_of_train_py(script, monkeypatch, checkpointing):
    """The estimate's numbers of bytes hold for train.py as it was once: here autograd's own are counted, to 10 %."""
    train = load("train.py", [])
    for module, constants in (
        (train, {"LORA_RANK": 16}),
        (script, {"LORA_RANK": 16, "IMAGE_SIZE": 56, "TEXT_TOKENS": 66, "ANSWER_TOKENS": 70}),
    ):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
    tokens, supervised, layers, hidden, words = (
        2 * (66 + 4 + 70),
        2 * 70,
        6,
        768,
        8000,
    )  # two pictures of 4 tokens
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": words,
        "intermediate_size": 4480,
    }
    text |= {
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default"},
    }
    text["rope_parameters"] |= {"mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": hidden}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    base = script.Qwen2VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    fixed, off, chosen = (
        script.training_memory(base, *run) * 2**30
        for run in ((0, False), (2, False), (2, checkpointing))
    )
    monkeypatch.setattr(
        train.transformers.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: base
    )
    model, kept = train.load_model("cpu", torch.bfloat16).train(), {}
    if checkpointing:
        model.activation_checkpointing_enable()  # as the Trainer does
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mask = torch.ones(2, 1, tokens // 2, tokens // 2, dtype=torch.bool).tril()
    answers = torch.arange(tokens).reshape(2, -1) % (tokens // 2) >= (tokens - supervised) // 2
    batch = {
        "input_ids": torch.randint(3, words, (2, tokens // 2)),
        "attention_mask": mask,
        "use_cache": False,
    }
    batch |= {
        "labels": answers.long(),
        "logits_to_keep": answers,
        "shift_labels": torch.ones(supervised).long(),
    }
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(**batch)
    counted = sum(
        tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in owned
    )
    logits = supervised * words * 14
    expected = chosen - fixed - logits
    if checkpointing:  # the layer that the backward pass computes again is not there yet
        expected -= (off - fixed - logits) / layers
    # outside of the layers: the softmax, which is the part of the logits that is kept, and the last norm's input
    assert counted == pytest.approx(
        expected + 4 * supervised * words + 4 * tokens * hidden, rel=0.1
    )


if __name__ == "__main__":
    serve_runner()
