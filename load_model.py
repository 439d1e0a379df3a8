"""Step 3 of 4: download Qwen2-VL-2B-Instruct, verify it, load it, and show what it is.

Reads   the model's files on ModelScope or Hugging Face.
Writes  Qwen/Qwen2-VL-2B-Instruct/ (4.4 GB), and in it .complete.json with the SHA-256 of each file.
Run     python load_model.py; if interrupted, run it again to resume.
Takes   6 minutes at 100 Mbit/s, and 5 GB of memory; 10 s and no network once all files are there.

The dense models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL work: set MODEL_ID here, and MODEL_FOLDER in
train.py.
"""

import builtins
import contextlib
import errno
import functools
import hashlib
import json
import math
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
import urllib3
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers
from PIL import Image, ImageOps
from pydantic import AfterValidator, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

# The rules of the constants; a lambda, because the function stands below them
PathText = Annotated[str, AfterValidator(lambda path: check_path(path))]
ModelId = Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
Text = Annotated[str, Field(min_length=1)]
Patterns = Annotated[list[Text], Field(min_length=1)]
Counts = Annotated[list[PositiveInt], Field(min_length=1)]
Seconds = Annotated[float, Field(gt=0, le=3600)]

# --------------------------------------------------------------------------------------------------
# Download
# Hugging Face has mirrors: set HF_ENDPOINT in the shell, such as HF_ENDPOINT=https://hf-mirror.com
HUB: Literal["modelscope", "huggingface"] = "modelscope"
MODEL_ID: ModelId = "Qwen/Qwen2-VL-2B-Instruct"  # owner/name, the same on both hubs
REVISION: Text | None = None  # branch, tag or commit; None: the hub's default branch
MODEL_FOLDER: PathText = MODEL_ID  # the files go here; the same as in train.py
RECORD_FILE: Text = ".complete.json"  # in MODEL_FOLDER; delete it to look for a newer version
LOCK_FOLDER: PathText = ".cache/load_model"  # two runs must not write to one file
# Neither pickles nor code: loading them would run what is in them
WANTED_FILES: Patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.md", "LICENSE"]
FILE_THREADS: PositiveInt = 4  # files downloaded at the same time
CONNECT_TIMEOUT: Seconds = 10.0  # of a proxy
MAX_RETRIES: PositiveInt = 4  # in a row, of a file of which nothing arrives

# A look at an image
IMAGE_FOLDER: PathText = "coco_2014_caption"  # its first image is captioned, if there is a GPU
QUESTION: Text = "Describe this image in one sentence."
LARGEST_SIDE: PositiveInt = 640  # pixels; a photo of a camera would take gigabytes
CAPTION_TOKENS: PositiveInt = 40  # a caption that does not end by itself is cut here

# The training whose memory is estimated
BATCH_SIZES: Counts = [1, 2, 4, 8, 16]  # images per forward pass
LORA_RANK: PositiveInt = 64  # width of the adapter, usually 8 to 64
IMAGE_TOKENS: PositiveInt = 100  # per image: (IMAGE_SIZE / 28)^2 of train.py's IMAGE_SIZE = 280
TEXT_TOKENS: PositiveInt = 26  # tokens around an image: chat template and question
ANSWER_TOKENS: PositiveInt = 70  # tokens with a loss; COCO has five captions of about 14
# --------------------------------------------------------------------------------------------------

