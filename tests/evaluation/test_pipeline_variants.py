import pytest
import torch
from tiny_models import tiny_pipeline, tiny_scheduler, tiny_transformer, tiny_vqvae

from srdd.acceleration.cpu import MULTIPLIES_INT8
from srdd.evaluation.image_sources import PipelineImages
from srdd.evaluation.pipeline_variants import PipelineVariant, sharing_parameters, variant_of


LABELS = [0, 3]


def images(pipe, variant: PipelineVariant) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe(LABELS, guidance_scale=variant.guidance_scale, generator=generators, output_type="pt").images


def test_variants_by_name():
    assert variant_of("") == PipelineVariant()
    assert variant_of("causal") == PipelineVariant("causal")
    assert variant_of("sdd-6-unguided-int8-int8vae") == PipelineVariant(
        "markov", num_scales=6, guidance_scale=1.0, linear_layers="int8", int8_decoding=True
    )
    assert variant_of("interval-bf16") == PipelineVariant(scheduler={"guidance_stop": 0.8}, dtype="bfloat16")


@pytest.mark.parametrize("name", ["var", "sdd-7", "sdd-int8-torch", "sdd-causal", "6-6", "sdd-", "-"])
def test_names_of_no_variant_are_refused(name):
    with pytest.raises(ValueError, match=f"Variants must be named by words of causal, .* got '{name}'"):
        variant_of(name)


@pytest.mark.parametrize("name", ["", "causal", "banded", "unguided", "interval", "torch", "bf16"])
def test_variants_draw_and_leave_the_pipeline(name):
    pipe, variant = tiny_pipeline(), variant_of(name)
    before = images(pipe, PipelineVariant())
    configs = [dict(component.config) for component in (pipe.transformer, pipe.vqvae, pipe.scheduler)]
    changed = variant.pipeline(pipe)
    pictures = images(changed, variant)
    assert pictures.shape == before.shape
    assert torch.equal(pictures, before) == (name in ("", "torch", "interval"))  # three scales end before 0.8
    assert [dict(component.config) for component in (pipe.transformer, pipe.vqvae, pipe.scheduler)] == configs
    assert torch.equal(images(pipe, PipelineVariant()), before)


def test_windows_go_with_the_pattern_that_has_them():
    pipe = tiny_pipeline(transformer=tiny_transformer(attention_windows=[0, 0, 3]))
    kept, gone = (variant_of(name).pipeline(pipe).transformer.config for name in ("sdd", "causal"))
    assert (kept.attention_windows, gone.attention_windows) == ([0, 0, 3], None)
    assert pipe.transformer.config.attention_windows == [0, 0, 3]


def test_what_is_not_changed_is_shared():
    pipe = tiny_pipeline()
    changed = variant_of("causal-torch").pipeline(pipe)
    assert changed.vqvae is pipe.vqvae
    ours, theirs = (each.transformer.blocks[0].ff.net[2] for each in (changed, pipe))
    assert ours is not theirs
    assert ours.weight is theirs.weight
    assert variant_of("bf16").pipeline(pipe).transformer.dtype == torch.bfloat16
    assert pipe.transformer.dtype == torch.float32


def test_copies_that_share_parameters_are_not_one():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    shared = sharing_parameters(model)
    assert all(ours is theirs for ours, theirs in zip(shared.parameters(), model.parameters(), strict=True))
    shared[1].eval()
    assert model[1].training


def test_numbers_of_scales_that_nobody_has_chosen_are_refused():
    with pytest.raises(ValueError, match=r"`num_scales` must be in \[.*\(10, 6\)\] .* got \(3, 6\)"):
        variant_of("sdd-6").pipeline(tiny_pipeline())


def test_fewer_scales_are_those_of_the_distilled_models():
    sizes = {"scale_sizes": [1, 2, 3, 4, 5, 6, 8]}
    vqvae = tiny_vqvae(**sizes, sample_size=16)
    pipe = tiny_pipeline(vqvae=vqvae, transformer=tiny_transformer(**sizes), scheduler=tiny_scheduler(**sizes))
    assert variant_of("6").pipeline(pipe).scheduler.scales == [[side, side] for side in (1, 2, 3, 4, 6, 8)]


@torch.no_grad()
@pytest.mark.skipif(not MULTIPLIES_INT8, reason="The CPU has no VNNI.")
def test_variants_decode_in_int8():
    pipe, latents = tiny_pipeline(), PipelineImages(tiny_pipeline(), 4).draw(range(4), "latent")
    pictures = [variant_of(name).pipeline(pipe).vqvae.decode(latents).sample for name in ("", "int8vae")]
    assert torch.equal(pictures[0], pipe.vqvae.decode(latents).sample)
    assert not torch.equal(*pictures)
    assert (pictures[0] - pictures[1]).std() < 0.05 * pictures[0].std()


def test_variants_have_int8_layers():
    pytest.importorskip("torchao")
    pipe = tiny_pipeline()
    changed = variant_of("sdd-int8").pipeline(pipe)
    assert changed.transformer.blocks[0].ff.net[2].weight.qdata.dtype == torch.int8
    assert changed.transformer.proj_in.weight is pipe.transformer.proj_in.weight
    assert pipe.transformer.blocks[0].ff.net[2].weight.dtype == torch.float32
    assert images(changed, PipelineVariant()).shape == (2, 3, 8, 8)
