"""
Switti, which draws from texts, against a plain version of its network on tiny random weights under the official keys.

Shape legend: B batch, N tokens, L tokens of the text, D width, H heads.
"""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    CHANNELS,
    CODEBOOK_SIZE,
    DEPTH,
    SIDES,
    WIDTH,
    greedy_tokens,
    saved,
    switti_state,
    tokenizer_state,
    var_state,
)
from tiny_models import POOLED_DIM, TEXT_DIM, random_texts
from tiny_texts import tiny_text_encoder, tiny_text_pipeline

from srdd import ScaleScheduler, SRDDTextPipeline
from srdd.conversion import convert_checkpoints
from srdd.conversion.__main__ import main
from srdd.conversion.switti import SWITTI


NUM_TOKENS = sum(side**2 for side in SIDES)
PUBLISHED = {512: [1, 2, 3, 4, 6, 9, 13, 18, 24, 32], 1024: [1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64]}
ROPE = {"rope_theta": 700.0, "rope_size": 40}


def turns(theta: float, extent: float) -> torch.Tensor:
    """`(N, D/H/2)` complex numbers of length 1 by which pairs of channels are turned: half by column, half by row."""
    head_dim, turns = WIDTH // DEPTH, []
    frequencies = theta ** (-4 * torch.arange(head_dim // 4) / head_dim)
    for side in SIDES:
        places = torch.arange(side) * extent / max(side - 1, 1)
        columns, rows = places.repeat(side), places.repeat_interleave(side)
        angles = torch.cat([columns[:, None] * frequencies, rows[:, None] * frequencies], dim=1)
        turns.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(turns)


def plain_logits(state, inputs, texts, theta=10000.0, extent=128.0, size=(512.0, 512.0, 0.0, 0.0)) -> torch.Tensor:
    """Switti's training forward over the first scales, in one piece, from its state dict."""
    linear = lambda x, name: F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))  # noqa: E731
    rms = lambda x, name: F.rms_norm(x, x.shape[-1:], state[f"{name}.weight"], eps=1e-6)  # noqa: E731
    standard = lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6)  # noqa: E731
    heads = lambda x: x.unflatten(-1, (DEPTH, -1)).transpose(1, 2)  # noqa: E731  (B, H, N, D/H)
    num_tokens = inputs.shape[1]
    rotation = turns(theta, extent)[:num_tokens]

    def turned(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotation).flatten(-2)

    def attend(query, key, value, mask) -> torch.Tensor:
        scores = (query @ key.mT / math.sqrt(query.shape[-1])).masked_fill(~mask, -torch.inf)
        return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)

    seen = state["attn_bias_for_masking"][0, 0, :num_tokens, :num_tokens] == 0
    text, text_mask = texts["encoder_hidden_states"], texts["encoder_attention_mask"][:, None, None]
    pooled = linear(texts["pooled_projections"], "text_pooler")
    phases = 2 * math.pi * torch.tensor(size)[:, None] * state["crop_embed.weight"]
    crop = linear(torch.cat([phases.sin(), phases.cos()], dim=1).flatten(), "crop_proj")
    x = torch.cat([pooled[:, None] + state["pos_start"], linear(inputs, "word_embed")[:, 1:]], dim=1)
    x = x + state["lvl_embed.weight"][state["lvl_1L"][:, :num_tokens]]
    for name in (f"blocks.{index}" for index in range(DEPTH)):
        condition = F.silu(pooled + state[f"{name}.crop_cond_scales"] * crop)[:, None]
        gate1, gate2, scale1, scale2, shift1, shift2 = linear(condition, f"{name}.ada_lin.1").chunk(6, dim=-1)
        modulated = rms(x, f"{name}.self_attention_norm1") * (1 + scale1) + shift1
        query, key, value = linear(modulated, f"{name}.attn.to_qkv").chunk(3, dim=-1)
        query, key = turned(heads(standard(query))), turned(heads(standard(key)))
        attended = linear(attend(query, key, heads(value), seen), f"{name}.attn.proj")
        x = x + gate1 * rms(attended, f"{name}.self_attention_norm2")
        query = linear(rms(x, f"{name}.cross_attention_norm1"), f"{name}.cross_attn.to_q")
        key, value = linear(rms(text, f"{name}.attention_y_norm"), f"{name}.cross_attn.to_kv").chunk(2, dim=-1)
        attended = attend(heads(standard(query)), heads(standard(key)), heads(value), text_mask)
        x = x + rms(linear(attended, f"{name}.cross_attn.proj"), f"{name}.cross_attention_norm2")
        modulated = rms(x, f"{name}.ffn_norm1") * (1 + scale2) + shift2
        hidden = F.silu(linear(modulated, f"{name}.ffn.gate_proj")) * linear(modulated, f"{name}.ffn.up_proj")
        x = x + gate2 * rms(linear(hidden, f"{name}.ffn.down_proj"), f"{name}.ffn_norm2")
    scale, shift = linear(F.silu(pooled)[:, None], "head_nm.ada_lin.1").chunk(2, dim=-1)
    return linear(standard(x) * (1 + scale) + shift, "head")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "model.safetensors"
    save_file(tokenizer_state(), path)
    return path


