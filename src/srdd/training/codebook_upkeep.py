"""Keeping a codebook alive while a tokenizer trains."""

import torch

from srdd.models.quantizer_multiscale import MultiScaleQuantizer


class CodebookTracker:
    """
    Counts how often every code is used and gives the idle ones a new place; as an option it moves the codes, too, to
    the running mean of the features that chose them (van den Oord et al. 2017, Appendix A.1) instead of by gradients.

    At first all codes count as idle.

    Args:
        codebook_size (`int`): Number of codes.
        latent_channels (`int`, *optional*): Channels of a code; needed for running means.
        decay (`float`, defaults to 0.98): Decay per step of the running counts and sums.
        device (`torch.device`, *optional*): Where they are kept.
    """

    def __init__(
        self,
        codebook_size: int,
        latent_channels: int | None = None,
        decay: float = 0.98,
        device: torch.device | None = None,
    ):
        self.counts = torch.zeros(codebook_size, device=device)
        self.sums = torch.zeros(codebook_size, latent_channels, device=device) if latent_channels else None
        self.decay = decay

    def state_dict(self) -> dict[str, torch.Tensor | None]:
        return {"counts": self.counts, "sums": self.sums}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor | None]) -> None:
        self.counts.copy_(state_dict["counts"])
        if self.sums is not None:
            self.sums.copy_(state_dict["sums"])

    @torch.no_grad()
    def start_from(self, quantizer: MultiScaleQuantizer) -> None:
        """Count all codes of a trained codebook as in use, where they are."""
        self.counts.fill_(1.0)
        if self.sums is not None:
            self.sums.copy_(quantizer.codebook.weight)

    def update(self, token_ids: torch.LongTensor) -> None:
        """Count the ids of one step, of any shape."""
        hits = token_ids.flatten().bincount(minlength=len(self.counts)).to(self.counts)
        self.counts.mul_(self.decay).add_(hits, alpha=1 - self.decay)

    @torch.no_grad()
    def move_codes(
        self,
        quantizer: MultiScaleQuantizer,
        latents: torch.Tensor,
        scale_sizes: list[list[int]],
        threshold: float = 0.01,
    ) -> None:
        """
        Count the ids of one step and move the codes in use to the running means of their features.

        Args:
            quantizer ([`MultiScaleQuantizer`]): Its codebook is changed in place.
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`): Latent maps of the step.
            scale_sizes (`list[list[int]]`): Scales of the pyramid.
            threshold (`float`, defaults to 0.01): Running uses per step below which a code stays where it is.
        """
        features, token_ids = packed_lookups(quantizer, latents, scale_sizes)
        self.update(token_ids)
        new_sums = torch.zeros_like(self.sums).index_add_(0, token_ids, features.to(self.sums))
        self.sums.mul_(self.decay).add_(new_sums, alpha=1 - self.decay)
        used = self.counts >= threshold
        means = self.sums[used] / self.counts[used, None]
        quantizer.codebook.weight[used] = means.to(quantizer.codebook.weight.dtype)

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
        features = [
            feature_map.permute(0, 2, 3, 1).flatten(0, 2)  # (B*N_k, C)
            for feature_map, _, _ in quantizer.lookups(latents, scale_sizes)
        ]
        # A scale first, then a feature of it: coarse scales have few tokens but matter as much.
        scales = torch.randint(len(features), (len(dead),), generator=generator).tolist()
        places = [torch.randint(len(features[k]), (), generator=generator).item() for k in scales]
        new_codes = torch.stack([features[k][place] for k, place in zip(scales, places)])
        quantizer.codebook.weight[dead] = new_codes.to(quantizer.codebook.weight.dtype)
        self.counts[dead] = 1.0
        if self.sums is not None:
            self.sums[dead] = new_codes.to(self.sums)
        return dead


def packed_lookups(
    quantizer: MultiScaleQuantizer, latents: torch.Tensor, scale_sizes: list[list[int]]
) -> tuple[torch.Tensor, torch.LongTensor]:
    """All features that codes are looked up for, `(B*N, C)`, and the ids found, `(B*N,)`."""
    feature_maps, token_ids, _ = zip(*quantizer.lookups(latents, scale_sizes))
    features = [feature_map.permute(0, 2, 3, 1).flatten(0, 2) for feature_map in feature_maps]
    return torch.cat(features), torch.cat([token_map.flatten() for token_map in token_ids])


def low_usage(usage: list[float], num_tokens: list[int], codebook_size: int, threshold: float) -> list[int]:
    """
    Scales that use fewer codes than they could.

    Args:
        usage (`list[float]`): Share of all codes that occur at each scale, as `codebook_usage` gives it.
        num_tokens (`list[int]`): Number of tokens of each scale that it was measured on.
        codebook_size (`int`): Number of codes.
        threshold (`float`): Least share of `min(codebook_size, num_tokens)`, in [0, 1].

    Returns:
        `list[int]`: Indices of the scales.
    """
    possible = [min(1.0, count / codebook_size) for count in num_tokens]
    return [scale for scale, (share, most) in enumerate(zip(usage, possible)) if share < threshold * most]
