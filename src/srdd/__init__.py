"""Scale-wise discrete diffusion for the diffusers ecosystem."""

from srdd.diffusers_registration import register, register_auto_pipelines
from srdd.models import (
    MultiScaleVQModel,
    ScaleHistoryTransformer2DModel,
    ScaleKVCache,
    ScaleTextTransformer2DModel,
    ScaleTransformer2DModel,
)
from srdd.pipelines import (
    SRDDInpaintPipeline,
    SRDDPipeline,
    SRDDPipelineOutput,
    SRDDSuperResolutionPipeline,
    SRDDTextInpaintPipeline,
    SRDDTextPipeline,
    SRDDTextSuperResolutionPipeline,
)
from srdd.schedulers import ScaleScheduler, ScaleSchedulerOutput


__version__ = "0.2.0"

__all__ = [
    "MultiScaleVQModel",
    "SRDDInpaintPipeline",
    "SRDDPipeline",
    "SRDDPipelineOutput",
    "SRDDSuperResolutionPipeline",
    "SRDDTextInpaintPipeline",
    "SRDDTextPipeline",
    "SRDDTextSuperResolutionPipeline",
    "ScaleHistoryTransformer2DModel",
    "ScaleKVCache",
    "ScaleScheduler",
    "ScaleSchedulerOutput",
    "ScaleTextTransformer2DModel",
    "ScaleTransformer2DModel",
    "register_auto_pipelines",
]

register(
    [
        "MultiScaleVQModel",
        "ScaleTransformer2DModel",
        "ScaleTextTransformer2DModel",
        "ScaleHistoryTransformer2DModel",
        "ScaleScheduler",
    ]
)
