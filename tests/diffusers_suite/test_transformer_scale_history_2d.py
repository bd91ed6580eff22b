from typing import Any

import pytest
import torch
from diffusers_suite.mounting import mounted
from tiny_models import CODEBOOK_SIZE, LATENT_CHANNELS, TRANSFORMER_SIZES

from srdd import ScaleHistoryTransformer2DModel


mixins = mounted("models.testing_utils")
torch_device = mounted("testing_utils").torch_device

pytestmark = pytest.mark.diffusers_suite

NUM_TOKENS = 21


class LiveScaleHistoryTransformer2DModel(ScaleHistoryTransformer2DModel):
    """With wide random weights. Fresh gates are close to zero and would hide what attention and adapters do."""

    @torch.no_grad()
    def init_weights(self) -> None:
        super().init_weights()
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)


class ScaleHistoryTransformerTesterConfig(mixins.BaseModelTesterConfig):
    model_class = LiveScaleHistoryTransformer2DModel
    main_input_name = "hidden_states"
    output_shape = (NUM_TOKENS, CODEBOOK_SIZE)
    model_split_percents = (0.7, 0.6, 0.6)

    def get_init_dict(self) -> dict[str, Any]:
        return {
            **TRANSFORMER_SIZES,
            "num_classes": 5,
            "history_head_dim": 8,
        }

    def get_dummy_inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden_states = torch.randn(2, NUM_TOKENS, LATENT_CHANNELS, generator=generator)
        return {
            "hidden_states": hidden_states.to(torch_device),
            "class_labels": torch.tensor([1, 4], device=torch_device),
        }


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
