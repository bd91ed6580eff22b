"""How a token critic is trained: to tell true tokens from those that a frozen transformer draws in their place."""

from argparse import Namespace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc

from srdd import MultiScaleVQModel, ScaleScheduler, ScaleTransformer2DModel, SRDDPipeline, TokenCritic
from srdd.models import ScaleKVCache
from srdd.scales import num_tokens_per_scale, split_scales
from srdd.schedulers.token_sampling import sample_tokens
from srdd.training.transformer import TokenData, by_scale, draw, guided_distribution, inference_scales, train_on_tokens


def train_token_critic(
    args: Namespace, accelerator: Accelerator, critic: TokenCritic, pipe: SRDDPipeline, tokens: TokenData
) -> TokenCritic:
    """
    Train a critic for a pipeline, whose other parts stay as they are.

    Args:
        args (`Namespace`): The arguments of the script.
        accelerator (`Accelerator`): Nothing prepared yet.
        critic ([`TokenCritic`]): The critic.
        pipe ([`SRDDPipeline`]): The pipeline, frozen and on its device.
        tokens ([`TokenData`]): Pyramids over the scales of its scheduler.

    Returns:
        [`TokenCritic`]: A copy with the averaged weights.

    Raises:
        FloatingPointError: If loss or gradients are not finite; names the step and the scales.
    """
    transformer, scale_sizes = pipe.transformer, inference_scales(pipe.scheduler)[1:]
    null_class, dropout = transformer.config.num_classes, transformer.config.class_dropout_prob
    policy = {"resampling_policy": "learned", "resampling_feedback": None}
    scheduler = ScaleScheduler.from_config(
        pipe.scheduler.config, resampling_threshold=args.validation_threshold, **policy
    )

    def examples(batch: dict[str, torch.Tensor], labels: torch.LongTensor, generator: torch.Generator | None = None):
        return critic_examples(
            pipe.vqvae, transformer, scheduler, batch["token_ids"], labels, args.guidance_scale, generator
        )

    def compute_values(model: torch.nn.Module, batch: dict[str, torch.Tensor]):
        # Images are drawn without a class, too.
        dropped = torch.rand(batch["labels"].shape, device=batch["labels"].device) < dropout
        hidden_states, token_ids, is_right = examples(batch, torch.where(dropped, null_class, batch["labels"]))
        overall, per_scale = critic_metrics(model(hidden_states, token_ids).logits, is_right, scale_sizes)
        losses = {"loss": overall.pop("loss"), **by_scale("loss", scale_sizes, per_scale.pop("loss"))}
        for name, values in per_scale.items():
            overall.update(by_scale(name, scale_sizes, values))
        return losses, overall

    @torch.no_grad()
    def evaluate(averaged: TokenCritic, loader: DataLoader):
        generator = torch.Generator().manual_seed(args.seed)
        logits, targets = [], []
        for batch in loader:
            batch = {name: tensor.to(averaged.device) for name, tensor in batch.items()}
            hidden_states, token_ids, is_right = examples(batch, batch["labels"], generator)
            logits.append(averaged(hidden_states, token_ids).logits)
            targets.append(is_right)
        overall, per_scale = critic_metrics(torch.cat(logits), torch.cat(targets), scale_sizes)
        metrics = {name: value.item() for name, value in overall.items()}
        metrics.update({f"{name}_per_scale": values.tolist() for name, values in per_scale.items()})
        pictures = draw(args, transformer, pipe.vqvae, scheduler, averaged)
        return {**metrics, "scales": scale_sizes}, pictures

    return train_on_tokens(args, accelerator, critic, tokens, compute_values, evaluate)