def published(state, folder, **config):
    """The file of a state dict, with `config.json` beside it, as Switti's authors publish them."""
    path = folder / "model.safetensors"
    save_file(state, path)
    if config:
        (folder / "config.json").write_text(json.dumps({"depth": DEPTH, "rope": True, **config}))
    return path


def command(vae, transformer, output, *options: str) -> SRDDTextPipeline:
    """What the command writes, as a user loads it."""
    main(["--vae", str(vae), "--transformer", str(transformer), "--output", str(output), *options])
    pipe = SRDDTextPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def told(texts, prefix: str = "") -> dict[str, torch.Tensor]:
    """Encoded texts by the names of the pipeline's arguments."""
    return {
        f"{prefix}prompt_embeds": texts["encoder_hidden_states"],
        f"{prefix}pooled_prompt_embeds": texts["pooled_projections"],
        f"{prefix}prompt_attention_mask": texts["encoder_attention_mask"],
    }


@torch.no_grad()
@pytest.mark.parametrize("rope", [{}, ROPE])
@pytest.mark.parametrize("pattern", ["markov", "causal"])
def test_folders_compute_what_the_plain_network_does(pattern, rope, vae, tmp_path):
    state = switti_state(pattern=pattern)
    pipe = command(vae, published(state, tmp_path, **rope), tmp_path / "out")
    assert pipe.transformer.config.attention_pattern == pattern
    rotation = (rope["rope_theta"], rope["rope_size"]) if rope else ()
    texts, others = random_texts(), random_texts((4, 1), seed=1)
    inputs = torch.randn(2, NUM_TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    logits = pipe.transformer(inputs, **texts).sample
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, plain_logits(state, inputs, texts, *rotation), atol=1e-4, rtol=0)
    logits = pipe.transformer(inputs, **texts, original_size=(700, 512), crop_coords=(94, 3)).sample
    expected = plain_logits(state, inputs, texts, *rotation, size=(700.0, 512.0, 94.0, 3.0))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    halves = [lambda inputs, given=given: plain_logits(state, inputs, given, *rotation) for given in (texts, others)]
    for start, stop in ((0, 4), (1, 3)):
        pipe.scheduler = ScaleScheduler.from_config(
            pipe.scheduler.config, temperature=0.0, guidance_start=start / 4, guidance_stop=stop / 4
        )
        output = pipe(**told(texts), **told(others, "negative_"), output_type="latent")
        weights = [2 * scale if start <= scale < stop else 0.0 for scale in range(4)]  # 6 k / (K - 1)
        assert torch.equal(output.token_ids, greedy_tokens(halves, pipe.vqvae, 2, SIDES, weights))
        assert len(output.token_ids.unique()) > 3


