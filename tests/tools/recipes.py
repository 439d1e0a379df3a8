"""What bench.py compares train.py with: the documented recipe of late 2024, TRL, and ms-swift.

All of them fine-tune the same adapter on the same pixels: LoRA of rank 64 beside seven layers of
the language model, the vision tower frozen, 16 images per optimizer step, images of 280x280 pixels.
The first two are written anew, as a learner would have them; where transformers 5 asks for
something else, a comment says so. TRL and ms-swift are imported where they run, in environments of
their own.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
import transformers
from peft import LoraConfig, get_peft_model
from qwen_vl_utils import process_vision_info
from transformers import Qwen2VLForConditionalGeneration

SIDE = 280  # pixels: 10 x 10 image tokens
IMAGES_PER_STEP = 16
EPOCHS = 2
LEARNING_RATE = 1e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {
    "r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "task_type": "CAUSAL_LM",
    "target_modules": TARGETS,
}
on_gpu = torch.cuda.is_available()


class Run(NamedTuple):
    """One training that is timed."""

    variant: str  # "documented", "TRL", "ms-swift" or "train.py"
    captions: int = 1  # per image; all but train.py see the image anew for each
    batch: int = 4  # images per pass
    checkpointing: bool = True  # recompute activations; the documented recipe always does
    steps: int = 0  # after one to warm up, then it is over; 0: two epochs, and the result is saved
    count: bool = False  # count the arithmetic of one more step

    @property
    def accumulation(self) -> int:
        """Return the passes of an optimizer step."""
        return IMAGES_PER_STEP // self.batch


def choose_dtype() -> torch.dtype:
    """Return the one precision of all rows of a table, which is what train.py chooses."""
    if not on_gpu:
        return torch.float32
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bfloat16 else torch.float16


def take_apart(record: dict) -> tuple[str, str, str]:
    """Return the text before the image, the image's path, and the answer."""
    question, answer = (turn["value"] for turn in record["conversations"])
    text, path = question.removesuffix("<|vision_end|>").split("<|vision_start|>")
    return text, path, answer


# ---- The documented recipe


def documented_model(folder: Path | str, dtype: torch.dtype) -> torch.nn.Module:
    """Return the model as the documented recipe prepares it."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    model.enable_input_require_grads()  # what gradient checkpointing needs, the recipe says
    return get_peft_model(model, LoraConfig(**LORA))


def documented_sample(record: dict, processor) -> dict:
    """Return a conversation as nested lists: what the recipe maps over the data set beforehand."""
    text, path, answer = take_apart(record)
    image = {"type": "image", "image": path, "resized_height": SIDE, "resized_width": SIDE}
    messages = [{"role": "user", "content": [{"type": "text", "text": text}, image]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos = process_vision_info(messages)
    inputs = processor(text=[text], images=images, videos=videos, padding=True, return_tensors="pt")
    inputs = {key: value.tolist() for key, value in inputs.items()}
    prompt = inputs["input_ids"][0]
    answer = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    answer = [*answer, processor.tokenizer.pad_token_id]
    return {
        "input_ids": prompt + answer,
        "labels": [-100] * len(prompt) + answer,
        "attention_mask": inputs["attention_mask"][0] + [1] * len(answer),
        "pixel_values": inputs["pixel_values"],
        "image_grid_thw": inputs["image_grid_thw"][0],
    }


class DocumentedCollator(transformers.DataCollatorForSeq2Seq):
    """The recipe's collator, with the one thing that transformers 5 asks for on top."""

    def __call__(self, features, return_tensors=None):
        batch = super().__call__(features, return_tensors)
        image_token = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        # which tokens are an image's
        batch["mm_token_type_ids"] = (batch["input_ids"] == image_token).long()
        return dict(batch)


