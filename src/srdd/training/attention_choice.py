"""How a transformer attends in training: as its device does best, unless `--attention_backend` says it."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from tqdm.auto import tqdm

from srdd import ScaleTransformer2DModel
from srdd.models import MaskedScaleAttnProcessor


WAYS = {
    "flex": "FlexAttention, one call for all scales in compiled blocks",
    "mask": "one call for all scales under a dense mask",
    "per_scale": "one call per scale",
}

# What FlexAttention's kernels want.
MIN_CUDA_CAPABILITY = (8, 0)
MIN_HEAD_DIM = 16


def has_compiler(device: torch.device) -> bool:
    """
    Whether `torch.compile` can make FlexAttention's kernels for a device: Triton is installed, there is the C compiler
    that it calls (on Windows it brings one), and the GPU is not older than NVIDIA's Ampere. Nothing is compiled.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    has_c = sys.platform == "win32" or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(has_c) and torch.cuda.get_device_capability(device) >= MIN_CUDA_CAPABILITY


def default_attention(device_type: str, can_compile: bool, head_dim: int) -> str:
    """
    The fastest of the `WAYS` to train.

    Args:
        device_type (`str`): "cpu", "cuda", ...
        can_compile (`bool`): Whether the device [`has_compiler`].
        head_dim (`int`): Width of the model's attention heads.

    Returns:
        `str`: "per_scale" on CPUs. Elsewhere the host's calls count: "flex", and "mask" where that does not run.
    """
    if device_type == "cpu":
        return "per_scale"
    return "flex" if can_compile and head_dim >= MIN_HEAD_DIM else "mask"


def check_attention(backend: str | None, device: torch.device) -> None:
    """
    Refuse an `--attention_backend` that cannot be trained with, before anything else is done.

    Raises:
        ValueError: If it is neither one of `WAYS` nor a backend of diffusers, or has no gradients on the device.
    """
    names = [name.value for name in AttentionBackendName if name.value not in WAYS]
    if backend is not None and backend not in (*WAYS, *names):
        raise ValueError(f"`--attention_backend` must be one of {[*WAYS]} or of diffusers' {names}, got {backend!r}.")
    if backend == "flex" and device.type == "cpu":
        raise ValueError("`--attention_backend` must be one that has gradients on a CPU, got 'flex'.")


def set_attention(
    models: Sequence[ScaleTransformer2DModel], backend: str | None, device: torch.device, num_schedules: int = 1
) -> str:
    """
    Let transformers attend in the way that is asked for, or the fastest, and say which.

    Their weights and the names of these stay, so that checkpoints fit every way. Called before the models are prepared
    and after adapters are added and copies for drawing are made: a copy would not have the compiled blocks, but an
    attention that is made for them.

    Args:
        models (`Sequence[ScaleTransformer2DModel]`): The transformers, with heads of one width.
        backend (`str` or `None`): One of `WAYS`, or a backend of diffusers, which then attends scale by scale.
        device (`torch.device`): What they are trained on.
        num_schedules (`int`, defaults to 1): How many lists of scales they are trained on.

    Returns:
        `str`: The way or the backend.
    """
    chosen = backend
    if chosen is None:
        chosen = default_attention(device.type, has_compiler(device), models[0].config.attention_head_dim)
    for model in models:
        if chosen in ("flex", "mask"):
            model.set_attn_processor(MaskedScaleAttnProcessor())
        if chosen not in ("mask", "per_scale"):
            with attention_backend():  # diffusers would make it the default of all models
                model.set_attention_backend(chosen)
    if chosen == "flex":
        compile_blocks(models, num_schedules)
    if PartialState().is_main_process:
        way = WAYS.get(chosen, f"{chosen}, one call per scale")
        reason = f"the default on {device.type}" if backend is None else "as `--attention_backend` says"
        tqdm.write(f"Attention in training: {way} ({reason}).", file=sys.stderr)
    return chosen


def compile_blocks(models: Sequence[ScaleTransformer2DModel], num_schedules: int = 1, **options: Any) -> None:
    """
    Compile the blocks of all models for batches of one size, over `num_schedules` lists of scales; `options` are those
    of `torch.compile`.
    """
    torch.compiler.reset()  # a stage before may have had other scales: its graphs would count as these models'
    config = torch._dynamo.config
    # Every schedule makes a graph, and with stochastic depth every block. Those beyond a limit would not be compiled.
    num_graphs = 8 + num_schedules * sum(len(model.blocks) for model in models)
    config.cache_size_limit = max(config.cache_size_limit, num_graphs)
    config.accumulated_cache_size_limit = max(config.accumulated_cache_size_limit, num_graphs)
    # DDP's optimizer would cut blocks into its buckets; where one holds FlexAttention, older versions of torch refuse.
    config.optimize_ddp = False
    for model in models:
        model.compile_repeated_blocks(dynamic=False, **options)
