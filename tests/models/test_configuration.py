"""Configurations come from files: impossible ones are refused before memory is taken."""

import inspect
import json
import math
import time

import numpy as np
import pytest
import torch
from tiny_models import VQVAE_CONFIG, tiny_history_transformer, tiny_text_transformer, tiny_transformer, tiny_vqvae

from srdd import (
    MultiScaleVQModel,
    ScaleHistoryTransformer2DModel,
    ScaleTextTransformer2DModel,
    ScaleTransformer2DModel,
)
from srdd.models.configuration import (
    BOOLEANS,
    CHOICES,
    INTEGERS,
    LISTS_OF_CHOICES,
    LISTS_OF_INTEGERS,
    MAX_LEVELS,
    NUMBERS,
)


MAKERS = {
    MultiScaleVQModel: tiny_vqvae,
    ScaleTransformer2DModel: tiny_transformer,
    ScaleTextTransformer2DModel: tiny_text_transformer,
    ScaleHistoryTransformer2DModel: tiny_history_transformer,
}
NO_INTEGERS = ["16", 16.0, 1.5, True, math.nan, math.inf, [16], (16,), {}, torch.tensor(16), -1, 10**9, -(10**30)]
NO_NUMBERS = ["0.5", True, math.nan, math.inf, -math.inf, [0.5], {}, 1j, torch.tensor(0.5), -0.1, 1e9]
NO_BOOLEANS = [0, 1, "True", "", [], 1.0, torch.tensor(True)]
NO_LISTS = [
    "16",
    16,
    {},
    [],
    (),
    [0, 16],
    [16, "16"],
    [16, -1],
    [16, 10**9],
    [16.0, 32],
    [True, 16],
    [16] * 11,
    [[16]],
]
NO_NAMES = ["", "full", 1, True, ["silu"], {}, b"silu"]
NO_SCALES = [
    "124",
    4,
    {},
    [],
    [0],
    [[1, 1, 1]],
    [1.0],
    ["1"],
    [True],
    [10**9],
    list(range(1, 1001)),
    [2, 1],
    [[[1, 1]]],
]


def wrong_values(name: str) -> list:
    if name in INTEGERS or name == "sample_size":
        return NO_INTEGERS
    if name in NUMBERS:
        return NO_NUMBERS
    if name in BOOLEANS:
        return NO_BOOLEANS
    if name in CHOICES:
        return NO_NAMES
    if name == "scale_sizes":
        return NO_SCALES
    if name == "id2label":
        return [["x"], "x", 3, {9: "x"}, {0: 1}, {-1: "x"}, {None: "x"}, {10**30: "x"}]
    if name == "codebook_fingerprint":
        return [
            "",
            "0123456789abcde",
            "0123456789abcdefg",
            "0123456789ABCDEF",
            16,
            0.5,
            True,
            ["0" * 16],
            {},
            "x" * 10**6,
        ]
    if name == "attention_windows":
        return [
            3,
            "003",
            [0, 0],
            [0, 0, 2],
            [0, 0, 5],
            [0, 0, -1],
            [0, 0, 1.0],
            [0, 0, True],
            [0, 0, [3]],
            {},
            [],
            math.nan,
        ]
    assert name in {*LISTS_OF_INTEGERS, *LISTS_OF_CHOICES}
    return NO_LISTS


ARGUMENTS = [
    pytest.param(model_class, name, id=f"{model_class.__name__}-{name}")
    for model_class in MAKERS
    for name in inspect.signature(model_class.__init__).parameters
    if name != "self"
]


@pytest.mark.parametrize(("model_class", "name"), ARGUMENTS)
def test_each_argument_refuses_what_it_cannot_be(model_class, name):
    started = time.perf_counter()
    for value in wrong_values(name):
        with pytest.raises(ValueError, match=rf"^`{name}[`\[(]|^`len\({name}") as caught:
            MAKERS[model_class](**{name: value})
        assert len(str(caught.value)) < 500
        assert " got " in str(caught.value)
    if not name.startswith("decoder_") and name not in ("id2label", "attention_windows", "codebook_fingerprint"):
        with pytest.raises(ValueError, match=f"^`{name}` must .* got None"):
            MAKERS[model_class](**{name: None})
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("model_class", "sizes"),
    [
        (ScaleTransformer2DModel, {"num_attention_heads": 1024, "attention_head_dim": 4096}),
        (ScaleTransformer2DModel, {"codebook_size": 2**20, "attention_head_dim": 4096, "num_attention_heads": 8}),
        (ScaleTransformer2DModel, {"scale_sizes": [4096], "num_attention_heads": 16, "attention_head_dim": 512}),
        (ScaleTextTransformer2DModel, {"num_attention_heads": 1024, "attention_head_dim": 4096}),
        (ScaleHistoryTransformer2DModel, {"num_attention_heads": 1024, "attention_head_dim": 4096}),
        (ScaleHistoryTransformer2DModel, {"num_classes": 10**6, "num_attention_heads": 512, "attention_head_dim": 64}),
        (ScaleTextTransformer2DModel, {"cross_attention_dim": 2**16, "num_layers": 256, "attention_head_dim": 512}),
        (MultiScaleVQModel, {"block_out_channels": [8192, 8192], "layers_per_block": 64}),
        (MultiScaleVQModel, {"decoder_block_out_channels": [8192, 8192], "decoder_layers_per_block": 64}),
        (MultiScaleVQModel, {"latent_channels": 4096, "num_residual_convs": 100, "quant_conv_kernel_size": 31}),
        (
            MultiScaleVQModel,
            {"in_channels": 1024, "patch_size": 64, "sample_size": 512, "block_out_channels": [8192] * 2},
        ),
    ],
)
def test_sizes_that_are_impossible_together(model_class, sizes):
    with pytest.raises(ValueError, match="must give a model of at most 2e.10 parameters, got"):
        MAKERS[model_class](**sizes)


@pytest.mark.parametrize("make", MAKERS.values())
def test_numbers_of_numpy_are_numbers(make, tmp_path):
    config = {key: value for key, value in make().config.items() if not key.startswith("_")}
    as_numpy = {
        key: value if value is None or isinstance(value, (str, dict)) else np.asarray(value)
        for key, value in config.items()
    }
    as_numpy = {key: value[()] if getattr(value, "ndim", None) == 0 else value for key, value in as_numpy.items()}
    as_numpy = {key: list(value) if isinstance(value, np.ndarray) else value for key, value in as_numpy.items()}
    as_numpy["scale_sizes"] = [tuple(size) for size in as_numpy["scale_sizes"]]
    names = ("down_block_types", "up_block_types")
    as_numpy |= {name: config[name] for name in names if name in config}
    model = type(make())(**as_numpy)
    assert {key: value for key, value in model.config.items() if not key.startswith("_")} == config
    json.loads(model.to_json_string())


def test_bounds_leave_room():
    for low, high in INTEGERS.values():
        assert low <= 1 < high
    assert MAX_LEVELS > len(inspect.signature(MultiScaleVQModel.__init__).parameters["block_out_channels"].default)
    assert tiny_transformer(num_layers=40).config.num_layers == 40
    assert MultiScaleVQModel(**{**VQVAE_CONFIG, "quant_conv_kernel_size": 5, "num_residual_convs": 1})


def test_a_saved_configuration_is_checked(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in (
        {"num_layers": 10**9},
        {"num_layers": "2"},
        {"mlp_ratio": None},
        {"scale_sizes": list(range(1, 1001))},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
        for low_cpu_mem_usage in (True, False):
            with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must "):
                ScaleTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