def run_documented(run: Run, records: list[dict], model_folder: Path) -> None:
    """Train as documented: images as lists in a file, batches in the main process, no autocast."""
    processor = transformers.AutoProcessor.from_pretrained(model_folder)
    model = documented_model(model_folder, choose_dtype())
    Path("data_vl_train.json").write_text(json.dumps(records), encoding="utf-8")
    table = datasets.Dataset.from_json("data_vl_train.json", cache_dir="cache")
    table = table.map(documented_sample, fn_kwargs={"processor": processor})
    arguments = transformers.TrainingArguments(
        "output",
        per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulation,
        learning_rate=LEARNING_RATE,
        num_train_epochs=EPOCHS,
        logging_steps=10,
        gradient_checkpointing=True,
        use_cpu=not on_gpu,
        report_to="none",
    )
    arguments._n_gpu = 1  # else it spreads each batch over all visible GPUs, slower than one
    transformers.Trainer(
        model,
        arguments,
        train_dataset=table,
        data_collator=DocumentedCollator(processor.tokenizer, padding=True),
    ).train()


# ---- TRL


def run_trl(run: Run, records: list[dict], model_folder: Path) -> None:
    """Train with TRL's SFTTrainer on prompts and completions, else by its own defaults."""
    import trl

    processor = transformers.AutoProcessor.from_pretrained(
        model_folder,
        min_pixels=SIDE**2,
        max_pixels=SIDE**2,
    )
    rows = []
    for record in records:
        text, path, answer = take_apart(record)
        prompt = [{"type": "text", "text": text}, {"type": "image"}]
        completion = [{"type": "text", "text": answer}]
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": completion}],
                "images": [path],
            }
        )
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    dtype = choose_dtype()
    arguments = trl.SFTConfig(
        "output",
        per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulation,
        num_train_epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        gradient_checkpointing=run.checkpointing,
        max_length=None,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=not on_gpu,
        report_to="none",
    )
    arguments._n_gpu = 1
    trl.SFTTrainer(
        Qwen2VLForConditionalGeneration.from_pretrained(model_folder, dtype=dtype),
        args=arguments,
        train_dataset=table,
        processing_class=processor,
        peft_config=LoraConfig(**LORA),
    ).train()


# ---- ms-swift


def swift_command(run: Run, data: Path, model_folder: Path) -> list[str]:
    """Return the arguments with which ms-swift 4 does the same work.

    What is left out is its default: the vision tower and its merger frozen and without LoRA, logits
    only where there are labels. checkpointing is on by default, and off it is at its fastest.
    """
    checkpointing = str(run.checkpointing).lower()
    return [
        f"--model={model_folder}",
        "--model_type=qwen2_vl",
        "--template=qwen2_vl",
        f"--dataset={data}",
        "--tuner_type=lora",
        f"--lora_rank={LORA['r']}",
        f"--lora_alpha={LORA['lora_alpha']}",
        f"--lora_dropout={LORA['lora_dropout']}",
        "--target_modules",
        *TARGETS,
        f"--torch_dtype={str(choose_dtype()).removeprefix('torch.')}",
        "--attn_impl=sdpa",
        f"--max_pixels={SIDE**2}",
        f"--per_device_train_batch_size={run.batch}",
        f"--gradient_accumulation_steps={run.accumulation}",
        f"--num_train_epochs={EPOCHS}",
        f"--learning_rate={LEARNING_RATE}",
        f"--gradient_checkpointing={checkpointing}",
        # no time for what the others don't do
        "--split_dataset_ratio=0",
        "--eval_strategy=no",
        "--report_to=none",
        # images are opened in the main process, as train.py opens them: one thread for all
        "--dataloader_num_workers=0",
        "--output_dir=output",
    ]


def run_swift(run: Run, records: list[dict], model_folder: Path) -> None:
    """Train with ms-swift's own command line, in this process so that it can be timed."""
    data = Path("data.jsonl").absolute()
    with open(data, "w", encoding="utf-8") as file:
        for record in records:
            text, path, answer = take_apart(record)
            messages = [
                {"role": "user", "content": f"{text}<image>"},
                {"role": "assistant", "content": answer},
            ]
            row = {"messages": messages, "images": [path]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.environ["MODELSCOPE_CACHE"] = str(Path("cache").absolute())
    from swift import sft_main
    from swift.template.templates.qwen import Qwen2VLTemplate

    # its template knows the real vocabulary's numbers; a small one has others, and without this an
    # image would be a single token
    config = transformers.AutoConfig.from_pretrained(model_folder)
    Qwen2VLTemplate.image_token_id = config.image_token_id
    Qwen2VLTemplate.video_token_id = config.video_token_id
    sft_main(swift_command(run, data, model_folder))
