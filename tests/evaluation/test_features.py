import importlib.util
import json

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
)

from srdd.evaluation.features import EfficientNetLite0Features, load_features
from srdd.models.saved_weights import weights_hash


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TINY_VISION = {**TINY, "image_size": 28, "patch_size": 14}

PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 32},
    "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
    "resample": 3,
}


def save(model, folder, **preprocessor):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **preprocessor}))
    return model


def pictures(side: int = 28, count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(PREPROCESSOR[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    return (images.float() / 255 - mean) / std


def test_efficientnet_gives_features_and_logits_of_one_pass():
    extractor = load_features("efficientnet-lite0")
    images = pictures(48)
    features, logits = extractor.features_and_logits(images)
    assert features.shape == (3, 1280)
    torch.testing.assert_close(logits, extractor.network((images.float() - 127) / 128))
    assert torch.equal(features, extractor(images))
    assert extractor.has_logits
    assert not any(module.training for module in extractor.train().modules())


def test_only_inception_may_say_fid():
    extractor = EfficientNetLite0Features()
    names = (extractor.distance_name, extractor.kernel_distance_name, extractor.score_name)
    assert names == ("FD (efficientnet-lite0)", "KD (efficientnet-lite0)", "IS (efficientnet-lite0)")


@torch.no_grad()
def test_dinov2_gives_its_class_token(tmp_path):
    folder = tmp_path / "dinov2-tiny"
    model = save(Dinov2Model(Dinov2Config(**TINY_VISION)), folder)
    extractor = load_features(str(folder))
    assert extractor.name == "dinov2-tiny"
    assert extractor.distance_name == "FD-DINOv2 (dinov2-tiny)"
    images = pictures()
    expected = model(pixel_values=normalised(images)).last_hidden_state[:, 0]
    features, logits = extractor.features_and_logits(images)
    torch.testing.assert_close(features, expected)
    assert features.shape == (3, 16)
    assert logits is None
    assert not extractor.has_logits
    assert not features.requires_grad


def test_transformers_pictures_are_resized_as_by_pillow(tmp_path):
    save(Dinov2Model(Dinov2Config(**TINY_VISION)), tmp_path)
    extractor = load_features(str(tmp_path))
    for side in (64, 20):  # downwards with antialiasing, and upwards
        images = torch.nn.functional.interpolate(pictures(4).float(), size=side, mode="bilinear").byte()
        resized = [
            Image.fromarray(image.permute(1, 2, 0).numpy()).resize((28, 28), Image.Resampling.BICUBIC)
            for image in images
        ]
        pixels = [torch.tensor(list(image.tobytes())).view(28, 28, 3).permute(2, 0, 1) for image in resized]
        expected = normalised(torch.stack(pixels))
        # Pillow rounds to whole values, after each of its two passes.
        torch.testing.assert_close(extractor.pixel_values(images), expected, atol=1.6 / 255 / 0.2, rtol=0)


def test_edges_do_not_leave_the_range_of_pixels(tmp_path):
    save(Dinov2Model(Dinov2Config(**TINY_VISION)), tmp_path)
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    images[..., 32:] = 255  # bicubic interpolation overshoots here
    pixels = load_features(str(tmp_path)).pixel_values(images)
    black, white = normalised(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    assert (pixels >= black - 1e-5).all()
    assert (pixels <= white + 1e-5).all()


@torch.no_grad()
def test_a_pooler_without_weights_is_not_used(tmp_path):
    # A classifier's checkpoint: `AutoModel` adds a pooler with random weights, other ones in every run.
    model = save(ViTForImageClassification(ViTConfig(**TINY_VISION)), tmp_path)
    images = pictures()
    features = load_features(str(tmp_path))(images)
    assert torch.equal(features, load_features(str(tmp_path))(images))
    expected = model.vit(pixel_values=normalised(images)).last_hidden_state[:, 0]
    torch.testing.assert_close(features, expected)


@torch.no_grad()
def test_clip_gives_its_image_features(tmp_path):
    text = {**TINY, "vocab_size": 20, "max_position_embeddings": 8}
    model = save(CLIPModel(CLIPConfig(text_config=text, vision_config=TINY_VISION, projection_dim=8)), tmp_path)
    extractor = load_features(str(tmp_path))
    images = pictures()
    vision = model.vision_model(pixel_values=normalised(images)).pooler_output
    torch.testing.assert_close(extractor(images), model.visual_projection(vision))
    assert extractor(images).shape == (3, 8)
    assert extractor.distance_name.startswith("FD (")


@pytest.mark.parametrize(
    ("preprocessor", "size"),
    [
        ({"do_center_crop": False, "size": {"height": 14, "width": 28}}, (14, 28)),
        ({"do_center_crop": False, "size": {"shortest_edge": 28}}, (28, 28)),
        ({"crop_size": 14}, (14, 14)),
    ],
)
def test_sizes_are_those_of_the_preprocessor(tmp_path, preprocessor, size):
    save(Dinov2Model(Dinov2Config(**TINY_VISION)), tmp_path, **preprocessor)
    extractor = load_features(str(tmp_path))
    assert extractor.pixel_values(pictures()).shape == (3, 3, *size)


def test_models_that_see_no_images_are_refused(tmp_path):
    save(BertModel(BertConfig(**TINY, vocab_size=20)), tmp_path)
    with pytest.raises(ValueError, match="`name` must be a model of images with a preprocessor, got"):
        load_features(str(tmp_path))


def test_a_model_needs_its_preprocessor(tmp_path):
    save(Dinov2Model(Dinov2Config(**TINY_VISION)), tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="`name` must be a model of images with a preprocessor, got"):
        load_features(str(tmp_path))


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="`name` must be 'efficientnet-lite0', 'inception' or a model of transformers"
    ):
        load_features(str(tmp_path))


def test_weights_belong_to_inception(tmp_path):
    with pytest.raises(ValueError, match="`weights` must be None for other features than 'inception', got 'a.pth'"):
        load_features("efficientnet-lite0", "a.pth")
    with pytest.raises(ValueError, match="`weights` must be a file, got 'a.pth'"):
        load_features("inception", "a.pth")


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_inception_says_what_it_needs():
    with pytest.raises(ImportError, match="Inception needs `pip install torch-fidelity` and a torchvision"):
        load_features("inception")


def test_hash_tells_weights_apart():
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    assert weights_hash(first) == weights_hash(second)
    assert len(weights_hash(first)) == 12
    changed = weights_hash(first.bfloat16())
    with torch.no_grad():
        second.weight[1, 2] += 1e-3
    assert len({weights_hash(second), changed, weights_hash(torch.nn.Linear(2, 3))}) == 3
