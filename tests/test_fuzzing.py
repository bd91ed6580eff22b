"""
Arguments of all kinds against everything a user calls: either a call does what it says, or it raises a `ValueError`
before any work is done. The examples are the same in every run.
"""

import inspect
import json
import math

import numpy as np
import torch
from arguments import ODD, seeded, usually
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_models import (
    ID2LABEL,
    POOLED_DIM,
    TEXT_DIM,
    VQVAE_CONFIG,
    tiny_scheduler,
    tiny_transformer,
    tiny_vqvae,
)
from tiny_texts import tiny_text_pipeline

from srdd import (
    MultiScaleVQModel,
    ScaleHistoryTransformer2DModel,
    ScaleScheduler,
    ScaleTextTransformer2DModel,
    ScaleTransformer2DModel,
    SRDDInpaintPipeline,
    SRDDPipeline,
    SRDDSuperResolutionPipeline,
    SRDDTextInpaintPipeline,
    SRDDTextSuperResolutionPipeline,
)


def generators() -> st.SearchStrategy:
    return st.builds(lambda count: [torch.Generator().manual_seed(seed) for seed in range(count)], st.integers(0, 3))


PICTURES = st.one_of(
    st.builds(
        lambda mode, width, height: Image.new(mode, (width, height)),
        st.sampled_from(["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]),
        st.integers(1, 20),
        st.integers(1, 20),
    ),
    st.builds(
        lambda shape, kind, value: np.full(shape, value).astype(kind),
        st.sampled_from([(8, 8, 3), (8, 8), (2, 8, 8, 3), (9, 7, 4), (8, 8, 1), (8, 8, 2), (3, 8, 8), (0, 8, 3)]),
        st.sampled_from(["float32", "float64", "float16", "uint8", "uint16", "int64", "bool", "complex64"]),
        st.sampled_from([0, 0.5, 1, 200, -1]),
    ),
    st.builds(
        lambda shape, dtype, value: torch.full(shape, value).to(dtype),
        st.sampled_from([(3, 8, 8), (8, 8), (2, 3, 8, 8), (4, 9, 7), (1, 8, 8), (2, 8, 8), (8, 8, 3), (3, 0, 8)]),
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool]),
        st.sampled_from([0.0, 0.5, 1.0, 200.0, -1.0, math.nan, math.inf]),
    ),
)

LABELS = st.one_of(
    st.sampled_from([*ID2LABEL.values(), "tomato", "4"]), st.integers(0, 4), st.lists(st.integers(0, 4))
)

DRAWING = {
    "guidance_scale": usually(st.floats(0, 10)),
    "num_images_per_prompt": usually(st.integers(1, 2)),
    "generator": usually(generators()),
    "output_type": usually(st.sampled_from(["pil", "np", "pt", "latent"])),
    "return_dict": usually(st.booleans()),
}
COMMON = {"class_labels": usually(LABELS), **DRAWING}
CALLBACKS = {
    "callback_on_step_end": usually(
        st.sampled_from(
            [
                None,
                lambda pipe, index, timestep, tensors: tensors,
                lambda pipe, index, timestep, tensors: {name: tensor * 2 for name, tensor in tensors.items()},
                lambda pipe, index, timestep, tensors: {name: tensor - 1e30 for name, tensor in tensors.items()},
                lambda pipe, index, timestep, tensors: dict.fromkeys(tensors),
                lambda *arguments: None,
                lambda: {},
            ]
        )
    ),
    "callback_on_step_end_tensor_inputs": usually(st.sampled_from([None, [], ["latents"], ["latents", "token_ids"]])),
}
INPAINTING = {
    "strength": usually(st.floats(0, 1)),
    "padding_mask_crop": usually(st.integers(0, 9)),
    "paste_known": usually(st.booleans()),
    "feather": usually(st.integers(0, 5)),
}
ENLARGING = {
    "scale_factor": usually(st.integers(2, 4)),
    "num_known_scales": usually(st.integers(0, 3)),
    "consistent": usually(st.booleans()),
}
PADDINGS = usually(st.one_of(st.integers(0, 9), st.tuples(*[st.integers(0, 9)] * 4)))


def options(strategies: dict[str, st.SearchStrategy]) -> st.SearchStrategy:
    """Some of the arguments."""
    return st.fixed_dictionaries({}, optional=strategies)


SCHEDULERS = st.sampled_from(
    [
        tiny_scheduler(),
        tiny_scheduler(top_k=5, top_p=0.9, temperature=0.7),
        tiny_scheduler(resampling_policy="masked", resampling_threshold=0.1, num_resampling_passes=2),
        tiny_scheduler(resampling_policy="remasked", resampling_threshold=0.1, num_resampling_passes=[0, 1, 2]),
        tiny_scheduler(resampling_policy="simple", num_resampling_passes=1, scales=[1, 4]),
    ]
)


