from typing import Any

import pytest
import torch
from diffusers_suite.mounting import mounted
from tiny_models import SAMPLE_SIZE, VQVAE_CONFIG

from srdd import MultiScaleVQModel


mixins = mounted("models.testing_utils")
autoencoder_mixins = mounted("models.autoencoders.testing_utils")
torch_device = mounted("testing_utils").torch_device

pytestmark = pytest.mark.diffusers_suite


class MultiScaleVQModelTesterConfig(mixins.BaseModelTesterConfig):
    model_class = MultiScaleVQModel
    main_input_name = "sample"
    output_shape = (3, SAMPLE_SIZE, SAMPLE_SIZE)

    def get_init_dict(self) -> dict[str, Any]:
        return dict(VQVAE_CONFIG)

    def get_dummy_inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {"sample": torch.randn(2, *self.output_shape, generator=generator).to(torch_device)}


class TestMultiScaleVQModel(MultiScaleVQModelTesterConfig, mixins.ModelTesterMixin):
    pass


class TestMultiScaleVQModelTraining(MultiScaleVQModelTesterConfig, mixins.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"Encoder", "Decoder", "UNetMidBlock2D"})


class TestMultiScaleVQModelMemory(MultiScaleVQModelTesterConfig, mixins.MemoryTesterMixin):
    pass


class TestMultiScaleVQModelLayerwiseCasting(MultiScaleVQModelTesterConfig, mixins.LayerwiseCastingTesterMixin):
    pass


class TestMultiScaleVQModelSlicing(MultiScaleVQModelTesterConfig, autoencoder_mixins.AutoencoderTesterMixin):
    pass
