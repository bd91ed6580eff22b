from typing import Any

import pytest
import torch
from diffusers_suite.mounting import mounted

from srdd import TokenCritic


mixins = mounted("models.testing_utils")
torch_device = mounted("testing_utils").torch_device

pytestmark = pytest.mark.diffusers_suite

NUM_TOKENS = 21


class TokenCriticTesterConfig(mixins.BaseModelTesterConfig):
    model_class = TokenCritic
    main_input_name = "hidden_states"
    output_shape = (NUM_TOKENS,)

    def get_init_dict(self) -> dict[str, Any]:
        return {"codebook_size": 32, "dim": 16, "hidden_dim": 8}

    def get_dummy_inputs(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {
            "hidden_states": torch.randn(2, NUM_TOKENS, 16, generator=generator).to(torch_device),
            "token_ids": torch.randint(32, (2, NUM_TOKENS), generator=generator).to(torch_device),
        }


class TestTokenCritic(TokenCriticTesterConfig, mixins.ModelTesterMixin):
    pass


class TestTokenCriticTraining(TokenCriticTesterConfig, mixins.TrainingTesterMixin):
    pass
