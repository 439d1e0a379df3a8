"""Stage 4 of 4: teach Qwen2-VL-2B-Instruct to caption pictures with LoRA, and show what it learned.

Reads   data_vl.json (csv2json.py) with the pictures it names, and Qwen/Qwen2-VL-2B-Instruct/ (load_model.py)
Writes  data_vl_train.json, data_vl_test.json: the split, by picture; swanlog/: the SwanLab run
        output/Qwen2-VL-2B/: the adapter with its processor, checkpoints, run.json (what made it), results.json (scores
        and captions before and after) and report.html (the same to look at: open it with a double click)
Run     python train.py, or on several cards: torchrun --nproc_per_node=2 train.py
        Stopped halfway, run it again: it goes on from the last complete checkpoint.
Takes   for 500 pictures minutes on a current card and about 6 GB of its memory at batch 4; the estimate for your
        constants is printed before the first step.
"""

import base64
import contextlib
import hashlib
import html
import importlib.metadata
import io
import json
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from itertools import cycle, groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.request import url2pathname

import datasets
import pandas
import psutil
import swanlab
import torch
import transformers
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from qwen_vl_utils import process_vision_info
from swanlab.integration.transformers import SwanLabCallback
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

# ---------------------------------------------------------------------------------------------------------------------
# Data
DATA_JSON = "data_vl.json"  # conversations; a relative picture path in it counts from its folder
TRAIN_JSON, TEST_JSON = "data_vl_train.json", "data_vl_test.json"  # written: what is trained on, what is held out
TEST_IMAGES = 20  # pictures held out with everything said about them; more give steadier scores
IMAGE_SIZE = 280  # pixels a side, a multiple of 28; a picture costs (side / 28)^2 tokens: 280 is 100
MAX_LENGTH = 2048  # tokens of a sequence: picture, prompt and captions
ON_BAD_SAMPLE = "stop"  # "stop": list bad conversations and end; "drop": list them and train on the others
ALLOW_REMOTE_IMAGES = False  # True: fetch the http(s):// pictures of the JSON; only for a JSON that you trust
# Model
MODEL_FOLDER = "Qwen/Qwen2-VL-2B-Instruct"  # any Qwen2-VL folder
LORA_RANK = 64  # width of the adapter; its size and memory grow with it; 8 to 64 are usual
LORA_ALPHA = 16  # the adapter's output is scaled by alpha / rank
LORA_DROPOUT = 0.05  # share of the adapter's inputs dropped while training
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # of the language model
# Optimisation
BATCH_SIZE = 4  # pictures a pass, each with all its captions; halve it when memory runs out, ...
GRADIENT_ACCUMULATION = 4  # ... and double this: passes an optimizer step, which sees BATCH_SIZE x this many pictures
EPOCHS = 2  # times that each training picture is seen
LEARNING_RATE = 1e-4  # peak; 1e-5 to 5e-4 are usual for LoRA
WARMUP = 0.03  # share of the steps in which the rate climbs from 0; then it falls to 0 in a line
SEED = 42  # of the split, the shuffling, the adapter's first weights and its dropout
GRADIENT_CHECKPOINTING = "auto"  # True: about 30 % slower, 3 GB less at batch 4; "auto": when memory is short
DATALOADER_WORKERS = "auto"  # processes that open pictures; 0: none; "auto": by the number of CPU cores
# Evaluation and saving
EVAL_BATCH_SIZE = 8  # pictures captioned at once
MAX_NEW_TOKENS = 128  # a caption that doesn't end by itself is cut here
LOG_STEPS = 5  # optimizer steps between two points of the curves
SAVE_STEPS = 100  # optimizer steps between checkpoints; the end of an epoch is always saved
KEEP_CHECKPOINTS = 2  # older ones are deleted
OUTPUT_FOLDER = "output/Qwen2-VL-2B"
MERGE_ADAPTER = False  # True: also write merged/, the model with the adapter folded in (as large as the model)
# SwanLab
SWANLAB_MODE = "auto"  # "online", "local", "offline", "disabled"; "auto": online if logged in, else local
SWANLAB_PROJECT, SWANLAB_EXPERIMENT = "Qwen2-VL-finetune", "qwen2vl-coco2014"
SWANLAB_TIMEOUT = 90  # seconds that SwanLab may hold up the start, and the end
SHARE_MACHINE_INFO = False  # True: host name, folder, command line and git address go into the run's page
# ---------------------------------------------------------------------------------------------------------------------

