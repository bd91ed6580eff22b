import contextlib
import json
import os
import re
import statistics
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.utils import logging
from safetensors.torch import load_file

from srdd.checks import check_choice, check_dtype, shown
from srdd.conversion.families import FAMILIES, MODEL_NAMES, recognise
from srdd.conversion.family import Family, PublishedSettings
from srdd.conversion.official_config import (
    KNOWN_SCALES,
    Shapes,
    residual_conv_layout,
    tokenizer_config,
    transformer_scale_sizes,
)
from srdd.conversion.official_layout import TOKENIZER_BUFFERS, tokenizer_origins
from srdd.models import ATTENTION_PATTERNS, MultiScaleVQModel, ScaleTransformer2DModel
from srdd.models.neighbourhoods import check_windows
from srdd.models.saved_weights import tensor_fault
from srdd.pipelines import SRDDPipeline
from srdd.scales import normalize_scale_sizes
from srdd.schedulers import ScaleScheduler


logger = logging.get_logger(__name__)

ModelType = TypeVar("ModelType", bound=ModelMixin)
StateDict = dict[str, torch.Tensor]

# How many faults of checkpoints a message lists.
MAX_LINES = 50


@contextlib.contextmanager
def naming(argument: str, path: str | os.PathLike | None = None) -> Iterator[None]:
    """Errors about a checkpoint start with the argument that it was given as, and name the file."""
    try:
        yield
    except ValueError as error:
        subject = f"`{argument}`" if path is None else f"`{argument}` must be an official checkpoint, got {path}."
        raise ValueError(f"{subject} {error}".removesuffix(".") + ".") from error


def imagenet_class_names() -> dict[int, str]:
    """Names of the 1000 classes of ImageNet (ILSVRC 2012) by id."""
    names = json.loads(Path(__file__).with_name("imagenet_class_names.json").read_text(encoding="utf-8"))
    return dict(enumerate(names))


def _kind(path: Path) -> str:
    """What a file is that holds no checkpoint, as far as its first bytes tell."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, in place of which `git lfs pull` puts the file"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if start.isascii() and all(character.isprintable() or character.isspace() for character in start.decode("ascii")):
        return "a text"
    return "an archive of something else, or of code" if zipfile.is_zipfile(path) else "something else, or cut"


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    # Files of torch versions before 1.6 are no zip archives and cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _is_plain(tensor: Any) -> bool:
    """Whether a tensor holds as many numbers as it shows: not sparse, quantized, packed or repeated."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not (tensor.is_floating_point() and tensor.element_size() == 1)
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def read_checkpoint(path: str | os.PathLike, model_names: Sequence[str]) -> tuple[StateDict, str | None]:
    """
    Read the state dict of one model without copying it into memory and without running code from the file.

    Args:
        path (`str` or `os.PathLike`): A state dict (`.pth` or `.safetensors`), or a checkpoint that holds it under one
            of the names, as such or of an official trainer.
        model_names (`Sequence[str]`): What the model is called in checkpoints.

    Returns:
        `tuple[dict[str, torch.Tensor], str]`: Tensors that are mapped from the file, and the name that they have
        there, if any.

    Raises:
        ValueError: If there is no such file, or it holds anything but a state dict of plain tensors.
    """
    if not isinstance(path, (str, os.PathLike)) or not Path(path).is_file():
        raise ValueError(f"must be a file, got {shown(path)}")
    path = Path(path)
    places = " or ".join(f"trainer.{name}" for name in model_names)
    rule = f"{path} must hold a state dict, or a training checkpoint with {places}, but it"
    try:
        content = _load(path)
    except Exception as error:  # whatever a pickle, an archive or a header that is none leads torch to
        raise ValueError(f"{rule} is {_kind(path)}") from error
    model_name = None
    if isinstance(content, dict):
        holder = content["trainer"] if isinstance(content.get("trainer"), dict) else content
        model_name = next((name for name in model_names if isinstance(holder.get(name), dict)), None)
        content = holder if model_name is None else holder[model_name]
    if not isinstance(content, dict) or not content or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{rule} holds something else")
    if not all(isinstance(key, str) for key in content):
        raise ValueError(f"{rule} holds tensors without names")
    strange = [key for key, tensor in content.items() if not _is_plain(tensor)]
    if strange:
        raise ValueError(
            f"{path} must hold plain tensors, but these are quantized, sparse or repeated: {shown(strange)}"
        )
    return dict(content), model_name


