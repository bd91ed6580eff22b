#!/usr/bin/env python
"""
What linear layers cost on a CPU, and what int8 changes in a model's predictions.

    python benchmarks/linear_layers.py --width 1024 --num_rows 2 8 18 32 50 72 128 200 338 512
    python benchmarks/linear_layers.py --dataset_name fruits64 \\
        --pretrained_model_name_or_path model_cards/srdd-fruits64

The first command times layers of VAR's shapes for a scale's tokens (times 2 with guidance): torch's kernels, oneDNN's,
and int8 by torchao and by ours. Weights take turns so that none waits in a cache, kernels take turns round by round;
medians of the seconds that one thread spent. The second compares logits on held-out images, which are tokenised, with
their labels. Both print Markdown and need torchao.
"""

import argparse
import copy
import itertools
import math
import statistics
import sys
import time

import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from tqdm.auto import tqdm

from srdd import ScaleTransformer2DModel, SRDDPipeline
from srdd.data.images import image_to_tensor, load_labelled_images
from srdd.models.fast_linear import FastLinear


# Weights of one shape that exceed any cache, in elements.
NUM_ELEMENTS = 48_000_000


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--num_rows", type=int, nargs="+", default=[2, 8, 32, 72, 200, 512])
    parser.add_argument("--num_rounds", type=int, default=11)
    parser.add_argument("--num_elements", type=int, default=NUM_ELEMENTS)
    parser.add_argument("--pretrained_model_name_or_path", help="Compare predictions of this model.")
    parser.add_argument("--dataset_name", help="Its images: the validation split of a data set with labels.")
    parser.add_argument("--num_images", type=int, default=256)
    return parser.parse_args(arguments)


def with_int8(module: torch.nn.Module) -> torch.nn.Module:
    """A copy with int8 weights."""
    module = copy.deepcopy(module)
    quantize_(module, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return module


def kernels(in_features: int, out_features: int) -> dict[str, torch.nn.Module]:
    """One layer, by all kernels."""
    layer = torch.nn.Sequential(FastLinear(in_features, out_features))
    found = {"torch": layer, "oneDNN": copy.deepcopy(layer), "torchao": with_int8(layer), "int8": with_int8(layer)}
    for name, module in found.items():
        module[0].fast = name in ("oneDNN", "int8")
    with torch.no_grad():
        found["int8"](torch.zeros(1, in_features))  # packs the weight
    return found


@torch.no_grad()
def time_layers(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    width = args.width
    shapes = {"projection": (width, width), "MLP in + GELU": (width, 4 * width), "MLP out": (4 * width, width)}
    for shape, (in_features, out_features) in shapes.items():
        count = max(2, args.num_elements // (in_features * out_features))
        layers = [kernels(in_features, out_features) for _ in tqdm(range(count), desc=shape)]
        turns = itertools.cycle(layers)
        names = list(layers[0])
        sys.stdout.write(f"\n| {shape}: rows | torch, ms | {' | '.join(names[1:])} |\n|---|---|{'---|' * 3}\n")
        for num_rows in args.num_rows:
            inputs = torch.randn(num_rows, in_features)
            seconds: dict[str, list[float]] = {name: [] for name in names}
            for name in names:
                layers[0][name](inputs)
            for _ in range(args.num_rounds):
                for name in names:
                    (layer,) = next(turns)[name]
                    started = time.thread_time()
                    layer(inputs, tanh_gelu="GELU" in shape)
                    seconds[name].append(time.thread_time() - started)
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            speeds = " | ".join(f"{medians['torch'] / medians[name]:.2f}" for name in names[1:])
            sys.stdout.write(f"| {num_rows} | {1e3 * medians['torch']:.3f} | {speeds} |\n")


@torch.no_grad()
def compare_predictions(args: argparse.Namespace) -> None:
    pipe = SRDDPipeline.from_pretrained(args.pretrained_model_name_or_path)
    data = load_labelled_images(args.dataset_name)
    order = torch.randperm(len(data.validation), generator=torch.Generator().manual_seed(0))
    chosen = data.validation.select(order[: args.num_images].tolist())
    pixels = torch.stack([image_to_tensor(image, pipe.sample_size[0]) for image in chosen[data.image_column]])
    class_ids = torch.tensor(pipe.get_label_ids([data.id2label[label] for label in chosen[data.label_column]]))
    token_ids = torch.cat([pipe.vqvae.tokenize(part, pipe.scheduler.scales) for part in pixels.split(64)])

    def logits_of(transformer: ScaleTransformer2DModel) -> torch.Tensor:
        parts = []
        for ids, labels in zip(token_ids.split(64), class_ids.split(64)):
            inputs = pipe.vqvae.teacher_forcing_inputs(ids, pipe.scheduler.scales).to(transformer.dtype)
            parts.append(transformer(inputs, pipe.scheduler.scale_timesteps(), labels).sample.float())
        return torch.cat(parts)

    def bits(logits: torch.Tensor) -> float:
        chosen = logits.log_softmax(dim=-1).gather(-1, token_ids.unsqueeze(-1))
        return -chosen.mean().item() / math.log(2)

    pipe.transformer.disable_fast_linears()
    expected = logits_of(pipe.transformer)
    likely = expected.log_softmax(dim=-1)
    onednn = copy.deepcopy(pipe.transformer)
    onednn.enable_fast_linears()
    int8 = with_int8(onednn)
    models = {"float32, oneDNN": onednn, "int8": int8, "bfloat16": copy.deepcopy(pipe.transformer).bfloat16()}
    sys.stdout.write("| | relative error of logits | KL per token, nats | equal greedy tokens | bits per token |\n")
    sys.stdout.write(f"|---|---|---|---|---|\n| float32 | | | | {bits(expected):.4f} |\n")
    for name, model in models.items():
        logits = logits_of(model)
        error = ((logits - expected).norm() / expected.norm()).item()
        divergence = (likely.exp() * (likely - logits.log_softmax(dim=-1))).sum(dim=-1).mean().item()
        equal = (logits.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean().item()
        sys.stdout.write(f"| {name} | {error:.1e} | {max(divergence, 0.0):.5f} | {equal:.2%} | {bits(logits):.4f} |\n")


def main(args: argparse.Namespace) -> None:
    (time_layers if args.pretrained_model_name_or_path is None else compare_predictions)(args)


if __name__ == "__main__":
    main(parse_args())
