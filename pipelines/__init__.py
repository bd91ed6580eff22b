from srdd.pipelines.pipeline_output import SRDDPipelineOutput
from srdd.pipelines.pipeline_srdd import SRDDPipeline
from srdd.pipelines.pipeline_srdd_inpaint import SRDDInpaintPipeline
from srdd.pipelines.pipeline_srdd_super_resolution import SRDDSuperResolutionPipeline
from srdd.pipelines.pipeline_srdd_text import SRDDTextPipeline
from srdd.pipelines.pipeline_srdd_text_inpaint import SRDDTextInpaintPipeline
from srdd.pipelines.pipeline_srdd_text_super_resolution import SRDDTextSuperResolutionPipeline


__all__ = [
    "SRDDInpaintPipeline",
    "SRDDPipeline",
    "SRDDPipelineOutput",
    "SRDDSuperResolutionPipeline",
    "SRDDTextInpaintPipeline",
    "SRDDTextPipeline",
    "SRDDTextSuperResolutionPipeline",
]
