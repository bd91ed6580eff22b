"""
Decoding in int8 on CPUs: the same blocks in less time, by convolutions of oneDNN, which torch brings along.

[`quantize_decoder`] puts the classes below into a lightened decoder in the place of its blocks' 3 x 3 convolutions.
They hold the same parameters under the same names, and run float32 code wherever [`decoding_path`] leaves int8 out.

Weights become symmetric int8 with a scale for every output channel. Inputs become uint8 between bounds that were
found on examples once and for all: to look for them in every call takes longer than the convolution saves, and lets
images depend on their batch.

Numbers: `benchmarks/SPEED.md`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
from diffusers.models.autoencoders.vae import Decoder
from torch.utils.weak import WeakTensorKeyDictionary

from srdd.acceleration.cpu import MULTIPLIES_INT8
from srdd.acceleration.decoder import (
    LeanResnetBlock2D,
    MergedUpsample2D,
    UpsamplingConv2d,
    current_path,
    merged_kernels,
)
from srdd.acceleration.module_swapping import recast


# Numbers that are quantized at a time: few enough to stay in a cache from one operator to the next.
CHUNK = 65536

# What oneDNN reads in the place of a weight, and the version that it was made of; no copy or file knows of it.
_packed_kernels = WeakTensorKeyDictionary()


def scale_and_zero_point(low: float, high: float) -> tuple[float, int]:
    """What spreads the integers of [0, 255] from `low` to `high`, with one for 0 among them."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return scale, round(-low / scale)


