"""Inpainting and outpainting: what holds for every kind of model, and, by class, how images and masks are read."""

import io
import re

import numpy as np
import pytest
import torch
from families import POLICIES, each_family, seeded
from PIL import Image
from tiny_models import SCALE_SIZES, tiny_pipeline, tiny_scheduler
from tiny_pictures import random_hole, random_image

from srdd import ScaleScheduler, SRDDInpaintPipeline


SCHEDULERS = {**POLICIES, "greedy": {"temperature": 0.0}, "two-scales": {"scales": [1, 4]}}


def make_pipeline(**scheduler) -> SRDDInpaintPipeline:
    return SRDDInpaintPipeline.from_pipe(tiny_pipeline(scheduler=tiny_scheduler(**scheduler)))


def draw(pipe, *inputs, generator=None, **options):
    options = {"output_type": "pt", "class_labels": 1, **options}
    return pipe(*inputs, generator=generator or torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("schedule", SCHEDULERS)
@each_family
def test_known_pixels_and_tokens_stay(family, schedule):
    pipe = family.pipeline("inpaint", **SCHEDULERS[schedule])
    images = torch.cat([random_image(seed) for seed in range(3)])
    masks = torch.cat([random_hole(seed) for seed in range(3)])
    output = pipe(image=images, mask_image=masks, generator=seeded(0, 1, 2), output_type="pt", **family.told(0, 1, 2))
    shown = masks.expand_as(images) == 0
    torch.testing.assert_close(output.images[shown], images[shown], atol=1e-6, rtol=0)
    with torch.no_grad():
        region = pipe.prepare_known(images * 2 - 1, masks)
        state = torch.zeros(3, 8, 4, 4)
        for scale in pipe.scheduler.visits:
            forced, token_ids = region.token_ids(scale, state), output.token_ids[:, scale.tokens]
            assert torch.equal(token_ids[forced >= 0], forced[forced >= 0])
            state = state + pipe.vqvae.residual_map(token_ids.unflatten(1, scale.size))
    assert (output.token_ids >= 0).all()
    assert region.known_mask((4, 4)).flatten(1).any(dim=1).all()


def test_known_pixels_of_pictures_come_back_exactly():
    pipe = make_pipeline()
    pixels = np.random.default_rng(0).integers(0, 256, size=(13, 21, 3), dtype=np.uint8)
    mask = np.zeros((13, 21), dtype=np.uint8)
    mask[4:10, 5:18] = 255
    output = pipe(Image.fromarray(pixels), Image.fromarray(mask), 1, generator=seeded(0)[0]).images[0]
    assert output.size == (21, 13)
    result = np.asarray(output)
    assert (result[mask == 0] == pixels[mask == 0]).all()
    assert (result[mask == 255] != pixels[mask == 255]).mean() > 0.5


@pytest.mark.parametrize(
    ("size", "options"),
    [((8, 8), {}), ((11, 19), {"feather": 0, "strength": 1.0}), ((5, 4), {"paste_known": False})],
)
@each_family
def test_nothing_under_the_mask_reaches_the_result(family, size, options):
    pipe = family.pipeline("inpaint", **SCHEDULERS["masked"])
    image, mask = random_image(0, size), random_hole(0, size)
    other = torch.where(mask == 1, random_image(7, size), image)
    assert not torch.equal(image, other)
    options = {"mask_image": mask, "output_type": "pt", **family.told(1), **options}
    results = [pipe(image=pixels, generator=seeded(0), **options) for pixels in (image, other)]
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].token_ids, results[1].token_ids)


def test_nothing_outside_a_crop_or_under_the_mask_matters():
    pipe = make_pipeline()
    image, mask = random_image(0, (40, 40)), torch.zeros(1, 1, 40, 40)
    mask[..., 10:16, 20:28] = 1
    output = draw(pipe, image, mask, padding_mask_crop=2)
    assert torch.equal(
        output.images[mask.expand_as(image) == 0], (image * 2 - 1)[mask.expand_as(image) == 0] / 2 + 0.5
    )
    far = image.clone()
    far[..., 30:, :] = 0.5
    far[mask.expand_as(image) == 1] = 0.1
    again = draw(pipe, far, mask, padding_mask_crop=2)
    assert torch.equal(output.token_ids, again.token_ids)
    assert not torch.equal(draw(pipe, image, mask).token_ids, output.token_ids)


