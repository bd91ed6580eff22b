"""Light decoders: fewer channels and layers in the place of a tokenizer's own, for the same tokens."""

import math

from srdd import MultiScaleVQModel


def light_tokenizer(
    teacher: MultiScaleVQModel,
    block_out_channels: list[int] | None = None,
    layers_per_block: int = 1,
    mid_block_add_attention: bool = False,
) -> MultiScaleVQModel:
    """
    A tokenizer with the tokens of another and a new, smaller decoder, the only part that is not frozen. Its blocks
    do not attend, but for the middle one if asked to.

    Args:
        teacher ([`MultiScaleVQModel`]): All but the decoder is copied from it.
        block_out_channels (`list[int]`, *optional*): Channels of the decoder, finest first; by default a quarter of
            the teacher's, rounded down to multiples of 8, and 8 at least.
        layers_per_block (`int`, defaults to 1): Residual layers per resolution, and one more.
        mid_block_add_attention (`bool`, defaults to `False`): Whether the middle block attends.

    Returns:
        [`MultiScaleVQModel`]: On the CPU.

    Raises:
        ValueError: If these are no sizes of a decoder.
    """
    config = teacher.config
    if block_out_channels is None:
        channels = config.decoder_block_out_channels or config.block_out_channels
        block_out_channels = [max(8, width // 32 * 8) for width in channels]
    light = MultiScaleVQModel.from_config(
        config,
        up_block_types=["UpDecoderBlock2D"] * len(config.block_out_channels),
        decoder_block_out_channels=block_out_channels,
        decoder_layers_per_block=layers_per_block,
        decoder_mid_block_add_attention=mid_block_add_attention,
        decoder_norm_num_groups=math.gcd(config.norm_num_groups, *block_out_channels),
    )
    for name, module in light.named_children():
        if name != "decoder":
            module.load_state_dict(teacher.get_submodule(name).state_dict())
            module.requires_grad_(False)
    return light
