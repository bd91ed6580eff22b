#!/usr/bin/env python
"""
Time and memory of converting official VAR checkpoints, on random files with the official keys and shapes.

    python benchmarks/conversion.py --depth 16 --work_dir /tmp/conversion

Writes one JSON line: sizes in GB (1e9 bytes), seconds, and the peak resident memory of `python -m srdd.conversion`, in
which the pages mapped from the checkpoint count. `--keep` leaves the files, so that the folder can be tried.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from accelerate import init_empty_weights

from srdd import MultiScaleVQModel, ScaleTransformer2DModel
from srdd.conversion.official_config import KNOWN_SCALES
from srdd.conversion.official_layout import RESIDUAL_CONV_NAMES, Origin, tokenizer_origins, transformer_origins


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=16, help="Published: 16, 20, 24, 30 (256px) and 36 (512px).")
    parser.add_argument("--work_dir", type=Path, default=Path("conversion-benchmark"), help="For the files; new.")
    parser.add_argument("--checkpoint_dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="Passed to the conversion.")
    parser.add_argument("--keep", action="store_true", help="Leave the files in place.")
    return parser.parse_args(arguments)


def random_state(origins: dict[str, Origin], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A random official state dict: small weights, and the gains of norms near one."""
    shapes = {origin.key: origin.shape for origin in origins.values() if origin.key is not None}
    state = {}
    for key, shape in shapes.items():
        is_gain = "norm" in key and key.endswith(".weight")
        state[key] = torch.empty(shape, dtype=dtype).normal_(float(is_gain), 0.02)
    return state


def write_checkpoints(depth: int, dtype: torch.dtype, vae_path: Path, transformer_path: Path) -> None:
    """Files like `vae_ch160v4096z32.pth` and `var_d16.pth`."""
    large = depth == 36
    scales = KNOWN_SCALES[512 if large else 256]
    with init_empty_weights():
        vqvae = MultiScaleVQModel()
        transformer = ScaleTransformer2DModel(
            scale_sizes=scales, num_layers=depth, num_attention_heads=depth, shared_adaln=large
        )
    shapes = [{key: tuple(tensor.shape) for key, tensor in m.state_dict().items()} for m in (vqvae, transformer)]

    state = random_state(tokenizer_origins(shapes[0], RESIDUAL_CONV_NAMES[0]), dtype)
    state["quantize.ema_vocab_hit_SV"] = torch.zeros(len(scales), 4096)
    torch.save(state, vae_path)

    state = random_state(transformer_origins(shapes[1]), dtype)
    levels = torch.cat([torch.full((1, side**2), level) for level, side in enumerate(scales)], dim=1)
    state["lvl_1L"] = levels
    state["attn_bias_for_masking"] = torch.zeros(1, 1, levels.shape[1], levels.shape[1])
    for index in range(depth):
        state[f"blocks.{index}.attn.zero_k_bias"] = torch.zeros(64 * depth)
    torch.save(state, transformer_path)


def run(command: list[str]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak resident GB of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} failed with status {status}.")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9


def gigabytes(paths: list[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 1e9


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    args.work_dir.mkdir(parents=True)
    vae, transformer = args.work_dir / "vae_ch160v4096z32.pth", args.work_dir / f"var_d{args.depth}.pth"
    # A process inherits the peak of the one that starts it, so that this one must stay small.
    dtype = getattr(torch, args.checkpoint_dtype)
    writer = get_context("spawn").Process(target=write_checkpoints, args=(args.depth, dtype, vae, transformer))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise RuntimeError(f"Writing the checkpoints failed with status {writer.exitcode}.")
    output = args.work_dir / "converted"
    module = [sys.executable, "-m", "srdd.conversion"]
    import_seconds, import_cpu_seconds, import_peak = run([sys.executable, "-c", "import srdd.conversion.__main__"])
    options = ["--dtype", args.dtype] if args.dtype else []
    seconds, cpu_seconds, peak = run(
        [*module, "--vae", str(vae), "--transformer", str(transformer), "--output", str(output), *options]
    )
    checkpoint_size = gigabytes([vae, transformer])
    result = {
        "depth": args.depth,
        "checkpoint_dtype": args.checkpoint_dtype,
        "dtype": args.dtype or args.checkpoint_dtype,
        "checkpoints_gb": checkpoint_size,
        "converted_gb": gigabytes([path for path in output.rglob("*") if path.is_file()]),
        "seconds": seconds,
        "seconds_of_imports": import_seconds,
        "cpu_seconds": cpu_seconds,
        "cpu_seconds_of_imports": import_cpu_seconds,
        "peak_gb": peak,
        "peak_gb_of_imports": import_peak,
        "peak_over_checkpoints": peak / checkpoint_size,
    }
    sys.stdout.write(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}) + "\n")
    if not args.keep:
        shutil.rmtree(args.work_dir)


if __name__ == "__main__":
    main()