def shapes_of(state: Mapping[str, torch.Tensor]) -> Shapes:
    """The shapes in a state dict."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def discrepancies(
    state: StateDict, origins: Mapping[str, Any], buffers: re.Pattern, dtype: torch.dtype | None
) -> list[str]:
    """
    What a checkpoint lacks, has too much, or has otherwise than the model that it seems to be.

    Args:
        state (`dict[str, torch.Tensor]`): The checkpoint.
        origins (`Mapping`): Where our tensors come from: each has the `shapes` of official ones.
        buffers (`re.Pattern`): Further keys that are no fault.
        dtype (`torch.dtype`, *optional*): In which the numbers must be finite.

    Returns:
        `list[str]`: A phrase for each tensor.
    """
    expected = {key: shape for origin in origins.values() for key, shape in origin.shapes.items()}
    missing = [f"{key} is missing" for key in expected if key not in state]
    unknown = [f"{key} is unknown" for key in state if key not in expected and not buffers.fullmatch(key)]
    faults = {key: tensor_fault(state[key], shape, dtype) for key, shape in expected.items() if key in state}
    return [*missing, *unknown, *(f"{key} {fault}" for key, fault in faults.items() if fault)]


def dtype_of(state: StateDict) -> torch.dtype:
    """The dtype that most floating-point tensors have."""
    dtypes = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    return statistics.mode(dtypes) if dtypes else torch.float32


def filled(model: ModelType, state: StateDict, origins: Mapping[str, Any], dtype: torch.dtype) -> ModelType:
    """
    A model without weights, with the official tensors, each taken from its origin. They are copied only where the
    dtype changes; what the model keeps in float32 is so here, too.
    """
    kept = set(model._keep_in_fp32_modules or ())
    tensors = {
        key: origins[key].take(state, shape).to(torch.float32 if kept & set(key.split(".")) else dtype)
        for key, shape in shapes_of(model.state_dict()).items()
    }
    model.load_state_dict(tensors, assign=True)
    return model.eval()


@dataclass(frozen=True)
class Converted:
    """
    A converted pair of checkpoints.

    Args:
        pipeline ([`SRDDPipeline`]): The pipeline, whose tensors stay mapped from the files.
        family ([`Family`]): What the transformer is of.
        files (`tuple[str, str]`): Names of the files, the tokenizer's first.
        settings ([`PublishedSettings`]): How the scheduler draws.
    """

    pipeline: SRDDPipeline
    family: Family
    files: tuple[str, str]
    settings: PublishedSettings


def convert_checkpoints(
    vae_path: str | os.PathLike,
    transformer_path: str | os.PathLike,
    attention_pattern: str | None = None,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    attention_windows: Sequence[int] | None = None,
) -> SRDDPipeline:
    """
    Turn a pair of official checkpoints, VAR's or of a family that builds on it, into a pipeline.

    The architecture follows from the shapes in the files. The tokenizer takes the scales of the transformer, so that
    one official tokenizer serves the models of 256 and of 512 pixels; the scheduler draws with the guidance, top-k
    and top-p of the published numbers. Models of 1000 classes get ImageNet's names.

    The tensors stay mapped from the files: keep these until the pipeline is saved.

    Args:
        vae_path (`str` or `os.PathLike`): The tokenizer, `vae_ch160v4096z32.pth`.
        transformer_path (`str` or `os.PathLike`): The transformer, as `var_d16.pth` or `mvar-d16.pth`, or a training
            checkpoint of the official trainer.
        attention_pattern (`str`, *optional*): That of the family by default, which is the checkpoint's model; the
            others take its weights as a start for fine-tuning.
        dtype (`torch.dtype`, *optional*): The weights' dtype; the checkpoint's by default.
        family (`str`, *optional*): One of `FAMILIES`; recognised by default. A state dict that stands alone can be
            VAR's or MVAR's, where nothing else tells.
        attention_windows (`Sequence[int]`, *optional*): As in [`ScaleTransformer2DModel`]; those of the family's
            published models by default.

    Returns:
        [`SRDDPipeline`]

    Raises:
        ValueError: If a file is no checkpoint or has not the official layout, its family is not to be recognised, or
            an argument is of another kind. The message names unknown and missing keys, and tensors that are misshapen,
            no floating-point numbers or not finite in `dtype`, of both files, up to 50 of them.
    """
    return convert(vae_path, transformer_path, attention_pattern, dtype, family, attention_windows).pipeline


def convert(
    vae_path: str | os.PathLike,
    transformer_path: str | os.PathLike,
    attention_pattern: str | None = None,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    attention_windows: Sequence[int] | None = None,
) -> Converted:
    """[`convert_checkpoints`], with what else is known of the weights."""
    if attention_pattern is not None:
        check_choice("attention_pattern", attention_pattern, ATTENTION_PATTERNS)
    if family is not None:
        check_choice("family", family, FAMILIES)
    if dtype is not None:
        check_dtype("dtype", dtype)
    with naming("vae_path"):
        vae_state, _ = read_checkpoint(vae_path, ["vae_local"])
    with naming("transformer_path"):
        state, model_name = read_checkpoint(transformer_path, MODEL_NAMES)
    vae_shapes, shapes = shapes_of(vae_state), shapes_of(state)

    with naming("transformer_path", transformer_path):
        known = recognise(state, model_name) if family is None else FAMILIES[family]
        scale_sizes = transformer_scale_sizes(state)
    with naming("vae_path", vae_path), init_empty_weights():
        vae_config = tokenizer_config(vae_shapes, scale_sizes)
        vqvae = MultiScaleVQModel(**vae_config)
    with naming("transformer_path", transformer_path):
        config = known.config(shapes, scale_sizes, vae_config["codebook_size"], vae_config["latent_channels"])
    config["attention_pattern"] = attention_pattern or known.attention_pattern
    windows = config.get("attention_windows") if config["attention_pattern"] == known.attention_pattern else None
    if attention_windows is not None:
        windows = check_windows(attention_windows, normalize_scale_sizes(scale_sizes), config["attention_pattern"])
    elif windows is not None and scale_sizes != KNOWN_SCALES[256]:
        logger.warning(
            f"Windows leave no trace in the weights of {known.title}. For scales {scale_sizes}, which are those of no"
            f" published model, they are taken to be {windows}; `attention_windows` says otherwise."
        )
    config["attention_windows"] = windows
    with naming("transformer_path", transformer_path), init_empty_weights():
        id2label = imagenet_class_names() if config["num_classes"] == 1000 else None
        transformer = ScaleTransformer2DModel(**config, id2label=id2label)

    conv_name, _ = residual_conv_layout(vae_shapes)
    vae_origins = tokenizer_origins(shapes_of(vqvae.state_dict()), conv_name)
    origins = known.origins(shapes_of(transformer.state_dict()), shapes)
    vae_dtype, transformer_dtype = dtype or dtype_of(vae_state), dtype or dtype_of(state)
    vae_wrong = discrepancies(vae_state, vae_origins, TOKENIZER_BUFFERS, vae_dtype)
    wrong = [f"  {vae_path}: {line}" for line in vae_wrong]
    wrong += [
        f"  {transformer_path}: {line}" for line in discrepancies(state, origins, known.left_out, transformer_dtype)
    ]
    if wrong:
        more = [f"  … and {len(wrong) - MAX_LINES} more"] if len(wrong) > MAX_LINES else []
        rule = "`vae_path` and `transformer_path` must be checkpoints of the official layout, but"
        raise ValueError("\n".join([rule, *wrong[:MAX_LINES], *more]))

    settings = known.settings(config["num_layers"], Path(transformer_path))
    pipeline = SRDDPipeline(
        vqvae=filled(vqvae, vae_state, vae_origins, vae_dtype),
        transformer=filled(transformer, state, origins, transformer_dtype),
        scheduler=ScaleScheduler(
            scale_sizes=scale_sizes,
            top_k=settings.top_k,
            top_p=settings.top_p,
            guidance_scale=settings.guidance_scale,
        ),
    )
    return Converted(pipeline, known, (Path(vae_path).name, Path(transformer_path).name), settings)
