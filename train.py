"""Step 4 of 4: teach Qwen2-VL-2B-Instruct to caption pictures with LoRA, and show what it learned.

Reads   data_vl.json (csv2json.py) with the pictures it names, and Qwen/Qwen2-VL-2B-Instruct/ (load_model.py)
Writes  output/Qwen2-VL-2B/: report.html (open it with a double click, from the first minutes on), the adapter with its
        processor, checkpoints, run.json (what made it), results.json (scores, captions before and after); swanlog/
Run     python train.py, on several cards torchrun --nproc_per_node=2 train.py; stopped halfway, run again: it goes on
Takes   minutes for 500 pictures, 6 GB of a small card or 10 of a large one; the heaviest pass is measured first
"""

import base64
import contextlib
import functools
import hashlib
import html
import io
import json
import os
import re
import shutil
import signal
import sys
import time
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import datasets
import pandas
import peft
import psutil
import requests
import swanlab
import torch
import transformers
from accelerate import PartialState, utils
from matplotlib import pyplot
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from qwen_vl_utils import process_vision_info, smart_resize
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Data, model and optimisation; a run that was stopped goes on only where TEST_IMAGES to SEED are what they were
DATA_JSON = "data_vl.json"  # conversations; a relative picture path in it counts from its folder
IMAGE_FOLDERS = ["."]  # no picture outside of these is opened; "." is the folder of DATA_JSON, add yours: "e:/photos"
ON_BAD_SAMPLE = "stop"  # "stop": list bad conversations and end; "drop": list them and train on the others
TEST_IMAGES = 20  # pictures held out with everything said about them; more give steadier scores
IMAGE_SIZE = 280  # pixels a side, a multiple of 28; a picture costs (side / 28)^2 tokens: 280 is 100; None: its own
MAX_PIXELS = 400 * 28 * 28  # with IMAGE_SIZE = None: a larger picture is made smaller, its proportions stay
MAX_LENGTH = 2048  # tokens of a sequence: picture, prompt and captions
MODEL_FOLDER = "Qwen/Qwen2-VL-2B-Instruct"  # any Qwen2-VL folder
LOAD_IN_4BIT = False  # True: a quarter of the memory for the language model's weights; needs bitsandbytes
LORA_RANK = 64  # width of the adapter; its size and memory grow with it; 8 to 64 are usual
LORA_ALPHA = 16  # the adapter's output is scaled by alpha / rank
LORA_DROPOUT = 0.05  # share of the adapter's inputs dropped while training
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of the language model
BATCH_SIZE = 4  # pictures a pass, each with all its captions; halve it when memory runs out, ...
GRADIENT_ACCUMULATION = 4  # ... and double this: passes an optimizer step, which sees BATCH_SIZE x this many pictures
EPOCHS = 2  # times that each training picture is seen
LEARNING_RATE = 1e-4  # peak; 1e-5 to 5e-4 are usual for LoRA
WARMUP = 0.03  # share of the steps in which the rate climbs from 0; then it falls to 0 in a line
SEED = 42  # of the split, the shuffling, the adapter's first weights and its dropout
GRADIENT_CHECKPOINTING = "auto"  # True: about 30 % slower, 3 GB less at batch 4; "auto": on cards below 12 GB
DATALOADER_WORKERS = "auto"  # processes that open pictures, about 180 a second each; 0: none; "auto": 2 for a card
# Evaluation and saving
EVAL_BATCH_SIZE = 8  # held-out pictures at a time
MAX_NEW_TOKENS = 128  # a caption that doesn't end by itself is cut here
SAMPLES_SHOWN = 5  # held-out pictures followed from evaluation to evaluation, on the terminal and in SwanLab
LOG_STEPS = 5  # optimizer steps between two points of the curves
SAVE_STEPS = 100  # optimizer steps between checkpoints; the end of an epoch is always saved
KEEP_CHECKPOINTS = 2  # older ones are deleted
OUTPUT_FOLDER = "output/Qwen2-VL-2B"
SWANLAB_MODE = "auto"  # "online", "local", "offline", "disabled"; "auto": online if logged in, else local
SWANLAB_PROJECT, SWANLAB_EXPERIMENT = "Qwen2-VL-finetune", "qwen2vl-coco2014"
SWANLAB_TIMEOUT = 90  # seconds that SwanLab may hold up the start, and the end
SHARE_MACHINE_INFO = False  # True: host name, folder, command line and git address go into the run's page
# ---------------------------------------------------------------------------------------------------------------------

EpsImagePlugin.gs_binary = False  # a PostScript file that is named .jpg must not start Ghostscript
picture_marker = re.compile(r"<\|vision_start\|>(.*?)<\|vision_end\|>", re.DOTALL)
special_token = re.compile(r"<\|\w+\|>")  # the shape of what only the chat template may write
end_of_turn = "<|im_end|>"  # what it writes behind each turn
word = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")  # no punctuation, as COCO; a Chinese character is a word