def pipelines() -> dict[str, SRDDPipeline]:
    made = {}
    for pattern in ("markov", "causal"):
        for cls in (SRDDPipeline, SRDDInpaintPipeline, SRDDSuperResolutionPipeline):
            pipe = cls(tiny_vqvae(), tiny_transformer(pattern), tiny_scheduler())
            pipe.set_progress_bar_config(disable=True)
            made[f"{cls.__name__} {pattern}"] = pipe
    return made


PIPELINES = pipelines()


def finite(images) -> bool:
    arrays = images if isinstance(images, list) else [images]
    return all(np.isfinite(np.asarray(each, dtype=np.float32)).all() for each in arrays)


def draw_or_refuse(call, **arguments) -> None:
    """Nothing but a `ValueError` that names an argument may come of a call, and nothing that is no number."""
    refused = None
    try:
        output = call(**arguments)
    except ValueError as error:
        refused = str(error)
    except TypeError as error:
        if "lambda" not in str(error):  # the callback's own
            raise
        refused = "`callback_on_step_end`"
    assert "`" in refused if refused is not None else finite(output[0])


@seeded(1500)
@given(st.sampled_from(["markov", "causal"]), SCHEDULERS, options({**COMMON, **CALLBACKS, "latents": ODD}))
def test_drawing(pattern, scheduler, arguments):
    pipe = PIPELINES[f"SRDDPipeline {pattern}"]
    pipe.scheduler = scheduler
    draw_or_refuse(pipe, **arguments)


@seeded(1500)
@given(
    st.sampled_from(["markov", "causal"]),
    SCHEDULERS,
    usually(PICTURES),
    usually(PICTURES),
    options(
        {**COMMON, **CALLBACKS, **INPAINTING},
    ),
)
def test_inpainting(pattern, scheduler, image, mask_image, arguments):
    pipe = PIPELINES[f"SRDDInpaintPipeline {pattern}"]
    pipe.scheduler = scheduler
    draw_or_refuse(pipe, image=image, mask_image=mask_image, **arguments)


@seeded(500)
@given(
    usually(PICTURES),
    PADDINGS,
    options({**COMMON, "feather": INPAINTING["feather"]}),
)
def test_outpainting(image, padding, arguments):
    pipe = PIPELINES["SRDDInpaintPipeline markov"]
    pipe.scheduler = tiny_scheduler()
    draw_or_refuse(pipe.outpaint, image=image, padding=padding, **arguments)


@seeded(150)
@given(
    st.sampled_from(["markov", "causal"]),
    usually(PICTURES),
    options(
        {**COMMON, **CALLBACKS, **ENLARGING},
    ),
)
def test_enlarging(pattern, image, arguments):
    pipe = PIPELINES[f"SRDDSuperResolutionPipeline {pattern}"]
    pipe.scheduler = tiny_scheduler()
    draw_or_refuse(pipe, image=image, **arguments)


PROMPTS = st.one_of(st.text("ab ", max_size=9), st.lists(st.sampled_from(["red", "", "a cat"]), max_size=3))


def encoded(prefix: str) -> dict[str, st.SearchStrategy]:
    """Arguments in place of a prompt."""

    def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> st.SearchStrategy:
        shapes = [(2, *shape)] * 9 + [(count, *shape) for count in (1, 3, 0)] + [(2, *(side + 1 for side in shape))]
        dtypes = [dtype] * 12 + [torch.float16, torch.bool, torch.long]
        return st.builds(
            lambda size, kind: torch.ones(size, dtype=kind), st.sampled_from(shapes), st.sampled_from(dtypes)
        )

    return {
        f"{prefix}prompt_embeds": tensors(5, TEXT_DIM),
        f"{prefix}pooled_prompt_embeds": tensors(POOLED_DIM),
        f"{prefix}prompt_attention_mask": tensors(5, dtype=torch.bool),
    }


TEXT_PIPE = tiny_text_pipeline()
INPAINT_TEXT_PIPE = SRDDTextInpaintPipeline.from_pipe(TEXT_PIPE)
IMAGE = torch.zeros(2, 3, 8, 8)
TEXT_CALLS = {
    "drawing": (TEXT_PIPE, {}),
    "inpainting": (INPAINT_TEXT_PIPE, {"image": IMAGE, "mask_image": torch.ones(1, 1, 8, 8)}),
    "outpainting": (INPAINT_TEXT_PIPE.outpaint, {"image": IMAGE, "padding": 1}),
    "enlarging": (SRDDTextSuperResolutionPipeline.from_pipe(TEXT_PIPE), {"image": IMAGE, "scale_factor": 2}),
}


