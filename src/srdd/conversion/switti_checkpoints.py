import torch
from accelerate import init_empty_weights

from srdd.checks import check_choice, check_dtype
from srdd.conversion.official_checkpoints import MAX_LINES, StateDict, discrepancies, dtype_of, filled, shapes_of
from srdd.conversion.official_config import residual_conv_layout, tokenizer_config
from srdd.conversion.official_layout import TOKENIZER_BUFFERS, tokenizer_origins
from srdd.conversion.switti_layout import (
    SWITTI_BUFFERS,
    switti_config,
    switti_origins,
    switti_sampling,
    switti_scale_sizes,
)
from srdd.models import ATTENTION_PATTERNS, MultiScaleVQModel, ScaleTextTransformer2DModel
from srdd.pipelines import SRDDTextPipeline
from srdd.schedulers import ScaleScheduler


def refuse(model_name: str, wrong: list[str]) -> None:
    """Raise the error that names what is wrong with a state dict, if anything is."""
    if wrong:
        more = f"; … and {len(wrong) - MAX_LINES} more" if len(wrong) > MAX_LINES else ""
        raise ValueError(f"The {model_name} must be an official Switti, but {'; '.join(wrong[:MAX_LINES])}{more}.")


def convert_switti(
    vae_state: StateDict,
    state: StateDict,
    attention_pattern: str | None = None,
    dtype: torch.dtype | None = None,
) -> SRDDTextPipeline:
    """
    Turn the state dicts of an official Switti and its tokenizer into a pipeline, without text encoders: these and
    their tokenizers, of CLIP ViT-L/14 and OpenCLIP ViT-bigG/14, are as their authors publish them.

    The scheduler draws a published model's scales as the official pipeline does.

    Args:
        vae_state (`dict[str, torch.Tensor]`): The tokenizer's state dict, of VAR's layout.
        state (`dict[str, torch.Tensor]`): The transformer's.
        attention_pattern (`str`, *optional*): As in [`convert_switti_transformer`].
        dtype (`torch.dtype`, *optional*): As in [`convert_switti_transformer`].

    Returns:
        [`SRDDTextPipeline`]

    Raises:
        ValueError: As [`convert_switti_transformer`], or if the tokenizer is none or does not fit.
    """
    transformer, scale_sizes = convert_switti_transformer(state, attention_pattern, dtype), switti_scale_sizes(state)
    vae_shapes = shapes_of(vae_state)
    config = tokenizer_config(vae_shapes, scale_sizes)
    for name in ("codebook_size", "latent_channels"):
        if config[name] != transformer.config[name]:
            raise ValueError(f"The tokenizer must have `{name}` {transformer.config[name]}, got {config[name]}.")
    with init_empty_weights():
        vqvae = MultiScaleVQModel(**config)
    conv_name, _ = residual_conv_layout(vae_shapes)
    origins, dtype = tokenizer_origins(shapes_of(vqvae.state_dict()), conv_name), dtype or dtype_of(vae_state)
    refuse("tokenizer", discrepancies(vae_state, origins, TOKENIZER_BUFFERS, dtype))
    scheduler = ScaleScheduler(scale_sizes=scale_sizes, **switti_sampling(scale_sizes))
    return SRDDTextPipeline(filled(vqvae, vae_state, origins, dtype), transformer, scheduler)


def convert_switti_transformer(
    state: StateDict, attention_pattern: str | None = None, dtype: torch.dtype | None = None
) -> ScaleTextTransformer2DModel:
    """
    Turn the state dict of an official Switti into a model.

    The architecture follows from names and shapes. Most tensors stay views of those in `state`.

    Args:
        state (`dict[str, torch.Tensor]`): The state dict.
        attention_pattern (`str`, *optional*): By default that of the checkpoint, "markov" or "causal".
        dtype (`torch.dtype`, *optional*): The weights' dtype; the checkpoint's by default.

    Returns:
        [`ScaleTextTransformer2DModel`]

    Raises:
        ValueError: If this is no official Switti, or an argument is of another kind. The message names unknown and
            missing keys, and tensors that are misshapen, no floating-point numbers or not finite in `dtype`, up to 50.
    """
    if dtype is not None:
        check_dtype("dtype", dtype)
    config = switti_config(state)
    if attention_pattern is not None:
        config["attention_pattern"] = check_choice("attention_pattern", attention_pattern, ATTENTION_PATTERNS)
    with init_empty_weights():
        model = ScaleTextTransformer2DModel(**config)
    origins, dtype = switti_origins(shapes_of(model.state_dict())), dtype or dtype_of(state)
    refuse("transformer", discrepancies(state, origins, SWITTI_BUFFERS, dtype))
    return filled(model, state, origins, dtype)
