"""SwanLab's faults against train.py: it trains on, ends by itself, and says how to catch up.

Also: what SwanLab's server learns of this machine, and what its dashboard shows.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import TESTS, command, variables
from support.scenes import all_scenes, draw, terse
from support.training import MODEL, about, write_records
from tools.make_assets import browse, dashboard, find_browser

pytestmark = pytest.mark.slow  # each run of train.py takes some ten seconds

KEY = "key" + "5wanlab0" * 4  # looks like one; no file and no line may hold it
OUTPUT = Path("output/Qwen2-VL-2B")
SMALL = {  # constants of train.py for a run of seconds: 12 images to train on, 4 steps
    "IMAGE_SIZE": 112,
    "TEST_IMAGES": 2,
    "IMAGES_PER_STEP": 3,
    "EPOCHS": 1,
    "LEARNING_RATE": 0.01,
    "LOG_STEPS": 1,
    "MAX_NEW_TOKENS": 12,
    "SWANLAB_TIMEOUT": 5,
}
STEPS = 4
PATIENCE = 120  # seconds until a run counts as held up for ever; alone it takes 10 to 20


class Cloud:
    """SwanLab's server as far as its client asks, on 127.0.0.1.

    Everything sent to it lies in `received`. From the request on that contains `sign`, it keeps
    silent ("freeze") or hangs up ("drop"), until heal() is called.
    """

    def __init__(self, key: str = KEY, fault: str = "", sign: str = ""):
        self.key, self.fault, self.sign = key, fault, sign
        self.received: list[tuple[str, str]] = []  # (path, body)
        self.experiments: dict[str, str] = {}  # id: state
        self.faulty, self.healed = threading.Event(), threading.Event()
        handler = type("Handler", (Handler,), {"cloud": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def heal(self) -> None:
        self.fault = ""
        self.healed.set()

    def answer(self, path: str, body: str) -> tuple[int, object]:
        """Return the status and the JSON for a request."""
        if path == "/api/login/api_key":
            account = {
                "sid": "a session",
                "expiredAt": "2099-01-01T00:00:00.000Z",
                "userInfo": {"username": "me"},
            }
            return 200, account
        if path.endswith("/experiment"):
            cuid = json.loads(body)["cuid"]
            status = 200 if cuid in self.experiments else 201
            self.experiments[cuid] = "RUNNING"
            return status, {
                "cuid": cuid,
                "slug": cuid,
                "name": "one",
                "createdAt": "2026-01-01T00:00:00.000Z",
            }
        if path.endswith("/state"):
            self.experiments[path.split("/")[-2]] = json.loads(body)["state"]
        if path == "/api/resources/presigned/put":
            return 200, {"urls": [f"{self.url}/media/{name}" for name in json.loads(body)["paths"]]}
        project = {
            "cuid": "p",
            "name": "p",
            "path": "/me/p",
            "version": 1,
            "_count": {"experiments": 0},
        }
        return 200, {**project, "group": {"username": "me"}}


class Handler(BaseHTTPRequestHandler):
    """Note a request in the cloud, then answer it or fail as the cloud is told to."""

    protocol_version, cloud = "HTTP/1.1", None

    def reply(self) -> None:
        path = urlsplit(self.path).path
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode("utf-8", "replace")
        cloud = self.cloud
        cloud.received.append((path, body))
        if cloud.fault and cloud.sign in path + body:
            cloud.faulty.set()
        if cloud.fault and cloud.faulty.is_set():
            self.close_connection = True
            if cloud.fault == "freeze":
                cloud.healed.wait(300)
            return
        status, answer = cloud.answer(path, body)
        if path == "/api/login/api_key" and self.headers["authorization"] != cloud.key:
            status, answer = 401, {"code": "unauthorized", "message": "invalid key"}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = reply

    def log_message(self, *_) -> None:
        pass


@dataclass
class Case:
    """A run of train.py with something special around it."""

    constants: dict = field(default_factory=dict)
    environment: dict = field(default_factory=dict)
    cloud: dict | None = None  # arguments of Cloud; None: there is none
    says: list[str] = field(default_factory=list)  # on the terminal
    code: int = 0
    interrupt: bool = False  # Ctrl-C in the middle of training
    blocked: bool = False  # a file is where train.py has to make a folder
    small_disk: bool = False  # the disk of swanlog/ fills up in the middle of training


ONLINE = {"SWANLAB_MODE": "online"}
FALLS_BACK = ["SwanLab does not start in mode online", "swanlab sync"]
WRONG = {"SWANLAB_PROJECT": "mine", "SWANLAB_EXPERIMENT": "x", "SWANLAB_RUN": "x"}
POSIX_CASES = {
    # a frozen server at the end, when it was the user who ended it
    "Ctrl-C": Case(
        constants={**ONLINE, "EPOCHS": 50},
        cloud={"fault": "freeze", "sign": "/state"},
        says=["which is saved. Run again to resume"],
        code=130,
        interrupt=True,
    ),
    "disk full": Case(
        constants={"SWANLAB_MODE": "local"},
        says=["the disk is full now"],
        small_disk=True,
    ),
}
CASES = {
    "all is well": Case(cloud={}, says=["View run"]),
    "not logged in": Case(constants=ONLINE, says=FALLS_BACK),
    "wrong key": Case(cloud={"key": "another"}, says=FALLS_BACK),
    "no network": Case(environment={"SWANLAB_API_KEY": KEY}, says=FALLS_BACK),
    "frozen at the start": Case(cloud={"fault": "freeze"}, says=FALLS_BACK),
    "network lost": Case(
        cloud={"fault": "drop", "sign": "eval/loss"},
        says=["SwanLab did not finish"],
    ),
    "frozen at the end": Case(
        cloud={"fault": "freeze", "sign": "/state"},
        says=["SwanLab did not finish"],
    ),
    # transformers' documentation advises the first one; the encoding is that of a Western console
    "wrong variables": Case(
        environment={
            **WRONG,
            "SWANLAB_MODE": "Offline",
            "PYTHONUTF8": "0",
            "PYTHONIOENCODING": "cp1252",
        },
        says=[f"SwanLab can't read the environment variable {name}" for name in WRONG]
        + ["SwanLab can't read the environment variable SWANLAB_MODE", "swanlab watch"],
    ),
    "offline": Case(environment={"SWANLAB_MODE": "offline"}, says=["swanlab sync"]),
    "machine shared": Case(constants={"SHARE_MACHINE_INFO": True}, cloud={}, says=["View run"]),
    "training fails": Case(cloud={}, says=["can't be written"], code=1, blocked=True),
} | (POSIX_CASES if os.name == "posix" else {})
# Of train.py; logging's own "Call stack:" of a message that found no room on the disk is none
TRACEBACK = re.compile(
    r'Traceback \(most recent call last\):\n(?: .*\n)*? +File "[^"\n]*train\.py", line'
)
FINISHED = [name for name, case in CASES.items() if case.code == 0]
SMALL_DISK = """
mkdir swanlog && mount -t tmpfs -o size=4m none swanlog || exit 99
(until grep -q "held-out loss" ../log; do sleep 0.05; done
 cat /dev/zero > swanlog/ballast 2> /dev/null || echo the disk is full now) &