@each_family
def test_an_empty_mask_returns_the_image_and_a_full_one_draws_all_of_it(family):
    pipe, image = family.pipeline("inpaint"), random_image()
    options = {"image": image, "output_type": "pt", **family.told(1)}
    same = pipe(mask_image=torch.zeros(1, 1, 8, 8), generator=seeded(0), **options)
    torch.testing.assert_close(same.images, image, atol=1e-6, rtol=0)
    with torch.no_grad():
        assert torch.equal(same.token_ids, pipe.vqvae.tokenize(image * 2 - 1))
    drawn = pipe(mask_image=torch.ones(1, 1, 8, 8), generator=seeded(0), paste_known=False, **options)
    plain = family.pipeline()(generator=seeded(0), output_type="pt", **family.told(1))
    assert torch.equal(drawn.token_ids, plain.token_ids)
    assert torch.equal(drawn.images, plain.images)


@pytest.mark.parametrize(("strength", "num_scales"), [(1.0, 0), (0.67, 1), (0.34, 2), (0.0, 3)])
def test_strength_keeps_coarse_scales_as_hints(strength, num_scales):
    pipe = make_pipeline()
    image = random_image()
    output = draw(pipe, image, torch.ones(1, 1, 8, 8), strength=strength)
    with torch.no_grad():
        tokens = pipe.vqvae.tokenize(image * 2 - 1)
    count = sum(side**2 for side in SCALE_SIZES[:num_scales])
    assert torch.equal(output.token_ids[:, :count], tokens[:, :count])
    if num_scales < 3:
        assert not torch.equal(output.token_ids[:, count:], tokens[:, count:])


@pytest.mark.parametrize("policy", POLICIES)
@each_family
def test_an_image_does_not_depend_on_its_batch(family, policy):
    pipe = family.pipeline("inpaint", **POLICIES[policy])
    images = torch.cat([random_image(seed) for seed in range(3)])
    masks = torch.cat([random_hole(0), torch.zeros(1, 1, 8, 8), random_hole(2, share=0.9)])
    together = pipe(
        image=images, mask_image=masks, generator=seeded(5, 6, 7), output_type="pt", **family.told(0, 1, 2)
    )
    for index in (0, 2):
        alone = pipe(
            image=images[index : index + 1],
            mask_image=masks[index : index + 1],
            generator=seeded(5 + index),
            output_type="pt",
            **family.told(index),
        )
        assert torch.equal(alone.token_ids[0], together.token_ids[index])
        torch.testing.assert_close(alone.images[0], together.images[index], atol=1e-5, rtol=0)


@each_family
def test_an_image_is_that_of_its_seed(family):
    pipe = family.pipeline("inpaint")
    options = {"image": random_image(), "mask_image": random_hole(share=0.9), **family.told(1)}
    drawn = pipe(num_images_per_prompt=3, generator=seeded(3, 4, 3), **options).token_ids
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


@each_family
def test_images_and_what_is_told_combine(family):
    pipe = family.pipeline("inpaint")
    options = {"image": random_image(), "mask_image": random_hole(), "output_type": "pt"}
    several = pipe(num_images_per_prompt=2, generator=seeded(1, 2, 3, 4), **options, **family.told(0, 2)).images
    assert several.shape == (4, 3, 8, 8)
    last = pipe(generator=seeded(4), **options, **family.told(2)).images
    torch.testing.assert_close(several[3:], last, atol=1e-5, rtol=0)
    options["image"] = torch.cat([random_image(), random_image(1)])
    assert pipe(num_images_per_prompt=3, **options, **family.told(0)).images.shape == (6, 3, 8, 8)
    with pytest.raises(ValueError, match="must hold 1 or 2 (labels|texts) for 2 images, got 3"):
        pipe(**options, **family.told(0, 1, 2))


@each_family
def test_what_is_drawn_depends_on_what_is_told(family):
    pipe, mask = family.pipeline("inpaint", temperature=0.0), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    options = {"image": random_image(), "mask_image": mask, "guidance_scale": 4.0, "output_type": "pt"}
    images = pipe(**options, **family.told(0, 3)).images
    assert torch.equal(images[0][..., :4], images[1][..., :4])
    assert not torch.equal(images[0][..., 4:], images[1][..., 4:])


@each_family
def test_outpainting_keeps_the_image(family):
    pipe, image = family.pipeline("inpaint", **POLICIES["masked"]), random_image()
    options = {"image": image, "padding": (0, 3, 4, 0), "output_type": "pt", **family.told(1, 2)}
    images = pipe.outpaint(generator=seeded(0, 1), **options).images
    assert images.shape == (2, 3, 11, 12)
    torch.testing.assert_close(images[..., 3:, :8], image.expand(2, -1, -1, -1), atol=1e-6, rtol=0)
    assert not torch.equal(images[0], images[1])


