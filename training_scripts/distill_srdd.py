#!/usr/bin/env python
"""
Distil a pipeline to fewer scales, and, if asked to, to sampling without guidance.

    accelerate launch training_scripts/distill_srdd.py --teacher my-model --train_data_dir my_images \
        --scales 1,3,5,8,13,16 --scales 1,5,8,13,16 --output_dir my-student

Each `--scales` is a stage that starts from the one before (progressive pruning). The last student lies in
`output_dir`, with a scheduler of its scales, earlier ones in `output_dir/stage-N`; all load as pipelines.

By default the loss is the paper's, cross-entropy on the data. `--kl_weight` adds the divergence from the teacher at
the same scales. `--guidance_scale` makes the teacher's guided distribution the target: the student then needs no
guidance, and sampling no second half. That is exact for the teacher's own scales, the default of `--scales`.

`--schedules` makes one student for several schedules, in one stage: each step learns one of them.
"""

from dataclasses import MISSING, dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from diffusers.utils import logging

from srdd import ScaleScheduler, SRDDPipeline
from srdd.pipelines.model_folders import CARD
from srdd.training.accelerator import make_accelerator, on_main_process
from srdd.training.attention_choice import check_attention, set_attention
from srdd.training.checkpoints import checkpoint_step, list_checkpoints
from srdd.training.graceful_end import ends_gracefully
from srdd.training.guided_distillation import guided_divergence
from srdd.training.optimizer import make_optimizer, parameter_groups
from srdd.training.output_lock import lock_output_dir
from srdd.training.pretrained import forget_guidance
from srdd.training.publishing import finish_pipeline
from srdd.training.run_identity import check_checkpoint, run_identity
from srdd.training.settings import (
    OPTIMIZATION_MAY_CHANGE,
    TransformerSettings,
    flag,
    int_list,
    make_parser,
    parse_settings,
)
from srdd.training.token_loss import token_loss
from srdd.training.trained_schedules import TrainedSchedules
from srdd.training.training_data import load_images, load_tokens, make_loader, make_validation_loader
from srdd.training.training_run import TrainingRun, evaluation_copy
from srdd.training.validation import draw, validate


logger = logging.get_logger(__name__)


@dataclass(kw_only=True)
class DistillationSettings(TransformerSettings):
    """Distillation."""

    teacher: str = flag(MISSING, "Folder or Hub id of a pipeline.")
    scales: list[list[int]] | None = flag(
        help="Sides of a stage's scales, coarse to fine; repeatable.", type=int_list, action="append"
    )
    ce_weight: float | None = flag(help="Default: 1, or 0 with `--guidance_scale`.")
    kl_weight: float | None = flag(help="Default: 0, or 1 with `--guidance_scale`.")
    guidance_scale: float = flag(1.0, "Of the teacher; above 1 it is learned.")


def parse_args(arguments: list[str] | None = None) -> DistillationSettings:
    parser = make_parser(__doc__, DistillationSettings)
    args = parse_settings(parser, DistillationSettings, arguments)
    guided = args.guidance_scale > 1
    args.ce_weight = (0.0 if guided else 1.0) if args.ce_weight is None else args.ce_weight
    args.kl_weight = (1.0 if guided else 0.0) if args.kl_weight is None else args.kl_weight
    if min(args.ce_weight, args.kl_weight) < 0 or args.ce_weight + args.kl_weight == 0:
        parser.error("`--ce_weight` and `--kl_weight` must not be negative, nor both be zero.")
    if guided and args.kl_weight == 0:
        parser.error("`--guidance_scale` needs a positive `--kl_weight`.")
    if args.scales and args.schedules:
        parser.error("`--scales` must be left out with `--schedules`, which one student learns in one stage.")
    return args


def stages(args: DistillationSettings, config: dict) -> list[tuple[Path, TrainedSchedules]]:
    """Folder and schedules of every stage; a schedule that the weights do not know is an error."""
    schedulers = [ScaleScheduler.from_config(config, scales=scales) for scales in args.scales or [config["scales"]]]
    folders = [Path(args.output_dir) / f"stage-{index}" for index in range(1, len(schedulers))]
    schedules = [TrainedSchedules.from_settings(args, scheduler) for scheduler in schedulers]
    return list(zip([*folders, Path(args.output_dir)], schedules))


def check_classes(id2label: dict[int, str], teacher: dict[int, str]) -> None:
    """Images without labels are fine: they are of the null class."""
    if id2label and id2label != teacher:
        raise ValueError(
            f"`teacher` must know the classes of the data, {sorted(id2label.values())}, got"
            f" {sorted(teacher.values())}."
        )


