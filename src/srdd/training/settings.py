"""
Settings of the training scripts, grouped by what they are about: one definition of each flag, named as in diffusers'
examples. A script has a class of its own that inherits the groups it needs.
"""

import argparse
import copy
import inspect
import sys
from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, dataclass, field, fields
from types import UnionType
from typing import Any, TypeVar, get_args

from diffusers.optimization import SchedulerType

from srdd.schedulers.scheduling_scale import GUIDANCE_SCHEDULES, RESAMPLING_POLICIES, ScaleScheduler


Settings = TypeVar("Settings")

# Schedules of the learning rate: those of diffusers but for the one that needs rules of its own.
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]

# A resumed run must have the settings of its checkpoint, but for these. They hold from then on, and are said.
# The first of them shape what is learned, and stand in the model card.
OPTIMIZATION_MAY_CHANGE = {
    *("max_train_steps", "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2"),
    *("adam_weight_decay", "adam_epsilon", "max_grad_norm", "ema_decay", "discriminator_learning_rate"),
}
MAY_CHANGE = {
    *OPTIMIZATION_MAY_CHANGE,
    *("train_data_dir", "dataset_name", "strict_data", "preprocessing_num_workers", "dataloader_num_workers"),
    *("pretrained_vqvae_name_or_path", "pretrained_vae_name_or_path", "pretrained_model_name_or_path"),
    "teacher",  # what is there, is compared, as of these
    *("gradient_checkpointing", "attention_backend", "usage_warning"),
    *("checkpointing_steps", "checkpoints_total_limit", "logging_steps", "validation_steps", "num_validation_images"),
    *("validation_guidance_scale", "validation_prompts", "report_to", "save_dtype", "data_description", "license"),
    *("push_to_hub", "hub_model_id", "with_code"),
}

# Where things lie on this machine, and what is nobody's business. Checkpoints do not hold these.
UNRECORDED = {
    *("output_dir", "logging_dir", "cache_dir", "token_cache_dir", "resume_from_checkpoint", "hub_token", "command"),
}


