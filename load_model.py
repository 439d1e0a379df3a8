"""Step 3 of 4: fetches Qwen2-VL-2B-Instruct, then loads it and shows that it is whole.

Reads   the model's repository on ModelScope.
Writes  Qwen/Qwen2-VL-2B-Instruct/ (4.4 GB), and .complete.json in it: the size and SHA-256 of each of its files.
Run     python load_model.py
Takes   what the line needs for 4.4 GB (6 minutes at 100 Mbit/s); about 10 s, without any network, when all is there;
        5 GB of memory, no graphics card. Stop it whenever you like: run again, it goes on where it was.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from textwrap import shorten

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import Qwen2VLForConditionalGeneration

# ----------------------------------------------------------------------------------------------------------------------
# download
MODEL_ID = "Qwen/Qwen2-VL-2B-Instruct"  # owner/name on ModelScope; any size of Qwen2-VL-Instruct works
REVISION = "master"  # branch, tag or commit
MODEL_FOLDER = MODEL_ID  # where the files go; train.py's MODEL_FOLDER must name the same
RECORD_FILE = ".complete.json"  # in MODEL_FOLDER: what a whole download holds; delete it to look for a newer one
CACHE_FOLDER = ".cache/modelscope"  # the client's locks
WANTED_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.md", "LICENSE"]  # no pickles, no code: both run
DOWNLOAD_THREADS = 4  # files at a time
STALL_SECONDS = 30  # without a byte, after which a file is asked for again from there on, five times
FILE_HOURS = 12  # the longest that one file may take; what arrived is resumed by the next run
# memory of a training, as train.py does it
IMAGE_SIZE = 280  # pixels a side, as in train.py; a multiple of 28, (side / 28)^2 tokens
BATCH_SIZES = [1, 4, 8, 16]  # pictures that go through the model at a time
LORA_RANK = 64  # as in train.py, on the seven projections of every language layer
TEXT_TOKENS = 26  # a sample's tokens around the picture: the chat template and the question
ANSWER_TOKENS = 70  # a sample's captions, the part with a loss; COCO has five of about 14 tokens
# ----------------------------------------------------------------------------------------------------------------------


def check_constants() -> None:
    """Exits with the name of a constant that can't work, before anything is fetched."""
    counts = "DOWNLOAD_THREADS STALL_SECONDS FILE_HOURS LORA_RANK TEXT_TOKENS ANSWER_TOKENS"
    for names, is_legal, legal in (
        (counts, lambda value: type(value) is int and value >= 1, "a whole number, 1 or more"),
        ("IMAGE_SIZE", lambda value: value in range(56, 9999, 28), "56, 84, 112, ...: a multiple of 28"),
        ("MODEL_ID", lambda value: [*map(bool, str(value).split("/"))] == [True, True], "owner/name, as on ModelScope"),
        ("REVISION MODEL_FOLDER RECORD_FILE CACHE_FOLDER", lambda value: value and type(value) is str, "text"),
        ("WANTED_FILES", lambda value: type(value) is list and {*map(type, value)} == {str}, "a list of patterns"),
        ("BATCH_SIZES", lambda value: type(value) is list and value and {*value} < {*range(1, 999)}, "like [1, 4]"),
    ):
        for name in names.split():
            if not is_legal(value := globals()[name]):
                raise SystemExit(f"{name} = {value!r} at the top of load_model.py can't work: it must be {legal}.")


def stop(number: int, _) -> None:
    """Ctrl-C, or the system's wish, ends the script at once: the disk is as after a power cut, which is resumed."""
    os.write(2, b"\nStopped. What arrived is kept: run again, it goes on where it was.\n")
    os._exit(128 + number)


def file_size(name: str) -> int:
    """Bytes of a file of the model, 0 where it is not there."""
    path = Path(MODEL_FOLDER) / name
    return path.stat().st_size if path.is_file() else 0


