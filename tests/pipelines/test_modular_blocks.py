"""Modular Diffusers blocks: the pictures of the pipelines, bit for bit, and previews by a block that is inserted."""

from typing import Any

import pytest
import torch
from diffusers import ModularPipeline
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    LTX2Guidance,
    SkipLayerGuidance,
)
from hub.drawing_calls import BY_CLASS, FROM_TEXTS, TASKS, draw
from tiny_models import tiny_history_transformer, tiny_pipeline, tiny_scheduler, tiny_transformer
from tiny_texts import WITHOUT_ENCODERS, tiny_text_pipeline

import srdd
from srdd.pipelines.modular_blocks import PreviewScales, SRDDBlocks, SRDDTextBlocks
from srdd.pipelines.scale_pipeline import ScalePipeline
from srdd.publish.carried_code import PIPELINES


REFINED = {"resampling_policy": "simple", "num_resampling_passes": 1}
FAMILIES = {
    "labels": (SRDDBlocks, tiny_pipeline, BY_CLASS),
    "history, refined": (
        SRDDBlocks,
        lambda: tiny_pipeline(transformer=tiny_history_transformer(), scheduler=tiny_scheduler(**REFINED)),
        BY_CLASS,
    ),
    "texts": (SRDDTextBlocks, tiny_text_pipeline, FROM_TEXTS),
}


def modular(blocks: SRDDBlocks, pipe: ScalePipeline) -> ModularPipeline:
    """A modular pipeline of another one's components, without progress bars."""
    made = blocks.init_pipeline()
    made.update_components(**pipe.components)
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_preview(block: Any = None) -> SRDDBlocks:
    blocks = SRDDBlocks()
    blocks.sub_blocks["draw"].sub_blocks.insert("preview", block or PreviewScales(), 0)
    return blocks


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_give_the_pictures_of_the_pipelines(family, task):
    blocks, make, told = FAMILIES[family]
    pipe = make()
    classes = next(each for each in PIPELINES if type(pipe).__name__ in each.values())
    task_class = {file.removeprefix("text_"): name for file, name in classes.items()}[task]
    expected = draw(getattr(srdd, task_class).from_pipe(pipe), task)
    told = {**told, **TASKS[task]()}
    images = modular(blocks(), pipe)(**told, generator=seeded(), output_type="pt", output="images")
    assert torch.equal(images, expected)


@pytest.mark.parametrize("task", ["draw", "inpaint"])
def test_several_images_options_and_latents(task):
    pipe = tiny_pipeline()
    cls = {"draw": srdd.SRDDPipeline, "inpaint": srdd.SRDDInpaintPipeline}[task]
    told = {"class_labels": [1, "quince"], "num_images_per_prompt": 2, "guidance_scale": 4.0, **TASKS[task]()}
    if task == "inpaint":
        told |= {"strength": 0.5, "padding_mask_crop": 1, "feather": 1}
    generators = [[seeded(seed) for seed in range(4)] for _ in range(2)]
    expected = cls.from_pipe(pipe)(**told, generator=generators[0], output_type="latent")
    state = modular(SRDDBlocks(), pipe)(**told, generator=generators[1], output_type="latent")
    assert torch.equal(state.images, expected.images)
    assert torch.equal(state.token_ids, expected.token_ids)
    assert state.images.shape[0] == 4


def test_texts_as_embeddings_and_a_workflow_of_its_own():
    whole, bare = tiny_text_pipeline(), tiny_text_pipeline(**WITHOUT_ENCODERS)
    names = [each.name for each in SRDDTextBlocks().sub_blocks["encode"].prompts]
    encoded = dict(zip(names[2:], whole.encode_prompt("a cat", "fog")))
    expected = draw(whole, "draw")
    blocks = SRDDTextBlocks().get_workflow("draw")
    made = blocks.init_pipeline()
    made.update_components(**{name: each for name, each in bare.components.items() if each is not None})
    assert torch.equal(made(**encoded, generator=seeded(), output_type="pt", output="images"), expected)


