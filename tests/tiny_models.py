"""Real components, small enough for tests: scales 1-2-4, width 16, 2 layers, images of 8 x 8 pixels, 5 classes."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DModel

from srdd import (
    MultiScaleVQModel,
    ScaleHistoryTransformer2DModel,
    ScaleScheduler,
    ScaleTextTransformer2DModel,
    ScaleTransformer2DModel,
    SRDDPipeline,
)
from srdd.evaluation.latent_diffusion import LatentDiffusionPipeline


SCALE_SIZES = [1, 2, 4]
CODEBOOK_SIZE = 32
LATENT_CHANNELS = 8
SAMPLE_SIZE = 8
TEXT_DIM = 12
POOLED_DIM = 6
ID2LABEL = {0: "apple", 1: "banana", 2: "cherry", 3: "quince", 4: "tomato, love apple"}

# Constructor overrides for a decoder that is smaller than the encoder.
LIGHT_DECODER = {
    "decoder_block_out_channels": [4, 12],
    "decoder_layers_per_block": 0,
    "decoder_mid_block_add_attention": False,
    "decoder_norm_num_groups": 2,
}

Model = TypeVar("Model", bound=torch.nn.Module)


VQVAE_CONFIG = {
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": LATENT_CHANNELS,
    "codebook_size": CODEBOOK_SIZE,
    "scale_sizes": SCALE_SIZES,
    "sample_size": SAMPLE_SIZE,
    "patch_size": 1,
}


# What all kinds of transformers have.
TRANSFORMER_SIZES = {
    "codebook_size": CODEBOOK_SIZE,
    "latent_channels": LATENT_CHANNELS,
    "scale_sizes": SCALE_SIZES,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}


def redraw(model: Model, seed: int) -> Model:
    """Weights with standard deviation 0.2: freshly initialised ones say next to nothing about their input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Vectors are biases and the gains of norms: those move around the value that they start from. What is not
            # trained starts from chance.
            start = 0.0 if parameter.ndim > 1 or not parameter.requires_grad else parameter.mean().round()
            parameter.copy_(start + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_vqvae(seed: int = 0, **overrides: Any) -> MultiScaleVQModel:
    """A tokenizer with the latent grid 4 x 4; `overrides` are config values."""
    return redraw(MultiScaleVQModel(**{**VQVAE_CONFIG, **overrides}), seed)


def tiny_transformer(attention_pattern: str = "markov", seed: int = 1, **overrides: Any) -> ScaleTransformer2DModel:
    """A transformer for [`tiny_vqvae`]; `overrides` are config values."""
    config = {
        **TRANSFORMER_SIZES,
        "num_classes": len(ID2LABEL),
        "attention_pattern": attention_pattern,
        "id2label": ID2LABEL,
    }
    config.update(overrides)
    if config["num_classes"] != len(ID2LABEL) and "id2label" not in overrides:
        config["id2label"] = None
    return redraw(ScaleTransformer2DModel(**config), seed)


def tiny_history_transformer(
    attention_pattern: str = "markov", seed: int = 1, **overrides: Any
) -> ScaleHistoryTransformer2DModel:
    """A transformer with a history for [`tiny_vqvae`]; `overrides` are config values."""
    config = {
        **TRANSFORMER_SIZES,
        "num_classes": len(ID2LABEL),
        "attention_pattern": attention_pattern,
        "history_head_dim": 8,
        "id2label": ID2LABEL,
    }
    return redraw(ScaleHistoryTransformer2DModel(**{**config, **overrides}), seed)


def tiny_text_transformer(
    attention_pattern: str = "markov", seed: int = 1, **overrides: Any
) -> ScaleTextTransformer2DModel:
    """A transformer for [`tiny_vqvae`] that draws from [`random_texts`]; `overrides` are config values."""
    config = {
        **TRANSFORMER_SIZES,
        "cross_attention_dim": TEXT_DIM,
        "pooled_projection_dim": POOLED_DIM,
        "attention_pattern": attention_pattern,
    }
    return redraw(ScaleTextTransformer2DModel(**{**config, **overrides}), seed)


def random_texts(lengths: Sequence[int] = (3, 5), num_tokens: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Texts of so many tokens, padded, as [`tiny_text_transformer`] is told them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder_hidden_states": torch.randn(len(lengths), num_tokens, TEXT_DIM, generator=generator),
        "encoder_attention_mask": torch.arange(num_tokens) < torch.tensor(lengths).unsqueeze(1),
        "pooled_projections": torch.randn(len(lengths), POOLED_DIM, generator=generator),
    }


def tiny_scheduler(**overrides: Any) -> ScaleScheduler:
    """A schedule over the tiny models' scales; `overrides` are config values."""
    return ScaleScheduler(**{"scale_sizes": SCALE_SIZES, **overrides})


def tiny_pipeline(
    attention_pattern: str = "markov",
    vqvae: MultiScaleVQModel | None = None,
    transformer: ScaleTransformer2DModel | None = None,
    scheduler: ScaleScheduler | None = None,
) -> SRDDPipeline:
    """A pipeline of tiny components, without a progress bar."""
    pipe = SRDDPipeline(
        vqvae=vqvae or tiny_vqvae(),
        transformer=transformer or tiny_transformer(attention_pattern),
        scheduler=scheduler or tiny_scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_autoencoder(seed: int = 0, **overrides: Any) -> AutoencoderKL:
    """An autoencoder of diffusers' with the latent grid 4 x 4; `overrides` are config values."""
    config = {
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
        "block_out_channels": [16, 32],
        "norm_num_groups": 8,
        "latent_channels": LATENT_CHANNELS,
        "sample_size": SAMPLE_SIZE,
        "scaling_factor": 0.7,
    }
    return redraw(AutoencoderKL(**{**config, **overrides}), seed)


def tiny_latent_diffusion(kind: str = "unet", num_classes: int = 5, seed: int = 1) -> LatentDiffusionPipeline:
    """Latent diffusion with a `"transformer"` or a `"unet"`, of 4 steps, without a progress bar."""
    channels = {"sample_size": 4, "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS}
    if kind == "transformer":
        model = DiTTransformer2DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=8, patch_size=1, **channels
        )
    else:
        model = UNet2DModel(
            down_block_types=["DownBlock2D", "AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D", "UpBlock2D"],
            block_out_channels=[16, 32],
            layers_per_block=1,
            norm_num_groups=8,
            num_class_embeds=num_classes + 1 if num_classes else None,
            **channels,
        )
    pipe = LatentDiffusionPipeline(
        tiny_autoencoder(),
        DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
        id2label={str(index): name for index, name in ID2LABEL.items() if index < num_classes},
        num_inference_steps=4,
        **{kind: redraw(model, seed)},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
