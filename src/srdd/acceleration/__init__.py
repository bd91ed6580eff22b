"""
Kernels and arithmetic for drawing that are faster than torch's and diffusers' defaults, behind one call.

A model calls [`accelerate`] when it is made, or when it learns whether it trains. Modules then have other classes,
with the same parameters under the same names; these run torch's and diffusers' code in training, under autocast, in
compiled code and wherever a gradient may be asked for. Nothing here knows our models.
"""

import torch.nn as nn
from diffusers.models.autoencoders.vae import Decoder

from srdd.acceleration.cuda_graphs import CudaGraphs
from srdd.acceleration.decoder import lighten, run_decoder
from srdd.acceleration.int8_decoder import dequantize_decoder, quantize_decoder
from srdd.acceleration.linear_layers import quicken, set_fast_linears


__all__ = ["CudaGraphs", "accelerate", "dequantize_decoder", "quantize_decoder", "run_decoder", "set_fast_linears"]


def accelerate(module: nn.Module) -> None:
    """
    Exchange the classes of a module's parts for those that draw faster. Parameters, their names and what was set stay
    as they are; a second call changes only what is new.

    Args:
        module (`nn.Module`): diffusers' `Decoder`, whose blocks then do what [`run_decoder`] decides, or any other
            module, whose linear layers then use what kernel suits CPU and weights.
    """
    if isinstance(module, Decoder):
        lighten(module)
    else:
        quicken(module)
