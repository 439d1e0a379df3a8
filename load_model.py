"""Step 3 of 4: fetches Qwen2-VL-2B-Instruct, then loads it and shows that it is whole.

Reads   the model's repository on ModelScope, and a picture of coco_2014_caption/ to try the model on.
Writes  Qwen/Qwen2-VL-2B-Instruct/ (4.4 GB), and .complete.json in it: the size and SHA-256 of each of its files.
Run     python load_model.py
Takes   what the line needs for 4.4 GB (6 minutes at 100 Mbit/s); about 10 s, without any network, when all is there;
        5 GB of memory. A graphics card is only needed for the one caption at the end.

A download that was cut off, by whatever, is resumed where it stopped by running this again.
"""

import hashlib
import json
import os
import shutil
import sys
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import torch
from modelscope_hub import (
    AuthenticationError,
    FileDownloadError,
    HubApi,
    HubError,
    NotExistError,
    PermissionDeniedError,
)
from modelscope_hub.compat import snapshot_download
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

# ----------------------------------------------------------------------------------------------------------------------
# download
MODEL_ID = "Qwen/Qwen2-VL-2B-Instruct"  # owner/name on ModelScope; any size of Qwen2-VL-Instruct works
REVISION = "master"  # branch, tag or commit
MODEL_FOLDER = "Qwen/Qwen2-VL-2B-Instruct"  # where the files go; train.py reads them there
RECORD_FILE = ".complete.json"  # in MODEL_FOLDER: what a whole download holds; delete it to look for a newer one
CACHE_FOLDER = ".cache/modelscope"  # the client's locks
DOWNLOAD_THREADS = 4  # files at a time
IGNORED_FILES = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt"]  # pickles: they can run code, the same weights come safe

# caption
IMAGE_FOLDER = "coco_2014_caption"  # its first picture is described, where there is a graphics card
IMAGE_SIZE = 280  # pixels a side, as in train.py; (side / 28)^2 tokens
PROMPT = "请描述这张图片: "  # as in csv2json.py
MAX_NEW_TOKENS = 64  # the longest caption

# memory of a training, as train.py does it
BATCH_SIZES = [1, 4, 8, 16]  # pictures that go through the model at a time
LORA_RANK = 64  # as in train.py, on the seven projections of every language layer
TEXT_TOKENS = 26  # a sample's tokens around the picture: the chat template and PROMPT
ANSWER_TOKENS = 70  # a sample's captions, the part with a loss; COCO has five of about 14 tokens
# ----------------------------------------------------------------------------------------------------------------------


