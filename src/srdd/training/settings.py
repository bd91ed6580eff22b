"""Command-line arguments that the training scripts have in common, named as in diffusers' examples."""

import argparse


def int_list(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def float_list(text: str) -> list[float]:
    """Numbers separated by commas."""
    return [float(part) for part in text.split(",")]


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the images come from."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub id or folder for `datasets.load_dataset`.")
    data.add_argument("--dataset_config_name", help="Configuration of the data set.")
    data.add_argument("--train_data_dir", help="Image folder, with one subfolder per class if there are classes.")
    data.add_argument("--image_column", default="image", help="Column of the images.")
    data.add_argument("--cache_dir", help="Cache folder of `datasets`.")
    data.add_argument("--min_image_size", type=int, default=8, help="Leave out pictures with a shorter side.")
    data.add_argument("--strict_data", action="store_true", help="Stop at unusable pictures, do not leave them out.")
    data.add_argument("--preprocessing_num_workers", type=positive_int, help="Processes that check the pictures.")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Data, optimisation, checkpoint, logging and publishing arguments."""
    add_data_arguments(parser)
    data = parser.add_argument_group("training data")
    data.add_argument("--max_train_samples", type=positive_int, help="Use only this many images.")
    data.add_argument("--random_flip", action="store_true", help="Mirror half of the images.")
    data.add_argument("--dataloader_num_workers", type=int, default=0)

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--train_batch_size", type=positive_int, default=32, help="Images per process and step.")
    optimisation.add_argument("--max_train_steps", type=positive_int, default=10_000)
    optimisation.add_argument("--gradient_accumulation_steps", type=positive_int, default=1)
    optimisation.add_argument("--learning_rate", type=float, default=1e-4)
    optimisation.add_argument(
        "--scale_lr",
        action="store_true",
        help="VAR's rule: `--learning_rate` is for 256 images a step; multiply it by their number over 256.",
    )
    optimisation.add_argument("--lr_scheduler", default="cosine", help="A schedule of `diffusers.optimization`.")
    optimisation.add_argument("--lr_warmup_steps", type=int, default=100)
    optimisation.add_argument("--adam_beta1", type=float, default=0.9)
    optimisation.add_argument("--adam_beta2", type=float, default=0.95)
    optimisation.add_argument("--adam_weight_decay", type=float, default=0.05)
    optimisation.add_argument("--adam_epsilon", type=float, default=1e-8)
    optimisation.add_argument("--max_grad_norm", type=float, default=1.0)
    optimisation.add_argument("--ema_decay", type=float, default=0.999)
    optimisation.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: accelerate's own.")
    optimisation.add_argument("--gradient_checkpointing", action="store_true", help="Less memory, more time.")
    optimisation.add_argument("--seed", type=int, default=0)

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", required=True, help="Checkpoints, logs and the finished model go here.")
    output.add_argument("--checkpointing_steps", type=positive_int, default=500)
    output.add_argument("--checkpoints_total_limit", type=positive_int, default=2)
    output.add_argument("--resume_from_checkpoint", help="'latest' or a checkpoint's name.")
    output.add_argument(
        "--logging_steps", type=positive_int, default=10, help="Steps between lines of `train_log.jsonl`."
    )
    output.add_argument(
        "--validation_steps", type=positive_int, default=500, help="Steps between validations with pictures."
    )
    output.add_argument("--num_validation_images", type=positive_int, default=16)
    output.add_argument("--logging_dir", default="logs")
    output.add_argument(
        "--report_to", default="tensorboard", help="tensorboard, wandb, trackio, another tracker of accelerate, none."
    )
    output.add_argument(
        "--save_dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="Of the finished weights."
    )

    card = parser.add_argument_group("model card and Hub")
    card.add_argument("--data_description", help="Of the training data, for the card: what, whose, which licence.")
    card.add_argument("--license", help="Licence of the finished weights: an identifier the Hub knows.")
    card.add_argument("--push_to_hub", action="store_true", help="Upload the finished folder with its card.")
    card.add_argument("--hub_model_id", help="Repository; default: the name of `output_dir`, in your account.")
    card.add_argument("--hub_token", help="Default: the token of `hf auth login`.")


def add_pixel_loss_arguments(group: argparse._ArgumentGroup) -> None:
    """What the distances between pictures weigh (`srdd.training.pixel_losses`)."""
    group.add_argument("--l1_weight", type=float, default=1.0)
    group.add_argument("--l2_weight", type=float, default=1.0)
    group.add_argument("--perceptual_weight", type=float, default=0.1, help="0 needs no EfficientNet.")


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    """Where token pyramids come from."""
    tokens = parser.add_argument_group("tokens and labels")
    tokens.add_argument(
        "--label_column", default="auto", help="Column of the labels; 'auto' is 'label' if there is one, '' is none."
    )
    tokens.add_argument("--random_crops", type=int, default=0, help="Tokenise so many random crops, not the centre.")
    tokens.add_argument("--token_cache_dir", help="Where the pyramids are kept; default: `output_dir/tokens`.")


def add_transformer_arguments(parser: argparse.ArgumentParser) -> None:
    """What training and distilling a transformer have in common."""
    add_token_arguments(parser)
    loss = parser.add_argument_group("loss")
    loss.add_argument("--label_smoothing", type=float, default=0.0)
    loss.add_argument("--scale_loss_weights", type=float_list, help="What a token of each scale counts; default: 1.")
    loss.add_argument("--validation_guidance_scale", type=float, default=2.5, help="Of the pictures at validations.")
