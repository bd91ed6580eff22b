import torch
import torch.nn.functional as F

from srdd.evaluation.features import EfficientNetLite0Features
from srdd.evaluation.perceptual_distance import EfficientNetPerceptualLoss


def pictures() -> torch.Tensor:
    """Smooth random pictures in [-1, 1]."""
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, size=(64, 64), mode="bicubic").clamp(-1, 1)


def blurred(images: torch.Tensor, width: int) -> torch.Tensor:
    return F.avg_pool2d(images, width, stride=1, padding=width // 2, count_include_pad=False)


def test_loss_is_zero_for_equal_pictures_and_grows_with_blur():
    loss, images = EfficientNetPerceptualLoss(), pictures()
    losses = [loss(blurred(images, width), images).item() for width in (1, 3, 5, 9)]
    assert losses[0] == 0
    assert losses == sorted(set(losses))


def test_gradient_reaches_the_sample_but_not_the_network():
    loss, images = EfficientNetPerceptualLoss().train(), pictures()
    sample = blurred(images, 5).requires_grad_()
    loss(sample, images).backward()
    assert sample.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert not any(module.training for module in loss.modules())


def test_features_have_their_shape_and_tell_pictures_apart():
    images = pictures().add(1).mul(127.5).round().to(torch.uint8)
    features = EfficientNetLite0Features()(torch.cat([images, images[:1]]))
    assert features.shape == (3, 1280)
    torch.testing.assert_close(features[2], features[0])
    assert (features[0] - features[1]).norm() > 0.1 * features[0].norm()
