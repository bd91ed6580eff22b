#!/usr/bin/env python
"""
Whether `train_srdd.py` runs on a machine, with its defaults for that device, and at how many steps a second.

    python benchmarks/training_run.py --device cuda --mixed_precision bf16 --max_train_steps 100 --train_batch_size 256

Makes small pictures of two classes, trains on the tokens of the bundled tokenizer, and draws with what was saved. A
run of so few steps teaches nothing; its loss must fall all the same. Prints Markdown; `--output` takes JSON, and
`--folder` keeps pictures and model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import device_name, write_results
from PIL import Image, ImageDraw

from srdd import SRDDPipeline
from srdd.console import write_text
from srdd.evaluation.tables import markdown_table


ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "model_cards" / "srdd-tokenizer-64"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--num_pictures", type=int, default=512)
    parser.add_argument("--max_train_steps", type=int, default=100)
    parser.add_argument("--train_batch_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=6)
    parser.add_argument("--num_attention_heads", type=int, default=4)
    parser.add_argument("--logging_steps", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="For pictures and model; a temporary one by default.")
    parser.add_argument("--output", type=Path, help="JSON file for all that was measured.")
    return parser.parse_args(arguments)


def make_pictures(folder: Path, count: int) -> None:
    """So many pictures of two classes, discs and squares, of all colours."""
    for index in range(count):
        name = ("disc", "square")[index % 2]
        picture = Image.new("RGB", (64, 64), "white")
        left, top, size = index * 7 % 24, index * 5 % 24, 16 + index * 3 % 24
        colour = tuple(index * factor % 200 for factor in (37, 59, 83))
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if name == "disc" else draw.rectangle)((left, top, left + size, top + size), fill=colour)
        path = folder / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def train(args: argparse.Namespace, pictures: Path, output_dir: Path) -> list[tuple[float, dict]]:
    """
    The lines of the log, each with the second in which it was there.

    Raises:
        RuntimeError: If the script fails.
    """
    values = {
        "train_data_dir": pictures,
        "pretrained_vqvae_name_or_path": TOKENIZER,
        "output_dir": output_dir,
        "lr_warmup_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "seed": 0,
        **dict.fromkeys(("validation_steps", "checkpointing_steps"), args.max_train_steps),  # once, at the end
        **{
            name: value
            for name, value in vars(args).items()
            if name not in ("device", "num_pictures", "folder", "output")
        },
    }
    words = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {})}
    started, log, lines = time.perf_counter(), output_dir / "train_log.jsonl", []
    process = subprocess.Popen(
        [sys.executable, ROOT / "training_scripts" / "train_srdd.py", *words],
        env=environment,
        stdout=2,  # with its errors: ours is for the table
    )
    try:
        while process.poll() is None:
            time.sleep(0.02)
            lines += new_lines(log, lines, time.perf_counter() - started)
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"`train_srdd.py` has ended with exit code {process.returncode}.")
    return lines + new_lines(log, lines, time.perf_counter() - started)


def new_lines(log: Path, lines: list, seconds: float) -> list[tuple[float, dict]]:
    """The whole lines of a log that were not there before."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [(seconds, json.loads(line)) for line in whole[len(lines) :]]


def run(args: argparse.Namespace, folder: Path) -> dict:
    """All that is measured."""
    make_pictures(folder / "pictures", args.num_pictures)
    lines = [(seconds, line) for seconds, line in train(args, folder / "pictures", folder / "model") if "loss" in line]
    # Without the first third, in which blocks are compiled.
    (early, first), (late, last) = lines[len(lines) // 3], lines[-1]
    pipe = SRDDPipeline.from_pretrained(folder / "model").to(args.device)
    pipe.set_progress_bar_config(disable=True)
    pixels = pipe(["disc", "square"], output_type="pt").images
    return {
        "seconds_to_first_line": lines[0][0],
        "steps_per_second": (last["step"] - first["step"]) / (late - early) if late > early else None,
        "losses": {line["step"]: line["loss"] for _, line in lines},
        "draws": bool(pixels.isfinite().all()),
    }


def report(args: argparse.Namespace, results: dict) -> str:
    """Markdown."""
    losses, speed = [*results["losses"].values()], results["steps_per_second"]
    introduction = (
        f"`train_srdd.py`, {args.num_layers} layers, batch {args.train_batch_size}, {args.max_train_steps} steps,"
        f" {device_name(torch.device(args.device))}, torch {torch.__version__}, precision {args.mixed_precision}."
    )
    header = ("s to the first line of the log", "steps/s", "loss at first and at last", "what was saved draws")
    cells = (
        f"{results['seconds_to_first_line']:.1f}",
        "" if speed is None else f"{speed:.2f}",
        f"{losses[0]:.3f}, {losses[-1]:.3f}",
        "yes" if results["draws"] else "no",
    )
    return f"{introduction}\n\n{markdown_table(header, [cells])}"


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        results = run(args, args.folder or Path(temporary))
    write_text(report(args, results))
    write_results(args, results, torch.device(args.device))
    losses = [*results["losses"].values()]
    if not results["draws"] or not losses[-1] < losses[0]:
        sys.exit("The model does not draw, or its loss has not fallen.")


if __name__ == "__main__":
    main(parse_args())
