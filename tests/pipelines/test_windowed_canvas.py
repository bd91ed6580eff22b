import pytest
import torch

from srdd.pipelines.windowed_canvas import WindowedCanvas


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (20, 13), (16, 16)])
def test_windows_cover_the_canvas_and_leave_given_pixels(size):
    pixels = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    known = torch.zeros(1, 1, *size)
    known[..., :3, :3] = 1
    canvas = WindowedCanvas(pixels, known, (8, 8))
    shares = []

    def draw(window):
        assert [side.stop - side.start for side in window] == [8, 8]
        assert canvas.known_pixels[(..., *window)].min() == 0
        shares.append(canvas.known_pixels[(..., *window)].mean().item())
        return torch.full((1, 3, 8, 8), 0.5), torch.tensor([[len(shares)]])

    assert canvas.fill(draw).item() == len(shares)
    assert canvas.known_pixels.min() == 1
    assert all(share > 0 for share in shares)
    torch.testing.assert_close(canvas.pixels, torch.where(known == 1, pixels, torch.tensor(0.5)))


def test_windows_fade_into_each_other():
    canvas = WindowedCanvas(torch.zeros(1, 3, 8, 12), torch.zeros(1, 1, 8, 12), (8, 8))
    starts = []

    def draw(window):
        starts.append(window[1].start)
        return torch.full((1, 3, 8, 8), len(starts) - 1.0), None

    canvas.fill(draw)
    assert starts == [0, 4]
    profile = canvas.pixels[0, 0, 4]
    assert (profile[:4] == 0).all()
    assert (profile[8:] == 1).all()
    assert (profile.diff() >= 0).all()
    assert profile.diff().max() < 0.5


def test_a_canvas_that_is_known_is_left_alone():
    canvas = WindowedCanvas(torch.zeros(1, 3, 8, 12), torch.ones(1, 1, 8, 12), (8, 8))
    assert canvas.fill(lambda window: pytest.fail("nothing is left to draw")) is None


def test_where_nothing_is_to_be_drawn_the_drawn_pixels_are_the_given_ones():
    pixels = torch.rand(1, 3, 8, 24, generator=torch.Generator().manual_seed(0))
    known = torch.ones(1, 1, 8, 24)
    known[..., 20:] = 0
    canvas = WindowedCanvas(pixels, known, (8, 8))
    canvas.fill(lambda window: (torch.zeros(1, 3, 8, 8), None))
    assert torch.equal(canvas.drawn_pixels[..., :16], pixels[..., :16])
    assert (canvas.drawn_pixels[..., 16:] == 0).all()
