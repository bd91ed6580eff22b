"""`torch.export` of what a draw runs: one scale's transformer and the decoder, for any batch size."""

import pytest
import torch
from families import each_family
from tiny_models import tiny_pipeline


class OneScale(torch.nn.Module):
    def __init__(self, transformer, timestep):
        super().__init__()
        self.transformer, self.timestep = transformer, timestep

    def forward(self, hidden_states, conditions):
        return self.transformer(hidden_states, timestep=self.timestep, **conditions).sample


class Decoder(torch.nn.Module):
    def __init__(self, vqvae):
        super().__init__()
        self.vqvae = vqvae

    def forward(self, latents):
        return self.vqvae.decode(latents).sample


def exported(module, *arguments):
    """The graph of a module; the first dimension of all its arguments is the batch's."""
    batch = torch.export.Dim("batch")
    shapes = torch.utils._pytree.tree_map(lambda _: {0: batch}, arguments)
    return torch.export.export(module, arguments, dynamic_shapes=shapes).module()
