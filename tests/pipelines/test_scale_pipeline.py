import pytest
from diffusers import DDIMScheduler
from tiny_models import tiny_scheduler, tiny_transformer, tiny_vqvae

from srdd.pipelines.scale_pipeline import check_components


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": DDIMScheduler()}, "`scheduler` must be a ScaleScheduler, got DDIMScheduler"),
        (
            {"scheduler": tiny_scheduler(scale_sizes=[1, 4])},
            r"must be the scales of the transformer, \[\[1, 1\], \[2, 2\], \[4, 4\]\], got \[\[1, 1\], \[4, 4\]\]",
        ),
        ({"vqvae": tiny_vqvae(codebook_size=40)}, "must have the same codebook_size, got 40 and 32"),
        ({"vqvae": tiny_vqvae(latent_channels=4)}, "must have the same latent_channels, got 4 and 8"),
        (
            {"vqvae": tiny_vqvae(sample_size=10, scale_sizes=[1, 5])},
            r"must have the same latent grid, got \[5, 5\] and \[4, 4\]",
        ),
    ],
)
def test_components_that_do_not_fit_are_refused(change, message):
    components = {"vqvae": tiny_vqvae(), "transformer": tiny_transformer(), "scheduler": tiny_scheduler()}
    check_components(**components)
    with pytest.raises(ValueError, match=message):
        check_components(**{**components, **change})


def test_a_tokenizer_may_have_scales_of_its_own():
    check_components(tiny_vqvae(scale_sizes=[1, 3, 4]), tiny_transformer(), tiny_scheduler(scales=[1, 4]))
