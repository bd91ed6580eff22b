import pytest
from diffusers_suite import scale_transformers
from diffusers_suite.scale_transformers import LiveWeights, mixins

from srdd import ScaleHistoryTransformer2DModel


pytestmark = pytest.mark.diffusers_suite


class LiveScaleHistoryTransformer2DModel(LiveWeights, ScaleHistoryTransformer2DModel):
    pass


class ScaleHistoryTransformerTesterConfig(scale_transformers.ScaleTransformerTesterConfig):
    model_class = LiveScaleHistoryTransformer2DModel
    own_config = {"num_classes": 5, "history_head_dim": 8}


class TestScaleHistoryTransformer(ScaleHistoryTransformerTesterConfig, mixins.ModelTesterMixin):
    pass


class TestScaleHistoryTransformerAttention(ScaleHistoryTransformerTesterConfig, mixins.AttentionTesterMixin):
    pass


class TestScaleHistoryTransformerTraining(ScaleHistoryTransformerTesterConfig, mixins.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"LiveScaleHistoryTransformer2DModel"})


class TestScaleHistoryTransformerLora(ScaleHistoryTransformerTesterConfig, mixins.LoraTesterMixin):
    pass


class TestScaleHistoryTransformerMemory(ScaleHistoryTransformerTesterConfig, mixins.MemoryTesterMixin):
    pass


class TestScaleHistoryTransformerLayerwiseCasting(
    ScaleHistoryTransformerTesterConfig, mixins.LayerwiseCastingTesterMixin
):
    pass
