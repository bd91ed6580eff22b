import pytest
import torch
from accelerate import Accelerator

from srdd.training.adversarial_loss import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss


def random_images(batch_size: int = 4, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(
    ("real", "fake", "loss"),
    [
        ([1.0, 2.0], [-1.0, -5.0], 0.0),  # both beyond the margins
        ([0.0], [0.0], 1.0),
        ([0.5, 3.0], [-0.5, -3.0], 0.25),
        ([-1.0, 1.0], [1.0, -1.0], 1.0),
        ([0.25], [-2.0], 0.375),
    ],
)
def test_hinge_loss_of_the_discriminator(real, fake, loss):
    assert discriminator_loss(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(loss)


def test_loss_of_the_generator_falls_where_it_is_believed():
    assert generator_loss(torch.tensor([[1.0, 3.0], [-2.0, 0.0]])).item() == -0.5


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_discriminator_judges_patches(num_layers):
    discriminator = PatchDiscriminator(channels=4, num_layers=num_layers)
    height, width = 3 * 2**num_layers, 5 * 2**num_layers + 1  # the least that it can judge, and an odd side
    logits = discriminator(torch.zeros(2, 3, height, width))
    assert logits.shape == (2, 1, height // 2**num_layers - 2, width // 2**num_layers - 2)


def test_discriminator_of_grey_pictures():
    assert PatchDiscriminator(in_channels=1, channels=8)(torch.zeros(1, 1, 32, 32)).shape == (1, 1, 2, 2)


@torch.no_grad()
def test_discriminator_judges_every_image_by_itself():
    discriminator, images = PatchDiscriminator(channels=8), random_images()
    together = discriminator(images)
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert len(list(discriminator.buffers())) == 0


def test_training_tells_real_from_fake():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=8, num_layers=2)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))

    def draw(seed):
        noise = random_images(8, 16, seed)
        return noise, torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)  # fakes are blurred

    losses = []
    for step in range(40):
        real, fake = draw(step)
        loss = discriminator_loss(*discriminator(torch.cat([real, fake])).chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.05)
    assert losses[-1] < 0.2
    with torch.no_grad():
        real, fake = (discriminator(images).mean(dim=(1, 2, 3)) for images in draw(99))
    assert (real > 0).all()
    assert (fake < 0).all()


@pytest.fixture
def head():
    """A last layer behind other layers, and two losses of what it makes."""
    torch.manual_seed(0)
    body, last = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 3, 3, padding=1)
    images = random_images(2, 8)
    sample = last(body(images))
    return body, last, (sample - images).abs().mean(), generator_loss(sample.square().flatten(1).mean(dim=1))


def test_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer(head):
    _, last, reconstruction, adversarial = head
    weight = adaptive_weight(reconstruction, adversarial, last.weight, Accelerator())
    norms = []
    for loss in (reconstruction, adversarial):
        last.weight.grad = None
        loss.backward(retain_graph=True, inputs=[last.weight])
        norms.append(last.weight.grad.square().sum().sqrt())
    torch.testing.assert_close(weight, norms[0] / norms[1], atol=1e-5, rtol=1e-5)
    assert weight.shape == ()
    assert not weight.requires_grad


def test_adaptive_weight_leaves_gradients_and_graph_for_the_step(head):
    body, last, reconstruction, adversarial = head
    weight = adaptive_weight(reconstruction, adversarial, last.weight, Accelerator())
    assert last.weight.grad is None
    (reconstruction + weight * adversarial).backward()
    assert body.weight.grad.abs().sum() > 0


def test_adaptive_weight_makes_both_losses_pull_alike(head):
    _, last, reconstruction, adversarial = head
    weight = adaptive_weight(reconstruction, adversarial, last.weight, Accelerator())
    pulls = [
        torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm()
        for loss in (reconstruction, weight * adversarial)
    ]
    torch.testing.assert_close(pulls[0], pulls[1], rtol=1e-4, atol=0)


def test_adaptive_weight_has_an_upper_bound(head):
    _, last, reconstruction, adversarial = head
    assert adaptive_weight(reconstruction, 1e-12 * adversarial, last.weight, Accelerator()) == 1e4
    assert adaptive_weight(reconstruction, 1e-12 * adversarial, last.weight, Accelerator(), largest=7.0) == 7
    assert adaptive_weight(reconstruction, 0 * adversarial, last.weight, Accelerator()) == 1e4
