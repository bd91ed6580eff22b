"""The mixins of diffusers' newer pipelines, for all that draw from texts."""

from typing import Any
from unittest import mock

import diffusers.pipelines
import pytest
from diffusers_suite.mounting import mounted
from tiny_models import SAMPLE_SIZE
from tiny_pictures import random_hole, random_image
from tiny_texts import tiny_text_pipeline

from srdd import SRDDTextInpaintPipeline, SRDDTextPipeline, SRDDTextSuperResolutionPipeline


mixins = mounted("pipelines.testing_utils")
pipeline_params = mounted("pipelines.pipeline_params")

pytestmark = pytest.mark.diffusers_suite

# The size is the model's, or the image's.
SIZE = {"height", "width"}


class TextTesterConfig(mixins.BasePipelineTesterConfig):
    # The number of steps is the number of the scheduler's scales.
    optional_input_params = mixins.BasePipelineTesterConfig.optional_input_params - {"num_inference_steps"}
    output_shape = (3, SAMPLE_SIZE, SAMPLE_SIZE)

    def get_dummy_components(self) -> dict[str, Any]:
        return tiny_text_pipeline().components

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {"prompt": "a red cat", "generator": self.get_generator(0), "output_type": "pt"}


class TextTester(mixins.PipelineTesterMixin):
    def test_inference_batch_single_identical(self):
        # There is no `num_inference_steps` to copy into the batch.
        super().test_inference_batch_single_identical(additional_params_copy_to_batched_inputs=[])

    def test_encode_prompt_works_in_isolation(self):
        # The mixin looks the pipeline's source up among those of diffusers.
        with mock.patch.object(diffusers.pipelines, self.pipeline_class.__name__, self.pipeline_class, create=True):
            super().test_encode_prompt_works_in_isolation()

    @pytest.mark.skip("without them there are embeddings in the text's place, tests/pipelines has that")
    def test_save_load_optional_components(self):
        pass


class TextMemoryTester(
    mixins.PipelineOffloadTesterMixin, mixins.GroupOffloadTesterMixin, mixins.LayerwiseCastingTesterMixin
):
    """Without an accelerator the tests that only call `super()` still run all hooks."""

    def test_model_cpu_offload_forward_pass(self, base_pipe_output):
        super().test_model_cpu_offload_forward_pass(base_pipe_output)

    def test_group_offloading_inference(self):
        super().test_group_offloading_inference()


class SRDDTextPipelineTesterConfig(TextTesterConfig):
    pipeline_class = SRDDTextPipeline
    required_input_params_in_call_signature = pipeline_params.TEXT_TO_IMAGE_PARAMS - SIZE - {"cross_attention_kwargs"}
    batch_input_params = pipeline_params.TEXT_TO_IMAGE_BATCH_PARAMS


class TestSRDDTextPipeline(SRDDTextPipelineTesterConfig, TextTester):
    pass


class TestSRDDTextPipelineMemory(SRDDTextPipelineTesterConfig, TextMemoryTester):
    pass


class EditingTesterConfig(TextTesterConfig):
    # A start comes from the image.
    optional_input_params = TextTesterConfig.optional_input_params - {"latents"}


class SRDDTextInpaintPipelineTesterConfig(EditingTesterConfig):
    pipeline_class = SRDDTextInpaintPipeline
    required_input_params_in_call_signature = pipeline_params.TEXT_GUIDED_IMAGE_INPAINTING_PARAMS - SIZE
    batch_input_params = pipeline_params.TEXT_GUIDED_IMAGE_INPAINTING_BATCH_PARAMS

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {**super().get_dummy_inputs(), "image": random_image(), "mask_image": random_hole()}


class TestSRDDTextInpaintPipeline(SRDDTextInpaintPipelineTesterConfig, TextTester):
    pass


class TestSRDDTextInpaintPipelineMemory(SRDDTextInpaintPipelineTesterConfig, TextMemoryTester):
    pass


class SRDDTextSuperResolutionPipelineTesterConfig(EditingTesterConfig):
    pipeline_class = SRDDTextSuperResolutionPipeline
    required_input_params_in_call_signature = pipeline_params.TEXT_GUIDED_IMAGE_VARIATION_PARAMS - SIZE
    batch_input_params = pipeline_params.TEXT_GUIDED_IMAGE_VARIATION_BATCH_PARAMS

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {**super().get_dummy_inputs(), "image": random_image(size=(4, 4)), "scale_factor": 2}


class TestSRDDTextSuperResolutionPipeline(SRDDTextSuperResolutionPipelineTesterConfig, TextTester):
    @pytest.mark.skip("it asks for latents, which windows have, and not their canvas; tests/pipelines has callbacks")
    def test_callback_inputs(self):
        pass


class TestSRDDTextSuperResolutionPipelineMemory(SRDDTextSuperResolutionPipelineTesterConfig, TextMemoryTester):
    pass
