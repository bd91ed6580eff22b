"""What all pipelines share, for every kind of model: batches, precision and memory; and components that do not fit."""

import logging

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.hooks.group_offloading import _get_top_level_group_offload_hook
from families import POLICIES, TASKS, each_family, seeded
from tiny_models import tiny_pipeline, tiny_scheduler, tiny_transformer, tiny_vqvae
from tiny_pictures import random_hole, random_image

from srdd import SRDDPipeline
from srdd.pipelines.scale_pipeline import check_components


def draw(pipe, seeds=(0, 1), **options) -> torch.Tensor:
    return pipe(generator=seeded(*seeds), output_type="pt", **options).images


@pytest.mark.parametrize("policy", POLICIES)
@each_family
def test_a_batch_equals_single_runs(family, policy):
    pipe = family.pipeline(top_k=12, top_p=0.95, **POLICIES[policy])
    numbers = (0, 3, 1, 3)
    together = pipe(generator=seeded(10, 11, 12, 13), output_type="latent", **family.told(*numbers))
    for index, number in enumerate(numbers):
        alone = pipe(generator=seeded(10 + index), output_type="latent", **family.told(number))
        assert torch.equal(together.token_ids[index], alone.token_ids[0])
        torch.testing.assert_close(together.images[index], alone.images[0], atol=1e-5, rtol=0)
    assert not torch.equal(together.token_ids[1], together.token_ids[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_family
def test_half_precision(family, dtype):
    plain = family.new_pipeline().to(dtype)
    images = draw(plain, **family.told(0, 1))
    assert images.dtype == torch.float32
    same = draw(family.pipeline(), **family.told(0, 1))
    other = draw(family.pipeline(), (5, 6), **family.told(0, 1))
    # A token here and there is another one.
    assert (images - same).abs().mean() < (images - other).abs().mean() / 2
    inpaint, enlarge = (TASKS[task][family.draws_from_texts].from_pipe(plain) for task in ("inpaint", "enlarge"))
    assert {model.dtype for model in inpaint.components.values() if isinstance(model, torch.nn.Module)} == {dtype}
    image, mask = random_image(), random_hole()
    filled = draw(inpaint, image=image, mask_image=mask, **family.told(0, 1))
    shown = mask.expand_as(filled) == 0
    assert torch.equal(filled[shown], (image * 2 - 1).div(2).add(0.5).expand_as(filled)[shown])
    assert filled.isfinite().all()
    large = draw(enlarge, image=image[..., :4, :4], scale_factor=2, **family.told(0, 1))
    assert large.shape == (2, 3, 8, 8)
    assert large.isfinite().all()


@each_family
def test_slices_of_a_batch(family):
    pipe = family.new_pipeline()
    inpaint = TASKS["inpaint"][family.draws_from_texts].from_pipe(pipe)
    calls = [(pipe, {}), (inpaint, {"image": random_image(), "mask_image": random_hole()})]
    whole = [draw(each, **options, **family.told(0, 1)) for each, options in calls]
    pipe.vqvae.enable_slicing()
    for (each, options), images in zip(calls, whole):
        torch.testing.assert_close(draw(each, **options, **family.told(0, 1)), images, atol=1e-5, rtol=0)


@each_family
def test_layerwise_casting(family):
    pipe, options = family.new_pipeline(), {"guidance_scale": 1.0, **family.told(0, 1)}
    images = draw(pipe, **options)
    for model in (pipe.transformer, pipe.vqvae):
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        assert torch.bfloat16 in {parameter.dtype for parameter in model.parameters()}
    assert pipe.vqvae.quantize.codebook.weight.dtype == torch.float32
    assert (draw(pipe, **options) - images).abs().mean() < 1e-2


@each_family
def test_model_cpu_offload(family):
    pipe = family.new_pipeline()
    inpaint = TASKS["inpaint"][family.draws_from_texts].from_pipe(pipe)
    edit = {"image": random_image(), "mask_image": random_hole(), **family.told(0, 1)}
    images, edited = draw(pipe, **family.told(0, 1)), draw(inpaint, **edit)
    for each, options, expected in ((pipe, family.told(0, 1), images), (inpaint, edit, edited)):
        each.enable_model_cpu_offload(device="cpu")
        # In the order of a call. The tokenizer runs after every scale: none of them makes room for it.
        names = {id(component): name for name, component in each.components.items()}
        offloaded = [names[id(hook.model)] for hook in each._all_hooks]
        encoders = ["text_encoder", "text_encoder_2"] if family.draws_from_texts else []
        assert offloaded == [*encoders, "transformer"]
        # Twice: at the end of a call the hooks are put on anew.
        assert torch.equal(draw(each, **options), expected)
        assert torch.equal(draw(each, **options), expected)
        each.remove_all_hooks()
        assert torch.equal(draw(each, **options), expected)


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


def test_a_transformer_is_for_the_codebook_that_it_knows():
    vqvae, other = tiny_vqvae(), tiny_vqvae(seed=5)
    for tokenizer in (vqvae, other):
        tokenizer.sign_codebook()
    transformer = tiny_transformer(codebook_fingerprint=vqvae.config.codebook_fingerprint)
    check_components(vqvae, transformer, tiny_scheduler())
    check_components(tiny_vqvae(seed=5), transformer, tiny_scheduler())  # of an unknown one nothing is said
    with pytest.raises(ValueError, match="must have the same codebook, .*: the transformer was trained on the tokens"):
        check_components(other, transformer, tiny_scheduler())


def test_a_tokenizer_may_have_scales_of_its_own():
    check_components(tiny_vqvae(scale_sizes=[1, 3, 4]), tiny_transformer(), tiny_scheduler(scales=[1, 4]))


def offload_groups(pipe) -> None:
    """In groups, as if to another device: there is none here."""
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    _get_top_level_group_offload_hook(pipe.transformer).config.onload_device = torch.device("meta")


HOOKS = {
    "none": lambda pipe: None,
    "on a model": lambda pipe: add_hook_to_module(pipe.transformer, AlignDevicesHook(execution_device="meta")),
    "on a layer": lambda pipe: add_hook_to_module(
        pipe.transformer.blocks[0].attn.to_q, AlignDevicesHook(execution_device="meta")
    ),
    "of groups": offload_groups,
}


@pytest.mark.parametrize("where", HOOKS)
def test_the_device_is_found_as_diffusers_finds_it(where):
    pipe = tiny_pipeline()
    HOOKS[where](pipe)
    assert pipe._execution_device == DiffusionPipeline._execution_device.fget(pipe)
    assert (pipe._execution_device.type == "meta") == (where in ("on a model", "of groups"))


def test_from_pipe_casts_without_a_warning_where_nothing_must_stay_in_float32(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    pipe = SRDDPipeline.from_pipe(tiny_pipeline(), dtype=torch.bfloat16)
    assert pipe.transformer.dtype == pipe.vqvae.dtype == torch.bfloat16
    assert not caplog.records