def run_stage(args: DistillationSettings, source: str, schedules: TrainedSchedules, root: str) -> None:
    """Train one student, from the weights in `source`, into `args.output_dir`, in or below `root`."""
    accelerator = make_accelerator(args)
    on_main_process(accelerator, lambda: lock_output_dir(root))
    check_attention(args.attention_backend, accelerator.device)
    set_seed(args.seed, device_specific=True)
    with accelerator.main_process_first():
        images = load_images(args, args.label_column or None, args.max_train_samples, args.seed)
    teacher_pipe = SRDDPipeline.from_pretrained(args.teacher).to(accelerator.device)
    vqvae, teacher = teacher_pipe.vqvae.requires_grad_(False), teacher_pipe.transformer.requires_grad_(False).eval()
    check_classes(images.id2label, teacher.id2label)
    guided = args.guidance_scale > 1
    null_class = teacher.config.num_classes
    dropout = 0.0 if guided else teacher.config.class_dropout_prob
    # Labels are dropped below, for teacher and student alike.
    model = type(teacher).from_pretrained(source, subfolder="transformer", class_dropout_prob=0.0)
    if args.kl_weight == 0:
        forget_guidance(model)
    elif guided:  # else it learns what the teacher knows of guidance
        model.register_to_config(guidance_distilled=True)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    tokens, validation_tokens, psnr = load_tokens(args, accelerator, vqvae, images, schedules)
    if not images.id2label:
        tokens.labels[:] = validation_tokens.labels[:] = null_class
    loader = make_loader(args, tokens, accelerator.num_processes)
    validation_loader = make_validation_loader(args, validation_tokens)

    averaged = evaluation_copy(model, accelerator)
    pipe = SRDDPipeline(vqvae, averaged, schedules.first)
    set_attention([model, teacher], args.attention_backend, accelerator.device, len(schedules.schedulers))
    parameters = parameter_groups(model, args.adam_weight_decay)
    optimizer, schedule = make_optimizer(args, parameters, accelerator.num_processes, accelerator.device)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    run = TrainingRun(
        args, accelerator, model, schedule, images=images, frozen={"tokenizer": vqvae, "teacher": teacher},
        unit="tok", units_per_image=schedules.mean_num_tokens,
    )  # fmt: skip
    for batch in run.batches(loader):
        with accelerator.accumulate(model):
            scheduler, token_ids = schedules.of_step(run.step, batch["token_ids"])
            scale_sizes, timesteps = scheduler.scales, [scale.timestep for scale in scheduler.visits]
            labels = batch["conditions"]["class_labels"]
            labels = torch.where(torch.rand(labels.shape, device=labels.device) < dropout, null_class, labels)
            inputs = vqvae.teacher_forcing_inputs(token_ids, scale_sizes)
            logits = model(inputs, timestep=timesteps, class_labels=labels).sample
            result = token_loss(logits, token_ids, scale_sizes, args.label_smoothing, args.scale_loss_weights)
            losses = {"loss": args.ce_weight * result.loss, "cross_entropy": result.loss}
            if args.kl_weight > 0:
                losses["kl"] = guided_divergence(logits, teacher, inputs, labels, scheduler, args.guidance_scale)
                losses["loss"] = losses["loss"] + args.kl_weight * losses["kl"]
            losses.update(result.by_scale(scale_sizes))
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
                metrics = validate(pipe, validation_loader, schedules)
                pictures = draw(pipe, args.num_validation_images, args.validation_guidance_scale, args.seed)
                run.record_validation(metrics, "samples", pictures)
        run.checkpoint()

    run.copy_averages_to(averaged)
    run.close()
    if accelerator.is_main_process:
        averaged.register_to_config(class_dropout_prob=teacher.config.class_dropout_prob)
        finish_pipeline(args, pipe, images, args.validation_guidance_scale, resumed=run.resumed, tokenizer_psnr=psnr)
    accelerator.wait_for_everyone()


def is_finished(folder: Path, max_train_steps: int) -> bool:
    """Whether a stage is done, with as many steps as are asked for as far as its checkpoints tell."""
    steps = [checkpoint_step(checkpoint) for checkpoint in list_checkpoints(folder)[-1:]]
    return all((folder / name).is_file() for name in ("model_index.json", CARD)) and steps in ([], [max_train_steps])


def check_finished_stage(args: DistillationSettings) -> None:
    """Refuse a finished stage of another run, and say where it was trained with what is no longer asked for."""
    accelerator = make_accelerator(replace(args, report_to="none"))
    with accelerator.main_process_first():
        images = load_images(args, args.label_column or None, args.max_train_samples, args.seed)
    teacher = SRDDPipeline.from_pretrained(args.teacher)
    frozen = {"tokenizer": teacher.vqvae, "teacher": teacher.transformer}

    def check() -> None:
        checkpoints = list_checkpoints(args.output_dir)
        if not checkpoints:
            logger.warning(f"The finished stage {args.output_dir!r} has no checkpoint: nothing is compared.")
            return
        identity = run_identity(args, accelerator.num_processes, images, frozen=frozen)
        changes, _ = check_checkpoint(args, checkpoints[-1], identity)
        kept = [
            f"`{name}` {old!r} (now: {new!r})"
            for name, (old, new) in changes.items()
            if name in OPTIMIZATION_MAY_CHANGE
        ]
        if kept:
            logger.warning(f"The finished stage {args.output_dir!r} stays as it is, trained with {', '.join(kept)}.")

    on_main_process(accelerator, check)


@ends_gracefully
def main(args: DistillationSettings) -> None:
    source = args.teacher
    config = ScaleScheduler.load_config(args.teacher, subfolder="scheduler")
    plan = stages(args, config)
    for index, (folder, schedules) in enumerate(plan, start=1):
        is_last = index == len(plan)
        stage = replace(
            args,
            output_dir=str(folder),
            push_to_hub=args.push_to_hub and is_last,
            scales=args.scales and args.scales[:index],
        )
        # The last one is a run like those of other scripts: a finished one is published, or refused.
        if args.resume_from_checkpoint and not is_last and is_finished(folder, args.max_train_steps):
            check_finished_stage(stage)
            logger.info(f"Stage {index} of {len(plan)} is finished.")
        else:
            run_stage(stage, str(source), schedules, args.output_dir)
        source = folder
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
