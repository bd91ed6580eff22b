from srdd.pipelines.pipeline_output import SRDDPipelineOutput
from srdd.pipelines.pipeline_srdd import SRDDPipeline


__all__ = ["SRDDPipeline", "SRDDPipelineOutput"]
