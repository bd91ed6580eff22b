"""The optimizer, what it may change and how fast."""

from collections.abc import Iterable

import torch
from diffusers.optimization import get_scheduler

from srdd.training.settings import OptimizationSettings


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Decay the matrices of linear layers only, as VAR does: not biases, embeddings and tables."""
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    decayed = {id(weight) for weight in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in decayed]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    return [group for group in groups if group["params"]]


def learning_rate(settings: OptimizationSettings, num_processes: int) -> float:
    """`--learning_rate`, for the number of images in a step if `--scale_lr` is set."""
    return settings.learning_rate * (settings.images_per_step(num_processes) / 256 if settings.scale_lr else 1)


def is_fused(device: torch.device) -> bool | None:
    """Whether AdamW takes its step in few kernels: on CUDA. Elsewhere torch decides."""
    return True if device.type == "cuda" else None


def place_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """
    Put AdamW's step counts where it wants them: on the device if it is fused, else on the CPU. They come from a
    checkpoint as they were, and it may have been made elsewhere, or by a version that did not fuse.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device if group.get("fused") else "cpu")


def make_optimizer(
    settings: OptimizationSettings,
    parameters: Iterable,
    num_processes: int = 1,
    device: torch.device = torch.device("cpu"),
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """
    AdamW and its learning rate schedule over `max_train_steps` (in optimizer steps on every process).

    Args:
        settings ([`OptimizationSettings`]): Learning rate, schedule and AdamW's values.
        parameters (`Iterable`): Parameters, or groups of them.
        num_processes (`int`, defaults to 1): Processes that train together.
        device (`torch.device`, defaults to the CPU): Where the parameters will be.
    """
    optimizer = torch.optim.AdamW(
        parameters,
        lr=learning_rate(settings, num_processes),
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
        fused=is_fused(device),
    )
    schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )
    return optimizer, schedule
