"""Drawing tokens from logits: temperature, exact top-k and top-p, and noise that belongs to one image each."""

import torch


Generators = torch.Generator | list[torch.Generator] | None

# Elements of noise that are drawn at once on a CPU, in double precision: they stay in its cache.
CPU_PART = 2**17


def candidate_probabilities(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.LongTensor | None]:
    """
    The distribution that tokens are drawn from.

    Only `top_k` candidates are ever sorted. Top-p keeps the most probable tokens until their probability reaches
    `top_p`, counted among the top-k candidates as VAR does. Among tokens with exactly equal logits at the cut some are
    dropped, where VAR's code keeps all that tie with the k-th.

    Args:
        logits (`torch.Tensor` of shape `(..., codebook_size)`): Guided logits.
        temperature (`float`, defaults to 1.0): Divides the logits; above 0.
        top_k (`int`, defaults to 0): Number of candidates; 0 keeps all.
        top_p (`float`, defaults to 1.0): Probability mass of the candidates, in (0, 1].

    Returns:
        `tuple[torch.Tensor, torch.LongTensor | None]`: Float32 weights of shape `(..., num_candidates)`, summing to at
        most 1, and the token id of every candidate, or `None` if candidate `i` is token `i`.
    """
    scores, token_ids = logits.float(), None
    if temperature != 1:
        scores = scores / temperature
    if 0 < top_k < scores.shape[-1]:
        scores, token_ids = scores.topk(top_k, dim=-1, sorted=top_p < 1)
    elif top_p < 1:
        scores, token_ids = scores.sort(dim=-1, descending=True)
    probabilities = scores.softmax(dim=-1)
    if top_p < 1:
        better = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(better >= top_p, 0.0)
        # Rounding must never remove the best candidate.
        probabilities[..., 0] = probabilities[..., 0].clamp(min=torch.finfo(torch.float32).tiny)
    return probabilities, token_ids


def num_candidates(codebook_size: int, top_k: int = 0) -> int:
    """Among how many tokens one is drawn, before top-p."""
    return top_k if 0 < top_k < codebook_size else codebook_size


def exponential_noise(
    shape: torch.Size,
    generator: Generators,
    device: torch.device,
    image_mask: torch.BoolTensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Exponential noise of `shape`, image by image if there is a generator for each.

    Args:
        shape (`torch.Size`): `(batch, ...)`.
        generator (`torch.Generator` or a list of `batch` of them, *optional*): The only source of randomness.
        device (`torch.device`): Where the noise is needed.
        image_mask (`torch.BoolTensor` of shape `(batch,)`, *optional*): Images that need noise. The generators of the
            others are left alone, so that what an image draws does not depend on its neighbours.
        out (`torch.Tensor` of `shape`, *optional*): Where to put it, float32.
    """
    if image_mask is not None and not image_mask.any():
        return torch.ones(shape, device=device)
    noise = torch.empty(shape, device=device) if out is None else out
    by_image = isinstance(generator, list)
    for index, source in enumerate(generator if by_image else [generator]):
        wanted = noise[index] if by_image else noise
        if by_image and image_mask is not None and not image_mask[index]:
            wanted.fill_(1)
            continue
        where = source.device if source is not None else device
        drawn = wanted if where == wanted.device else torch.empty(wanted.shape, device=where)
        if where.type == "cpu":
            # Bit for bit what `exponential_` gives in a third of its time, and the same on all CPUs: before torch 2.8
            # its numbers are others on Intel's.
            for part in drawn.view(-1).split(CPU_PART):
                uniform = torch.empty(part.shape, dtype=torch.float64).uniform_(generator=source)
                part.copy_(uniform.neg_().log1p_().neg_())
        else:
            drawn.exponential_(generator=source)
        if drawn is not wanted:
            wanted.copy_(drawn)
    return noise


def sample_tokens(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: Generators = None,
    image_mask: torch.BoolTensor | None = None,
    noise: torch.Tensor | None = None,
) -> torch.LongTensor:
    """
    Draw one token per position by an exponential race, `argmax(p / E)` with `E ~ Exp(1)`.

    Args:
        logits (`torch.Tensor` of shape `(batch, num_tokens, codebook_size)`): Guided logits.
        temperature (`float`, defaults to 1.0): 0 takes the most probable token.
        top_k (`int`, defaults to 0): Number of candidates; 0 keeps all.
        top_p (`float`, defaults to 1.0): Probability mass of the candidates, in (0, 1].
        generator (`torch.Generator` or a list of `batch` of them, *optional*): The only source of randomness.
        image_mask (`torch.BoolTensor` of shape `(batch,)`, *optional*): Images whose tokens will be used.
        noise (`torch.Tensor` of shape `(batch, num_tokens, num_candidates)`, *optional*): `E`, drawn before, in place
            of one from the generator.

    Returns:
        `torch.LongTensor` of shape `(batch, num_tokens)`.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities, token_ids = candidate_probabilities(logits, temperature, top_k, top_p)
    if noise is None:
        noise = exponential_noise(probabilities.shape, generator, logits.device, image_mask)
    winners = (probabilities / noise).argmax(dim=-1)
    return winners if token_ids is None else token_ids.gather(-1, winners.unsqueeze(-1)).squeeze(-1)