def test_a_folder_is_loaded_with_init_pipeline(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    made = SRDDBlocks().init_pipeline(tmp_path)
    made.load_components()
    images = made(class_labels="quince", generator=seeded(), output_type="pt", output="images")
    assert torch.equal(images, draw(pipe, "draw"))


def test_users_are_asked_for_nothing_that_blocks_tell_each_other():
    names = {each.name for each in SRDDBlocks().inputs}
    assert {"class_labels", "mask_image", "scale_factor", "latents", "generator"} <= names
    assert not {"conditions", "known_tokens", "hole", "canvas", "token_ids"} & names
    assert not {"mask_image", "image", "hole"} & {each.name for each in SRDDBlocks().get_workflow("draw").inputs}


def test_an_inserted_block_previews_every_pass_and_changes_nothing():
    pipe = tiny_pipeline(scheduler=tiny_scheduler(**REFINED))
    made = modular(with_preview(), pipe)
    state = made(class_labels=[1, 2], generator=seeded())
    assert len(state.previews) == len(pipe.scheduler.timesteps)
    assert [picture.tobytes() for picture in state.previews[-1]] == [each.tobytes() for each in state.images]
    plain = modular(SRDDBlocks(), pipe)(class_labels=[1, 2], generator=seeded())
    assert torch.equal(state.token_ids, plain.token_ids)
    enlarged = made(class_labels=1, **TASKS["super_resolution"](), generator=seeded())
    assert len(enlarged.previews) == len(pipe.scheduler.timesteps)


class EndsEarly(PreviewScales):
    def __call__(self, components, block_state, i, t):
        block_state.interrupt = i == 1
        block_state.latents = block_state.latents + 1
        return super().__call__(components, block_state, i, t)


def test_an_inserted_block_may_change_and_end_the_run():
    state = modular(with_preview(EndsEarly()), tiny_pipeline())(class_labels=1, generator=seeded())
    assert len(state.previews) == 2
    assert (state.token_ids[:, :5] >= 0).all()
    assert (state.token_ids[:, 5:] == -1).all()
    plain = tiny_pipeline()(1, generator=seeded(), callback_on_step_end=ends_early, output_type="latent")
    assert torch.equal(state.latents, plain.images)


def ends_early(pipe, index, timestep, tensors):
    pipe._interrupt = index == 1
    return {"latents": tensors["latents"] + 1}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"class_labels": 7}, r"`class_labels` must lie in \[0, 4\], got 7"),
        ({"guidance_scale": "high"}, "`guidance_scale` must be a finite number or None, got 'high'"),
        ({"output_type": "png"}, "`output_type` must be one of .*, got 'png'"),
        ({**TASKS["inpaint"](), "strength": 2}, r"`strength` must be a finite number in \[0, 1\], got 2"),
        ({**TASKS["super_resolution"](), "output_type": "latent"}, "in super-resolution, got 'latent'"),
        ({**TASKS["super_resolution"](), "latents": torch.zeros(1, 8, 4, 4)}, "`latents` must be left out"),
        ({"mask_image": torch.zeros(1, 1, 8, 8)}, "Required input 'image' is missing"),
    ],
)
def test_bad_input_is_refused(told, message):
    with pytest.raises(ValueError, match=message):
        modular(SRDDBlocks(), tiny_pipeline())(**told)


def test_components_that_are_not_loaded_are_refused():
    made = SRDDBlocks().init_pipeline()
    with pytest.raises(ValueError, match=r"`vqvae` must be loaded .*load_components"):
        made(class_labels=1)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_guider_guides_in_the_place_of_guidance_scale(family, task):
    blocks, make, told = FAMILIES[family]
    pipe = make()
    pipe.scheduler = srdd.ScaleScheduler.from_config(pipe.scheduler.config, guidance_schedule="constant")
    made, told = modular(blocks(), pipe), {**told, **TASKS[task](), "output_type": "pt", "output": "images"}
    expected = made(**told, guidance_scale=3.0, generator=seeded())
    made.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    assert torch.equal(made(**told, generator=seeded()), expected)
    made.update_components(guider=ClassifierFreeGuidance(guidance_scale=9.0))
    assert not torch.equal(made(**told, generator=seeded()), expected)


