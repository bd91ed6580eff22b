"""Latent diffusion as others are compared with it: an image whatever its batch, one formula, diffusers' folders."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, LDMPipeline
from tiny_models import ID2LABEL, LATENT_CHANNELS, tiny_autoencoder, tiny_latent_diffusion, tiny_pipeline

from srdd import SRDDPipeline
from srdd.evaluation.image_sources import PipelineImages
from srdd.evaluation.latent_diffusion import LatentDiffusionPipeline, load_drawing_pipeline
from srdd.evaluation.pipeline_variants import PipelineVariant, variant_of


KINDS = ("transformer", "unet")


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe, labels, *seeds, **options) -> torch.Tensor:
    return pipe(labels, generator=generators(*seeds), output_type="pt", **options).images


def by_hand(pipe, labels, *seeds) -> torch.Tensor:
    """DDIM without noise from its formula, guided by nothing; the model predicts the noise."""
    shape = (LATENT_CHANNELS, 4, 4)
    latents = torch.stack([torch.randn(1, *shape, generator=generator)[0] for generator in generators(*seeds)])
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    for timestep, next_timestep in ((999, 749), (749, 499), (499, 249), (249, -1)):
        timesteps = torch.full((len(latents),), timestep)
        with torch.no_grad():
            noise = pipe.denoiser(latents, timesteps, class_labels=labels).sample
        clean = (latents - (1 - kept[timestep]).sqrt() * noise) / kept[timestep].sqrt()
        share = kept[next_timestep] if next_timestep >= 0 else kept[0]
        latents = share.sqrt() * clean + (1 - share).sqrt() * noise
    with torch.no_grad():
        return (pipe.vae.decode(latents / 0.7).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_its_batch(kind):
    pipe = tiny_latent_diffusion(kind)
    images = draw(pipe, ["banana", 4, 0], 7, 8, 9)
    assert images.shape == (3, 3, 8, 8)
    assert 0 <= images.min() < images.max() <= 1
    torch.testing.assert_close(draw(pipe, [4, 1], 8, 7), images[[1, 0]], atol=1e-5, rtol=0)
    assert not torch.allclose(draw(pipe, [4], 7)[0], images[1], atol=1e-2)
    in_a_tuple = pipe([4, 1], generator=tuple(generators(8, 7)), output_type="pt").images
    assert torch.equal(in_a_tuple, draw(pipe, [4, 1], 8, 7))
    assert not torch.allclose(draw(pipe, [3], 8)[0], images[1], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_of_one_is_the_conditional_alone(kind):
    pipe = tiny_latent_diffusion(kind)
    expected = by_hand(pipe, torch.tensor([1, 4]), 0, 1)
    torch.testing.assert_close(draw(pipe, [1, 4], 0, 1, guidance_scale=1), expected, atol=1e-3, rtol=0)
    guided = draw(pipe, [1, 4], 0, 1)
    assert not torch.allclose(guided, expected, atol=1e-2)
    assert torch.equal(guided, draw(pipe, [1, 4], 0, 1, guidance_scale=1.5))


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_is_diffusers_formula(kind):
    pipe = tiny_latent_diffusion(kind)
    latents, labels = torch.randn(2, LATENT_CHANNELS, 4, 4, generator=generators(0)[0]), torch.tensor([0, 3])
    with torch.no_grad():
        guided, told, untold = (
            pipe.predict(latents, torch.tensor(500), ids, scale)
            for ids, scale in ((labels, 3.0), (labels, 1.0), (torch.full_like(labels, pipe.null_class), 1.0))
        )
    torch.testing.assert_close(guided, untold + 3 * (told - untold), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(told, untold, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_label_nothing_is_said(kind):
    pipe = tiny_latent_diffusion(kind)
    expected = by_hand(pipe, torch.tensor([pipe.null_class] * 2), 0, 1)
    images = draw(pipe, None, 0, 1, num_images_per_prompt=2)
    torch.testing.assert_close(images, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_classes", [0, 5])
def test_the_folder_of_a_dit_is_one_of_diffusers(tmp_path, num_classes):
    pipe = tiny_latent_diffusion("transformer", num_classes)
    pipe.save_pretrained(tmp_path)
    theirs = DiTPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    labels = [1, 4] if num_classes else None
    images = theirs(
        labels or [1000, 1000],
        guidance_scale=3.0 if labels else 1.0,
        generator=generators(0, 1),
        num_inference_steps=4,
        output_type="pt",
    ).images
    more = {"guidance_scale": 3.0} if labels else {"num_images_per_prompt": 2}
    torch.testing.assert_close(draw(pipe, labels, 0, 1, **more), images, atol=1e-4, rtol=0)
    assert (theirs.labels.get("love apple") == 4) == bool(labels)


def test_diffusers_draws_with_the_parts_of_an_unconditional_unet():
    pipe = tiny_latent_diffusion("unet", num_classes=0)
    theirs = LDMPipeline(vqvae=pipe.vae, unet=pipe.unet, scheduler=pipe.scheduler)
    theirs.set_progress_bar_config(disable=True)
    images = theirs(2, generator=generators(0, 1), num_inference_steps=4, output_type="np").images
    ours = pipe(num_images_per_prompt=2, generator=generators(0, 1), output_type="np").images
    torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(images), atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_folders_load_what_was_saved(tmp_path, kind, num_classes):
    pipe = tiny_latent_diffusion(kind, num_classes)
    pipe.save_pretrained(tmp_path)
    loaded = load_drawing_pipeline(str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.num_classes, loaded.sample_size) == (num_classes, (8, 8))
    assert loaded.id2label == (ID2LABEL if num_classes else {})
    assert loaded.config.num_inference_steps == (50 if kind == "transformer" else 4)
    loaded.register_to_config(num_inference_steps=4)
    labels = ["cherry"] if num_classes else None
    # Some CPUs compute other last digits where weights are not aligned, as in the file that they are mapped from.
    for model in (loaded.vae, loaded.components[kind]):
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    assert torch.equal(draw(loaded, labels, 3), draw(pipe, labels, 3))


def test_other_folders_are_those_of_our_pipeline(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    assert type(load_drawing_pipeline(str(tmp_path))) is SRDDPipeline
    with pytest.raises(ValueError, match="nowhere"):
        load_drawing_pipeline(str(tmp_path / "nowhere"))


def test_a_learned_variance_is_left_out():
    pipe = tiny_latent_diffusion("transformer")
    config = {**pipe.transformer.config, "out_channels": 2 * LATENT_CHANNELS}
    model = DiTTransformer2DModel.from_config(config).eval()
    other = LatentDiffusionPipeline(pipe.vae, pipe.scheduler, transformer=model, num_inference_steps=2)
    other.set_progress_bar_config(disable=True)
    assert other.num_classes == 1000
    assert draw(other, [999], 0).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([5], {}, r"`class_labels` must lie in \[0, 4\], got 5"),
        (["pear"], {}, "pear"),
        ([0], {"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number"),
        ([0], {"num_images_per_prompt": 0}, "`num_images_per_prompt` must be an integer of at least 1"),
        ([0], {"generator": generators(0, 1)}, "`generator` must be a list of 1 generators, got 2"),
        ([0], {"generator": 3}, "`generator` must be a torch.Generator, a list of them or None, got 3"),
        ([0], {"generator": [None]}, r"`generator` must be a torch.Generator, a list .* got \[None\]"),
        ([0], {"output_type": "foo"}, r"`output_type` must be one of \('pil', 'np', 'pt'\), got 'foo'"),
        ([0], {"output_type": "latent"}, r"`output_type` must be one of \('pil', 'np', 'pt'\), got 'latent'"),
    ],
)
def test_bad_arguments_are_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_latent_diffusion()(labels, **options)


def test_labels_are_refused_without_classes():
    with pytest.raises(ValueError, match="`class_labels` must be None for an unconditional model, got 0"):
        tiny_latent_diffusion(num_classes=0)(0)


def test_parts_must_fit():
    pipe, dit = tiny_latent_diffusion(), tiny_latent_diffusion("transformer")
    with pytest.raises(ValueError, match="Give either `transformer` or `unet`"):
        LatentDiffusionPipeline(pipe.vae, pipe.scheduler)
    with pytest.raises(ValueError, match="Give either `transformer` or `unet`"):
        LatentDiffusionPipeline(pipe.vae, pipe.scheduler, dit.transformer, pipe.unet)
    with pytest.raises(ValueError, match="`in_channels` of the model must be those of the latents, 4, got 8"):
        LatentDiffusionPipeline(tiny_autoencoder(latent_channels=4), pipe.scheduler, unet=pipe.unet)
    with pytest.raises(ValueError, match=r"`num_inference_steps` must be an integer in \[1, 1000\], got 0"):
        LatentDiffusionPipeline(pipe.vae, pipe.scheduler, unet=pipe.unet, num_inference_steps=0)


def test_broken_weights_draw_no_image():
    pipe = tiny_latent_diffusion()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="must give finite latents"):
        pipe(0)


# As a source of images


@pytest.mark.parametrize("num_classes", [0, 5])
def test_images_are_drawn_by_index(num_classes):
    source = PipelineImages(tiny_latent_diffusion(num_classes=num_classes), 12, seed=2)
    assert (source.resolution, source.num_classes) == (8, num_classes)
    assert source.guidance_scale == (1.5 if num_classes else 1.0)
    together, alone = source.read(range(5, 8)), source.read(range(7, 8))
    assert together.dtype == torch.uint8
    assert (together[2].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(together[0], together[1])


def test_keys_tell_what_pixels_depend_on():
    pipe = tiny_latent_diffusion()
    keys = [PipelineImages(pipe, 3).key, PipelineImages(pipe, 3, guidance_scale=1).key]
    keys += [PipelineImages(PipelineVariant(scheduler={"num_inference_steps": 2}).pipeline(pipe), 3).key]
    keys += [PipelineImages(tiny_latent_diffusion(seed=2), 3).key]
    assert keys[0] == PipelineImages(tiny_latent_diffusion(), 3).key
    assert all(keys[0] != key for key in keys[1:])
    names = {"weights", "configs", "scheduler", "guidance_scale", "seed", "device"}
    assert set(PipelineImages(tiny_pipeline(), 3).key) == names


def test_variants_change_steps_and_nothing_else():
    pipe = tiny_latent_diffusion()
    fewer = PipelineVariant(guidance_scale=2.0, scheduler={"num_inference_steps": 2}).pipeline(pipe)
    assert (fewer.config.num_inference_steps, pipe.config.num_inference_steps) == (2, 4)
    assert fewer.id2label == pipe.id2label
    assert not torch.allclose(draw(fewer, [0], 0), draw(pipe, [0], 0), atol=1e-3)
    for variant in (variant_of("int8"), PipelineVariant(num_scales=6), PipelineVariant(scheduler={"top_k": 3})):
        with pytest.raises(ValueError, match="Variants of latent diffusion must change nothing but"):
            variant.pipeline(pipe)


def test_a_schedule_that_starts_elsewhere_is_kept(tmp_path):
    pipe = tiny_latent_diffusion()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path)
    loaded = load_drawing_pipeline(str(tmp_path))
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert loaded.scheduler.config.timestep_spacing == "trailing"
