"""What the CPU is good at. It is the same in every call, and asked once, at import."""

from collections.abc import Mapping
from typing import Any

import torch


def mkl_is_slow(capabilities: Mapping[str, Any]) -> bool:
    """Whether float32 matrix products come from MKL, and the CPU is one of AMD's with AVX-512, which MKL ignores."""
    is_amd = "AMD" in capabilities.get("cpu_name", "")
    return torch.backends.mkl.is_available() and is_amd and capabilities.get("avx512_f", False)


def multiplies_int8(capabilities: Mapping[str, Any]) -> bool:
    """Whether the CPU multiplies int8 without the overflows of older ones."""
    return any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


# What torch knows about the CPU; nothing in versions that cannot tell, or without oneDNN.
CAPABILITIES = getattr(torch.cpu, "get_capabilities", dict)() if torch.backends.mkldnn.is_available() else {}
MKL_IS_SLOW = mkl_is_slow(CAPABILITIES)
MULTIPLIES_INT8 = multiplies_int8(CAPABILITIES)
