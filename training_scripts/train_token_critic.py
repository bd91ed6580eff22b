#!/usr/bin/env python
"""
Train a token critic (`TokenCritic`) for a pipeline: a small head on its transformer that tells which of the drawn
tokens are wrong, for the resampling policy "learned".

    accelerate launch training_scripts/train_token_critic.py --train_data_dir my_images \
        --pretrained_model_name_or_path my-model --output_dir my-model-with-critic

All other parts are frozen. `output_dir` holds the whole pipeline with the critic, averaged (EMA) weights, and the
scheduler as it was: `ScaleScheduler.from_config(pipe.scheduler.config, resampling_policy="learned",
resampling_threshold=...)` makes use of the critic. A pipeline that has a critic already has that one trained further.
"""

import argparse
import sys
from pathlib import Path

from accelerate.utils import set_seed

from srdd import SRDDPipeline, TokenCritic
from srdd.training.arguments import add_token_arguments, add_training_arguments
from srdd.training.critic import train_token_critic
from srdd.training.loop import load_images, make_accelerator
from srdd.training.publish import finish_pipeline
from srdd.training.transformer import inference_scales, load_tokens_of


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser)
    add_token_arguments(parser)
    critic = parser.add_argument_group("critic")
    critic.add_argument("--pretrained_model_name_or_path", required=True, help="Folder or Hub id of a pipeline.")
    critic.add_argument("--hidden_dim", type=int, default=256, help="Width of a new critic.")
    critic.add_argument(
        "--guidance_scale", type=float, help="Of the tokens it learns to judge. Default: the pipeline's."
    )
    critic.add_argument(
        "--validation_threshold", type=float, default=0.1, help="`resampling_threshold` of pictures at validations."
    )
    args = parser.parse_args(arguments)
    args.command = [sys.argv[0], *(sys.argv[1:] if arguments is None else arguments)]
    args.token_cache_dir = args.token_cache_dir or str(Path(args.output_dir) / "tokens")
    return args


def main(args: argparse.Namespace) -> None:
    accelerator = make_accelerator(args)
    with accelerator.main_process_first():
        images = load_images(args, args.label_column or None, args.max_train_samples)
    pipe = SRDDPipeline.from_pretrained(args.pretrained_model_name_or_path).to(accelerator.device)
    for model in (pipe.vqvae, pipe.transformer):
        model.requires_grad_(False).eval()
    if args.guidance_scale is None:
        args.guidance_scale = pipe.default_guidance_scale
    args.validation_guidance_scale = args.guidance_scale
    set_seed(args.seed)  # the new weights must be the same in every process
    critic = pipe.token_critic or TokenCritic(
        pipe.transformer.config.codebook_size, pipe.transformer.dim, args.hidden_dim
    )
    set_seed(args.seed, device_specific=True)
    scale_sizes = inference_scales(pipe.scheduler)
    tokens = load_tokens_of(args, accelerator, "pretrained_model_name_or_path", pipe, images, scale_sizes)
    averaged = train_token_critic(args, accelerator, critic, pipe, tokens)
    if accelerator.is_main_process:
        finished = SRDDPipeline(pipe.vqvae, pipe.transformer, pipe.scheduler, averaged)
        finish_pipeline(args, finished, images, part="token critic")
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