# Each model_type in config.json that works, and its name
SUPPORTED_MODELS = {"qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
# What the name of a quantised model ends in: -AWQ, -GPTQ-Int4, -FP8, -unsloth-bnb-4bit, ...
QUANTISED = re.compile(r"(-unsloth)?-(AWQ|GPTQ|FP8|NVFP4|MXFP4|bnb|Int[48]|[48]bit)\b.*$", re.I)
# Kinds of proxies, and the port where an address names none
PROXY_PORTS = {"http": 80, "https": 443, "socks4": 1080, "socks5": 1080, "socks5h": 1080}

# ---- Shared with the other scripts ---------------------------------------------------------------


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
            # Line by line, or what was printed to a log file is lost when the script is stopped
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


@functools.cache  # thousands of images come from the same few hosts
def check_proxy(url: str) -> str:
    """Return which variables set the proxy for an address, and stop if that proxy can't work.

    The proxy itself is never shown, because it may contain a password.
    """
    proxies = requests.utils.get_environ_proxies(url)
    proxy = requests.utils.select_proxy(url, proxies)
    if not proxy:
        return ""
    names = [name for name in os.environ if name.lower().endswith("_proxy")]
    names = sorted(name for name in names if os.environ[name] == proxy)
    place = " and ".join(names) or "the settings of your system"
    try:
        parts = urllib3.util.parse_url(proxy)
        port = PROXY_PORTS[parts.scheme or "http"]
        address = (parts.host.strip("[]"), parts.port or port)
        socket.create_connection(address, CONNECT_TIMEOUT).close()
    # All but OSError: no such kind, host or port
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "misspelt"
        raise SystemExit(
            f"The proxy in {place} can't be used ({reason}). Write it as http://HOST:PORT or "
            "socks5://HOST:PORT and start it, or delete the setting."
        ) from None
    return place


# ---- The hubs ------------------------------------------------------------------------------------


class RemoteFile(NamedTuple):
    """A file of the model as a hub lists it, with the one hash that the hub knows, or none."""

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None = None  # git's name for a small file, see is_whole


class ModelScope:
    """What is asked of ModelScope. Its client resumes, retries and verifies by itself."""

    title = "ModelScope"
    other = "huggingface"
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
            cache_dir=LOCK_FOLDER,
            file_size=file.size,
            expected_sha256=file.sha256,
        )


class HuggingFace:
    """What is asked of Hugging Face.

    hf_hub_download of its client drops what a killed run had downloaded, and verifies no hash.
    """

    title = "Hugging Face"
    other = "modelscope"
    branch = "main"
    errors = (httpx2.HTTPError, socksio.SOCKSError, HFValidationError, OSError)

    def __init__(self) -> None:
        """Use the address in HF_ENDPOINT, or Hugging Face's own."""
        self.url = huggingface_hub.constants.ENDPOINT
        # Bytes until they are written: the default, 10 MB, are lost where a connection breaks
        huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 2**16
        self.client = huggingface_hub.HfApi()
        self.revision = REVISION or self.branch

    def list_files(self) -> list[RemoteFile]:
        """Return all files of the repository."""
        timeout = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        model = self.client.model_info(
            MODEL_ID, revision=self.revision, files_metadata=True, timeout=timeout
        )
        # The files come from this commit, even if the branch moves on meanwhile
        self.commit = model.sha
        files = []
        for each in model.siblings:
            sha256 = each.lfs.sha256 if each.lfs else None  # git LFS keeps large files
            files.append(RemoteFile(each.rfilename, each.size, sha256, each.blob_id))
        return files

    def download(self, file: RemoteFile) -> None:
        """Download and verify one file; give up after MAX_RETRIES in a row without progress."""
        target = Path(MODEL_FOLDER, file.path)
        unfinished = Path(f"{target}.incomplete")
        lock = Path(LOCK_FOLDER, f"{file.path}.lock")
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
                    # A full disk, or a file that isn't there, will be so the next time
                    lasting = getattr(error, "errno", None) or http_status(error) in range(400, 500)
                    if lasting or failures == MAX_RETRIES:
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


# ---- Words for errors ----------------------------------------------------------------------------


def brief(error: Exception | str) -> str:
    """Return an error's text in one line, without the password that an address may hold."""
    return shorten(re.sub(r"://[^/\s@]+@", "://", str(error) or repr(error)), 300)