def find_damage() -> list[str] | None:
    """What in the folder differs from the record of its download; [] is a whole model, None a folder without record."""
    try:
        record = json.loads((Path(MODEL_FOLDER) / RECORD_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if (record["model"], record["revision"]) != (MODEL_ID, REVISION):
        return [f"the whole folder, which holds {record['model']} at {record['revision']}"]
    damaged = []
    for name, expected in tqdm(record["files"].items(), desc=f"verifying {MODEL_FOLDER}", unit="file"):
        whole = file_size(name) == expected["size"]
        if whole and expected["sha256"]:  # None where the hub gave no sum
            with open(Path(MODEL_FOLDER) / name, "rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == expected["sha256"]
        if not whole:
            damaged.append(name)
    return damaged


def file_size(name: str) -> int:
    """Bytes of a file of the model, 0 where it is not there."""
    path = Path(MODEL_FOLDER) / name
    return path.stat().st_size if path.is_file() else 0


def fetch() -> None:
    """Downloads what is missing or differs, each file verified by the client, and records what a whole folder holds."""
    listed = [file for file in HubApi().list_repo_files(MODEL_ID, "model", revision=REVISION) if not file.is_dir]
    wanted = [file for file in listed if not any(fnmatch(file.path, pattern) for pattern in IGNORED_FILES)]
    Path(MODEL_FOLDER).mkdir(parents=True, exist_ok=True)
    missing = sum(file.size - max(file_size(file.path), file_size(f"{file.path}.incomplete")) for file in wanted)
    free = shutil.disk_usage(MODEL_FOLDER).free
    print(f"{MODEL_ID}: {len(wanted)} files, {missing / 1e9:.2f} GB still to come; {free / 1e9:.0f} GB of disk free")
    if missing > free:
        raise SystemExit(f"{MODEL_FOLDER} lies on a disk with too little space: {missing / 1e9:.1f} GB are needed.")
    places = {"local_dir": MODEL_FOLDER, "cache_dir": CACHE_FOLDER}
    options = {"ignore_patterns": IGNORED_FILES, "max_workers": DOWNLOAD_THREADS}
    snapshot_download(MODEL_ID, revision=REVISION, **places, **options)
    files = {file.path: {"size": file.size, "sha256": file.sha256} for file in wanted}
    record = json.dumps({"model": MODEL_ID, "revision": REVISION, "files": files}, indent=2)
    (Path(MODEL_FOLDER) / f"{RECORD_FILE}.tmp").write_text(record, encoding="utf-8")
    os.replace(Path(MODEL_FOLDER) / f"{RECORD_FILE}.tmp", Path(MODEL_FOLDER) / RECORD_FILE)


def ensure_model() -> None:
    """Leaves a whole model in MODEL_FOLDER, without a single request where it is there already."""
    damaged = find_damage()
    if damaged == []:
        print(f"{MODEL_FOLDER} is complete, every file has its size and SHA-256: no network is used")
        return
    if damaged:
        print(f"fetched again, because it is missing or altered: {', '.join(damaged)}")
    try:
        fetch()
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. What arrived is kept: run again, it resumes.") from None
    except (NotExistError, AuthenticationError, PermissionDeniedError) as error:
        reason = str(error).partition("\n")[0]
        raise SystemExit(f"The hub gives no {MODEL_ID}, {REVISION}: check MODEL_ID and REVISION. {reason}") from None
    except FileDownloadError as error:
        raise SystemExit(f"{error}\nWhat arrived is kept: run again, it resumes.") from None
    except (HubError, OSError) as error:
        reason = str(error).partition("\n")[0]
        if damaged or not file_size("config.json"):
            raise SystemExit(f"{MODEL_ID} can't be fetched: mend this and run again, it resumes: {reason}") from None
        print(f"NOT VERIFIED, the hub doesn't answer: {MODEL_FOLDER} is tried as it is. {reason}")


def load() -> Qwen2VLForConditionalGeneration:
    """The model on the CPU in the checkpoint's own dtype, from the folder alone; exits where it is not whole."""
    try:
        model_type = json.loads((Path(MODEL_FOLDER) / "config.json").read_text(encoding="utf-8")).get("model_type")
        if model_type != "qwen2_vl":
            raise SystemExit(f"{MODEL_FOLDER} holds a model of type {model_type}, not qwen2_vl: change MODEL_ID.")
        model, report = Qwen2VLForConditionalGeneration.from_pretrained(
            MODEL_FOLDER, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"{MODEL_FOLDER} doesn't load: run again with a network, which mends it. {error}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise SystemExit(f"{MODEL_FOLDER} is no whole Qwen2-VL: {kind} {sorted(report[kind])[:5]}. Fetch it anew.")
    return model.eval()


def count_parameters(module: torch.nn.Module) -> int:
    """Number of weights, those that two parts share counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def print_parts(model: Qwen2VLForConditionalGeneration) -> None:
    """Parameters by part, dtype, size on disk and versions."""
    vision, language = model.model.visual, model.model.language_model
    merger, embeddings = count_parameters(vision.merger), count_parameters(language.embed_tokens)
    parts = {
        "vision tower": count_parameters(vision) - merger,
        "merger (picture to language)": merger,
        "token embeddings": embeddings,
        "language layers": count_parameters(language) - embeddings,
        "output head, beside the embeddings": count_parameters(model) - count_parameters(model.model),  # 0: shared
    }
    for part, count in {**parts, "all": sum(parts.values())}.items():
        print(f"{part:36}{count:>15,} parameters")
    size = sum(file.stat().st_size for file in Path(MODEL_FOLDER).rglob("*") if file.is_file())
    print(f"{model.dtype}, {size / 1e9:.2f} GB on disk, every key of the checkpoint in its place")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "modelscope")))


def training_memory(model: Qwen2VLForConditionalGeneration, batch_size: int, checkpointing: bool) -> float:
    """GiB that a training needs on the card, estimated: the sum of what must be there at the backward pass's peak."""
    text = model.config.text_config
    hidden, wide, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    narrow = hidden // text.num_attention_heads * text.num_key_value_heads  # keys and values
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # A LoRA pair on an (in, out) projection has rank * (in + out) weights: q and o, k and v, gate and up and down.
    lora = layers * LORA_RANK * (2 * (hidden + hidden) + 2 * (hidden + narrow) + 3 * (hidden + wide))
    # Bytes that a layer keeps of a token for the backward pass, counted on a CPU; LoRA's dropout is the largest part.
    kept = 52 * hidden + 12 * wide + 14 * LORA_RANK
    tokens = batch_size * (TEXT_TOKENS + (IMAGE_SIZE // 28) ** 2 + ANSWER_TOKENS)
    # Checkpointing keeps each layer's input (2 bytes) and computes the rest again, one layer at a time.
    activations = tokens * (layers * hidden * 2 + kept if checkpointing else layers * kept)
    logits = batch_size * ANSWER_TOKENS * text.vocab_size * 14  # bfloat16; float32: upcast, softmax and gradient
    return (weights + 16 * lora + activations + logits) / 2**30  # 16: weight, gradient and Adam's two, float32


def print_memory(model: Qwen2VLForConditionalGeneration) -> None:
    """The table of what a training needs, against the card's free memory."""
    free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else None
    print(f"GiB that a training needs (estimate; LoRA rank {LORA_RANK}, pictures {IMAGE_SIZE}x{IMAGE_SIZE}):")
    print("  batch size | gradient checkpointing | without")
    for batch_size in BATCH_SIZES:
        needed = [training_memory(model, batch_size, checkpointing) for checkpointing in (True, False)]
        marks = ["(too much)" if free is not None and memory > free else "" for memory in needed]
        print(f"  {batch_size:10} | {needed[0]:8.1f} {marks[0]:13} | {needed[1]:8.1f} {marks[1]}")
    print("  free now: no CUDA card" if free is None else f"  free now: {free:.1f} GiB")


def caption(model: Qwen2VLForConditionalGeneration, processor, path: Path) -> str:
    """What the model says about a picture, greedily, on whichever device it is."""
    content = [{"type": "text", "text": PROMPT}, {"type": "image"}]
    turns = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    with Image.open(path) as file:
        picture = file.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE))
    inputs = processor(text=[text], images=[picture], return_tensors="pt").to(model.device)
    settings = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}  # the hub's own sample
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **settings)  # (1, prompt + answer)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def show_caption(model: Qwen2VLForConditionalGeneration) -> None:
    """One caption by the untrained model, or why there is none."""
    picture = min(Path(IMAGE_FOLDER).glob("*.jpg"), default=None)
    if not torch.cuda.is_available():
        print("no caption: that takes a CUDA card, and torch sees none")
    elif not picture:
        print(f"no caption: there is no picture in {IMAGE_FOLDER}, run data2csv.py for some")
    else:
        processor = AutoProcessor.from_pretrained(MODEL_FOLDER, local_files_only=True)
        print(f"{picture}: {caption(model.to('cuda', torch.bfloat16), processor, picture)}")


def main() -> None:
    """Fetches the model if need be, loads it, and shows what it is, what it needs and what it says."""
    sys.stdout.reconfigure(errors="replace")  # not every Windows console knows every character of a caption
    ensure_model()
    model = load()
    print_parts(model)
    print_memory(model)
    show_caption(model)


if __name__ == "__main__":
    main()
