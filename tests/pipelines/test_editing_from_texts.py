"""Inpainting, outpainting and enlarging from texts: what may be given in which place, and what is refused."""

import pytest
import torch
from families import seeded
from tiny_models import POOLED_DIM, TEXT_DIM, tiny_pipeline, tiny_scheduler, tiny_transformer
from tiny_pictures import random_hole, random_image
from tiny_texts import ENCODED, WITHOUT_ENCODERS, tiny_text_pipeline

from srdd import (
    SRDDInpaintPipeline,
    SRDDPipeline,
    SRDDSuperResolutionPipeline,
    SRDDTextInpaintPipeline,
    SRDDTextPipeline,
    SRDDTextSuperResolutionPipeline,
)


# Each way to edit: the class that does it, and a call with a picture.
EDITS = {
    "inpaint": (
        SRDDTextInpaintPipeline,
        lambda pipe, **options: pipe(**{"image": random_image(), "mask_image": random_hole(), **options}),
    ),
    "outpaint": (
        SRDDTextInpaintPipeline,
        lambda pipe, **options: pipe.outpaint(**{"image": random_image(), "padding": (0, 0, 2, 0), **options}),
    ),
    "enlarge": (
        SRDDTextSuperResolutionPipeline,
        lambda pipe, **options: pipe(**{"image": random_image(size=(4, 4)), "scale_factor": 2, **options}),
    ),
}


PIPE = tiny_text_pipeline()


def edit(way, *seeds, pipe=PIPE, **options):
    cls, call = EDITS[way]
    options = {"generator": seeded(*seeds or (0, 1)), "output_type": "pt", **options}
    return call(cls.from_pipe(pipe), **options)


@pytest.mark.parametrize("way", EDITS)
def test_embeddings_take_the_place_of_texts(way):
    expected = edit(way, prompt=["red", "a cat"], negative_prompt="ugly").token_ids
    with torch.no_grad():
        given = dict(zip(ENCODED, PIPE.encode_prompt(["red", "a cat"], "ugly")))
    for pipe in (PIPE, SRDDTextPipeline.from_pipe(PIPE, **WITHOUT_ENCODERS)):
        assert torch.equal(edit(way, pipe=pipe, **given).token_ids, expected)
    assert not torch.equal(edit(way, prompt=["red", "a cat"]).token_ids, expected)


@pytest.mark.parametrize("way", EDITS)
def test_the_guidance_that_is_usual_with_texts_is_the_default(way):
    plain = edit(way, prompt=["red", "a cat"]).token_ids
    assert torch.equal(edit(way, prompt=["red", "a cat"], guidance_scale=7.0).token_ids, plain)
    assert not torch.equal(edit(way, prompt=["red", "a cat"], guidance_scale=2.5).token_ids, plain)
    pipe = SRDDTextPipeline.from_pipe(PIPE, scheduler=tiny_scheduler(guidance_scale=3.0))
    by_scheduler = edit(way, prompt=["red", "a cat"], pipe=pipe).token_ids
    assert torch.equal(edit(way, prompt=["red", "a cat"], guidance_scale=3.0).token_ids, by_scheduler)


def test_arguments_come_in_the_order_of_diffusers():
    image, mask = random_image(size=(16, 16)), torch.zeros(1, 1, 16, 16)
    mask[..., 4:10, 4:10] = 1
    inpaint, enlarge = SRDDTextInpaintPipeline.from_pipe(PIPE), SRDDTextSuperResolutionPipeline.from_pipe(PIPE)
    options = {"generator": seeded(0), "output_type": "pt"}
    by_place = inpaint("red", image, mask, 2, 0.5, 3.0, "ugly", 1, seeded(0), output_type="pt")
    by_name = inpaint(
        prompt="red",
        image=image,
        mask_image=mask,
        padding_mask_crop=2,
        strength=0.5,
        guidance_scale=3.0,
        negative_prompt="ugly",
        **options,
    )
    assert torch.equal(by_place.images, by_name.images)
    by_place = inpaint.outpaint("red", image, 1, 3.0, "ugly", 1, seeded(0), output_type="pt")
    by_name = inpaint.outpaint(
        prompt="red", image=image, padding=1, guidance_scale=3.0, negative_prompt="ugly", generator=seeded(0),
        output_type="pt",
    )  # fmt: skip
    assert torch.equal(by_place.images, by_name.images)
    assert enlarge("red", image[..., :4, :4], 3, output_type="pt").images.shape == (1, 3, 12, 12)


def test_callbacks_follow_all_ways():
    seen = []

    def watch(pipe, index, timestep, tensors):
        seen.append((type(pipe).__name__, timestep, pipe.guidance_scale, sorted(tensors)))
        return tensors

    options = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": ["token_ids"]}
    for way in ("inpaint", "enlarge"):
        edit(way, 0, prompt="red", guidance_scale=3.0, **options)
    names = ["SRDDTextInpaintPipeline"] * 3 + ["SRDDTextSuperResolutionPipeline"] * 3
    assert seen == [(name, timestep, 3.0, ["token_ids"]) for name, timestep in zip(names, [2, 1, 0] * 2)]


