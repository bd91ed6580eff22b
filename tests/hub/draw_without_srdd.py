"""
Draws with models that carry their code, where `srdd` cannot be imported, and saves the pictures. Run by
`test_carried_code.py` in a process of its own; the arguments are where the results go, and models by folder or name.
"""

import json
import sys
from pathlib import Path


sys.modules["srdd"] = None  # from here on `import srdd` fails

import torch  # noqa: E402
from diffusers import DiffusionPipeline, ModularPipeline  # noqa: E402
from hub.drawing_calls import TASKS, draw, draw_modular  # noqa: E402


def load(name: str, **arguments) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(name, trust_remote_code=True, **arguments)


def results_of(name: str, digest: str) -> dict:
    pipe, again = load(name), load(name)
    images, prefix = {"draw": draw(pipe, "draw")}, "text_" if "text_encoder" in pipe.components else ""
    for task in ("inpaint", "super_resolution"):
        images[task] = draw(load(name, custom_pipeline=f"{prefix}{task}_{digest}"), task)
    modular = ModularPipeline.from_pretrained(name, trust_remote_code=True)
    modular.load_components()
    saved = Path("saved", Path(name).name)
    pipe.save_pretrained(saved)
    return {
        "images": images,
        "modular": {task: draw_modular(modular, task) for task in TASKS},
        "again": draw(again, "draw"),
        "saved": draw(type(pipe).from_pretrained(saved), "draw"),
        "is_one_class": type(pipe) is type(again),
        "class": type(pipe).__name__,
        "packages": sorted({type(each).__module__.split(".")[0] for each in (pipe, pipe.vqvae, pipe.transformer)}),
        "default_guidance_scale": pipe.default_guidance_scale,
    }


def main(results_path: str, models: str) -> None:
    results = {name: results_of(name, digest) for name, digest in json.loads(models)}
    results["imported"] = sorted(name for name in sys.modules if name.split(".")[0] == "srdd")
    torch.save(results, results_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
