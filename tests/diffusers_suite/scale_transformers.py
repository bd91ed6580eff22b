"""What diffusers' model tests are told of all transformers over scales."""

from typing import Any

import torch
from diffusers_suite.mounting import mounted
from tiny_models import CODEBOOK_SIZE, LATENT_CHANNELS, TRANSFORMER_SIZES


mixins = mounted("models.testing_utils")
torch_device = mounted("testing_utils").torch_device

NUM_TOKENS = 21


class LiveWeights:
    """Wide random weights. Fresh gates are close to zero and would hide what attention and adapters do."""

    @torch.no_grad()
    def init_weights(self) -> None:
        super().init_weights()
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2)


class ScaleTransformerTesterConfig(mixins.BaseModelTesterConfig):
    """A test class has a `model_class`, `own_config` beside the tiny sizes, and `conditions`."""

    main_input_name = "hidden_states"
    output_shape = (NUM_TOKENS, CODEBOOK_SIZE)
    model_split_percents = (0.7, 0.6, 0.6)
    own_config: dict[str, Any]

    def conditions(self) -> dict[str, torch.Tensor]:
        """What two images are told."""
        return {"class_labels": torch.tensor([1, 4])}

    def get_init_dict(self) -> dict[str, Any]:
        return {**TRANSFORMER_SIZES, **self.own_config}

    def get_dummy_inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        hidden_states = torch.randn(2, NUM_TOKENS, LATENT_CHANNELS, generator=generator)
        inputs = {"hidden_states": hidden_states, **self.conditions()}
        return {name: tensor.to(torch_device) for name, tensor in inputs.items()}
