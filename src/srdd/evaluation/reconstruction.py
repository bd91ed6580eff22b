"""How well a tokenizer reconstructs images, and how much of its codebook it uses for it."""

from collections.abc import Iterable

import torch
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm.auto import tqdm

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
        features (`torch.nn.Module`, *optional*): Feature extractor of the Fréchet distance between the images and
            their reconstructions, as torchmetrics' `FrechetInceptionDistance` takes it.
        show_progress (`bool`, defaults to `False`): Show a progress bar.
        teacher ([`MultiScaleVQModel`], *optional*): A tokenizer with the same tokens and another decoder, to compare
            reconstructions with.

    Returns:
        `tuple[dict, list[torch.Tensor]]`: The metrics, and the first images and their reconstructions in [-1, 1].
        `"num_images"`; `"psnr"` in dB and `"ssim"`, means over images; `"usage"` and `"perplexity"` per scale as
        [`~MultiScaleVQModel.codebook_usage`] gives them; `"codes_used"` in all; with `features`, `"rfd"`; with
        `teacher`, `"psnr_to_teacher"`, between both reconstructions, and `"teacher_psnr"`, of the teacher's, whose
        pictures then come second.
    """
    alone = {"sync_on_compute": False}  # other processes do not take part: the metrics must not wait for them
    per_image = {"data_range": 2.0, "reduction": "elementwise_mean", "dim": (1, 2, 3), **alone}
    names = ["psnr"] if teacher is None else ["psnr", "psnr_to_teacher", "teacher_psnr"]
    ratios = {name: PeakSignalNoiseRatio(**per_image).to(vqvae.device) for name in names}
    ssim = StructuralSimilarityIndexMeasure(data_range=2.0, **alone).to(vqvae.device)
    distance = None
    if features is not None:
        distance = FrechetInceptionDistance(feature=features, **alone).to(vqvae.device)
    token_ids, pictures = [], []
    for batch in tqdm(batches, disable=not show_progress):
        sample = batch["pixel_values"].to(vqvae.device)
        ids = vqvae.tokenize(sample.to(vqvae.dtype))
        reconstruction = vqvae.decode_tokens(ids).sample.float().clamp(-1, 1)
        rows = [sample, reconstruction]
        ratios["psnr"].update(reconstruction, sample)
        if teacher is not None:
            wanted = teacher.decode_tokens(ids).sample.float().clamp(-1, 1)
            rows.insert(1, wanted)
            ratios["psnr_to_teacher"].update(reconstruction, wanted)
            ratios["teacher_psnr"].update(wanted, sample)
        ssim.update(reconstruction, sample)
        if distance is not None:
            for pixels, real in ((sample, True), (reconstruction, False)):
                distance.update(pixels.add(1).mul(127.5).round().to(torch.uint8), real=real)
        if not token_ids:
            pictures = [row[:num_pictures] for row in rows]
        token_ids.append(ids)
    token_ids = torch.cat(token_ids)
    metrics = {
        "num_images": len(token_ids),
        **{name: ratio.compute().item() for name, ratio in ratios.items()},
        "ssim": ssim.compute().item(),
        **vqvae.codebook_usage(token_ids),
        "codes_used": len(token_ids.unique()),
    }
    if distance is not None:
        metrics["rfd"] = distance.compute().item()
    return metrics, pictures
