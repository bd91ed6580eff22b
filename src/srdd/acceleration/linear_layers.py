"""
Linear layers without gradients on CPUs: the same layers in less time, by kernels of oneDNN, which torch brings along.

[`quicken`] puts the classes below into a model in the place of torch's and diffusers'. They hold the same parameters
under the same names and nothing else, and run torch's code wherever [`linear_kernel`], the one place that decides,
says so: on accelerators, where a gradient may be asked for, under autocast and in compiled code.

- "float32": torch has MKL multiply float32 matrices, which leaves AVX-512 to Intel's CPUs. oneDNN, to which torch
  gives convolutions, uses it on AMD's, too: twice the speed from Zen 5 on. Elsewhere it is not the default.
- "int8": weights that torchao made int8, multiplied with activations that are quantized row by row on the way. Without
  a compiler, torchao's own code for that takes longer than float32.

Numbers: `benchmarks/SPEED.md`.
"""

import functools
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch.utils.weak import WeakTensorKeyDictionary

from srdd.acceleration.decoder import recast


# What oneDNN makes of torchao's integers, and the versions that it was made of. An entry lives as long as the integers
# do; copies, saved files and models on other devices know nothing of it.
_packed_weights = WeakTensorKeyDictionary()


@functools.cache
def cpu_capabilities() -> dict[str, Any]:
    """What torch knows about the CPU; nothing in versions that cannot tell."""
    return getattr(torch.cpu, "get_capabilities", dict)() if torch.backends.mkldnn.is_available() else {}


def mkl_is_slow() -> bool:
    """Whether float32 matrix products come from MKL, and the CPU is one of AMD's with AVX-512 in full width."""
    known = cpu_capabilities()
    # Zen 4, which has AVX-512 in half width, lacks AVX-VNNI.
    wide = known.get("avx512_f", False) and known.get("avx_vnni", False)
    return torch.backends.mkl.is_available() and wide and "AMD" in known.get("cpu_name", "")


def multiplies_int8() -> bool:
    """Whether the CPU multiplies int8 without the overflows of older ones."""
    return any(cpu_capabilities().get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def is_dynamic_int8(weight: torch.Tensor) -> bool:
    """Whether a weight is torchao's `Int8Tensor`, symmetric by row, for activations quantized alike when they come."""
    if type(weight).__name__ != "Int8Tensor" or list(weight.block_size) != [1, weight.shape[-1]]:
        return False
    activations = getattr(weight, "act_quant_kwargs", None)
    return (
        type(getattr(activations, "granularity", None)).__name__ == "PerRow"
        and activations.mapping_type.name == "SYMMETRIC"
        and not getattr(activations, "reduce_range", False)
        and all(getattr(weight, name, None) is None for name in ("act_quant_scale", "act_pre_scale"))
    )


def linear_kernel(hidden_states: torch.Tensor, weight: torch.Tensor, fast: bool | None = None) -> str | None:
    """
    The kernel of oneDNN for a linear layer.

    Args:
        hidden_states (`torch.Tensor`): The input.
        weight (`torch.Tensor`): The weight, torchao's tensors among them.
        fast (`bool`, *optional*): Whether these kernels are welcome. By default "float32" is on CPUs on which it was
            measured to be the faster one, and "int8" always.

    Returns:
        `str`, *optional*: "float32", "int8", or `None` for torch's own code.
    """
    if (
        fast is False
        or type(hidden_states) is not torch.Tensor
        or hidden_states.device.type != "cpu"
        or weight.device.type != "cpu"
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return None
    if type(weight) in (nn.Parameter, torch.Tensor):
        float32 = hidden_states.dtype == weight.dtype == torch.float32
        return "float32" if float32 and (mkl_is_slow() if fast is None else fast) else None
    return "int8" if multiplies_int8() and is_dynamic_int8(weight) else None


def int8_linear(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """
    What torchao computes for a weight that [`is_dynamic_int8`].

    Every row of the input has a scale of its own, so that no image depends on the others in its batch.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., in_features)`): The input.
        weight (`torch.Tensor` of shape `(out_features, in_features)`): torchao's weight.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*): The bias.

    Returns:
        `torch.Tensor` of shape `(..., out_features)`, with the dtype of the input.
    """
    rows = hidden_states.float()
    scales = rows.abs().amax(dim=-1, keepdim=True).div_(127.5).clamp_(min=torch.finfo(torch.float32).eps)
    integers = (rows * scales.reciprocal()).round_().clamp_(-128, 127).to(torch.int8)
    products = torch.ops.onednn.qlinear_pointwise(
        integers.view(torch.uint8).bitwise_xor_(128),  # CPUs multiply unsigned by signed: 128 more, and so is zero
        1.0,
        128,
        packed_weight(weight),
        weight.scale.flatten().float(),
        None,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    output = products.mul_(scales) if bias is None else torch.addcmul(bias.float(), products, scales, out=products)
    return output.to(hidden_states.dtype)


def packed_weight(weight: torch.Tensor) -> torch.Tensor:
    """torchao's integers as oneDNN reads them, made once."""
    integers = weight.qdata
    # Loading into torchao's weight counts as a change of the weight, though it is one of the integers.
    versions = [None if tensor.is_inference() else tensor._version for tensor in (weight, integers)]
    entry = _packed_weights.get(integers)
    if entry is None or entry[0] != versions:
        entry = versions, torch.ops.onednn.qlinear_prepack(integers, None)
        _packed_weights[integers] = entry
    return entry[1]


class FastLinear(nn.Linear):
    """A linear layer, and the GELU after it if asked for, by the kernel that suits."""

    fast: bool | None = None

    def forward(self, hidden_states: torch.Tensor, tanh_gelu: bool = False) -> torch.Tensor:
        kernel = linear_kernel(hidden_states, self.weight, self.fast)
        if kernel == "float32":
            activation = ("gelu", [], "tanh") if tanh_gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(hidden_states, self.weight, self.bias, *activation)
        if kernel == "int8":
            output = int8_linear(hidden_states, self.weight, self.bias)
        else:
            output = super().forward(hidden_states)
        return F.gelu(output, approximate="tanh") if tanh_gelu else output


class FastGELU(GELU):
    """A linear layer and GELU, which one kernel can do where nobody looks in between."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # An adapter around the linear layer, or a hook, wants to see what comes before the activation.
        if self.approximate == "tanh" and type(self.proj) is FastLinear and not self.proj._forward_hooks:
            return self.proj(hidden_states, tanh_gelu=True)
        return super().forward(hidden_states)


def quicken(model: nn.Module, fast: bool | None = None) -> None:
    """
    Exchange the linear layers of a model. Parameters and their names stay as they are.

    Args:
        model (`nn.Module`): The model.
        fast (`bool`, *optional*): What the new layers pass on to [`linear_kernel`].
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                linear = recast(child, FastLinear)
                linear.fast = fast
                setattr(parent, name, linear)
            elif type(child) is GELU:
                # Its own linear layer's turn comes when this module is the parent.
                setattr(parent, name, recast(child, FastGELU))


def set_fast(model: nn.Module, fast: bool) -> None:
    """Whether the linear layers of a quickened model may use oneDNN, whatever the CPU."""
    for module in model.modules():
        if isinstance(module, FastLinear):
            module.fast = fast
