"""The quantizer against a plain numpy version of the same maths, in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from srdd.models.quantizer_multiscale import MultiScaleQuantizer


PAPER_SCALES = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]

SCALE_LISTS = [
    pytest.param([[1, 1], [2, 2], [3, 3], [5, 5]], id="square"),
    pytest.param([[1, 1], [1, 2], [2, 3], [3, 7]], id="non-square"),
    pytest.param([[4, 4]], id="one-scale"),
]


def make_quantizer(scale_sizes, seed=0, **overrides) -> MultiScaleQuantizer:
    config = {"codebook_size": 24, "latent_channels": 6, "num_residual_convs": 3, "residual_ratio": 0.4}
    quantizer = MultiScaleQuantizer(scale_sizes=scale_sizes, **{**config, **overrides})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return quantizer


def random_latents(scale_sizes, batch_size=2, channels=6, seed=7) -> torch.Tensor:
    return torch.randn(batch_size, channels, *scale_sizes[-1], generator=torch.Generator().manual_seed(seed))


def area_matrix(size: int, new_size: int) -> np.ndarray:
    """Every output is the mean of the inputs that its cell touches."""
    matrix = np.zeros((new_size, size))
    for i in range(new_size):
        start, end = i * size // new_size, -(-(i + 1) * size // new_size)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def bicubic_matrix(size: int, new_size: int) -> np.ndarray:
    """Keys' cubic with a = -0.75, half-pixel centres, borders repeated."""

    def cubic(x: float, a: float = -0.75) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = np.zeros((new_size, size))
    for i in range(new_size):
        centre = (i + 0.5) * size / new_size - 0.5
        for neighbour in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(neighbour, 0), size - 1)] += cubic(centre - neighbour)
    return matrix


def plain_resize(x: np.ndarray, new_size, matrix) -> np.ndarray:
    rows, columns = (matrix(old, new) for old, new in zip(x.shape[-2:], new_size))
    return np.einsum("ih,bchw,jw->bcij", rows, x, columns)


