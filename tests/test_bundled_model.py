from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image, ImageOps
from skimage import data

from srdd import MultiScaleVQModel, SRDDInpaintPipeline, SRDDPipeline


FOLDER = Path(__file__).parents[1] / "model_cards" / "srdd-fruits64"
TOKENIZER = FOLDER.parent / "srdd-tokenizer-64"


@pytest.fixture(scope="module")
def pipe():
    pipe = SRDDPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_labels_draw_fruit_of_their_colour_on_white(pipe):
    labels = ["Tomato 11", "Cherry 2", "Cherry Wax 2", "Apple Golden 2"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4 * len(labels))]
    images = pipe(labels, num_images_per_prompt=4, generator=generators, output_type="pt").images
    assert images.shape == (16, 3, 64, 64)
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() > 0.9
    red, green, blue = images[:, :, 16:48, 16:48].mean(dim=(2, 3)).view(4, 4, 3).mean(dim=1).T
    assert green[0] > red[0]  # an unripe tomato
    assert red[1] > 2 * green[1]  # a red cherry
    assert red[2] > green[2] > 2 * blue[2]  # an orange one
    assert min(red[3], green[3]) > 1.3 * blue[3]  # a yellow apple


def test_pictures_survive_the_tokenizer(pipe):
    drawn = pipe(["Apple 11", "Tomato 9"], generator=torch.Generator().manual_seed(0), output_type="pt").images
    again = pipe.vqvae.decode_tokens(pipe.vqvae.tokenize(drawn * 2 - 1)).sample.clamp(-1, 1) / 2 + 0.5
    assert (again - drawn).square().mean().sqrt() < 0.05


def test_edges_of_what_is_drawn_anew_are_nearer_to_the_picture_than_without_feather(pipe):
    inpaint = SRDDInpaintPipeline.from_pipe(pipe)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in range(3)]

    pictures = pipe(["Apple Braeburn 1"] * 3, generator=generators(), output_type="pt").images
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:20], mask[..., 44:60, :] = 1, 1  # both cross the edge of the fruit
    errors = []
    for feather in (0, 2, 6):
        options = {"feather": feather, "generator": generators(), "output_type": "pt"}
        edited = inpaint(pictures, mask, ["Apple Braeburn 1"] * 3, **options).images
        errors.append((edited - pictures).square().mean(dim=(1, 2, 3)).sqrt().mean().item())
    assert max(errors[1:]) < errors[0]


def test_photographs_of_any_kind_survive_the_tokenizer():
    vqvae = MultiScaleVQModel.from_pretrained(TOKENIZER)
    photographs = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    images = [ImageOps.fit(Image.fromarray(photograph), (64, 64)) for photograph in photographs]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2) / 127.5 - 1
    again = vqvae.decode_tokens(vqvae.tokenize(pixels)).sample.clamp(-1, 1)
    psnr = -10 * (again - pixels).div(2).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.min() > 20
    assert psnr.mean() > 23


def test_weights_are_small_and_the_cards_name_sources_and_licence():
    folders = (FOLDER, TOKENIZER)
    files = {path.resolve() for folder in folders for path in folder.rglob("*.safetensors")}
    assert sum(path.stat().st_size for path in files) <= 30_000_000
    for folder in folders:
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == "cc-by-sa-4.0"
        assert "Mihai Oltean" in card.text
    assert "Grigorev" in card.text  # whose photographs the tokenizer has seen


def test_the_transformer_knows_the_tokenizer(pipe):
    signed = pipe.vqvae.config.codebook_fingerprint
    assert pipe.transformer.config.codebook_fingerprint == signed
    pipe.vqvae.sign_codebook()
    assert pipe.vqvae.config.codebook_fingerprint == signed
