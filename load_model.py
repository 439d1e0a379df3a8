"""Step 3 of 4: download Qwen2-VL-2B-Instruct, verify it, load it, and show what it is.

Reads   the model's files on ModelScope or Hugging Face.
Writes  Qwen/Qwen2-VL-2B-Instruct/ (4.4 GB), and in it .complete.json with the SHA-256 of each file.
Run     python load_model.py
Takes   6 minutes at 100 Mbit/s, and 5 GB of memory; 10 s and no network once all files are there.

Stop it whenever you like: the next run resumes. The dense models of Qwen2-VL, Qwen2.5-VL and
Qwen3-VL work: set MODEL_ID here, and MODEL_FOLDER in train.py.
"""

import builtins
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from textwrap import shorten
from types import FrameType
from typing import IO, Annotated, Literal, NamedTuple, NoReturn, get_type_hints
from urllib.parse import urlsplit

# The clients of the two hubs read these while they are imported. Values set in the shell win.
os.environ.setdefault("MODELSCOPE_DOWNLOAD_TIMEOUT", "30")  # seconds without a byte
os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", "43200")  # seconds for a file: 12 h
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "30")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import httpx2
import huggingface_hub
import modelscope_hub
import psutil
import requests
import socksio
import torch
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers
from PIL import Image, ImageOps
from pydantic import AfterValidator, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Counts = Annotated[list[PositiveInt], Field(min_length=1)]
PathText = Annotated[str, AfterValidator(lambda path: check_path(path))]
ModelId = Annotated[str, AfterValidator(lambda name: check_model_id(name))]
ImageSide = Annotated[int, Field(ge=56, le=3584, multiple_of=28)]  # a token is 28 x 28 pixels

# --------------------------------------------------------------------------------------------------
# Download
# Hugging Face has mirrors: set HF_ENDPOINT in the shell, such as HF_ENDPOINT=https://hf-mirror.com
HUB: Literal["modelscope", "huggingface"] = "modelscope"
MODEL_ID: ModelId = "Qwen/Qwen2-VL-2B-Instruct"  # owner/name, the same on both hubs
REVISION: Text | None = None  # branch, tag or commit; None: the hub's default branch
MODEL_FOLDER: PathText = MODEL_ID  # the files go here; the same as in train.py
RECORD_FILE: Text = ".complete.json"  # in MODEL_FOLDER; delete it to look for a newer version
CACHE_FOLDER: PathText = ".cache/load_model"  # locks: two runs must not write to one file
# Neither pickles nor code: loading them would run what is in them
WANTED_FILES: Texts = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.md", "LICENSE"]
DOWNLOAD_THREADS: PositiveInt = 4  # files at a time

# A look at an image
IMAGE_FOLDER: PathText = "coco_2014_caption"  # its first image is captioned, if there is a GPU
QUESTION: Text = "Describe this image in one sentence."

# The training whose memory is estimated
IMAGE_SIZE: ImageSide = 280  # side in pixels, as in train.py; (side / 28)^2 tokens
BATCH_SIZES: Counts = [1, 2, 4, 8, 16]  # images per forward pass
LORA_RANK: PositiveInt = 64  # as in train.py
TEXT_TOKENS: PositiveInt = 26  # tokens around an image: chat template and question
ANSWER_TOKENS: PositiveInt = 70  # tokens with a loss; COCO has five captions of about 14
# --------------------------------------------------------------------------------------------------

# Each model_type in config.json that works, and its name
FAMILIES = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
# What the name of a quantised model ends in: -AWQ, -GPTQ-Int4, -FP8, -unsloth-bnb-4bit, ...
QUANTISED = re.compile(r"(-unsloth)?-(AWQ|GPTQ|FP8|NVFP4|MXFP4|bnb|Int[48]|[48]bit)\b.*$", re.I)
# What both hubs' clients can use, and the port where an address names none
PROXY_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}

# ---- Shared with the other scripts