def plain_conv3x3(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = x.shape[-2:]
    total = np.zeros((x.shape[0], weight.shape[0], height, width))
    for i in range(3):
        for j in range(3):
            total += np.einsum("oc,bchw->bohw", weight[:, :, i, j], padded[:, :, i : i + height, j : j + width])
    return total + bias[None, :, None, None]


def plain_residual_map(quantizer, token_map: np.ndarray, grid_size, conv_index: int) -> np.ndarray:
    conv, table = quantizer.residual_convs[conv_index], quantizer.codebook.weight.detach().double().numpy()
    codes = table[token_map].transpose(0, 3, 1, 2)
    if codes.shape[-2:] != tuple(grid_size):
        codes = plain_resize(codes, grid_size, bicubic_matrix)
    weight, bias = conv.weight.detach().double().numpy(), conv.bias.detach().double().numpy()
    ratio = quantizer.residual_ratio
    return (1 - ratio) * codes + ratio * plain_conv3x3(codes, weight, bias)


def plain_conv_index(scale: int, num_scales: int, num_convs: int) -> int:
    margin = 1 / 3 / num_convs if num_convs == 4 else 1 / 2 / num_convs
    ticks = np.linspace(margin, 1 - margin, num_convs)
    return int(np.argmin(np.abs(ticks - (scale / (num_scales - 1) if num_scales > 1 else 1.0))))


def plain_quantize(quantizer, latents: torch.Tensor, scale_sizes):
    """VAR's Algorithm 1: token maps and the rest after every scale."""
    table = quantizer.codebook.weight.detach().double().numpy()
    rest = latents.double().numpy()
    grid_size = rest.shape[-2:]
    token_maps, rests = [], []
    for scale, size in enumerate(scale_sizes):
        small = rest if tuple(size) == grid_size else plain_resize(rest, size, area_matrix)
        vectors = small.transpose(0, 2, 3, 1)[..., None, :]  # (B, h, w, 1, C)
        if quantizer.normalize_codes:
            unit = table / np.linalg.norm(table, axis=1, keepdims=True)
            token_map = (vectors * unit).sum(-1).argmax(-1)
        else:
            token_map = ((vectors - table) ** 2).sum(-1).argmin(-1)
        index = plain_conv_index(scale, len(scale_sizes), len(quantizer.residual_convs))
        rest = rest - plain_residual_map(quantizer, token_map, grid_size, index)
        token_maps.append(token_map)
        rests.append(rest)
    return token_maps, rests


def packed(token_maps) -> torch.Tensor:
    return torch.cat([torch.from_numpy(token_map).flatten(1) for token_map in token_maps], dim=1)


@pytest.mark.parametrize("normalize_codes", [False, True], ids=["euclidean", "cosine"])
@pytest.mark.parametrize("scale_sizes", SCALE_LISTS)
def test_greedy_quantization_is_the_plain_loop(scale_sizes, normalize_codes):
    quantizer = make_quantizer(scale_sizes, normalize_codes=normalize_codes)
    latents = random_latents(scale_sizes, batch_size=3)
    token_maps, rests = plain_quantize(quantizer, latents, scale_sizes)
    with torch.no_grad():
        token_ids = quantizer.quantize(latents, scale_sizes)
        states = quantizer.latent_states(token_ids, scale_sizes, scale_sizes[-1])
    assert token_ids.unique().numel() > 5
    assert torch.equal(token_ids, packed(token_maps))
    for state, rest in zip(states, rests):
        np.testing.assert_allclose((latents - state).numpy(), rest, atol=1e-5)


@pytest.mark.parametrize("scale_sizes", SCALE_LISTS)
def test_residual_maps_of_all_scales_add_up_to_the_latent_state(scale_sizes):
    quantizer = make_quantizer(scale_sizes)
    with torch.no_grad():
        token_ids = quantizer.quantize(random_latents(scale_sizes), scale_sizes)
        states = quantizer.latent_states(token_ids, scale_sizes, scale_sizes[-1])
        total, start = torch.zeros_like(states[0]), 0
        for (height, width), state in zip(scale_sizes, states):
            token_map = token_ids[:, start : start + height * width].view(-1, height, width)
            total = total + quantizer.residual_map(token_map, scale_sizes[-1])
            start += height * width
            torch.testing.assert_close(state, total, atol=1e-5, rtol=0)
    assert len(states) == len(scale_sizes)


@pytest.mark.parametrize("scale_size", [[1, 1], [2, 3], [3, 7]])
def test_residual_map_is_the_convolved_upsampled_codes(scale_size):
    scale_sizes = [[1, 1], [2, 3], [3, 7]]
    quantizer = make_quantizer(scale_sizes)
    token_map = torch.randint(24, (2, *scale_size), generator=torch.Generator().manual_seed(0))
    expected = plain_residual_map(quantizer, token_map.numpy(), (3, 7), conv_index=scale_sizes.index(scale_size))
    with torch.no_grad():
        np.testing.assert_allclose(quantizer.residual_map(token_map, (3, 7)).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("normalize_codes", [False, True], ids=["euclidean", "cosine"])
def test_nearest_tokens_by_brute_force(normalize_codes):
    quantizer = make_quantizer([[5, 4]], codebook_size=50, normalize_codes=normalize_codes)
    features = random_latents([[5, 4]], batch_size=3)
    found = quantizer.nearest_tokens(features)
    table = quantizer.codebook.weight.detach()
    for image in range(3):
        for row in range(5):
            for column in range(4):
                vector = features[image, :, row, column]
                if normalize_codes:
                    distances = [1 - F.cosine_similarity(vector, code, dim=0).item() for code in table]
                else:
                    distances = [(vector - code).norm().item() for code in table]
                assert found[image, row, column] == np.argmin(distances)


def test_cosine_and_euclidean_codes_differ():
    euclidean, cosine = make_quantizer([[4, 4]]), make_quantizer([[4, 4]], normalize_codes=True)
    features = random_latents([[4, 4]])
    assert not torch.equal(euclidean.nearest_tokens(features), cosine.nearest_tokens(features))


def test_a_code_is_its_own_nearest_code():
    quantizer = make_quantizer([[4, 6]])
    token_map = torch.arange(24).view(1, 4, 6)
    with torch.no_grad():
        assert torch.equal(quantizer.nearest_tokens(quantizer.codebook(token_map).permute(0, 3, 1, 2)), token_map)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents_are_compared_in_float32(dtype):
    scale_sizes = [[1, 1], [2, 2], [4, 4]]
    quantizer = make_quantizer(scale_sizes).to(dtype)
    latents = random_latents(scale_sizes).to(dtype)
    with torch.no_grad():
        tokens = quantizer.nearest_tokens(latents)
        states = quantizer.latent_states(quantizer.quantize(latents, scale_sizes), scale_sizes, (4, 4))
        assert torch.equal(tokens, quantizer.float().nearest_tokens(latents.float()))
    assert all(state.dtype == torch.float32 for state in states)


def test_autocast_does_not_change_the_tokens():
    scale_sizes = [[1, 1], [2, 2], [4, 4]]
    quantizer = make_quantizer(scale_sizes, codebook_size=500)
    latents = random_latents(scale_sizes)
    expected = quantizer.nearest_tokens(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.nearest_tokens(latents), expected)
        output = quantizer(latents, scale_sizes)
    assert output.latents.dtype == output.codebook_loss.dtype == output.commitment_loss.dtype == torch.float32


def chosen_convs(quantizer, scale_sizes, grid_size) -> list[int]:
    convs = list(quantizer.residual_convs)
    return [next(i for i, c in enumerate(convs) if c is quantizer.residual_conv(s, grid_size)) for s in scale_sizes]


def test_four_convolutions_over_ten_scales_as_var_shares_them():
    sizes = [[side, side] for side in PAPER_SCALES]
    quantizer = make_quantizer(sizes, num_residual_convs=4)
    # The third and the eighth scale lie midway between two ticks; VAR's arithmetic, numpy's, gives them the later one.
    assert chosen_convs(quantizer, sizes, (16, 16)) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("num_convs", range(1, 13))
def test_a_scale_uses_the_convolution_at_the_nearest_tick(num_convs):
    for num_scales in range(1, 20):
        sizes = [[1, width] for width in range(1, num_scales + 1)]
        quantizer = make_quantizer(sizes, num_residual_convs=num_convs)
        expected = [plain_conv_index(scale, num_scales, num_convs) for scale in range(num_scales)]
        assert chosen_convs(quantizer, sizes, sizes[-1]) == expected


@pytest.mark.parametrize("num_scales", [2, 3, 4, 6, 10])
def test_as_many_convolutions_as_scales_give_each_scale_its_own(num_scales):
    sizes = [[side, side] for side in PAPER_SCALES[:num_scales]]
    quantizer = make_quantizer(sizes, num_residual_convs=num_scales)
    assert chosen_convs(quantizer, sizes, sizes[-1]) == list(range(num_scales))


def test_a_scale_keeps_its_convolution_in_a_shorter_list_and_on_another_grid():
    sizes = [[side, side] for side in PAPER_SCALES]
    quantizer = make_quantizer(sizes, num_residual_convs=4)
    subset = [[1, 1], [3, 3], [5, 5], [8, 8], [13, 13], [16, 16]]
    assert chosen_convs(quantizer, subset, (16, 16)) == [0, 1, 1, 2, 3, 3]
    doubled = [[2 * side, 2 * side] for side in PAPER_SCALES]
    assert chosen_convs(quantizer, doubled, (32, 32)) == chosen_convs(quantizer, sizes, (16, 16))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_residual_conv_mixes_identity_and_convolution(ratio):
    quantizer = make_quantizer([[1, 1], [5, 3]], residual_ratio=ratio)
    token_map = torch.randint(16, (2, 5, 3), generator=torch.Generator().manual_seed(0))
    codes, conv = quantizer.codebook(token_map).permute(0, 3, 1, 2), quantizer.residual_conv((5, 3), (5, 3))
    expected = (1 - ratio) * codes + ratio * F.conv2d(codes, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(quantizer.residual_map(token_map, (5, 3)), expected, atol=1e-6, rtol=0)


def test_coarse_part_of_a_pyramid_is_a_prefix_of_the_whole():
    scale_sizes = [[1, 1], [2, 2], [3, 3], [5, 5]]
    quantizer = make_quantizer(scale_sizes)
    latents = random_latents(scale_sizes)
    with torch.no_grad():
        whole = quantizer.quantize(latents, scale_sizes)
        assert torch.equal(quantizer.quantize(latents, scale_sizes[:2]), whole[:, :5])


def test_straight_through_gradient_is_the_identity():
    scale_sizes = [[1, 1], [2, 2], [4, 4]]
    quantizer = make_quantizer(scale_sizes)
    latents = random_latents(scale_sizes).requires_grad_()
    output = quantizer(latents, scale_sizes)
    with torch.no_grad():
        states = quantizer.latent_states(output.token_ids, scale_sizes, (4, 4))
    torch.testing.assert_close(output.latents, states[-1], atol=1e-5, rtol=0)
    upstream = random_latents(scale_sizes, seed=1)
    (output.latents * upstream).sum().backward()
    torch.testing.assert_close(latents.grad, upstream, atol=0, rtol=0)
    assert all(parameter.grad is None for parameter in quantizer.parameters())


def test_training_reads_the_codebook_once_and_makes_each_residual_map_once():
    scale_sizes = [[1, 1], [2, 2], [4, 4]]
    quantizer, shapes = make_quantizer(scale_sizes), []
    quantizer.codebook.register_forward_hook(lambda module, args, output: shapes.append(tuple(args[0].shape)))
    latents = random_latents(scale_sizes)
    quantizer(latents, scale_sizes)
    batch_size, codebook_size = len(latents), quantizer.codebook.num_embeddings
    assert shapes == [(codebook_size,), *((batch_size, *size) for size in scale_sizes)]


def test_losses_are_the_mean_squared_distance_over_the_scales():
    scale_sizes = [[1, 1], [2, 2], [4, 4]]
    quantizer = make_quantizer(scale_sizes)
    latents = random_latents(scale_sizes)
    _, rests = plain_quantize(quantizer, latents, scale_sizes)
    expected = np.mean([np.mean(rest**2) for rest in rests])
    output = quantizer(latents, scale_sizes)
    assert output.codebook_loss.item() == pytest.approx(expected, abs=1e-5)
    assert output.commitment_loss.item() == pytest.approx(expected, abs=1e-5)


def test_codebook_loss_moves_used_codes_only_and_commitment_loss_the_latents_only():
    scale_sizes = [[1, 1], [2, 2], [4, 4]]
    quantizer = make_quantizer(scale_sizes, codebook_size=100)
    latents = random_latents(scale_sizes).requires_grad_()
    output = quantizer(latents, scale_sizes)

    output.codebook_loss.backward(retain_graph=True)
    moved = quantizer.codebook.weight.grad.abs().sum(dim=1) > 0
    assert moved.nonzero().flatten().tolist() == output.token_ids.unique().tolist()
    assert latents.grad is None

    quantizer.zero_grad()
    output.commitment_loss.backward()
    assert all(parameter.grad is None for parameter in quantizer.parameters())
    with torch.no_grad():
        states = quantizer.latent_states(output.token_ids, scale_sizes, (4, 4))
        expected = sum(2 * (latents - state) for state in states) / len(states) / latents.numel()
    torch.testing.assert_close(latents.grad, expected, atol=1e-6, rtol=0)
