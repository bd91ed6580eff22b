#!/usr/bin/env python
"""
What a training step costs: one attention call per scale against VAR's N x N mask, and cached tokens against tokenising
in every epoch.

    python benchmarks/training_step.py --num_layers 16 --batch_size 2 --grid_size 16

Times the variants in turn, round by round, on the same model, batch and loss (forward, backward, AdamW), after making
sure that they give the same logits and gradients. Prints medians, and the ratios' median and range over the rounds, as
Markdown; `--output` takes JSON. The model has VAR's shape: width 64 times the depth, 64 per head. Weights are random:
they do not change the cost.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from srdd import MultiScaleVQModel, ScaleTransformer2DModel
from srdd.models.transformer_scale_2d import MaskedScaleAttnProcessor, ScaleAttnProcessor
from srdd.scale_sizes import default_scale_sizes, num_tokens_per_scale
from srdd.training.losses import token_loss


VARIANTS = {
    "markov, a call per scale": ("markov", ScaleAttnProcessor),
    "markov, N x N mask": ("markov", MaskedScaleAttnProcessor),
    "causal (VAR), a call per scale": ("causal", ScaleAttnProcessor),
    "causal (VAR), N x N mask": ("causal", MaskedScaleAttnProcessor),
}
REFERENCE = "causal (VAR), N x N mask"
TOKENISING = "markov, a call per scale, tokenising"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_layers", type=int, default=16)
    parser.add_argument("--grid_size", type=int, default=16, help="Side of the latent grid: 16 is 256px, 32 is 512px.")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--num_rounds", type=int, default=7)
    parser.add_argument("--tokenizer", action="store_true", help="Also tokenise images in the step (VAR's tokenizer).")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="JSON file for all times.")
    return parser.parse_args(arguments)


class Step:
    """One training step of a transformer whose pattern and processor can be exchanged."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(0)
        self.args = args
        self.device = torch.device(args.device)
        self.scale_sizes = default_scale_sizes(args.grid_size)
        self.model = ScaleTransformer2DModel(
            num_layers=args.num_layers,
            num_attention_heads=args.num_layers,
            attention_head_dim=64,
            scale_sizes=self.scale_sizes,
        ).to(self.device)
        self.model.train()
        if args.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
        shape = (args.batch_size, sum(num_tokens_per_scale(self.scale_sizes)))
        self.token_ids = torch.randint(4096, shape, device=self.device)
        self.inputs = torch.randn(*shape, 32, device=self.device)
        self.labels = torch.arange(args.batch_size, device=self.device)
        self.vqvae = self.images = None
        if args.tokenizer:
            side = 16 * args.grid_size
            self.vqvae = MultiScaleVQModel(scale_sizes=self.scale_sizes, sample_size=side).to(self.device).eval()
            self.images = torch.randn(args.batch_size, 3, side, side, device=self.device)

    def select(self, name: str) -> None:
        pattern, processor = VARIANTS.get(name, VARIANTS["markov, a call per scale"])
        self.model.register_to_config(attention_pattern=pattern)
        self.model.set_attn_processor(processor())

    def backward(self, tokenise: bool = False) -> torch.Tensor:
        """Logits of a forward, with gradients in place."""
        token_ids = self.token_ids
        if tokenise:
            with torch.no_grad():
                token_ids = self.vqvae.tokenize(self.images)
        torch.manual_seed(1)  # the same labels are dropped
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.mixed_precision == "bf16"):
            logits = self.model(self.inputs, class_labels=self.labels).sample
            loss = token_loss(logits, token_ids, self.scale_sizes).loss
        loss.backward()
        return logits.detach()

    def gradients(self, name: str) -> list[torch.Tensor]:
        self.select(name)
        logits = self.backward()
        found = [logits, *(parameter.grad.clone() for parameter in self.model.parameters())]
        self.optimizer.zero_grad()
        return found

    def time(self, name: str) -> float:
        """Seconds of one step."""
        self.select(name)
        self.synchronize()
        started = time.perf_counter()
        self.backward(tokenise=name == TOKENISING)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.synchronize()
        return time.perf_counter() - started

    def peak_memory(self, name: str) -> float | None:
        """MiB beyond weights and optimizer state; only CUDA counts."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.time(name)
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def check_equal(step: Step) -> float:
    """The largest difference between the processors, relative to the largest value, over logits and gradients."""
    worst = 0.0
    tolerance = 2e-2 if step.args.mixed_precision == "bf16" else 1e-4
    for pattern in ("markov", "causal (VAR)"):
        pairs = zip(step.gradients(f"{pattern}, a call per scale"), step.gradients(f"{pattern}, N x N mask"))
        for ours, theirs in pairs:
            worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item())
    if worst > tolerance:
        raise RuntimeError(f"The variants differ by {worst:.1e}, more than {tolerance:.0e}: nothing was timed.")
    return worst


def main(args: argparse.Namespace) -> None:
    step = Step(args)
    difference = check_equal(step)
    names = [*VARIANTS, TOKENISING] if args.tokenizer else list(VARIANTS)
    for name in names:
        step.time(name)  # warm up
    memory = {name: step.peak_memory(name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(args.num_rounds)):
        for name in names:
            times[name].append(step.time(name))
    device = torch.cuda.get_device_name() if step.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    lines = [
        f"Depth {args.num_layers}, batch {args.batch_size}, {step.token_ids.shape[1]} tokens, {device}, torch"
        f" {torch.__version__}, precision {args.mixed_precision}, {args.num_rounds} rounds; the variants agree to"
        f" {difference:.0e}.",
        "",
        f"| step | median s | speed, {REFERENCE} = 1 (min–max) | peak MiB |",
        "|---|---|---|---|",
    ]
    for name in names:
        ratios = sorted(theirs / ours for ours, theirs in zip(times[name], times[REFERENCE]))
        peak = "" if memory[name] is None else f"{memory[name]:.0f}"
        lines.append(
            f"| {name} | {statistics.median(times[name]):.3f} | {statistics.median(ratios):.2f}"
            f" ({ratios[0]:.2f}–{ratios[-1]:.2f}) | {peak} |"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    if args.output:
        report = {"arguments": vars(args), "device": device, "difference": difference, "seconds": times, "MiB": memory}
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse_args())
