"""What bench.py compares train.py with: the recipe that tutorials of late 2024 document, and TRL's SFTTrainer.

Both are written anew, as a learner would have them; where transformers 5 asks for something else, a comment says so.
"""

import json
from pathlib import Path

import datasets
import torch
import transformers
from peft import LoraConfig, get_peft_model
from qwen_vl_utils import process_vision_info
from transformers import Qwen2VLForConditionalGeneration

SIDE = 280  # pixels: 10 x 10 image tokens
LORA = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "task_type": "CAUSAL_LM"}
LORA["target_modules"] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
]
on_card = torch.cuda.is_available()
dtype = torch.bfloat16 if on_card else torch.float32


def take_apart(record):
    """Text before the picture, the picture's path, the answer."""
    question, answer = (turn["value"] for turn in record["conversations"])
    text, path = question.removesuffix("<|vision_end|>").split("<|vision_start|>")
    return text, path, answer


def documented_model(folder, dtype):
    """The model as the documented recipe prepares it."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    model.enable_input_require_grads()  # what gradient checkpointing needs, the recipe says
    return get_peft_model(model, LoraConfig(**LORA))


def documented_sample(record, processor):
    """One conversation as nested lists: what the documented recipe maps over the data set beforehand."""
    text, path, answer = take_apart(record)
    picture = {"type": "image", "image": path, "resized_height": SIDE, "resized_width": SIDE}
    messages = [{"role": "user", "content": [{"type": "text", "text": text}, picture]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos = process_vision_info(messages)
    inputs = processor(text=[text], images=images, videos=videos, padding=True, return_tensors="pt")
    inputs = {key: value.tolist() for key, value in inputs.items()}
    prompt = inputs["input_ids"][0]
    answer = processor.tokenizer(answer, add_special_tokens=False)["input_ids"] + [
        processor.tokenizer.pad_token_id
    ]
    tokens = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    tokens["attention_mask"] = inputs["attention_mask"][0] + [1] * len(answer)
    return tokens | {
        "pixel_values": inputs["pixel_values"],
        "image_grid_thw": inputs["image_grid_thw"][0],
    }


class DocumentedCollator(transformers.DataCollatorForSeq2Seq):
    """The recipe's collator, and the one thing that transformers 5 asks for on top: which tokens are a picture's."""

    def __call__(self, features, return_tensors=None):
        batch = super().__call__(features, return_tensors)
        image_token = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == image_token).long()}


def run_documented(run, records, model_folder):
    """The recipe: every picture as lists in an Arrow file, batches made in the main process, no autocast."""
    processor = transformers.AutoProcessor.from_pretrained(model_folder)
    model = documented_model(model_folder, dtype)
    Path("data_vl_train.json").write_text(json.dumps(records), encoding="utf-8")
    table = datasets.Dataset.from_json("data_vl_train.json", cache_dir="cache")
    table = table.map(documented_sample, fn_kwargs={"processor": processor})
    arguments = {
        "per_device_train_batch_size": run.batch,
        "gradient_accumulation_steps": run.accumulation,
    }
    arguments |= {
        "learning_rate": 1e-4,
        "num_train_epochs": 2,
        "logging_steps": 10,
        "gradient_checkpointing": True,
    }
    arguments = transformers.TrainingArguments(
        "output", **arguments, use_cpu=not on_card, report_to="none"
    )
    collator = DocumentedCollator(processor.tokenizer, padding=True)
    transformers.Trainer(model, arguments, train_dataset=table, data_collator=collator).train()


def run_trl(run, records, model_folder):
    """TRL's SFTTrainer on prompt-completion pairs with the same adapter, else by its own defaults."""
    import trl

    sizes = {"min_pixels": SIDE**2, "max_pixels": SIDE**2}
    processor = transformers.AutoProcessor.from_pretrained(model_folder, **sizes)
    rows = []
    for text, path, answer in map(take_apart, records):
        prompt = [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "image"}]}]
        completion = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        rows.append({"prompt": prompt, "completion": completion, "images": [path]})
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    model = Qwen2VLForConditionalGeneration.from_pretrained(model_folder, dtype=dtype)
    arguments = {
        "per_device_train_batch_size": run.batch,
        "gradient_accumulation_steps": run.accumulation,
    }
    arguments |= {"max_length": None, "bf16": on_card, "use_cpu": not on_card, "report_to": "none"}
    how = {"args": trl.SFTConfig("output", **arguments), "peft_config": LoraConfig(**LORA)}
    trl.SFTTrainer(model, train_dataset=table, processing_class=processor, **how).train()