def mapped(path) -> list[range]:
    """Where in memory this process has mapped a file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tensors_stay_mapped_from_the_file(suffix, vae, tmp_path):
    path = saved(switti_state(), tmp_path) if suffix == ".pth" else published(switti_state(), tmp_path)
    ours = convert_checkpoints(vae, path).transformer.state_dict()
    places = mapped(path)
    copied = [key for key, tensor in ours.items() if not any(tensor.data_ptr() in place for place in places)]
    assert copied == [f"blocks.{index}.ff.net.0.proj.weight" for index in range(DEPTH)]  # two matrices become one


def test_nothing_is_left_or_taken_twice_or_made_up(vae, tmp_path):
    state = switti_state()
    ours = convert_checkpoints(vae, saved(state, tmp_path)).transformer.state_dict()
    numbers = [
        torch.cat([tensor.flatten() for key, tensor in each.items() if tensor.ndim < 4 and key != "lvl_1L"]).sort()
        for each in (ours, state)
    ]
    assert torch.equal(numbers[0].values, numbers[1].values)


def test_the_configuration_follows_from_the_checkpoint(vae, tmp_path):
    path = published(switti_state(), tmp_path)
    model = convert_checkpoints(vae, path).transformer
    assert not model.training
    assert {name: value for name, value in model.config.items() if not name.startswith("_")} == {
        "codebook_size": CODEBOOK_SIZE,
        "latent_channels": CHANNELS,
        "scale_sizes": [[side, side] for side in SIDES],
        "num_layers": DEPTH,
        "num_attention_heads": DEPTH,
        "attention_head_dim": WIDTH // DEPTH,
        "mlp_ratio": 64 / WIDTH,
        "cross_attention_dim": TEXT_DIM,
        "pooled_projection_dim": POOLED_DIM,
        "attention_pattern": "markov",
        "rope_theta": 10000.0,
        "rope_extent": 128.0,
        "norm_eps": 1e-6,
        "guidance_distilled": False,
        "codebook_fingerprint": None,
    }
    start = convert_checkpoints(vae, path, attention_pattern="banded")
    assert start.transformer.config.attention_pattern == "banded"


@pytest.mark.parametrize("use_ar", [True, False])
def test_the_published_configuration_says_how_it_attends(use_ar, vae, tmp_path, caplog):
    path, patterns = published(switti_state(pattern="markov" if use_ar else "causal"), tmp_path), ["markov", "causal"]
    assert convert_checkpoints(vae, path).transformer.config.attention_pattern == patterns[not use_ar]
    assert f"There is no config.json beside {path}" in caplog.text
    caplog.clear()
    published(switti_state(pattern="markov" if use_ar else "causal"), tmp_path, use_ar=use_ar)
    assert convert_checkpoints(vae, path).transformer.config.attention_pattern == patterns[use_ar]
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json beside it must be read, too, but it is no JSON"),
        ("[1]", r"config\.json beside it must hold a JSON object"),
        ('{"use_ar": "yes"}', "`config.json: use_ar` must be True or False, got 'yes'"),
        ('{"rope_theta": 0}', r"`config.json: rope_theta` must be a finite number above 0, got 0"),
        ('{"rope_size": "128"}', "`config.json: rope_size` must be a finite number above 0, got '128'"),
    ],
)
def test_published_configurations_of_another_kind_are_refused(content, message, vae, tmp_path):
    path = published(switti_state(), tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        ValueError, match=f"^`transformer_path` must be an official checkpoint, got {path}. .*{message}"
    ):
        convert_checkpoints(vae, path)


@pytest.mark.parametrize(("size", "num_guided"), [(512, 8), (1024, 11)])
def test_published_models_are_drawn_as_their_authors_do(size, num_guided, vae, tmp_path):
    sides, state = PUBLISHED[size], switti_state(PUBLISHED[size], depth=1)
    del state["lvl_1L"], state["attn_bias_for_masking"]
    pipe = command(vae, published(state, tmp_path), tmp_path / "out")
    assert (pipe.transformer.config.attention_pattern, pipe.sample_size) == ("markov", (size, size))
    scheduler, num_scales = pipe.scheduler, len(sides)
    assert [scale.size[0] for scale in scheduler.visits] == sides
    assert (scheduler.config.top_k, scheduler.config.top_p) == (400, 0.95)
    assert pipe.default_guidance_scale == 7
    weights = [scheduler.guidance_weight(scale.timestep, 7.0) for scale in scheduler.visits]
    ramp = [6.0 * index / (num_scales - 1) for index in range(num_scales)]
    assert weights == pytest.approx([weight * (index < num_guided) for index, weight in enumerate(ramp)])
    assert [scheduler.temperatures[scale.timestep] for scale in scheduler.visits] == [
        1.0 if index < num_guided else 0.1 for index in range(num_scales)
    ]
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"{size} x {size} pixels" in text
    for row in ("`Switti` | 7.0 | 400 | 0.95 | 8 of 10 | 0.1", "`Switti-1024` | 7.0 | 400 | 0.95 | 11 of 14 | 0.1"):
        assert row in text


def test_faults_of_both_files_are_one_error(tmp_path):
    state, tokenizer = switti_state(), dict(tokenizer_state())
    del state["blocks.1.attn.proj.bias"], state["head.weight"], tokenizer["quant_conv.bias"]
    state |= {
        "extra": torch.ones(1),
        "crop_proj.bias": torch.ones(3),
        "text_pooler.bias": torch.full((WIDTH,), torch.nan),
    }
    with pytest.raises(ValueError, match="official layout") as caught:
        convert_checkpoints(saved(tokenizer, tmp_path, "vae.pth"), saved(state, tmp_path))
    assert [line.strip().removeprefix(f"{tmp_path}/") for line in str(caught.value).splitlines()[1:]] == [
        "vae.pth: quant_conv.bias is missing",
        "model.pth: blocks.1.attn.proj.bias is missing",
        "model.pth: head.weight is missing",
        "model.pth: extra is unknown",
        "model.pth: text_pooler.bias is not finite",
        f"model.pth: crop_proj.bias must have shape ({WIDTH},), got (3,)",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_start": torch.ones(1, 1, 25)} | {f"{name}.weight": None for name in ("lvl_embed", "head")},
         f"must be a multiple of its {DEPTH} heads, got 25"),
        ({"lvl_1L": None}, "must be those of a published model, .*, but it has 4 scales"),
        ({f"blocks.{index}.ffn.gate_proj.weight": None for index in range(DEPTH)}, "gate_proj.weight is missing"),
    ],
)  # fmt: skip
def test_checkpoints_of_another_kind_are_refused(change, message, vae, tmp_path):
    state = {key: tensor for key, tensor in {**switti_state(), **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=f"(?s)^`.*transformer_path`.*model.pth.*{message}"):
        convert_checkpoints(vae, saved(state, tmp_path))


def test_tokenizers_of_another_size_are_refused(tmp_path):
    state = {**tokenizer_state(), "quantize.embedding.weight": torch.zeros(CODEBOOK_SIZE + 1, CHANNELS)}
    with pytest.raises(ValueError, match=r"head.weight must have shape \(65, 24\), got \(64, 24\)"):
        convert_checkpoints(saved(state, tmp_path, "vae.pth"), saved(switti_state(), tmp_path))


def test_another_dtype_leaves_the_frequencies_in_float32(vae, tmp_path):
    state = {key: value.half() if value.is_floating_point() else value for key, value in switti_state().items()}
    for dtype in (None, torch.bfloat16):
        model = convert_checkpoints(vae, saved(state, tmp_path), dtype=dtype).transformer
        dtypes = {key: tensor.dtype for key, tensor in model.state_dict().items()}
        assert dtypes.pop("size_embed.frequencies") == torch.float32
        assert {*dtypes.values()} == {dtype or torch.float16}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A folder with text encoders, as those of SDXL are."""
    folder = tmp_path_factory.mktemp("encoders")
    pipe = tiny_text_pipeline()
    for name in SRDDTextPipeline._optional_components:
        getattr(pipe, name).save_pretrained(folder / name)
    return folder


