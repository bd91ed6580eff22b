"""Publishes tiny models on the Hub that the environment names. Run by `test_hub.py` in a process of its own."""

import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi
from PIL import Image
from tiny_models import tiny_pipeline, tiny_scheduler
from tiny_texts import WITHOUT_ENCODERS, tiny_text_pipeline

from srdd import SRDDInpaintPipeline, SRDDPipeline


def main(card_path: str) -> None:
    api = HfApi()
    api.create_repo("me/tiny")
    api.upload_file(path_or_fileobj=card_path, path_in_repo="README.md", repo_id="me/tiny")
    # A card's owner may add this one line for those who say `DiffusionPipeline.from_pretrained`.
    api.upload_file(path_or_fileobj=b"from srdd import SRDDPipeline\n", path_in_repo="pipeline.py", repo_id="me/tiny")
    tiny_pipeline().push_to_hub("me/tiny")
    tiny_pipeline().to(torch.float16).push_to_hub("me/tiny", variant="fp16")

    with tempfile.TemporaryDirectory() as folder:
        folder = str(Path(folder, "sharded"))
        tiny_pipeline().save_pretrained(folder, max_shard_size="20KB", push_to_hub=True, repo_id="me/sharded")

        loaded = Path(card_path).parent / "loaded"
        tiny_pipeline().save_pretrained(loaded)
        sections = (
            "\n![Pears](pears.png)\n\n## Without srdd\n\nCode.\n\n## Limits\n\nPears.\n\nSee `model_index.json`.\n"
        )
        (loaded / "README.md").write_text(Path(card_path).read_text() + sections)
        for name in ("pears.png", "pears-000001.png"):
            Image.new("RGB", (4, 4)).save(loaded / name)
        SRDDInpaintPipeline.from_pipe(SRDDPipeline.from_pretrained(loaded)).push_to_hub("me/loaded")
        api.create_repo("me/carded")
        api.upload_file(path_or_fileobj=card_path, path_in_repo="README.md", repo_id="me/carded")
        SRDDPipeline.from_pretrained(loaded).push_to_hub("me/carded")

    tiny_text_pipeline().push_to_hub("me/texts")
    tiny_text_pipeline(**WITHOUT_ENCODERS).push_to_hub("me/embeddings")

    tiny_scheduler().push_to_hub("me/scheduler")
    tiny_scheduler(scales=[1, 4]).push_to_hub("me/presets", subfolder="distilled-2")


if __name__ == "__main__":
    main(*sys.argv[1:])
