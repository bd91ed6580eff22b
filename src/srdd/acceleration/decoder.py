"""
Decoding without gradients: the arithmetic of diffusers' decoder in less time and memory.

[`lighten`] puts the classes below in the place of diffusers'. They hold the same parameters under the same names and
run diffusers' code, unless [`run_decoder`] has told them otherwise. It decides once for all of them, by
[`decoding_path`], and tells them through a context variable: what one thread decodes is nothing to another, and
nothing stays switched on after an exception.

Shape legend: B batch, O and I output and input channels, H W height and width of the input.
"""

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

from srdd.acceleration.cpu import MULTIPLIES_INT8
from srdd.acceleration.module_swapping import recast


MIB = 2**20

# What the largest feature map of a slice has at most. A CPU wants its caches, an accelerator full kernels: twelve
# images of 256px in half precision. What is best there was not measured yet; `benchmarks/decoder_slices.py` does.
BYTES_PER_SLICE_ON_CPU = 8 * MIB
BYTES_PER_SLICE = 256 * MIB

# What that map must fit into so many times: three of a residual block's maps are there at once, and cuDNN copies a
# convolution's input and output into another layout.
MAPS_AT_PEAK = 5
# What of the memory that a device has left a slice may take, as what is left in pieces is of no use.
SHARE_OF_FREE_MEMORY = 0.5

# Where the three taps of a kernel fall after nearest-neighbour up-sampling by 2. At even positions that is the pixel
# before (tap 0) and the pixel itself (taps 1 and 2), at odd ones the pixel itself (taps 0 and 1) and the next (tap 2).
TAPS = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


@dataclass(frozen=True)
class DecodingPath:
    """
    How a decoder runs.

    Args:
        in_place (`bool`, defaults to `False`): Activations and residual sums overwrite what nobody else reads.
        channels_last (`bool`, defaults to `False`): Feature maps keep their channels innermost.
        merged_kernels (`bool`, defaults to `False`): Up-sampling and the convolution after it are one step with 4/9 of
            the multiplications.
        bytes_per_slice (`int`, *optional*): A batch is decoded so many images at a time that their largest feature map
            stays below this, and at least one. In place, the decoder needs three times as much beside its weights, on
            CUDA [`MAPS_AT_PEAK`].
        even_slices (`bool`, defaults to `False`): All slices but the last are of one size, the last is not much
            smaller, and less than `bytes_per_slice` is taken where a device has little memory left
            ([`images_per_slice`]).
        int8 (`bool`, defaults to `False`): Convolutions that were quantized multiply int8.
    """

    in_place: bool = False
    channels_last: bool = False
    merged_kernels: bool = False
    bytes_per_slice: int | None = None
    even_slices: bool = False
    int8: bool = False


PLAIN = DecodingPath()
FLOAT32_ON_CPU = DecodingPath(
    in_place=True,
    channels_last=True,
    merged_kernels=True,
    bytes_per_slice=BYTES_PER_SLICE_ON_CPU,
    int8=MULTIPLIES_INT8,
)
HALF_ON_CPU = DecodingPath(in_place=True, bytes_per_slice=BYTES_PER_SLICE_ON_CPU)
ACCELERATOR = DecodingPath(in_place=True, bytes_per_slice=BYTES_PER_SLICE, even_slices=True)
# Slices around a compiled decoder, in which all else is the compiler's.
COMPILED_ON_CPU = DecodingPath(bytes_per_slice=BYTES_PER_SLICE_ON_CPU, even_slices=True)
COMPILED = DecodingPath(bytes_per_slice=BYTES_PER_SLICE, even_slices=True)


# The path of the decoder that is running in this thread.
current_path: ContextVar[DecodingPath] = ContextVar("current_path", default=PLAIN)


def decoding_path(latents: torch.Tensor, fast: bool = True, compiled: bool = False) -> DecodingPath:
    """
    The path for an input: diffusers' own under autocast and wherever a gradient may be asked for.

    Float32 on a CPU was measured (`benchmarks/SPEED.md`). On an accelerator only what saves memory is on. Channels
    stay outermost there, as CUDA's group norm would copy maps that have them innermost: on an H100 an image took 9.0
    ms, and 11.1 with channels innermost.

    Args:
        latents (`torch.Tensor`): The input.
        fast (`bool`, defaults to `True`): Whether another path than diffusers' own is welcome.
        compiled (`bool`, defaults to `False`): Whether the decoder is compiled. Only the slices are then left to
            decide.

    Returns:
        [`DecodingPath`]
    """
    if not fast or torch.is_grad_enabled():
        return PLAIN
    device_type = latents.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return PLAIN
    if compiled:
        return COMPILED_ON_CPU if device_type == "cpu" else COMPILED
    if device_type != "cpu":
        return ACCELERATOR
    return FLOAT32_ON_CPU if latents.dtype == torch.float32 else HALF_ON_CPU


