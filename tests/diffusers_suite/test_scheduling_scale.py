from typing import Any
from unittest import mock

import pytest
import torch
from diffusers_suite.mounting import mounted
from tiny_models import CODEBOOK_SIZE, SCALE_SIZES

from srdd import ScaleScheduler


mixins = mounted("schedulers.test_schedulers")

pytestmark = pytest.mark.diffusers_suite

BATCH_SIZE = 4
NUM_TOKENS = 21


class TokenSchedulerConfig(dict):
    """The mixin looks the codebook size of a token scheduler up in its config; ours leaves it to the logits."""

    def __missing__(self, key: str) -> int:
        return {"num_vec_classes": CODEBOOK_SIZE}[key]


class TestScaleScheduler(mixins.SchedulerCommonTest):
    scheduler_classes = (ScaleScheduler,)
    default_num_inference_steps = len(SCALE_SIZES)

    def setUp(self):
        # The mixin knows one scheduler whose sample is tokens and asks for it by class.
        patch = mock.patch.object(mixins, "VQDiffusionScheduler", ScaleScheduler)
        patch.start()
        self.addCleanup(patch.stop)

    def get_scheduler_config(self, **overrides: Any) -> TokenSchedulerConfig:
        # With one further pass the first two timesteps are the same scale, and the mixin reuses one model output.
        config = {"scale_sizes": SCALE_SIZES, "resampling_policy": "simple", "num_resampling_passes": 1}
        return TokenSchedulerConfig({**config, **overrides})

    def dummy_sample(self, codebook_size: int) -> torch.LongTensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(codebook_size, (BATCH_SIZE, NUM_TOKENS), generator=generator)

    def dummy_model(self, codebook_size: int):
        def model(sample: torch.LongTensor, timestep: int) -> torch.Tensor:
            num_scale_tokens = SCALE_SIZES[-1 - int(timestep)] ** 2
            return torch.randn(BATCH_SIZE, num_scale_tokens, codebook_size, generator=torch.Generator().manual_seed(1))

        return model

    def test_add_noise_device(self):
        # The mixin adds noise to what `scale_model_input` returns; ours turns a latent state into the model's tokens.
        scheduler = ScaleScheduler(**self.get_scheduler_config())
        sample = self.dummy_sample(CODEBOOK_SIZE).to(mixins.torch_device)
        noised = scheduler.add_noise(sample, None, scheduler.timesteps[-1:])
        assert noised.shape == sample.shape
        assert noised.device == sample.device

    def test_scheduler_outputs_equivalence(self):
        # The mixin subtracts the fields from each other, which boolean masks do not allow.
        sample, timestep = self.dummy_sample(CODEBOOK_SIZE), self.default_timestep
        logits = self.dummy_model(CODEBOOK_SIZE)(sample, timestep)
        scheduler = ScaleScheduler(**self.get_scheduler_config(resampling_policy="masked"))
        as_object = scheduler.step(logits, timestep, sample, generator=torch.manual_seed(0))
        as_tuple = scheduler.step(logits, timestep, sample, generator=torch.manual_seed(0), return_dict=False)
        assert all(torch.equal(left, right) for left, right in zip(as_object.to_tuple(), as_tuple, strict=True))

    def test_timesteps(self):
        for timestep in range(len(SCALE_SIZES)):
            self.check_over_forward(time_step=timestep)

    def test_sampling(self):
        for config in ({"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}):
            self.check_over_configs(**config)

    def test_guidance_schedules(self):
        for guidance_schedule in ("linear", "constant"):
            self.check_over_configs(guidance_schedule=guidance_schedule)

    def test_resampling(self):
        for policy in ("none", "simple", "masked", "remasked"):
            self.check_over_configs(resampling_policy=policy)
