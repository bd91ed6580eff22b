from typing import Any

import pytest
import torch
from diffusers_suite.mounting import mounted
from tiny_models import CODEBOOK_SIZE, LATENT_CHANNELS, POOLED_DIM, TEXT_DIM, TRANSFORMER_SIZES, random_texts

from srdd import ScaleTextTransformer2DModel


mixins = mounted("models.testing_utils")
torch_device = mounted("testing_utils").torch_device

pytestmark = pytest.mark.diffusers_suite

NUM_TOKENS = 21


class LiveScaleTextTransformer2DModel(ScaleTextTransformer2DModel):
    """With wide random weights. Fresh gates are close to zero and would hide what attention and adapters do."""

    @torch.no_grad()
    def init_weights(self) -> None:
        super().init_weights()
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)


class ScaleTextTransformerTesterConfig(mixins.BaseModelTesterConfig):
    model_class = LiveScaleTextTransformer2DModel
    main_input_name = "hidden_states"
    output_shape = (NUM_TOKENS, CODEBOOK_SIZE)
    model_split_percents = (0.7, 0.6, 0.6)

    def get_init_dict(self) -> dict[str, Any]:
        return {
            **TRANSFORMER_SIZES,
            "cross_attention_dim": TEXT_DIM,
            "pooled_projection_dim": POOLED_DIM,
        }

    def get_dummy_inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden_states = torch.randn(2, NUM_TOKENS, LATENT_CHANNELS, generator=generator)
        inputs = {"hidden_states": hidden_states, **random_texts()}
        return {name: tensor.to(torch_device) for name, tensor in inputs.items()}


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