def images_per_slice(
    batch_size: int, bytes_per_image: int, bytes_per_slice: int, free_bytes: int | None = None
) -> int:
    """
    How many images of a batch are decoded at a time.

    All of them where their largest feature map is at most `bytes_per_slice`, and [`MAPS_AT_PEAK`] of it fit into
    [`SHARE_OF_FREE_MEMORY`] of what is free. Otherwise slices are as few as these two allow, and as even as can be: a
    compiled decoder and cuDNN then see one size, and a smaller one at the end where the batch does not divide. More
    images in a slice would save nothing but launches, and take memory in proportion.

    Args:
        batch_size (`int`): Images in all.
        bytes_per_image (`int`): Size of an image's largest feature map.
        bytes_per_slice (`int`): What the map of a slice may have at most, unless one image has more.
        free_bytes (`int`, *optional*): The memory that is free, if anybody knows.

    Returns:
        `int`: At least 1. The last slice may have fewer.
    """
    if free_bytes is not None:
        bytes_per_slice = min(bytes_per_slice, int(SHARE_OF_FREE_MEMORY * free_bytes) // MAPS_AT_PEAK)
    at_most = max(1, bytes_per_slice // bytes_per_image)
    num_slices = -(-batch_size // at_most)
    return -(-batch_size // num_slices)


def free_memory(device: torch.device) -> int | None:
    """
    Bytes that torch can still get on a CUDA device, its own unused ones among them. `None` for other devices, and
    while a CUDA graph is captured, when it is no time for questions.
    """
    if device.type != "cuda" or not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return None
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


# What was decided last for a device, a batch size and a size of images: a CUDA graph is captured with the slices of
# the run before it, which has warmed up the kernels for them.
_decided: dict[tuple[torch.device, int, int], int] = {}


def even_slice(latents: torch.Tensor, bytes_per_image: int, bytes_per_slice: int) -> int:
    """[`images_per_slice`] with what the device has left. The device is asked here and nowhere else."""
    case = latents.device, len(latents), bytes_per_image
    free_bytes = free_memory(latents.device)
    if free_bytes is None and case in _decided:
        return _decided[case]
    num_images = images_per_slice(len(latents), bytes_per_image, bytes_per_slice, free_bytes)
    if free_bytes is not None:
        _decided[case] = num_images
    return num_images


def run_decoder(
    decode: Callable[[torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    fast: bool,
    bytes_per_image: int,
    one_by_one: bool = False,
    compiled: bool = False,
) -> torch.Tensor:
    """
    Decode latents with a lightened decoder on the path that suits them.

    Compiled code is diffusers' own: a compiler does the rest better. Where `decode` as a whole is compiled, it takes
    the whole batch at once; a decoder that is compiled alone gets slices from here.

    Args:
        decode (`Callable[[torch.Tensor], torch.Tensor]`): Runs the decoder.
        latents (`torch.Tensor` of shape `(batch, channels, height, width)`): Its input.
        fast (`bool`): Whether another path than diffusers' own is welcome.
        bytes_per_image (`int`): Size of an image's largest feature map.
        one_by_one (`bool`, defaults to `False`): Whether slices are to hold one image each.
        compiled (`bool`, defaults to `False`): Whether the decoder is compiled.

    Returns:
        `torch.Tensor`: What `decode` returns.
    """
    if torch.compiler.is_compiling():
        return decode(latents)
    path = decoding_path(latents, fast, compiled)
    if path.channels_last:
        latents = latents.contiguous(memory_format=torch.channels_last)
    num_images = len(latents)
    if one_by_one:
        num_images = 1
    elif path.even_slices and num_images > 1:
        num_images = even_slice(latents, bytes_per_image, path.bytes_per_slice)
    elif path.bytes_per_slice is not None:
        num_images = max(1, path.bytes_per_slice // bytes_per_image)
    slices = latents.split(num_images)
    entered = current_path.set(path)
    try:
        if compiled and len(slices) > 1:
            # A compiler with CUDA graphs of its own gives every slice's pixels in the same memory.
            samples = [decode(latents_of_slice).clone() for latents_of_slice in slices]
        else:
            samples = [*map(decode, slices)]
    finally:
        current_path.reset(entered)
    sample = samples[0] if len(samples) == 1 else torch.cat(samples)
    return sample.contiguous() if path.channels_last else sample


class InPlaceSiLU(nn.SiLU):
    """The activation after a norm, whose output nobody else reads."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        in_place = not torch.compiler.is_compiling() and current_path.get().in_place
        return F.silu(hidden_states, inplace=in_place)


class LeanResnetBlock2D(ResnetBlock2D):
    """
    A residual block without time embedding that adds in place, and does not divide by 1.

    It holds three maps at most, its input among them: what a layer has read goes when the next one begins, and the sum
    is written over the input, which the callers of a decoder's blocks hold until the end of the whole level. Whoever
    keeps a map by a hook has to copy it.
    """

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        if torch.compiler.is_compiling() or not current_path.get().in_place:
            return super().forward(input_tensor, temb)
        # In one expression, as a name would keep its map.
        hidden_states = self.conv2(
            self.nonlinearity(self.norm2(self.conv1(self.nonlinearity(self.norm1(input_tensor)))))
        )
        if self.conv_shortcut is not None:
            return hidden_states.add_(self.conv_shortcut(input_tensor))
        # The next level takes the convolution's layout; attention gives another one.
        if input_tensor.stride() == hidden_states.stride():
            return input_tensor.add_(hidden_states)
        return hidden_states.add_(input_tensor)


class MergedUpsample2D(Upsample2D):
    """Nearest-neighbour up-sampling by 2 that leaves both steps to its convolution where these are one."""

    def forward(self, hidden_states: torch.Tensor, output_size: int | None = None) -> torch.Tensor:
        if output_size is None and torch.compiler.is_compiling():
            # diffusers' code asks for torch's version, which does not compile everywhere.
            return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
        # An adapter around the convolution wants to see the up-sampled map.
        if output_size is None and current_path.get().merged_kernels and isinstance(self.conv, UpsamplingConv2d):
            return self.conv(hidden_states, upsample=True)
        return super().forward(hidden_states, output_size)


class UpsamplingConv2d(nn.Conv2d):
    """
    A 3 x 3 convolution that can up-sample its input by 2 (nearest neighbour) at the same time.

    Every second pixel of every second row of such an output sees the same 2 x 2 pixels of the input, so that four
    convolutions by 2 x 2 kernels give it. Their kernels are sums of this one's taps, made anew in every call: that
    costs little and can never be out of date.
    """

    def forward(self, hidden_states: torch.Tensor, upsample: bool = False) -> torch.Tensor:
        if not upsample:
            return super().forward(hidden_states)
        height, width = hidden_states.shape[-2:]
        output = torch.empty(
            (len(hidden_states), self.out_channels, 2 * height, 2 * width),
            dtype=hidden_states.dtype,
            device=hidden_states.device,
            memory_format=torch.channels_last,
        )  # (B, O, 2H, 2W)
        for index, phase in enumerate(self.phases(hidden_states)):
            row, column = divmod(index, 2)
            output[..., row::2, column::2] = phase[..., row : row + height, column : column + width]
        return output

    def phases(self, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
        """The input's convolutions by the four kernels, with a margin of one pixel, (B, O, H + 1, W + 1)."""
        for kernel in merged_kernels(self.weight):
            yield F.conv2d(hidden_states, kernel, self.bias, padding=1)


def merged_kernels(weight: torch.Tensor) -> list[torch.Tensor]:
    """The 2 x 2 kernels (O, I, 2, 2) of even and odd rows, and in either of even and odd columns."""
    taps = weight.new_tensor(TAPS)
    kernels = (weight.flatten(2) @ torch.kron(taps, taps).T).unflatten(-1, (2, 2, 2, 2))
    # (O, I, row phase, row, column phase, column)
    return [kernels[:, :, row, :, column] for row in range(2) for column in range(2)]


def lighten(decoder: Decoder) -> None:
    """Exchange those modules of a decoder that can do with less. Parameters and their names stay as they are."""
    recast(decoder.conv_act, {nn.SiLU: InPlaceSiLU})
    for block in list(decoder.modules()):
        if type(block) is ResnetBlock2D and block.upsample is block.downsample is block.time_emb_proj is None:
            recast(block, {ResnetBlock2D: LeanResnetBlock2D, nn.SiLU: InPlaceSiLU})
        elif type(block) is Upsample2D and block.use_conv and block.conv.kernel_size == (3, 3):
            recast(block, {Upsample2D: MergedUpsample2D, nn.Conv2d: UpsamplingConv2d})