def to_uint8(feature_maps: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """
    The integers of [0, 255] that are nearest to `feature_maps / scale + zero_point`.

    Args:
        feature_maps (`torch.Tensor` of shape `(batch, channels, height, width)`): Float32.
        scale (`float`): The distance of two neighbours.
        zero_point (`int`): The integer for 0.

    Returns:
        `torch.Tensor` of that shape, uint8, channels innermost.
    """
    feature_maps = feature_maps.contiguous(memory_format=torch.channels_last)
    integers = torch.empty_like(feature_maps, dtype=torch.uint8)
    start = torch.tensor(zero_point + 0.5)  # the conversion to integers rounds down
    chunks = (tensor.permute(0, 2, 3, 1).view(-1).split(CHUNK) for tensor in (feature_maps, integers))
    for numbers, rounded in zip(*chunks):
        rounded.copy_(torch.add(start, numbers, alpha=1 / scale).clamp_(0, 255))
    return integers


def packed_kernels(weight: torch.Tensor, merged: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A weight's kernels in int8, as oneDNN reads them, and the scales of their output channels, made once."""
    version = merged, None if weight.is_inference() else weight._version, weight.data_ptr()
    entry = _packed_kernels.get(weight)
    if entry is None or entry[0] != version:
        packed = []
        for kernel in merged_kernels(weight) if merged else [weight]:
            scales = kernel.abs().amax(dim=(1, 2, 3)).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)  # (O,)
            integers = (kernel / scales[:, None, None, None]).round_().to(torch.int8)
            layout = ([1, 1], [1, 1], [1, 1], 1)  # stride, padding, dilation, groups
            packed.append((torch.ops.onednn.qconv_prepack(integers, scales, 1.0, 0, *layout), scales))
        entry = version, packed
        _packed_kernels[weight] = entry
    return entry[1]


class Int8Convolution(nn.Conv2d):
    """
    What the convolutions below share.

    Inputs outside of `input_bounds` are moved to them; without any all is in float32, as in the convolutions that PEFT
    makes for an adapter, of the class that it adapts.
    """

    input_bounds: tuple[float, float] | None = None

    def multiplies_int8(self) -> bool:
        """Whether inputs are quantized now."""
        return self.input_bounds is not None and not torch.compiler.is_compiling() and current_path.get().int8

    def convolutions(self, hidden_states: torch.Tensor, merged: bool) -> Iterator[torch.Tensor]:
        """The input's convolutions by all of [`packed_kernels`]."""
        scale, zero_point = scale_and_zero_point(*self.input_bounds)
        integers = to_uint8(hidden_states, scale, zero_point)
        weight_zero_points = torch.zeros(self.out_channels, dtype=torch.int32)
        for kernel, scales in packed_kernels(self.weight, merged):
            yield torch.ops.onednn.qconv_pointwise(
                integers,
                scale,
                zero_point,
                kernel,
                scales,
                weight_zero_points,
                self.bias,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
                1.0,
                0,
                torch.float32,
                "none",
                [],
                "",
            )


class Int8Conv2d(Int8Convolution):
    """A 3 x 3 convolution in int8."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.multiplies_int8():
            return next(self.convolutions(hidden_states, merged=False))
        return super().forward(hidden_states)


class Int8UpsamplingConv2d(Int8Convolution, UpsamplingConv2d):
    """Up-sampling and a 3 x 3 convolution in int8, as one step."""

    def phases(self, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
        if self.multiplies_int8():
            return self.convolutions(hidden_states, merged=True)
        return super().phases(hidden_states)


INT8 = {nn.Conv2d: Int8Conv2d, UpsamplingConv2d: Int8UpsamplingConv2d}
FLOAT32 = {int8: float32 for float32, int8 in INT8.items()}


def check_quantizable(decoder: Decoder, latents: torch.Tensor) -> None:
    """
    Raises:
        ValueError: If a decoder cannot be quantized on this machine, or latents are no examples for it.
    """
    if not MULTIPLIES_INT8:
        raise ValueError(
            "`enable_int8_decoding` needs oneDNN and a CPU with VNNI (`avx512_vnni`, `avx_vnni` or `amx_int8`)."
        )
    weights = {f"{weight.dtype} on {weight.device}" for weight in decoder.parameters()}
    if weights != {"torch.float32 on cpu"}:
        raise ValueError(
            f"`enable_int8_decoding` needs a decoder in torch.float32 on cpu, got {', '.join(sorted(weights))}."
        )
    shape, channels = tuple(latents.shape), decoder.conv_in.in_channels
    if len(shape) != 4 or shape[1] != channels or 0 in shape or latents.device.type != "cpu":
        raise ValueError(
            f"`latents` must be of shape (batch, {channels}, height, width) on cpu, got {shape} on {latents.device}."
        )
    if not latents.isfinite().all():
        raise ValueError("`latents` must be finite, got infinities or NaN.")


@torch.no_grad()
def quantize_decoder(decoder: Decoder, decode: Callable[[torch.Tensor], Any], latents: torch.Tensor) -> None:
    """
    Exchange the 3 x 3 convolutions of a lightened decoder's blocks. Parameters and their names stay as they are.

    Args:
        decoder (`Decoder`): The decoder.
        decode (`Callable[[torch.Tensor], Any]`): Runs it.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): Inputs of `decode` that show the bounds
            of the decoder's feature maps, finite, on the CPU, with as many channels as the decoder's inputs.

    Raises:
        ValueError: If `latents` are none, the decoder's weights are not in float32 on the CPU, or the CPU lacks VNNI.
    """
    check_quantizable(decoder, latents)
    dequantize_decoder(decoder)
    blocks = [module for module in decoder.modules() if isinstance(module, (LeanResnetBlock2D, MergedUpsample2D))]
    # Adapters around some convolutions want float32.
    convolutions = [
        child for block in blocks for child in block.children() if type(child) in INT8 and child.kernel_size == (3, 3)
    ]
    bounds: dict[nn.Module, tuple[float, float]] = {}

    def widen(conv: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        low, high = (bound.item() for bound in torch.aminmax(args[0]))
        lowest, highest = bounds.get(conv, (low, high))
        bounds[conv] = min(low, lowest), max(high, highest)

    handles = [conv.register_forward_pre_hook(widen) for conv in convolutions]
    try:
        decode(latents)
    finally:
        for handle in handles:
            handle.remove()
    for conv in convolutions:
        recast(conv, INT8)
        conv.input_bounds = bounds[conv]


def dequantize_decoder(decoder: Decoder) -> None:
    """Take back what [`quantize_decoder`] did."""
    for module in decoder.modules():
        vars(module).pop("input_bounds", None)
    recast(decoder, FLOAT32)
