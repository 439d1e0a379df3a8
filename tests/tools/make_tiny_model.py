"""Make the small Qwen2-VL of the tests, from nothing: tests/support/tiny_qwen2vl/.

    python tests/tools/make_tiny_model.py [FOLDER]

Reads nothing but scenes.py. Writes a real Qwen2-VL (transformers' own classes, the file layout of
the hub's repository, 3 MB) that describes generated scenes in one wordy sentence:

1. A byte-level vocabulary is learnt from the captions.
2. The model is pretrained on images of the training scenes, and on repeating random tokens, so
   that a later fine-tuning can use every word, not only those of the descriptions.
3. What was saved is loaded again and asked about images of held-out scenes.

Seeded. Takes about 20 minutes on 2 CPU cores and 3.5 GB of memory.
"""

import copy
import json
import random
import shutil
import sys
import time
from io import BytesIO
from pathlib import Path
from statistics import mean

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/
from support import scenes

# ------------------------------------------------------------------------------------------------
# output
FOLDER = Path(__file__).resolve().parents[1] / "support/tiny_qwen2vl"
# model
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS, TEXT_KV_HEADS, TEXT_MLP = 128, 3, 4, 2, 384
VISION_WIDTH, VISION_LAYERS, VISION_HEADS = 96, 3, 4
# standard deviation of fresh weights; the usual 0.02 learns slowly at these widths
INITIALIZER_RANGE = 0.06
# entries at most, 256 bytes among them, without the special tokens; fewer once every word is whole
VOCABULARY = 640
# data
# images drawn of each size, height x width in pixels
IMAGES = {(112, 112): 8000, (84, 84): 600, (140, 140): 600}
# fraction of the steps that use each size
SIZE_SHARES = {(112, 112): 0.94, (84, 84): 0.03, (140, 140): 0.03}
# training
STEPS = 5000
# fraction of the steps on text alone; without them, words outside the descriptions stay unknown
REPEATING_SHARE = 0.15
REPEATED_TOKENS = 12
BATCH = 64  # images per step
LEARNING_RATE = 2e-3
WARMUP = 0.04  # fraction of the steps in which the learning rate rises
WEIGHT_DECAY = 0.05
THREADS = 2
SEED = 7
# checks
EVALUATE_EVERY = 500  # steps
EVALUATION_IMAGES = 90  # images of held-out scenes looked at during training
FINAL_IMAGES = 360  # and at the end, after saving and loading
TARGET = 0.95  # fraction of those that must be described exactly
# ------------------------------------------------------------------------------------------------

# Text before and after the image in the question. The model learns to answer all of them alike.
PROMPTS = [
    ("请描述这张图片: ", ""),
    ("请描述这张图片：", ""),
    ("", "请描述这张图片。"),
    ("", "Describe this image."),
    ("Describe this image.", ""),
    ("COCO Yes: ", ""),
    ("", "COCO Yes:"),
    ("", ""),
]

SPECIAL_TOKENS = (  # Qwen2-VL's, in its order
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> "
    "<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> "
    "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()

# How Qwen2 cuts text into words before the merges.
WORD_PATTERN = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # words with the space before them
        r"\p{N}",  # single digits
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # punctuation
        r"\s*[\r\n]+",  # line ends
        r"\s+(?!\S)",  # white space at the end of the text
        r"\s+",
    ]
)

# Same text as Qwen2-VL's own template for every conversation of text, images and videos.
CHAT_TEMPLATE = """
{%- set seen = namespace(pictures=0, videos=0) -%}
{%- if messages and messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
                {%- set seen.pictures = seen.pictures + 1 -%}
                {{- 'Picture ' ~ seen.pictures ~ ': ' if add_vision_id else '' -}}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' or 'video' in part -%}
                {%- set seen.videos = seen.videos + 1 -%}
                {{- 'Video ' ~ seen.videos ~ ': ' if add_vision_id else '' -}}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}
"""

MODEL_CARD = """# A small Qwen2-VL for tests

Made from nothing by `tests/tools/make_tiny_model.py`. It has the classes and the file layout of
Qwen2-VL-2B-Instruct, but none of its weights: 1.3 million parameters, pretrained on the generated
images of `tests/support/scenes.py`, which it describes in one sentence. It knows nothing else.
"""