def check_constants():
    """Refuse an impossible constant by its name, before anything is read."""
    counts = "TEST_IMAGES MAX_LENGTH LORA_RANK BATCH_SIZE GRADIENT_ACCUMULATION EVAL_BATCH_SIZE MAX_NEW_TOKENS"
    counts += " EPOCHS SAMPLES_SHOWN LOG_STEPS SAVE_STEPS KEEP_CHECKPOINTS"
    legal = dict.fromkeys(counts.split(), range(1, 10**9)) | {"SEED": range(2**32)}
    legal |= {"IMAGE_SIZE": (None, *range(56, 3585, 28)), "MAX_PIXELS": range(56**2, 3584**2 + 1)}
    positive, share = pandas.Interval(0, 10**6, closed="neither"), pandas.Interval(0, 1, closed="left")
    legal |= {"LORA_ALPHA": positive, "LEARNING_RATE": positive, "SWANLAB_TIMEOUT": positive, "LORA_DROPOUT": share}
    legal |= {"SWANLAB_MODE": ("auto", "online", "local", "offline", "disabled"), "LOAD_IN_4BIT": (True, False)}
    legal |= {"ON_BAD_SAMPLE": ("stop", "drop"), "DATALOADER_WORKERS": ("auto", *range(100)), "WARMUP": share}
    legal |= {"GRADIENT_CHECKPOINTING": ("auto", True, False), "SHARE_MACHINE_INFO": (True, False)}
    for name, values in legal.items():
        kinds = (int, float) if isinstance(values, pandas.Interval) else (int, str, type(None))
        if not isinstance(value := globals()[name], kinds) or value not in values:
            raise SystemExit(f"{name} = {value!r} at the top of train.py can't work: it must be in {values}.")
    if not isinstance(IMAGE_FOLDERS, list) or {*map(type, IMAGE_FOLDERS)} != {str}:
        raise SystemExit(f"IMAGE_FOLDERS = {IMAGE_FOLDERS!r} at the top of train.py: it must be a list of texts.")
    if LOAD_IN_4BIT and not transformers.utils.is_bitsandbytes_available():
        raise SystemExit("LOAD_IN_4BIT = True needs bitsandbytes: pip install -U bitsandbytes, or set it to False.")