def http_status(error: Exception) -> int | None:
    """Return the status of the answer that a client's error is about, None without an answer."""
    response = getattr(error, "response", None)
    return getattr(error, "status_code", None) or getattr(response, "status_code", None)


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
        f'and run again to resume, or set HUB = "{hub.other}".'
    )


# ---- The files on the disk -----------------------------------------------------------------------


def file_size(path: Path) -> int:
    """Return the bytes of a file, 0 if it is missing."""
    return path.stat().st_size if path.is_file() else 0


def is_whole(path: Path, file: RemoteFile, bar: tqdm | None = None) -> bool:
    """Return whether path holds the listed file, by its size and by the hash that the hub gave."""
    if not path.is_file() or file_size(path) != file.size:
        return False
    digest = hashlib.sha256()
    if not file.sha256:  # git hashes a header and the content
        digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
            if bar is not None:
                bar.update(len(piece))
    return (file.sha256 or file.git_sha1) in (None, digest.hexdigest())


def find_damaged_files(files: list[RemoteFile]) -> list[RemoteFile]:
    """Return the files that MODEL_FOLDER lacks, or holds with another size or hash."""
    paths = {file: Path(MODEL_FOLDER, file.path) for file in files}
    total = sum(file_size(path) for path in paths.values())
    if total == 0:
        return files  # nothing is there yet
    with tqdm(total=total, desc=f"verifying {MODEL_FOLDER}", unit="B", unit_scale=True) as bar:
        return [file for file, path in paths.items() if not is_whole(path, file, bar)]


def read_record() -> list[RemoteFile] | None:
    """Return the files of a finished download, None without one; stop if it is another model's."""
    try:
        record = json.loads(Path(MODEL_FOLDER, RECORD_FILE).read_text(encoding="utf-8"))
        model, revision = record["model"], record["revision"]
        files = [RemoteFile(name, **entry) for name, entry in record["files"].items()]
    # Missing, or damaged: the hub is asked again
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        return None
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


# ---- Download ------------------------------------------------------------------------------------


def is_filled_by_hand() -> bool:
    """Return whether the folder looks like a model that somebody copied there."""
    folder = Path(MODEL_FOLDER)
    if any(folder.rglob("*.incomplete")):
        return False  # a download that was stopped
    return file_size(folder / "config.json") > 0 and any(folder.glob("*.safetensors"))


def list_wanted(hub: Hub) -> list[RemoteFile]:
    """Return the repository's files that match WANTED_FILES; stop if one would leave the folder."""
    print(f"Asking {hub.title} for the files of {MODEL_ID} ({hub.revision}).")
    try:
        files = hub.list_files()
    except (json.JSONDecodeError, requests.JSONDecodeError):
        raise OSError("its answer is not a list of files. Is a login needed first?") from None
    wanted = []
    for file in files:
        path = PureWindowsPath(file.path)  # knows both slashes, and drives
        # A folder that this script filled, and somebody uploaded, has a RECORD_FILE
        if path.name == RECORD_FILE or not any(fnmatch(file.path, p) for p in WANTED_FILES):
            continue
        if path.anchor or ".." in path.parts:
            raise SystemExit(f"{MODEL_ID} has {path}, which would land outside the folder.")
        wanted.append(file)
    if "config.json" not in [file.path for file in wanted]:
        raise SystemExit(
            f"{MODEL_ID} ({hub.revision}) has no config.json among WANTED_FILES, so it can't be "
            f"loaded. Check MODEL_ID, REVISION and WANTED_FILES."
        )
    total = sum(file.size for file in wanted)
    print(f"{len(wanted)} files, {total / 1e9:.2f} GB in all.")
    return wanted


