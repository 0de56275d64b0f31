"""Scores the finished model directory and writes its model card."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from tiny_data import splits
from tiny_data.sample import IMAGE_SIZE, Sample
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tiny_model.packing import Encoder
from tiny_model.scoring import accuracy, baseline

# Images per task for the check through `generate`, one or more questions each.
_GENERATED = {"vqa": 40, "text": 50, "gqa": 50}
_GREY_IMAGES = 200


@torch.no_grad()
def generated(model: LlavaForConditionalGeneration, processor, samples: list[Sample]) -> dict:
    """Answers by stock greedy `generate`, a batch of left-padded prompts per image."""
    hits, ended = [], 0
    for sample in samples:
        prompts = [
            processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}])
            for q in sample.questions
        ]
        inputs = processor(images=[[sample.image]] * len(prompts), text=prompts, padding=True, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        new = output[:, inputs["input_ids"].shape[1] :]
        ended += int((new == processor.tokenizer.eos_token_id).any(1).sum())
        texts = processor.batch_decode(new, skip_special_tokens=True)
        hits += [text.strip() == q.answer for text, q in zip(texts, sample.questions, strict=True)]
    return {"accuracy": sum(hits) / len(hits), "n": len(hits), "ended": ended}


def _blank(sample: Sample) -> Sample:
    grey = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (128, 128, 128))
    return replace(sample, image=grey)


def measure(folder: Path) -> dict:
    """Returns every figure of the card, from the directory as a user would load it."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval()
    if model.dtype != torch.float32:
        raise SystemExit(f"{folder}: expected to load as float32, got {model.dtype}")
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    encoder = Encoder(processor.tokenizer)
    figures: dict = {"parameters": model.num_parameters(), "tasks": {}}
    for task in splits.TASKS:
        test = list(splits.evaluation(task, "test"))
        figures["tasks"][task] = {
            "test": accuracy(model, encoder, test),
            "validation": accuracy(model, encoder, splits.evaluation(task, "val"))["all"],
            "baseline": baseline(task, test),
            "generate": generated(model, processor, test[: _GENERATED[task]]),
            "same_questions_packed": accuracy(model, encoder, test[: _GENERATED[task]])["all"],
            "grey_image": accuracy(model, encoder, map(_blank, test[:_GREY_IMAGES]))["all"],
        }
        print(task, json.dumps(figures["tasks"][task]), flush=True)
    return figures


def _percent(figure: dict) -> str:
    return f"{figure['accuracy']:.4f} ({figure['n']:,})"


def _tables(tasks: dict) -> str:
    names = {"vqa": "vqa: easy-VQA", "text": "text: words in images", "gqa": "gqa: scenes and relations"}
    rows = [
        "| task | test (questions) | validation | question-only baseline | grey image | `generate` (questions) |",
        "|---|---|---|---|---|---|",
    ]
    for task, t in tasks.items():
        rows.append(
            f"| {names[task]} | **{_percent(t['test']['all'])}** | {_percent(t['validation'])} | "
            f"{t['baseline']:.4f} | {_percent(t['grey_image'])} | {_percent(t['generate'])} |"
        )
    rows += ["", "| task | kind of question | test accuracy (questions) |", "|---|---|---|"]
    for task, t in tasks.items():
        for kind, figure in sorted(t["test"].items()):
            if kind != "all":
                rows.append(f"| {task} | {kind} | {_percent(figure)} |")
    return "\n".join(rows)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# tiny-llava

A small, trained `LlavaForConditionalGeneration` ({parameters:,} parameters, {size:.1f} MB) for trying
and testing compression without a download. Stock Hugging Face classes, no custom code.

| part | what |
|---|---|
| vision tower | CLIP ViT, 6 layers, width 192, 6 heads, feed-forward 768; 64x64 pixels, 8x8 patches: 64 image tokens |
| projector | 2 layers, GELU; last vision layer, class token dropped |
| language model | Llama, 6 layers, width 192, 6 query and 3 key-value heads of 32, feed-forward 512, tied embeddings |
| tokenizer | byte-level BPE, {vocabulary} tokens; upper-case words are spelled letter by letter |

Weights are stored as float16 and load as float32. All figures are of these rounded weights.

## Use

```python
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder)
chat = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "what is the word?"}}]}}]
prompt = processor.apply_chat_template(chat)  # "<image>\\nQuestion: what is the word? Answer:"
inputs = processor(images=image, text=prompt, return_tensors="pt")
processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()
```

Questions are lower case, in the forms of the data sets below. An answer ends with `</s>`.