@torch.no_grad()
def critic_examples(
    vqvae: MultiScaleVQModel,
    transformer: ScaleTransformer2DModel,
    scheduler: ScaleScheduler,
    token_ids: torch.LongTensor,
    class_labels: torch.LongTensor,
    guidance_scale: float,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.LongTensor, torch.BoolTensor]:
    """
    What a critic sees and should say. A share of the tokens, uniform in [0, 1] for each image and scale, is drawn from
    the transformer given the true coarser scales. Each scale is fed back as in sampling, and the transformer's last
    hidden states and the tokens are the examples. The coarsest scale, whose input the transformer does not read, gives
    none.

    Args:
        vqvae ([`MultiScaleVQModel`]): The tokenizer.
        transformer ([`ScaleTransformer2DModel`]): The transformer.
        scheduler ([`ScaleScheduler`]): Scales, guidance ramp and how tokens are drawn.
        token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`): True pyramids over the scheduler's scales.
        class_labels (`torch.LongTensor` of shape `(batch,)`): Class ids.
        guidance_scale (`float`): Guidance of the draw; 1 and below is off.
        generator (`torch.Generator`, *optional*): The only source of randomness; by default torch's own.

    Returns:
        `tuple[torch.Tensor, torch.LongTensor, torch.BoolTensor]`: Hidden states of shape `(batch, num_judged_tokens,
        dim)`, the tokens, and for each whether it is the true one.
    """
    scale_sizes, timesteps = inference_scales(scheduler), scheduler.scale_timesteps()
    counts = num_tokens_per_scale(scale_sizes)
    kv_cache = ScaleKVCache() if transformer.needs_kv_cache else None
    inputs = vqvae.teacher_forcing_inputs(token_ids, scale_sizes).to(transformer.dtype)
    logits = guided_distribution(transformer, inputs, class_labels, scheduler, guidance_scale, kv_cache)
    config = scheduler.config
    drawn = sample_tokens(logits, config.temperature, config.top_k, config.top_p, generator)

    device = token_ids.device if generator is None else generator.device
    shares = torch.rand(len(token_ids), len(counts), generator=generator, device=device)
    places = torch.rand(token_ids.shape, generator=generator, device=device)
    replaced = places < shares.repeat_interleave(torch.tensor(counts, device=device), dim=1)
    mixed = torch.where(replaced.to(token_ids.device), drawn, token_ids)

    states = vqvae.latent_states(token_ids, scale_sizes)
    fed_back = [
        scheduler.scale_model_input(before + vqvae.residual_map(token_map, scale_sizes[-1]).float(), timestep)
        for before, token_map, timestep in zip(states, split_scales(mixed, scale_sizes)[1:], timesteps[1:])
    ]
    if kv_cache is None:
        packed = [(torch.cat(fed_back, dim=1), timesteps[1:])]
    else:
        # A scale that is fed back looks at what the first passes saw of the coarser ones: one call for each.
        packed = [(part, [timestep]) for part, timestep in zip(fed_back, timesteps[1:])]
    hidden_states = [
        transformer(
            part.to(transformer.dtype),
            which,
            class_labels,
            kv_cache=None if kv_cache is None else kv_cache.read_only(),
            return_hidden_states=True,
        ).hidden_states
        for part, which in packed
    ]
    judged = slice(counts[0], None)
    return torch.cat(hidden_states, dim=1), mixed[:, judged], (mixed == token_ids)[:, judged]


def critic_metrics(
    logits: torch.Tensor, is_right: torch.BoolTensor, scale_sizes: list[list[int]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    How well a critic judges, over all tokens and for each scale.

    Args:
        logits (`torch.Tensor` of shape `(batch, num_tokens)`): What it says.
        is_right (`torch.BoolTensor` of shape `(batch, num_tokens)`): What is true.
        scale_sizes (`list[list[int]]`): The scales of the tokens.

    Returns:
        `tuple[dict, dict]`: Scalars, and values of shape `(num_scales,)`: `"loss"`, the binary cross-entropy;
        `"accuracy"` at a probability of one half; `"auroc"`, the area under the receiver operating characteristic (one
        half where there are only right or only wrong tokens); `"right"`, the share of right tokens. Only the scalar
        loss has gradients.
    """
    counts = num_tokens_per_scale(scale_sizes)
    overall = _metrics(logits, is_right)
    parts = [_metrics(*part) for part in zip(logits.detach().split(counts, 1), is_right.split(counts, 1))]
    return overall, {name: torch.stack([part[name] for part in parts]) for name in overall}


def _metrics(logits: torch.Tensor, is_right: torch.BoolTensor) -> dict[str, torch.Tensor]:
    logits, right = logits.float(), is_right.float()
    mixed = is_right.any() and not is_right.all()
    return {
        "loss": F.binary_cross_entropy_with_logits(logits, right),
        "accuracy": ((logits.detach() > 0) == is_right).float().mean(),
        "auroc": binary_auroc(logits.detach().sigmoid(), is_right.long()) if mixed else right.new_tensor(0.5),
        "right": right.mean(),
    }
