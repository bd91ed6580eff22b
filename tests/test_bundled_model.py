from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from srdd import SRDDInpaintPipeline, SRDDPipeline


FOLDER = Path(__file__).parents[1] / "model_cards" / "srdd-fruits64"


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
    inpaint, generator = SRDDInpaintPipeline.from_pipe(pipe), torch.Generator
    picture = pipe("Apple Braeburn 1", generator=generator().manual_seed(0), output_type="pt").images
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:20], mask[..., 44:60, :] = 1, 1  # both cross the edge of the fruit
    errors = []
    for feather in (0, 2, 6):
        options = {"feather": feather, "generator": generator().manual_seed(0), "output_type": "pt"}
        edited = inpaint(picture, mask, "Apple Braeburn 1", **options).images
        errors.append((edited - picture).square().mean().sqrt().item())
    assert max(errors[1:]) < errors[0]


def test_weights_are_small_and_the_card_names_source_and_licence():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) <= 25_000_000
    card = ModelCard.load(FOLDER / "README.md")
    assert card.data.license == "cc-by-sa-4.0"
    assert "Mihai Oltean" in card.text
