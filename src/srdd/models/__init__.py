from srdd.models.autoencoder_multiscale_vq import MultiScaleVQModel
from srdd.models.token_critic import TokenCritic
from srdd.models.transformer_scale_2d import ModulationCache, ScaleKVCache, ScaleTransformer2DModel


__all__ = ["ModulationCache", "MultiScaleVQModel", "ScaleKVCache", "ScaleTransformer2DModel", "TokenCritic"]
