"""All that a tiny model can draw: its pyramids, the latent states that they pass through, and their probabilities."""

from copy import deepcopy
from dataclasses import dataclass

import torch

from srdd.models import MultiScaleVQModel, ScaleTransformer2DModel
from srdd.scales import num_tokens_per_scale, scale_slices
from srdd.schedulers import ScaleScheduler


MAX_PYRAMIDS = 4096
STATES = ("latents", "tokens")


@dataclass
class PyramidSpace:
    """
    All pyramids of a tokenizer and the states that they pass through.

    Args:
        scale_sizes (`list[list[int]]`): `[height, width]` of the K scales.
        token_ids (`torch.LongTensor` of shape `(num_pyramids, num_tokens)`): The packed pyramids.
        inputs (`torch.Tensor` of shape `(num_pyramids, num_tokens, latent_channels)`): What the transformer is fed,
            float32.
        state_ids (`torch.LongTensor` of shape `(num_pyramids, num_scales + 1)`): The state after 0 ... K scales,
            numbered from 0 in every column. Column `K - t` is `x_t`.
    """

    scale_sizes: list[list[int]]
    token_ids: torch.LongTensor
    inputs: torch.Tensor
    state_ids: torch.LongTensor

    @property
    def num_states(self) -> list[int]:
        """How many states there are after 0 ... K scales."""
        return (self.state_ids.amax(dim=0) + 1).tolist()

    @property
    def path_ids(self) -> torch.LongTensor:
        """The path of states that each pyramid takes, `(num_pyramids,)`; assumption A says that no two share one."""
        return self.state_ids.unique(dim=0, return_inverse=True)[1]


@torch.no_grad()
def enumerate_pyramids(vqvae: MultiScaleVQModel, states: str = "latents") -> PyramidSpace:
    """
    List all pyramids of a tokenizer.

    Args:
        vqvae ([`MultiScaleVQModel`]): The tokenizer; only its quantizer is used.
        states (`str`, defaults to `"latents"`): What a state is. `"latents"`: the latent state, where different
            histories may meet. `"tokens"`: the pyramid with its finer scales forgotten, as
            [`ScaleScheduler.add_noise`] leaves it.

    Returns:
        [`PyramidSpace`]: Pyramids in lexicographic order.

    Raises:
        ValueError: If `states` is unknown or there are too many pyramids to list.
    """
    if states not in STATES:
        raise ValueError(f"`states` must be one of {STATES}, got {states!r}.")
    scale_sizes, codebook_size = vqvae.config.scale_sizes, vqvae.config.codebook_size
    num_pyramids = codebook_size**vqvae.num_tokens
    if num_pyramids > MAX_PYRAMIDS:
        raise ValueError(
            f"`vqvae` must have at most {MAX_PYRAMIDS} pyramids, got {codebook_size}**{vqvae.num_tokens} of them."
        )
    codes = torch.arange(codebook_size)
    token_ids = torch.cartesian_prod(*[codes] * vqvae.num_tokens).view(num_pyramids, -1)
    # In float64 a history's state, which the quantizer rounds to float32, does not depend on its place in the batch.
    vqvae = deepcopy(vqvae).cpu().double()
    if states == "latents":
        latents = vqvae.latent_states(token_ids)
        chain = [torch.zeros_like(latents[0]), *latents]
    else:
        scheduler = ScaleScheduler(scale_sizes=scale_sizes)
        chain = [
            *(scheduler.add_noise(token_ids, timesteps=t) for t in [scale.timestep for scale in scheduler.visits]),
            token_ids,
        ]
    state_ids = [part.flatten(1).unique(dim=0, return_inverse=True)[1] for part in chain]
    inputs = vqvae.teacher_forcing_inputs(token_ids)
    return PyramidSpace(scale_sizes, token_ids, inputs, torch.stack(state_ids, dim=1))


@torch.no_grad()
def log_conditionals(
    transformer: ScaleTransformer2DModel, space: PyramidSpace, from_state: bool = False
) -> torch.Tensor:
    """
    The autoregressive factors `log p(z_k | z_1 ... z_{k-1})` of every pyramid (paper, Equation 1), without a class.

    Args:
        transformer ([`ScaleTransformer2DModel`]): The model, over the scales of `space`.
        space ([`PyramidSpace`]): All pyramids.
        from_state (`bool`, defaults to `False`): Feed the network one scale at a time, `x_k` and nothing of the
            history: the kernel `p(x_{t-1} | x_t)` as the network alone can compute it.

    Returns:
        `torch.Tensor` of shape `(num_pyramids, num_scales)` in the transformer's dtype, nats.
    """
    inputs, slices = space.inputs.to(transformer.dtype), scale_slices(space.scale_sizes)
    if from_state:
        timesteps = range(len(slices) - 1, -1, -1)
        logits = torch.cat([transformer(inputs[:, tokens], t).sample for tokens, t in zip(slices, timesteps)], dim=1)
    else:
        logits = transformer(inputs).sample  # (num_pyramids, N, V)
    chosen = logits.log_softmax(dim=-1).gather(-1, space.token_ids.unsqueeze(-1)).squeeze(-1)
    return torch.stack([scale.sum(dim=1) for scale in chosen.split(num_tokens_per_scale(space.scale_sizes), 1)], dim=1)


@torch.no_grad()
def draw_weights(model: torch.nn.Module, generator: torch.Generator | None = None) -> None:
    """Replace all weights by normal ones: freshly initialised models say next to nothing about their input."""
    for parameter in model.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def example_models(
    attention_pattern: str = "markov", histories_meet: bool = True, generator: torch.Generator | None = None
) -> tuple[MultiScaleVQModel, ScaleTransformer2DModel]:
    """
    A tokenizer with 2 random codes and the scales 1x1, 1x2, 2x2 (128 pyramids), and a transformer for it.

    Args:
        attention_pattern (`str`, defaults to `"markov"`): The transformer's.
        histories_meet (`bool`, defaults to `True`): One `phi` serves all scales, so that "code v, then w everywhere"
            meets "code w, then v everywhere" in one latent state, whatever the codes are. VAR's two coarsest scales
            share a `phi` likewise. Otherwise every scale has its own, and no two histories meet.
        generator (`torch.Generator`, *optional*): Draws the codes and `phi`.

    Returns:
        `tuple[MultiScaleVQModel, ScaleTransformer2DModel]`
    """
    sizes = {"codebook_size": 2, "latent_channels": 2, "scale_sizes": [[1, 1], [1, 2], [2, 2]]}
    vqvae = MultiScaleVQModel(
        **sizes,
        down_block_types=["DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
        block_out_channels=[8],
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=2,
        num_residual_convs=1 if histories_meet else 3,
    )
    draw_weights(vqvae.quantize, generator)
    transformer = ScaleTransformer2DModel(
        **sizes,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_classes=0,
        attention_pattern=attention_pattern,
    )
    return vqvae.eval(), transformer.eval()
