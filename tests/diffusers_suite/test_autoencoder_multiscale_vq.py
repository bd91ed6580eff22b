from typing import Any

import pytest
import torch
from diffusers_suite.mounting import mounted
from tiny_models import SAMPLE_SIZE, SCALE_SIZES, VQVAE_CONFIG

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


class LargerImagesTesterConfig(MultiScaleVQModelTesterConfig):
    """
    Images whose feature maps count. The tiny model's convolutions in half precision save 40 KiB of tensors and spend
    as much: cuDNN copies input, weight and output into another layout, which `test_layerwise_casting_memory` counts.
    """

    output_shape = (3, 8 * SAMPLE_SIZE, 8 * SAMPLE_SIZE)

    def get_init_dict(self) -> dict[str, Any]:
        scale_sizes = [*SCALE_SIZES, 8 * SCALE_SIZES[-1]]
        return {**super().get_init_dict(), "sample_size": 8 * SAMPLE_SIZE, "scale_sizes": scale_sizes}


class TestMultiScaleVQModel(MultiScaleVQModelTesterConfig, mixins.ModelTesterMixin):
    pass


class TestMultiScaleVQModelTraining(MultiScaleVQModelTesterConfig, mixins.TrainingTesterMixin):
    def test_gradient_checkpointing_is_applied(self):
        super().test_gradient_checkpointing_is_applied(expected_set={"Encoder", "Decoder", "UNetMidBlock2D"})


class TestMultiScaleVQModelMemory(LargerImagesTesterConfig, mixins.MemoryTesterMixin):
    pass


class TestMultiScaleVQModelLayerwiseCasting(LargerImagesTesterConfig, mixins.LayerwiseCastingTesterMixin):
    pass


class TestMultiScaleVQModelSlicing(MultiScaleVQModelTesterConfig, autoencoder_mixins.AutoencoderTesterMixin):
    pass
