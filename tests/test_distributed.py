"""train.py in several processes, started by torchrun on the CPU: what one process learns, stopped, killed, resumed."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import TESTS, command, variables
from safetensors.torch import load_file
from test_chain import SMALL, another, prepared, read_text, same_adapter, served  # noqa: F401, two of them are fixtures

SHARED = {
    **SMALL,
    "GRADIENT_ACCUMULATION": 4,
    "LORA_DROPOUT": 0.0,
}  # 6 steps; dropout is drawn in each process anew
STEPS = 6
MINUTE = (
    60  # seconds in which a run must be over when one of its processes is dead, or told to stop
)


def several(processes: int, *more: str) -> list[str]:
    """What stands between python and the script to run it in several processes: torchrun, on a port of its own."""
    return [
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        *(more or ("--standalone",)),
    ]


def accelerated(processes: int, *more: str) -> list[str]:
    """The same for accelerate, which starts them by torchrun's own code."""
    return [
        "-m",
        "accelerate.commands.launch",
        f"--num_processes={processes}",
        "--main_process_port=0",
        *more,
    ]


def start(folder: Path, hub, launcher: list[str], name: str, **constants) -> subprocess.Popen:
    """Start train.py in a session of its own; what it prints goes to NAME.log, what it makes to NAME."""
    python, *rest = command("train.py", **{**SHARED, "OUTPUT_FOLDER": name, **constants})
    environment = variables({"OMP_NUM_THREADS": "1", **hub.environment()})
    with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        options = {
            "cwd": folder,
            "env": environment,
            "stdout": log,
            "stderr": log,
            "start_new_session": True,
        }
        return subprocess.Popen([python, *launcher, *rest], **options)


def end(run: subprocess.Popen, seconds: float) -> int:
    """Wait for the launcher, then see that none of its processes outlives it; those that do are killed, and told."""
    family, deadline = (
        {psutil.Process(run.pid)},
        time.monotonic() + seconds,
    )  # torchrun's are no group: it parts them
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
    """Run train.py to its end; returns what it printed."""
    code = end(start(folder, hub, launcher, name, **constants), seconds=200)
    printed = read_text(folder / f"{name}.log")
    assert code == 0, printed
    return printed


def wait_for(sign: str, path: Path, run: subprocess.Popen):
    """Wait until `sign` stands in the file."""
    deadline = time.monotonic() + 100
    while sign not in read_text(path):
        assert run.poll() is None and time.monotonic() < deadline, f"{sign} never came to {path}"
        time.sleep(0.01)


def workers_of(run: subprocess.Popen) -> list[psutil.Process]:
    """The training processes, that of rank 0 first."""
    ranks = {
        int(process.environ()["RANK"]): process for process in psutil.Process(run.pid).children()
    }
    return [ranks[rank] for rank in sorted(ranks)]


def losses(folder: Path, name: str) -> list[float]:
    state = json.loads(read_text(folder / name / f"checkpoint-{STEPS}/trainer_state.json"))
    assert state["global_step"] == STEPS
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def captions(folder: Path, name: str) -> list[dict]:
    return json.loads(read_text(folder / name / "results.json"))["captions"]


def files(folder: Path, name: str) -> list[str]:
    return sorted(str(path.relative_to(folder / name)) for path in (folder / name).rglob("*"))


def recordings(folder: Path) -> int:
    return len(list((folder / "swanlog").glob("run-*")))


@pytest.fixture(scope="module")
def alone(prepared, served, tmp_path_factory):  # noqa: F811
    """A folder in which one process has trained; other runs of this file write beside it."""
    folder = another(prepared, tmp_path_factory.mktemp("distributed"))
    finish(folder, served, [], "one")
    return folder


@pytest.mark.parametrize(
    ("launcher", "processes", "checkpointing"),
    [(several(2), 2, False), (several(4), 4, True), (accelerated(2, "--multi_gpu"), 2, False)],
    ids=["torchrun 2", "torchrun 4", "accelerate 2"],
)
def test_several_processes_learn_what_one_learns(alone, served, launcher, processes, checkpointing):  # noqa: F811
    """Guards launchers: other losses, captions out of order or lost, data read and files written by every process."""
    before, name = recordings(alone), f"{launcher[1]} {processes}"
    printed = finish(alone, served, launcher, name, GRADIENT_CHECKPOINTING=checkpointing)
    assert len(losses(alone, "one")) == STEPS and losses(alone, name) == pytest.approx(
        losses(alone, "one"), abs=1e-3
    )
    assert captions(alone, name) == captions(alone, "one")
    with_ranks = {f"rng_state_{rank}.pth" for rank in range(processes)} | {"rng_state.pth"}
    names, expected = (
        [path for path in files(alone, n) if Path(path).name not in with_ranks]
        for n in (name, "one")
    )
    assert names == expected and not [path for path in names if path.endswith(".tmp")]
    assert recordings(alone) == before + 1 and printed.count("Checking: 100%") == 1
    assert "Traceback" not in printed and printed.count("steps of 8 pictures") == 1


