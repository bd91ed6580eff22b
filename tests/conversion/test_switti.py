"""Official Switti checkpoints, made up here: names and shapes are facts about the published ones."""

import pytest
import torch
from tiny_models import random_texts

from srdd import MultiScaleVQModel, ScaleScheduler, SRDDTextPipeline
from srdd.conversion.official_layout import tokenizer_origins
from srdd.conversion.switti_checkpoints import convert_switti, convert_switti_transformer
from srdd.conversion.switti_layout import is_switti, switti_sampling, switti_scale_sizes


WIDTH, DEPTH, HIDDEN, TEXT, POOLED, CODES, CHANNELS = 16, 2, 42, 12, 6, 32, 8
SIDES = [1, 2, 4]
NUM_TOKENS = 21

LINEARS = {
    "word_embed": (WIDTH, CHANNELS),
    "text_pooler": (WIDTH, POOLED),
    "crop_proj": (WIDTH, WIDTH),
    "head_nm.ada_lin.1": (2 * WIDTH, WIDTH),
    "head": (CODES, WIDTH),
}
BLOCK_LINEARS = {
    "ada_lin.1": (6 * WIDTH, WIDTH),
    "attn.to_qkv": (3 * WIDTH, WIDTH),
    "attn.proj": (WIDTH, WIDTH),
    "cross_attn.to_q": (WIDTH, WIDTH),
    "cross_attn.to_kv": (2 * WIDTH, TEXT),
    "cross_attn.proj": (WIDTH, WIDTH),
}
BLOCK_TENSORS = {
    "ffn.gate_proj.weight": (HIDDEN, WIDTH),
    "ffn.up_proj.weight": (HIDDEN, WIDTH),
    "ffn.down_proj.weight": (WIDTH, HIDDEN),
    "crop_cond_scales": (1, WIDTH),
    "attention_y_norm.weight": (TEXT,),
    **{
        f"{name}_norm{place}.weight": (WIDTH,)
        for name in ("self_attention", "cross_attention", "ffn")
        for place in (1, 2)
    },
}


def official_state(pattern: str = "markov", seed: int = 0) -> dict[str, torch.Tensor]:
    shapes = {"pos_start": (1, 1, WIDTH), "lvl_embed.weight": (len(SIDES), WIDTH), "crop_embed.weight": (WIDTH // 8,)}
    linears = {
        **LINEARS,
        **{f"blocks.{k}.{name}": shape for k in range(DEPTH) for name, shape in BLOCK_LINEARS.items()},
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"blocks.{k}.{name}": shape for k in range(DEPTH) for name, shape in BLOCK_TENSORS.items()}
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.randn(shape, generator=generator) / 4 for key, shape in shapes.items()}
    scale_ids = torch.tensor([index for index, side in enumerate(SIDES) for _ in range(side**2)])
    seen = scale_ids[:, None] >= scale_ids if pattern == "causal" else scale_ids[:, None] == scale_ids
    state["lvl_1L"] = scale_ids[None]
    state["attn_bias_for_masking"] = torch.zeros(1, 1, NUM_TOKENS, NUM_TOKENS).masked_fill(~seen, -torch.inf)
    return state


@pytest.mark.parametrize("pattern", ["markov", "causal"])
def test_the_configuration_follows_from_the_checkpoint(pattern):
    state = official_state(pattern)
    assert is_switti(state)
    model = convert_switti_transformer(state)
    assert not model.training
    assert {name: value for name, value in model.config.items() if not name.startswith("_")} == {
        "codebook_size": CODES,
        "latent_channels": CHANNELS,
        "scale_sizes": [[1, 1], [2, 2], [4, 4]],
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "mlp_ratio": HIDDEN / WIDTH,
        "cross_attention_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "attention_pattern": pattern,
        "rope_theta": 10000.0,
        "rope_extent": 128.0,
        "norm_eps": 1e-6,
        "guidance_distilled": False,
    }
    assert convert_switti_transformer(state, attention_pattern="banded").config.attention_pattern == "banded"
    del state["attn_bias_for_masking"]
    assert convert_switti_transformer(state).config.attention_pattern == "markov"


def test_every_tensor_is_where_it_belongs():
    state = official_state()
    model = convert_switti_transformer(state)
    ours, block, theirs = model.state_dict(), model.blocks[1], {k[9:]: v for k, v in state.items() if "blocks.1." in k}
    for place, name in enumerate(("to_q", "to_k", "to_v")):
        part = slice(place * WIDTH, (place + 1) * WIDTH)
        assert torch.equal(getattr(block.attn, name).weight, theirs["attn.to_qkv.weight"][part])
        assert torch.equal(getattr(block.attn, name).bias, theirs["attn.to_qkv.bias"][part])
    assert torch.equal(block.attn2.to_q.weight, theirs["cross_attn.to_q.weight"])
    assert torch.equal(block.attn2.to_k.weight, theirs["cross_attn.to_kv.weight"][:WIDTH])
    assert torch.equal(block.attn2.to_v.bias, theirs["cross_attn.to_kv.bias"][WIDTH:])
    wide, gate = block.ff.net[0].proj.weight.chunk(2)
    assert torch.equal(wide, theirs["ffn.up_proj.weight"])
    assert torch.equal(gate, theirs["ffn.gate_proj.weight"])
    assert torch.equal(block.norm_text.weight, theirs["attention_y_norm.weight"])
    assert torch.equal(block.norm3_out.weight, theirs["ffn_norm2.weight"])
    assert torch.equal(block.size_scales, theirs["crop_cond_scales"][0])
    assert torch.equal(ours["size_embed.frequencies"], state["crop_embed.weight"])
    # Nothing is left, taken twice or made up.
    tables = ("lvl_1L", "attn_bias_for_masking")
    numbers = [torch.cat([tensor.flatten() for key, tensor in each.items() if key not in tables]).sort().values
               for each in (ours, state)]  # fmt: skip
    assert torch.equal(*numbers)
    views = [
        key for key, tensor in ours.items() if any(tensor.data_ptr() == each.data_ptr() for each in state.values())
    ]
    assert "blocks.1.attn.to_q.weight" in views


@torch.no_grad()
def test_a_converted_model_is_saved_and_loaded(tmp_path):
    model = convert_switti_transformer(official_state("causal"))
    inputs = torch.randn(2, NUM_TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    logits = model(inputs, **random_texts()).sample
    assert logits.std() > 0.1
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(inputs, **random_texts()).sample, logits)


def tokenizer_state(**changes) -> dict[str, torch.Tensor]:
    """Of VAR's layout, whose conversion is tested elsewhere."""
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [32, 32],
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "latent_channels": CHANNELS,
        "codebook_size": CODES,
        "scale_sizes": SIDES,
        "sample_size": 8,
        "quant_conv_kernel_size": 3,
        "num_residual_convs": 4,
    }
    shapes = {k: tuple(v.shape) for k, v in MultiScaleVQModel(**{**config, **changes}).state_dict().items()}
    generator, state = torch.Generator().manual_seed(1), {}
    for origin in tokenizer_origins(shapes, "quantize.quant_resi.qresi_ls.{}.").values():
        state[origin.key] = torch.randn(origin.shape, generator=generator) / 8
    return state


