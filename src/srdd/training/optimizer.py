"""The optimizer, what it may change and how fast."""

from argparse import Namespace
from collections.abc import Iterable

import torch
from diffusers.optimization import get_scheduler


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Decay the matrices of linear layers only, as VAR does: not biases, embeddings and tables."""
    matrices = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    decayed = {id(weight) for weight in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in decayed]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    return [group for group in groups if group["params"]]


def learning_rate(args: Namespace, num_processes: int) -> float:
    """`--learning_rate`, for the number of images in a step if `--scale_lr` is set."""
    images_per_step = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    return args.learning_rate * (images_per_step / 256 if args.scale_lr else 1)


def make_optimizer(
    args: Namespace, parameters: Iterable, num_processes: int = 1
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW and its learning rate schedule over `max_train_steps` (in optimizer steps on every process)."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=learning_rate(args, num_processes),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    return optimizer, schedule
