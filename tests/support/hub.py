"""A stand-in for every server the scripts talk to, on 127.0.0.1, for tests and for trying by hand.

    python tests/support/hub.py FOLDER [MODEL_FOLDER]

serves the images and captions of FOLDER (captions.csv with the columns image_path,caption) and, as
Qwen/Qwen2-VL-2B-Instruct, the files of MODEL_FOLDER, prints the environment variables that lead the
scripts here, and runs until Ctrl-C. It answers four hosts at once:

ModelScope    /api/v1/models/OWNER/NAME/repo/files            listing with sizes and SHA-256
              /api/v1/models/OWNER/NAME/repo?FilePath=        one file, with Range
              /api/v1/datasets/OWNER/NAME/repo/tree           listing of the dataset's repository
              /api/v1/datasets/OWNER/NAME/repo?FilePath=      its loader, with the table's address
table's host  /open_data/coco_2014_caption/train2014.csv.zip  and the images beside it (train only)
              /coco/2014/train.csv.zip                        the older address of the same table
COCO's host   /train2014/COCO_train2014_000000000009.jpg
              /annotations/annotations_trainval2014.zip
Hugging Face  /api/models/OWNER/NAME/revision/BRANCH          listing with SHA-256 or git's names
              /OWNER/NAME/resolve/COMMIT/FILE                 one file, a large one by a redirect to
              /cdn/OWNER/NAME/FILE                            another host, with Range
"""

import csv
import functools
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

PORT = 8014  # by hand; a table fetched earlier names it, so it stays the same from start to start
DATASET_ID = "modelscope/coco_2014_caption"
MODEL_ID = "Qwen/Qwen2-VL-2B-Instruct"
TABLE_FOLDER = "/open_data/coco_2014_caption"
OLD_TABLE = "/coco/2014/train.csv.zip"
ANNOTATIONS = "/annotations/annotations_trainval2014.zip"
IMAGE_PATH = re.compile(r"(?:/open_data/coco_2014_caption)?/train2014/(COCO_train2014_\d{12}\.jpg)")
REPOSITORY_PATH = re.compile(r"/api/v1/(models|datasets)/([^/]+/[^/]+)/repo(/files|/tree)?")

LOADER_SCRIPT = '''\
"""COCO 2014 image captions, one caption a row."""

import csv

import datasets

_DESCRIPTION = "Images of everyday scenes with captions written by people."
_HOMEPAGE = "https://cocodataset.org"
_URLS = {{
    "train": "{folder}/train2014.csv.zip",
    "validation": "{folder}/val2014.csv.zip",
}}
_FILES = {{"train": "train2014.csv", "validation": "val2014.csv"}}


class Coco2014Caption(datasets.GeneratorBasedBuilder):
    BUILDER_CONFIGS = [datasets.BuilderConfig(name="coco_2014_caption")]

    def _info(self):
        columns = {{name: datasets.Value("string") for name in ("uniq_id", "image_id", "caption")}}
        columns["image"] = datasets.Image()
        features = datasets.Features(columns)
        return datasets.DatasetInfo(_DESCRIPTION, homepage=_HOMEPAGE, features=features)

    def _split_generators(self, dl_manager):
        folders = dl_manager.download_and_extract(_URLS)
        return [
            datasets.SplitGenerator(split, {{"path": f"{{folders[split]}}/{{_FILES[split]}}"}})
            for split in ("train", "validation")
        ]

    def _generate_examples(self, path):
        with open(path, encoding="utf-8", newline="") as file:
            for key, row in enumerate(csv.DictReader(file)):
                yield key, row
'''


