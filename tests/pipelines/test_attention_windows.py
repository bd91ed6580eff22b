"""Pipelines of a transformer whose finest scale is seen through windows of 3 x 3."""

import pytest
import torch
from no_host import RefuseTransfers
from stand_ins import TracedGraph
from tiny_models import tiny_pipeline, tiny_scheduler, tiny_transformer
from tqdm.auto import tqdm

from srdd import SRDDPipeline
from srdd.acceleration import CudaGraphs
from srdd.models.neighbourhoods import NEIGHBOURHOOD_MASKS, Neighbourhood
from srdd.pipelines.conditions import Conditions
from srdd.pipelines.guided_transformer import Guidance
from srdd.pipelines.recorded_sampling import empty_noise
from srdd.pipelines.scale_sampling import SamplingInputs, sample_scales


POLICIES = ("none", "simple", "masked", "remasked")
SETTINGS = {"resampling_threshold": 0.1, "num_resampling_passes": 2}


def windowed_pipeline(windows=(0, 0, 3), **scheduler) -> SRDDPipeline:
    transformer = tiny_transformer(attention_windows=None if windows is None else list(windows))
    return tiny_pipeline(transformer=transformer, scheduler=tiny_scheduler(**{**SETTINGS, **scheduler}))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_further_passes_compute_what_they_draw_as_the_whole_scale():
    # The threshold 1 redraws every token: all of a scale, as "simple" does, but by their places.
    draws = [
        windowed_pipeline(resampling_policy=policy, resampling_threshold=1.0)([1, 2], generator=generators(0, 1))
        for policy in ("masked", "simple")
    ]
    assert torch.equal(draws[0].token_ids, draws[1].token_ids)


def test_windows_change_the_scales_that_have_them():
    labels, seeds = [1, 2, 3, 4] * 4, range(16)
    pipes = [windowed_pipeline(windows) for windows in ((0, 0, 1), None)]
    drawn = [pipe(labels, guidance_scale=1.0, generator=generators(*seeds)).token_ids for pipe in pipes]
    assert torch.equal(drawn[0][:, :5], drawn[1][:, :5])
    assert not torch.equal(drawn[0][:, 5:], drawn[1][:, 5:])


@pytest.mark.parametrize("policy", ["none", "simple"])
def test_a_draw_does_without_the_host(policy):
    pipe, device = windowed_pipeline(resampling_policy=policy).to("meta"), torch.device("meta")
    vqvae, transformer, scheduler = pipe.components.values()
    labels = torch.zeros(3, dtype=torch.long, device=device)
    conditions = Conditions(3, {"class_labels": labels}, {"class_labels": labels})
    noise = empty_noise(scheduler, 3, vqvae.config.codebook_size, device)
    inputs = SamplingInputs(
        conditions, Guidance.of(scheduler, 3.0, device), torch.zeros(3, 8, 4, 4, device=device), noise
    )
    with torch.no_grad():
        sample_scales(vqvae, transformer, scheduler, inputs, tqdm(disable=True))
        with RefuseTransfers():
            sample_scales(vqvae, transformer, scheduler, inputs, tqdm(disable=True))


def test_a_recorded_draw_keeps_its_masks():
    pipe = windowed_pipeline()
    pipe._cuda_graphs = CudaGraphs(TracedGraph, "cpu")
    plain = windowed_pipeline()
    for seed in range(3):
        drawn, expected = (each([1, 2], generator=generators(seed, 9), output_type="pt") for each in (pipe, plain))
        assert torch.equal(drawn.token_ids, expected.token_ids)
        assert torch.equal(drawn.images, expected.images)
    [recording] = pipe._cuda_graphs._recordings.values()
    assert recording.graph.num_replays == 2
    mask = NEIGHBOURHOOD_MASKS[Neighbourhood((4, 4), 3), torch.device("cpu")]
    assert any(mask is each for each in recording.constants[-1])
    pipe.transformer.register_to_config(attention_windows=[0, 0, 1])
    for seed in range(3):
        changed = pipe([1, 2], generator=generators(seed, 9), output_type="pt")
    expected = windowed_pipeline((0, 0, 1))([1, 2], generator=generators(2, 9), output_type="pt")
    assert torch.equal(changed.images, expected.images)


def test_folders_keep_windows(tmp_path):
    pipe = windowed_pipeline()
    pipe.save_pretrained(tmp_path)
    loaded = SRDDPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer.config.attention_windows == [0, 0, 3]
    images = [each(1, generator=generators(0)[0], output_type="pt").images for each in (pipe, loaded)]
    assert torch.equal(*images)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_recorded_pictures_are_the_same(dtype):
    pipe, plain = windowed_pipeline().to("cuda", dtype), windowed_pipeline().to("cuda", dtype)
    plain.disable_cuda_graphs()
    for seed in range(4):
        drawn, expected = (
            each([1, 2], generator=torch.Generator("cuda").manual_seed(seed), output_type="pt")
            for each in (pipe, plain)
        )
        assert torch.equal(drawn.token_ids, expected.token_ids)
        assert torch.equal(drawn.images, expected.images)
    assert len(pipe._cuda_graphs) == 1
