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
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import set_seed
from diffusers.utils import logging

from srdd import ScaleScheduler, ScaleTransformer2DModel, SRDDPipeline
from srdd.training.accelerator import make_accelerator
from srdd.training.guided_distillation import guided_distribution
from srdd.training.publishing import CARD, finish_pipeline
from srdd.training.settings import add_training_arguments, add_transformer_arguments, int_list
from srdd.training.training_data import load_images, load_tokens_of
from srdd.training.training_run import cross_entropy, train_transformer


logger = logging.get_logger(__name__)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser)
    add_transformer_arguments(parser)
    distillation = parser.add_argument_group("distillation")
    distillation.add_argument("--teacher", required=True, help="Folder or Hub id of a pipeline.")
    distillation.add_argument(
        "--scales", type=int_list, action="append", help="Sides of a stage's scales, coarse to fine; repeatable."
    )
    distillation.add_argument("--ce_weight", type=float, help="Default: 1, or 0 with `--guidance_scale`.")
    distillation.add_argument("--kl_weight", type=float, help="Default: 0, or 1 with `--guidance_scale`.")
    distillation.add_argument(
        "--guidance_scale", type=float, default=1.0, help="Of the teacher; above 1 it is learned."
    )
    args = parser.parse_args(arguments)
    args.command = [sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    args.token_cache_dir = args.token_cache_dir or str(Path(args.output_dir) / "tokens")
    guided = args.guidance_scale > 1
    args.ce_weight = (0.0 if guided else 1.0) if args.ce_weight is None else args.ce_weight
    args.kl_weight = (1.0 if guided else 0.0) if args.kl_weight is None else args.kl_weight
    if min(args.ce_weight, args.kl_weight) < 0 or args.ce_weight + args.kl_weight == 0:
        parser.error("`--ce_weight` and `--kl_weight` must not be negative, nor both be zero.")
    if guided and args.kl_weight == 0:
        parser.error("`--guidance_scale` needs a positive `--kl_weight`.")
    return args


def stages(args: argparse.Namespace, config: dict) -> list[tuple[Path, ScaleScheduler]]:
    """Folder and schedule of every stage; a schedule that the weights do not know is an error."""
    schedules = [ScaleScheduler.from_config(config, scales=scales) for scales in args.scales or [config["scales"]]]
    folders = [Path(args.output_dir) / f"stage-{index}" for index in range(1, len(schedules))]
    return list(zip([*folders, Path(args.output_dir)], schedules))


def run_stage(args: argparse.Namespace, source: str, scheduler: ScaleScheduler) -> None:
    """Train one student, from the weights in `source`, into `args.output_dir`."""
    accelerator = make_accelerator(args)
    set_seed(args.seed, device_specific=True)
    with accelerator.main_process_first():
        images = load_images(args, args.label_column or None, args.max_train_samples)
    teacher_pipe = SRDDPipeline.from_pretrained(args.teacher).to(accelerator.device)
    vqvae, teacher = teacher_pipe.vqvae.requires_grad_(False), teacher_pipe.transformer.requires_grad_(False).eval()
    guided = args.guidance_scale > 1
    # Labels are dropped below, for teacher and student alike.
    model = ScaleTransformer2DModel.from_pretrained(
        source, subfolder="transformer", class_dropout_prob=0.0, guidance_distilled=guided
    )
    null_class = teacher.config.num_classes
    dropout = 0.0 if guided else teacher.config.class_dropout_prob
    tokens = load_tokens_of(args, accelerator, "teacher", teacher_pipe, images, scheduler.scales)
    loss = cross_entropy(args, vqvae, scheduler)

    def compute_loss(model, batch):
        dropped = torch.rand(batch["labels"].shape, device=batch["labels"].device) < dropout
        labels = torch.where(dropped, null_class, batch["labels"])
        logits, result = loss(model, {**batch, "labels": labels})
        losses = {"loss": args.ce_weight * result.loss, "cross_entropy": result.loss}
        if args.kl_weight > 0:
            with torch.no_grad():
                inputs = vqvae.teacher_forcing_inputs(batch["token_ids"], scheduler.scales)
                wanted = guided_distribution(teacher, inputs, labels, scheduler, args.guidance_scale)
            drawn = logits.float().log_softmax(dim=-1)
            losses["kl"] = F.kl_div(drawn.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean")
            losses["loss"] = losses["loss"] + args.kl_weight * losses["kl"]
        return losses, result

    averaged = train_transformer(args, accelerator, model, vqvae, tokens, scheduler, compute_loss)
    if accelerator.is_main_process:
        averaged.register_to_config(class_dropout_prob=teacher.config.class_dropout_prob)
        finish_pipeline(args, SRDDPipeline(vqvae, averaged, scheduler), images)
    accelerator.wait_for_everyone()


def main(args: argparse.Namespace) -> None:
    source = args.teacher
    config = ScaleScheduler.load_config(args.teacher, subfolder="scheduler")
    plan = stages(args, config)
    for index, (folder, scheduler) in enumerate(plan, start=1):
        if args.resume_from_checkpoint and all((folder / name).is_file() for name in ("model_index.json", CARD)):
            logger.info(f"Stage {index} of {len(plan)} is finished.")
        else:
            stage_args = copy.copy(args)
            stage_args.output_dir = str(folder)
            stage_args.push_to_hub = args.push_to_hub and index == len(plan)
            run_stage(stage_args, str(source), scheduler)
        source = folder
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
