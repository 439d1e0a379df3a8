"""Run one script many times without paying for its imports each time.

`import torch` and `import transformers` take five seconds, and a test of downloads wants a process
of its own for each run: its own folder, environment, signals and exit code. So one process, the
server, imports the script once. For each run it forks: the child is a process that has imported
everything already. What the script reads from the environment while it is imported, the addresses
and limits of the hubs' clients, is imported anew in the child.

    runner = Runner("load_model.py")
    done = runner(folder, hub.environment(), LORA_RANK=8)  # from start to end
    run = runner.start(folder, hub.environment())  # a run that is under way
    os.kill(run.pid, signal.SIGKILL)
    done = runner.end(run)
    # killed at the start of the third call of a function
    done = runner(folder, hub.environment(), at=("KeptFeatures.write", 3, "SIGKILL"))
    runner.close()

The server reads one line of JSON for each job and answers with one. Windows has no fork: there, a
run is a process as any other, and `start` is not available.
"""

import atexit
import contextlib
import functools
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

with contextlib.suppress(ImportError):  # Windows has none
    import resource

from conftest import TESTS, run_script, variables
from support.launch import load
from support.training import MODEL
from tqdm import tqdm
from tqdm.std import TqdmDefaultWriteLock

# Modules that read the environment while they are imported, below the script itself
REREAD = ("modelscope_hub",)


class Run(NamedTuple):
    """A run under way: its process, and where it prints to."""

    pid: int
    out: Path
    err: Path


class Runner:
    """The process that imported a script, seen from a test."""

    def __init__(self, script: str, environment: dict[str, str]):
        self.script = script
        self.variables = dict(os.environ)
        if os.name == "nt":
            return
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.fork_runner", script],
            cwd=TESTS,
            # Prints are buffered as at a user's, whatever this test run's environment says
            env={**variables(environment), "PYTHONUNBUFFERED": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        self.process.stdout.readline()  # "ready"

    def ask(self, **job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        work: Path,
        env: dict[str, str | None],
        hold: str = "",
        ignore: tuple[str, ...] = (),
        at: tuple[str, int, str] | None = None,
        name: str = "",
        **constants,
    ) -> Run:
        """Begin a run in the folder `work`; a variable in `env` that is None is unset.

        At the function named by `hold` it waits until a signal ends it. The signals in `ignore`
        are ignored from the start, as nohup does with SIGHUP. What happens `at` a moment is a
        function, the number of its call, and a signal that it sends itself, or "full disk", which
        lasts for that call. Two runs in one folder print to files of different names.
        """
        # What a test has set since the server started
        changed = dict(os.environ.items() - self.variables.items())
        name = name or work.name
        out, err = work.with_name(f"{name}.out"), work.with_name(f"{name}.err")
        for path in (out, err):
            path.write_text("")  # else a test could read what the run before has printed
        pid = self.ask(
            cwd=str(work),
            env={**changed, **env},
            hold=hold,
            ignore=ignore,
            at=at,
            constants=constants,
            out=str(out),
            err=str(err),
        )
        return Run(pid, out, err)

    def end(self, run: Run, timeout: float = 60) -> subprocess.CompletedProcess:
        """Wait for the end of a run; after `timeout` seconds it is killed."""
        code = self.ask(wait=run.pid, timeout=timeout)
        out, err = (path.read_text("utf-8", "replace") for path in (run.out, run.err))
        return subprocess.CompletedProcess([], code, out, err)

    def __call__(self, work: Path, env: dict[str, str], **constants) -> subprocess.CompletedProcess:
        if os.name == "nt":
            return run_script(self.script, work, env, **constants)
        return self.end(self.start(work, env, **constants))

    def close(self) -> None:
        if os.name != "nt":
            self.process.stdin.close()
            assert self.process.wait(10) == 0


@functools.cache
def shared_runner(script: str) -> Runner:
    """The process that imported a script, for the tests of all modules; it ends with them."""
    runner = Runner(script, {"PYTHONPATH": str(TESTS / "support/guard")})
    atexit.register(runner.close)
    return runner


# The server


def serve(script: str) -> None:
    """Answer the jobs on stdin, one line each."""
    # a lock that all forks share would stay locked when one of them is killed while it has it
    TqdmDefaultWriteLock.mp_lock = None
    tqdm.monitor_interval = 0  # no thread of the server may have the other lock when it forks
    module = load(script, [])
    if script == "load_model.py":  # the first model that is loaded imports much
        module.torch.set_num_threads(1)  # a fork has none of its parent's threads
        module.AutoModelForImageTextToText.from_pretrained(MODEL)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(reap(job["wait"], time.monotonic() + job["timeout"]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            # Never back into this loop, not even by an error of this file
            shown = os.dup(2)
            try:
                os._exit(run(script, job))
            except BaseException:
                os.write(shown, traceback.format_exc().encode())
            finally:
                os._exit(99)
    os._exit(0)  # at once: to take down what was imported takes seconds


def run(script: str, job: dict) -> int:
    """Be the run, in a child of the server; return its exit code."""
    os.chdir(job["cwd"])
    for name, value in job["env"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for number, path in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    # As at a user's; these tests may themselves run under nohup, which ignores SIGHUP
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for name in job["ignore"]:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    for name in [name for name in sys.modules if name.partition(".")[0] in REREAD]:
        del sys.modules[name]
    if "huggingface_hub" in sys.modules:
        importlib.reload(importlib.import_module("huggingface_hub.constants"))
    try:
        constants = [f"{name}={json.dumps(value)}" for name, value in job["constants"].items()]
        module = load(script, constants)
        if job["hold"]:
            setattr(module, job["hold"], wait_for_a_signal)
        if job["at"]:
            disturb(module, *job["at"])
        module.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    threading._shutdown()  # wait for threads, as the interpreter does at its end
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def wait_for_a_signal(*_) -> None:
    """Wait for ever, in short pauses: a signal that comes just before a long one doesn't end it."""
    while True:
        time.sleep(0.05)


def disturb(module, name: str, number: int, what: str) -> None:
    """Let a signal or a full disk meet one call of a function, such as KeptFeatures.write."""
    *owners, last = name.split(".")
    for owner in owners:
        module = getattr(module, owner)
    function, calls = getattr(module, last), itertools.count(1)

    def disturbed(*args, **kwargs):
        if next(calls) != number:
            return function(*args, **kwargs)
        if what == "full disk":
            with full_disk():
                return function(*args, **kwargs)
        os.kill(os.getpid(), getattr(signal, what))
        return function(*args, **kwargs)

    setattr(module, last, disturbed)


@contextlib.contextmanager
def full_disk():
    """Let files end where they would on a full disk: after a few bytes, by an OSError."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def reap(pid: int, deadline: float) -> int:
    """Wait for a run and return its exit code; kill it after the deadline."""
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(done[1])


if __name__ == "__main__":
    serve(sys.argv[1])
    os._exit(0)  # to take down torch and the like takes seconds
