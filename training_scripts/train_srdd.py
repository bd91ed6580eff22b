#!/usr/bin/env python
"""
Train a scale transformer (`ScaleTransformer2DModel`) on the tokens of a multi-scale tokenizer.

    accelerate launch training_scripts/train_srdd.py --train_data_dir my_images \
        --pretrained_vqvae_name_or_path my-tokenizer --output_dir my-model

The finished pipeline, with averaged (EMA) weights, lies in `output_dir`; `SRDDPipeline.from_pretrained` loads it.
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from srdd import MultiScaleVQModel, ScaleScheduler, ScaleTransformer2DModel, SRDDPipeline
from srdd.models import ATTENTION_PATTERNS
from srdd.training.accelerator import make_accelerator
from srdd.training.attention_choice import check_attention, set_attention
from srdd.training.graceful_end import ends_gracefully
from srdd.training.lora import save_lora
from srdd.training.optimizer import make_optimizer, parameter_groups
from srdd.training.publishing import finish_pipeline
from srdd.training.settings import TransformerSettings, flag, make_parser, parse_settings
from srdd.training.token_loss import token_loss
from srdd.training.training_data import load_images, load_tokens, make_loader
from srdd.training.training_run import TrainingRun, evaluation_copy
from srdd.training.validation import draw, validate


# What LoRA adapts: attention and MLP of every block.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


@dataclass(kw_only=True)
class SRDDSettings(TransformerSettings):
    """The transformer. Starting from one, its own sizes hold."""

    pretrained_vqvae_name_or_path: str = flag(MISSING, "Folder or Hub id of the tokenizer.")
    pretrained_model_name_or_path: str | None = flag(help="Start from this transformer.")
    attention_pattern: str | None = flag(help="Default: markov, or as pretrained.", choices=ATTENTION_PATTERNS)
    num_layers: int = flag(6)
    num_attention_heads: int = flag(4)
    attention_head_dim: int = flag(64)
    per_block_adaln: bool = flag(False, "VAR's AdaLN up to 256px: three times the size.")
    class_dropout_prob: float = flag(0.1)
    drop_path_rate: float = flag(0.0)
    lora_rank: int | None = flag(help="Train a LoRA of this rank on the pretrained transformer.")
    lora_alpha: int | None = flag(help="Default: the rank.")


def parse_args(arguments: list[str] | None = None) -> SRDDSettings:
    parser = make_parser(__doc__, SRDDSettings)
    args = parse_settings(parser, SRDDSettings, arguments)
    if args.lora_rank and not args.pretrained_model_name_or_path:
        parser.error("`--lora_rank` needs `--pretrained_model_name_or_path`.")
    return args


def build_model(args: SRDDSettings, vqvae: MultiScaleVQModel, id2label: dict) -> ScaleTransformer2DModel:
    training = {"class_dropout_prob": args.class_dropout_prob, "drop_path_rate": args.drop_path_rate}
    if args.pretrained_model_name_or_path:
        if args.attention_pattern:
            training["attention_pattern"] = args.attention_pattern
        if args.attention_pattern not in (None, "markov"):
            training["attention_windows"] = None  # of MVAR; a token sees more than its own scale then
        model = ScaleTransformer2DModel.from_pretrained(args.pretrained_model_name_or_path, **training)
        for name in ("scale_sizes", "codebook_size", "latent_channels"):
            ours, theirs = model.config[name], vqvae.config[name]
            if ours != theirs:
                raise ValueError(
                    f"`pretrained_model_name_or_path` must have the tokenizer's {name}, {theirs}, got {ours}."
                )
        fit_classes(model, id2label)
        return model
    return ScaleTransformer2DModel(
        codebook_size=vqvae.config.codebook_size,
        latent_channels=vqvae.config.latent_channels,
        scale_sizes=vqvae.config.scale_sizes,
        num_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        attention_head_dim=args.attention_head_dim,
        num_classes=len(id2label),
        attention_pattern=args.attention_pattern or "markov",
        shared_adaln=not args.per_block_adaln,
        id2label=id2label,
        **training,
    )


@torch.no_grad()
def fit_classes(model: ScaleTransformer2DModel, id2label: dict[int, str]) -> None:
    """Give a pretrained transformer the classes of the data: known names stay, new ones start as the null class."""
    if model.id2label == id2label and model.config.num_classes == len(id2label):
        return
    old, null_class = model.class_embed.weight, model.config.num_classes
    old_ids = {name: index for index, name in model.id2label.items()}
    taken_from = [old_ids.get(id2label[index], null_class) for index in range(len(id2label))] + [null_class]
    model.class_embed = torch.nn.Embedding.from_pretrained(old[taken_from].clone(), freeze=False)
    model.register_to_config(
        num_classes=len(id2label), id2label={str(index): name for index, name in id2label.items()}
    )


def add_lora(model: ScaleTransformer2DModel, args: SRDDSettings) -> None:
    """Freeze all but a fresh adapter and the class embedding, which new classes need."""
    from peft import LoraConfig

    model.requires_grad_(False)
    model.add_adapter(
        LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha or args.lora_rank,
            init_lora_weights="gaussian",
            target_modules=LORA_TARGETS,
        )
    )
    model.class_embed.requires_grad_(True)


@ends_gracefully
def main(args: SRDDSettings) -> None:
    accelerator = make_accelerator(args)
    check_attention(args.attention_backend, accelerator.device)
    set_seed(args.seed)  # FSDP takes a part of the new weights from every process: they must be the same
    with accelerator.main_process_first():
        images = load_images(args, args.label_column or None, args.max_train_samples, args.seed)
    vqvae = MultiScaleVQModel.from_pretrained(args.pretrained_vqvae_name_or_path)
    vqvae.requires_grad_(False).eval().to(accelerator.device)
    model = build_model(args, vqvae, images.id2label)
    if args.lora_rank:
        add_lora(model, args)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    set_seed(args.seed, device_specific=True)
    scheduler = ScaleScheduler(scale_sizes=vqvae.config.scale_sizes)
    scale_sizes, timesteps = scheduler.scales, [scale.timestep for scale in scheduler.visits]
    tokens, validation_tokens = load_tokens(args, accelerator, vqvae, images, scale_sizes)
    loader = make_loader(args, tokens, accelerator.num_processes)
    validation_loader = DataLoader(validation_tokens, batch_size=args.train_batch_size)

    averaged = evaluation_copy(model, accelerator)
    pipe = SRDDPipeline(vqvae, averaged, scheduler)
    set_attention([model], args.attention_backend, accelerator.device)
    parameters = parameter_groups(model, args.adam_weight_decay)
    optimizer, schedule = make_optimizer(args, parameters, accelerator.num_processes, accelerator.device)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    run = TrainingRun(
        args, accelerator, model, schedule, images=images, frozen={"tokenizer": vqvae}, unit="tok",
        units_per_image=scheduler.num_tokens,
    )  # fmt: skip
    for batch in run.batches(loader):
        with accelerator.accumulate(model):
            token_ids = batch["token_ids"]
            inputs = vqvae.teacher_forcing_inputs(token_ids, scale_sizes)
            logits = model(inputs, timestep=timesteps, **batch["conditions"]).sample
            result = token_loss(logits, token_ids, scale_sizes, args.label_smoothing, args.scale_loss_weights)
            losses = {"loss": result.loss, **result.by_scale(scale_sizes)}
            run.check_finite(losses)
            accelerator.backward(losses["loss"])
            run.clip_gradients(model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            run.add_batch(losses)
            continue
        run.finish_step(losses)
        if run.is_due(args.validation_steps):
            run.copy_averages_to(averaged)
            if accelerator.is_main_process:
                metrics = validate(pipe, validation_loader)
                pictures = draw(pipe, args.num_validation_images, args.validation_guidance_scale, args.seed)
                run.record_validation(metrics, "samples", pictures)
        run.checkpoint()

    run.copy_averages_to(averaged)
    run.close()
    if accelerator.is_main_process:
        if args.lora_rank:
            save_lora(averaged, Path(args.output_dir) / "lora")
            averaged.fuse_lora()
            averaged.unload_lora()
        finish_pipeline(args, pipe, images, args.validation_guidance_scale, resumed=run.resumed)
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
