"""
Trains tiny models with `--push_to_hub` and loads back what was published. Run by `test_published_runs.py` in a process
of its own; the token is an argument, the environment has none.
"""

import sys
from pathlib import Path

import torch
from tiny_texts import tiny_text_pipeline
from training.launching import caption_folders, make_image_folder
from training.tiny_runs import distill, train_texts, train_tokenizer, train_transformer

from srdd import MultiScaleVQModel, SRDDPipeline, SRDDTextPipeline


def draw(name: str | Path, pipeline: type = SRDDPipeline) -> torch.Tensor:
    pipe = pipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe("warm", generator=torch.Generator().manual_seed(0), output_type="pt").images


def main(token: str) -> None:
    root = Path.cwd()
    images = make_image_folder(root / "data" / "images")
    push = ["--push_to_hub", "--hub_token", token, "--license", "cc0-1.0"]
    train_tokenizer(images, root / "tokenizer", *push)
    # Caches within the folder of the run, under names of the user's.
    own_places = ["--cache_dir", root / "run" / "data", "--token_cache_dir", root / "run" / "ids"]
    train_transformer(
        images,
        root / "tokenizer",
        root / "run",
        *push,
        *own_places,
        "--hub_model_id",
        "fruit",
        "--save_dtype",
        "float16",
    )
    stages = ["--scales", "1,2,4", "--scales", "1,4"]
    distill(images, root / "run", root / "student", *stages)
    # A finished run is published by the same command.
    again = ["--resume_from_checkpoint", "latest", "--hub_model_id", "me/student"]
    distill(images, root / "run", root / "student", *stages, *push, *again)
    tiny_text_pipeline().save_pretrained(root / "base")
    caption_folders(images, "cold", "warm")
    train_texts(images, root / "base", root / "captions", *push, "--lora_rank", 2, "--with_code")
    results = {
        "published": {name: draw(f"me/{name}") for name in ("fruit", "student")},
        "local": {name: draw(root / name) for name in ("run", "student")},
        "texts": [draw(name, SRDDTextPipeline) for name in ("me/captions", root / "captions")],
        "tokenizer": MultiScaleVQModel.from_pretrained("me/tokenizer").state_dict(),
        "local_tokenizer": MultiScaleVQModel.from_pretrained(root / "tokenizer").state_dict(),
        "local_files": {
            name: [path.relative_to(root / name).as_posix() for path in (root / name).rglob("*") if path.is_file()]
            for name in ("tokenizer", "run", "student", "captions")
        },
    }
    torch.save(results, root / "results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
