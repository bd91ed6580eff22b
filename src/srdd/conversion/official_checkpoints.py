import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.utils import logging

from srdd.checks import check_choice, check_dtype, shown
from srdd.conversion.checkpoint_files import StateDict, dtype_of, read_checkpoint, shapes_of
from srdd.conversion.families import FAMILIES, MODEL_NAMES, recognise
from srdd.conversion.family import Family, PublishedSettings
from srdd.conversion.official_config import (
    OfficialTransformer,
    residual_conv_layout,
    tokenizer_config,
    transformer_scale_sizes,
)
from srdd.conversion.official_layout import TOKENIZER_BUFFERS, Origin, tokenizer_origins
from srdd.conversion.text_encoders import load_text_encoders
from srdd.models import ATTENTION_PATTERNS, MultiScaleVQModel
from srdd.models.neighbourhoods import check_windows
from srdd.models.saved_weights import tensor_fault
from srdd.pipelines import SRDDTextPipeline
from srdd.pipelines.scale_pipeline import ScalePipeline
from srdd.scales import normalize_scale_sizes
from srdd.schedulers import ScaleScheduler


logger = logging.get_logger(__name__)

# How many faults of checkpoints a message lists.
MAX_LINES = 50


@contextlib.contextmanager
def naming(
    argument: str, path: str | os.PathLike | None = None, rule: str = "an official checkpoint"
) -> Iterator[None]:
    """Errors about a checkpoint start with the argument that it was given as, and name the file."""
    try:
        yield
    except ValueError as error:
        subject = f"`{argument}`" if path is None else f"`{argument}` must be {rule}, got {path}."
        raise ValueError(f"{subject} {error}".removesuffix(".") + ".") from error


def imagenet_class_names() -> dict[int, str]:
    """Names of the 1000 classes of ImageNet (ILSVRC 2012) by id."""
    names = json.loads(Path(__file__).with_name("imagenet_class_names.json").read_text(encoding="utf-8"))
    return dict(enumerate(names))


@dataclass(frozen=True)
class Filling:
    """
    A model of ours without weights, and the official ones that it gets.

    Args:
        model (`ModelMixin`): The model.
        path (`str` or `os.PathLike`): Their file.
        state (`dict[str, torch.Tensor]`): Their state dict.
        origins (`Mapping[str, Origin]`): Where our tensors come from.
        left_out (`re.Pattern`): Keys that are not converted.
        dtype (`torch.dtype`): The dtype of our weights.
    """

    model: ModelMixin
    path: str | os.PathLike
    state: StateDict
    origins: Mapping[str, Origin]
    left_out: re.Pattern
    dtype: torch.dtype

    def faults(self) -> list[str]:
        """What the state dict lacks, has too much, or has otherwise than the model: a phrase for each tensor."""
        expected = {key: shape for origin in self.origins.values() for key, shape in origin.shapes.items()}
        missing = [f"{key} is missing" for key in expected if key not in self.state]
        unknown = [
            f"{key} is unknown" for key in self.state if key not in expected and not self.left_out.fullmatch(key)
        ]
        faults = {
            key: tensor_fault(self.state[key], shape, self.dtype)
            for key, shape in expected.items()
            if key in self.state
        }
        return [*missing, *unknown, *(f"{key} {fault}" for key, fault in faults.items() if fault)]

    def fill(self) -> None:
        """
        Give the model its weights. They are copied only where the dtype changes or ours are made of several; what the
        model keeps in float32 is so here, too.
        """
        kept, tensors = set(self.model._keep_in_fp32_modules or ()), {}
        for key, shape in shapes_of(self.model.state_dict()).items():
            dtype = torch.float32 if kept & set(key.split(".")) else self.dtype
            tensors[key] = self.origins[key].take(self.state, shape).to(dtype)
        self.model.load_state_dict(tensors, assign=True)
        self.model.eval()


@dataclass(frozen=True)
class Converted:
    """
    A converted pair of checkpoints.

    Args:
        pipeline ([`ScalePipeline`]): The pipeline, whose tensors stay mapped from the files.
        family ([`Family`]): What the transformer is of.
        files (`tuple[str, str]`): Names of the files, the tokenizer's first.
        settings ([`PublishedSettings`]): How the scheduler draws.
        attention_pattern (`str`): That of the authors' model.
    """

    pipeline: ScalePipeline
    family: Family
    files: tuple[str, str]
    settings: PublishedSettings
    attention_pattern: str


def asked_attention(
    family: Family, config: Mapping[str, Any], attention_pattern: str | None, attention_windows: Sequence[int] | None
) -> dict[str, Any]:
    """What else than a transformer's own configuration says of attention is asked for. Windows go with a pattern."""
    scale_sizes, own_pattern = config["scale_sizes"], config["attention_pattern"]
    asked: dict[str, Any] = {"attention_pattern": attention_pattern or own_pattern}
    if attention_windows is not None:
        if "attention_windows" not in family.transformer._get_init_keys(family.transformer):
            raise ValueError(
                f"`attention_windows` must be None with {family.title}, whose transformer has no windows, got"
                f" {shown(attention_windows)}."
            )
        sizes = normalize_scale_sizes(scale_sizes)
        asked["attention_windows"] = check_windows(attention_windows, sizes, asked["attention_pattern"])
    elif "attention_windows" in config and asked["attention_pattern"] != own_pattern:
        asked["attention_windows"] = None
    elif "attention_windows" in config and tuple(scale_sizes) not in family.published_scales:
        logger.warning(
            f"Windows leave no trace in the weights of {family.title}. For scales {scale_sizes}, which are those of"
            f" no published model, they are taken to be {config['attention_windows']}; `attention_windows` says"
            " otherwise."
        )
    return asked