def test_passes_that_cannot_be_shared_out_are_refused_in_a_sentence(alone, served):  # noqa: F811
    """Guards the size of a step: 3 passes on 2 processes would be 2 or 4, without a word."""
    code = end(start(alone, served, several(2), "refused", GRADIENT_ACCUMULATION=3), seconds=100)
    printed = read_text(alone / "refused.log")
    assert code != 0 and "GRADIENT_ACCUMULATION = 3: set it to a multiple of 2." in printed
    assert "'eval_loss'" not in printed and not list((alone / "refused").glob("checkpoint-*"))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_one_killed_process_ends_all_and_one_alone_goes_on(alone, served):  # noqa: F811
    """Guards hours of rented machines that wait for a dead one, and checkpoints that only as many cards can read."""
    run = start(alone, served, several(2), "killed")
    wait_for(
        '"trial_params"', alone / "killed/checkpoint-2/trainer_state.json", run
    )  # its last line
    workers_of(run)[1].kill()
    assert end(run, MINUTE) != 0 and not (alone / "killed/results.json").exists()
    printed = finish(alone, served, [], "killed")
    assert (
        2 <= int(re.search(r"6 steps of 8 pictures; at step (\d)", printed)[1]) < STEPS
        and "Checking" not in printed
    )
    assert losses(alone, "killed") == pytest.approx(losses(alone, "one"), abs=1e-3)
    assert captions(alone, "killed") == captions(alone, "one")
    assert not [path for path in files(alone, "killed") if path.endswith(".tmp")]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_stopped_by_signals_no_step_is_lost(alone, served):  # noqa: F811
    """Guards a scheduler's SIGTERM and Ctrl-C: torchrun gets them, passes them on once and gives 30 seconds."""
    last = 0
    for sent in (signal.SIGTERM, signal.SIGINT):
        run = start(alone, served, several(2), "stopped")
        wait_for("'loss'", alone / "stopped.log", run)
        run.send_signal(sent)
        assert end(run, MINUTE) != 0
        printed = read_text(alone / "stopped.log")
        assert "Stopping at the end of this step" in printed, printed
        stopped = int(re.search(r"Stopped at step (\d), which is saved", printed)[1])
        assert last < stopped < STEPS and f"6 steps of 8 pictures; at step {last}\n" in printed
        last = stopped
    assert f"6 steps of 8 pictures; at step {last}\n" in finish(
        alone, served, several(2), "stopped"
    )
    assert losses(alone, "stopped") == pytest.approx(losses(alone, "one"), abs=1e-3)


def test_two_machines_learn_what_one_learns(alone, served):  # noqa: F811
    """Guards README's commands for several machines, each with the same folder: here they are one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}")
    runs = [
        start(alone, served, several(1, *meeting, f"--node_rank={node}"), "machines")
        for node in (0, 1)
    ]
    assert [end(run, seconds=200) for run in runs] == [0, 0], read_text(alone / "machines.log")
    assert losses(alone, "machines") == pytest.approx(losses(alone, "one"), abs=1e-3)
    assert captions(alone, "machines") == captions(alone, "one")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_sharded_and_killed_and_shared_out_anew_they_learn_what_one_learns(alone, served):  # noqa: F811
    """Guards FSDP by accelerate's options alone: 4 processes have no equal shares of 6 captions, and end at odds."""
    options = ("--use_fsdp", "--fsdp_version=2", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP")
    two, four = (
        accelerated(processes, *options, str(TESTS / "support/sharded.py")) for processes in (2, 4)
    )
    run = start(alone, served, two, "sharded")
    wait_for(
        '"trial_params"', alone / "sharded/checkpoint-2/trainer_state.json", run
    )  # its last line
    workers_of(run)[1].kill()
    assert end(run, MINUTE) != 0 and not (alone / "sharded/results.json").exists()
    assert read_text(alone / "sharded.log").count("holds 0.50 of the model") == 2
    printed = finish(alone, served, four, "sharded", EVAL_BATCH_SIZE=1)
    assert (
        2 <= int(re.search(r"6 steps of 8 pictures; at step (\d)", printed)[1]) < STEPS
        and "Checking" not in printed
    )
    assert printed.count("holds 0.25 of the model") == 4
    assert losses(alone, "sharded") == pytest.approx(losses(alone, "one"), abs=1e-3)
    assert captions(alone, "sharded") == captions(alone, "one")
    ours, theirs = (
        load_file(alone / name / "adapter_model.safetensors") for name in ("sharded", "one")
    )
    assert ours.keys() == theirs.keys() and all(
        ours[key].allclose(theirs[key], atol=1e-3) for key in ours
    )