def load_processor():
    """Load processor (tokenizer, chat template, image processor) and configuration of MODEL_FOLDER; no weights yet."""
    try:
        if json.loads((Path(MODEL_FOLDER) / "config.json").read_text(encoding="utf-8"))["model_type"] != "qwen2_vl":
            raise ValueError("its config.json names another model_type")
        return [kind.from_pretrained(MODEL_FOLDER) for kind in (transformers.AutoProcessor, transformers.AutoConfig)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{MODEL_FOLDER} is no Qwen2-VL, run load_model.py or set MODEL_FOLDER: {error}") from None


@functools.cache  # five captions of a picture cost one look
def locate_picture(name, home):
    """Return (absolute path, height, width as the model sees it) of a picture that is named relative to home."""
    path = Path(os.path.abspath(Path(home, name.replace("\\", "/"))))  # home falls away in front of an absolute name
    if not any(path.is_relative_to(os.path.abspath(Path(home, folder))) for folder in IMAGE_FOLDERS):
        raise ValueError(f"the picture {name} lies outside of IMAGE_FOLDERS: add its folder there, if it is yours")
    try:
        with Image.open(path if path.is_file() else "") as picture:  # its head; csv2json.py decodes all
            sideways = not IMAGE_SIZE and picture.getexif().get(ExifTags.Base.Orientation, 1) > 4
            height, width = picture.size if sideways else picture.size[::-1]
        height, width = [IMAGE_SIZE] * 2 if IMAGE_SIZE else smart_resize(height, width, 28, max_pixels=MAX_PIXELS)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture {name} can't be opened: {error}") from None
    return str(path), height, width


@functools.lru_cache(maxsize=1000)  # nearly all records ask the same
def encode_prompts(processor, questions):
    """Return the token ids that the chat template writes before each answer to the questions of a conversation."""
    gap = "<|endoftext|>"  # stands for an answer: a special token, so no question contains it
    turns = [{"role": role, "content": text} for ask in questions for role, text in (("user", ask), ("assistant", gap))]
    *prompts, _ = processor.apply_chat_template(turns, tokenize=False).split(gap)
    return [processor.tokenizer.encode(text.removeprefix(end_of_turn), add_special_tokens=False) for text in prompts]


def parse_record(record, processor):
    """Return pictures, texts "asked", token ids "prompt" [prompt, answer, ..., prompt] and "answer"; or ValueError."""
    try:
        roles = [turn["from"] for turn in record["conversations"]]
        texts = [turn["value"] for turn in record["conversations"]]
        names = [name.strip() for question in texts[::2] for name in picture_marker.findall(question)]
        forged = special_token.search("\n".join([*(picture_marker.sub("", text) for text in texts[::2]), *texts[1::2]]))
        "".join(texts).encode("utf-8")  # half a surrogate pair is no text, says the error
    except (KeyError, TypeError, AttributeError):
        raise ValueError('it is not {"conversations": [{"from": ..., "value": ...}, ...]}') from None
    if forged:
        raise ValueError(f"its text contains {forged[0]}, which only the chat template may write")
    if roles != ["user", "assistant"] * (len(roles) // 2) or not all(map(str.strip, texts[1::2])) or not names:
        raise ValueError("its turns are not from user, assistant, ..., an answer is empty, or it names no picture")
    pictures = [locate_picture(name, os.path.realpath(os.path.dirname(DATA_JSON))) for name in names]
    seen = [f"<|vision_start|>{'<|image_pad|>' * (h * w // 28**2)}<|vision_end|>" for _, h, w in pictures]
    prompts = encode_prompts(processor, tuple(picture_marker.sub(lambda _: seen.pop(0), ask) for ask in texts[::2]))
    encode = processor.tokenizer.backend_tokenizer.encode  # answers are many: without the tokenizer's own overhead
    answers = [encode(text + end_of_turn, add_special_tokens=False).ids for text in texts[1::2]]
    *prompt, answer = (ids for turn in zip(prompts, answers, strict=True) for ids in turn)
    if (tokens := sum(map(len, prompt)) + len(answer)) > MAX_LENGTH:
        raise ValueError(f"its {tokens} tokens are more than MAX_LENGTH = {MAX_LENGTH}")
    return {"pictures": pictures, "asked": tuple(texts[:-1]), "prompt": prompt, "answer": answer}


def read_conversations(processor):
    """Read DATA_JSON; records that can't be trained on are listed, then refused or dropped. Returns parsed records."""
    try:
        records = json.loads(Path(DATA_JSON).read_text(encoding="utf-8-sig"))
        if not records or not isinstance(records, list):
            raise ValueError("no list of conversations")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{DATA_JSON} can't be used ({error}): run csv2json.py, or set DATA_JSON.") from None
    conversations, bad = [], []
    for number, record in enumerate(tqdm(records, desc="Checking", unit=" conversations"), start=1):
        try:
            conversations.append(parse_record(record, processor))
        except ValueError as reason:
            bad.append(f"record {number}: {reason}")
    if bad:
        print(f"{len(bad)} of {len(records)} conversations can't be trained on:", *bad[:20], sep="\n  ")
        if ON_BAD_SAMPLE == "stop" or not conversations:
            raise SystemExit(f'Mend {DATA_JSON} ({bad[0]}), or set ON_BAD_SAMPLE = "drop" to go on without them.')
    return conversations


def split_by_picture(conversations):
    """Hold out the TEST_IMAGES pictures of smallest hash, the same on every run, with everything said about them."""
    home = os.path.realpath(os.path.dirname(DATA_JSON))  # not part of the hash: the same split in another folder
    names = {p: p[0].removeprefix(home).replace(os.sep, "/") for c in conversations for p in c["pictures"]}
    order = sorted(names, key=lambda picture: hashlib.sha256(f"{SEED}:{names[picture]}".encode()).digest())
    held_out, test, train, size = set(order[:TEST_IMAGES]), [], conversations, 0
    while size < len(held_out):  # a conversation about several pictures takes all of them along
        size = len(held_out)
        test += [conversation for conversation in train if not held_out.isdisjoint(conversation["pictures"])]
        train = [conversation for conversation in train if held_out.isdisjoint(conversation["pictures"])]
        held_out.update(picture for conversation in test for picture in conversation["pictures"])
    if not train:
        raise SystemExit(f"TEST_IMAGES = {TEST_IMAGES} of {len(names)} pictures leaves none to train on: lower it.")
    return train, test


def share_prompts(conversations, most_tokens):
    """Gather the captions of a prompt, up to most_tokens together: a row of the table is what CaptionCollator reads."""
    samples, latest = [], {}
    for conversation in conversations:
        pictures, key, pieces, answer = conversation.values()
        if key not in latest or latest[key]["tokens"] + len(answer) > most_tokens:
            labels = [piece if number % 2 else [-100] * len(piece) for number, piece in enumerate(pieces)]
            latest[key] = {"pictures": [p[0] for p in pictures], "sizes": [p[1:] for p in pictures], "answers": []}
            latest[key] |= {"prompt": sum(pieces, []), "labels": sum(labels, []), "tokens": sum(map(len, pieces))}
            samples.append(latest[key])
        latest[key]["answers"].append(answer)
        latest[key]["tokens"] += len(answer) + 1  # each has a line break of its own in front
    return datasets.Dataset.from_list(samples)


def prepare_tables(processor, resuming):
    """Check and split the data, once for all processes and all resumes. Returns {"train", "test"}, memory-mapped."""
    folder = Path(OUTPUT_FOLDER) / "table"
    kept = resuming and folder.is_dir() and datasets.load_from_disk(folder)["train"][0]["pictures"][0]
    if PartialState().is_main_process and not (kept and os.path.isfile(kept)):  # else the project was moved
        train, test = split_by_picture(read_conversations(processor))
        tables = datasets.DatasetDict(train=share_prompts(train, MAX_LENGTH), test=share_prompts(test, sys.maxsize))
        tables.save_to_disk(f"{folder}.tmp")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(f"{folder}.tmp", folder)
    PartialState().wait_for_everyone()
    return datasets.load_from_disk(folder)


def write_file(path, content):
    """Write text, or anything else as readable JSON, in one rename: a killed run never leaves half a file."""
    if PartialState().is_main_process:  # with torchrun there is one process a card, and one of them writes
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=2)
        Path(f"{path}.tmp").write_text(text, encoding="utf-8")
        os.replace(f"{path}.tmp", path)


class CaptionCollator:
    r"""Open pictures and build the model's input, for training and prediction alike; runs in worker processes.

    In training the captions of a picture share its prompt. A row of the batch, padded on the left, is
        prompt without its final "\n" | "\n" caption 1 <|im_end|> | "\n" caption 2 <|im_end|> | ...
    where a caption sees the prompt and itself, at positions that start where the prompt ends: loss and gradients are
    those of separate samples, for the price of one picture. Each has its own line break, to predict its first token.
    """

    # Qwen2-VL's own positions (time, row, column of a token); they need no weights, so a worker needs no model
    get_rope_index = transformers.Qwen2VLModel.get_rope_index
    get_vision_position_ids = transformers.Qwen2VLModel.get_vision_position_ids

    def __init__(self, processor, config):
        self.processor, self.config = processor, config

    def open_picture(self, name, size):
        """Open a picture upright, as RGB, resized here and nowhere else; a lost one comes grey, as L, and is told."""
        try:
            upright = ImageOps.exif_transpose(Image.open(name))
            picture = {"image": upright, "resized_height": size[0], "resized_width": size[1]}
            return process_vision_info([{"content": [picture]}])[0][0]
        except Exception as error:  # Pillow raises a dozen kinds of error on damaged files
            print(f"DROPPED: the picture {name} can't be opened ({error})", file=sys.stderr, flush=True)
            return Image.new("L", (size[1], size[0]), "grey")

    def encode(self, samples, with_answers=False):
        """Lay out samples as rows of T tokens, padded on the left; captions of a lost picture are not supervised.

        Returns input_ids, mm_token_type_ids (1: image), captions (below 0: padding, 0: prompt, k: caption k), labels
        (-100: not supervised), all (B, T); pixel_values (sum of patches, 1176); image_grid_thw (pictures, 3); names.
        """
        rows, pictures, names = [], [], []  # of a row: (token, caption, label) each
        for sample in samples:
            *row, newline = zip(sample["prompt"], [0] * len(sample["prompt"]), sample["labels"], strict=True)
            for caption, answer in enumerate(sample["answers"] if with_answers else [], start=1):
                row += [(newline[0], caption, -100), *((token, caption, token) for token in answer)]
            row = torch.tensor(row if with_answers else [*row, newline])  # (tokens, 3)
            opened = list(map(self.open_picture, sample["pictures"], sample["sizes"]))
            row[:, 2] = row[:, 2].where(torch.tensor(all(p.mode == "RGB" for p in opened)), -100)  # lost: no lesson
            rows.append(row)
            pictures += opened
            names += sample["pictures"]
        fields = torch.nn.utils.rnn.pad_sequence(rows, True, -100, "left")  # (B, T, 3)
        input_ids, captions, labels = fields.unbind(-1)  # (B, T) each
        input_ids = input_ids.where(captions >= 0, self.processor.tokenizer.pad_token_id)
        text = {"input_ids": input_ids, "captions": captions, "labels": labels}
        text |= {"mm_token_type_ids": (input_ids == self.processor.image_token_id).long()}
        return text | {**self.processor.image_processor(pictures, do_resize=False, return_tensors="pt"), "names": names}

    def __call__(self, samples):
        """Build a training batch, B rows of T tokens, N of them supervised.

        Returns encode()'s tensors; attention_mask (B, 1, T, T) bool, True where a token (row) sees another (column);
        position_ids (3, B, T); logits_to_keep (B, T) bool with N True; shift_labels (N,), what those predict.
        """
        if torch.utils.data.get_worker_info():  # Ctrl-C and the like are for the main process, which saves first
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        batch = self.encode(samples, with_answers=True)
        captions = batch.pop("captions")  # (B, T)
        prompt = {"mm_token_type_ids": batch.pop("mm_token_type_ids"), "attention_mask": captions == 0}
        position_ids, _ = self.get_rope_index(batch["input_ids"], image_grid_thw=batch["image_grid_thw"], **prompt)
        prompt_end = position_ids.amax(dim=(0, 2))[:, None] + 1  # position_ids (3, B, T), prompt_end (B, 1)
        for caption in range(1, int(captions.max()) + 1):
            inside = captions == caption  # (B, T)
            position_ids = torch.where(inside, prompt_end + inside.cumsum(1) - 1, position_ids)
        query, key = captions[:, :, None], captions[:, None, :]
        # padding sees padding: attention over a row without any True would be NaN
        attention_mask = ((query == key) | (key == 0)).tril()  # (B, T, T)
        # the logits at a token predict the next one; only those with something to predict are ever computed
        next_labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)  # (B, T)
        batch |= {"attention_mask": attention_mask[:, None], "position_ids": position_ids}
        return batch | {"logits_to_keep": next_labels != -100, "shift_labels": next_labels[next_labels != -100]}


