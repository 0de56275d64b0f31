#!/usr/bin/env python3
"""Trains the embedded `tiny-llava` model, on a CPU or a GPU.

First the vision tower alone learns to say, patch by patch, what it sees; then
the whole network learns to answer questions. Kill it whenever you like: the
same command goes on from the last checkpoint.

    python tools/train_tiny_llava.py --minutes 70 --work /tmp/tiny-train --out OUT
    python tools/train_tiny_llava.py --export --work ... --out ...   # weights only
    python tools/train_tiny_llava.py --report --work ... --out ...   # test scores and model card
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import itertools

import torch
from tiny_data import splits
from tiny_data.sample import Sample, stream
from tiny_model import checkpoint
from tiny_model.architecture import make_model, make_processor, make_tokenizer
from tiny_model.dense import DenseHeads
from tiny_model.packing import Encoder, answer_logits, answer_loss, pack, text_states, verdict_loss, vision_features
from tiny_model.scoring import accuracy

# Images per step and task.
VISION_MIX = {"vqa": 4, "text": 20, "gqa": 8}
JOINT_MIX = {"vqa": 2, "text": 6, "gqa": 8}
# In the second stage the patch labels stay on as an auxiliary loss.
DENSE_WEIGHT = 0.2
VERDICT_WEIGHT = 1.5
SAVE_EVERY_S = 90
LOG_EVERY = 20


def parse() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and log; not part of the result")
    parser.add_argument("--minutes", type=float, default=70, help="training time over all runs")
    parser.add_argument("--steps", type=int, help="train this many steps instead of a time")
    parser.add_argument("--vision-share", type=float, default=0.25, help="part of the training for the tower alone")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 matrix products")
    parser.add_argument("--val-minutes", type=float, default=6, help="time between validations")
    parser.add_argument("--export", action="store_true", help="write the model directory from the checkpoint, then end")
    parser.add_argument("--report", action="store_true", help="score the model directory, write its card, then end")
    parser.add_argument("--note", default="", help="a remark on this run for the card's training section")
    return parser.parse_args()


class Run:
    """The state of one training run: what a checkpoint holds, and how to step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.tokenizer = make_tokenizer()
        self.encoder = Encoder(self.tokenizer)
        self.model = make_model(self.tokenizer, args.seed).to(self.device)
        self.heads = DenseHeads(self.model.config.vision_config.hidden_size).to(self.device)
        vision = [*self.model.model.vision_tower.parameters(), *self.heads.parameters()]
        known = {id(p) for p in vision}
        language = [p for p in self.model.parameters() if id(p) not in known]
        self.optimizer = torch.optim.AdamW([{"params": vision}, {"params": language}], lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.parameters = vision + language
        self.pool = ThreadPoolExecutor(args.threads)
        self.step, self.joint_steps, self.elapsed, self.history = 0, 0, 0.0, []
        self.path = args.work / "checkpoint.pt"
        state = checkpoint.load(self.path)
        if state:
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.joint_steps = state["step"], state["joint_steps"]
            self.elapsed, self.history = state["elapsed"], state["history"]

    def save(self) -> None:
        """Writes the checkpoint."""
        checkpoint.save(
            self.path,
            {
                "model": self.model.state_dict(),
                "heads": self.heads.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "joint_steps": self.joint_steps,
                "elapsed": self.elapsed,
                "history": self.history,
            },
        )

    @property
    def progress(self) -> float:
        """Done part of the training, 0 to 1; the schedule follows it."""
        if self.args.steps:
            return self.step / self.args.steps
        return self.elapsed / (60 * self.args.minutes)

    @property
    def joint(self) -> bool:
        """Whether the language model takes part already."""
        return self.progress >= self.args.vision_share

    def _set_rates(self) -> tuple[float, float]:
        share = self.args.vision_share
        vision = 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress)))
        part = min(1.0, max(0.0, (self.progress - share) / (1 - share)))
        language = 0.5 * (1 + math.cos(math.pi * part)) * min(1.0, (self.joint_steps + 1) / 100)
        rates = (self.args.lr * vision * min(1.0, (self.step + 1) / 100), self.args.lr * language)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return rates

    def train_step(self) -> dict:
        """Makes one step on fresh images; the step number alone decides which."""
        rng = stream("train", self.args.seed, self.step)
        mix = JOINT_MIX if self.joint else VISION_MIX
        samples = [splits.training_sample(task, rng) for task, count in mix.items() for _ in range(count)]
        rates = self._set_rates()
        self.model.train()
        # Rendered task by task, so contiguous shares have rows of like length; two for each
        # thread, because those of one task take longer than those of another.
        parts = 2 * self.args.threads if self.device.type == "cpu" and self.joint else 1
        bounds = [round(len(samples) * n / parts) for n in range(parts + 1)]
        shares = [samples[i:j] for i, j in itertools.pairwise(bounds)]
        results = list(self.pool.map(self._gradients, shares))
        for parameter, *grads in zip(self.parameters, *(grads for grads, _ in results), strict=True):
            known = [grad for grad in grads if grad is not None]
            parameter.grad = sum(known) / parts if known else None
        used = [p for p in self.parameters if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(used, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        figures = {"lr": rates[1 if self.joint else 0]}
        for name in {name: None for _, part in results for name in part}:
            values = [part[name] for _, part in results if name in part]
            figures[name] = sum(values) / len(values)
        self.joint_steps += "answers" in figures
        return figures

    def _gradients(self, samples: list[Sample]) -> tuple[tuple, dict]:
        """Returns the gradients on one share of a step's images, and what to log.

        On a CPU every share has one thread of its own. They meet once per step
        and not in every operation, which matters on a machine that is shared.
        """
        if self.device.type == "cpu" and self.joint:
            torch.set_num_threads(1)
        batch = pack(self.encoder, samples).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            features = vision_features(self.model, batch.pixels)
            dense, seen = self.heads(features, batch.patches)
            loss, figures = dense, {"dense": dense.item()}
            if self.joint:
                states = text_states(self.model, batch, features)
                answers = answer_loss(*answer_logits(self.model, batch, states), batch)
                loss = answers + DENSE_WEIGHT * dense
                figures["answers"] = answers.item()
                if (verdicts := verdict_loss(self.model, batch, states)) is not None:
                    loss = loss + VERDICT_WEIGHT * verdicts
                    figures["verdicts"] = verdicts.item()
        picked = ("letter", "from_start", "shape", "color", "count above", "color above")
        figures |= {name: seen[name] for name in picked if name in seen}
        return torch.autograd.grad(loss, self.parameters, allow_unused=True), figures

    def validate(self, images: int) -> dict[str, float]:
        """Returns the validation accuracy of every task."""
        return {
            task: accuracy(self.model, self.encoder, splits.evaluation(task, "val", images))["all"]["accuracy"] for task in splits.TASKS
        }


def train(run: Run) -> None:
    """Trains to the end of the time or the steps, saving as it goes."""
    log = open(run.args.work / "log.jsonl", "a", buffering=1)  # noqa: SIM115 (open for as long as the training runs)
    last_save = last_validation = mark = time.monotonic()
    while run.progress < 1:
        figures = run.train_step()
        now = time.monotonic()
        run.elapsed, mark = run.elapsed + now - mark, now
        if run.step % LOG_EVERY == 0:
            line = {"step": run.step, "minutes": round(run.elapsed / 60, 2), "progress": round(run.progress, 4)}
            line |= {k: float(f"{v:.4g}") for k, v in figures.items()}
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
        if run.joint_steps and now - last_validation > 60 * run.args.val_minutes:
            scores = run.validate(60)
            run.history.append({"step": run.step, "minutes": run.elapsed / 60, **scores})
            print("validation", json.dumps(run.history[-1]), flush=True)
            last_validation = mark = time.monotonic()
        if now - last_save > SAVE_EVERY_S:
            run.save()
            last_save = now
    run.save()


def main() -> None:
    """Trains, exports or reports, as asked."""
    args = parse()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.report:
        from tiny_model.card import report

        state = checkpoint.load(args.work / "checkpoint.pt")
        report(args.out, state["step"], state["joint_steps"], state["elapsed"], args)
        return
    run = Run(args)
    if not args.export:
        print(f"from step {run.step}, {run.elapsed / 60:.1f} minutes done", flush=True)
        train(run)
        print("validation", json.dumps(run.validate(200)), flush=True)
    checkpoint.export(run.model, make_processor(run.tokenizer), args.out)


if __name__ == "__main__":
    main()
