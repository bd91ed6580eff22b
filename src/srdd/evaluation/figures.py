"""Pictures of results: labelled grids and curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont


if TYPE_CHECKING:
    from matplotlib.axes import Axes


# A character that no font has.
NO_CHARACTER = "\uffff"


def spread(num_images: int, count: int) -> list[int]:
    """Which of `count` classes or texts each picture shows, so that pictures are spread over all."""
    return [index * count // num_images for index in range(num_images)]


def labelled_grid(images: list[Image.Image], names: list[str], columns: int) -> Image.Image:
    """
    Rows of `columns` pictures, with the name of each row on its left.

    Args:
        images (`list[PIL.Image.Image]`): Pictures of one size, row by row.
        names (`list[str]`): A name for each row; characters that no font at hand has are drawn as their codes.
        columns (`int`): Pictures in a row.

    Returns:
        `PIL.Image.Image`: The grid, RGB.
    """
    grid = make_image_grid(images, rows=len(images) // columns, cols=columns)
    names, font = drawable(names)
    margin = 12 + max(round(font.getlength(name)) for name in names)
    canvas = Image.new("RGB", (margin + grid.width, grid.height), "white")
    canvas.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(canvas)
    for row, name in enumerate(names):
        draw.text((6, round((row + 0.5) * images[0].height)), name, fill="black", font=font, anchor="lm")
    return canvas


def drawable(names: list[str]) -> tuple[list[str], ImageFont.FreeTypeFont]:
    """
    Names as a font can draw them: Pillow's own, or, where that lacks letters, one that matplotlib has.

    Args:
        names (`list[str]`): Any names.

    Returns:
        `tuple[list[str], PIL.ImageFont.FreeTypeFont]`: The names, with codes for characters that the font lacks, and
        the font.
    """
    fonts = [ImageFont.load_default(size=14)]
    try:
        from matplotlib import get_data_path
    except ImportError:  # it comes with training
        pass
    else:
        fonts.append(ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size=14))
    letters = set("".join(names))
    for font in fonts:
        lacking = {letter for letter in letters if not _has_letter(font, letter)}
        if not lacking:
            break
    codes = {ord(letter): letter.encode("unicode_escape").decode() for letter in lacking}
    return [name.translate(codes) for name in names], font


def _has_letter(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    """Whether a font has a picture of its own for a letter."""
    if not letter.isprintable():
        return False
    mask, nothing = font.getmask(letter), font.getmask(NO_CHARACTER)
    return letter.isspace() or (mask.size, bytes(mask)) != (nothing.size, bytes(nothing))


def save_curves(
    path: str | Path,
    curves: dict[str, tuple[Sequence, Sequence[float], Sequence[tuple[float, float] | None]]],
    x_label: str,
    y_label: str,
) -> None:
    """
    Draw curves into a PNG file.

    Args:
        path (`str` or `Path`): The file.
        curves (`dict`): By name, positions, values and the intervals of the values, `None` where there is none.
        x_label (`str`): Of the positions; numbers that span more than a factor of 50 get a logarithmic axis, other
            things than numbers are spread evenly.
        y_label (`str`): Of the values.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    draw_curves(figure.subplots(), curves, x_label, y_label)
    figure.savefig(path, dpi=100)


def draw_curves(
    axes: "Axes",
    curves: dict[str, tuple[Sequence, Sequence[float], Sequence[tuple[float, float] | None]]],
    x_label: str,
    y_label: str,
) -> None:
    """Draw what [`save_curves`] saves into one of a figure's axes."""
    positions = [position for xs, _, _ in curves.values() for position in xs]
    numeric = all(isinstance(position, (int, float)) for position in positions)
    if numeric and min(positions) > 0 and max(positions) > 50 * min(positions):
        axes.set_xscale("log")
    for name, (xs, ys, intervals) in curves.items():
        places = list(xs) if numeric else [str(x) for x in xs]
        (line,) = axes.plot(places, ys, marker="o", label=name)
        shown = [(place, interval) for place, interval in zip(places, intervals) if interval is not None]
        if shown:
            places, bounds = zip(*shown)
            axes.fill_between(places, *zip(*bounds), alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend()
