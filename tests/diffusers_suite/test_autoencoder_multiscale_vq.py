from typing import Any

import pytest
import torch
from diffusers_suite.mounting import mounted
from tiny_models import CODEBOOK_SIZE, LATENT_CHANNELS, SAMPLE_SIZE, SCALE_SIZES

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
        return {
            "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
            "block_out_channels": [16, 32],
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "latent_channels": LATENT_CHANNELS,
            "codebook_size": CODEBOOK_SIZE,
            "scale_sizes": SCALE_SIZES,
            "sample_size": SAMPLE_SIZE,
        }

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
