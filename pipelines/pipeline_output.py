from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class SRDDPipelineOutput(BaseOutput):
    """
    Output of the SRDD pipelines.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            For `output_type` "pil" a list of pictures; for "np" an array of shape `(batch, height, width, 3)` in
            [0, 1]; for "pt" a tensor of shape `(batch, 3, height, width)` in [0, 1]; for "latent" the latent state of
            shape `(batch, latent_channels, latent_height, latent_width)`.
        token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`):
            The packed token pyramid over the scheduler's scales.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    token_ids: torch.LongTensor
