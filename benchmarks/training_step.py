#!/usr/bin/env python
"""
What a training step costs: one attention call per scale against VAR's N x N mask, and cached tokens against tokenising
in every epoch. On CUDA devices also FlexAttention, which skips what the mask forbids, in compiled blocks.

    python benchmarks/training_step.py --num_layers 16 --batch_size 2 --grid_size 16

Times the variants in turn, round by round, on the same model, batch and loss (forward, backward, AdamW), after making
sure that they give the same logits and gradients. Prints medians, the ratios' median and range over the rounds, and
memory at the peak, as Markdown; `--output` takes JSON. The model has VAR's shape: width 64 times the depth, 64 per
head. Weights are random: they do not change the cost.

Next to what a step needed at its peak stands what it was expected to; a variant expected to need more than there is
is left out, and the report says so. At 1024px (`--grid_size 64`: scales 1 2 3 4 6 8 11 15 20 27 36 48 64, 9301 tokens)
and batch 1 that is 1.5 GiB at depth 4 and 4.1 at depth 8, with the mask 2.8 and 6.8; tokenising needs 3.8.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from diffusers.models.attention_dispatch import attention_backend
from measuring import device_name, peak_memory, ratio_text, seconds_of
from samplers import twin
from tqdm.auto import tqdm

from srdd import MultiScaleVQModel, ScaleTransformer2DModel
from srdd.models import MaskedScaleAttnProcessor, ScaleAttnProcessor
from srdd.scales import default_scale_sizes, num_tokens_per_scale
from srdd.training.token_loss import token_loss


VARIANTS = {
    "markov, a call per scale": ("markov", ScaleAttnProcessor),
    "markov, N x N mask": ("markov", MaskedScaleAttnProcessor),
    "causal (VAR), a call per scale": ("causal", ScaleAttnProcessor),
    "causal (VAR), N x N mask": ("causal", MaskedScaleAttnProcessor),
}
# Only where flex attention has gradients, and in compiled blocks.
FLEX_VARIANTS = {
    "markov, flex": ("markov", MaskedScaleAttnProcessor),
    "causal (VAR), flex": ("causal", MaskedScaleAttnProcessor),
}
REFERENCE = "causal (VAR), N x N mask"
TOKENISING = "markov, a call per scale, tokenising"

# Copies, in float32, of what a step keeps at its peak, found by measuring on a CPU: of the logits, of a block's hidden
# states, and of the largest feature map of the tokenizer. Half precision needs less.
LOGITS_COPIES, BLOCK_COPIES, FEATURE_MAP_COPIES = 4, 23, 6


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
    parser.add_argument("--memory", type=float, help="GiB that a step may need; by default what the machine has left.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", help="JSON file for all times.")
    args = parser.parse_args(arguments)
    if args.memory is not None and not args.memory > 0:
        parser.error(f"`--memory` must be above 0, got {args.memory}.")
    return args


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
        if self.device.type == "cuda":
            self.variants.update(FLEX_VARIANTS)
            self.compiled = twin(self.model)
            self.compiled.compile_repeated_blocks(fullgraph=True, dynamic=False)
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
        self.select(name)
        logits = self.backward()
        found = [logits, *(parameter.grad.clone() for parameter in self.model.parameters())]
        self.optimizer.zero_grad()
        return found

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

    def expected_memory(self, name: str) -> float:
        """MiB that a step is expected to need beyond weights and optimizer state."""
        batch_size, num_tokens = self.token_ids.shape
        num_layers, dim = self.args.num_layers, self.model.dim
        kept = 2 if self.args.gradient_checkpointing else num_layers  # blocks
        numbers = sum(parameter.numel() for parameter in self.model.parameters())  # gradients
        numbers += batch_size * num_tokens * LOGITS_COPIES * self.model.config.codebook_size
        numbers += batch_size * num_tokens * (BLOCK_COPIES * kept + num_layers) * dim
        if VARIANTS.get(name, (None, None))[1] is MaskedScaleAttnProcessor:
            numbers += num_tokens**2 * (kept + 0.25)  # attention keeps a mask of numbers, made of one of booleans
        if name == TOKENISING:
            channels = self.vqvae.config.block_out_channels[0]
            numbers = max(numbers, FEATURE_MAP_COPIES * channels * self.images[:, 0].numel())
        return 4 * numbers / 2**20

    def available_memory(self) -> float | None:
        """MiB left for a step beside optimizer state and the logits to compare; `None` where no system tells."""
        if self.args.memory is not None:
            return 1024 * self.args.memory
        if self.device.type == "cuda":
            available = torch.cuda.mem_get_info(self.device)[0] / 2**20
        elif sys.platform == "linux":
            lines = Path("/proc/meminfo").read_text().splitlines()
            [line] = [line for line in lines if line.startswith("MemAvailable:")]
            available = int(line.split()[1]) / 1024
        else:
            return None
        state = 2 * sum(parameter.numel() for parameter in self.model.parameters())
        return available - 4 * (state + self.token_ids.numel() * self.model.config.codebook_size) / 2**20


def check_equal(step: Step, names: list[str]) -> float | None:
    """
    The largest difference between the processors, relative to the largest value, over logits and gradients; `None` if
    no pattern has several.
    """
    worst = None
    tolerance = 2e-2 if step.args.mixed_precision == "bf16" else 1e-4
    for pattern in ("markov", "causal (VAR)"):
        ways = ("a call per scale", "N x N mask", "flex")
        first, *others = [f"{pattern}, {way}" for way in ways if f"{pattern}, {way}" in names] or [None]
        expected = step.gradients(first) if others else []
        for name in others:
            for ours, theirs in zip(expected, step.gradients(name)):
                difference = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()
                worst = max(worst or 0.0, difference)
    if worst is not None and worst > tolerance:
        raise RuntimeError(f"The variants differ by {worst:.1e}, more than {tolerance:.0e}: nothing was timed.")
    return worst


def report(args: argparse.Namespace, step: Step, found: dict) -> str:
    """Markdown."""
    agreement = "" if found["difference"] is None else f"; the variants agree to {found['difference']:.0e}"
    lines = [
        f"Depth {args.num_layers}, batch {args.batch_size}, {step.token_ids.shape[1]} tokens, {found['device']}, torch"
        f" {torch.__version__}, precision {args.mixed_precision}, {args.num_rounds} rounds{agreement}.",
        "",
        f"| step | median s | speed, {REFERENCE} = 1 (min–max) | peak MiB | expected |",
        "|---|---|---|---|---|",
    ]
    seconds = found["seconds"]
    for name, expected in found["expected MiB"].items():
        if name not in seconds:
            lines.append(f"| {name} | left out: only {found['available MiB']:,.0f} MiB | | | {expected:,.0f} |")
            continue
        speed = ratio_text(seconds[REFERENCE], seconds[name]) if REFERENCE in seconds else ""
        peak = "" if found["MiB"][name] is None else f"{found['MiB'][name]:,.0f}"
        lines.append(f"| {name} | {statistics.median(seconds[name]):.3f} | {speed} | {peak} | {expected:,.0f} |")
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    step = Step(args)
    expected = {
        name: step.expected_memory(name) for name in [*step.variants, *([TOKENISING] if args.tokenizer else [])]
    }
    available = step.available_memory()
    names = [name for name, needed in expected.items() if available is None or needed <= available]
    for name in [name for name in expected if name not in names]:
        sys.stderr.write(f"{name} is left out: it needs {expected[name]:,.0f} MiB, and {available:,.0f} are left.\n")
    difference = check_equal(step, names)
    for name in names:
        step.time(name)  # warm up
    memory = {name: step.peak_memory(name) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(args.num_rounds)):
        for name in names:
            seconds[name].append(step.time(name))
    found = {
        "arguments": vars(args),
        "device": device_name(step.device),
        "difference": difference,
        "seconds": seconds,
        "MiB": memory,
        "expected MiB": expected,
        "available MiB": available,
    }
    sys.stdout.write(report(args, step, found))
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(parse_args())
