import json
import os
import re
import statistics
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors.torch import load_file

from srdd.conversion.official_config import (
    Shapes,
    residual_conv_layout,
    tokenizer_config,
    transformer_config,
    transformer_scale_sizes,
)
from srdd.conversion.official_layout import (
    TOKENIZER_BUFFERS,
    TRANSFORMER_BUFFERS,
    Origin,
    tokenizer_origins,
    transformer_origins,
)
from srdd.models import MultiScaleVQModel, ScaleTransformer2DModel
from srdd.pipelines import SRDDPipeline
from srdd.schedulers import ScaleScheduler


ModelType = TypeVar("ModelType", bound=ModelMixin)
StateDict = dict[str, torch.Tensor]

# How the official code samples for its published numbers.
OFFICIAL_SAMPLING = {"top_k": 900, "top_p": 0.96}


def imagenet_class_names() -> dict[int, str]:
    """Names of the 1000 classes of ImageNet (ILSVRC 2012) by id."""
    names = json.loads(Path(__file__).with_name("imagenet_class_names.json").read_text(encoding="utf-8"))
    return dict(enumerate(names))


def read_checkpoint(path: str | os.PathLike, model_name: str) -> StateDict:
    """
    Read the state dict of one model without copying it into memory and without running code from the file.

    Args:
        path (`str` or `os.PathLike`): A state dict (`.pth` or `.safetensors`), or a training checkpoint of the
            official trainer.
        model_name (`str`): What the model is called in a training checkpoint: `"var_wo_ddp"` or `"vae_local"`.

    Returns:
        `dict[str, torch.Tensor]`: Tensors that are mapped from the file.

    Raises:
        ValueError: If the file holds no state dict.
        pickle.UnpicklingError: If the file holds anything but plain data.
    """
    if Path(path).suffix == ".safetensors":
        return load_file(path)
    # Files of torch versions before 1.6 are no zip archives and cannot be mapped.
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(content, dict) and isinstance(content.get("trainer"), dict):
        content = content["trainer"].get(model_name)
    if not isinstance(content, dict) or not content or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{path} must hold a state dict, or a training checkpoint with trainer.{model_name}.")
    return dict(content)


def _shapes(state: Mapping[str, torch.Tensor]) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _discrepancies(shapes: Shapes, origins: Mapping[str, Origin], buffers: re.Pattern) -> list[str]:
    """What a checkpoint lacks, has too much, or has in another shape than the model that it seems to be."""
    expected = {origin.key: origin.shape for origin in origins.values() if origin.key is not None}
    missing = [f"{key} is missing" for key in expected if key not in shapes]
    unknown = [f"{key} is unknown" for key in shapes if key not in expected and not buffers.fullmatch(key)]
    misshapen = [
        f"{key} must have shape {shape}, got {shapes[key]}"
        for key, shape in expected.items()
        if shapes.get(key, shape) != shape
    ]
    return [*missing, *unknown, *misshapen]


def _fill(model: ModelType, state: StateDict, origins: Mapping[str, Origin], dtype: torch.dtype | None) -> ModelType:
    """Put the official tensors into a model without weights; they are copied only where the dtype changes."""
    dtype = dtype or statistics.mode(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    shapes = _shapes(model.state_dict())
    model.load_state_dict(
        {key: origin.take(state, shapes[key]).to(dtype) for key, origin in origins.items()}, assign=True
    )
    return model.eval()


def convert_checkpoints(
    vae_path: str | os.PathLike,
    transformer_path: str | os.PathLike,
    attention_pattern: str = "causal",
    dtype: torch.dtype | None = None,
) -> SRDDPipeline:
    """
    Turn a pair of official VAR checkpoints into a pipeline.

    The architecture follows from the shapes in the files. The tokenizer takes the scales of the transformer, so that
    one official tokenizer serves the models of 256 and of 512 pixels; the scheduler draws as the official code does
    (top-k 900, top-p 0.96). Models of 1000 classes get ImageNet's names.

    The tensors stay mapped from the files: keep these until the pipeline is saved.

    Args:
        vae_path (`str` or `os.PathLike`): The tokenizer, `vae_ch160v4096z32.pth`.
        transformer_path (`str` or `os.PathLike`): The transformer, `var_d16.pth` … `var_d36.pth`, or a training
            checkpoint of the official trainer.
        attention_pattern (`str`, defaults to `"causal"`): `"causal"` is the checkpoint's model. `"markov"` and
            `"banded"` take its weights as a start for fine-tuning.
        dtype (`torch.dtype`, *optional*): The weights' dtype; the checkpoint's by default.

    Returns:
        [`SRDDPipeline`]

    Raises:
        ValueError: If a file has not the official layout. The message names every unknown, missing and misshapen key
            of both files.
    """
    vae_state = read_checkpoint(vae_path, "vae_local")
    transformer_state = read_checkpoint(transformer_path, "var_wo_ddp")
    vae_shapes, transformer_shapes = _shapes(vae_state), _shapes(transformer_state)

    scale_sizes = transformer_scale_sizes(transformer_state)
    vae_config = tokenizer_config(vae_shapes, scale_sizes)
    config = transformer_config(
        transformer_shapes, scale_sizes, vae_config["codebook_size"], vae_config["latent_channels"]
    )
    id2label = imagenet_class_names() if config["num_classes"] == 1000 else None
    with init_empty_weights():
        vqvae = MultiScaleVQModel(**vae_config)
        transformer = ScaleTransformer2DModel(**config, attention_pattern=attention_pattern, id2label=id2label)

    conv_name, _ = residual_conv_layout(vae_shapes)
    vae_origins = tokenizer_origins(_shapes(vqvae.state_dict()), conv_name)
    origins = transformer_origins(_shapes(transformer.state_dict()))
    vae_wrong = _discrepancies(vae_shapes, vae_origins, TOKENIZER_BUFFERS)
    transformer_wrong = _discrepancies(transformer_shapes, origins, TRANSFORMER_BUFFERS)
    wrong = [f"  {vae_path}: {line}" for line in vae_wrong]
    wrong += [f"  {transformer_path}: {line}" for line in transformer_wrong]
    if wrong:
        raise ValueError("\n".join(["Checkpoints must have the official layout, but", *wrong]))

    return SRDDPipeline(
        vqvae=_fill(vqvae, vae_state, vae_origins, dtype),
        transformer=_fill(transformer, transformer_state, origins, dtype),
        scheduler=ScaleScheduler(scale_sizes=scale_sizes, **OFFICIAL_SAMPLING),
    )
