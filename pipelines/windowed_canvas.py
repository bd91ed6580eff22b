import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from srdd.pipelines.conditions import Conditions
from srdd.pipelines.scale_pipeline import ScalePipeline
from srdd.pipelines.scale_sampling import KnownTokens


# Rows and columns of a window.
Window = tuple[slice, slice]


class WindowedCanvas:
    """
    A canvas that is drawn window by window. Windows overlap by half and fade into each other over their overlap; those
    with most known pixels come first.

    Args:
        pixels (`torch.Tensor` of shape `(batch, 3, height, width)`): Images in [-1, 1].
        known_pixels (`torch.Tensor` of shape `(batch, 1, height, width)`): 1 where a pixel is known from the start.
        size (`(int, int)`): Height and width of a window; at most those of the images.

    `pixels` is the canvas so far, `drawn_pixels` what windows have drawn of it, given pixels included, and
    `known_pixels` is 1 where later windows build on `pixels`.
    """

    def __init__(self, pixels: torch.Tensor, known_pixels: torch.Tensor, size: Sequence[int]):
        self.pixels = pixels.clone()
        self.known_pixels = known_pixels.clone()
        self.given_pixels = known_pixels.bool()
        self.drawn_pixels = pixels.clone()
        self.size = tuple(size)
        ramps = [(torch.arange(side) + 0.5 - side / 2).abs().neg().add(side / 2) for side in self.size]
        self.fade = (ramps[0][:, None] * ramps[1]).to(pixels)  # (height, width), falls to the borders
        # Where windows may start, along both axes.
        self._starts = [
            sorted({*range(0, full - side + 1, max(side // 2, 1)), full - side})
            for full, side in zip(pixels.shape[-2:], self.size)
        ]
        self.total = torch.zeros_like(pixels)
        self.weight = torch.zeros_like(pixels[:1, :1])

    @property
    def num_windows(self) -> int:
        """Most windows that are drawn."""
        return math.prod(map(len, self._starts))

    def fill(
        self,
        draw: Callable[[Window], tuple[torch.Tensor, torch.LongTensor]],
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> torch.LongTensor | None:
        """
        Draw windows until all is known.

        Args:
            draw (`Callable`): Draws a window: returns its pixels, `(batch, 3, *size)`, and their tokens.
            is_interrupted (`Callable`): Whether to stop after a window.

        Returns:
            `torch.LongTensor`, *optional*: The tokens of the window drawn last; `None` if all was known.
        """
        token_ids = None
        for window in self._windows():
            pixels, token_ids = draw(window)
            self._add(window, pixels)
            if is_interrupted():
                break
        return token_ids

    def _windows(self) -> Iterator[Window]:
        left = set(itertools.product(*self._starts))
        while left:
            unknown = self.known_pixels.amin(dim=(0, 1)) == 0
            shares = {corner: unknown[self._window(corner)].float().mean().item() for corner in left}
            left = {corner for corner in left if shares[corner] > 0}
            if left:
                corner = min(left, key=lambda corner: (shares[corner], corner))
                left.remove(corner)
                yield self._window(corner)

    def _window(self, corner: tuple[int, int]) -> Window:
        return tuple(slice(start, start + side) for start, side in zip(corner, self.size))

    def _add(self, window: Window, pixels: torch.Tensor) -> None:
        """Blend a drawn window into what is not given."""
        place = (..., *window)
        self.total[place] += self.fade * pixels
        self.weight[place] += self.fade
        blended = self.total[place] / self.weight[place]
        self.drawn_pixels[place] = blended
        self.pixels[place] = torch.where(self.given_pixels[place], self.pixels[place], blended)
        self.known_pixels[place] = 1.0


def draw_windows(
    pipe: ScalePipeline,
    canvas: WindowedCanvas,
    conditions: Conditions,
    known_tokens: Callable[[Window], KnownTokens],
    **options: Any,
) -> torch.LongTensor | None:
    """
    Draw a canvas window by window, with one progress bar. `options` are those of [`~ScalePipeline.draw`].

    Args:
        pipe ([`ScalePipeline`]): What draws.
        canvas ([`WindowedCanvas`]): What is drawn on.
        conditions ([`Conditions`]): What to draw, one for each image.
        known_tokens (`Callable`): What is known of a window before it is drawn.

    Returns:
        `torch.LongTensor`, *optional*: The tokens of the window drawn last; `None` if all was known.
    """

    def draw_window(window: Window) -> tuple[torch.Tensor, torch.LongTensor]:
        return pipe.draw(conditions, known_tokens=known_tokens(window), progress_bar=progress_bar, **options)

    with pipe.progress_bar(total=canvas.num_windows * pipe.num_timesteps) as progress_bar:
        token_ids = canvas.fill(draw_window, lambda: pipe.interrupt)
        progress_bar.update(progress_bar.total - progress_bar.n)
    return token_ids