def test_a_folder_with_text_encoders_draws_from_prompts(vae, encoders, tmp_path):
    path = saved(switti_state(), tmp_path)
    pipe = command(vae, path, tmp_path / "out", "--text-encoders", str(encoders))
    output = pipe("a cat", generator=torch.Generator().manual_seed(0), output_type="pt")
    without = command(vae, path, tmp_path / "without")
    names = ("encoder_hidden_states", "pooled_projections", "encoder_attention_mask")
    texts, away = (dict(zip(names, tiny_text_pipeline().encode_texts([text]))) for text in ("a cat", ""))
    generator = torch.Generator().manual_seed(0)
    expected = without(**told(texts), **told(away, "negative_"), generator=generator, output_type="pt")
    assert torch.equal(output.token_ids, expected.token_ids)
    assert torch.equal(output.images, expected.images)
    assert len(output.token_ids.unique()) > 4
    half = convert_checkpoints(vae, path, dtype=torch.float16, text_encoders=encoders)
    assert {half.text_encoder.dtype, half.text_encoder_2.dtype, half.transformer.dtype} == {torch.float16}


def refused_by_command(vae, transformer, output, capsys, *options: str) -> str:
    """What the command says; it leaves nothing behind."""
    with pytest.raises(SystemExit) as caught:
        main(["--vae", str(vae), "--transformer", str(transformer), "--output", str(output), *options])
    assert caught.value.code == 2
    assert not output.exists()
    return capsys.readouterr().err.split("error: ", 1)[1].strip()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: b"", "is an empty file"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a git-lfs pointer"),
        (lambda content: b"<!doctype html>Entry not found", "is a web page"),
        (lambda content: content[: len(content) // 2], "is something else, or cut"),
    ],
)
def test_files_that_are_no_checkpoints(change, words, vae, tmp_path, capsys):
    path = published(switti_state(), tmp_path, use_ar=False)
    path.write_bytes(change(path.read_bytes()))
    for files, option in (((vae, path), "--transformer"), ((path, vae), "--vae")):
        message = refused_by_command(*files, tmp_path / "out", capsys)
        assert message.startswith(f"`{option}` {path} must hold a state dict")
        assert words in message
        assert len(message.splitlines()) == 1


