from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput


@dataclass
class TokenCriticOutput(BaseOutput):
    """
    Output of [`TokenCritic.forward`].

    Args:
        logits (`torch.Tensor` of shape `(batch, num_tokens)`): Logits that the tokens are right.
    """

    logits: torch.Tensor


class TokenCritic(ModelMixin, ConfigMixin):
    r"""
    Tells right tokens from wrong ones (as in "Improved Masked Image Generation with Token-Critic", Lezama et al. 2022,
    but as a small head on the generator itself; not part of the SRDD paper).

    The tokens drawn at a scale are fed back to the scale transformer. The head reads its last hidden states, which the
    forward that gives the next logits has computed anyway, and the tokens themselves. The coarsest scale cannot be
    judged, as the transformer does not read its input.

    Parameters:
        codebook_size (`int`, defaults to 4096): Number of codes V of the tokenizer.
        dim (`int`, defaults to 1024): Width of the transformer.
        hidden_dim (`int`, defaults to 256): Width of the head.
    """

    @register_to_config
    def __init__(self, codebook_size: int = 4096, dim: int = 1024, hidden_dim: int = 256):
        super().__init__()
        self.proj_in = nn.Linear(dim, hidden_dim)
        self.token_embed = nn.Embedding(codebook_size, hidden_dim)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        self.proj_out = nn.Linear(hidden_dim, 1)

    def forward(
        self, hidden_states: torch.Tensor, token_ids: torch.LongTensor, return_dict: bool = True
    ) -> TokenCriticOutput | tuple:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, num_tokens, dim)`): Last hidden states of a
                [`ScaleTransformer2DModel`] whose input holds the tokens to judge.
            token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`): The tokens to judge.
            return_dict (`bool`, defaults to `True`): Whether to return a [`TokenCriticOutput`].

        Returns:
            [`TokenCriticOutput`] or `(logits,)`: Logits of shape `(batch, num_tokens)` that the token fed back at each
            place is right.

        Raises:
            ValueError: If `hidden_states` or `token_ids` has another shape.
        """
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.config.dim:
            raise ValueError(
                f"`hidden_states` must have shape (batch, num_tokens, {self.config.dim}), got"
                f" {tuple(hidden_states.shape)}."
            )
        if token_ids.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"`token_ids` must have shape {tuple(hidden_states.shape[:2])}, got {tuple(token_ids.shape)}."
            )
        hidden_states = self.proj_in(hidden_states) + self.token_embed(token_ids)
        logits = self.proj_out(F.gelu(hidden_states)).squeeze(-1)  # (B, N)
        return TokenCriticOutput(logits) if return_dict else (logits,)
