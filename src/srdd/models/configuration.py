"""
What the models' configurations may say: a table for each kind of argument.

Configurations come from files. The bounds are far from what anyone has trained, and near enough that an impossible
size is refused before memory is taken.
"""

import re
from collections.abc import Mapping
from typing import Any

from diffusers.models.activations import ACT2CLS

from srdd.checks import check_bool, check_choice, check_int, check_list, check_number, shown


# At least, at most.
INTEGERS = {
    "attention_head_dim": (1, 4096),
    "codebook_size": (1, 2**20),
    "cross_attention_dim": (1, 2**16),
    "history_head_dim": (1, 2**16),
    "history_window": (1, 100),
    "in_channels": (1, 1024),
    "latent_channels": (1, 4096),
    "layers_per_block": (1, 64),
    "decoder_layers_per_block": (0, 64),
    "norm_num_groups": (1, 8192),
    "decoder_norm_num_groups": (1, 8192),
    "num_attention_heads": (1, 1024),
    "num_classes": (0, 10**6),
    "num_layers": (1, 256),
    "num_residual_convs": (1, 100),
    "out_channels": (1, 1024),
    "patch_size": (1, 64),
    "pooled_projection_dim": (1, 2**16),
    "quant_conv_kernel_size": (1, 31),
}

# Bounds, as `check_number` has them.
NUMBERS = {
    "class_dropout_prob": {"low": 0, "high": 1},
    "drop_path_rate": {"low": 0, "under": 1},
    "mlp_ratio": {"over": 0, "high": 64},
    "norm_eps": {"over": 0, "high": 1},
    "residual_ratio": {"low": 0, "high": 1},
    "rope_extent": {"over": 0, "high": 10**6},
    "rope_theta": {"over": 1, "high": 10**8},
}

BOOLEANS = (
    "decoder_mid_block_add_attention",
    "guidance_distilled",
    "mid_block_add_attention",
    "normalize_codes",
    "qk_norm",
    "shared_adaln",
)

CHOICES = {
    "act_fn": tuple(ACT2CLS),
    "attention_pattern": ("causal", "markov", "banded"),
}

# What each entry of a list may be; there are at most ten levels of resolution.
LISTS_OF_INTEGERS = {"block_out_channels": (1, 8192), "decoder_block_out_channels": (1, 8192)}
LISTS_OF_CHOICES = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
MAX_LEVELS = 10

MAX_IMAGE_SIDE = 2**16
MAX_PARAMETERS = 2 * 10**10


def check_configuration(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """
    Check a model's arguments, each by the table that it stands in.

    Args:
        arguments (`Mapping[str, Any]`): The arguments; those in no table are left to the model. `None` is allowed for
            those of the decoder and the fingerprint.

    Returns:
        `dict[str, Any]`: Those in a table, as JSON has them.

    Raises:
        ValueError: If one is of another kind or out of bounds.
    """
    checked = {}
    for name, value in arguments.items():
        if value is None and (name.startswith("decoder_") or name == "codebook_fingerprint"):
            continue
        if name in INTEGERS:
            checked[name] = check_int(name, value, *INTEGERS[name])
        elif name in NUMBERS:
            checked[name] = check_number(name, value, **NUMBERS[name])
        elif name in BOOLEANS:
            checked[name] = check_bool(name, value)
        elif name == "codebook_fingerprint":
            checked[name] = check_fingerprint(value)
        elif name in CHOICES:
            checked[name] = check_choice(name, value, CHOICES[name])
        elif name in LISTS_OF_INTEGERS or name in LISTS_OF_CHOICES:
            entries = check_list(name, value)
            check_int(f"len({name})", len(entries), 1, MAX_LEVELS)
            places = [(f"{name}[{index}]", entry) for index, entry in enumerate(entries)]
            if name in LISTS_OF_INTEGERS:
                checked[name] = [check_int(place, entry, *LISTS_OF_INTEGERS[name]) for place, entry in places]
            else:
                checked[name] = [check_choice(place, entry, LISTS_OF_CHOICES[name]) for place, entry in places]
    return checked


def check_fingerprint(value: Any) -> str:
    """
    The fingerprint of a codebook.

    Raises:
        ValueError: If it is not 16 hexadecimal digits.
    """
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{16}", value):
        raise ValueError(f"`codebook_fingerprint` must be 16 hexadecimal digits, got {shown(value)}.")
    return value


def check_sample_size(value: Any) -> int | list[int]:
    """
    The size of images: a side, or height and width.

    Raises:
        ValueError: If it is not one or two integers in [1, 65536].
    """
    if not isinstance(value, (list, tuple)):
        return check_int("sample_size", value, 1, MAX_IMAGE_SIDE)
    return [check_int("sample_size", side, 1, MAX_IMAGE_SIDE) for side in check_list("sample_size", value, 2)]


def check_groups(name: str, num_groups: int, channels: list[int]) -> None:
    """
    Groups of group norms.

    Raises:
        ValueError: If they do not divide all channels.
    """
    if any(width % num_groups for width in channels):
        raise ValueError(f"`{name}` must be a divisor of all channels {channels}, got {num_groups}.")


def check_num_parameters(num_parameters: float, names: str) -> None:
    """
    The size of a whole model, roughly.

    Args:
        num_parameters (`float`): How many parameters it will have.
        names (`str`): The arguments that this follows from.

    Raises:
        ValueError: If there would be more than 2 * 10^10.
    """
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(
            f"{names} must give a model of at most {MAX_PARAMETERS:.0e} parameters, got {num_parameters:.1e}."
        )