exec "$@"
"""


@dataclass
class Outcome:
    """What a run has left behind."""

    code: int
    printed: str
    folder: Path
    cloud: Cloud | None

    def read(self, name: str) -> dict:
        return json.loads((self.folder / OUTPUT / name).read_text(encoding="utf-8"))


def run(case: Case, work: Path, place: Path) -> Outcome:
    """Run train.py in a copy of `work` inside `place`, and wait for its end, but not for ever."""
    folder, log = place / "work", place / "log"
    shutil.copytree(work, folder)
    cloud = None if case.cloud is None else Cloud(**case.cloud)
    environment = {
        "PYTHONPATH": str(TESTS / "support/guard"),
        "NETWORK_GUARD_LOG": str(place / "refused"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "300",
        "SWANLAB_ROOT": str(place / "nothing"),
        **case.environment,
    }
    if cloud:
        environment |= {"SWANLAB_API_HOST": cloud.url, "SWANLAB_API_KEY": KEY}
    if case.blocked:
        (folder / OUTPUT).mkdir(parents=True)
        (folder / OUTPUT / "kept").touch()
    # constants, and with them errors, that name folders of this machine
    paths = {"OUTPUT_FOLDER": str(folder / OUTPUT), "CACHE_FOLDER": str(folder / "cache")}
    line = command("train.py", **SMALL | paths | case.constants)
    if case.small_disk:
        line = ["unshare", "--map-root-user", "--mount", "sh", "-c", SMALL_DISK, "-", *line]
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            line, cwd=folder, env=variables(environment), stdout=stream, stderr=stream
        )
    if case.interrupt:
        while " | loss " not in read_log(log) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return Outcome(process.returncode, read_log(log), folder, cloud)


def read_log(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder that train.py can start in: 14 scenes with 2 captions each, and the small model."""
    folder, rng = tmp_path_factory.mktemp("prepared"), random.Random(0)
    (folder / "images").mkdir()
    records = []
    for number, scene in enumerate(rng.sample(all_scenes(), 14)):
        name = f"images/{number}.jpg"
        draw(scene, rng, side=112).save(folder / name)
        records += [about(name, caption) for caption in terse(scene)[:2]]
    write_records(folder / "data_vl.json", *records)
    shutil.copytree(MODEL, folder / "Qwen/Qwen2-VL-2B-Instruct")
    return folder