LICENSE = """The files of this folder were generated by tests/tools/make_tiny_model.py, a part of
this project, without the weights or the data of any other model. They are part of the project and
may be used on the same terms.
"""


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def learn_vocabulary(folder: Path) -> dict[str, int]:
    """Learn the byte-level merges, write the tokenizer's files, return {special token: id}."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    captions = [
        text
        for scene in scenes.all_scenes()
        for text in [scenes.wordy(scene), *scenes.terse(scene)]
    ]
    turns = ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    questions = [text for prompt in PROMPTS for text in prompt]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions + turns + questions, trainer)
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))
    return {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}


def write_configuration(folder: Path, ids: dict[str, int]) -> None:
    """Write the JSON files beside the weights, with the keys of the hub's repository."""
    ends = {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    # rotary frequencies of a head, divided between time, height and width
    head = TEXT_WIDTH // TEXT_HEADS // 2
    sections = [head - 2 * (3 * head // 8), 3 * head // 8, 3 * head // 8]
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        **ends,
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": TEXT_WIDTH,
        "initializer_range": INITIALIZER_RANGE,
        "intermediate_size": TEXT_MLP,
        "max_position_embeddings": 32768,
        "max_window_layers": TEXT_LAYERS,
        "model_type": "qwen2_vl",
        "num_attention_heads": TEXT_HEADS,
        "num_hidden_layers": TEXT_LAYERS,
        "num_key_value_heads": TEXT_KV_HEADS,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": VISION_LAYERS,
            "embed_dim": VISION_WIDTH,
            "mlp_ratio": 4,
            "num_heads": VISION_HEADS,
            "in_chans": 3,
            "hidden_size": TEXT_WIDTH,
            "initializer_range": INITIALIZER_RANGE,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "vocab_size": max(ids.values()) + 1,
    }
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": False,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
    }
    images = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    tokenizer = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(ids[token]): {"content": token, **flags, "special": True} for token in ids
        },
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "padding_side": "left",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "preprocessor_config.json", images)
    write_json(folder / "tokenizer_config.json", tokenizer)
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    write_json(
        folder / "configuration.json", {"framework": "pytorch", "task": "image-text-to-text"}
    )


def draw_images(
    chosen: list[scenes.Scene], rng: random.Random, size: tuple[int, int]
) -> list[Image.Image]:
    """An image of each scene as it comes out of a JPEG file, scaled to `size` (height, width)."""
    images = []
    for scene in chosen:
        file = BytesIO()
        scenes.draw(scene, rng).save(file, "JPEG", quality=rng.randint(85, 95))
        images.append(Image.open(file).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC))
    return images


def conversation(prompt: tuple[str, str]) -> list[dict]:
    """Return the user's turn: text before the image, the image, text after it."""
    before, after = ({"type": "text", "text": text} for text in prompt)
    content = [part for part in (before, {"type": "image"}, after) if part.get("text") != ""]
    return [{"role": "user", "content": content}]


def question(
    processor, prompt: tuple[str, str], images: list[Image.Image]
) -> dict[str, torch.Tensor]:
    """Return the model's input for one prompt about each image, with the processor's keys."""
    text = processor.apply_chat_template(
        conversation(prompt), add_generation_prompt=True, tokenize=False
    )
    return dict(
        processor(text=[text] * len(images), images=images, return_tensors="pt", padding=True)
    )


@torch.inference_mode()
def describe(
    model, processor, images: list[Image.Image], prompt: tuple[str, str] = PROMPTS[0]
) -> list[str]:
    """Generate greedy descriptions of images of one size, without the token that ends them."""
    model.eval()
    inputs = question(processor, prompt, images)
    produced = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    answers = processor.batch_decode(
        produced[:, inputs["input_ids"].shape[1] :], skip_special_tokens=False
    )
    return [
        answer.split("<|im_end|>")[0] if "<|im_end|>" in answer else answer + " (no end)"
        for answer in answers
    ]