def test_a_pair_of_checkpoints_becomes_a_pipeline_that_draws(tmp_path):
    pipe = convert_switti(tokenizer_state(), official_state("causal"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.top_k == 400
    assert pipe.transformer.config.attention_pattern == "causal"
    texts = random_texts()
    told = {
        "prompt_embeds": texts["encoder_hidden_states"],
        "pooled_prompt_embeds": texts["pooled_projections"],
        "prompt_attention_mask": texts["encoder_attention_mask"],
    }
    away = {f"negative_{name}": tensor.flip(0) for name, tensor in told.items()}
    images = pipe(**told, **away, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 3, 8, 8)
    pipe.save_pretrained(tmp_path)
    again = SRDDTextPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    drawn = again(**told, **away, generator=torch.Generator().manual_seed(0), output_type="pt")
    assert torch.equal(drawn.images, images)


def test_tokenizers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="The tokenizer must have `codebook_size` 32, got 16"):
        convert_switti(tokenizer_state(codebook_size=16), official_state())
    with pytest.raises(ValueError, match="The tokenizer must be an official Switti, but extra is unknown"):
        convert_switti({**tokenizer_state(), "extra": torch.ones(1)}, official_state())
    with pytest.raises(ValueError, match="The tokenizer must be an official one"):
        convert_switti({}, official_state())


def test_another_dtype_leaves_the_frequencies_in_float32():
    state = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in official_state().items()}
    for dtype in (None, torch.bfloat16):
        dtypes = {
            key: tensor.dtype for key, tensor in convert_switti_transformer(state, dtype=dtype).state_dict().items()
        }
        assert dtypes.pop("size_embed.frequencies") == torch.float32
        assert {*dtypes.values()} == {dtype or torch.float16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, "must be an official Switti with a gated MLP, but head.weight are missing"),
        ({"blocks.0.ffn.gate_proj.weight": None}, "but blocks.0.ffn.gate_proj.weight are missing"),
        ({"blocks.1.attn.proj.bias": None}, "must be an official Switti, but blocks.1.attn.proj.bias is missing"),
        ({"extra": torch.ones(1)}, "but extra is unknown"),
        ({"crop_proj.bias": torch.ones(3)}, r"but crop_proj.bias must have shape \(16,\), got \(3,\)"),
        ({"head.bias": torch.full((CODES,), torch.nan)}, "but head.bias is not finite"),
        ({"word_embed.weight": torch.ones(15, 8)}, "must be a multiple of its 2 heads, got 15"),
        ({"lvl_1L": None}, "must be those of a published model, .*, but it has 3 scales"),
    ],
)
def test_checkpoints_of_another_kind_are_refused(change, message):
    state = {**official_state(), **change}
    with pytest.raises(ValueError, match=message):
        convert_switti_transformer({key: tensor for key, tensor in state.items() if tensor is not None})


def test_arguments_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="`attention_pattern` must be one of"):
        convert_switti_transformer(official_state(), attention_pattern="full")
    with pytest.raises(ValueError, match="`dtype` must be a floating-point torch.dtype, got 'half'"):
        convert_switti_transformer(official_state(), dtype="half")


@pytest.mark.parametrize(("num_scales", "finest", "first_unguided"), [(10, 32, 8), (14, 64, 11)])
def test_published_scales_and_how_they_are_drawn(num_scales, finest, first_unguided):
    sides = switti_scale_sizes({"lvl_embed.weight": torch.zeros(num_scales, WIDTH)})
    assert (len(sides), sides[-1]) == (num_scales, finest)
    scheduler = ScaleScheduler(scale_sizes=sides, **switti_sampling(sides))
    weights = [scheduler.guidance_weight(scale.timestep, 7.0) for scale in scheduler.visits]
    ramp = [6.0 * index / (num_scales - 1) for index in range(num_scales)]
    assert weights == pytest.approx([weight * (index < first_unguided) for index, weight in enumerate(ramp)])
    assert [scheduler.temperatures[scale.timestep] for scale in scheduler.visits] == [
        1.0 if index < first_unguided else 0.1 for index in range(num_scales)
    ]
