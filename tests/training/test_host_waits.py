"""
No training step waits for its device: nothing is read back, and no constant is copied there.

The device is torch's "meta" device, which every machine has: its tensors have no values that could be read, and it
does not mix with the CPU. Copies that a GPU would be waited for are told by their functions.
"""

from contextlib import nullcontext

import pytest
import torch
from no_host import SENDING
from tiny_models import random_texts, tiny_scheduler, tiny_text_transformer, tiny_transformer, tiny_vqvae
from torch.overrides import TorchFunctionMode

from srdd.area_means import WINDOWS
from srdd.models import MaskedScaleAttnProcessor, ScaleAttnProcessor
from srdd.models.attention_scale import DENSE_MASKS
from srdd.training.averaged_weights import AveragedWeights
from srdd.training.condition_dropout import drop_conditions
from srdd.training.finite_check import FiniteCheck
from srdd.training.guided_distillation import guided_divergence
from srdd.training.optimizer import make_optimizer, parameter_groups
from srdd.training.settings import OptimizationSettings
from srdd.training.token_loss import TOKEN_WEIGHTS, token_loss


DEVICE = torch.device("meta")


class NoWaits(TorchFunctionMode):
    """Refuses functions that make the host wait for `DEVICE`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device == DEVICE:
            came_from_host = isinstance(args[0], torch.Tensor) and args[0].device != DEVICE if args else False
            waits = came_from_host and function is torch.Tensor.to and not (kwargs or {}).get("non_blocking")
            assert not waits, "a tensor of the CPU is copied to the device without `non_blocking`"
            assert function not in SENDING, f"{function.__name__} copies a constant to the device"
        return result


@pytest.fixture(autouse=True)
def _meta_device(monkeypatch):
    """No autocast, of which this device knows nothing; and what is kept for a device is made here and let go."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    caches = (DENSE_MASKS, WINDOWS, TOKEN_WEIGHTS)
    for cache in caches:
        cache.clear()
    yield
    for cache in caches:
        cache.clear()


class Training:
    """What `train_srdd.py` does in a step by "classes" or "texts", or with a "teacher" `distill_srdd.py`."""

    def __init__(self, device: torch.device, processor: ScaleAttnProcessor, kind: str = "classes", **overrides):
        self.scheduler, self.vqvae = tiny_scheduler(), tiny_vqvae().requires_grad_(False).to(device)
        self.teacher = self.empty_text = None
        if kind == "texts":
            self.model = tiny_text_transformer(**overrides)
            texts = {name: tensor.to(device) for name, tensor in random_texts([3, 5, 4]).items()}
            self.empty_text = {name: tensor[0] for name, tensor in texts.items()}
            sizes = torch.zeros(2, 3, 2, device=device)
            self.conditions = {**texts, "original_size": sizes[0], "crop_coords": sizes[1]}
        else:
            self.model = tiny_transformer(drop_path_rate=0.5, **overrides)
            self.conditions = {"class_labels": torch.zeros(3, dtype=torch.int64, device=device)}
        if kind == "teacher":
            self.teacher = tiny_transformer(**overrides).requires_grad_(False).to(device)
        self.model.train().to(device)
        for model in filter(None, (self.model, self.teacher)):
            model.set_attn_processor(processor)
        settings = OptimizationSettings(lr_warmup_steps=0)
        groups = parameter_groups(self.model, settings.adam_weight_decay)
        self.optimizer, self.schedule = make_optimizer(settings, groups, device=device)
        self.ema = AveragedWeights(self.model.parameters(), decay=0.9)
        self.finite = FiniteCheck(device)
        self.token_ids = torch.zeros(3, self.scheduler.num_tokens, dtype=torch.int64, device=device)

    def step(self) -> None:
        scale_sizes, timesteps = self.scheduler.scales, [scale.timestep for scale in self.scheduler.visits]
        inputs = self.vqvae.teacher_forcing_inputs(self.token_ids, scale_sizes)
        conditions = drop_conditions(self.conditions, self.empty_text, 0.1)
        logits = self.model(inputs, timestep=timesteps, **conditions).sample
        result = token_loss(logits, self.token_ids, scale_sizes, 0.1, [3.0, 2.0, 1.0])
        losses = {"loss": result.loss, **result.by_scale(scale_sizes)}
        if self.teacher is not None:
            labels = conditions["class_labels"]
            losses["kl"] = guided_divergence(logits, self.teacher, inputs, labels, self.scheduler, 2.5)
            losses["loss"] = losses["loss"] + losses["kl"]
        self.finite.add(1, losses, lambda step, bad: str(bad))
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.finite.add(1, {"norm": norm}, lambda step, bad: str(bad))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.ema.step(self.model.parameters())


@pytest.mark.parametrize("kind", ["classes", "teacher", "texts"])
@pytest.mark.parametrize("processor", [ScaleAttnProcessor, MaskedScaleAttnProcessor])
@pytest.mark.parametrize("pattern", ["markov", "causal"])
def test_no_step_waits_for_its_device(pattern, processor, kind):
    training = Training(DEVICE, processor(), kind, attention_pattern=pattern)
    training.step()  # makes what later steps share
    with NoWaits():
        training.step()
    with pytest.raises(RuntimeError, match="meta"):  # only what is asked for is read
        training.finite.read()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["classes", "teacher", "texts"])
def test_no_step_waits_for_a_gpu(monkeypatch, kind):
    monkeypatch.undo()  # it has autocast
    training = Training(torch.device("cuda"), MaskedScaleAttnProcessor(), kind)
    training.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    training.finite.read()


@pytest.mark.parametrize("wait", ["item", "bool", "tensor", "new_tensor", "to", "repeat_interleave"])
def test_waits_are_seen(wait):
    there, here = torch.ones(2, dtype=torch.int64, device=DEVICE), torch.ones(2)
    waits = {
        "item": lambda: there.sum().item(),
        "bool": lambda: bool((there > 0).all()),
        "tensor": lambda: torch.tensor([1, 2], device=DEVICE),
        "new_tensor": lambda: there.new_tensor([1, 2]),
        "to": lambda: here.to(there),
        "repeat_interleave": lambda: there.repeat_interleave(there),
    }
    with NoWaits(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        waits[wait]()
    with NoWaits():
        here.to(there, non_blocking=True)