def test_weights_in_several_files(vae, tmp_path):
    state = switti_state()
    files = {key: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, key in enumerate(state)}
    for name in {*files.values()}:
        save_file({key: state[key] for key in state if files[key] == name}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (tmp_path / "config.json").write_text(json.dumps(ROPE))
    model, whole = (convert_checkpoints(vae, path).transformer for path in (index, saved(state, tmp_path)))
    assert model.config.rope_theta == ROPE["rope_theta"]
    torch.testing.assert_close(dict(model.state_dict()), dict(whole.state_dict()), atol=0, rtol=0)
    (tmp_path / files["pos_start"]).unlink()
    for content in (index.read_text(), "{}", "[]", "{"):
        index.write_text(content)
        with pytest.raises(ValueError, match="index.json must hold a state dict.* it is an index of files that are m"):
            convert_checkpoints(vae, index)


def without(name: str):
    return lambda folder: shutil.rmtree(folder / name)


def cut(name: str):
    def change(folder: Path) -> None:
        path = folder / name / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-4])

    return change


def lacking(name: str, key: str):
    def change(folder: Path) -> None:
        path = folder / name / "model.safetensors"
        save_file({each: tensor for each, tensor in load_file(path).items() if each != key}, path, {"format": "pt"})

    return change


def other(name: str, component):
    return lambda folder: (shutil.rmtree(folder / name), component().save_pretrained(folder / name))