class Hub:
    """The server, a context manager. What it makes lies in a temporary folder that goes with it.

    requests lists the paths asked for, in order. faults maps the beginning of a path to a function
    that is given the handler and answers in its place: see status, html and cut_short below.
    """

    def __init__(
        self, folder: Path | None = None, models: dict[str, Path] | None = None, port: int = 0
    ):
        self.port = port  # 0: any that is free
        self.folder = Path(folder) if folder else None
        self.models = {name: Path(path) for name, path in (models or {}).items()}
        self.requests: list[str] = []
        self.with_token: list[str] = []  # paths of requests that carried a token of the user's
        self.faults: dict[str, Callable[[Handler], None]] = {}
        self.loader_script: str | None = (
            None  # what the loader says; None: LOADER_SCRIPT with this hub's addresses
        )

    def __enter__(self) -> "Hub":
        self._temporary = tempfile.TemporaryDirectory(prefix="hub_", ignore_cleanup_errors=True)
        self.temporary = Path(self._temporary.name)
        self.images = self._index() if self.folder else {}
        self._making = threading.Lock()
        self._server = Server(("127.0.0.1", self.port), Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        if self.loader_script is None:
            self.loader_script = LOADER_SCRIPT.format(folder=self.url + TABLE_FOLDER)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._temporary.cleanup()

    # What a script is started with

    def environment(self) -> dict[str, str]:
        """Variables that lead a script to this hub and nowhere else, on top of those set."""
        guard = str(Path(__file__).resolve().parent / "guard")
        variables = {
            "MODELSCOPE_ENDPOINT": self.url,
            "MODELSCOPE_CACHE": str(self.temporary / "modelscope"),
            "MODELSCOPE_HOME": str(self.temporary / "modelscope_home"),
            "HF_HOME": str(self.temporary / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, [guard, os.environ.get("PYTHONPATH")])),
            "NETWORK_GUARD_LOG": str(self.temporary / "network_guard.log"),
        }
        proxies = (
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
        )
        return variables | dict.fromkeys(proxies, "")

    def huggingface_environment(self) -> dict[str, str]:
        """Variables as in environment(), but for a script that is to download from Hugging Face."""
        return {**self.environment(), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": self.url}

    def constants(self, script: str) -> dict[str, object]:
        """Constants of `script` that name other sources than ModelScope, pointed at this hub."""
        if script != "data2csv.py":
            return {}
        return {
            "TABLE_URLS": [f"{self.url}{TABLE_FOLDER}/train2014.csv.zip", self.url + OLD_TABLE],
            "COCO_URL": self.url,
        }

    def refusals(self) -> list[str]:
        """What the network guard refused to the scripts started with `environment()`."""
        log = self.temporary / "network_guard.log"
        return log.read_text(encoding="utf-8").splitlines() if log.exists() else []

    # What is served

    def rows(self) -> Iterator[tuple[str, str]]:
        """The (image_path, caption) rows of captions.csv, captions exactly as written there."""
        with open(self.folder / "captions.csv", encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                yield row["image_path"], row["caption"]

    def _index(self) -> dict[str, tuple[int, Path]]:
        """image_path -> (image_id, file), as in captions.csv; the name is the id if it can be."""
        paths = list(dict.fromkeys(path for path, _ in self.rows()))
        names = [Path(path).stem for path in paths]
        by_name = all(name.isascii() and name.isdigit() for name in names) and len(
            set(map(int, names))
        ) == len(names)
        ids = map(int, names) if by_name else range(1, len(paths) + 1)
        return {
            path: (image_id, self.folder / path) for path, image_id in zip(paths, ids, strict=True)
        }

    @functools.cached_property
    def official_names(self) -> dict[str, Path]:
        return {official_name(image_id): file for image_id, file in self.images.values()}

    def find(self, path: str, query: dict[str, list[str]]) -> Path | bytes | None:
        """What stands at `path`: a file, some bytes, or None."""
        if repository := REPOSITORY_PATH.fullmatch(path):
            return self._find_in_repository(*repository.groups(), query)
        if path == "/api/v1/repos/internalAccelerationInfo":
            return as_json({})
        if not self.folder:
            return None
        if image := IMAGE_PATH.fullmatch(path):
            file = self.official_names.get(image[1])
            return file if file and file.is_file() else None
        if path in (TABLE_FOLDER + "/train2014.csv.zip", OLD_TABLE):
            return self._made("train2014.csv.zip", "train2014.csv", self._write_table)
        if path == ANNOTATIONS:
            return self._made(
                "annotations.zip", "annotations/captions_train2014.json", self._write_annotations
            )
        return None

    def _find_in_repository(
        self, kind: str, name: str, listing: str | None, query
    ) -> Path | bytes | None:
        if kind == "models" and name in self.models:
            files = {
                file.relative_to(self.models[name]).as_posix(): file
                for file in walk(self.models[name])
            }
        elif kind == "datasets" and name == DATASET_ID and self.folder:
            script = self.temporary / "coco_2014_caption.py"
            script.write_bytes(self.loader_script.encode())
            files = {script.name: script}
        else:
            return None
        if listing:
            return as_json({"Files": [describe(path, file) for path, file in files.items()]})
        return files.get(query.get("FilePath", [""])[0])

    def _made(self, name: str, member: str, write: Callable[[io.TextIOBase], None]) -> Path:
        """The zip archive `name`, made when it is first asked for."""
        archive = self.temporary / name
        with self._making:
            if not archive.exists():
                with zipfile.ZipFile(
                    archive.with_suffix(".part"), "w", zipfile.ZIP_DEFLATED
                ) as zipped:
                    with io.TextIOWrapper(
                        zipped.open(member, "w"), encoding="utf-8", newline=""
                    ) as file:
                        write(file)
                os.replace(archive.with_suffix(".part"), archive)
        return archive

    def _write_table(self, file: io.TextIOBase) -> None:
        """The table as ModelScope's: a row per image, then their second captions, their third..."""
        captions: dict[str, list[str]] = {path: [] for path in self.images}
        for path, caption in self.rows():
            captions[path].append(caption)
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["uniq_id", "image_id", "caption", "image"])
        number = 0
        for turn in range(max(map(len, captions.values()), default=0)):
            for path, (image_id, _) in self.images.items():
                if turn < len(captions[path]):
                    url = f"{self.url}{TABLE_FOLDER}/train2014/{official_name(image_id)}"
                    table.writerow([number, image_id, captions[path][turn], url])
                    number += 1

    def _write_annotations(self, file: io.TextIOBase) -> None:
        """The captions in COCO's own format."""
        images = [
            {"id": number, "file_name": official_name(number)} for number, _ in self.images.values()
        ]
        annotations = [
            {"id": key, "image_id": self.images[path][0], "caption": caption}
            for key, (path, caption) in enumerate(self.rows())
        ]
        json.dump({"info": {}, "licenses": [], "images": images, "annotations": annotations}, file)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        """A client that hung up (a killed script) is no error here; anything else is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD from the hub's `find`, unless one of its faults begins the path."""

    protocol_version = "HTTP/1.1"  # keep-alive
    disable_nagle_algorithm = True  # else each small answer waits 40 ms
    wbufsize = 1 << 16
    timeout = 60  # seconds an idle connection is kept

    def do_GET(self) -> None:
        hub = self.server.hub
        hub.requests.append(self.path)
        if self.headers.get("Authorization"):
            hub.with_token.append(self.path)
        for beginning, fault in list(hub.faults.items()):
            if self.path.startswith(beginning):
                return fault(self)
        self.answer()

    do_HEAD = do_GET

    def answer(self, share: float = 1.0) -> None:
        """Answer truly; with a share below 1, the connection ends after that part of the length."""
        address = urlsplit(self.path)
        reply = huggingface_reply(self.server.hub, unquote(address.path), parse_qs(address.query))
        if reply and not isinstance(reply.body, Path):
            return self.send(
                reply.code, reply.body, "application/json", share, headers=reply.headers
            )
        found = self.server.hub.find(unquote(address.path), parse_qs(address.query))
        if reply:
            found = reply.body
        if found is None:
            return self.send(404, as_json(None, code=404))
        if isinstance(found, bytes):
            return self.send(200, found, "application/json", share)
        size = found.stat().st_size
        start = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(start[1]) if start else 0
        last = min(int(start[2]), size - 1) if start and start[2] else size - 1
        if start and first >= size:
            return self.send(416, b"", headers={"Content-Range": f"bytes */{size}"})
        headers = {"Accept-Ranges": "bytes", **(reply.headers if reply else {})}
        if start:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        with open(found, "rb") as file:
            file.seek(first)
            self.send(
                206 if start else 200,
                file,
                "application/octet-stream",
                share,
                last - first + 1,
                headers,
            )

    def send(
        self,
        code: int,
        body,
        kind: str = "text/plain",
        share: float = 1.0,
        length=None,
        headers=None,
    ) -> None:
        """Send `body`: bytes, or a file that is open at its first byte, `length` bytes of it."""
        if isinstance(body, bytes):
            body, length = io.BytesIO(body), len(body)
        self.send_response(code)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": length,
            **(headers or {}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        left = int(length * share) if self.command == "GET" else 0
        while left > 0 and (piece := body.read(min(left, 1 << 16))):
            self.wfile.write(piece)
            left -= len(piece)
        self.close_connection = self.close_connection or share < 1

    def log_message(self, *arguments) -> None:
        """Silent: `requests` tells what was asked."""


# Hugging Face

COMMIT = "0c1d2e3f4a5b6c7d8e9f0c1d2e3f4a5b6c7d8e9f"  # of every repository
BRANCHES = ("main", COMMIT)
API_PATH = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
RESOLVE_PATH = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
CDN_PATH = re.compile(r"/cdn/([^/]+/[^/]+)/(.+)")


class Reply(NamedTuple):
    code: int
    body: Path | bytes
    headers: dict[str, str]


def huggingface_reply(hub: Hub, path: str, query: dict[str, list[str]]) -> Reply | None:
    """What Hugging Face answers; None if the path is of another host."""
    if match := API_PATH.fullmatch(path):
        name, revision = match.groups()
        return huggingface_refusal(hub, name, revision or "main") or huggingface_listing(
            hub.models[name], "blobs" in query
        )
    if match := RESOLVE_PATH.fullmatch(path):
        name, revision, file = match.groups()
        refusal = huggingface_refusal(hub, name, revision, file)
        return refusal or huggingface_file(hub, name, file)
    if match := CDN_PATH.fullmatch(path):
        return Reply(200, hub.models[match[1]] / match[2], {})
    return None


def huggingface_refusal(hub: Hub, name: str, revision: str, file: str = "") -> Reply | None:
    """The answer to a request for something that isn't there."""
    if name not in hub.models:  # it doesn't tell strangers which names there are
        return Reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})
    if revision not in BRANCHES:
        return Reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
    if not (hub.models[name] / file).exists():
        return Reply(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
    return None


def huggingface_listing(folder: Path, with_blobs: bool) -> Reply:
    """What the API says about a model; sizes and hashes only if asked for."""
    files = []
    for file in walk(folder):
        entry = {"rfilename": file.relative_to(folder).as_posix()}
        if with_blobs:
            entry |= {"size": file.stat().st_size, "blobId": git_name(file)}
            if is_large(file):
                sha = describe(file.name, file)["Sha256"]
                entry["lfs"] = {"sha256": sha, "size": file.stat().st_size, "pointerSize": 135}
        files.append(entry)
    model = {"_id": "0", "id": folder.name, "sha": COMMIT, "siblings": files, "tags": []}
    return Reply(200, json.dumps(model).encode(), {})


def huggingface_file(hub: Hub, name: str, path: str) -> Reply:
    """A small file itself, or where a large one is: on another host, as the client sees it."""
    file = hub.models[name] / path
    headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_name(file)}"'}
    if not is_large(file):
        return Reply(200, file, headers)
    sha = describe(file.name, file)["Sha256"]
    headers |= {"X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(file.stat().st_size)}
    headers["Location"] = f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{name}/{path}"
    return Reply(302, b"", headers)


def is_large(file: Path) -> bool:
    """Whether git LFS would keep it."""
    return file.suffix == ".safetensors"


def git_name(file: Path) -> str:
    """The SHA-1 by which git knows a file's content."""
    content = file.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


# Faults to put into Hub.faults


def status(code: int) -> Callable[[Handler], None]:
    return lambda handler: handler.send(code, b"no")


def html(handler: Handler) -> None:
    """The page with status 200 that hotel networks and captchas give in place of a file."""
    handler.send(200, b"<!DOCTYPE html><html><body>Please log in.</body></html>", "text/html")


def cut_short(handler: Handler) -> None:
    handler.answer(share=1 / 3)


def hang_up(handler: Handler) -> None:
    """The connection ends without a word, as a firewall or a crash ends it."""
    handler.close_connection = True


def garbled(handler: Handler) -> None:
    """The right length, but the second half is another file's: zeros."""
    body = whole_body(handler)
    handler.send(200, body[: len(body) // 2] + bytes(len(body) - len(body) // 2))


def wrong_length(factor: float) -> Callable[[Handler], None]:
    """A Content-Length of so many times what there is: above 1, the client waits in vain."""

    def fault(handler: Handler) -> None:
        body = whole_body(handler)
        handler.send(200, io.BytesIO(body), length=int(len(body) * factor))

    return fault


def drip(pause: float, pieces: int) -> Callable[[Handler], None]:
    """The truth in pieces with a pause in seconds before each: never silent for long, but slow."""

    def fault(handler: Handler) -> None:
        body = whole_body(handler)
        size = max(1, len(body) // pieces)
        handler.send(200, b"", headers={"Content-Length": len(body)})
        for start in range(0, len(body), size):
            handler.wfile.flush()
            time.sleep(pause)
            handler.wfile.write(body[start : start + size])

    return fault


def late(seconds: float) -> Callable[[Handler], None]:
    """The truth after a while."""

    def fault(handler: Handler) -> None:
        time.sleep(seconds)
        handler.answer()

    return fault


def on_share(fault: Callable[[Handler], None], percent: int) -> Callable[[Handler], None]:
    """A fault for so many of a hundred paths that differ in their last number, else the truth."""

    def chosen(handler: Handler) -> None:
        number = int(re.findall(r"\d+", handler.path)[-1])
        (fault if number * 37 % 100 < percent else Handler.answer)(handler)

    return chosen


def whole_body(handler: Handler) -> bytes:
    """What the hub would truly answer."""
    address = urlsplit(handler.path)
    found = handler.server.hub.find(unquote(address.path), parse_qs(address.query))
    return found if isinstance(found, bytes) else found.read_bytes()


def official_name(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def walk(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def describe(path: str, file: Path) -> dict:
    """One file in a ModelScope listing."""
    about = file.stat()
    digest = sha256(file, about.st_size, about.st_mtime_ns)
    return {
        "Path": path,
        "Name": file.name,
        "Type": "blob",
        "Size": about.st_size,
        "Sha256": digest,
    }


@functools.cache
def sha256(file: Path, size: int, modified: int) -> str:
    """Of a file of this size and time: a weights file is not read again for every listing."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def as_json(data, code: int = 200) -> bytes:
    return json.dumps({"Code": code, "Success": code == 200, "Data": data}).encode()


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit("Usage: python tests/support/hub.py FOLDER [MODEL_FOLDER]")
    models = {MODEL_ID: Path(sys.argv[2])} if len(sys.argv) == 3 else {}
    if not (Path(sys.argv[1]) / "captions.csv").is_file():
        raise SystemExit(f"{sys.argv[1]}: holds no captions.csv (columns image_path,caption).")
    with Hub(Path(sys.argv[1]), models, PORT) as hub:
        print(
            f"# {len(hub.images)} images, {len(models)} model at {hub.url}, until Ctrl-C",
            flush=True,
        )
        for name, value in hub.environment().items():
            print(
                f"set {name}={value}" if os.name == "nt" else f"export {name}='{value}'", flush=True
            )
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print(f"# {len(hub.requests)} requests answered")


if __name__ == "__main__":
    main()