def choose_device():
    """Return (device, dtype) to load the base model with, and say why; the adapter itself is float32 in any case."""
    if not torch.cuda.is_available():
        print(f"No CUDA card (torch {torch.__version__}, CUDA {torch.version.cuda}): the CPU is for small models only.")
        return PartialState(cpu=True).device, torch.float32
    half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    print(f"{torch.cuda.get_device_name()}, {half}")  # float16, on a T4 or RTX 20xx, can overflow; its loss is scaled
    return "cpu" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else PartialState().device, half  # shared out later


def load_model(device, dtype):
    """Load the base model and put a LoRA adapter beside each of LORA_TARGETS; only the adapter is trained."""
    try:
        options = {"dtype": dtype, "use_safetensors": True, "device_map": device}  # a checkpoint in pickles is not read
        if LOAD_IN_4BIT:
            four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
            four_bits |= {"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["model.visual", "lm_head"]}
            options["quantization_config"] = transformers.BitsAndBytesConfig(**four_bits)
        model = transformers.AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER, **options)
    except Exception as error:
        raise SystemExit(f"{MODEL_FOLDER} doesn't load: {error}. Damaged? load_model.py run again mends it.") from None
    layers = {n.rpartition(".")[2] for n, m in model.model.language_model.named_modules() if hasattr(m, "in_features")}
    if unknown := sorted(set(LORA_TARGETS) - layers):
        raise SystemExit(f"LORA_TARGETS names {unknown[0]}, and no layer of the language model is called that.")
    model.config.text_config.use_cache = False  # nothing is read twice in training; generate() sets its own
    # the vision tower is frozen: without a graph for it nothing of it is kept, recomputed or back-propagated
    model.model.visual.forward = torch.no_grad()(model.model.visual.forward)
    lora = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "lora_dropout": LORA_DROPOUT, "target_modules": LORA_TARGETS}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))