@seeded(200)
@given(
    st.sampled_from(list(TEXT_CALLS)),
    st.one_of(
        st.fixed_dictionaries({"prompt": usually(PROMPTS)}, optional={"negative_prompt": usually(PROMPTS)}),
        st.fixed_dictionaries(encoded(""), optional=encoded("negative_")),
        options(dict.fromkeys(["prompt", *encoded(""), *encoded("negative_")], st.one_of(PROMPTS, ODD))),
    ),
    st.fixed_dictionaries({}, optional={"num_images_per_prompt": st.integers(1, 2), "output_type": st.just("pt")}),
)
def test_texts(way, texts, arguments):
    call, pictures = TEXT_CALLS[way]
    draw_or_refuse(call, **texts, **pictures, **arguments)


SCALE_LISTS = usually(
    st.one_of(
        st.just([1, 2, 4]),
        st.lists(st.integers(-1, 6), max_size=5),
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=4),
        st.just(list(range(1, 2000))),
    )
)
OPTIONS = {
    "scale_sizes": SCALE_LISTS,
    "scales": SCALE_LISTS,
    "guidance_schedule": usually(st.sampled_from(["linear", "constant"])),
    "guidance_start": usually(st.floats(0, 1)),
    "guidance_stop": usually(st.floats(0, 1)),
    "temperature": usually(st.floats(0, 2)),
    "top_k": usually(st.integers(0, 40)),
    "top_p": usually(st.floats(0, 1)),
    "resampling_policy": usually(st.sampled_from(["none", "simple", "masked", "remasked"])),
    "resampling_threshold": usually(st.floats(0, 1)),
    "num_resampling_passes": usually(st.one_of(st.integers(0, 3), st.lists(st.integers(0, 3), max_size=4))),
    "guidance_scale": usually(st.floats(0, 8)),
}


@seeded(1500)
@given(options(OPTIONS), st.sampled_from(["constructor", "config"]))
def test_schedules(arguments, way):
    try:
        if way == "constructor":
            scheduler = ScaleScheduler(**arguments)
        else:
            scheduler = ScaleScheduler.from_config(tiny_scheduler().config, **arguments)
    except ValueError as error:
        named = str(error)
        assert "`" in named
        return
    assert scheduler.num_tokens == scheduler.visits[-1].tokens.stop
    again = ScaleScheduler.from_config(json.loads(scheduler.to_json_string()))
    assert again.visits == scheduler.visits
    assert torch.equal(again.timesteps, scheduler.timesteps)


TENSORS = st.one_of(
    ODD,
    st.builds(
        lambda shape, dtype, value: torch.full(shape, value).to(dtype),
        st.sampled_from([(2, 4), (2, 21), (2, 4, 32), (1, 4, 32), (2, 16, 32), (4,), (2, 5), (0, 4)]),
        st.sampled_from([torch.float32, torch.float16, torch.long, torch.int32, torch.bool]),
        st.sampled_from([0.0, 1.0, -1.0, 40.0, math.nan, math.inf, -math.inf]),
    ),
)


@seeded(1500)
@given(
    SCHEDULERS,
    st.sampled_from(["step", "add_noise", "set_timesteps", "visit", "scale_model_input"]),
    usually(st.integers(0, 2)),
    TENSORS,
    TENSORS,
    options({"resample_mask": TENSORS, "known_mask": TENSORS, "generator": usually(generators())}),
)
def test_methods_of_the_scheduler(scheduler, method, timestep, first, second, arguments):
    calls = {
        "step": lambda: scheduler.step(first, timestep, second, **arguments).token_probabilities,
        "add_noise": lambda: scheduler.add_noise(second, timesteps=timestep),
        "set_timesteps": lambda: ScaleScheduler.from_config(scheduler.config).set_timesteps(timesteps=first),
        "visit": lambda: scheduler.visit(timestep),
        "scale_model_input": lambda: scheduler.scale_model_input(first, timestep),
    }
    try:
        calls[method]()
    except ValueError as error:
        assert "`" in str(error)  # noqa: PT017


def arguments_of(model_class: type) -> dict[str, st.SearchStrategy]:
    """Values for all arguments of a model, near those that it has by default and in the tests."""
    near = {"scale_sizes": [1, 2, 4], "id2label": {0: "apple"}, **VQVAE_CONFIG}
    small = st.one_of(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32]), st.floats(0, 1), st.booleans())
    defaults = {name: each.default for name, each in inspect.signature(model_class).parameters.items()}
    return {name: usually(st.one_of(st.just(near.get(name, value)), small)) for name, value in defaults.items()}


