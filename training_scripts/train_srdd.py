#!/usr/bin/env python
"""
Train a scale transformer (`ScaleTransformer2DModel`) on the tokens of a multi-scale tokenizer.

    accelerate launch training_scripts/train_srdd.py --train_data_dir my_images \
        --pretrained_vqvae_name_or_path my-tokenizer --output_dir my-model

A pipeline that draws from texts is trained further on pictures with captions:

    accelerate launch training_scripts/train_srdd.py --pretrained_model_name_or_path switti-512 \
        --train_data_dir my_captioned_images --lora_rank 16 --output_dir my-model

The finished pipeline, with averaged (EMA) weights, lies in `output_dir`; `SRDDPipeline.from_pretrained`, or
`SRDDTextPipeline.from_pretrained`, loads it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import send_to_device, set_seed

from srdd import (
    MultiScaleVQModel,
    ScaleHistoryTransformer2DModel,
    ScaleScheduler,
    ScaleTextTransformer2DModel,
    ScaleTransformer2DModel,
    SRDDPipeline,
    SRDDTextPipeline,
)
from srdd.models import ATTENTION_PATTERNS, ScaleTransformer
from srdd.pipelines.scale_pipeline import check_components
from srdd.training.accelerator import make_accelerator
from srdd.training.attention_choice import check_attention, set_attention
from srdd.training.condition_dropout import drop_conditions
from srdd.training.graceful_end import ends_gracefully
from srdd.training.lora import save_lora
from srdd.training.optimizer import make_optimizer, parameter_groups
from srdd.training.pretrained import (
    find_transformer,
    forget_guidance,
    load_tokenizer,
    take_codebook,
    warn_of_other_tokens,
)
from srdd.training.publishing import finish_pipeline
from srdd.training.settings import TransformerSettings, flag, make_parser, parse_settings, probability, refuse_given
from srdd.training.token_loss import token_loss
from srdd.training.trained_schedules import TrainedSchedules
from srdd.training.training_data import load_images, load_prompts, load_tokens, make_loader, make_validation_loader
from srdd.training.training_run import TrainingRun, evaluation_copy
from srdd.training.validation import draw, validate, whole_rows


# What LoRA adapts: attention and MLP of every block.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]

# Settings that say nothing to the other kind of pipeline, which draws from texts or by class.
ONLY_CLASSES = ("label_column", "class_dropout_prob", "drop_path_rate")
ONLY_TEXTS = ("caption_column", "proportion_empty_prompts", "validation_prompts")


@dataclass(kw_only=True)
class SRDDSettings(TransformerSettings):
    """The transformer. Starting from one, its own sizes hold."""

    pretrained_vqvae_name_or_path: str | None = flag(help="Folder or Hub id of the tokenizer or of a pipeline.")
    pretrained_model_name_or_path: str | None = flag(
        help="Start from this transformer, or that of a pipeline; the tokenizer of one that draws from texts is the"
        " default."
    )
    attention_pattern: str | None = flag(help="Default: markov, or as pretrained.", choices=ATTENTION_PATTERNS)
    num_layers: int = flag(6)
    num_attention_heads: int = flag(4)
    attention_head_dim: int = flag(64)
    per_block_adaln: bool = flag(False, "VAR's AdaLN up to 256px: three times the size.")
    class_dropout_prob: float = flag(0.1)
    drop_path_rate: float = flag(0.0)
    lora_rank: int | None = flag(help="Train a LoRA of this rank on the pretrained transformer.")
    lora_alpha: int | None = flag(help="Default: the rank.")
    learning_rate: float | None = flag(
        help="Default: 1e-3 for a new transformer, 1e-4 for a pretrained one and, as VAR's, with `--scale_lr`."
    )
    caption_column: str = flag("text", "Column of the texts, or their key in `metadata.jsonl`.")
    proportion_empty_prompts: float = flag(0.1, "Share of texts replaced by the empty one.", type=probability)
    validation_prompts: list[str] | None = flag(
        help="Texts of the pictures at validations; default: captions.", nargs="+", type=str
    )

    def __post_init__(self):
        super().__post_init__()
        if self.learning_rate is None:
            self.learning_rate = 1e-4 if self.pretrained_model_name_or_path or self.scale_lr else 1e-3


def parse_args(arguments: list[str] | None = None) -> SRDDSettings:
    parser = make_parser(__doc__, SRDDSettings)
    args = parse_settings(parser, SRDDSettings, arguments)
    if args.lora_rank and not args.pretrained_model_name_or_path:
        parser.error("`--lora_rank` needs `--pretrained_model_name_or_path`.")
    if not args.pretrained_vqvae_name_or_path and not args.pretrained_model_name_or_path:
        parser.error("`--pretrained_vqvae_name_or_path` is needed, or a pipeline to start from.")
    return args


def draws_from_texts(name: str | None) -> bool:
    """Whether a folder or repository is a pipeline that draws from texts."""
    if name is None:
        return False
    try:
        return "text_encoder" in SRDDTextPipeline.load_config(name)
    except OSError:  # no pipeline
        return False


def check_settings(args: SRDDSettings, is_text: bool) -> None:
    """Refuse settings that would mean nothing, texts that no picture would show, and a model without a tokenizer."""
    how, others = ("from texts", ONLY_CLASSES) if is_text else ("by class", ONLY_TEXTS)
    refuse_given(args, others, f"with a model that draws {how}")
    if not is_text and not args.pretrained_vqvae_name_or_path:
        raise ValueError(
            "`pretrained_vqvae_name_or_path` must be given, or a pipeline that draws from texts as"
            f" `pretrained_model_name_or_path`, got {args.pretrained_model_name_or_path!r}."
        )
    shown, prompts = whole_rows(args.num_validation_images), args.validation_prompts or []
    if len(prompts) > shown:
        raise ValueError(
            f"`validation_prompts` must be at most {shown} texts, one for each picture that is shown, got"
            f" {len(prompts)}. `num_validation_images` is {args.num_validation_images}; of more than eight, full rows"
            " of eight are shown."
        )


def load_text_pipeline(args: SRDDSettings) -> SRDDTextPipeline:
    """The pipeline to start from."""
    name, components = args.pretrained_model_name_or_path, {}
    if args.pretrained_vqvae_name_or_path:
        components["vqvae"] = load_tokenizer("pretrained_vqvae_name_or_path", args.pretrained_vqvae_name_or_path)
    if args.attention_pattern:
        components["transformer"] = ScaleTextTransformer2DModel.from_pretrained(
            name, subfolder="transformer", attention_pattern=args.attention_pattern
        )
    pipe = SRDDTextPipeline.from_pretrained(name, **components)
    take_codebook(pipe.transformer, pipe.vqvae)
    forget_guidance(pipe.transformer)
    check_components(pipe.vqvae, pipe.transformer, pipe.scheduler)
    pipe.check_text_components()
    if not pipe.encodes_texts:
        raise ValueError(
            f"`pretrained_model_name_or_path` must have two text encoders with their tokenizers, got {name!r}."
        )
    return pipe


def make_class_pipeline(args: SRDDSettings, id2label: dict) -> SRDDPipeline:
    """A pipeline for the classes of the data, new or with the transformer to start from."""
    vqvae = load_tokenizer("pretrained_vqvae_name_or_path", args.pretrained_vqvae_name_or_path)
    model = build_model(args, vqvae, id2label)
    return SRDDPipeline(vqvae, model, ScaleScheduler(scale_sizes=vqvae.config.scale_sizes))


def build_model(
    args: SRDDSettings, vqvae: MultiScaleVQModel, id2label: dict
) -> ScaleTransformer2DModel | ScaleHistoryTransformer2DModel:
    training = {"class_dropout_prob": args.class_dropout_prob, "drop_path_rate": args.drop_path_rate}
    if args.pretrained_model_name_or_path:
        name = args.pretrained_model_name_or_path
        config, subfolder = find_transformer("pretrained_model_name_or_path", name)
        if "cross_attention_dim" in config:
            raise ValueError(
                "`pretrained_model_name_or_path` must be a whole pipeline where the transformer draws from texts, got"
                f" {name!r}."
            )
        kind = ScaleHistoryTransformer2DModel if "history_window" in config else ScaleTransformer2DModel
        if args.attention_pattern:
            training["attention_pattern"] = args.attention_pattern
        if args.attention_pattern not in (None, "markov") and kind is ScaleTransformer2DModel:
            training["attention_windows"] = None  # of MVAR; a token sees more than its own scale then
        model = kind.from_pretrained(name, subfolder=subfolder, **training)
        for size in ("scale_sizes", "codebook_size", "latent_channels"):
            ours, theirs = model.config[size], vqvae.config[size]
            if ours != theirs:
                raise ValueError(
                    f"`pretrained_model_name_or_path` must have the tokenizer's {size}, {theirs}, got {ours}."
                )
        take_codebook(model, vqvae)
        forget_guidance(model)
        fit_classes(model, id2label)
        return model
    return ScaleTransformer2DModel(
        codebook_size=vqvae.config.codebook_size,
        latent_channels=vqvae.config.latent_channels,
        codebook_fingerprint=vqvae.config.codebook_fingerprint,
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
def fit_classes(model: ScaleTransformer2DModel | ScaleHistoryTransformer2DModel, id2label: dict[int, str]) -> None:
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


def add_lora(model: ScaleTransformer, args: SRDDSettings) -> None:
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
    if hasattr(model, "class_embed"):
        model.class_embed.requires_grad_(True)


@ends_gracefully
def main(args: SRDDSettings) -> None:
    is_text = draws_from_texts(args.pretrained_model_name_or_path)
    check_settings(args, is_text)
    accelerator = make_accelerator(args)
    check_attention(args.attention_backend, accelerator.device)
    set_seed(args.seed)  # FSDP takes a part of the new weights from every process: they must be the same
    caption_column = args.caption_column if is_text else None
    with accelerator.main_process_first():
        images = load_images(args, args.label_column or None, args.max_train_samples, args.seed, caption_column)
    pipe = load_text_pipeline(args) if is_text else make_class_pipeline(args, images.id2label)
    vqvae, model, schedules = pipe.vqvae, pipe.transformer, TrainedSchedules.from_settings(args, pipe.scheduler)
    vqvae.requires_grad_(False).eval().to(accelerator.device)
    if args.lora_rank:
        add_lora(model, args)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    set_seed(args.seed, device_specific=True)
    tokens, validation_tokens, psnr = load_tokens(args, accelerator, vqvae, images, schedules, pipe)
    texts = prompts = empty_text = None
    if is_text:
        texts, prompts = load_prompts(args, accelerator, pipe, images)
        empty_text = send_to_device(prompts[0], accelerator.device)
    loader = make_loader(args, tokens, accelerator.num_processes)
    validation_loader = make_validation_loader(args, validation_tokens)

    averaged = evaluation_copy(model, accelerator)
    set_attention([model], args.attention_backend, accelerator.device, len(schedules.schedulers))
    parameters = parameter_groups(model, args.adam_weight_decay)
    optimizer, schedule = make_optimizer(args, parameters, accelerator.num_processes, accelerator.device)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    encoders = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    run = TrainingRun(
        args, accelerator, model, schedule, images=images, frozen={"tokenizer": vqvae, **encoders}, unit="tok",
        units_per_image=schedules.mean_num_tokens,
    )  # fmt: skip
    pipe = type(pipe)(vqvae, averaged, schedules.first)
    del encoders  # all texts are encoded
    for batch in run.batches(loader):
        with accelerator.accumulate(model):
            scheduler, token_ids = schedules.of_step(run.step, batch["token_ids"])
            scale_sizes, timesteps = scheduler.scales, [scale.timestep for scale in scheduler.visits]
            conditions = drop_conditions(batch["conditions"], empty_text, args.proportion_empty_prompts)
            inputs = vqvae.teacher_forcing_inputs(token_ids, scale_sizes)
            logits = model(inputs, timestep=timesteps, **conditions).sample
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
        if run.step == 1 and args.pretrained_model_name_or_path:
            warn_of_other_tokens(losses["loss"].item(), vqvae.config.codebook_size)
        if run.is_due(args.validation_steps):
            run.copy_averages_to(averaged)
            if accelerator.is_main_process:
                metrics = validate(pipe, validation_loader, schedules)
                pictures = draw(pipe, args.num_validation_images, args.validation_guidance_scale, args.seed, prompts)
                run.record_validation(metrics, "samples", pictures)
        run.checkpoint()

    run.copy_averages_to(averaged)
    run.close()
    if accelerator.is_main_process:
        if args.lora_rank:
            save_lora(averaged, Path(args.output_dir) / "lora")
            averaged.fuse_lora()
            averaged.unload_lora()
        if is_text:
            pipe = SRDDTextPipeline.from_pretrained(
                args.pretrained_model_name_or_path, vqvae=vqvae, transformer=averaged, scheduler=schedules.first
            )
        finish_pipeline(
            args, pipe, images, args.validation_guidance_scale, resumed=run.resumed, prompts=texts, tokenizer_psnr=psnr
        )
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
