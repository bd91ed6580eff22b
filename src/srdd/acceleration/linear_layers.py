"""
Linear layers without gradients on CPUs: the same layers in less time, by kernels of oneDNN, which torch brings along.

[`quicken`] puts the classes below in the place of torch's and diffusers' where that pays. They hold the same
parameters under the same names and nothing else, and run torch's code on accelerators, where a gradient may be asked
for, under autocast and in compiled code.

- float32: torch has MKL multiply float32 matrices, which leaves AVX-512 to Intel's CPUs. oneDNN, to which torch gives
  convolutions, uses it on AMD's, too: 1.9 times the speed on Zen 5, 1.25 on Zen 4. Elsewhere it is not the default.
- int8: weights that torchao made int8, multiplied with activations that are quantized row by row on the way. Without a
  compiler, torchao's own code for that takes longer than float32.

Numbers: `benchmarks/SPEED.md`.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.activations import GELU
from torch.utils.weak import WeakTensorKeyDictionary

from srdd.acceleration.cpu import MKL_IS_SLOW, MULTIPLIES_INT8
from srdd.acceleration.module_swapping import recast


# Weights that hold the numbers which they stand for.
FLOATING_POINT = (nn.Parameter, torch.Tensor)

# What oneDNN makes of torchao's integers, or `None` where it cannot, and what that was made of. An entry lives as long
# as the integers do; copies, saved files and models on other devices know nothing of it.
_packed_weights = WeakTensorKeyDictionary()


def is_dynamic_int8(weight: torch.Tensor) -> bool:
    """Whether a weight is torchao's `Int8Tensor`, symmetric by row, for activations quantized alike when they come."""
    if list(weight.block_size) != [1, weight.shape[-1]]:
        return False
    activations = getattr(weight, "act_quant_kwargs", None)
    return (
        type(getattr(activations, "granularity", None)).__name__ == "PerRow"
        and activations.mapping_type.name == "SYMMETRIC"
        and not getattr(activations, "reduce_range", False)
        and all(getattr(weight, name, None) is None for name in ("act_quant_scale", "act_pre_scale"))
    )


def packed_weight(weight: torch.Tensor) -> torch.Tensor | None:
    """torchao's integers as oneDNN reads them, made once; `None` for weights that it does not multiply so."""
    if type(weight).__name__ != "Int8Tensor":
        return None
    integers = weight.qdata
    # Loading into torchao's weight counts as a change of the weight, though it is one of the integers.
    versions = (None if tensor.is_inference() else tensor._version for tensor in (weight, integers))
    made_of = getattr(weight, "act_quant_kwargs", None), *versions
    entry = _packed_weights.get(integers)
    if entry is None or entry[0] != made_of:
        suits = MULTIPLIES_INT8 and is_dynamic_int8(weight)
        entry = made_of, torch.ops.onednn.qlinear_prepack(integers, None) if suits else None
        _packed_weights[integers] = entry
    return entry[1]


def int8_linear(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """
    What torchao computes for a weight that [`is_dynamic_int8`].

    Every row of the input has a scale of its own, so that no image depends on the others in its batch.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., in_features)`): The input.
        weight (`torch.Tensor` of shape `(out_features, in_features)`): torchao's weight.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*): The bias.

    Returns:
        `torch.Tensor` of shape `(..., out_features)`, *optional*: With the dtype of the input. `None` for weights of
        another kind, and on CPUs without VNNI.
    """
    packed = packed_weight(weight)
    if packed is None:
        return None
    rows = hidden_states.float()
    scales = rows.abs().amax(dim=-1, keepdim=True).div_(127.5).clamp_(min=torch.finfo(torch.float32).eps)
    integers = (rows * scales.reciprocal()).round_().clamp_(-128, 127).to(torch.int8)
    products = torch.ops.onednn.qlinear_pointwise(
        integers.view(torch.uint8).bitwise_xor_(128),  # CPUs multiply unsigned by signed: 128 more, and so is zero
        1.0,
        128,
        packed,
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


class FastLinear(nn.Linear):
    """
    A linear layer, and the GELU after it if asked for, by the kernel that suits.

    `fast` says whether kernels of oneDNN are welcome; by default int8 is, and float32 on CPUs on which it was measured
    to be the faster one. What may change from call to call is all that a call looks at.
    """

    fast: bool | None = None

    def forward(self, hidden_states: torch.Tensor, tanh_gelu: bool = False) -> torch.Tensor:
        weight, bias, fast, output = self.weight, self.bias, self.fast, None
        is_floating_point = type(weight) in FLOATING_POINT
        if (
            (fast or fast is None and (MKL_IS_SLOW or not is_floating_point))
            and type(hidden_states) is torch.Tensor
            and hidden_states.is_cpu
            and weight.is_cpu
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        ):
            if not is_floating_point:
                output = int8_linear(hidden_states, weight, bias)
            elif hidden_states.dtype == weight.dtype == torch.float32:
                activation = ("gelu", [], "tanh") if tanh_gelu else ("none", [], "")
                return torch.ops.mkldnn._linear_pointwise(hidden_states, weight, bias, *activation)
        if output is None:
            output = F.linear(hidden_states, weight, bias)
        return F.gelu(output, approximate="tanh") if tanh_gelu else output


class FastGELU(GELU):
    """A linear layer and GELU, which one kernel can do where nobody looks in between."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        linear = self.proj
        # An adapter around the linear layer, or a hook, wants to see what comes before the activation.
        if self.approximate == "tanh" and type(linear) is FastLinear and not linear._forward_hooks:
            return linear(hidden_states, tanh_gelu=True)
        return super().forward(hidden_states)


def quicken(module: nn.Module) -> None:
    """
    Exchange those linear layers of a module for which there is a faster kernel: all on CPUs where MKL is slow, those
    with quantized weights elsewhere. Parameters and their names stay as they are.

    Args:
        module (`nn.Module`): The module. Where [`set_fast_linears`] has been called, new layers do as it said.
    """
    fast = next((layer.fast for layer in module.modules() if isinstance(layer, FastLinear)), None)
    if fast is not None:
        set_fast_linears(module, fast)
        return
    for layer in module.modules():
        if type(layer) is nn.Linear and (MKL_IS_SLOW or type(layer.weight) not in FLOATING_POINT):
            recast(layer, {nn.Linear: FastLinear})
    for layer in module.modules():
        if type(layer) is GELU and type(layer.proj) is FastLinear:
            recast(layer, {GELU: FastGELU})


def set_fast_linears(module: nn.Module, fast: bool) -> None:
    """Whether the linear layers of a module may use oneDNN, whatever the CPU."""
    recast(module, {nn.Linear: FastLinear, GELU: FastGELU})
    for layer in module.modules():
        if isinstance(layer, FastLinear):
            layer.fast = fast