@pytest.fixture(scope="module")
def outcomes(work, tmp_path_factory) -> dict[str, Future]:
    """All cases, at once: much of their time is waiting. The futures give an Outcome each."""
    with pytest.MonkeyPatch.context() as patch:
        # the developer's own
        for name in [name for name in os.environ if name.startswith("SWANLAB_")]:
            patch.delenv(name)
        with ThreadPoolExecutor(os.cpu_count() + 2) as pool:
            futures = {}
            for name, case in CASES.items():
                place = tmp_path_factory.mktemp(name.replace(" ", "_"))
                futures[name] = pool.submit(run, case, work, place)
            yield futures


def can_mount() -> bool:
    """Tell whether a process may have file systems of its own here, without any rights."""
    line = ["unshare", "--map-root-user", "--mount", "true"]
    if not shutil.which("unshare"):
        return False
    return subprocess.run(line, stderr=subprocess.DEVNULL).returncode == 0


def skip_without_disk(name: str) -> None:
    if CASES[name].small_disk and not can_mount():
        pytest.skip("no disk of its own can be mounted here")


@pytest.mark.parametrize("name", CASES)
def test_a_fault_of_swanlab_does_not_stop_a_training(outcomes, name):
    """The training ends as it would without SwanLab, and says what was wrong.

    Otherwise SwanLab asks for a key or waits for a network, and nothing is trained by the morning.
    """
    skip_without_disk(name)
    case, done = CASES[name], outcomes[name].result()
    assert done.code == case.code, done.printed
    for text in case.says:
        assert text in done.printed
    assert not TRACEBACK.search(done.printed)
    assert "Exception ignored" not in done.printed
    assert (done.folder / OUTPUT / "results.json").is_file() == (case.code == 0)
    assert (done.folder / OUTPUT / "report.html").is_file()