@contextlib.contextmanager
def tracking(constants):
    """Open a SwanLab run; whatever is wrong with SwanLab is printed, and training goes on."""
    os.environ.pop("SWANLAB_PROJECT", None)  # SwanLab refuses to start where it is set; the constant says it anyway
    probe = dict.fromkeys(("runtime", "git", "requirements", "swanlab"), SHARE_MACHINE_INFO)
    private = {"probe": swanlab.Settings.Probe(**probe), "terminal": swanlab.Settings.Terminal(proxy_type="none")}
    run = {"project": SWANLAB_PROJECT, "name": SWANLAB_EXPERIMENT, "config": constants}
    for mode in (SWANLAB_MODE, "offline"):  # offline: recorded on disk, for swanlab sync to upload
        try:
            settings = swanlab.Settings(interactive=False, **private)  # it asks for no key
            if mode == "auto":
                mode = os.environ.get("SWANLAB_MODE") or ("online" if settings.api_key else "local")
            if mode == "online":  # a start that hangs would let no other begin
                requests.head(settings.api_host, timeout=min(10, SWANLAB_TIMEOUT))
            run |= {"mode": mode, "settings": settings}
            ThreadPool(1).apply_async(swanlab.init, kwds=run).get(SWANLAB_TIMEOUT)
            break
        except Exception as problem:
            print(f"SwanLab does not start in mode {mode}: {problem!r}")
    try:
        yield
    finally:
        failure = sys.exc_info()[1]
        end = {"state": "crashed", "error": type(failure).__name__} if failure else {}  # its text may name folders
        try:
            if swanlab.has_run():
                advice = f"upload later: swanlab sync {swanlab.get_run().dir} --id {swanlab.get_run().id}"
                ThreadPool(1).apply_async(swanlab.finish, kwds=end).get(SWANLAB_TIMEOUT)
        except Exception as problem:
            print(f"SwanLab did not finish ({problem!r}), {advice}\n{failure or ''}", flush=True)
            code = getattr(failure, "code", 1) if failure else 0
            os._exit(code if isinstance(code, int) else 1)  # its waiting threads would keep the process alive for ever


def settle_run():
    """Describe this run for run.json; refuse to mix it with another one. Returns (run, newest whole checkpoint)."""
    if not Path(DATA_JSON).is_file():
        raise SystemExit(f"{DATA_JSON} is missing: run csv2json.py first, or set DATA_JSON.")
    run = {"constants": {name: value for name, value in globals().items() if name.isupper()}}
    run |= {"versions": {library.__name__: library.__version__ for library in (torch, transformers, peft)}}
    run["shape"] = pandas.Series(run["constants"]).loc["TEST_IMAGES":"SEED"].to_dict()
    run["shape"]["the data"] = hashlib.sha256(Path(DATA_JSON).read_bytes()).hexdigest()
    folder, path = Path(OUTPUT_FOLDER), Path(OUTPUT_FOLDER, "run.json")
    if any([*folder.glob("checkpoint-*"), *folder.glob("results.json")]):  # something was trained there
        old = json.loads(path.read_text(encoding="utf-8")).get("shape", {}) if path.is_file() else {}
        if changed := [f"{n} was {old.get(n)}, is {now}" for n, now in run["shape"].items() if old.get(n) != now]:
            raise SystemExit(f"{folder} holds another run ({'; '.join(changed)}): set OUTPUT_FOLDER to a new folder.")
    complete = {0: None}
    for checkpoint in folder.glob("checkpoint-*"):
        try:  # the Trainer writes this file last
            state = (checkpoint / "trainer_state.json").read_text(encoding="utf-8")
            complete[json.loads(state)["global_step"]] = str(checkpoint)
        except (OSError, ValueError):
            print(f"{checkpoint} is incomplete (the run was stopped while writing it): left out.")
    return run, complete[max(complete)]


