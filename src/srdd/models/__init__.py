from srdd.models.attention_scale import ATTENTION_PATTERNS, MaskedScaleAttnProcessor, ScaleAttnProcessor
from srdd.models.autoencoder_multiscale_vq import MultiScaleVQModel
from srdd.models.scale_cache import ModulationCache, ScaleKVCache
from srdd.models.scale_transformer import ScaleTransformer
from srdd.models.transformer_scale_2d import ScaleTransformer2DModel
from srdd.models.transformer_scale_history_2d import ScaleHistoryTransformer2DModel
from srdd.models.transformer_scale_text_2d import ScaleTextTransformer2DModel


__all__ = [
    "ATTENTION_PATTERNS",
    "MaskedScaleAttnProcessor",
    "ModulationCache",
    "MultiScaleVQModel",
    "ScaleAttnProcessor",
    "ScaleHistoryTransformer2DModel",
    "ScaleKVCache",
    "ScaleTextTransformer2DModel",
    "ScaleTransformer",
    "ScaleTransformer2DModel",
]