def check_path(path: str) -> str:
    """Expand ~ in a path constant, and refuse text that can't be a path here."""
    # "e:\new" is a line break between "e:" and "ew": Python reads \n as one character
    if not path.strip() or any(ord(character) < 32 for character in path):
        raise ValueError(r'it should be a path, such as "e:/LLM/new" or r"e:\LLM\new"')
    if os.name != "nt" and PureWindowsPath(path).drive:
        raise ValueError("it should be a path of this system, which has no drives")
    return os.path.expanduser(path)


def check_constants() -> None:
    """Stop with one sentence if a constant at the top has an impossible value."""
    script = sys.modules[__name__]
    for name, rule in get_type_hints(script, include_extras=True).items():
        value = getattr(script, name)
        try:
            checked = TypeAdapter(rule, config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            reasons = [each["msg"].removeprefix("Value error, ") for each in error.errors()]
            reason = re.sub(r"\b(Input|String|List) should", "it should", " or ".join(reasons))
            raise SystemExit(
                f"{name} = {value!r} at the top of {Path(__file__).name} can't work: {reason}."
            ) from None
        setattr(script, name, checked)  # a path with ~ expanded, all else as it was


def prepare_console() -> None:
    """Let print and progress bars work on every console: code pages, notebooks, pythonw."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # pythonw.exe has no console
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # a notebook's stream has no such method
            # line by line, or what was printed to a log file is lost when the script is stopped
            stream.reconfigure(errors="replace", line_buffering=True)


def handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    """Call handler on Ctrl-C, kill, a closed terminal, and Ctrl-Break on Windows."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)  # Windows lacks SIGHUP, the others SIGBREAK
        # nohup ignores SIGHUP on purpose: leave it ignored
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """End the script at once, without waiting for its threads."""
    if number == signal.SIGINT and "get_ipython" in dir(builtins):
        raise KeyboardInterrupt  # ends a notebook's cell, and not the notebook
    with contextlib.suppress(OSError):  # pythonw.exe and a closed terminal take no text
        os.write(2, b"\nStopped. Finished files are kept. Run again to continue.\n")
    os._exit(128 + number)


def check_writable(folder: str | Path) -> None:
    """Make a folder, and stop with one sentence if nothing can be written to it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise SystemExit(
            f"Can't write to {Path(folder).absolute()} ({reason}). "
            f"Choose another folder at the top of {Path(__file__).name}."
        ) from None


@contextlib.contextmanager
def write_atomically(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file that replaces path once it is whole and on the disk."""
    unfinished = Path(f"{path}.tmp")
    encoding = None if "b" in mode else "utf-8"
    newline = None if "b" in mode else "\n"
    try:
        with open(unfinished, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave an empty file under the new name
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


# ---- The hubs


def check_model_id(name: str) -> str:
    """Refuse text that can't be a model's name on a hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError('it should be owner/name, such as "Qwen/Qwen2-VL-7B-Instruct"')
    return name


class RemoteFile(NamedTuple):
    """A file of the model as a hub lists it, with the one hash that the hub knows, or none."""

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None = None  # git's name for a small file, see is_whole


class ModelScope:
    """What is asked of ModelScope. Its client resumes, retries and verifies by itself."""

    title = "ModelScope"
    branch = "master"
    errors = (modelscope_hub.HubError, OSError)

    def __init__(self) -> None:
        """Use the address in MODELSCOPE_ENDPOINT, or ModelScope's own."""
        config = modelscope_hub.HubConfig()
        self.url = config.endpoint
        self.client = modelscope_hub.HubApi(config)
        self.revision = REVISION or self.branch

    def list_files(self) -> list[RemoteFile]:
        """Return all files of the repository."""
        listed = self.client.list_repo_files(MODEL_ID, "model", revision=self.revision)
        return [RemoteFile(each.path, each.size, each.sha256) for each in listed if not each.is_dir]

    def download(self, file: RemoteFile) -> None:
        """Download and verify one file."""
        self.client.download_file(
            MODEL_ID,
            "model",
            file.path,
            revision=self.revision,
            local_dir=MODEL_FOLDER,
            cache_dir=CACHE_FOLDER,
            file_size=file.size,
            expected_sha256=file.sha256,
        )


class HuggingFace:
    """What is asked of Hugging Face.

    hf_hub_download of its client drops what a killed run had downloaded, and verifies no hash.
    """

    title = "Hugging Face"
    branch = "main"
    errors = (
        httpx2.HTTPError,
        huggingface_hub.errors.HFValidationError,
        socksio.SOCKSError,
        OSError,
    )

    def __init__(self) -> None:
        """Use the address in HF_ENDPOINT, or Hugging Face's own."""
        self.url = huggingface_hub.constants.ENDPOINT
        # Bytes until they are written: the default, 10 MB, are lost where a connection breaks
        huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 2**16
        self.client = huggingface_hub.HfApi()
        self.revision = REVISION or self.branch

    def list_files(self) -> list[RemoteFile]:
        """Return all files of the repository."""
        model = self.client.model_info(
            MODEL_ID,
            revision=self.revision,
            files_metadata=True,
            timeout=huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )
        # The files come from this commit, even if the branch moves on meanwhile
        self.commit = model.sha or self.revision
        files = []
        for each in model.siblings:
            if each.lfs:  # git LFS keeps large files, by their SHA-256
                files.append(RemoteFile(each.rfilename, each.lfs.size, each.lfs.sha256))
            else:
                files.append(RemoteFile(each.rfilename, each.size, None, each.blob_id))
        return files

    def download(self, file: RemoteFile) -> None:
        """Download and verify one file; give up after four failures in a row without progress."""
        target = Path(MODEL_FOLDER, file.path)
        unfinished = Path(f"{target}.incomplete")
        lock = Path(CACHE_FOLDER, f"{file.path}.lock")
        for folder in (target.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        failures = 0
        with WeakFileLock(lock):
            while not is_whole(target, file):  # another run may have brought it meanwhile
                before = file_size(unfinished)
                try:
                    self.receive(file, unfinished)
                    os.replace(unfinished, target)
                    return
                except (OSError, httpx2.ReadError) as error:
                    failures = 0 if file_size(unfinished) > before else failures + 1
                    status = http_status(error)
                    # A full disk, or a file that isn't there, will be so the next time
                    if failures == 4 or getattr(error, "errno", None) or (status and status < 500):
                        raise
                    tqdm.write(f"{file.path} ({brief(error)}), retrying", file=sys.stderr)
                    time.sleep(failures)

    def receive(self, file: RemoteFile, unfinished: Path) -> None:
        """Append what is missing to a file; OSError if it is another one then."""
        if file_size(unfinished) > file.size:
            unfinished.unlink()
        headers = build_hf_headers()
        headers["Accept-Encoding"] = "identity"  # compressed bytes can't be appended
        with open(unfinished, "ab") as output:
            http_get(
                huggingface_hub.hf_hub_url(MODEL_ID, file.path, revision=self.commit),
                output,
                resume_size=output.tell(),
                headers=headers,
                expected_size=file.size,
                displayed_filename=file.path,
            )
        if not is_whole(unfinished, file):
            unfinished.unlink()
            raise OSError("Hash mismatch: what arrived is not what the hub lists")


Hub = ModelScope | HuggingFace


# ---- Words for errors


def brief(error: Exception | str) -> str:
    """Return an error's text in one line, without the password that an address may hold."""
    return shorten(re.sub(r"://[^/\s@]+@", "://", str(error) or repr(error)), 300)


def http_status(error: Exception) -> int | None:
    """Return the status of the answer that a client's error is about, None without an answer."""
    response = getattr(error, "response", None)
    return getattr(error, "status_code", None) or getattr(response, "status_code", None)


def check_proxy(url: str) -> str:
    """Return which variable sets the proxy for an address, "" if none does.

    Raise OSError if that proxy can't work: the clients' own errors don't say where it came from.
    """
    proxies = requests.utils.get_environ_proxies(url)
    proxy = requests.utils.select_proxy(url, proxies)
    if not proxy:
        return ""
    names = [
        name for name, value in os.environ.items() if value == proxy and "proxy" in name.lower()
    ]
    source = " and ".join(names) or "the system's settings"
    address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    shown = f"{address.scheme}://{address.netloc.rpartition('@')[2]}"  # without a password
    if address.scheme not in PROXY_PORTS or not address.hostname:
        kinds = ", ".join(PROXY_PORTS)
        raise OSError(f"the proxy {shown} in {source} should begin with one of {kinds}")
    try:
        port = address.port or PROXY_PORTS[address.scheme]
        socket.create_connection((address.hostname, port), timeout=10).close()
    except (OSError, ValueError) as error:  # ValueError: the port is not a number
        raise OSError(f"the proxy {shown} in {source} doesn't answer ({brief(error)})") from None
    return source


def explain(hub: Hub, error: Exception, proxy: str) -> str:
    """Say why the hub gave no list of files, and what to change."""
    if http_status(error) in (401, 403, 404):
        return (
            f"Check MODEL_ID = {MODEL_ID!r} and REVISION = {REVISION!r}: {hub.title} has no such "
            f"model, or not for you ({brief(error)})."
        )
    way = f" through the proxy in {proxy}" if proxy else ""
    return (
        f"{hub.title} ({brief(hub.url)}) can't be reached{way}: {brief(error)}. Check the network "
        f"and run again to resume, or set HUB = {other_hub()}."
    )


def other_hub() -> str:
    """Return the value of HUB that may work where this one doesn't."""
    return '"huggingface"' if HUB == "modelscope" else '"modelscope"'


# ---- The files on the disk


def file_size(path: Path) -> int:
    """Return the bytes of a file, 0 if it is missing."""
    return path.stat().st_size if path.is_file() else 0


def is_whole(path: Path, file: RemoteFile, bar: tqdm | None = None) -> bool:
    """Return whether path holds the listed file, by its size and by the hash that the hub gave."""
    if not path.is_file() or file_size(path) != file.size:
        return False
    digest = hashlib.sha256()
    expected = file.sha256
    if not file.sha256 and file.git_sha1:
        # git hashes a header and the content
        digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
        expected = file.git_sha1
    with open(path, "rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
            if bar is not None:
                bar.update(len(piece))
    return expected in (None, digest.hexdigest())


def find_damage(files: list[RemoteFile]) -> list[RemoteFile]:
    """Return the files that MODEL_FOLDER lacks, or holds with another size or hash."""
    damaged = []
    total = sum(file_size(Path(MODEL_FOLDER, file.path)) for file in files)
    if total == 0:
        return files  # nothing is there yet
    with tqdm(total=total, desc=f"verifying {MODEL_FOLDER}", unit="B", unit_scale=True) as bar:
        for file in files:
            if not is_whole(Path(MODEL_FOLDER, file.path), file, bar):
                damaged.append(file)
    return damaged


def read_record() -> list[RemoteFile] | None:
    """Return the files of a finished download, None without one; stop if it is another model's."""
    try:
        record = json.loads(Path(MODEL_FOLDER, RECORD_FILE).read_text(encoding="utf-8"))
        model, revision = record["model"], record["revision"]
        files = [RemoteFile(name, **entry) for name, entry in record["files"].items()]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, LookupError, TypeError, AttributeError):
        return None  # a damaged record: the hub is asked again
    # The default branches of both hubs hold the same files
    revisions = [REVISION] if REVISION else [ModelScope.branch, HuggingFace.branch]
    if model != MODEL_ID or revision not in revisions:
        raise SystemExit(
            f"{MODEL_FOLDER} holds {model} ({revision}), which is not what MODEL_ID and REVISION "
            f"say. Change MODEL_FOLDER, or delete {RECORD_FILE} in it to replace that model."
        )
    return files


def write_record(hub: Hub, files: list[RemoteFile]) -> None:
    """Record the size and SHA-256 of each file, by which the next run knows a whole model."""
    entries = {}
    for file in files:
        with open(Path(MODEL_FOLDER, file.path), "rb") as opened:
            sha256 = file.sha256 or hashlib.file_digest(opened, "sha256").hexdigest()
        entries[file.path] = {"size": file.size, "sha256": sha256}
    record = {"model": MODEL_ID, "revision": hub.revision, "files": entries}
    try:
        with write_atomically(Path(MODEL_FOLDER, RECORD_FILE)) as output:
            json.dump(record, output, indent=2)
    except OSError as error:  # a folder that others share with you may be read-only
        print(f"Can't write {RECORD_FILE} ({error.strerror}): the next run asks the hub again.")


# ---- Download


def is_filled_by_hand() -> bool:
    """Return whether the folder looks like a model that somebody copied there."""
    folder = Path(MODEL_FOLDER)
    if any(folder.rglob("*.incomplete")):
        return False  # a download that was stopped
    return file_size(folder / "config.json") > 0 and any(folder.glob("*.safetensors"))


def list_wanted(hub: Hub) -> list[RemoteFile]:
    """Return the repository's files that match WANTED_FILES; stop if one would leave the folder."""
    print(f"Asking {hub.title} for the files of {MODEL_ID} ({hub.revision}).", flush=True)
    wanted = {}
    total = 0
    try:
        for file in hub.list_files():
            path = PureWindowsPath(file.path)  # knows both slashes, and drives
            # A folder that this script filled, and somebody uploaded, has a RECORD_FILE
            if path.name == RECORD_FILE or not any(fnmatch(file.path, p) for p in WANTED_FILES):
                continue
            if path.anchor or ".." in path.parts:
                raise SystemExit(f"{MODEL_ID} has {path}, which would land outside the folder.")
            wanted[file.path] = file
            total += file.size
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        if http_status(error) or isinstance(error, huggingface_hub.errors.HFValidationError):
            raise  # the hub's own refusal, or its client's
        raise OSError("its answer is not a list of files. Is a login needed first?") from None
    if "config.json" not in wanted:
        raise SystemExit(
            f"{MODEL_ID} ({hub.revision}) has no config.json among WANTED_FILES, so it can't be "
            f"loaded. Check MODEL_ID, REVISION and WANTED_FILES."
        )
    print(f"{len(wanted)} files, {total / 1e9:.2f} GB in all.", flush=True)
    return list(wanted.values())


def download(hub: Hub, wanted: list[RemoteFile]) -> None:
    """Download what is missing or differs, and record a whole folder."""
    missing = find_damage(wanted)
    if missing:
        for folder in (MODEL_FOLDER, CACHE_FOLDER):
            check_writable(folder)
        # A model that can't be trained is refused before its weights are downloaded
        fetch(hub, [file for file in missing if file.path == "config.json"])
        check_config()
        check_space(missing)
        fetch(hub, missing)
    write_record(hub, wanted)
    print(f"{MODEL_FOLDER} is complete: each file is as {hub.title} lists it.", flush=True)


def check_space(missing: list[RemoteFile]) -> None:
    """Stop if the disk is too small for what is still to be downloaded."""
    needed = 0
    for file in missing:
        needed += max(0, file.size - file_size(Path(MODEL_FOLDER, f"{file.path}.incomplete")))
    free = shutil.disk_usage(MODEL_FOLDER).free
    print(f"{needed / 1e9:.2f} GB to download, {free / 1e9:.0f} GB free on the disk.", flush=True)
    if needed > free:
        raise SystemExit(
            f"Not enough disk space for {MODEL_FOLDER}: {needed / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free. Free some space and run again, or change MODEL_FOLDER."
        )


def fetch(hub: Hub, files: list[RemoteFile]) -> None:
    """Download files side by side; stop with the reasons if some didn't arrive."""
    with ThreadPoolExecutor(DOWNLOAD_THREADS) as pool:
        downloads = {file.path: pool.submit(hub.download, file) for file in files}
        # Without a timeout, Windows would tell the main thread of Ctrl-C only at the end
        while wait(downloads.values(), timeout=0.1).not_done:
            pass
    reasons = []
    numbers = set()
    for path, one in downloads.items():
        try:
            one.result()
        except hub.errors as error:
            reasons.append(f"{path}: {brief(error)}")
            numbers.add(getattr(error, "errno", None))
    if not reasons:
        return
    if numbers & {errno.ENOSPC, errno.EDQUOT}:
        advice = "Free some space on the disk and run again to resume."
    elif numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        advice = "Check the permissions of MODEL_FOLDER and CACHE_FOLDER and run again to resume."
    else:
        advice = f"Run again to resume, or set HUB = {other_hub()}."
    raise SystemExit(
        f"{len(reasons)} of {len(files)} files didn't arrive. {advice} {'; '.join(reasons)}"
    )


def ensure_model() -> None:
    """Leave a whole model in MODEL_FOLDER, without a request if it is there already."""
    recorded = read_record()
    damaged = find_damage(recorded) if recorded else []
    if recorded and not damaged:
        print(f"{MODEL_FOLDER} is complete, and no network is used.", flush=True)
        return
    if damaged:
        names = ", ".join(file.path for file in damaged)
        print(f"Missing or altered, and downloaded again: {names}", flush=True)
    hub = ModelScope() if HUB == "modelscope" else HuggingFace()
    proxy = ""
    try:
        proxy = check_proxy(hub.url)
        wanted = list_wanted(hub)
    except hub.errors as error:
        problem = explain(hub, error, proxy)
        if damaged or not is_filled_by_hand():
            raise SystemExit(problem) from None
        print(f"NOT VERIFIED, {MODEL_FOLDER} is tried as it is. {problem}", flush=True)
        return
    download(hub, wanted)


# ---- The model


def check_config() -> None:
    """Stop if config.json describes a model that train.py can't train."""
    path = Path(MODEL_FOLDER, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("model_type")
        quantised = config.get("quantization_config") or config.get("compression_config")
    except (ValueError, AttributeError):
        raise SystemExit(f"{path} is damaged. Delete it and run again to download it.") from None
    if quantised:
        plain = QUANTISED.sub("", MODEL_ID)
        instead = "the model that it was made from"
        if plain != MODEL_ID:
            instead = f'MODEL_ID = "{plain}"'
        raise SystemExit(
            f"{MODEL_ID} is quantised and can't be trained. Take {instead}, and set "
            f"LOAD_IN_4BIT = True in train.py if the GPU has too little memory for it."
        )
    if kind not in FAMILIES:
        raise SystemExit(
            f"{MODEL_FOLDER} holds a model of type {kind}. Dense models of "
            f"{', '.join(FAMILIES.values())} work: change MODEL_ID and MODEL_FOLDER."
        )


def how_to_repair() -> str:
    """Say what helps if the files are there and are not a model that loads."""
    if read_record():
        # Downloading the same bytes again would change nothing
        return "Its files are as the hub lists them: check MODEL_ID and the installed versions."
    return "Run again with a network to replace missing and damaged files."


def load() -> PreTrainedModel:
    """Return the model on the CPU in the checkpoint's own dtype; stop if a weight is missing."""
    check_config()
    size = 0
    for path in Path(MODEL_FOLDER).glob("*.safetensors"):
        with open(path, "rb") as file:  # safetensors would call a file without rights missing
            size += os.fstat(file.fileno()).st_size
    free = psutil.virtual_memory().available
    # A system that runs out of memory ends the script without a word
    print(f"Loading {size / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free.", flush=True)
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            MODEL_FOLDER,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,  # loading pickles would run code
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if getattr(error, "errno", None):
            raise  # the system's own error, which main() explains
        no_memory = "allocate memory" in str(error)
        advice = "Close other programs and run again." if no_memory else how_to_repair()
        raise SystemExit(f"{MODEL_FOLDER} doesn't load ({brief(error)}). {advice}") from None
    # transformers fills missing weights with random numbers and only warns
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            names = sorted(report[kind])[:5]
            raise SystemExit(f"{MODEL_FOLDER} is not whole: {kind} {names}. {how_to_repair()}")
    return model.eval()


def count_parameters(module: torch.nn.Module) -> int:
    """Return the number of weights; one that two parts share counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def print_parts(model: PreTrainedModel) -> None:
    """Print the parameters of each part, the dtype and the versions."""
    language = model.model.language_model
    embeddings = count_parameters(language.embed_tokens)
    parts = {
        "vision tower with its mergers": count_parameters(model.model.visual),
        "token embeddings": embeddings,
        "language layers": count_parameters(language) - embeddings,
        # 0 where the matrix of the embeddings is the head, too
        "output head": count_parameters(model) - count_parameters(model.model),
    }
    parts["all"] = sum(parts.values())
    for part, count in parts.items():
        print(f"{part:36}{count:>15,} parameters")
    libraries = ("torch", "transformers", "peft", "modelscope", "huggingface_hub")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    print(f"{model.dtype}, every weight in its place; {versions}", flush=True)


# ---- The memory that a training needs

BYTES_PER_WEIGHT = 2  # frozen, in bfloat16
BYTES_IN_4_BIT = 0.5 + 1 / 64 + 4 / 64 / 256  # nf4: 64 weights share a scale, 256 scales another
BYTES_PER_TRAINED = 16  # in float32: weight, gradient, and the two numbers of Adam
BYTES_PER_LOGIT = 14  # in bfloat16, then in float32: upcast, softmax and gradient
# What a layer keeps of a token for the backward pass, counted on a CPU
KEPT_PER_HIDDEN = 52  # bytes for each number of its vector; LoRA's dropout is the largest part
KEPT_PER_INTERMEDIATE = 12  # bytes for each number inside the MLP
KEPT_PER_RANK = 14  # bytes for each rank of LoRA: seven inner vectors in bfloat16
KEPT_OF_INPUT = 2  # bytes for each number of its vector, where checkpointing keeps only that


class Setting(NamedTuple):
    """Two constants of train.py on which the memory depends."""

    title: str
    checkpointing: bool
    four_bits: bool


SETTINGS = [
    Setting("checkpointing", checkpointing=True, four_bits=False),
    Setting("no checkpointing", checkpointing=False, four_bits=False),
    Setting("4 bits, checkpointing", checkpointing=True, four_bits=True),
    Setting("4 bits", checkpointing=False, four_bits=True),
]


def training_memory(
    model: PreTrainedModel, batch_size: int, checkpointing: bool, four_bits: bool = False
) -> float:
    """Return the GiB that a training needs on the GPU, at the peak of a backward pass.

    The vision tower is not in it: train.py lets it see each image once, before the training, and
    takes it off the GPU.
    """
    text = model.config.text_config
    trained = 0
    shrunk = 0
    for module in model.model.language_model.modules():
        if isinstance(module, torch.nn.Linear):  # a projection of a layer; the head is elsewhere
            # LoRA puts two matrices beside it, (rank, in) and (out, rank)
            trained += LORA_RANK * (module.in_features + module.out_features)
            shrunk += module.weight.numel() if four_bits else 0
    frozen = count_parameters(model) - count_parameters(model.model.visual)
    weights = BYTES_PER_WEIGHT * (frozen - shrunk) + BYTES_IN_4_BIT * shrunk
    adapter = BYTES_PER_TRAINED * trained

    tokens = batch_size * (TEXT_TOKENS + (IMAGE_SIZE // 28) ** 2 + ANSWER_TOKENS)
    layer = (
        KEPT_PER_HIDDEN * text.hidden_size
        + KEPT_PER_INTERMEDIATE * text.intermediate_size
        + KEPT_PER_RANK * LORA_RANK
    )
    activations = tokens * text.num_hidden_layers * layer
    if checkpointing:  # inputs of all layers, and the one layer that is just computed again
        inputs = text.num_hidden_layers * KEPT_OF_INPUT * text.hidden_size
        activations = tokens * (inputs + layer)

    # Only where there is a label
    logits = BYTES_PER_LOGIT * batch_size * ANSWER_TOKENS * text.vocab_size
    return (weights + adapter + activations + logits) / 2**30


def free_gpu_memory() -> float | None:
    """Return the GiB that are free on the GPU, None if there is no GPU that can be used."""
    if not torch.cuda.is_available():
        print("There is no CUDA GPU to compare this with.")
        return None
    try:
        return torch.cuda.mem_get_info()[0] / 2**30
    except RuntimeError as error:  # as where another process has the GPU for itself
        print(f"The GPU can't be used: {brief(error)}")
        return None


def print_memory(model: PreTrainedModel) -> None:
    """Print what a training needs, and the largest batch size that fits the GPU at hand."""
    print(f"\nGiB that a training needs (estimate; LoRA rank {LORA_RANK}, {IMAGE_SIZE} pixels):")
    print("batch size | " + " | ".join(f"{setting.title:>21}" for setting in SETTINGS))
    needed = {}
    for batch_size in sorted(BATCH_SIZES):
        for setting in SETTINGS:
            needed[batch_size, setting] = training_memory(
                model, batch_size, setting.checkpointing, setting.four_bits
            )
        cells = " | ".join(f"{needed[batch_size, setting]:21.1f}" for setting in SETTINGS)
        print(f"{batch_size:10} | {cells}")
    free = free_gpu_memory()
    if free is None:
        return
    print(f"{free:.1f} GiB are free on this GPU. The largest batch size that fits:")
    for setting in SETTINGS:
        fitting = [size for size in BATCH_SIZES if needed[size, setting] <= free]
        print(f"{setting.title:>21}: {max(fitting, default='none')}")


# ---- A look at an image


def caption(model: PreTrainedModel, path: Path) -> str:
    """Return what the model says about an image."""
    processor = AutoProcessor.from_pretrained(MODEL_FOLDER, local_files_only=True)
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    image.thumbnail((640, 640))  # a photo of a camera would take gigabytes
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=[prompt], images=[image], return_tensors="pt").to(model.device)
    # The checkpoint brings settings for sampling, which greedy search doesn't have
    sampling = dict.fromkeys(("temperature", "top_p", "top_k"))
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, **sampling)
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    return processor.decode(answer, skip_special_tokens=True).strip()


def print_caption(model: PreTrainedModel) -> None:
    """Let the model caption the first image on the GPU, or say why not."""
    suffixes = (".jpg", ".jpeg", ".png", ".webp")
    images = [path for path in Path(IMAGE_FOLDER).glob("*") if path.suffix.lower() in suffixes]
    if not torch.cuda.is_available():
        print("No image is captioned: there is no CUDA GPU.")
    elif not images:
        print(f"No image is captioned: {IMAGE_FOLDER} holds none. data2csv.py downloads some.")
    else:
        try:
            print(f"{min(images)}: {caption(model.to('cuda'), min(images))}")
        # OSError, ValueError: a damaged image. RuntimeError: CUDA, as when memory runs out
        except (OSError, ValueError, RuntimeError) as error:
            print(f"No image is captioned, though the model is whole: {brief(error)}")


def main() -> None:
    """Download the model if need be, load it, and show what it is, needs and sees."""
    prepare_console()
    handle_stop_signals(stop)
    check_constants()
    try:
        ensure_model()
        model = load()
    except OSError as error:
        if not error.filename:
            raise
        # Not called damage: a new download wouldn't change it
        raise SystemExit(
            f"Can't use {error.filename} ({error.strerror}). "
            f"Check its permissions and its disk, and run again."
        ) from None
    print_parts(model)
    print_memory(model)
    print_caption(model)


if __name__ == "__main__":
    main()
