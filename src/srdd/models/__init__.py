from srdd.models.autoencoder_multiscale_vq import MultiScaleVQModel
from srdd.models.token_critic import TokenCritic
from srdd.models.transformer_scale_2d import ScaleKVCache, ScaleTransformer2DModel


__all__ = ["MultiScaleVQModel", "ScaleKVCache", "ScaleTransformer2DModel", "TokenCritic"]
