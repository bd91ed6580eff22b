"""Denoisers of latent diffusion to be trained: diffusers' own classes, a DiT with the first weights of its paper."""

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding, TimestepEmbedding
from torch import nn


# What the id that says nothing is in diffusers' `DiTPipeline`, whatever the number of classes.
DIT_NULL_CLASS = 1000


def new_dit(
    sample_size: int,
    num_channels: int,
    num_classes: int,
    num_layers: int,
    num_attention_heads: int,
    attention_head_dim: int,
    patch_size: int,
) -> DiTTransformer2DModel:
    """
    A DiT that diffusers' `DiTPipeline` draws with: it has 1000 classes, and the id 1000 says nothing.

    Args:
        sample_size (`int`): Side of the latents.
        num_channels (`int`): Channels of the latents.
        num_classes (`int`): Classes that will be trained; 0 trains without.
        num_layers (`int`): Blocks.
        num_attention_heads (`int`): Heads of each.
        attention_head_dim (`int`): Width of a head.
        patch_size (`int`): Side of the patches that are a token.

    Raises:
        ValueError: If patches do not fit the latents, or there are too many classes.
    """
    if sample_size % patch_size:
        raise ValueError(f"`patch_size` must divide the side of the latents, {sample_size}, got {patch_size}.")
    if num_classes > DIT_NULL_CLASS:
        raise ValueError(f"`label_column` must have at most {DIT_NULL_CLASS} classes for a DiT, got {num_classes}.")
    model = DiTTransformer2DModel(
        num_attention_heads=num_attention_heads,
        attention_head_dim=attention_head_dim,
        in_channels=num_channels,
        out_channels=num_channels,
        num_layers=num_layers,
        sample_size=sample_size,
        patch_size=patch_size,
        num_embeds_ada_norm=DIT_NULL_CLASS,
    )
    _initialize(model)
    return model


@torch.no_grad()
def _initialize(model: DiTTransformer2DModel) -> None:
    """The first weights of the paper (Section 3.2: every block is the identity), which diffusers leaves to chance."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    projection = model.pos_embed.proj
    nn.init.xavier_uniform_(projection.weight.flatten(1))
    nn.init.zeros_(projection.bias)
    for module in model.modules():
        if isinstance(module, TimestepEmbedding):
            nn.init.normal_(module.linear_1.weight, std=0.02)
            nn.init.normal_(module.linear_2.weight, std=0.02)
        elif isinstance(module, LabelEmbedding):
            nn.init.normal_(module.embedding_table.weight, std=0.02)
            module.dropout_prob = 0.0  # each block would drop other labels: whoever trains drops them
    for linear in (model.proj_out_1, model.proj_out_2, *(block.norm1.linear for block in model.transformer_blocks)):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def new_unet(
    sample_size: int,
    num_channels: int,
    num_classes: int,
    block_out_channels: list[int],
    layers_per_block: int,
    attention_head_dim: int,
) -> UNet2DModel:
    """
    A UNet that attends in all levels but the finest. The id after its classes says nothing.

    Args:
        sample_size (`int`): Side of the latents.
        num_channels (`int`): Channels of the latents.
        num_classes (`int`): Classes that will be trained; 0 makes a model that is told none.
        block_out_channels (`list[int]`): Channels of the levels, finest first.
        layers_per_block (`int`): Residual layers of a level.
        attention_head_dim (`int`): Width of a head.

    Raises:
        ValueError: If the latents cannot be halved so often, or heads do not fit the channels.
    """
    levels = len(block_out_channels)
    if sample_size % 2 ** (levels - 1):
        raise ValueError(
            f"`block_out_channels` must be so few that the side of the latents, {sample_size}, can be halved between"
            f" them, got {block_out_channels}."
        )
    if any(width % attention_head_dim for width in block_out_channels):
        raise ValueError(f"`attention_head_dim` must divide all of {block_out_channels}, got {attention_head_dim}.")
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=num_channels,
        out_channels=num_channels,
        down_block_types=["DownBlock2D"] + ["AttnDownBlock2D"] * (levels - 1),
        up_block_types=["AttnUpBlock2D"] * (levels - 1) + ["UpBlock2D"],
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        attention_head_dim=attention_head_dim,
        num_class_embeds=num_classes + 1 if num_classes else None,
    )


def describe_size(model: nn.Module, num_classes: int = 0) -> str:
    """
    The number of parameters, for people who match models by it.

    Args:
        model (`torch.nn.Module`): The model.
        num_classes (`int`, defaults to 0): Classes of the data; a DiT has embeddings of more.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    tables = [module.embedding_table.weight for module in model.modules() if isinstance(module, LabelEmbedding)]
    unused = sum((len(table) - 1 - num_classes) * table.shape[1] for table in tables)
    text = f"{type(model).__name__}: {count / 1e6:.2f} M parameters"
    return f"{text}, of which {unused / 1e6:.2f} M embed class ids that the data has not." if unused else f"{text}."