## Accuracy

{tables}

* Exact match of the whole answer and its end. Test columns score all questions of an image in one packed
  sequence, with the argmax at every answer position; that is what greedy decoding gives. The `generate` column
  is stock greedy `generate` on a part of the test set; packed scoring gives {same} on the same questions.
* Baseline: the most frequent training answer per question string (per kind of question for unknown strings).
* Easy-VQA: its official test split, {vqa_images} images, all questions. All its question strings also occur in train.
* Text: half of the test words never occur in training ("unseen words", whole-word questions).
* The test splits were only used for this report.

## Data

* **vqa**: the [easy-VQA](https://github.com/vzhou842/easy-VQA) package 1.0 (MIT), official train split, less
  200 images held out for validation. Flips and turns as augmentation.
* **text**: words of 3 to 5 capitals in seven free fonts (DejaVu, STIX; as shipped with matplotlib) on five lines,
  sizes, colours and places. Half of the training images show common English words, half invented strings.
* **gqa**: rendered scenes of 2 to 4 shapes (8 colours, 4 shapes, 2 sizes). Questions about attributes,
  existence, counts and relations; see the limits. Answers are balanced.

Text and scenes are rendered afresh for every step (`tools/tiny_data`). The rendered images and the questions
are Apache-2.0 like this project.

## Training

{steps:,} steps in {minutes:.0f} minutes on {machine}, {precision}, seed {seed}. AdamW, learning rate {lr}, cosine,
clip 1.0. First {vision_steps:,} steps of {vision_batch} images for the vision tower alone, on per-patch labels (which
letter, colour, shape, size; what lies to each side). Then {joint_steps:,} steps of {joint_batch} images with their
questions for the whole network, {schedule}; loss on the answer and its end, and the patch labels
at a small weight, and the verdict of a yes-no question at every word of it. Yes/no questions of
easy-VQA are weighted by inverse answer frequency. Scenes also ask one-step questions in training (what color is
the circle? is there a red shape?), which the test sets do not. Nothing in the training makes the network easier
to compress: no sparsity, no low rank, no distillation, no dropout.
{note}
`tools/train_tiny_llava.py` trains it again. {repeatable}

## Limits

* It knows these three toy tasks and nothing else. It is not a general vision-language model.
* In scenes, "the shape left of X" is only asked where one shape is there, and that is always the leftmost one. So
  the "relate color", "relate shape", "relate size" and "relate verify" questions can be answered from the direction
  without finding X. "Relate count", "compare place" and "exist" cannot, and they are where this model is weak.
* Images of other sizes are resized to 64x64; small text becomes unreadable.
* Questions in other words, other colours or shapes, lower-case text and words longer than five letters are
  outside of its training.
"""


def report(folder: Path, step: int, joint_steps: int, elapsed: float, args: argparse.Namespace) -> None:
    """Measures the model in `folder`, and writes `eval.json` and `README.md` there."""
    from train_tiny_llava import JOINT_MIX, VISION_MIX

    figures = measure(folder)
    figures |= {"steps": step, "joint_steps": joint_steps, "minutes": elapsed / 60}
    tasks = figures["tasks"]
    files = [p for p in folder.iterdir() if p.is_file() and p.name not in ("README.md", "eval.json")]
    vocabulary = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    device = "one GPU" if args.device.startswith("cuda") else f"{args.threads} CPU threads ({platform.machine()})"
    card = CARD.format(
        parameters=figures["parameters"],
        size=sum(p.stat().st_size for p in files) / 1e6,
        vocabulary=vocabulary,
        tables=_tables(tasks),
        same=", ".join(f"{t['same_questions_packed']['accuracy']:.4f}" for t in tasks.values()),
        vqa_images=len(list(splits.evaluation("vqa", "test"))),
        steps=step,
        minutes=elapsed / 60,
        machine=device,
        precision="bfloat16 products" if args.bf16 else "float32",
        seed=args.seed,
        lr=args.lr,
        vision_steps=step - joint_steps,
        vision_batch=sum(VISION_MIX.values()),
        joint_steps=joint_steps,
        joint_batch=sum(JOINT_MIX.values()),
        schedule="/".join(f"{count} {task}" for task, count in JOINT_MIX.items()),
        note=f"{args.note}\n" if args.note else "",
        repeatable="With `--steps` the run is repeatable."
        if args.steps
        else "This run's schedule followed the clock, so it is not repeatable; with `--steps` it follows the step count.",
    )
    (folder / "eval.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "README.md").write_text(card)