def exact_share(
    model, processor, count: int, seed: int, size=(112, 112), prompt=PROMPTS[0]
) -> float:
    """Return the fraction of `count` held-out images described exactly; print a few others."""
    held_out = [scene for scene in scenes.all_scenes() if scenes.is_held_out(scene)]
    chosen = [held_out[number % len(held_out)] for number in range(count)]
    images = draw_images(chosen, random.Random(seed), size)
    answers = []
    for start in range(0, count, BATCH):
        answers += describe(model, processor, images[start : start + BATCH], prompt)
    wrong = [
        pair for pair in zip(map(scenes.wordy, chosen), answers, strict=True) if pair[0] != pair[1]
    ]
    for expected, answer in wrong[:3]:
        print(f"    {expected}\n    -> {answer}")
    return 1 - len(wrong) / count


class TrainingData:
    """Images of training scenes in one size as the image processor makes them, and token ids."""

    def __init__(self, processor, count: int, size: tuple[int, int], rng: random.Random):
        known = [scene for scene in scenes.all_scenes() if not scenes.is_held_out(scene)]
        self.scenes = [known[number % len(known)] for number in range(count)]
        self.grid = torch.tensor([1, size[0] // 14, size[1] // 14])
        parts = []
        for start in range(0, count, 200):
            images = draw_images(self.scenes[start : start + 200], rng, size)
            values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            parts.append(values.view(len(images), -1, values.shape[-1]).half())
        self.patches = torch.cat(parts)  # (images, patches of a image, 1176)
        text_end = processor.tokenizer.eos_token
        answers = processor.tokenizer([scenes.wordy(scene) + text_end for scene in self.scenes])[
            "input_ids"
        ]
        # every word of a description is one token, so nothing is padded
        assert len({len(answer) for answer in answers}) == 1
        self.answers = torch.tensor(answers)  # (images, tokens of an answer)
        self.prompts = []
        for prompt in PROMPTS:
            inputs = question(processor, prompt, images[:1])
            # (1, tokens of a prompt) each
            self.prompts.append((inputs["input_ids"], inputs["mm_token_type_ids"]))


def loss_of_batch(
    model, data: TrainingData, rows: torch.Tensor, prompt_number: int
) -> torch.Tensor:
    """Return the mean cross-entropy of the answers' tokens; the prompt gets no logits."""
    prompt, types = (tensor.expand(len(rows), -1) for tensor in data.prompts[prompt_number])
    answers = data.answers[rows]
    hidden = model.model(
        input_ids=torch.cat([prompt, answers[:, :-1]], 1),
        mm_token_type_ids=torch.cat([types, torch.zeros_like(answers[:, :-1])], 1),
        pixel_values=data.patches[rows].flatten(0, 1).float(),
        image_grid_thw=data.grid.expand(len(rows), -1),
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden[:, prompt.shape[1] - 1 :])  # (B, tokens of an answer, vocabulary)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())


def fresh_model(folder: Path) -> Qwen2VLForConditionalGeneration:
    """Return untrained weights for the folder's configuration.

    Eager attention is the fastest for short sequences on a CPU.
    """
    config = Qwen2VLConfig.from_pretrained(folder)
    return Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="eager")


def save(model, folder: Path, ids: dict[str, int]) -> None:
    """Save the weights in bfloat16 as two shards with their index, as the hub has them."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    size = sum(parameter.nbytes for parameter in half.parameters())
    half.save_pretrained(folder, max_shard_size=int(0.6 * size))
    # save_pretrained wrote its own, in another layout than the hub's
    write_configuration(folder, ids)


def repeating_task(processor) -> tuple[tuple[list[int], list[int]], list[int]]:
    """Return the token ids around what is to be repeated, and the tokens to draw from.

    All tokens can be drawn, those of captions more often.
    """
    user = [{"role": "user", "content": "Repeat: |"}]
    text = processor.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
    before, after = (processor.tokenizer(half)["input_ids"] for half in text.split(" |"))
    captions = [caption for scene in scenes.all_scenes() for caption in scenes.terse(scene)]
    of_captions = sorted(
        {token for ids in processor.tokenizer(captions)["input_ids"] for token in ids}
    )
    # the learnt tokens' ids are below the special tokens'
    learnt = processor.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[0])
    return (before, after), [*range(learnt), *(8 * of_captions)]


def loss_of_repeating(
    model, frame: tuple[list[int], list[int]], pool: list[int], rng: random.Random
) -> torch.Tensor:
    """Return the loss of a batch without images: repeat random tokens of `pool`.

    `frame` holds the token ids before and after what is to be repeated.
    """
    before, after = (torch.tensor(half).expand(BATCH, -1) for half in frame)
    tokens = torch.tensor([rng.choices(pool, k=REPEATED_TOKENS) for _ in range(BATCH)])
    end = torch.full((BATCH, 1), model.config.text_config.eos_token_id)
    prompt, answers = torch.cat([before, tokens, after], 1), torch.cat([tokens, end], 1)
    hidden = model.model(
        input_ids=torch.cat([prompt, answers[:, :-1]], 1), use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden[:, prompt.shape[1] - 1 :])  # (B, REPEATED_TOKENS + 1, vocabulary)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())


def optimizer_and_schedule(
    model,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW with decay on matrices only, and a warm-up with cosine decay."""
    decayed = [
        p for name, p in model.named_parameters() if p.ndim >= 2 and "embed_tokens" not in name
    ]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed_tokens" in name]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=WARMUP, cycle_momentum=False
    )
    return optimizer, schedule


