"""
Loads back what `push_models.py` published and saves what came of it. Run by `test_hub.py` in a process of its own.

Every load is a function here; its result, or its error as a string, goes into the file under the function's name.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from tiny_texts import ENCODED

from srdd import MultiScaleVQModel, ScaleScheduler, ScaleTransformer2DModel, SRDDPipeline, SRDDTextPipeline


def draw(pipe: SRDDPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe([0, "quince"], generator=torch.Generator().manual_seed(0), output_type="pt").images


def pipeline() -> dict:
    pipe = SRDDPipeline.from_pretrained("me/tiny")
    components = {name: component for name, component in pipe.components.items() if component is not None}
    names = {name: type(component).__name__ for name, component in components.items()}
    return {"images": draw(pipe), "components": names, "id2label": pipe.id2label}


def pipeline_from_cache() -> dict:
    return {"images": draw(SRDDPipeline.from_pretrained("me/tiny", local_files_only=True))}


def fp16_variant() -> dict:
    cache_dir = Path("fp16-cache")
    pipe = SRDDPipeline.from_pretrained("me/tiny", variant="fp16", dtype=torch.float16, cache_dir=cache_dir)
    files = sorted(path.name for path in cache_dir.rglob("*.safetensors"))
    return {"images": draw(pipe), "dtypes": [pipe.transformer.dtype, pipe.vqvae.dtype], "files": files}


def draw_texts(pipe: SRDDTextPipeline, **texts) -> dict:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    components = {name: type(component).__name__ for name, component in pipe.components.items()}
    return {"images": pipe(**texts, generator=generator, output_type="pt").images, "components": components}


def texts() -> dict:
    pipe = SRDDTextPipeline.from_pretrained("me/texts")
    return draw_texts(pipe, prompt=["a cat", "dogs"], negative_prompt="fog")


def embeddings() -> dict:
    encoded = SRDDTextPipeline.from_pretrained("me/texts").encode_prompt(["a cat", "dogs"], "fog")
    return draw_texts(SRDDTextPipeline.from_pretrained("me/embeddings"), **dict(zip(ENCODED, encoded)))


def sharded() -> dict:
    cache_dir = Path("sharded-cache")
    pipe = SRDDPipeline.from_pretrained("me/sharded", cache_dir=cache_dir)
    return {"images": draw(pipe), "files": sorted(path.name for path in cache_dir.rglob("*.safetensors"))}


def sharded_model() -> dict:
    return ScaleTransformer2DModel.from_pretrained("me/sharded", subfolder="transformer").state_dict()


def transformer() -> dict:
    return ScaleTransformer2DModel.from_pretrained("me/tiny", subfolder="transformer").state_dict()


def vqvae() -> dict:
    return MultiScaleVQModel.from_pretrained("me/tiny", subfolder="vqvae").state_dict()


def scheduler() -> dict:
    return dict(ScaleScheduler.from_pretrained("me/tiny", subfolder="scheduler").config)


def scheduler_repository() -> dict:
    return dict(ScaleScheduler.from_pretrained("me/scheduler").config)


def preset() -> dict:
    pipe = SRDDPipeline.from_pretrained("me/tiny")
    pipe.scheduler = ScaleScheduler.from_pretrained("me/presets", subfolder="distilled-2")
    return {"images": draw(pipe), "num_tokens": pipe.scheduler.num_tokens}


def generic() -> dict:
    return {"class": type(DiffusionPipeline.from_pretrained("me/tiny")).__name__}


def generic_with_remote_code() -> dict:
    pipe = DiffusionPipeline.from_pretrained("me/tiny", custom_pipeline="me/tiny", trust_remote_code=True)
    return {"is_ours": type(pipe) is SRDDPipeline, "images": draw(pipe)}


LOADS: list[Callable[[], dict]] = [
    pipeline,
    pipeline_from_cache,
    fp16_variant,
    texts,
    embeddings,
    sharded,
    sharded_model,
    transformer,
    vqvae,
    scheduler,
    scheduler_repository,
    preset,
    generic,
    generic_with_remote_code,
]


def main(results_path: str) -> None:
    results: dict[str, dict | str] = {}
    for load in LOADS:
        try:
            results[load.__name__] = load()
        except Exception as error:
            results[load.__name__] = f"{type(error).__name__}: {error}"
    torch.save(results, results_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