def test_inputs_of_all_kinds_agree():
    pipe = make_pipeline()
    pixels = np.random.default_rng(0).integers(0, 256, size=(2, 8, 8, 3), dtype=np.uint8)
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:6, 3:8] = 255
    pictures = [Image.fromarray(array) for array in pixels]
    arrays, tensors = pixels / 255.0, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    hard = torch.from_numpy(mask).float()[None, None] / 255
    inputs = [
        (pictures, Image.fromarray(mask)),
        (pictures, [Image.fromarray(mask)] * 2),
        ([picture.convert("RGBA") for picture in pictures], Image.fromarray(mask).convert("RGB")),
        (arrays, (mask / 255.0)[None, ..., None]),
        (list(arrays), [mask[..., None] / 255.0] * 2),
        (tensors, hard),
        (list(tensors), [hard[0]] * 2),
    ]
    results = [draw(pipe, image, hole, generator=seeded(0, 1)) for image, hole in inputs]
    for result in results[1:]:
        assert torch.equal(result.token_ids, results[0].token_ids)
        torch.testing.assert_close(result.images, results[0].images, atol=1e-6, rtol=0)


def test_masks_of_another_size_are_scaled():
    pipe = make_pipeline()
    image, mask = random_image(0, (16, 16)), torch.zeros(1, 1, 4, 4)
    mask[..., 2:, :] = 1
    output = draw(pipe, image, mask, class_labels=None)
    assert output.images.shape == image.shape
    torch.testing.assert_close(output.images[..., :6, :], image[..., :6, :], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(8, 16), (8, 7), (4, 6), (64, 62)])
def test_masks_of_other_proportions_are_refused(size):
    with pytest.raises(ValueError, match="`mask_image` must have the proportions of `image`, 16 to 16 .*, got"):
        draw(make_pipeline(), random_image(0, (16, 16)), torch.ones(1, 1, *size))


def test_masks_may_be_scaled_with_rounding():
    pipe = make_pipeline()
    for image_size, mask_size in (((100, 67), (50, 34)), ((100, 67), (50, 33)), ((64, 64), (512, 512))):
        image, mask = random_image(0, image_size), torch.ones(1, 1, *mask_size)
        assert draw(pipe, image, mask).images.shape == image.shape


def test_a_photo_that_lies_on_its_side_is_edited_as_it_is_seen():
    pipe, file, tag = make_pipeline(), io.BytesIO(), Image.Exif()
    seen = Image.new("RGB", (16, 32), "white")
    tag[0x0112] = 6
    seen.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=tag)
    mask = Image.new("L", seen.size)
    mask.paste(255, (0, 24, 16, 32))
    result = pipe(Image.open(file), mask, 1, generator=seeded(0)[0]).images[0]
    assert result.size == (16, 32)
    assert (np.asarray(result)[:24] == 255).all()
    assert not (np.asarray(result)[24:] == 255).all()


def test_soft_masks_blend():
    pipe = make_pipeline()
    image, mask = random_image(), torch.full((1, 1, 8, 8), 0.25)
    raw = draw(pipe, image, mask, paste_known=False).images
    torch.testing.assert_close(draw(pipe, image, mask).images, image + 0.25 * (raw - image), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "padding"), [((8, 8), 4), ((8, 8), (0, 0, 12, 5)), ((3, 5), 1), ((12, 9), (3, 0, 0, 0))]
)
def test_outpainting_keeps_the_image_in_a_larger_canvas(size, padding):
    pipe = make_pipeline()
    image = random_image(0, size)
    left, top, right, bottom = (padding,) * 4 if isinstance(padding, int) else padding
    output = pipe.outpaint(image, padding, class_labels=1, generator=seeded(0)[0], output_type="pt")
    height, width = size
    assert output.images.shape[-2:] == (height + top + bottom, width + left + right)
    inner = output.images[..., top : top + height, left : left + width]
    torch.testing.assert_close(inner, image, atol=1e-6, rtol=0)
    assert output.images.isfinite().all()
    again = pipe.outpaint(image, padding, class_labels=1, generator=seeded(0)[0], output_type="pt")
    assert torch.equal(again.images, output.images)
    assert output.images.std() > 0.01


def test_outpainting_takes_batches_and_gives_pictures():
    pipe = make_pipeline()
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    generators = seeded(0, 1, 2, 3)
    results = pipe.outpaint(images, 3, class_labels=[0, 1], num_images_per_prompt=2, generator=generators).images
    assert [picture.size for picture in results] == [(14, 14)] * 4
    assert [picture.getpixel((6, 6)) for picture in results] == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2


