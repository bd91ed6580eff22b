"""Random pictures and masks for tests."""

import torch
import torch.nn.functional as F


def random_mask(height: int, width: int, seed: int, share: float = 0.5, batch_size: int = 2) -> torch.Tensor:
    """Blocky random masks, 1 where known."""
    generator = torch.Generator().manual_seed(seed)
    coarse = (torch.rand(batch_size, 1, 4, 4, generator=generator) < share).float()
    return F.interpolate(coarse, size=(height, width), mode="nearest")


def random_pixels(height: int = 8, width: int = 8, seed: int = 0, batch_size: int = 2) -> torch.Tensor:
    """Pixels in [-1, 1]."""
    return torch.rand(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_image(seed: int = 0, size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    """Pixels in [0, 1], as a picture has them: whole 255ths."""
    pixels = torch.randint(256, (1, 3, *size), generator=torch.Generator().manual_seed(seed))
    return pixels.float() / 255


def random_hole(seed: int = 0, size: tuple[int, int] = (8, 8), share: float = 0.4) -> torch.Tensor:
    """A mask, 1 where to draw: scattered pixels, between which models look, and the lower right quarter."""
    mask = (torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(100 + seed)) < share).float()
    mask[..., size[0] // 2 :, size[1] // 2 :] = 1
    return mask
