"""Parts that a run starts from."""

from math import log

from diffusers import ConfigMixin
from diffusers.utils import logging

from srdd import (
    MultiScaleVQModel,
    ScaleHistoryTransformer2DModel,
    ScaleTextTransformer2DModel,
    ScaleTransformer2DModel,
)
from srdd.models import ScaleTransformer


logger = logging.get_logger(__name__)


def load_tokenizer(argument: str, name: str) -> MultiScaleVQModel:
    """
    A tokenizer, or that of a pipeline.

    Args:
        argument (`str`): The setting that names it, for the message.
        name (`str`): Folder or Hub id of a tokenizer, or of a pipeline that has one.

    Raises:
        ValueError: If there is neither, or its weights are not whole and sound.
    """
    _, subfolder = find_model(argument, name, "vqvae", (MultiScaleVQModel,), "a tokenizer")
    return MultiScaleVQModel.from_pretrained(name, subfolder=subfolder)


def find_transformer(argument: str, name: str) -> tuple[dict, str | None]:
    """
    A scale transformer, or that of a pipeline.

    Args:
        argument (`str`): The setting that names it, for the message.
        name (`str`): Folder or Hub id of a transformer, or of a pipeline that has one.

    Returns:
        `tuple[dict, str | None]`: Its config, and the subfolder that it lies in, if any.

    Raises:
        ValueError: If there is neither.
    """
    classes = ScaleTransformer2DModel, ScaleHistoryTransformer2DModel, ScaleTextTransformer2DModel
    return find_model(argument, name, "transformer", classes, "a scale transformer")


def find_model(
    argument: str, name: str, part: str, classes: tuple[type[ConfigMixin], ...], what: str
) -> tuple[dict, str | None]:
    """
    A model of one of some classes, or that of a pipeline.

    Args:
        argument (`str`): The setting that names it, for the message.
        name (`str`): Folder or Hub id of a model, or of a pipeline that has one.
        part (`str`): What pipelines call it.
        classes (`tuple[type[ConfigMixin], ...]`): What it may be.
        what (`str`): The model in words, with its article, for the message.

    Returns:
        `tuple[dict, str | None]`: Its config, and the subfolder that it lies in, if any.

    Raises:
        ValueError: If there is neither.
    """
    reason = ""
    for subfolder in (None, part):
        try:
            config = classes[0].load_config(name, subfolder=subfolder)
        except OSError as error:
            reason = str(error).partition("\n")[0]
            continue
        if config.get("_class_name") in [kind.__name__ for kind in classes]:
            return config, subfolder
        reason = f"a {config.get('_class_name')}"
    raise ValueError(
        f"`{argument}` must be a folder or Hub id of {what}, or of a pipeline that has one, got {name!r} ({reason})."
    )


def take_codebook(transformer: ScaleTransformer, vqvae: MultiScaleVQModel) -> None:
    """
    Let a pretrained transformer be one for a tokenizer's codebook, which it learns from here on.

    Args:
        transformer (`ScaleTransformer`): Its config takes the fingerprint, with a warning if it has another one.
        vqvae ([`MultiScaleVQModel`]): The tokenizer.
    """
    before, after = transformer.config.codebook_fingerprint, vqvae.config.codebook_fingerprint
    if before is not None and after is not None and before != after:
        logger.warning(
            f"The pretrained transformer was trained on the tokens of another tokenizer (codebook {before}, not"
            f" {after}): it has to learn what they mean. If you did not mean that, give it the tokenizer that it"
            " came with."
        )
    transformer.register_to_config(codebook_fingerprint=after)


def forget_guidance(transformer: ScaleTransformer) -> None:
    """
    Let a pretrained transformer be one that is guided when it draws, as it learns from data from here on.

    Args:
        transformer (`ScaleTransformer`): Its `guidance_distilled` becomes `False`, with a warning if it was not.
    """
    if transformer.config.guidance_distilled:
        logger.warning(
            "The pretrained transformer learned the guided distribution of a teacher, and now learns that of the data:"
            " it is saved with `guidance_distilled` False, so that pipelines guide it again."
        )
        transformer.register_to_config(guidance_distilled=False)


def warn_of_other_tokens(loss: float, codebook_size: int) -> None:
    """
    Say so where a pretrained transformer predicts worse than one that knows nothing.

    Args:
        loss (`float`): Of its first step, in nats per token.
        codebook_size (`int`): Number of tokens to choose from.
    """
    if loss > log(codebook_size):
        logger.warning(
            f"The first loss of the pretrained transformer, {loss:.2f}, is above {log(codebook_size):.2f}, that of"
            f" drawing any of {codebook_size} tokens at random: it was trained on the tokens of another tokenizer, or"
            " with another attention pattern or schedule. If you did not mean that, give it the tokenizer that it"
            " came with."
        )