class Guard(transformers.TrainerCallback):
    """Try the heaviest pass before the first step; lose nothing to a signal, a full disk or a resume."""

    training, stopped_by = False, 0  # the number of the signal that asked to stop

    def on_train_begin(self, args, state, control, model, train_dataloader, **kwargs):
        self.check_disk(model, copies=KEEP_CHECKPOINTS + 1)
        table, tokens = train_dataloader.dataset, train_dataloader.dataset["tokens"][:]
        trainable, captions = model.get_nb_trainable_parameters()[0], sum(map(len, table["answers"]))
        pads = max(height * width for sizes in table["sizes"] for height, width in sizes) // 28**2
        print(f"{captions} captions, {pads} tokens a picture at most; {trainable:,} parameters are trained")
        print(f"{state.max_steps} steps of {BATCH_SIZE * GRADIENT_ACCUMULATION} pictures; at step {state.global_step}")
        longest = sorted(range(len(table)), key=tokens.__getitem__)[-BATCH_SIZE:]
        batch = train_dataloader.collate_fn(table.select(longest))
        inputs = {name: tensor.to(args.device) for name, tensor in batch.items() if name != "names"}
        model.train()(**inputs).loss.backward()
        model.zero_grad()
        peak = torch.cuda.max_memory_allocated() or psutil.Process().memory_info().rss  # of the card, if any
        print(f"Tried the heaviest pass: {(peak + 8 * trainable) / 2**30:.2f} GiB, with the two numbers of Adam")
        self.training = True
        signal.signal(signal.SIGINT, self.stop)  # again: SwanLab has set its own
        signal.signal(signal.SIGTERM, self.stop)

    def check_disk(self, model, copies):
        needed = copies * 4 * sum(p.nbytes for p in model.parameters() if p.requires_grad)  # Adam keeps two more
        if shutil.disk_usage(OUTPUT_FOLDER).free < needed:
            raise SystemExit(f"No room for checkpoints in {OUTPUT_FOLDER}, {needed >> 20} MiB: make some, run again.")

    def stop(self, number, frame):
        """Ctrl-C and SIGTERM: in training stop after the step, which is saved; else, and asked twice, at once."""
        if self.stopped_by or not self.training:
            print("\nStopped. Run it again to go on.", flush=True)
            os._exit(128 + number)  # an exception gets lost where the signal meets a library's own clean-up
        print("\nStopping at the end of this step, which is saved; once more: at once.", flush=True)
        self.stopped_by = number

    def on_step_begin(self, args, state, control, **kwargs):  # so that any run draws the same dropout in a step
        torch.manual_seed(hash((SEED, state.global_step, args.process_index)))

    def on_step_end(self, args, state, control, model, **kwargs):
        stopped = utils.reduce(torch.tensor(self.stopped_by, device=args.device), "sum").item() > 0  # in any process
        control.should_training_stop |= stopped
        if stopped and not state.epoch.is_integer():
            args.eval_strategy = transformers.IntervalStrategy.NO  # half an epoch is not evaluated
        control.should_save |= stopped or state.epoch.is_integer()
        if control.should_save:
            self.check_disk(model, copies=1)
            if not all(parameter.isfinite().all() for parameter in model.parameters() if parameter.requires_grad):
                raise SystemExit("The adapter is no longer finite: lower LEARNING_RATE. The last checkpoint is kept.")


