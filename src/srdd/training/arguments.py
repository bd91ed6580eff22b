"""Command-line arguments that the training scripts have in common, named as in diffusers' examples."""

import argparse


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Data, optimisation, checkpoint and logging arguments."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub id or folder for `datasets.load_dataset`.")
    data.add_argument("--dataset_config_name", help="Configuration of the data set.")
    data.add_argument("--train_data_dir", help="Image folder with one subfolder per class.")
    data.add_argument("--image_column", default="image", help="Column of the images.")
    data.add_argument("--cache_dir", help="Cache folder of `datasets`.")
    data.add_argument("--max_train_samples", type=int, help="Use only this many images.")
    data.add_argument("--center_crop", action="store_true", help="Crop in the centre instead of at random.")
    data.add_argument("--random_flip", action="store_true", help="Mirror half of the images.")
    data.add_argument("--dataloader_num_workers", type=int, default=0)

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--train_batch_size", type=int, default=32, help="Images per process and step.")
    optimisation.add_argument("--max_train_steps", type=int, default=10_000)
    optimisation.add_argument("--gradient_accumulation_steps", type=int, default=1)
    optimisation.add_argument("--learning_rate", type=float, default=1e-4)
    optimisation.add_argument("--lr_scheduler", default="cosine", help="A schedule of `diffusers.optimization`.")
    optimisation.add_argument("--lr_warmup_steps", type=int, default=100)
    optimisation.add_argument("--adam_beta1", type=float, default=0.9)
    optimisation.add_argument("--adam_beta2", type=float, default=0.95)
    optimisation.add_argument("--adam_weight_decay", type=float, default=0.05)
    optimisation.add_argument("--adam_epsilon", type=float, default=1e-8)
    optimisation.add_argument("--max_grad_norm", type=float, default=1.0)
    optimisation.add_argument("--ema_decay", type=float, default=0.999)
    optimisation.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: accelerate's own.")
    optimisation.add_argument("--seed", type=int, default=0)

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", required=True, help="Checkpoints, logs and the finished model go here.")
    output.add_argument("--checkpointing_steps", type=int, default=500)
    output.add_argument("--checkpoints_total_limit", type=int, default=2)
    output.add_argument("--resume_from_checkpoint", help="'latest' or a checkpoint's name.")
    output.add_argument("--validation_steps", type=int, default=500, help="Steps between validations with pictures.")
    output.add_argument("--num_validation_images", type=int, default=16)
    output.add_argument("--logging_dir", default="logs")
    output.add_argument("--report_to", default="tensorboard", help="A tracker of accelerate, or 'none'.")