def download(hub: Hub, wanted: list[RemoteFile]) -> None:
    """Download what is missing or differs, and record a whole folder."""
    missing = find_damaged_files(wanted)
    if missing:
        for folder in (MODEL_FOLDER, LOCK_FOLDER):
            check_writable(folder)
        # A model that can't be trained is refused before its weights are downloaded
        fetch(hub, [file for file in missing if file.path == "config.json"])
        check_config()
        check_space(missing)
        fetch(hub, missing)
    write_record(hub, wanted)
    print(f"{MODEL_FOLDER} is complete: each file is as {hub.title} lists it.")


def check_space(missing: list[RemoteFile]) -> None:
    """Stop if the disk is too small for what is still to be downloaded."""
    needed = 0
    for file in missing:
        arrived = file_size(Path(MODEL_FOLDER, f"{file.path}.incomplete"))
        needed += max(0, file.size - arrived)
    free = shutil.disk_usage(MODEL_FOLDER).free
    print(f"{needed / 1e9:.2f} GB to download, {free / 1e9:.0f} GB free on the disk.")
    if needed > free:
        raise SystemExit(
            f"Not enough disk space for {MODEL_FOLDER}: {needed / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free. Free some space and run again, or change MODEL_FOLDER."
        )


def fetch(hub: Hub, files: list[RemoteFile]) -> None:
    """Download files side by side; stop with the reasons if some didn't arrive."""
    with ThreadPoolExecutor(FILE_THREADS) as pool:
        downloads = {file.path: pool.submit(hub.download, file) for file in files}
        # Without a timeout, Windows would tell the main thread of Ctrl-C only at the end
        while wait(downloads.values(), timeout=0.1).not_done:
            pass
    reasons = []
    advice = f'Run again to resume, or set HUB = "{hub.other}".'
    for path, one in downloads.items():
        try:
            one.result()
        except hub.errors as error:
            reasons.append(f"{path}: {brief(error)}")
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                advice = "Free some space on the disk and run again to resume."
    if reasons:
        raise SystemExit(
            f"{len(reasons)} of {len(files)} files didn't arrive. {advice} {'; '.join(reasons)}"
        )


def ensure_model() -> None:
    """Leave a whole model in MODEL_FOLDER, without a request if it is there already."""
    recorded = read_record()
    damaged = find_damaged_files(recorded) if recorded else []
    if recorded and not damaged:
        print(f"{MODEL_FOLDER} is complete, and no network is used.")
        return
    if damaged:
        names = ", ".join(file.path for file in damaged)
        print(f"Missing or altered, and downloaded again: {names}")
    hub = ModelScope() if HUB == "modelscope" else HuggingFace()
    proxy = check_proxy(hub.url)
    try:
        wanted = list_wanted(hub)
    except hub.errors as error:
        problem = explain(hub, error, proxy)
        if damaged or not is_filled_by_hand():
            raise SystemExit(problem) from None
        print(f"NOT VERIFIED, {MODEL_FOLDER} is tried as it is. {problem}")
        return
    download(hub, wanted)