def is_whole(name: str, size: int, sha256: str | None, progress: tqdm) -> bool:
    """Whether a file of the model can be read and has this size and, unless the hub gave none, this sum."""
    digest = hashlib.sha256()
    try:
        with open(Path(MODEL_FOLDER) / name, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
                progress.update(len(piece))
    except OSError:
        return False
    return file_size(name) == size and sha256 in (None, digest.hexdigest())


def find_damage() -> list[str] | None:
    """What in the folder differs from the record of its download; [] is a whole model, None a folder without record."""
    try:
        record = json.loads((Path(MODEL_FOLDER) / RECORD_FILE).read_text(encoding="utf-8"))
        model, revision, files = record["model"], record["revision"], record["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if (model, revision) != (MODEL_ID, REVISION):
        mend = f"change MODEL_FOLDER, or delete {RECORD_FILE} there to have the model replaced"
        raise SystemExit(f"{MODEL_FOLDER} holds {model} at {revision}, not {MODEL_ID} at {REVISION}: {mend}.")
    size = sum(expected["size"] for expected in files.values())
    with tqdm(total=size, desc=f"verifying {MODEL_FOLDER}", unit="B", unit_scale=True) as progress:
        return [name for name, expected in files.items() if not is_whole(name, **expected, progress=progress)]


def list_wanted(hub) -> list:
    """The repository's files that are to be fetched; exits where one would land outside MODEL_FOLDER."""
    print(f"asking the hub for the files of {MODEL_ID}, {REVISION}")
    try:
        listed = [file for file in hub.list_repo_files(MODEL_ID, "model", revision=REVISION) if not file.is_dir]
    except (ValueError, TypeError, AttributeError):
        raise OSError("the answer is no list of files; is it the page to log in to your network?") from None
    wanted = [file for file in listed if any(fnmatch(file.path, pattern) for pattern in WANTED_FILES)]
    for path in (PureWindowsPath(file.path) for file in wanted):  # this kind knows both slashes, and drives
        if path.anchor or ".." in path.parts:
            raise SystemExit(f"{MODEL_ID} is refused: its file {path} would land outside {MODEL_FOLDER}.")
    if "config.json" not in [file.path for file in wanted]:
        raise SystemExit(f"{MODEL_ID}, {REVISION} lists no config.json, so it is no model: check both constants.")
    return wanted


def fetch(hub) -> None:
    """Downloads what is missing or differs, each file verified by the client, and records what a whole folder holds."""
    wanted = list_wanted(hub)
    Path(MODEL_FOLDER).mkdir(parents=True, exist_ok=True)
    missing = sum(file.size - max(file_size(file.path), file_size(f"{file.path}.incomplete")) for file in wanted)
    free = shutil.disk_usage(MODEL_FOLDER).free
    print(f"{MODEL_ID}: {len(wanted)} files, {missing / 1e9:.2f} GB still to come; {free / 1e9:.0f} GB of disk free")
    if missing > free:
        raise SystemExit(f"{MODEL_FOLDER} lies on a disk with too little space: {missing / 1e9:.1f} GB are needed.")
    options = {"revision": REVISION, "local_dir": MODEL_FOLDER, "cache_dir": CACHE_FOLDER}
    options["file_list"] = [{"Path": file.path, "Size": file.size, "Sha256": file.sha256} for file in wanted]
    with ThreadPoolExecutor(1) as pool:  # Windows tells a thread of Ctrl-C only while it doesn't wait for a lock
        download = pool.submit(hub.download_repo, MODEL_ID, "model", max_workers=DOWNLOAD_THREADS, **options)
        while not download.done():
            time.sleep(0.1)
    download.result()
    files = {file.path: {"size": file.size, "sha256": file.sha256} for file in wanted}
    record = json.dumps({"model": MODEL_ID, "revision": REVISION, "files": files}, indent=2)
    (Path(MODEL_FOLDER) / f"{RECORD_FILE}.tmp").write_text(record, encoding="utf-8")
    os.replace(Path(MODEL_FOLDER) / f"{RECORD_FILE}.tmp", Path(MODEL_FOLDER) / RECORD_FILE)
    print(f"{MODEL_FOLDER} is whole: every file has the size and the SHA-256 that the hub gives")


def ensure_model() -> None:
    """Leaves a whole model in MODEL_FOLDER, without a single request where it is there already."""
    damaged = find_damage()
    if damaged == []:
        print(f"{MODEL_FOLDER} is complete, every file has its size and SHA-256: no network is used")
        return
    if damaged:
        print(f"fetched again, because it is missing or altered: {', '.join(damaged)}")
    os.environ["MODELSCOPE_DOWNLOAD_TIMEOUT"] = str(STALL_SECONDS)
    os.environ["MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT"] = str(FILE_HOURS * 3600)
    import modelscope_hub as client  # not above: it reads these settings while it is imported

    try:
        fetch(client.HubApi())
    except (client.NotExistError, client.AuthenticationError, client.PermissionDeniedError) as error:
        raise SystemExit(f"Check MODEL_ID = {MODEL_ID}, REVISION = {REVISION}: {shorten(str(error), 300)}") from None
    except client.FileDownloadError as error:
        reasons = "; ".join(f"{name}: {shorten(str(reason), 300)}" for name, reason in error.failed_files.items())
        raise SystemExit(f"Not all files arrived, what did is kept: run again, it resumes. {reasons}") from None
    except (client.HubError, OSError) as error:
        if damaged or not file_size("config.json"):
            raise SystemExit(f"Mend this and run again, it goes on where it was: {shorten(str(error), 300)}") from None
        print(f"NOT VERIFIED, {MODEL_FOLDER} is tried as it is: {shorten(str(error), 300)}")


def load() -> Qwen2VLForConditionalGeneration:
    """The model on the CPU in the checkpoint's own dtype, from the folder alone; exits where it is not whole."""
    try:
        model_type = json.loads((Path(MODEL_FOLDER) / "config.json").read_text(encoding="utf-8")).get("model_type")
        if model_type != "qwen2_vl":
            raise SystemExit(f"{MODEL_FOLDER} holds a model of type {model_type}, not qwen2_vl: change MODEL_ID.")
        options = {"dtype": "auto", "local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        model, report = Qwen2VLForConditionalGeneration.from_pretrained(MODEL_FOLDER, **options)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"{MODEL_FOLDER} doesn't load, a new run mends it: {shorten(str(error), 300)}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise SystemExit(f"{MODEL_FOLDER} is no whole Qwen2-VL: {kind} {sorted(report[kind])[:5]}. Fetch it anew.")
    return model.eval()


def count_parameters(module: torch.nn.Module) -> int:
    """Number of weights, those that two parts share counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def print_parts(model: Qwen2VLForConditionalGeneration) -> None:
    """Parameters by part, dtype and versions."""
    vision, language = model.model.visual, model.model.language_model
    embeddings = count_parameters(language.embed_tokens)
    parts = {
        "vision tower and merger": count_parameters(vision),
        "token embeddings": embeddings,
        "language layers": count_parameters(language) - embeddings,
        "output head": count_parameters(model) - count_parameters(model.model),  # 0: shared with the embeddings
    }
    for part, count in {**parts, "all": sum(parts.values())}.items():
        print(f"{part:36}{count:>15,} parameters")
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "modelscope"))
    print(f"{model.dtype}, every key of the checkpoint in its place; {versions}")


def training_memory(model: Qwen2VLForConditionalGeneration, batch_size: int, checkpointing: bool) -> float:
    """GiB that a training needs on the card, estimated: the sum of what must be there at the backward pass's peak."""
    text = model.config.text_config
    hidden, wide, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    narrow = hidden // text.num_attention_heads * text.num_key_value_heads  # keys and values
    # A LoRA pair on an (in, out) projection has rank * (in + out) weights: q and o, k and v, gate and up and down.
    lora = layers * LORA_RANK * (2 * (hidden + hidden) + 2 * (hidden + narrow) + 3 * (hidden + wide))
    # Bytes that a layer keeps of a token for the backward pass, counted on a CPU; LoRA's dropout is the largest part.
    kept = 52 * hidden + 12 * wide + 14 * LORA_RANK
    tokens = batch_size * (TEXT_TOKENS + (IMAGE_SIZE // 28) ** 2 + ANSWER_TOKENS)
    # Checkpointing keeps each layer's input (2 bytes) and computes the rest again, one layer at a time.
    activations = tokens * (layers * hidden * 2 + kept if checkpointing else layers * kept)
    logits = batch_size * ANSWER_TOKENS * text.vocab_size * 14  # bfloat16; float32: upcast, softmax and gradient
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return (weights + 16 * lora + activations + logits) / 2**30  # 16: weight, gradient and Adam's two, float32


def print_memory(model: Qwen2VLForConditionalGeneration) -> None:
    """The table of what a training needs, against the card's free memory."""
    free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else float("inf")
    print(f"GiB that a training needs (estimate; LoRA rank {LORA_RANK}, pictures {IMAGE_SIZE}x{IMAGE_SIZE}):")
    print("  batch size | gradient checkpointing | without")
    for batch_size in BATCH_SIZES:
        needed = [training_memory(model, batch_size, checkpointing) for checkpointing in (True, False)]
        cells = [f"{memory:8.1f} {'(too much)' if memory > free else '':13}" for memory in needed]
        print(f"  {batch_size:10} | {cells[0]} | {cells[1].rstrip()}")
    print(f"  free now: {free:.1f} GiB" if torch.cuda.is_available() else "  free now: no CUDA card")


def main() -> None:
    """Fetches the model if need be, loads it, and shows what it is and what a training of it needs."""
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # for consoles without UTF-8, and for log files
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    check_constants()
    ensure_model()
    model = load()
    print_parts(model)
    print_memory(model)


if __name__ == "__main__":
    main()