@pytest.mark.parametrize("name", FINISHED)
def test_a_fault_of_swanlab_does_not_change_a_training(outcomes, name):
    """Scores and captions are those of a run in which SwanLab works."""
    skip_without_disk(name)
    usual, ours = outcomes["all is well"].result(), outcomes[name].result()
    for part in ("scores", "step"):
        assert ours.read("results.json")[part] == usual.read("results.json")[part]
    said = []
    for outcome in (usual, ours):
        rows = outcome.read("results.json")["captions"]
        said.append([row["fine_tuned"] for row in rows])
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["no network", "network lost", "frozen at the end", "offline"])
def test_the_printed_command_uploads_what_was_not_uploaded(outcomes, name):
    """The advice, followed to the letter, brings all curves, and into one experiment."""
    done = outcomes[name].result()
    advice = re.findall(r"swanlab (sync [^`\n]+)", done.printed)
    assert advice, done.printed
    cloud = done.cloud or Cloud()
    cloud.heal()
    before = len(cloud.received)
    environment = {
        "SWANLAB_API_HOST": cloud.url,
        "SWANLAB_API_KEY": KEY,
        "SWANLAB_ROOT": str(done.folder / "nothing"),
    }
    line = [sys.executable, "-m", "swanlab", *advice[-1].split()]
    subprocess.run(line, env=variables(environment), timeout=60, check=True, capture_output=True)
    assert list(cloud.experiments.values()) == ["FINISHED"], "one experiment, and it is whole"
    sent = " ".join(body for _, body in cloud.received[before:])
    for step in range(1, STEPS + 1):
        assert f'"key": "train/loss", "index": {step},' in sent
    assert "eval/CIDEr" in sent
    assert '"samples"' in sent


@pytest.mark.parametrize("name", CASES)
def test_no_key_is_printed_or_written(outcomes, name):
    """People post logs, results.json and swanlog/ in public."""
    done = outcomes[name].result()
    assert KEY not in done.printed
    for path in done.folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def names_of_this_machine(done: Outcome) -> set[str]:
    """Return what nobody else needs to know."""
    return {
        str(done.folder),
        str(Path.home()),
        f'"{socket.gethostname()}"',
        sys.executable,
        "launch.py",
    }


@pytest.mark.parametrize("name", ["all is well", "training fails"])
def test_the_cloud_learns_no_names_of_this_machine(outcomes, name):
    """Without SHARE_MACHINE_INFO neither the host's name nor a folder's is sent."""
    done = outcomes[name].result()
    states = list(done.cloud.experiments.values())
    assert states == ["FINISHED" if done.code == 0 else "CRASHED"]
    for path, body in done.cloud.received:
        body = body.replace("\\\\", "\\")
        for private in names_of_this_machine(done):
            assert private not in body, f"{path}: {body}"
    [metadata] = done.folder.glob("swanlog/run-*/files/swanlab-metadata.json")
    for private in names_of_this_machine(done):
        assert private not in metadata.read_text(encoding="utf-8")


def test_what_is_shared_on_request(outcomes):
    """SHARE_MACHINE_INFO = True uploads the names. Otherwise the test above could not fail."""
    done = outcomes["machine shared"].result()
    sent = " ".join(body for _, body in done.cloud.received).replace("\\\\", "\\")
    for name in (str(done.folder), f'"{socket.gethostname()}"', sys.executable, "launch.py"):
        assert name in sent


def test_the_dashboard_shows_curves_and_captions(outcomes):
    """`swanlab watch` shows them in a browser, which people open to see whether it works."""
    done = outcomes["wrong variables"].result()
    browser = find_browser()
    if not browser:
        pytest.skip("no Chromium or Chrome here")
    with dashboard(done.folder / "swanlog") as address:
        page = browse(browser, address, "--dump-dom")
    curves = ["train/loss", "train/learning rate", "train/gradient norm", "eval/loss", "eval/CIDEr"]
    for curve in curves:
        assert curve in page, curve
    [texts] = re.findall(r'class="[^"]*text-chart.*?</section>', page, re.DOTALL)
    rows = done.read("results.json")["captions"]
    for row in rows:
        for text in (row["references"][0], row["base"]["text"], row["fine_tuned"]["text"]):
            assert text in texts, "in the table of captions"
            assert page.count(text) > texts.count(text), "and below the images"
    assert page.count("<canvas") >= len(curves)
    assert page.count("data:image/jpeg;base64,") >= len(rows)