# ---- The model -----------------------------------------------------------------------------------


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
        instead = f'MODEL_ID = "{plain}"' if plain != MODEL_ID else "the one it was made from"
        raise SystemExit(
            f"{MODEL_ID} is quantised and can't be trained. Take {instead}, and set "
            f"LOAD_IN_4BIT = True in train.py if the GPU has too little memory for it."
        )
    if kind not in SUPPORTED_MODELS:
        raise SystemExit(
            f"{MODEL_FOLDER} holds a model of type {kind}. Dense models of "
            f"{', '.join(SUPPORTED_MODELS.values())} work: change MODEL_ID and MODEL_FOLDER."
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
    print(f"Loading {size / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free.")
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
    print(f"{model.dtype}, every weight in its place; {versions}")


# ---- The memory that a training needs ------------------------------------------------------------

BYTES_PER_WEIGHT = 2  # frozen, in bfloat16
BYTES_IN_4_BIT = 0.5 + 1 / 64 + 4 / 64 / 256  # nf4: 64 weights share a scale, 256 scales another
BYTES_PER_TRAINED = 18  # weight, gradient and the two numbers of Adam in float32, a bfloat16 copy
BYTES_PER_LOGIT = 11  # in bfloat16 and float32, at the peak of the loss
# What a layer keeps of a token for the backward pass. Fitted to counts by bench.py --memory.
KEPT_PER_HIDDEN = 34  # bytes for each number of its vector
KEPT_PER_INTERMEDIATE = 9  # bytes for each number inside the MLP
KEPT_PER_RANK = 14  # bytes for each rank of LoRA: seven inner vectors in bfloat16
KEPT_OF_INPUT = 2  # bytes for each number of its vector, where checkpointing keeps only that
RECOMPUTED = 1.3  # what one layer takes while it is computed again, in layers that are kept

SETTINGS = {  # of train.py: (checkpointing, four_bits)
    "checkpointing": (True, False),
    "no checkpointing": (False, False),
    "4 bits, checkpointing": (True, True),
    "4 bits": (False, True),
}


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

    length = TEXT_TOKENS + IMAGE_TOKENS + ANSWER_TOKENS
    tokens = batch_size * 8 * math.ceil(length / 8)  # train.py pads rows to a multiple of 8
    layer = (
        KEPT_PER_HIDDEN * text.hidden_size
        + KEPT_PER_INTERMEDIATE * text.intermediate_size
        + KEPT_PER_RANK * LORA_RANK
    )
    # Only where there is a label
    logits = BYTES_PER_LOGIT * batch_size * ANSWER_TOKENS * text.vocab_size
    activations = tokens * text.num_hidden_layers * layer + logits
    if checkpointing:  # the peak is either at the loss, or where a layer is computed again
        inputs = tokens * text.num_hidden_layers * KEPT_OF_INPUT * text.hidden_size
        activations = inputs + max(logits, RECOMPUTED * tokens * layer)
    return (weights + adapter + activations) / 2**30


def print_memory(model: PreTrainedModel) -> None:
    """Print what a training needs, and the largest batch size that fits the GPU at hand."""
    print(f"\nGiB that a training needs (estimate; rank {LORA_RANK}, {IMAGE_TOKENS} image tokens):")
    print("batch size | " + " | ".join(f"{title:>21}" for title in SETTINGS))
    needed = {}
    for size in sorted(BATCH_SIZES):
        for title, setting in SETTINGS.items():
            needed[size, title] = training_memory(model, size, *setting)
        print(f"{size:10} | " + " | ".join(f"{needed[size, title]:21.1f}" for title in SETTINGS))
    if not torch.cuda.is_available():
        print("There is no CUDA GPU to compare this with.")
        return
    try:
        free = torch.cuda.mem_get_info()[0] / 2**30
    except RuntimeError as error:  # as where another process has the GPU for itself
        print(f"The GPU can't be used: {brief(error)}")
        return
    print(f"{free:.1f} GiB are free on this GPU. The largest batch size that fits:")
    for title in SETTINGS:
        fitting = [size for size in BATCH_SIZES if needed[size, title] <= free]
        print(f"{title:>21}: {max(fitting, default='none')}")


# ---- A look at an image --------------------------------------------------------------------------


def caption(model: PreTrainedModel, path: Path) -> str:
    """Return what the model says about an image."""
    processor = AutoProcessor.from_pretrained(MODEL_FOLDER, local_files_only=True)
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.has_transparency_data:  # what is clear is seen as white
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=[prompt], images=[image], return_tensors="pt").to(model.device)
    # The checkpoint brings settings for sampling, which greedy search doesn't have
    sampling = dict.fromkeys(("temperature", "top_p", "top_k"))
    tokens = model.generate(**inputs, max_new_tokens=CAPTION_TOKENS, do_sample=False, **sampling)
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
        # Pillow raises a dozen kinds of errors on damaged files; CUDA's are RuntimeErrors
        except Exception as error:
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