def test_swapped_schedules_and_callbacks_work():
    pipe = make_pipeline()
    pipe.scheduler = ScaleScheduler.from_config(pipe.scheduler.config, scales=[1, 4])
    seen = []

    def callback(pipe, index, timestep, tensors):
        seen.append((index, timestep, tensors["token_ids"].shape))
        return tensors

    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["token_ids"]}
    draw(pipe, random_image(), random_hole(), **options)
    assert seen == [(0, 2, (1, 17)), (1, 0, (1, 17))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": 1.5}, r"`strength` must be a finite number in \[0, 1\], got 1.5"),
        ({"padding_mask_crop": -1}, "`padding_mask_crop` must be an integer in .*, got -1"),
        ({"feather": 0.5}, "`feather` must be an integer in .*, got 0.5"),
        ({"strength": "1"}, "`strength` must be a finite number in .*, got '1'"),
        ({"strength": float("nan")}, "`strength` must be a finite number in .*, got nan"),
        ({"feather": 10**6}, r"`feather` must be an integer in \[0, 1024\], got 1000000"),
        ({"paste_known": "false"}, "`paste_known` must be True or False, got 'false'"),
        ({"padding_mask_crop": True}, "`padding_mask_crop` must be an integer in .*, got True"),
        ({"image": "cat.png"}, "`image` cannot be read: .* got str"),
        ({"mask_image": []}, "`mask_image` must hold at least one picture"),
        ({"class_labels": 9}, r"`class_labels` must lie in \[0, 4\], got 9"),
        ({"output_type": "jpg"}, "`output_type` must be one of"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be an integer in .* got 0"),
        (
            {"mask_image": torch.full((1, 1, 8, 8), 2.0)},
            r"`mask_image` cannot be read: floats .*\[0, 1\], got \[2, 2\]",
        ),
        ({"mask_image": torch.zeros(3, 1, 8, 8)}, "`mask_image` must hold 1 or 1 masks, got 3"),
        (
            {"image": torch.zeros(1, 2, 8, 8)},
            r"`image` cannot be read: its shape .*3 or 4 channels.*\(1, 2, 8, 8\)",
        ),
        ({"generator": [torch.Generator()] * 3}, "`generator` must be a list of 1 generators, got 3"),
        (
            {"image": [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]},
            r"`image` must hold pictures of one size, got .*\[\(8, 8\), \(8, 9\)\]",
        ),
    ],
)
def test_bad_inputs_are_refused(changes, message):
    inputs = {"image": random_image(), "mask_image": random_hole(), **changes}
    with pytest.raises(ValueError, match=message):
        make_pipeline()(**inputs)


def test_outpainting_refuses_images_of_several_sizes():
    images = [Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]
    with pytest.raises(ValueError, match="`image` must hold pictures of one size"):
        make_pipeline().outpaint(images, 2)


def test_outpainting_has_no_latents():
    with pytest.raises(ValueError, match="`output_type` must be 'pil', 'np' or 'pt' in outpainting, got 'latent'"):
        make_pipeline().outpaint(random_image(), 2, output_type="latent")


def test_outpainting_refuses_canvases_beyond_memory():
    with pytest.raises(ValueError, match=r"`padding` must be one or four numbers of pixels in \[0, 16384\]"):
        make_pipeline().outpaint(random_image(), 10**5)
    with pytest.raises(ValueError, match="`padding` must give a canvas of at most 16384 pixels .* 8190 for 8x8"):
        make_pipeline().outpaint(random_image(), 8190)


def test_windows_share_one_progress_bar(capsys):
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=False, mininterval=0, bar_format="<{n}/{total}>")
    pipe.outpaint(random_image(), 6, class_labels=1, generator=seeded(0)[0])
    shown = re.findall(r"<(\d+)/(\d+)>", capsys.readouterr().err)
    assert {total for _, total in shown} == {"48"}
    assert shown[-1] == ("48", "48")


@each_family
def test_outpainting_calls_back_and_can_be_stopped(family):
    pipe, seen = family.pipeline("inpaint"), []

    def stop(pipe, index, timestep, tensors):
        seen.append(timestep)
        pipe._interrupt = len(seen) == 4  # in the second window
        return tensors

    options = {"image": random_image(), "padding": 6, "generator": seeded(0)[0], **family.told(1)}
    pictures = pipe.outpaint(callback_on_step_end=stop, **options).images
    assert seen == [2, 1, 0, 2]
    assert pictures[0].size == (20, 20)