picture_marker = re.compile(r"<\|vision_start\|>(.*?)<\|vision_end\|>", re.DOTALL)
end_of_turn = "<|im_end|>"  # what the chat template writes behind each turn
word = re.compile(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+")  # no punctuation, as COCO; a Chinese character is a word


def check_constants():
    """Refuse an impossible constant by its name, before anything is read."""
    counts = "TEST_IMAGES MAX_LENGTH LORA_RANK LORA_ALPHA BATCH_SIZE GRADIENT_ACCUMULATION EVAL_BATCH_SIZE"
    counts += " MAX_NEW_TOKENS LOG_STEPS SAVE_STEPS KEEP_CHECKPOINTS SWANLAB_TIMEOUT"
    for names, is_legal, legal in (
        (counts, lambda value: isinstance(value, int) and value >= 1, "a whole number, 1 or more"),
        ("EPOCHS LEARNING_RATE", lambda value: isinstance(value, int | float) and value > 0, "a number above 0"),
        ("LORA_DROPOUT WARMUP", lambda value: isinstance(value, int | float) and 0 <= value < 1, "from 0 to below 1"),
        ("IMAGE_SIZE", lambda value: value in range(56, 9999, 28), "56, 84, 112, ...: a multiple of 28"),
        ("ON_BAD_SAMPLE", lambda value: value in ("stop", "drop"), '"stop" or "drop"'),
        ("GRADIENT_CHECKPOINTING", lambda value: value in (True, False, "auto"), 'True, False or "auto"'),
        ("DATALOADER_WORKERS", lambda value: value == "auto" or value in range(999), '"auto", 0 or more'),
        ("SWANLAB_MODE", lambda value: value in "auto online local offline disabled".split(), "a mode named there"),
    ):
        for name in names.split():
            if not is_legal(value := globals()[name]):
                raise SystemExit(f"{name} = {value!r} at the top of train.py can't work: it must be {legal}.")


def load_processor():
    """Load processor (tokenizer, chat template, image processor) and configuration of MODEL_FOLDER; no weights yet."""
    config = Path(MODEL_FOLDER) / "config.json"
    if not config.is_file() or json.loads(config.read_text(encoding="utf-8")).get("model_type") != "qwen2_vl":
        raise SystemExit(f"{MODEL_FOLDER} holds no Qwen2-VL model: run load_model.py first, or set MODEL_FOLDER.")
    return [kind.from_pretrained(MODEL_FOLDER) for kind in (transformers.AutoProcessor, transformers.AutoConfig)]


def locate_picture(name):
    """Return the absolute path of a picture, or its http(s):// address as it is; ValueError if it can't be used."""
    if name.startswith(("http://", "https://")):
        if not ALLOW_REMOTE_IMAGES:
            raise ValueError(f"{name} is remote: set ALLOW_REMOTE_IMAGES if you trust {DATA_JSON}")
        return name
    name = url2pathname(name.removeprefix("file://")) if name.startswith("file://") else name
    path = Path(DATA_JSON).absolute().parent / name.replace("\\", "/")  # the folder falls away from an absolute name
    try:
        Image.open(path).close()  # its head alone; csv2json.py decodes all of it
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture {name} can't be opened: {error}") from None
    return str(path)


def parse_record(record, processor):
    """Turn one record into what the model reads, in the order written; ValueError tells why it can't be trained on.

    Returns its pictures, chat_pieces() as "prompt" (all but the last) and "answer", and the tokens of both."""
    messages, names = [], []
    try:
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        for (role, value), expected in zip(turns, cycle(("user", "assistant")), strict=False):
            if role != expected:
                raise ValueError(f'a turn is from "{role}" where "{expected}" is due')
            parts = picture_marker.split(value) if role == "user" else [value]  # text, picture, text, ..., text
            for token in processor.tokenizer.added_tokens_decoder.values():
                if any(str(token) in text for text in parts[::2]):
                    raise ValueError(f"its text contains {token}, which only the chat template may write")
            kinds = zip(cycle(("text", "image")), parts, strict=False)
            messages.append({"role": role, "content": [{"type": kind, kind: part} for kind, part in kinds]})
            names += [name.strip() for name in parts[1::2]]
    except (KeyError, TypeError, AttributeError):
        raise ValueError('it is not {"conversations": [{"from": ..., "value": ...}, ...]}') from None
    if not turns or len(turns) % 2 or not all(value.strip() for _, value in turns[1::2]):
        raise ValueError("every question needs an answer that is not empty")
    if not names:
        raise ValueError("it names no picture between <|vision_start|> and <|vision_end|>")
    *prompt, answer = chat_pieces(processor, messages)
    *lengths, answer_tokens = map(len, processor.tokenizer([*prompt, answer])["input_ids"])
    # a picture is one token of the text until the processor expands it
    prompt_tokens = sum(lengths) + len(names) * ((IMAGE_SIZE // 28) ** 2 - 1)
    if prompt_tokens + answer_tokens > MAX_LENGTH:
        raise ValueError(f"its {prompt_tokens + answer_tokens} tokens are more than MAX_LENGTH = {MAX_LENGTH}")
    parsed = {"record": record, "names": names, "pictures": [locate_picture(name) for name in names]}
    return parsed | dict(prompt=prompt, answer=answer, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)


def chat_pieces(processor, messages):
    """Cut a conversation, as the chat template writes it, into [prompt, answer, prompt, answer, ...].

    An answer includes the <|im_end|> that ends it, which the model has to learn too.
    """
    pieces, written = [], ""
    for turn in range(1, len(messages), 2):
        prompt = processor.apply_chat_template(messages[:turn], add_generation_prompt=True, tokenize=False)
        answer = messages[turn]["content"][0]["text"] + end_of_turn
        pieces += [prompt[len(written) :], answer]
        written = prompt + answer
    return pieces


def read_conversations(processor):
    """Read DATA_JSON; records that can't be trained on are listed, then refused or dropped. Returns parsed records."""
    try:
        records = json.loads(Path(DATA_JSON).read_text(encoding="utf-8-sig"))
        if not records or not isinstance(records, list):
            raise ValueError("no list of conversations")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{DATA_JSON} can't be used ({error}): run csv2json.py, or set DATA_JSON.") from None
    conversations, bad = [], []
    for number, record in enumerate(records, start=1):
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
    names = {name for conversation in conversations for name in conversation["names"]}
    held_out = set(sorted(names, key=lambda name: hashlib.sha256(f"{SEED}:{name}".encode()).digest())[:TEST_IMAGES])
    test, train, size = [], conversations, 0
    while size < len(held_out):  # a conversation about several pictures takes all of them along
        size = len(held_out)
        test += [conversation for conversation in train if not held_out.isdisjoint(conversation["names"])]
        train = [conversation for conversation in train if held_out.isdisjoint(conversation["names"])]
        held_out.update(name for conversation in test for name in conversation["names"])
    if not train:
        raise SystemExit(f"TEST_IMAGES = {TEST_IMAGES} of {len(names)} pictures leaves none to train on: lower it.")
    return train, test


def write_file(path, content):
    """Write text, or anything else as readable JSON, in one rename: a killed run never leaves half a file."""
    if PartialState().is_main_process:  # with torchrun there is one process a card, and one of them writes
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=2)
        Path(f"{path}.tmp").write_text(text, encoding="utf-8")
        os.replace(f"{path}.tmp", path)


def build_table(conversations, name, most_tokens):
    """Gather the captions of a prompt, up to most_tokens together, in a memory-mapped table that workers share."""
    samples, latest = [], {}
    for conversation in conversations:
        key = (*conversation["pictures"], *conversation["prompt"])
        if key not in latest or latest[key]["tokens"] + conversation["answer_tokens"] > most_tokens:
            latest[key] = {column: conversation[column] for column in ("pictures", "prompt", "prompt_tokens")}
            latest[key] |= {"answers": [], "tokens": conversation["prompt_tokens"]}
            samples.append(latest[key])
        latest[key]["answers"].append(conversation["answer"])
        latest[key]["tokens"] += conversation["answer_tokens"] + 1  # see CaptionCollator
    folder = Path(OUTPUT_FOLDER) / "table" / name
    if PartialState().is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        datasets.Dataset.from_list(samples).save_to_disk(folder)
    PartialState().wait_for_everyone()
    return datasets.load_from_disk(folder)


class CaptionCollator:
    r"""Open pictures and build the model's input, for training and prediction alike; runs in worker processes.

    In training the captions of a picture share its prompt. A row of the batch, padded on the left, is

        prompt without its final "\n" | "\n" caption 1 <|im_end|> | "\n" caption 2 <|im_end|> | ...

    where a caption sees the prompt and itself, at positions that start where the prompt ends: loss and gradients are
    those of separate samples, for the price of one picture. Each caption has its own copy of the prompt's last token
    because that token is what predicts the caption's first one.
    """

    # Qwen2-VL's own positions (time, row, column of a token); they need no weights, so a worker needs no model
    get_rope_index = Qwen2VLModel.get_rope_index
    get_vision_position_ids = Qwen2VLModel.get_vision_position_ids

    def __init__(self, processor, config, image_size):
        self.processor, self.config, self.image_size = processor, config, image_size

    def open_picture(self, name):
        """Open a picture upright, as RGB, resized here and nowhere else to image_size x image_size."""
        try:
            picture = name if name.startswith(("http://", "https://")) else ImageOps.exif_transpose(Image.open(name))
            size = {"resized_height": self.image_size, "resized_width": self.image_size}
            return process_vision_info([{"content": [{"type": "image", "image": picture, **size}]}])[0][0]
        except Exception as error:
            raise ValueError(f"{name} can't be opened ({error}); csv2json.py lists such pictures") from error

    def encode(self, samples, with_answers):
        """Tokenize the pieces of each sample and lay them out as rows of T tokens, padded on the left.

        Returns input_ids, mm_token_type_ids (1: image), captions (below 0: padding, 0: prompt, k: caption k), labels
        (-100: not supervised), all (B, T); pixel_values (sum of patches, 1176); image_grid_thw (pictures, 3).
        """
        pieces = []  # (row, caption, is_answer, text)
        for row, sample in enumerate(samples):
            answers = sample["answers"] if with_answers else []
            *before, question = sample["prompt"]
            prompt = [*before, question.removesuffix("\n") if answers else question]
            pieces += [(row, 0, number % 2 == 1, text) for number, text in enumerate(prompt)]
            for caption, answer in enumerate(answers, start=1):
                pieces += [(row, caption, False, "\n"), (row, caption, True, answer)]
        pictures = [self.open_picture(name) for sample in samples for name in sample["pictures"]]
        encoded = self.processor(text=[text for *_, text in pieces], images=pictures, do_resize=False)
        rows = [[] for _ in samples]
        for number, (row, caption, is_answer, _) in enumerate(pieces):
            ids, types = encoded["input_ids"][number], encoded["mm_token_type_ids"][number]
            labels = ids if is_answer else [-100] * len(ids)
            rows[row].append(torch.tensor([ids, types, [caption] * len(ids), labels]))  # (4, tokens of the piece)
        rows = [torch.cat(row, dim=1).T for row in rows]  # (tokens, 4) each
        fields = pad_sequence(rows, batch_first=True, padding_value=-100, padding_side="left")  # (B, T, 4)
        input_ids, types, captions, labels = fields.unbind(-1)  # (B, T) each
        input_ids = input_ids.where(captions >= 0, self.processor.tokenizer.pad_token_id)
        text = {"input_ids": input_ids, "mm_token_type_ids": types.clamp(min=0), "captions": captions, "labels": labels}
        # patches of all pictures one after another: pictures of different sizes need no padding
        return text | {name: torch.as_tensor(encoded[name]) for name in ("pixel_values", "image_grid_thw")}

    def prompts(self, samples):
        """Build the input of generate(): what encode() returns without answers, and attention_mask (B, T)."""
        batch = self.encode(samples, with_answers=False)
        del batch["labels"]
        return batch | {"attention_mask": (batch.pop("captions") >= 0).long()}

    def __call__(self, samples):
        """Build a training batch, B rows of T tokens, N of them supervised.

        Returns encode()'s tensors; attention_mask (B, 1, T, T) bool, True where a token (row) sees another (column);
        position_ids (3, B, T); logits_to_keep (B, T) bool with N True; shift_labels (N,), what those predict.
        """
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
        return batch | {
            "attention_mask": attention_mask[:, None],
            "position_ids": position_ids,
            "logits_to_keep": next_labels != -100,
            "shift_labels": next_labels[next_labels != -100],
        }


def show_sample(collator, sample):
    """Print a sample as the model gets it, what is supervised between [[ and ]]."""
    batch, text = collator([sample]), ""
    tokens = zip((batch["labels"][0] != -100).tolist(), batch["input_ids"][0].tolist(), strict=True)
    for is_answer, run in groupby(tokens, key=lambda pair: pair[0]):
        part = collator.processor.tokenizer.decode([token for _, token in run])
        text += f"[[{part}]]" if is_answer else part
    text = text.replace("<|image_pad|>" * (pads := (IMAGE_SIZE // 28) ** 2), f"<|image_pad|> x {pads}")
    print(f"\nA sample as the model gets it, what is supervised in [[ ]]:\n{text}\n")


def choose_device():
    """Return (device, dtype of the base model) and say why; the adapter itself is float32 in any case."""
    if not torch.cuda.is_available():
        print("No CUDA card: on the CPU, in float32. Fine for a trial of a small model; the real one would take days.")
        return PartialState(cpu=True).device, torch.float32
    if (cards := torch.cuda.device_count()) > 1 and "LOCAL_RANK" not in os.environ:
        print(f"{cards} cards are visible, one is used. All of them: torchrun --nproc_per_node={cards} train.py")
    torch.set_float32_matmul_precision("high")  # TF32 for what is computed in float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return PartialState().device, torch.bfloat16
    print("This card has no bfloat16 (T4, RTX 20xx): float16 with loss scaling instead, which can overflow.")
    return PartialState().device, torch.float16


def load_model(dtype):
    """Load the base model and put a LoRA adapter beside each of LORA_TARGETS; only the adapter is trained."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(MODEL_FOLDER, dtype=dtype, use_safetensors=True)
    layers = {name.rpartition(".")[2] for name, _ in model.model.language_model.named_modules()}
    if unknown := sorted(set(LORA_TARGETS) - layers):
        raise SystemExit(f"LORA_TARGETS names {unknown[0]}, and no layer of the language model is called that.")
    model.config.text_config.use_cache = False  # nothing is read twice in training; generate() sets its own
    # the vision tower is frozen: without a graph for it nothing of it is kept, recomputed or back-propagated
    model.model.visual.forward = torch.no_grad()(model.model.visual.forward)
    lora = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "lora_dropout": LORA_DROPOUT, "target_modules": LORA_TARGETS}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


def plan_memory(model, table):
    """Estimate a step on the longest samples, settle GRADIENT_CHECKPOINTING by it; returns that and bytes by part."""
    # counted on a CPU: what a token keeps in each layer, the adapters' float32 inputs and dropout masks included
    text, size = model.config.text_config, model.dtype.itemsize
    tokens = BATCH_SIZE * max(table["tokens"])
    supervised = BATCH_SIZE * max(all_ - own for all_, own in zip(table["tokens"], table["prompt_tokens"], strict=True))
    mask = 4 if LORA_DROPOUT else 0  # bytes a number on a CPU; a card can do with less
    layer = text.hidden_size * (8 + 10 * size + 6 * mask) + text.intermediate_size * (4 * size + mask)
    layer = tokens * (layer + 7 * LORA_RANK * size)
    recomputed = layer + text.num_hidden_layers * tokens * text.hidden_size * size  # one layer, and the input of each
    parts = {
        "weights": sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        "adapter, gradients, Adam": 16 * sum(p.numel() for p in model.parameters() if p.requires_grad),
        "logits": supervised * text.vocab_size * (size + 12),  # computed, then float32: upcast, softmax, gradient
        "activations": text.num_hidden_layers * layer,
    }
    on_card = model.device.type == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_card else psutil.virtual_memory().available
    free += parts["weights"]  # they are loaded already, and the estimate has them too
    checkpointing = sum(parts.values()) > free if GRADIENT_CHECKPOINTING == "auto" else GRADIENT_CHECKPOINTING
    parts["activations"] = recomputed if checkpointing else parts["activations"]
    needed = f"{sum(parts.values()) / 2**30:.2f} GiB of {free / 2**30:.1f}"
    print(f"Expected memory: {needed}, checkpointing {checkpointing}; MiB:", {n: p >> 20 for n, p in parts.items()})
    if sum(parts.values()) > free:
        raise SystemExit(f"That takes {needed}: lower BATCH_SIZE or IMAGE_SIZE, or end what else uses the card.")
    return checkpointing, parts


@contextlib.contextmanager
def tracking(trainer, constants):
    """Let SwanLab record what the Trainer logs; whatever is wrong with SwanLab is printed, and training goes on."""
    os.environ.pop("SWANLAB_PROJECT", None)  # SwanLab refuses to start where it is set; the constant says it anyway
    probe = dict.fromkeys(("runtime", "git", "requirements", "swanlab"), SHARE_MACHINE_INFO)
    run = {"project": SWANLAB_PROJECT, "name": SWANLAB_EXPERIMENT, "config": constants}
    for mode in (SWANLAB_MODE, "offline"):  # offline: recorded on disk, for swanlab sync to upload
        try:
            settings = swanlab.Settings(interactive=False, probe=swanlab.Settings.Probe(**probe))  # it asks for no key
            if mode == "auto":
                mode = os.environ.get("SWANLAB_MODE") or ("online" if settings.api_key else "local")
            run |= {"mode": mode, "settings": settings}
            ThreadPool(1).apply_async(swanlab.init, kwds=run).get(SWANLAB_TIMEOUT)
            trainer.add_callback(SwanLabCallback(log_config=False))  # the run's configuration is the constants
            break
        except Exception as problem:
            print(f"SwanLab does not start in mode {mode}: {problem!r}")
    try:
        yield
    finally:
        end = {"state": "crashed", "error": traceback.format_exc()} if sys.exc_info()[0] else {}
        try:
            if swanlab.has_run():
                ThreadPool(1).apply_async(swanlab.finish, kwds=end).get(SWANLAB_TIMEOUT)
        except Exception as problem:
            print(f"SwanLab did not finish ({problem!r}); upload later: swanlab sync", *end.values(), flush=True)
            os._exit(bool(end))  # its threads, waiting for the network, would keep the process alive for ever


def last_checkpoint():
    """Return the newest complete checkpoint or None; incomplete ones are named and left out."""
    complete = {}
    for folder in Path(OUTPUT_FOLDER).glob("checkpoint-*"):
        try:  # the Trainer writes this file last
            state = (folder / "trainer_state.json").read_text(encoding="utf-8")
            complete[json.loads(state)["global_step"]] = str(folder)
        except (OSError, ValueError):
            print(f"{folder} is incomplete (the run was stopped while writing it): left out.")
    return complete[max(complete)] if complete else None


def settle_run(train, test):
    """Describe this run in run.json, and refuse to mix it with another one that OUTPUT_FOLDER holds."""
    records = json.dumps([[conversation["record"] for conversation in part] for part in (train, test)])
    questions = {picture_marker.sub("<picture>", c["record"]["conversations"][0]["value"]) for c in train}
    run = {"constants": {name: value for name, value in globals().items() if name.isupper()}}
    run |= {"prompts": sorted(questions)[:10], "data_sha256": hashlib.sha256(records.encode()).hexdigest()}
    run |= {"versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}}
    path = Path(OUTPUT_FOLDER) / "run.json"
    if path.is_file() and any([*path.parent.glob("checkpoint-*"), *path.parent.glob("results.json")]):  # was trained
        old = json.loads(path.read_text(encoding="utf-8"))
        shaping = "MODEL_FOLDER TEST_IMAGES IMAGE_SIZE MAX_LENGTH LORA_RANK LORA_ALPHA LORA_DROPOUT LORA_TARGETS"
        shaping += " BATCH_SIZE GRADIENT_ACCUMULATION EPOCHS LEARNING_RATE WARMUP SEED"
        pairs = {name: (old["constants"].get(name), run["constants"][name]) for name in shaping.split()}
        pairs["the data"] = (old["data_sha256"][:8], run["data_sha256"][:8])
        if changed := "; ".join(f"{name} was {was}, is {now}" for name, (was, now) in pairs.items() if was != now):
            raise SystemExit(f"{OUTPUT_FOLDER} holds another run ({changed}): set OUTPUT_FOLDER to a new folder.")
    if not Path(OUTPUT_FOLDER, "results.json").is_file():  # of a finished run it tells what made it
        write_file(path, run)
    return run


class Rehearsal(transformers.TrainerCallback):
    """Say what is about to happen and try the heaviest pass; seed each step, so that a resumed run draws the same."""

    def on_train_begin(self, args, state, control, model, train_dataloader, **kwargs):
        table, steps = train_dataloader.dataset, state.max_steps - state.global_step
        (trainable, _), captions = model.get_nb_trainable_parameters(), sum(map(len, table["answers"]))
        print(f"{captions} captions, {(IMAGE_SIZE // 28) ** 2} tokens a picture; {trainable:,} parameters are trained")
        print(f"{state.max_steps} steps of {BATCH_SIZE * GRADIENT_ACCUMULATION} pictures; at step {state.global_step}")
        on_card, tokens = args.device.type == "cuda", table["tokens"][:]
        longest = sorted(range(len(table)), key=tokens.__getitem__)[-BATCH_SIZE:]
        batch = train_dataloader.collate_fn(table.select(longest))
        for _ in range(1 + on_card):  # the first pass on a card is slow
            start = time.monotonic()
            inputs = {name: tensor.to(args.device) for name, tensor in batch.items()}
            model.train()(**inputs).loss.backward()
            model.zero_grad()
            torch.get_device_module(args.device).synchronize()
        minutes = (time.monotonic() - start) / 60 * args.gradient_accumulation_steps * steps
        peak = (torch.cuda.max_memory_allocated() + 8 * trainable) / 2**30  # Adam's two numbers are still to come
        print(f"Tried the heaviest pass: at most {minutes:.0f} minutes", f"in {peak:.2f} GiB of the card\n" * on_card)

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(hash((SEED, state.global_step, args.process_index)))

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step % SAVE_STEPS > 0 and state.global_step < state.max_steps  # not twice


def build_trainer(model, collator, train_table, test_table, checkpointing):
    """Set up the Hugging Face Trainer; with torchrun the passes of a step are shared out over the processes."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if GRADIENT_ACCUMULATION % processes:
        raise SystemExit(f"GRADIENT_ACCUMULATION = {GRADIENT_ACCUMULATION}: set it to a multiple of {processes}.")
    on_card = model.device.type == "cuda"
    workers = DATALOADER_WORKERS
    if workers == "auto":  # a model on the CPU needs the cores itself
        workers = min(2 if os.name == "nt" else 8, max(1, os.cpu_count() // processes - 1)) if on_card else 0
    arguments = transformers.TrainingArguments(
        output_dir=OUTPUT_FOLDER,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=GRADIENT_ACCUMULATION // processes,
        num_train_epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        warmup_steps=WARMUP,
        bf16=model.dtype == torch.bfloat16,
        fp16=model.dtype == torch.float16,
        use_cpu=not on_card,
        activation_checkpointing=checkpointing,
        eval_strategy="epoch",
        save_steps=SAVE_STEPS,
        save_total_limit=KEEP_CHECKPOINTS,
        logging_steps=LOG_STEPS,
        prediction_loss_only=True,  # logits exist only where there is a label, so batches of them don't stack
        label_names=["labels"],  # a PeftModel hides them, and without labels there is no eval_loss
        remove_unused_columns=False,  # the collator wants the samples whole
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=on_card,
        ddp_find_unused_parameters=False,
        seed=SEED,
    )
    arguments._n_gpu = 1  # else the Trainer spreads each batch over all visible cards by threads, slower than one card
    own = {"processing_class": collator.processor, "callbacks": [Rehearsal()]}
    return transformers.Trainer(model, arguments, collator, train_table, test_table, **own)


def save_model(model, processor, folder):
    """Save a model (or the adapter of one) with its processor; files appear in the folder only when all are written."""
    temporary = Path(f"{folder}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    shutil.copytree(temporary, folder, dirs_exist_ok=True, copy_function=os.replace)
    shutil.rmtree(temporary)


@torch.inference_mode()
def caption_pictures(model, collator, table, title):
    """Caption pictures greedily, their input made as in training. Returns [{"caption": str, "ended": by itself}]."""
    tokenizer = collator.processor.tokenizer
    end = tokenizer.convert_tokens_to_ids(end_of_turn)
    limits = {"max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    greedy = transformers.GenerationConfig(do_sample=False, **limits)
    model.eval()
    captions = []
    for start in tqdm(range(0, len(table), EVAL_BATCH_SIZE), desc=title, unit="batch"):
        samples = table.select(range(start, min(start + EVAL_BATCH_SIZE, len(table))))
        batch = {name: tensor.to(model.device) for name, tensor in collator.prompts(samples).items()}
        with torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32):
            output = model.generate(**batch, generation_config=greedy)  # (B, T + new tokens)
        for tokens in output[:, batch["input_ids"].shape[1] :].tolist():
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            captions.append({"caption": text, "ended": end in tokens})
    return captions


def score(captions, references):
    """Measure how captions agree with what people wrote of the same pictures, by COCO's own classes."""
    found = {n: [" ".join(word.findall(caption["caption"].lower()))] for n, caption in enumerate(captions)}
    human = {n: [" ".join(word.findall(text.lower())) for text in texts] for n, texts in enumerate(references)}
    measures = {"CIDEr": Cider(), "BLEU-4": Bleu(4), "ROUGE-L": Rouge()}
    with contextlib.redirect_stdout(io.StringIO()):  # Bleu prints its working
        scores = {name: measure.compute_score(human, found)[0] for name, measure in measures.items()}
    scores["BLEU-4"] = scores["BLEU-4"][3]  # of BLEU-1 to BLEU-4
    scores["words a caption"] = sum(len(text.split()) for (text,) in found.values()) / len(captions)
    scores["ended by itself"] = sum(caption["ended"] for caption in captions) / len(captions)
    return {name: float(value) for name, value in scores.items()}


def compare(model, collator, table):
    """Caption the held-out pictures with the adapter off and on. Returns scores and captions, before and after."""
    human = [[answer.removesuffix(end_of_turn) for answer in sample["answers"]] for sample in table]
    with model.disable_adapter():
        before = caption_pictures(model, collator, table, "Captions before")
    after = caption_pictures(model, collator, table, "Captions after")
    scores = {"before": score(before, human), "after": score(after, human)}
    rows = zip(table["pictures"], human, before, after, strict=True)
    return {"scores": scores, "captions": [{"pictures": p, "human": h, "before": b, "after": a} for p, h, b, a in rows]}


def publish(results, collator):
    """Show the results: table on the terminal, gallery in report.html, both in SwanLab."""
    scores = pandas.DataFrame(results["scores"])
    page = "<!doctype html><meta charset=utf-8><style>* { font: 15px sans-serif } img { height: 180px }</style>"
    page += scores.to_html(float_format="{:.3f}".format) + "<table><tr><th>held out<th>people<th>before<th>after"
    gallery = []
    for row in results["captions"]:
        page += "<tr><td>"
        texts = ["\n".join(row["human"]), row["before"]["caption"], row["after"]["caption"]]
        for picture in map(collator.open_picture, row["pictures"]):
            gallery.append((picture, "\n| ".join(texts)))
            jpeg = io.BytesIO()
            picture.save(jpeg, format="JPEG")
            page += f'<img src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'
        page += "".join("<td>" + html.escape(text).replace("\n", "<br>") for text in texts)
    write_file(Path(OUTPUT_FOLDER) / "report.html", page)
    try:
        if swanlab.has_run():
            swanlab.log({f"scores/{name} {when}": value for when in scores for name, value in scores[when].items()})
            swanlab.log({"gallery": [swanlab.Image(p, caption=text, file_type="jpg") for p, text in gallery]})
    except Exception as problem:  # never the end of a training
        print(f"SwanLab did not take the results: {problem!r}")
    print(f"\n{len(gallery)} held-out pictures, see {Path(OUTPUT_FOLDER).absolute() / 'report.html'}")
    print(scores.to_string(float_format="{:.3f}".format))


def main():
    check_constants()
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # one of the processes of torchrun speaks for all
    sys.stdout.reconfigure(errors="replace")  # not every console knows every character of a caption
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns in every worker process
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.set_seed(SEED)
    device, dtype = choose_device()
    processor, config = load_processor()
    train, test = split_by_picture(read_conversations(processor))
    run = settle_run(train, test)
    if Path(OUTPUT_FOLDER, "results.json").is_file() and (not MERGE_ADAPTER or Path(OUTPUT_FOLDER, "merged").is_dir()):
        print(f"{OUTPUT_FOLDER} holds this run, finished: open report.html there. For another one set OUTPUT_FOLDER.")
        return
    Path(OUTPUT_FOLDER, "results.json").unlink(missing_ok=True)  # there is something left to do
    for path, part in ((TRAIN_JSON, train), (TEST_JSON, test)):
        write_file(path, [conversation["record"] for conversation in part])
    train_table, test_table = build_table(train, "train", MAX_LENGTH), build_table(test, "test", sys.maxsize)
    collator = CaptionCollator(processor, config, IMAGE_SIZE)
    show_sample(collator, train_table[0])
    print(f"{len(train_table)} pictures to train on, {len(test_table)} held out; results go to {OUTPUT_FOLDER}")
    model = load_model(dtype).to(device)
    trainer = build_trainer(model, collator, train_table, test_table, plan_memory(model, train_table)[0])
    with tracking(trainer, run["constants"]) if trainer.is_world_process_zero() else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=last_checkpoint())
        if trainer.is_world_process_zero():
            save_model(model, processor, OUTPUT_FOLDER)
            results = compare(model, collator, test_table)
            publish(results, collator)
            if MERGE_ADAPTER:
                save_model(model.merge_and_unload(), processor, f"{OUTPUT_FOLDER}/merged")
            write_file(f"{OUTPUT_FOLDER}/results.json", results)  # last: with it the run counts as finished


if __name__ == "__main__":
    main()