TOKENIZER, TRANSFORMER = arguments_of(MultiScaleVQModel), arguments_of(ScaleTransformer2DModel)
TEXT_TRANSFORMER = arguments_of(ScaleTextTransformer2DModel)
HISTORY_TRANSFORMER = arguments_of(ScaleHistoryTransformer2DModel)


def make_or_refuse(model_class: type, arguments: dict) -> None:
    try:
        with torch.device("meta"):
            model = model_class(**arguments)
    except ValueError as error:
        assert "`" in str(error)  # noqa: PT017
        return
    assert json.loads(model.to_json_string())["_class_name"] == model_class.__name__


@seeded(1000)
@given(options(TOKENIZER))
def test_tokenizers(arguments):
    make_or_refuse(MultiScaleVQModel, {**VQVAE_CONFIG, **arguments})


@seeded(1000)
@given(options(TRANSFORMER))
def test_transformers(arguments):
    make_or_refuse(ScaleTransformer2DModel, {"codebook_size": 32, "latent_channels": 8, **arguments})


@seeded(100)
@given(options(TEXT_TRANSFORMER))
def test_transformers_of_texts(arguments):
    make_or_refuse(ScaleTextTransformer2DModel, {"codebook_size": 32, "latent_channels": 8, **arguments})


@seeded(100)
@given(options(HISTORY_TRANSFORMER))
def test_transformers_with_a_history(arguments):
    make_or_refuse(ScaleHistoryTransformer2DModel, {"codebook_size": 32, "latent_channels": 8, **arguments})


VQVAE, TRANSFORMERS = tiny_vqvae(), {pattern: tiny_transformer(pattern) for pattern in ("markov", "causal")}
MAPS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.sampled_from([(2, 3, 8, 8), (2, 8, 4, 4), (2, 3, 9, 8), (1, 8, 2, 3), (0, 8, 4, 4), (2, 4, 4), (3, 8, 8)]),
    st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8]),
    st.sampled_from([0.0, 0.5, -1.0, 200.0, math.nan, math.inf]),
)
IDS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.sampled_from([(2, 21), (2, 5), (1, 21), (2, 20), (2, 4, 4), (2, 2, 2), (2, 3), (2,), (0, 21), ()]),
    st.sampled_from([torch.long, torch.long, torch.int32, torch.uint8, torch.bool, torch.float32]),
    st.sampled_from([0, 1, 31, 32, -1, 10**6]),
)
GRIDS = st.one_of(SCALE_LISTS, st.tuples(st.integers(1, 9), st.integers(1, 9)))


def call_or_refuse(call) -> None:
    try:
        call()
    except ValueError as error:
        assert "`" in str(error)  # noqa: PT017


@seeded(1500)
@given(
    st.sampled_from(["encode", "decode", "quantize_latents", "tokenize", "forward"]),
    usually(MAPS, 5),
    options({"scale_sizes": SCALE_LISTS, "num_scales": usually(IDS)}),
)
@torch.no_grad()
def test_maps_of_the_tokenizer(method, maps, arguments):
    taken = inspect.signature(getattr(VQVAE, method)).parameters
    call_or_refuse(
        lambda: getattr(VQVAE, method)(maps, **{name: each for name, each in arguments.items() if name in taken})
    )


@seeded(1500)
@given(
    st.sampled_from(["residual_map", "latent_states", "teacher_forcing_inputs", "decode_tokens", "codebook_usage"]),
    usually(IDS, 5),
    options({"scale_sizes": SCALE_LISTS, "grid_size": GRIDS}),
)
@torch.no_grad()
def test_ids_of_the_tokenizer(method, token_ids, arguments):
    taken = inspect.signature(getattr(VQVAE, method)).parameters
    call_or_refuse(
        lambda: getattr(VQVAE, method)(token_ids, **{name: each for name, each in arguments.items() if name in taken})
    )


@seeded(1500)
@given(
    st.sampled_from(["markov", "causal"]),
    usually(
        st.builds(
            lambda shape, dtype: torch.zeros(shape, dtype=dtype),
            st.sampled_from(
                [(2, 21, 8), (2, 16, 8), (2, 4, 8), (2, 1, 8), (1, 21, 8), (2, 21, 9), (0, 21, 8), (2, 21)]
            ),
            st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16, torch.long]),
        ),
        5,
    ),
    options(
        {
            "timestep": usually(st.one_of(st.integers(0, 2), st.sampled_from([[2, 1, 0], [1, 0], [0, 1], [2, 2]]))),
            "class_labels": usually(IDS),
            "guidance_weight": usually(st.floats(-1, 10)),
            "token_indices": usually(IDS),
            "return_dict": st.booleans(),
        }
    ),
)
@torch.no_grad()
def test_forward_of_the_transformer(pattern, hidden_states, arguments):
    call_or_refuse(lambda: TRANSFORMERS[pattern](hidden_states, **arguments))