class CaptionTrainer(transformers.Trainer):
    """The Hugging Face Trainer, which looks at every loss and captions the held-out pictures at each evaluation."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        names = inputs.pop("names")
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training and not loss.isfinite():
            step = f"The loss is {loss} in step {self.state.global_step + 1}, on"
            raise SystemExit(f"{step} {', '.join(names)}: look at these, or lower LEARNING_RATE. Checkpoints are kept.")
        return loss

    def log(self, logs, *args, **kwargs):
        """Add speed and memory to the Trainer's line; give SwanLab all but what nobody looks at as a curve."""
        now, step = time.monotonic(), self.state.global_step
        if "loss" in logs:
            pace = (now - self.logged[0]) / (step - self.logged[1])  # seconds a step
            memory = torch.cuda.max_memory_allocated() or psutil.Process().memory_info().rss  # of the card, if any
            logs |= {"pictures/s": BATCH_SIZE * GRADIENT_ACCUMULATION / pace, "memory GiB": memory / 2**30}
            logs["minutes left"] = pace * (self.state.max_steps - step) / 60
            self.logged = now, step
        super().log(logs, *args, **kwargs)
        dull = "epoch|runtime|per_second|flos|train_loss|minutes"
        points = {f"train/{n}".replace("train/eval_", "eval/"): v for n, v in logs.items() if not re.search(dull, n)}
        if points and swanlab.has_run():
            swanlab.log(points, step=step)

    def caption(self, title):
        """Caption the held-out pictures, their input as in training. Returns a frame: caption, ended (by itself)."""
        tokenizer, captions = self.data_collator.processor.tokenizer, []
        end = tokenizer.convert_tokens_to_ids(end_of_turn)
        limits = {"max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
        batches = torch.utils.data.DataLoader(self.eval_dataset, EVAL_BATCH_SIZE, collate_fn=self.data_collator.encode)
        batches = self.accelerator.prepare_data_loader(batches)  # each process gets its share, on its device
        for batch in tqdm(batches, desc=title, position=0, leave=False, disable=not self.is_world_process_zero()):
            inputs = {name: value for name, value in batch.items() if name not in ("captions", "labels", "names")}
            inputs["attention_mask"] = (batch["captions"] >= 0).long()  # (B, T)
            with torch.inference_mode(), self.accelerator.autocast():
                tokens = self.model.generate(**inputs, **limits, do_sample=False)  # (B, T + new tokens)
            said = tokens[:, inputs["input_ids"].shape[1] :].tolist()
            texts = [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
            found = [{"caption": text, "ended": end in new} for text, new in zip(texts, said, strict=True)]
            captions += self.accelerator.gather_for_metrics(found, use_gather_object=True)  # in the table's order
        return pandas.DataFrame(captions)

    def evaluate(self, *args, **kwargs):
        metrics, table = super().evaluate(*args, **kwargs), self.eval_dataset
        if not hasattr(self, "before"):  # the base model says the same each time
            with self.model.disable_adapter():
                self.before = self.caption("Captions before")
        after, decode = self.caption("Captions now"), self.data_collator.processor.batch_decode
        human = [decode(answers, skip_special_tokens=True) for answers in table["answers"]]
        scores = {"before": score(self.before, human), "after": score(after, human)}
        rows = table.select_columns(["pictures", "sizes"]).to_dict() | {"human": human}
        rows |= {"before": self.before.to_dict("records"), "after": after.to_dict("records")}
        self.results = {"scores": scores, "captions": pandas.DataFrame(rows).to_dict("records")}
        self.log({f"eval_{name}": value for name, value in scores["after"].items()})
        if self.is_world_process_zero():
            publish(self.results, self.state, self.data_collator)
        self.logged = time.monotonic(), self.state.global_step  # an evaluation's time does not count as training
        return metrics


def build_trainer(model, collator, tables, guard):
    """Set up the Hugging Face Trainer; with torchrun the passes of a step are shared out over the processes."""
    if GRADIENT_ACCUMULATION % (processes := int(os.environ.get("WORLD_SIZE", 1))):
        raise SystemExit(f"GRADIENT_ACCUMULATION = {GRADIENT_ACCUMULATION}: set it to a multiple of {processes}.")
    on_card = torch.cuda.is_available()
    workers = 2 * on_card if DATALOADER_WORKERS == "auto" else DATALOADER_WORKERS
    options = {"num_train_epochs": EPOCHS, "learning_rate": LEARNING_RATE, "warmup_steps": WARMUP, "seed": SEED}
    options |= {"per_device_train_batch_size": BATCH_SIZE, "per_device_eval_batch_size": EVAL_BATCH_SIZE}
    options |= {"gradient_accumulation_steps": GRADIENT_ACCUMULATION // processes, "ddp_find_unused_parameters": False}
    options |= {"eval_strategy": "epoch", "eval_on_start": True, "logging_steps": LOG_STEPS, "save_steps": SAVE_STEPS}
    options |= {"bf16": model.dtype == torch.bfloat16, "fp16": model.dtype == torch.float16, "use_cpu": not on_card}
    small = on_card and torch.cuda.get_device_properties(PartialState().device).total_memory < 12e9
    options |= {"activation_checkpointing": small if GRADIENT_CHECKPOINTING == "auto" else GRADIENT_CHECKPOINTING}
    options |= {"dataloader_num_workers": workers, "dataloader_persistent_workers": workers > 0, "disable_tqdm": False}
    options |= {"dataloader_pin_memory": on_card, "remove_unused_columns": False}  # the collator wants samples whole
    # a PeftModel hides the labels' name; logits exist only where there is a label, so batches of them don't stack
    options |= {"label_names": ["labels"], "prediction_loss_only": True, "save_total_limit": KEEP_CHECKPOINTS}
    arguments = transformers.TrainingArguments(OUTPUT_FOLDER, **options)
    arguments._n_gpu = 1  # else the Trainer spreads each batch over all visible cards by threads, slower than one card
    return CaptionTrainer(model, arguments, collator, tables["train"], tables["test"], callbacks=[guard])


def score(said, references):
    """Measure how captions agree with what people wrote, by COCO's own classes; each caption gets its "CIDEr", too."""
    found = {n: [" ".join(word.findall(text.lower()))] for n, text in enumerate(said["caption"])}
    human = {n: [" ".join(word.findall(text.lower())) for text in texts] for n, texts in enumerate(references)}
    with contextlib.redirect_stdout(io.StringIO()):  # Bleu prints its working
        cider, said["CIDEr"] = Cider().compute_score(human, found)
        scores = {"CIDEr": cider, "BLEU-4": Bleu(4).compute_score(human, found)[0][3]}  # of BLEU-1 to BLEU-4
        scores["ROUGE-L"] = Rouge().compute_score(human, found)[0]
    scores["words a caption"] = said["caption"].str.count(word.pattern).mean()
    return scores | {"ended by itself": said["ended"].mean()}


def draw_row(row, collator):
    """Return a row of the gallery, its cells in HTML, the words marked that people used, too."""
    said = {part for text in row["human"] for part in word.findall(text.lower())}
    cells = {"held out": "", "people": "<br>".join(map(html.escape, row["human"]))}
    for picture in map(collator.open_picture, row["pictures"], row["sizes"]):
        ImageOps.contain(picture, (280, 280)).save(jpeg := io.BytesIO(), format="JPEG")  # 500 of them are 11 MB of page
        cells["held out"] += f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'
    for when in ("before", "after"):
        parts = re.split(f"({word.pattern})", row[when]["caption"])
        cells[when] = "".join(f"<b>{part}</b>" if part.lower() in said else html.escape(part) for part in parts)
    return cells | {"CIDEr": row["after"]["CIDEr"]}


def publish(results, state, collator):
    """Show the latest evaluation in report.html, in SwanLab and on the terminal."""
    frame, scores, step = pandas.DataFrame(results["captions"]), pandas.DataFrame(results["scores"]), state.global_step
    panels = [("loss", "eval_loss"), ("eval_CIDEr",), ("eval_BLEU-4", "eval_ROUGE-L"), ("learning_rate",)]
    panels += [("grad_norm",)]
    curves = pandas.DataFrame(state.log_history, columns=["step", *sum(panels, ())]).groupby("step").first()
    axes = curves.interpolate().plot(subplots=panels, layout=(2, 3), figsize=(15, 8), sharex=False)
    said = {"people": frame.human.explode(), "before": frame.before.str["caption"], "after": frame.after.str["caption"]}
    lengths = {who: texts.str.count(word.pattern).value_counts(normalize=True) for who, texts in said.items()}
    axes[1, 2].set_visible(True)
    pandas.DataFrame(lengths).plot.bar(ax=axes[1, 2], xlabel="words a caption", ylabel="share of the captions")
    pyplot.savefig(svg := io.StringIO(), format="svg", bbox_inches="tight")
    pyplot.close()
    look = {"border": 0, "float_format": "{:.3f}".format}
    page = "<!doctype html><meta charset=utf-8><style>* { font-family: sans-serif } b { background: #bfb }"
    page += " img { width: 200px } td, th { padding: 4px 12px; text-align: left; vertical-align: top }</style><h1>"
    page += "CIDEr {:.3f} before, {:.3f} after {} of {} steps".format(*scores.loc["CIDEr"], step, state.max_steps)
    page += f"</h1>{scores.to_html(**look)}<p>In common with people: CIDEr words that tell pictures apart,"
    page += f" BLEU-4 runs of four words, ROUGE-L the longest row of them.<p><svg{svg.getvalue().partition('<svg')[2]}"
    gallery = pandas.DataFrame([draw_row(row, collator) for row in results["captions"]])
    best, worst = gallery.nlargest(5, "CIDEr"), gallery.nsmallest(5, "CIDEr")
    for title, part in (("Best five", best), ("Worst five", worst), ("All", gallery)):
        page += f"<h2>{title}</h2>" + part.to_html(**look, escape=False, index=False)
    run = json.loads(Path(OUTPUT_FOLDER, "run.json").read_text(encoding="utf-8"))
    page += "<h2>Facts</h2>" + pandas.DataFrame([run["versions"] | run["constants"]]).T.to_html(border=0, header=False)
    write_file(report := Path(OUTPUT_FOLDER).absolute() / "report.html", page)
    text = "after:  {after[caption]}\nbefore: {before[caption]}\npeople: {human[0]}"
    texts = [text.format(**row) for row in results["captions"][:SAMPLES_SHOWN]]
    if swanlab.has_run():
        pictures = map(collator.open_picture, frame.pictures.str[0], frame.sizes.str[0])
        images = [swanlab.Image(p, caption=t, file_type="jpg") for t, p in zip(texts, pictures, strict=False)]
        swanlab.log({"samples": images, "captions": [swanlab.Text(t, caption=t[:50]) for t in texts]}, step=step)
    tqdm.write("\n".join(["", *texts, scores.to_string(float_format="{:.3f}".format), f"Step {step}: see {report}"]))


def main():
    check_constants()
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # one of the processes of torchrun speaks for all
    sys.stdout.reconfigure(errors="replace")  # not every console knows every character of a caption
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    transformers.ProgressCallback.on_prediction_step = transformers.TrainerCallback.on_prediction_step  # a bar in a bar
    pyplot.switch_backend("agg")  # draws without a screen
    transformers.set_seed(SEED)
    signal.signal(signal.SIGINT, (guard := Guard()).stop)
    signal.signal(signal.SIGTERM, guard.stop)
    device, dtype = choose_device()
    processor, config = load_processor()
    run, checkpoint = settle_run()
    if Path(OUTPUT_FOLDER, "results.json").is_file():
        print(f"{OUTPUT_FOLDER} holds this run, finished: open report.html there. For another one set OUTPUT_FOLDER.")
        return
    tables = prepare_tables(processor, resuming=checkpoint)
    collator, sample = CaptionCollator(processor, config), tables["train"][0]
    run["prompt"] = re.sub(r"(<\|image_pad\|>)+", r"\1", processor.decode(sample["prompt"]))
    write_file(Path(OUTPUT_FOLDER) / "run.json", run)
    print(f"A sample, [[learned]]:\n{run['prompt']}[[{processor.decode(collator([sample])['shift_labels'])}]]")
    print(f"{len(tables['train'])} pictures to train on, {len(tables['test'])} held out; results go to {OUTPUT_FOLDER}")
    model = load_model(device, dtype)
    trainer = build_trainer(model, collator, tables, guard)
    with tracking(run["constants"]) if trainer.is_world_process_zero() else contextlib.nullcontext():
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except Exception:  # told here: an open traceback would keep the workers alive, and they this process
            sys.excepthook(*sys.exc_info())
            raise SystemExit("See above. No memory: GRADIENT_CHECKPOINTING = True, or half (EVAL_)BATCH_SIZE") from None
        guard.training, weights = False, trainer.accelerator.get_state_dict(trainer.model_wrapped)  # FSDP: of all
        PartialState().destroy_process_group()  # its threads must not outlive Python, which aborts then
        if trainer.state.global_step < trainer.state.max_steps:
            print(f"Stopped at step {trainer.state.global_step}, which is saved: run it again to go on.")
            raise SystemExit(128 + guard.stopped_by)
        if trainer.is_world_process_zero():
            model.save_pretrained(unfinished := f"{OUTPUT_FOLDER}/adapter.tmp", state_dict=weights)
            processor.save_pretrained(unfinished)
            shutil.copytree(unfinished, OUTPUT_FOLDER, dirs_exist_ok=True, copy_function=os.replace)
            shutil.rmtree(unfinished)
            write_file(f"{OUTPUT_FOLDER}/results.json", trainer.results)  # last: with it the run counts as finished


if __name__ == "__main__":
    main()
