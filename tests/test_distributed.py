"""train.py in several processes on the CPU: it learns what one learns, stopped, killed, resumed."""

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import TESTS, command, posix, variables
from safetensors.torch import load_file
from support.runs import SMALL, another, read_results, read_state, read_text

pytestmark = pytest.mark.slow

# 6 steps; without dropout, which is drawn in each process anew
SHARED = {**SMALL, "IMAGES_PER_STEP": 8, "LORA_DROPOUT": 0.0}
STEPS = 6
MINUTE = 60  # seconds in which a run must be over when one of its processes is dead or told to stop


def several(processes: int, *more: str) -> list[str]:
    """What stands between python and the script to run it by torchrun, on a port of its own."""
    where = more or ("--standalone",)
    return ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *where]


def accelerated(processes: int, *more: str) -> list[str]:
    """The same for accelerate, which starts them by torchrun's own code."""
    module = ["-m", "accelerate.commands.launch"]
    return [*module, f"--num_processes={processes}", "--main_process_port=0", *more]


def start(
    folder: Path, hub, launcher: list[str], name: str, log: str = "", **constants
) -> subprocess.Popen:
    """Start train.py in a session of its own; it saves to NAME and prints to NAME.log."""
    python, *rest = command("train.py", **{**SHARED, "OUTPUT_FOLDER": name, **constants})
    with open(folder / f"{log or name}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [python, *launcher, *rest],
            cwd=folder,
            env=variables({"OMP_NUM_THREADS": "1", **hub.environment()}),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def end(run: subprocess.Popen, seconds: float) -> int:
    """Wait for the launcher, then see that none of its processes outlives it."""
    # torchrun puts each into a group of its own
    family, deadline = {psutil.Process(run.pid)}, time.monotonic() + seconds
    try:
        while run.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family.update(psutil.Process(run.pid).children(recursive=True))
            assert time.monotonic() < deadline, f"not over after {seconds} seconds"
            time.sleep(0.05)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, f"they outlive the launcher: {alive}"
        return run.returncode
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        run.wait()


def finish(folder: Path, hub, launcher: list[str], name: str, **constants) -> str:
    """Run train.py to its end; return what it printed."""
    code = end(start(folder, hub, launcher, name, **constants), seconds=300)
    printed = read_text(folder / f"{name}.log")
    assert code == 0, printed
    return printed


def wait_for(sign: str, path: Path, run: subprocess.Popen) -> None:
    """Wait until `sign` stands in the file."""
    deadline = time.monotonic() + 200
    while sign not in read_text(path):
        assert run.poll() is None and time.monotonic() < deadline, f"{sign} never came to {path}"
        time.sleep(0.01)


def workers_of(run: subprocess.Popen) -> list[psutil.Process]:
    """The training processes, that of rank 0 first."""
    children = psutil.Process(run.pid).children()
    return sorted(children, key=lambda process: int(process.environ()["RANK"]))


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def losses(folder: Path, name: str) -> list[float]:
    history = read_state(folder, name, STEPS)["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def captions(folder: Path, name: str) -> list[dict]:
    return read_results(folder, name)["captions"]


def assert_learned(folder: Path, name: str) -> None:
    """A run in several processes has learned what one process learned."""
    assert len(losses(folder, "one")) == STEPS
    assert losses(folder, name) == pytest.approx(losses(folder, "one"), abs=1e-3)
    assert captions(folder, name) == captions(folder, "one")
    ours, theirs = (
        load_file(folder / each / "adapter_model.safetensors") for each in (name, "one")
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[key].allclose(theirs[key], atol=1e-3) for key in ours)
    assert not [path for path in files(folder, name) if path.endswith(".tmp")]


def files(folder: Path, name: str) -> list[str]:
    return sorted(str(path.relative_to(folder / name)) for path in (folder / name).rglob("*"))


def recordings(folder: Path) -> int:
    return len(list((folder / "swanlog").glob("run-*")))


@pytest.fixture(scope="module")
def alone(prepared, run_train, tmp_path_factory) -> Path:
    """A folder in which one process has trained; other runs of this file write beside it."""
    folder = another(prepared, tmp_path_factory.mktemp("distributed"))
    done = run_train(folder, **{**SHARED, "OUTPUT_FOLDER": "one"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_two_machines_learn_what_one_learns(alone, served, tmp_path):
    """Two processes share images and captions, by README's commands for machines with one folder.

    One of them speaks and saves. Otherwise losses differ, captions are lost or out of order, or
    files are written by both.
    """
    before, cache = recordings(alone), tmp_path / "features"
    meeting = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    runs = []
    for node in (0, 1):
        launcher = several(1, *meeting, f"--node_rank={node}")
        options = {"log": f"node {node}", "CACHE_FOLDER": str(cache)}
        runs.append(start(alone, served, launcher, "machines", **options))
    codes = [end(run, seconds=300) for run in runs]
    printed, other = (read_text(alone / f"node {node}.log") for node in (0, 1))
    assert codes == [0, 0], printed + other
    assert_learned(alone, "machines")
    ranks = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    names, expected = (
        [path for path in files(alone, name) if Path(path).name not in ranks]
        for name in ("machines", "one")
    )
    assert names == expected
    assert recordings(alone) == before + 1
    assert "Traceback" not in printed + other
    assert "step 1/6 | loss" in printed and "loss" not in other
    assert "Waiting while process 0 checks the data" in other
    # each has seen its half of the images
    assert re.search(r"Seeing images: 100%.* 15/15", printed)
    assert len([path for path in cache.rglob("*") if path.is_file()]) == 30


@posix
def test_one_killed_process_ends_all_and_one_alone_resumes(alone, served, run_train):
    """Machines that wait for a dead one cost money; one GPU can resume what two have saved."""
    run = start(alone, served, several(2), "killed")
    # by then both have written their parts of checkpoint-2
    wait_for("step 3/6 | loss", alone / "killed.log", run)
    workers_of(run)[1].kill()
    assert end(run, MINUTE) != 0 and not (alone / "killed/results.json").exists()
    done = run_train(alone, **{**SHARED, "OUTPUT_FOLDER": "killed"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/6 | loss" not in done.stdout and "step 6/6 | loss" in done.stdout
    assert "Checking records" not in done.stderr
    assert_learned(alone, "killed")


@posix
def test_stopped_by_signals_no_step_is_lost(alone, served):
    """torchrun passes on a scheduler's SIGTERM and Ctrl-C, and gives them 30 seconds to save.

    Whatever starts them next, as many or more, resumes behind the step that was saved.
    """
    last = 0
    launchers = {"SIGTERM": several(2), "SIGINT": accelerated(2, "--multi_gpu")}
    for sent, launcher in launchers.items():
        run = start(alone, served, launcher, "stopped")
        wait_for("| loss", alone / "stopped.log", run)
        run.send_signal(getattr(signal, sent))
        assert end(run, MINUTE) != 0
        printed = read_text(alone / "stopped.log")
        assert "Stopping after this step" in printed, printed
        stopped = int(re.search(r"Stopped at step (\d), which is saved", printed)[1])
        assert last < stopped < STEPS and f"step {last}/6 | loss" not in printed
        last = stopped
    printed = finish(alone, served, several(4), "stopped", GRADIENT_CHECKPOINTING=True)
    assert f"step {last}/6 | loss" not in printed and f"step {last + 1}/6 | loss" in printed
    assert "gradient checkpointing on" in printed
    assert_learned(alone, "stopped")


@posix
def test_a_closed_terminal_loses_no_step(alone, served):
    """torchrun passes on SIGHUP as well."""
    run = start(alone, served, several(2), "closed")
    wait_for("| loss", alone / "closed.log", run)
    run.send_signal(signal.SIGHUP)
    assert end(run, MINUTE) != 0
    printed = read_text(alone / "closed.log")
    stopped = re.search(r"Stopped at step (\d), which is saved", printed)
    assert stopped, printed
    assert (alone / f"closed/checkpoint-{stopped[1]}/trainer_state.json").is_file()


@posix
def test_sharded_and_killed_and_shared_out_anew_they_learn_what_one_learns(alone, served):
    """FSDP is a matter of accelerate's options; another number of processes resumes it.

    4 processes have no equal shares of 6 captions, and end at odds.
    """
    options = ("--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP")
    sharded = str(TESTS / "support/sharded.py")
    two, four = (accelerated(processes, *options, sharded) for processes in (2, 4))
    run = start(alone, served, two, "sharded")
    # by then both have written their parts of checkpoint-2
    wait_for("step 3/6 | loss", alone / "sharded.log", run)
    workers_of(run)[1].kill()
    assert end(run, MINUTE) != 0 and not (alone / "sharded/results.json").exists()
    assert read_text(alone / "sharded.log").count("holds 0.50 of the model") == 2
    printed = finish(alone, served, four, "sharded", BATCH_SIZE=1)
    assert "step 2/6 | loss" not in printed and "step 6/6 | loss" in printed
    assert "Checking records" not in printed
    assert printed.count("holds 0.25 of the model") == 4
    assert_learned(alone, "sharded")


def test_two_processes_use_a_result_as_one_does(alone, served, run_train):
    """They share the captions of CAPTION, and the proof of a merged model; one of them writes."""
    shutil.copytree(alone / "one", alone / "used")
    path = alone / "used/captions.csv"
    options = {"OUTPUT_FOLDER": "used", "CAPTION": "coco_2014_caption"}
    done = run_train(alone, **SHARED, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    by_one = path.read_bytes()
    path.unlink()
    del options["OUTPUT_FOLDER"]
    printed = finish(alone, served, several(2), "used", **options, SAVE_MERGED=True)
    assert path.read_bytes() == by_one
    # 30 images and preview.jpg
    assert printed.count("31 captions are in") == 1
    assert (alone / "used/merged/config.json").is_file()
    assert printed.count("of its captions equal the adapter's") == 1


@pytest.fixture
def start_pair(train_runner, served):
    """A function that begins two processes which nobody watches, as a cluster may start them.

    Rank 1 meets what happens `at` a moment.
    """

    def start_pair(folder: Path, name: str, at: tuple[str, int, str]) -> list:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        runs = []
        for rank in ("0", "1"):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            run = train_runner.start(
                folder,
                {"OMP_NUM_THREADS": "1", **served.environment(), **meeting, **place},
                at=at if rank == "1" else None,
                name=f"{name} {rank}",
                **{**SHARED, "OUTPUT_FOLDER": name},
            )
            runs.append(run)
        return runs

    return start_pair


@posix
@pytest.mark.parametrize("sent", ["SIGKILL", "SIGTERM"])
def test_what_meets_one_process_ends_all(alone, start_pair, train_runner, sent):
    """Without a launcher that watches, a process that is gone or told to stop ends the other.

    Otherwise it waits for ever, and a GPU with it, or a scheduler takes a stopped run for done.
    """
    pair = start_pair(alone, sent, at=("CaptionTrainer.training_step", 3, sent))
    first, second = (train_runner.end(run, MINUTE) for run in pair)
    assert second.returncode == (-signal.SIGKILL if sent == "SIGKILL" else 128 + signal.SIGTERM)
    assert first.returncode == (1 if sent == "SIGKILL" else 128 + signal.SIGTERM), first.stderr
    saved = 2 if sent == "SIGKILL" else 3
    assert (alone / sent / f"checkpoint-{saved}/trainer_state.json").is_file()
    assert not (alone / sent / f"checkpoint-{saved + 1}").exists()


REFUSED = {  # variables of a launcher, and the beginning of the sentence
    "a rank without its GPU": ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK or WORLD_SIZE is set"),
    "a number without its GPU": ({"WORLD_SIZE": "2"}, "RANK or WORLD_SIZE is set"),
    "steps that have no equal shares": (
        {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"},
        "IMAGES_PER_STEP = 8 can't be shared by 3 processes. Set it to a multiple of 3.",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_launches_that_can_not_work_are_refused_at_once(alone, served, train_runner, what):
    """One sentence says it before a process waits for others, or a step has another size."""
    variables, sentence = REFUSED[what]
    environment = {**served.environment(), **variables}
    done = train_runner(alone, environment, **{**SHARED, "OUTPUT_FOLDER": "refused"})
    assert done.returncode == 1
    assert done.stderr.startswith(sentence)
    assert not (alone / "refused").exists()