def with_nan():
    encoder = tiny_text_encoder(POOLED_DIM, seed=4)
    encoder.final_layer_norm.bias.data[0] = torch.nan
    return encoder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "must be a folder or a repository of the Hub .*, where text_encoder cannot be read: Repo"),
        (without("tokenizer_2"), "with CLIP's text encoders .* got .*, where tokenizer_2 is missing"),
        (cut("text_encoder_2"), "where text_encoder_2 cannot be read: .*incomplete metadata"),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), "knows 55 tokens and tokenizer 2"),
        (other("text_encoder", lambda: tiny_text_encoder(8, seed=4)), "must be those that the transformer knows, got"),
        (lacking("text_encoder", "final_layer_norm.bias"), r"where text_encoder lacks \['final_layer_norm.bias'\]"),
        (other("text_encoder_2", with_nan), "must have finite weights"),
    ],
)  # fmt: skip
def test_text_encoders_of_another_kind_are_refused(change, message, vae, encoders, tmp_path, capsys):
    folder = tmp_path / "encoders"
    shutil.copytree(encoders, folder)
    change(folder)
    path, options = saved(switti_state(), tmp_path), ("--text-encoders", str(folder))
    said = refused_by_command(vae, path, tmp_path / "out", capsys, *options)
    assert re.match(f"`--text-encoders` .*{message}", said)
    assert str(folder) in said
    assert len(said.splitlines()) == 1


def test_options_that_do_not_fit_the_family_are_refused(vae, encoders, tmp_path, capsys):
    switti, var = saved(switti_state(), tmp_path), saved(var_state(), tmp_path, "var.pth")
    message = refused_by_command(vae, switti, tmp_path / "out", capsys, "--attention-windows", "0", "0", "3", "3")
    assert message == (
        "`--attention-windows` must be None with Switti, whose transformer has no windows, got [0, 0, 3, 3]."
    )
    message = refused_by_command(vae, var, tmp_path / "out", capsys, "--text-encoders", str(encoders))
    assert message == f"`--text-encoders` must be None with VAR, which draws by class, got {str(encoders)!r}."
    message = refused_by_command(vae, var, tmp_path / "out", capsys, "--family", "switti")
    assert "no key of it starts with blocks.0.cross_attn., got" in message
    for wrong in (3, ["a"]):
        with pytest.raises(ValueError, match="^`text_encoders` must be a folder or a repository"):
            convert_checkpoints(vae, switti, text_encoders=wrong)


def test_cards_say_how_to_draw(vae, encoders, tmp_path):
    path = published(switti_state(), tmp_path)
    options = {"with": ["--text-encoders", str(encoders)], "without": []}
    cards = {}
    for name, words in options.items():
        command(vae, path, tmp_path / name, *words)
        cards[name] = (tmp_path / name / "README.md").read_text()
        card = ModelCard(cards[name])
        assert (card.data.pipeline_tag, card.data.license) == ("text-to-image", "unknown")
        assert {"switti", "diffusers"} <= set(card.data.tags)
        said = re.sub(r"\s+", " ", cards[name])
        assert "`model.safetensors` with the tokenizer `model.safetensors`" in said
        assert SWITTI.licence_note in said
        assert "All scales are guided here" in said
        assert max(len(line) for line in cards[name].splitlines()) < 120
    assert "text encoders 0.0 M" in cards["with"]
    assert "load_text_encoders" not in cards["with"]
    assert "`prompt_embeds`" in cards["without"]
    # What a card says, a user may run.
    code = re.search(r"```py\n(.*?)```", cards["without"], re.DOTALL)[1]
    assert 'from_pretrained("without", **encoders)' in code
    code = code.replace('"without"', repr(str(tmp_path / "without")))
    names: dict = {}
    exec(code.replace('"stabilityai/stable-diffusion-xl-base-1.0"', repr(str(encoders))), names)
    assert names["image"].size == (80, 80)
