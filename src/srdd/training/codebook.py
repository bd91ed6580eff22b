"""Keeping a codebook alive while a tokenizer trains."""

import torch

from srdd.models.quantizer_multiscale import MultiScaleQuantizer


class CodebookTracker:
    """
    Counts how often every code is used and gives the idle ones a new place. At first all codes count as idle.

    Args:
        codebook_size (`int`): Number of codes.
        decay (`float`, defaults to 0.98): Decay per step of the running count.
        device (`torch.device`, *optional*): Where the counts are kept.
    """

    def __init__(self, codebook_size: int, decay: float = 0.98, device: torch.device | None = None):
        self.counts = torch.zeros(codebook_size, device=device)
        self.decay = decay

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"counts": self.counts}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        self.counts.copy_(state_dict["counts"])

    def update(self, token_ids: torch.LongTensor) -> None:
        """Count the ids of one step, of any shape."""
        hits = token_ids.flatten().bincount(minlength=len(self.counts)).to(self.counts)
        self.counts.mul_(self.decay).add_(hits, alpha=1 - self.decay)

    @torch.no_grad()
    def revive(
        self,
        quantizer: MultiScaleQuantizer,
        latents: torch.Tensor,
        scale_sizes: list[list[int]],
        threshold: float = 0.01,
        generator: torch.Generator | None = None,
    ) -> torch.LongTensor:
        """
        Move codes used less than `threshold` times a step onto residual features that the quantizer just saw.

        Args:
            quantizer ([`MultiScaleQuantizer`]): Its codebook is changed in place.
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`): Latent maps of the current batch.
            scale_sizes (`list[list[int]]`): Scales of the pyramid.
            threshold (`float`, defaults to 0.01): Running uses per step below which a code counts as dead.
            generator (`torch.Generator`, *optional*): Draws the features.

        Returns:
            `torch.LongTensor`: Ids of the revived codes.
        """
        dead = (self.counts < threshold).nonzero().flatten()
        if len(dead) == 0:
            return dead
        rest, features = latents.float(), []
        for scale_size in scale_sizes:
            small = quantizer.downsample(rest, scale_size)
            features.append(small.permute(0, 2, 3, 1).flatten(0, 2))  # (B*N_k, C)
            rest = rest - quantizer.residual_map(quantizer.nearest_tokens(small), latents.shape[-2:]).float()
        # A scale first, then a feature of it: coarse scales have few tokens but matter as much.
        scales = torch.randint(len(features), (len(dead),), generator=generator).tolist()
        rows = [torch.randint(len(features[k]), (), generator=generator).item() for k in scales]
        new_codes = torch.stack([features[k][row] for k, row in zip(scales, rows)])
        quantizer.codebook.weight[dead] = new_codes.to(quantizer.codebook.weight.dtype)
        self.counts[dead] = 1.0
        return dead