@pytest.mark.parametrize("make_transformer", [tiny_transformer, tiny_history_transformer])
def test_the_steps_of_a_guider_are_the_scales(make_transformer):
    scheduler = tiny_scheduler(guidance_schedule="constant", guidance_start=0.3, guidance_stop=0.6, **REFINED)
    pipe = tiny_pipeline(transformer=make_transformer(), scheduler=scheduler)
    told = {"class_labels": [1, 2], "output_type": "pt", "output": "images"}
    expected = modular(SRDDBlocks(), pipe)(**told, guidance_scale=6.0, generator=seeded())
    made = modular(with_preview(), pipe)
    made.update_components(
        scheduler=tiny_scheduler(**REFINED), guider=ClassifierFreeGuidance(guidance_scale=6.0, start=0.34, stop=0.7)
    )
    assert torch.equal(made(**told, generator=seeded()), expected)


@pytest.mark.parametrize(
    ("guider", "told", "message"),
    [
        (ClassifierFreeGuidance(), {"guidance_scale": 2.0}, "`guidance_scale` must be None where .* has its own"),
        (SkipLayerGuidance(skip_layer_guidance_layers=[0]), {}, "`guider` must join .* got a SkipLayerGuidance"),
        (LTX2Guidance(stg_scale=1.0), {}, "`guider` must join .* got a LTX2Guidance"),
        (ClassifierFreeZeroStarGuidance(), {}, "`zero_init_steps` of a `guider` must be 0 here, got 1"),
        (
            AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5),
            {},
            "`adaptive_projected_guidance_momentum` of a `guider` must be None here, got -0.5",
        ),
    ],
)
def test_a_guider_that_does_not_fit_is_refused(guider, told, message):
    made = modular(SRDDBlocks(), tiny_pipeline())
    made.update_components(guider=guider)
    with pytest.raises(ValueError, match=message):
        made(class_labels=1, **told)


def test_a_block_does_not_set_the_guidance_of_a_guider():
    made = modular(with_preview(SetsGuidance()), tiny_pipeline())
    made(class_labels=1, generator=seeded())
    made.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    with pytest.raises(ValueError, match="`guidance_scale` must be None where a `guider` has its own, got 9.0"):
        made(class_labels=1, generator=seeded())


class SetsGuidance(PreviewScales):
    def __call__(self, components, block_state, i, t):
        block_state.guidance_scale = 9.0
        return super().__call__(components, block_state, i, t)


@pytest.mark.parametrize("guider", [None, ClassifierFreeGuidance(guidance_scale=3.0)])
def test_a_state_is_told_to_the_next_call_as_it_was(guider):
    made = modular(with_preview(), tiny_pipeline())
    made.update_components(guider=guider)
    first = made(class_labels=1, generator=seeded(), output_type="pt")
    assert first.guidance_scale is None
    images = first.images
    again = made(state=first, generator=seeded(), latents=None)
    assert torch.equal(again.images, images)


def test_a_saved_modular_pipeline_keeps_its_guider(tmp_path):
    made = modular(SRDDBlocks(), tiny_pipeline())
    made.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    expected = made(class_labels=1, generator=seeded(), output_type="pt", output="images")
    made.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    loaded = SRDDBlocks().init_pipeline(tmp_path)
    loaded.load_components()
    assert torch.equal(loaded(class_labels=1, generator=seeded(), output_type="pt", output="images"), expected)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(OSError, match="nothing"):
        SRDDBlocks().init_pipeline(tmp_path / "nothing")
