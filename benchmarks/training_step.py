#!/usr/bin/env python
"""
What a training step costs: one attention call per scale against VAR's N x N mask, and cached tokens against tokenising
in every epoch. On GPUs with a compiler also FlexAttention, which skips what the mask forbids, in compiled blocks.

    python benchmarks/training_step.py --num_layers 16 --batch_size 2 --grid_size 16

Times the variants in turn, round by round, on the same model, batch and loss (forward, backward, AdamW), after making
sure that they give the same logits and gradients. Prints medians, the ratios' median and range over the rounds, and
memory at the peak, as Markdown, and which way is the default of the training scripts; `--output` takes JSON. The model
has VAR's shape: width 64 times the depth, 64 per head. Weights are random: they do not change the cost.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from diffusers.models.attention_dispatch import attention_backend
from measuring import device_name, peak_memory, seconds_of, write_results
from tqdm.auto import tqdm

from srdd import MultiScaleVQModel, ScaleTransformer2DModel
from srdd.console import write_text
from srdd.evaluation.pipeline_variants import sharing_parameters
from srdd.evaluation.tables import markdown_table, speed_ratio
from srdd.models import MaskedScaleAttnProcessor, ScaleAttnProcessor
from srdd.scales import default_scale_sizes, num_tokens_per_scale
from srdd.training.attention_choice import compile_blocks, default_attention, has_compiler
from srdd.training.optimizer import is_fused
from srdd.training.token_loss import token_loss


VARIANTS = {
    "markov, a call per scale": ("markov", ScaleAttnProcessor),
    "markov, N x N mask": ("markov", MaskedScaleAttnProcessor),
    "causal (VAR), a call per scale": ("causal", ScaleAttnProcessor),
    "causal (VAR), N x N mask": ("causal", MaskedScaleAttnProcessor),
}
# Only where flex attention compiles.
FLEX_VARIANTS = {
    "markov, flex": ("markov", MaskedScaleAttnProcessor),
    "causal (VAR), flex": ("causal", MaskedScaleAttnProcessor),
}
REFERENCE = "causal (VAR), N x N mask"
TOKENISING = "markov, a call per scale, tokenising"
# What the training scripts call the ways.
NAMES = {"per_scale": "a call per scale", "mask": "N x N mask", "flex": "flex"}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_layers", type=int, default=16)
    parser.add_argument(
        "--grid_size", type=int, default=16, help="Side of the latent grid: 16 is 256px, 64 is 1024px."
    )
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--num_rounds", type=int, default=7)
    parser.add_argument("--tokenizer", action="store_true", help="Also tokenise images in the step (VAR's tokenizer).")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file for all times.")
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
        self.variants, self.compiled = dict(VARIANTS), None
        can_compile = has_compiler(self.device)
        self.default = NAMES[default_attention(self.device.type, can_compile, head_dim=64)]
        if can_compile:
            self.variants.update(FLEX_VARIANTS)
            self.compiled = sharing_parameters(self.model)
            compile_blocks([self.compiled], fullgraph=True)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=is_fused(self.device)
        )
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
        pattern, processor = self.variants.get(name, VARIANTS["markov, a call per scale"])
        self.selected = self.compiled if name in FLEX_VARIANTS else self.model
        self.selected.register_to_config(attention_pattern=pattern)
        self.selected.set_attn_processor(processor())
        if name in FLEX_VARIANTS:
            with attention_backend():  # diffusers would make it the default of the other variants
                self.selected.set_attention_backend("flex")

    def backward(self, tokenise: bool = False) -> torch.Tensor:
        """Logits of a forward, with gradients in place."""
        token_ids = self.token_ids
        if tokenise:
            with torch.no_grad():
                token_ids = self.vqvae.tokenize(self.images)
        torch.manual_seed(1)  # the same labels are dropped
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.mixed_precision == "bf16"):
            logits = self.selected(self.inputs, class_labels=self.labels).sample
            loss = token_loss(logits, token_ids, self.scale_sizes).loss
        loss.backward()
        return logits.detach()

    def gradients(self, name: str) -> list[torch.Tensor]:
        """Logits and gradients of one forward."""
        self.select(name)
        logits = self.backward()
        gradients = [parameter.grad.clone() for parameter in self.model.parameters()]
        self.optimizer.zero_grad()
        return [logits, *gradients]

    def run(self, name: str) -> None:
        """One step, which leaves no gradients behind."""
        self.backward(tokenise=name == TOKENISING)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time(self, name: str) -> float:
        """Seconds of one step."""
        self.select(name)
        return seconds_of(partial(self.run, name), self.device)

    def peak_memory(self, name: str) -> float | None:
        """MiB beyond weights and optimizer state, where the system counts them."""
        if self.device.type == "cpu" and sys.platform != "linux":
            return None
        self.select(name)
        return peak_memory(partial(self.run, name), self.device)


def check_equal(step: Step) -> float:
    """
    The largest difference between the ways of one attention pattern, relative to the largest value, over logits and
    gradients.

    Raises:
        RuntimeError: If it is more than rounding.
    """
    worst, tolerance = 0.0, 2e-2 if step.args.mixed_precision == "bf16" else 1e-4
    for pattern in ("markov", "causal (VAR)"):
        first, *others = [name for name in step.variants if name.startswith(f"{pattern}, ")]
        expected = step.gradients(first)
        for name in others:
            for ours, theirs in zip(expected, step.gradients(name)):
                difference = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()
                worst = max(worst, difference)
    if worst > tolerance:
        raise RuntimeError(f"The variants differ by {worst:.1e}, more than {tolerance:.0e}: nothing was timed.")
    return worst


def run(step: Step) -> dict:
    """All that is measured."""
    args = step.args
    difference = check_equal(step)
    names = [*step.variants, *([TOKENISING] if args.tokenizer else [])]
    for name in names:
        step.time(name)  # warm up
    memory = {name: step.peak_memory(name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(args.num_rounds)):
        for name in names:
            seconds[name].append(step.time(name))
    return {
        "num_tokens": step.token_ids.shape[1],
        "difference": difference,
        "default": step.default,
        "seconds": seconds,
        "mebibytes": memory,
    }


def report(args: argparse.Namespace, results: dict) -> str:
    """Markdown."""
    seconds, device = results["seconds"], device_name(torch.device(args.device))
    introduction = (
        f"Depth {args.num_layers}, batch {args.batch_size}, {results['num_tokens']} tokens, {device}, torch"
        f" {torch.__version__}, precision {args.mixed_precision}, {args.num_rounds} rounds; the variants agree to"
        f" {results['difference']:.0e}. The default of the training scripts here: {results['default']}."
    )
    lines = []
    for name, times in seconds.items():
        peak = results["mebibytes"][name]
        speed = speed_ratio(seconds[REFERENCE], times)
        lines.append((name, f"{statistics.median(times):.3f}", speed, "" if peak is None else f"{peak:,.0f}"))
    header = ("step", "median s", f"speed, {REFERENCE} = 1 (min–max)", "peak MiB")
    return f"{introduction}\n\n{markdown_table(header, lines)}"


def main(args: argparse.Namespace) -> None:
    results = run(Step(args))
    write_text(report(args, results))
    write_results(args, results, torch.device(args.device))


if __name__ == "__main__":
    main(parse_args())
