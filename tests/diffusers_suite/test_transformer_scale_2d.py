import pytest
from diffusers_suite import scale_transformers
from diffusers_suite.scale_transformers import LiveWeights, mixins

from srdd import ScaleTransformer2DModel


pytestmark = pytest.mark.diffusers_suite


class LiveScaleTransformer2DModel(LiveWeights, ScaleTransformer2DModel):
    pass


class ScaleTransformerTesterConfig(scale_transformers.ScaleTransformerTesterConfig):
    model_class = LiveScaleTransformer2DModel
    own_config = {"num_classes": 5}


class TestScaleTransformer(ScaleTransformerTesterConfig, mixins.ModelTesterMixin):
    pass


class TestScaleTransformerAttention(ScaleTransformerTesterConfig, mixins.AttentionTesterMixin):
    pass


class TestScaleTransformerTraining(ScaleTransformerTesterConfig, mixins.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"LiveScaleTransformer2DModel"})


class TestScaleTransformerLora(ScaleTransformerTesterConfig, mixins.LoraTesterMixin):
    pass


class TestScaleTransformerMemory(ScaleTransformerTesterConfig, mixins.MemoryTesterMixin):
    pass


class TestScaleTransformerLayerwiseCasting(ScaleTransformerTesterConfig, mixins.LayerwiseCastingTesterMixin):
    pass
