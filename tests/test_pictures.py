import io

import numpy as np
import pytest
import torch
from PIL import Image

from srdd.data.images import image_to_tensor
from srdd.pictures import read_masks, read_pictures, to_rgb


GREY = np.full((6, 4, 3), 100, dtype=np.uint8)


def turned(picture: Image.Image) -> Image.Image:
    """The picture as a phone stores it: on its side, with a note that says so."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    return Image.open(file)


# One grey picture in many forms.
FORMS = {
    "RGB": Image.fromarray(GREY),
    "L": Image.fromarray(GREY[..., 0]),
    "palette": Image.fromarray(GREY).convert("P", palette=Image.Palette.ADAPTIVE),
    "opaque": Image.fromarray(GREY).convert("RGBA"),
    "CMYK": Image.fromarray(GREY).convert("CMYK"),
    "16 bits": Image.fromarray(GREY[..., 0].astype(np.uint16) * 257),
    "mode I": Image.fromarray(GREY[..., 0].astype(np.int32) * 257),
    "turned": turned(Image.fromarray(GREY)),
    "uint8 array": GREY,
    "uint8 tensor": torch.from_numpy(GREY).permute(2, 0, 1),
    "grey array": GREY[..., 0],
    "grey tensor": torch.from_numpy(GREY[..., :1]).permute(2, 0, 1),
    "two dimensions": torch.from_numpy(GREY[..., 0]),
    "uint16 array": GREY.astype(np.uint16) * 257,
    "float array": GREY / 255,
    "half tensor": torch.from_numpy(GREY).permute(2, 0, 1).double() / 255,
    "opaque tensor": torch.cat([torch.full((3, 6, 4), 100 / 255), torch.ones(1, 6, 4)]),
    "batch": GREY[None],
    "list": [GREY],
    "list of a batch": [torch.from_numpy(GREY).permute(2, 0, 1)[None]],
    "upside down in memory": np.ascontiguousarray(GREY[::-1])[::-1],
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_a_picture_are_one_picture(form):
    pixels = read_pictures("image", FORMS[form])
    assert pixels.shape == (1, 3, 6, 4)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, torch.full((1, 3, 6, 4), 100 / 255), atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", [form for form, picture in FORMS.items() if isinstance(picture, Image.Image)])
def test_training_reads_what_pipelines_read(form):
    pixels = image_to_tensor(FORMS[form], 4)
    assert torch.equal(pixels, read_pictures("image", FORMS[form])[0, :, :4] * 2 - 1)


def test_transparency_is_laid_on_white_everywhere():
    clear = np.dstack([GREY, np.zeros((6, 4, 1), np.uint8)])
    half = np.dstack([GREY * 0, np.full((6, 4, 1), 51, np.uint8)])
    palette = Image.fromarray(GREY).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    tensor = torch.from_numpy(clear).permute(2, 0, 1)
    for picture in (Image.fromarray(clear), Image.fromarray(clear).convert("LA"), clear, tensor, palette):
        assert (read_pictures("image", picture) == 1).all()
    for picture in (Image.fromarray(half), half, half / 255):
        torch.testing.assert_close(read_pictures("image", picture), torch.full((1, 3, 6, 4), 0.8), atol=3e-3, rtol=0)


def test_a_picture_is_read_alike_alone_and_beside_others():
    bright, dark = torch.full((3, 4, 4), 0.5), torch.zeros(3, 4, 4)
    assert torch.equal(read_pictures("image", [bright, dark])[:1], read_pictures("image", bright))
    with pytest.raises(ValueError, match=r"`image` cannot be read: floats must lie in \[0, 1\], got \[-0.2, -0.2\]"):
        read_pictures("image", [bright, torch.full((3, 4, 4), -0.2)])


def test_a_turned_picture_is_read_as_it_is_seen():
    seen = Image.new("RGB", (8, 16), "white")
    seen.paste("red", (0, 12, 8, 16))
    pixels = read_pictures("image", turned(seen))
    assert pixels.shape == (1, 3, 16, 8)
    assert torch.equal(pixels, read_pictures("image", seen))
    assert to_rgb(turned(seen)).size == (8, 16)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ([], "`image` must hold at least one picture, got an empty list"),
        ("cat.png", "must be a PIL.Image.Image, an np.ndarray or a torch.Tensor, got str"),
        (None, "got NoneType"),
        ([[[0.0]]], "got list"),
        (Image.fromarray(GREY[..., 0].astype(np.float32)), "`image` cannot be read: mode F has no fixed range"),
        (Image.fromarray(GREY[..., 0].astype(np.int32) * 65536), r"mode I must have values in \[0, 65535\], got \["),
        (GREY.astype(np.int64), "floats in .*uint8 or uint16, got int64"),
        (torch.from_numpy(GREY).permute(2, 0, 1).long(), "floats in .*uint8 or uint16, got torch.int64"),
        (GREY.astype(np.float32), r"floats must lie in \[0, 1\], got \[100, 100\]"),
        (GREY / 255 - 1, r"floats must lie in \[0, 1\], got \[-0.6078, -0.6078\]"),
        (GREY * np.nan, r"floats must lie in \[0, 1\], got \[nan, nan\]"),
        (GREY * np.inf, r"floats must lie in \[0, 1\], got \[inf, inf\]"),
        (GREY * 1j, "got complex128"),
        (np.array(["a"]), "uint8 or uint16, got <U1"),
        (GREY[..., :2], r"its shape must be \(height, width, channels\) with 1, 3 or 4 channels.* got \(6, 4, 2\)"),
        (np.zeros((3, 6, 5)), r"its shape .* got \(3, 6, 5\)"),
        (torch.from_numpy(GREY), r"its shape must be \(channels, height, width\).* got \(6, 4, 3\)"),
        (torch.zeros(3, 0, 4), r"its shape .* got \(3, 0, 4\)"),
        (torch.zeros(1, 1, 3, 4, 4), r"its shape .* got \(1, 1, 3, 4, 4\)"),
        (torch.zeros(5), r"its shape .* got \(5,\)"),
        ([GREY, GREY[:4]], r"pictures of one size, got the heights and widths \[\(4, 4\), \(6, 4\)\]"),
    ],
)
def test_what_cannot_be_read_surely_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        read_pictures("image", picture)


def test_masks_of_all_kinds():
    hard = np.zeros((6, 4), dtype=np.uint8)
    hard[2:] = 255
    expected = torch.from_numpy(hard).float().view(1, 1, 6, 4) / 255
    forms = [
        Image.fromarray(hard),
        Image.fromarray(hard).convert("1"),
        Image.fromarray(hard).convert("RGB"),
        Image.fromarray(hard).convert("RGBA"),
        hard,
        hard > 0,
        hard[..., None] / 255,
        torch.from_numpy(hard > 0),
        torch.from_numpy(hard)[None].expand(3, -1, -1),
        [hard, hard][:1],
    ]
    for mask in forms:
        torch.testing.assert_close(read_masks("mask_image", mask), expected, atol=1e-6, rtol=0)
    assert read_masks("mask_image", [hard, hard]).shape == (2, 1, 6, 4)


def test_transparent_masks_are_refused():
    strokes = np.zeros((6, 4, 4), dtype=np.uint8)
    strokes[2:] = 255
    for mask in (Image.fromarray(strokes), strokes, torch.from_numpy(strokes).permute(2, 0, 1)):
        with pytest.raises(ValueError, match="`mask_image` cannot be read: a mask must not be transparent anywhere"):
            read_masks("mask_image", mask)