STATES, POOLED = torch.zeros(2, 5, TEXT_DIM), torch.zeros(2, POOLED_DIM)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "`prompt` must be a text or a list of texts, got None"),
        ({"prompt": ["a", 3]}, r"`prompt` must be a text or a list of texts, got \['a', 3\]"),
        ({"negative_prompt": 3}, "`negative_prompt` must be a text or a list of texts, got 3"),
        ({"negative_prompt": ["a", "b", "c"]}, "`negative_prompt` .* must be one or 2, one for each image, got 3"),
        ({"prompt_embeds": STATES}, "`prompt` must be left out with `prompt_embeds`"),
        ({"prompt": None, "prompt_embeds": STATES}, "`pooled_prompt_embeds` must be a floating-point tensor"),
        (
            {"prompt": None, "prompt_embeds": STATES, "pooled_prompt_embeds": POOLED[:, 1:]},
            f"`pooled_prompt_embeds` must have {POOLED_DIM} channels, got a tensor of .*2, {POOLED_DIM - 1}",
        ),
        (
            {"negative_prompt_embeds": STATES[..., 1:], "negative_pooled_prompt_embeds": POOLED},
            f"`negative_prompt_embeds` must have {TEXT_DIM} channels, got a tensor of .*2, 5, {TEXT_DIM - 1}",
        ),
        ({"generator": seeded(0)}, "`generator` must be a list of 2 generators, got 1"),
        ({"guidance_scale": "high"}, "`guidance_scale` must be a finite number"),
        ({"output_type": "jpg"}, "`output_type` must be one of"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be an integer in .* got 0"),
        ({"image": None}, "`image` cannot be read: .* got NoneType"),
        ({"image": torch.zeros(3, 3, 8, 8)}, "`prompt` or `prompt_embeds` must hold 1 or 3 texts for 3 images, got 2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", EDITS)
def test_arguments_that_do_not_fit_are_refused(way, arguments, message):
    passes = []
    handle = PIPE.transformer.proj_in.register_forward_hook(lambda *args: passes.append(args))
    with pytest.raises(ValueError, match=message):
        edit(way, **{"prompt": ["red", "a cat"], **arguments})
    handle.remove()
    assert not passes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_image": None}, "`mask_image` cannot be read: .* got NoneType"),
        ({"mask_image": torch.zeros(3, 1, 8, 8)}, "`mask_image` must hold 1 or 1 masks, got 3"),
        ({"mask_image": torch.zeros(1, 1, 8, 4)}, "`mask_image` must have the proportions of `image`"),
        ({"mask_image": torch.zeros(1, 1, 8, 8), "padding_mask_crop": 2}, "`mask_image` must have white pixels"),
        ({"strength": 1.5}, r"`strength` must be a finite number in \[0, 1\], got 1.5"),
        ({"padding_mask_crop": -1}, "`padding_mask_crop` must be an integer in .*, got -1"),
        ({"feather": 0.5}, "`feather` must be an integer in .*, got 0.5"),
        ({"paste_known": 1}, "`paste_known` must be True or False, got 1"),
    ],
)
def test_masks_that_do_not_fit_are_refused(arguments, message):
    pipe = SRDDTextInpaintPipeline.from_pipe(PIPE)
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "red", "image": random_image(), "mask_image": random_hole(), **arguments})


def test_what_windows_cannot_do_is_refused():
    inpaint, enlarge = SRDDTextInpaintPipeline.from_pipe(PIPE), SRDDTextSuperResolutionPipeline.from_pipe(PIPE)
    with pytest.raises(ValueError, match="`padding` must be one or four numbers of pixels .*, got None"):
        inpaint.outpaint("red", random_image())
    with pytest.raises(ValueError, match="`output_type` must be 'pil', 'np' or 'pt' in outpainting, got 'latent'"):
        inpaint.outpaint("red", random_image(), 2, output_type="latent")
    with pytest.raises(ValueError, match=r"`scale_factor` must be an integer in \[2, 16384\], got 1"):
        enlarge("red", random_image(), 1)
    with pytest.raises(ValueError, match="`consistent` must be True or False, got None"):
        enlarge("red", random_image(), consistent=None)


BY_CLASS = (SRDDPipeline, SRDDInpaintPipeline, SRDDSuperResolutionPipeline)
FROM_TEXTS = (SRDDTextPipeline, SRDDTextInpaintPipeline, SRDDTextSuperResolutionPipeline)


@pytest.mark.parametrize("cls", BY_CLASS + FROM_TEXTS)
def test_models_of_the_other_kind_are_refused(cls, tmp_path):
    given = {"image": random_image(), "mask_image": random_hole()}
    options = {name: given[name] for name in given if name in cls.__call__.__annotations__}
    if cls in BY_CLASS:
        pipes = [cls.from_pipe(PIPE)]
        message = "`transformer` must draw by class, got a ScaleTextTransformer2DModel"
        told = [{}, {"class_labels": 1}]
    else:
        tiny_pipeline().save_pretrained(tmp_path)
        pipes = [cls.from_pipe(PIPE, transformer=tiny_transformer()), cls.from_pretrained(tmp_path)]
        message = "`transformer` must draw from texts, got a ScaleTransformer2DModel"
        told = [{"prompt": "red"}, {"prompt_embeds": STATES, "pooled_prompt_embeds": POOLED}]
    for pipe in pipes:
        for each in told:
            with pytest.raises(ValueError, match=message):
                pipe(**options, **each)
