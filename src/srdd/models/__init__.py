from srdd.models.attention_scale import ATTENTION_PATTERNS, MaskedScaleAttnProcessor, ScaleAttnProcessor
from srdd.models.autoencoder_multiscale_vq import MultiScaleVQModel
from srdd.models.scale_cache import ModulationCache, ScaleKVCache
from srdd.models.transformer_scale_2d import ScaleTransformer2DModel


__all__ = [
    "ATTENTION_PATTERNS",
    "MaskedScaleAttnProcessor",
    "ModulationCache",
    "MultiScaleVQModel",
    "ScaleAttnProcessor",
    "ScaleKVCache",
    "ScaleTransformer2DModel",
]