def convert_checkpoints(
    vae_path: str | os.PathLike,
    transformer_path: str | os.PathLike,
    attention_pattern: str | None = None,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    attention_windows: Sequence[int] | None = None,
    text_encoders: str | os.PathLike | None = None,
) -> ScalePipeline:
    """
    Turn a pair of official checkpoints, VAR's or of a family that builds on it, into a pipeline.

    The architecture follows from the shapes in the files. The tokenizer takes the scales of the transformer, so that
    one official tokenizer serves the models of 256 and of 512 pixels; the scheduler draws with the guidance, top-k
    and top-p of the published numbers. Models of 1000 classes get ImageNet's names. Of Switti, `use_ar`, `rope_theta`
    and `rope_size` are read from `config.json` beside the transformer, if there is one, as no tensor tells.

    The tensors stay mapped from the files: keep these until the pipeline is saved.

    Args:
        vae_path (`str` or `os.PathLike`): The tokenizer, as `vae_ch160v4096z32.pth`.
        transformer_path (`str` or `os.PathLike`): The transformer, as `var_d16.pth` or `mvar-d16.pth`, a training
            checkpoint of the official trainer, `model.safetensors`, or the `model.safetensors.index.json` of weights
            in several files.
        attention_pattern (`str`, *optional*): That of the family by default, which is the checkpoint's model; the
            others take its weights as a start for fine-tuning.
        dtype (`torch.dtype`, *optional*): The weights' dtype; the checkpoint's by default.
        family (`str`, *optional*): One of `FAMILIES`; recognised by default. A state dict that stands alone can be
            VAR's or MVAR's, where nothing else tells.
        attention_windows (`Sequence[int]`, *optional*): As in [`ScaleTransformer2DModel`]; those of the family's
            published models by default.
        text_encoders (`str` or `os.PathLike`, *optional*): For a family that draws from texts, where its text encoders
            and their tokenizers are ([`~srdd.conversion.text_encoders.load_text_encoders`]). Without them the pipeline
            draws from embeddings of texts.

    Returns:
        [`SRDDPipeline`] or [`SRDDTextPipeline`]

    Raises:
        ValueError: If a file is no checkpoint or has not the official layout, its family is not to be recognised, or
            an argument is of another kind. The message names unknown and missing keys, and tensors that are misshapen,
            no floating-point numbers or not finite in `dtype`, of both files, up to 50 of them.
    """
    options = attention_pattern, dtype, family, attention_windows, text_encoders
    return convert(vae_path, transformer_path, *options).pipeline


def convert(
    vae_path: str | os.PathLike,
    transformer_path: str | os.PathLike,
    attention_pattern: str | None = None,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    attention_windows: Sequence[int] | None = None,
    text_encoders: str | os.PathLike | None = None,
) -> Converted:
    """
    [`convert_checkpoints`], with what else is known of the weights.

    Raises:
        ValueError: As [`convert_checkpoints`].
    """
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
        known = recognise(state, model_name, family)
        scale_sizes = transformer_scale_sizes(state, known.published_scales)
    with naming("vae_path", vae_path), init_empty_weights():
        vae_config = tokenizer_config(vae_shapes, scale_sizes)
        vqvae = MultiScaleVQModel(**vae_config)
    with naming("transformer_path", transformer_path):
        sizes = vae_config["codebook_size"], vae_config["latent_channels"]
        official = OfficialTransformer(Path(transformer_path), state, shapes, scale_sizes, *sizes)
        own_config = {"attention_pattern": known.attention_pattern, **known.config(official)}
    if text_encoders is not None and known.pipeline is not SRDDTextPipeline:
        raise ValueError(
            f"`text_encoders` must be None with {known.title}, which draws by class, got {shown(text_encoders)}."
        )
    config = {**own_config, **asked_attention(known, own_config, attention_pattern, attention_windows)}
    if config.get("num_classes") == 1000:
        config["id2label"] = imagenet_class_names()
    with naming("transformer_path", transformer_path), init_empty_weights():
        transformer = known.transformer(**config)

    settings = known.settings(config["num_layers"], scale_sizes, Path(transformer_path))
    scheduler = ScaleScheduler(scale_sizes=scale_sizes, **settings.scheduler_options(scale_sizes))
    texts = {} if text_encoders is None else load_text_encoders(text_encoders, dtype)
    pipeline = known.pipeline(vqvae=vqvae, transformer=transformer, scheduler=scheduler, **texts)
    if texts:
        with naming("text_encoders", text_encoders, "those that the transformer knows"):
            pipeline.check_text_components()

    conv_name, _ = residual_conv_layout(vae_shapes)
    vae_origins = tokenizer_origins(shapes_of(vqvae.state_dict()), conv_name)
    origins = known.origins(shapes_of(transformer.state_dict()), shapes)
    fillings = (
        Filling(vqvae, vae_path, vae_state, vae_origins, TOKENIZER_BUFFERS, dtype or dtype_of(vae_state)),
        Filling(transformer, transformer_path, state, origins, known.left_out, dtype or dtype_of(state)),
    )
    wrong = [f"  {filling.path}: {fault}" for filling in fillings for fault in filling.faults()]
    if wrong:
        more = [f"  … and {len(wrong) - MAX_LINES} more"] if len(wrong) > MAX_LINES else []
        rule = "`vae_path` and `transformer_path` must be checkpoints of the official layout, but"
        raise ValueError("\n".join([rule, *wrong[:MAX_LINES], *more]))

    for filling in fillings:
        filling.fill()
    files = Path(vae_path).name, Path(transformer_path).name
    return Converted(pipeline, known, files, settings, own_config["attention_pattern"])