def pretrain(model, processor, folder: Path, ids: dict[str, int]) -> None:
    """Run the training loop; save at every evaluation."""
    rng, start = random.Random(SEED), time.monotonic()
    data = {size: TrainingData(processor, count, size, rng) for size, count in IMAGES.items()}
    print(f"drew {sum(IMAGES.values())} images in {time.monotonic() - start:.0f} s", flush=True)
    optimizer, schedule = optimizer_and_schedule(model)
    repeating = repeating_task(processor)
    start, described, repeated = time.monotonic(), [], []
    for step in range(1, STEPS + 1):
        model.train()
        if rng.random() < REPEATING_SHARE:
            loss = loss_of_repeating(model, *repeating, rng)
            repeated.append(loss.item())
        else:
            size = rng.choices(list(SIZE_SHARES), list(SIZE_SHARES.values()))[0]
            rows = torch.tensor(rng.sample(range(len(data[size].scenes)), BATCH))
            loss = loss_of_batch(model, data[size], rows, rng.randrange(len(PROMPTS)))
            described.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % EVALUATE_EVERY == 0 or step == STEPS:
            share = exact_share(model, processor, EVALUATION_IMAGES, SEED)
            minutes = (time.monotonic() - start) / 60
            print(
                f"step {step}/{STEPS}",
                f"loss {mean(described[-100:]):.4f}, repeating {mean(repeated[-20:]):.4f}",
                f"held-out exact {share:.3f}",
                f"{minutes:.1f} min",
                sep="  ",
                flush=True,
            )
            save(model, folder, ids)


def check(folder: Path) -> None:
    """Load what was saved as any program would, and measure it on images not used before."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for prompt in PROMPTS[1:]:
        share = exact_share(model, processor, EVALUATION_IMAGES, SEED + 1, prompt=prompt)
        print(f"{prompt}: {share:.3f}", flush=True)
    for size in list(IMAGES)[1:]:
        share = exact_share(model, processor, EVALUATION_IMAGES, SEED + 1, size)
        print(f"{size}: {share:.3f}", flush=True)
    share = exact_share(model, processor, FINAL_IMAGES, SEED + 2)
    print(f"{share:.1%} of {FINAL_IMAGES} images of held-out scenes are described exactly")
    if share < TARGET:
        raise SystemExit(f"That is less than {TARGET:.0%}. Raise STEPS or IMAGES.")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    disable_progress_bar()
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")
    (folder / "LICENSE").write_text(LICENSE, encoding="utf-8")
    ids = learn_vocabulary(folder)
    write_configuration(folder, ids)
    processor = AutoProcessor.from_pretrained(folder)
    model = fresh_model(folder)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {max(ids.values()) + 1} tokens"
    )
    pretrain(model, processor, folder, ids)
    check(folder)


if __name__ == "__main__":
    main()