def int_list(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    return [int(number) for number in text.split(",")]


def dashed_ints(text: str) -> list[int]:
    """Whole numbers joined by dashes."""
    return [int(number) for number in text.split("-")]


def float_list(text: str) -> list[float]:
    """Numbers separated by commas."""
    return [float(number) for number in text.split(",")]


def bounded(kind: type, is_allowed: Callable[[Any], bool], rule: str) -> Callable[[str], Any]:
    """A type of `argparse`: numbers that are allowed, and what is said of others."""

    def parse_text(text: str) -> Any:
        number = kind(text)
        if not is_allowed(number):
            raise argparse.ArgumentTypeError(f"{rule}, got {number}")
        return number

    parse_text.__name__ = kind.__name__  # of what is no number at all, argparse says that it is no `int`
    return parse_text


positive_int = bounded(int, lambda number: number >= 1, "must be at least 1")
probability = bounded(float, lambda number: 0 <= number <= 1, "must lie in [0, 1]")
share = bounded(float, lambda number: 0 < number <= 1, "must lie in (0, 1]")
non_negative_float = bounded(float, lambda number: number >= 0, "must not be negative")


def flag(default: Any = None, help: str | None = None, **options: Any) -> Any:
    """
    A field of a dataclass that the command line may set.

    Args:
        default (`Any`, *optional*): Its default; `MISSING` if it must be given.
        help (`str`, *optional*): What `--help` says of it.
        options: What else `argparse` takes, such as a `type` that the annotation does not tell.
    """
    return field(default=default, metadata={"help": help, **options})


def add_arguments(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add the flags of a settings class to a parser, in a group for each class that it inherits from."""
    missing = {setting.name: setting for setting in fields(settings) if setting.metadata}
    for owner in settings.__mro__:
        names = [name for name in inspect.get_annotations(owner) if name in missing]
        group = parser.add_argument_group((owner.__doc__ or owner.__name__).strip(". ")) if names else None
        for setting in map(missing.pop, names):
            group.add_argument(f"--{setting.name}", **_options(setting))


def _options(setting: Field) -> dict[str, Any]:
    """What `argparse` is told of a field: what annotation and default imply, and what the field says itself."""
    if setting.type is bool:
        return {"action": "store_true", **setting.metadata}
    # Without the `None` of a field that need not be given.
    kind = get_args(setting.type)[0] if isinstance(setting.type, UnionType) else setting.type
    parse_text = {list[int]: int_list, list[float]: float_list}.get(kind, kind)
    given = {"required": True} if setting.default is MISSING else {"default": setting.default}
    return {"type": parse_text, **given, **setting.metadata}


def one_or_list(text: str) -> int | list[int]:
    """An integer, or one for each scale."""
    values = int_list(text)
    return values[0] if len(values) == 1 else values


# Of scripts that draw with a pipeline: what they may change of its scheduler.
SCHEDULER_OPTIONS = {
    "scales": {"type": int_list, "help": "Scales to visit, such as 1,2,4,8."},
    "guidance_schedule": {"choices": GUIDANCE_SCHEDULES},
    "guidance_start": {"type": float},
    "guidance_stop": {"type": float},
    "temperature": {"type": float},
    "top_k": {"type": int},
    "top_p": {"type": float},
    "resampling_policy": {"choices": RESAMPLING_POLICIES},
    "resampling_threshold": {"type": float},
    "num_resampling_passes": {"type": one_or_list, "help": "For all scales, or for each, such as 0,0,0,5."},
}


def add_scheduler_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser `--scheduler` and a flag for each of [`SCHEDULER_OPTIONS`]."""
    group = parser.add_argument_group("scheduler", "What is not given stays as the pipeline has it.")
    group.add_argument("--scheduler", help="Folder or Hub id of another scheduler, for example a preset.")
    for name, options in SCHEDULER_OPTIONS.items():
        group.add_argument(f"--{name}", **options)


def scheduler_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of [`SCHEDULER_OPTIONS`] that were given."""
    return {name: getattr(args, name) for name in SCHEDULER_OPTIONS if getattr(args, name) is not None}


def chosen_scheduler(args: argparse.Namespace, scheduler: ScaleScheduler) -> ScaleScheduler:
    """The scheduler that was asked for, in place of a pipeline's own."""
    scheduler = scheduler if args.scheduler is None else ScaleScheduler.from_pretrained(args.scheduler)
    return ScaleScheduler.from_config(scheduler.config, **scheduler_options(args))


class HelpWithDefaults(argparse.RawDescriptionHelpFormatter):
    """Ends what is said of a flag with its default, if it has one and this is not said yet."""

    def _format_action(self, action: argparse.Action) -> str:
        said = copy.copy(action)
        if action.nargs != 0 and action.default is not None and "default: " not in (action.help or "").lower():
            said.help = f"{action.help or ''} Default: %(default)s.".strip()
        return super()._format_action(said)


def make_parser(description: str, settings: type) -> argparse.ArgumentParser:
    """The parser of a training script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpWithDefaults)
    add_arguments(parser, settings)
    return parser


def from_args(args: argparse.Namespace, settings: type[Settings], **others: Any) -> Settings:
    """What was parsed of a settings class, as an object of it; `others` are its fields without a flag."""
    flags = [setting.name for setting in fields(settings) if setting.metadata]
    return settings(**{name: getattr(args, name) for name in flags}, **others)


def parse_settings(
    parser: argparse.ArgumentParser, settings: type[Settings], arguments: list[str] | None = None
) -> Settings:
    """The settings of a training script from its command line."""
    words = sys.argv[1:] if arguments is None else arguments
    return from_args(parser.parse_args(words), settings, command=[sys.argv[0], *words])


def refuse_given(settings: Any, names: Collection[str], reason: str) -> None:
    """
    Refuse settings that would mean nothing.

    Args:
        settings (`Any`): A settings object.
        names (`Collection[str]`): Those that must be left out.
        reason (`str`): The end of the sentence that says with what.

    Raises:
        ValueError: If one of them is not as it is by default.
    """
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if setting.name in names and value != setting.default:
            raise ValueError(f"`{setting.name}` must be left out {reason}, got {value!r}.")


@dataclass(kw_only=True)
class DataSettings:
    """Where the images come from."""

    dataset_name: str | None = flag(help="Hub id or folder for `datasets.load_dataset`.")
    dataset_config_name: str | None = flag(help="Configuration of the data set.")
    train_data_dir: str | None = flag(help="Image folder, with one subfolder per class if there are classes.")
    image_column: str = flag("image", "Column of the images.")
    cache_dir: str | None = flag(help="Cache folder of `datasets`.")
    min_image_size: int = flag(8, "Leave out pictures with a shorter side.")
    strict_data: bool = flag(False, "Stop at unusable pictures, do not leave them out.")
    preprocessing_num_workers: int | None = flag(help="Processes that check the pictures.", type=positive_int)


@dataclass(kw_only=True)
class TrainingDataSettings(DataSettings):
    """How the images are used."""

    max_train_samples: int | None = flag(help="Use only this many images.", type=positive_int)
    random_flip: bool = flag(False, "Mirror half of the images.")
    dataloader_num_workers: int = flag(0)


@dataclass(kw_only=True)
class OptimizationSettings:
    """Optimisation."""

    train_batch_size: int = flag(32, "Images per process and step.", type=positive_int)
    max_train_steps: int = flag(10_000, type=positive_int)
    gradient_accumulation_steps: int = flag(1, type=positive_int)
    learning_rate: float = flag(1e-4)
    scale_lr: bool = flag(
        False, "VAR's rule: `--learning_rate` is for 256 images a step; multiply it by their number over 256."
    )
    lr_scheduler: str = flag("cosine", "A schedule of `diffusers.optimization`.", choices=LR_SCHEDULERS)
    lr_warmup_steps: int | None = flag(help="Default: a twentieth of `--max_train_steps`.")
    adam_beta1: float = flag(0.9)
    adam_beta2: float = flag(0.95)
    adam_weight_decay: float = flag(0.05)
    adam_epsilon: float = flag(1e-8)
    max_grad_norm: float = flag(1.0, "0: no clipping.", type=non_negative_float)
    ema_decay: float = flag(0.999)
    mixed_precision: str | None = flag(help="Default: accelerate's own.", choices=["no", "fp16", "bf16"])
    gradient_checkpointing: bool = flag(False, "Less memory, more time.")
    seed: int = flag(0)

    def __post_init__(self):
        if self.lr_warmup_steps is None:
            self.lr_warmup_steps = self.max_train_steps // 20

    def images_per_step(self, num_processes: int) -> int:
        """How many images all processes together take a step on."""
        return self.train_batch_size * self.gradient_accumulation_steps * num_processes


@dataclass(kw_only=True)
class OutputSettings:
    """What is written, and how often."""

    output_dir: str = flag(MISSING, "Checkpoints, logs and the finished model go here.")
    checkpointing_steps: int | None = flag(help="Default: a twentieth of `--max_train_steps`.", type=positive_int)
    checkpoints_total_limit: int = flag(2, type=positive_int)
    resume_from_checkpoint: str | None = flag(help="'latest' or a checkpoint's name.")
    logging_steps: int = flag(10, "Steps between lines of `train_log.jsonl`.", type=positive_int)
    validation_steps: int | None = flag(
        help="Steps between validations with pictures; default: a tenth of `--max_train_steps`.", type=positive_int
    )
    num_validation_images: int = flag(16, type=positive_int)
    logging_dir: str = flag("logs")
    report_to: str = flag("tensorboard", "tensorboard, wandb, trackio, another tracker of accelerate, none.")
    save_dtype: str = flag("float32", "Of the finished weights.", choices=["float32", "float16", "bfloat16"])


@dataclass(kw_only=True)
class CardSettings:
    """Model card and Hub."""

    data_description: str | None = flag(help="Of the training data, for the card: what, whose, which licence.")
    license: str | None = flag(help="Licence of the finished weights: an identifier the Hub knows.")
    push_to_hub: bool = flag(False, "Upload the finished folder with its card.")
    hub_model_id: str | None = flag(help="Repository; default: the name of `output_dir`, in your account.")
    hub_token: str | None = flag(help="Default: the token of `hf auth login`.")


@dataclass(kw_only=True)
class TrainingSettings(TrainingDataSettings, OptimizationSettings, OutputSettings, CardSettings):
    """
    What all training scripts are told; `command` is their command line, for the card. How often checkpoints and
    validations come follows from the length of the run, unless it is given.
    """

    command: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        self.checkpointing_steps = self.checkpointing_steps or max(1, self.max_train_steps // 20)
        self.validation_steps = self.validation_steps or max(1, self.max_train_steps // 10)


@dataclass(kw_only=True)
class PipelineSettings(TrainingSettings):
    """The finished pipeline."""

    with_code: bool = flag(
        False, "Put the code that draws into the finished folder: it, and what is uploaded, draws without srdd, too."
    )


@dataclass(kw_only=True)
class PixelLossSettings:
    """What distances between pictures weigh."""

    l1_weight: float = flag(1.0)
    l2_weight: float = flag(1.0)
    perceptual_weight: float = flag(0.1, "0 needs no EfficientNet.")


@dataclass(kw_only=True)
class PixelSettings(TrainingSettings, PixelLossSettings):
    """What training tokenizers and distilling decoders have in common."""

    center_crop: bool = flag(False, "Crop in the centre instead of at random.")
    min_crop: float = flag(
        1.0, "Smallest random crop, as a share of the picture's shorter side; none has fewer pixels.", type=share
    )
    random_colors: bool = flag(False, "Change the colours of most images: for pictures unlike those at hand.")
    adam_weight_decay: float = flag(0.0)  # decay would pull codes and norms to zero


@dataclass(kw_only=True)
class TokenSettings:
    """Tokens and labels."""

    label_column: str = flag("auto", "Column of the labels; 'auto' is 'label' if there is one, '' is none.")
    random_crops: int = flag(0, "Tokenise so many random crops, not the centre.")
    token_cache_dir: str | None = flag(help="Where pyramids, or latents, are kept; default: `output_dir/tokens`.")


@dataclass(kw_only=True)
class TokenLossSettings:
    """The loss of tokens, and pictures of what was learned."""

    label_smoothing: float = flag(0.0)
    scale_loss_weights: list[float] | None = flag(help="What a token of each scale counts; default: 1.")
    validation_guidance_scale: float | None = flag(help="Of the pictures at validations; default: the pipeline's own.")


@dataclass(kw_only=True)
class TransformerSettings(PipelineSettings, TokenSettings, TokenLossSettings):
    """What training and distilling a transformer have in common."""

    schedules: list[list[int]] | None = flag(
        help="Schedules that the model learns, one a step: sides of their scales, coarse to fine, as `1-2-4-8 1-4-8`."
        " The finished pipeline draws over the first. Default: one.",
        type=dashed_ints,
        nargs="+",
    )
    attention_backend: str | None = flag(
        help="Attention in training: 'flex' (compiled), 'mask' (one call for all scales), 'per_scale', or a backend of"
        " diffusers' for calls per scale. Default: the fastest, which is the first of these that a GPU can run;"
        " per_scale on CPUs."
    )

    def __post_init__(self):
        super().__post_init__()
        self.token_cache_dir = self.token_cache_dir or f"{self.output_dir}/tokens"
