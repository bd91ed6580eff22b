"""How well a tokenizer reconstructs images, and how much of its codebook it uses for it."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from tqdm.auto import tqdm

from srdd.evaluation.distances import frechet_distance
from srdd.evaluation.paired_metrics import peak_signal_to_noise, structural_similarity
from srdd.models import MultiScaleVQModel


@torch.no_grad()
def evaluate_reconstruction(
    vqvae: MultiScaleVQModel,
    batches: Iterable[dict[str, torch.Tensor]],
    num_pictures: int = 0,
    features: torch.nn.Module | None = None,
    show_progress: bool = False,
    teacher: MultiScaleVQModel | None = None,
) -> tuple[dict, list[torch.Tensor]]:
    """
    Reconstruct images and compare, in this process alone.

    Args:
        vqvae ([`MultiScaleVQModel`]): The tokenizer.
        batches (`Iterable`): Batches with `"pixel_values"` of shape `(batch, 3, height, width)` in [-1, 1].
        num_pictures (`int`, defaults to 0): How many images of the first batch to return.
        features (`torch.nn.Module`, *optional*): Features of uint8 images, for the Fréchet distance between the
            images and their reconstructions; it is moved to the tokenizer's device.
        show_progress (`bool`, defaults to `False`): Show a progress bar.
        teacher ([`MultiScaleVQModel`], *optional*): A tokenizer with the same tokens and another decoder, to compare
            reconstructions with.

    Returns:
        `tuple[dict, list[torch.Tensor]]`: The metrics, and the first images and their reconstructions in [-1, 1].
        `"num_images"`; `"psnr"` in dB and `"ssim"`, means over images as
        [`~srdd.evaluation.paired_metrics.pair_metrics`] defines them; `"usage"` and `"perplexity"` per scale as
        [`~MultiScaleVQModel.codebook_usage`] gives them; `"codes_used"` in all; with `features`, `"rfd"`; with
        `teacher`, `"psnr_to_teacher"`, between both reconstructions, and `"teacher_psnr"`, of the teacher's, whose
        pictures then come second.
    """
    values, features_of, token_ids, pictures = defaultdict(list), defaultdict(list), [], []
    for batch in tqdm(batches, disable=not show_progress):
        sample = batch["pixel_values"].to(vqvae.device)
        ids = vqvae.tokenize(sample.to(vqvae.dtype))
        shown = {"original": sample}
        if teacher is not None:
            shown["teacher"] = teacher.decode_tokens(ids).sample.float().clamp(-1, 1)
        shown["reconstruction"] = vqvae.decode_tokens(ids).sample.float().clamp(-1, 1)
        original, *_, reconstruction = unit = [images / 2 + 0.5 for images in shown.values()]
        values["psnr"].append(peak_signal_to_noise(reconstruction, original))
        values["ssim"].append(structural_similarity(reconstruction, original))
        if teacher is not None:
            values["psnr_to_teacher"].append(peak_signal_to_noise(reconstruction, unit[1]))
            values["teacher_psnr"].append(peak_signal_to_noise(unit[1], original))
        if features is not None:
            for name, images in (("original", original), ("reconstruction", reconstruction)):
                pixels = images.mul(255).round().to(torch.uint8)
                features_of[name].append(features.to(vqvae.device)(pixels).float().cpu())
        if not token_ids:
            pictures = [images[:num_pictures] for images in shown.values()]
        token_ids.append(ids)
    token_ids = torch.cat(token_ids)
    metrics = {
        "num_images": len(token_ids),
        **{name: torch.cat(of_batches).mean().item() for name, of_batches in values.items()},
        **vqvae.codebook_usage(token_ids),
        "codes_used": len(token_ids.unique()),
    }
    if features is not None:
        metrics["rfd"] = frechet_distance(*(torch.cat(of_batches) for of_batches in features_of.values()))
    return metrics, pictures


@torch.no_grad()
def token_psnr(
    vqvae: MultiScaleVQModel,
    batches: Iterable[tuple[torch.Tensor, torch.LongTensor]],
    scale_sizes: list[list[int]] | None = None,
) -> float:
    """
    How well tokens that are there give images back, in this process alone. It draws no random numbers.

    Args:
        vqvae ([`MultiScaleVQModel`]): The tokenizer.
        batches (`Iterable`): Pixels of shape `(batch, 3, height, width)` in [-1, 1], and their pyramids of shape
            `(batch, num_tokens)`.
        scale_sizes (`list[list[int]]`, *optional*): Scales of the pyramids; the tokenizer's own by default.

    Returns:
        `float`: The mean over images of the peak signal-to-noise ratio, in dB.
    """
    values = []
    for pixels, token_ids in batches:
        decoded = vqvae.decode_tokens(token_ids.to(vqvae.device), scale_sizes).sample.float().clamp(-1, 1)
        values.append(peak_signal_to_noise(decoded / 2 + 0.5, pixels.to(vqvae.device) / 2 + 0.5))
    return torch.cat(values).mean().item()
