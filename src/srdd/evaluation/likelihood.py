"""How probable token pyramids are under a pipeline's model: to compare models, and to find images that do not fit."""

import math
from dataclasses import dataclass

import torch

from srdd.models.guidance import guide
from srdd.pictures import Pictures, read_pictures
from srdd.pipelines import SRDDPipeline
from srdd.pipelines.scale_pipeline import check_components
from srdd.scales import num_tokens_per_scale


@dataclass
class TokenLikelihood:
    """
    Log-likelihoods of token pyramids, float32.

    They belong to tokens, not to pixels: compare models over the same tokenizer and scales only.

    Args:
        token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`): The pyramids.
        token_log_likelihoods (`torch.Tensor` of shape `(batch, num_tokens)`): Log-probability of every token given the
            scales before its own, in nats, at most 0. Low ones say where an image is unusual.
        scale_sizes (`list[list[int]]`): `[height, width]` of the scales.
    """

    token_ids: torch.LongTensor
    token_log_likelihoods: torch.Tensor
    scale_sizes: list[list[int]]

    @property
    def per_scale(self) -> torch.Tensor:
        """Log-likelihood of every scale given those before it, in nats, of shape `(batch, num_scales)`."""
        by_scale = self.token_log_likelihoods.split(num_tokens_per_scale(self.scale_sizes), dim=1)
        return torch.stack([scale.sum(dim=1) for scale in by_scale], dim=1)

    @property
    def nats(self) -> torch.Tensor:
        """Log-likelihood of every pyramid, in nats, of shape `(batch,)`."""
        return self.token_log_likelihoods.sum(dim=1)

    @property
    def bits_per_token(self) -> torch.Tensor:
        """
        Code length of a pyramid over its number of tokens, in bits, of shape `(batch,)`: at least 0, and
        `log2(codebook_size)` for a model that knows nothing.
        """
        return -self.token_log_likelihoods.mean(dim=1) / math.log(2)


@torch.no_grad()
def log_likelihood(
    pipe: SRDDPipeline,
    images: Pictures | None = None,
    token_ids: torch.LongTensor | None = None,
    class_labels: int | str | list[int | str] | torch.LongTensor | None = None,
    guidance_scale: float = 1.0,
) -> TokenLikelihood:
    """
    Exact log-likelihood of token pyramids, `sum_k log p(z_k | z_1 ... z_{k-1}, y)` (paper, Equations 1 and 7).

    All scales are computed in one forward pass, two with guidance. The distribution is the model's own, normalised
    after guidance (Section 3.3 a): the scheduler's scales and guidance ramp count, its temperature, top-k, top-p and
    resampling do not.

    Args:
        pipe ([`SRDDPipeline`]): The model, or another pipeline with its components.
        images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list, *optional*): Images of the model's size;
            they are tokenised over the scheduler's scales. [`~srdd.pictures.read_pictures`] reads them.
        token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`, *optional*): Pyramids over the scheduler's
            scales, in place of `images`.
        class_labels (`int`, `str`, a list of both, or `torch.LongTensor`, *optional*): One class for all pyramids or
            one for each; many with a single pyramid give its likelihood under each. `None` is the model without a
            class.
        guidance_scale (`float`, defaults to 1.0): diffusers' `g`; 1 and below is off, as it is without a class.

    Returns:
        [`TokenLikelihood`]

    Raises:
        ValueError: If not just one of `images` and `token_ids` is given, or images, tokens, labels or the schedule do
            not fit the model.
    """
    check_components(pipe.vqvae, pipe.transformer, pipe.scheduler)
    scheduler, scale_sizes = pipe.scheduler, pipe.scheduler.scales
    timesteps = [scale.timestep for scale in scheduler.visits]
    if (images is None) == (token_ids is None):
        given = "neither" if images is None else "both"
        raise ValueError(f"`log_likelihood` takes one of `images` and `token_ids`, got {given}.")
    if token_ids is None:
        token_ids = _tokenize(pipe, images)
    elif len(token_ids) == 0 or token_ids.shape[1:] != (scheduler.num_tokens,) or token_ids.is_floating_point():
        raise ValueError(
            f"`token_ids` must be integers of shape (batch, {scheduler.num_tokens}) with a batch of at least 1, got"
            f" {token_ids.dtype} of shape {tuple(token_ids.shape)}."
        )
    token_ids = token_ids.to(pipe._execution_device, torch.long)
    conditions, token_ids = pipe.prepare_batch(pipe.encode_class_labels(class_labels), 1, token_ids)
    inputs = pipe.vqvae.teacher_forcing_inputs(token_ids, scale_sizes).to(pipe.transformer.dtype)
    logits = pipe.transformer(inputs, timesteps, **conditions.conditional).sample.float()  # (B, N, V)
    if guidance_scale > 1 and conditions.unconditional is not None:
        unconditional = pipe.transformer(inputs, timesteps, **conditions.unconditional).sample.float()
        weights = scheduler.guidance_weights(guidance_scale).to(logits)
        logits = guide(logits, unconditional, weights[:, None])
    chosen = logits.log_softmax(dim=-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)  # (B, N)
    pipe.maybe_free_model_hooks()
    return TokenLikelihood(token_ids, chosen, scale_sizes)


def _tokenize(pipe: SRDDPipeline, images: Pictures) -> torch.LongTensor:
    pixels = read_pictures("images", images).to(pipe._execution_device, pipe.vqvae.dtype)
    size = tuple(pixels.shape[-2:])
    if size != pipe.sample_size:
        raise ValueError(f"`images` must have the model's height and width {pipe.sample_size}, got {size}.")
    return pipe.vqvae.tokenize(pixels * 2 - 1, pipe.scheduler.scales)
