import pytest
import torch
from diffusers_suite import scale_transformers
from diffusers_suite.scale_transformers import LiveWeights, mixins
from tiny_models import POOLED_DIM, TEXT_DIM, random_texts

from srdd import ScaleTextTransformer2DModel


pytestmark = pytest.mark.diffusers_suite


class LiveScaleTextTransformer2DModel(LiveWeights, ScaleTextTransformer2DModel):
    pass


class ScaleTextTransformerTesterConfig(scale_transformers.ScaleTransformerTesterConfig):
    model_class = LiveScaleTextTransformer2DModel
    own_config = {"cross_attention_dim": TEXT_DIM, "pooled_projection_dim": POOLED_DIM}

    def conditions(self) -> dict[str, torch.Tensor]:
        return random_texts()


class TestScaleTextTransformer(ScaleTextTransformerTesterConfig, mixins.ModelTesterMixin):
    pass


class TestScaleTextTransformerAttention(ScaleTextTransformerTesterConfig, mixins.AttentionTesterMixin):
    pass


class TestScaleTextTransformerTraining(ScaleTextTransformerTesterConfig, mixins.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"LiveScaleTextTransformer2DModel"})


class TestScaleTextTransformerLora(ScaleTextTransformerTesterConfig, mixins.LoraTesterMixin):
    pass


class TestScaleTextTransformerMemory(ScaleTextTransformerTesterConfig, mixins.MemoryTesterMixin):
    pass


class TestScaleTextTransformerLayerwiseCasting(ScaleTextTransformerTesterConfig, mixins.LayerwiseCastingTesterMixin):
    pass
