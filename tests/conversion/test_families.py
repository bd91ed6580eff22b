"""
Families that build on VAR, against a plain version of their network on tiny random weights under the official keys.

Shape legend: B batch, N tokens, D width, H heads.
"""

import json
import math
import re
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard

from srdd import ScaleScheduler, SRDDPipeline
from srdd.conversion import convert_checkpoints
from srdd.conversion.__main__ import main
from srdd.conversion.families import FAMILIES


FIXTURES = Path(__file__).parent / "fixtures"
WIDTH, HEADS, DEPTH, NUM_CLASSES, CODEBOOK_SIZE, CHANNELS = 24, 3, 3, 10, 64, 8
SIDES = [1, 2, 3, 5]
WINDOWS = [0, 0, 3, 3]
PUBLISHED_SIDES = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]


def tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a random checkpoint. numpy promises that `RandomState` never changes its stream."""
    values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    values = torch.from_numpy(values)
    if "scale_mul" in key:
        return math.log(4) + 0.2 * values
    if len(shape) == 1:
        return float("norm" in key and key.endswith(".weight")) + 0.1 * values
    gain = {"head.weight": 3.0, "ns_head.weight": 3.0, "quantize.embedding.weight": 0.5}.get(key, 1.0)
    scale = 1.0 if key.startswith(("class_emb", "pos_", "lvl_embed")) else math.prod(shape[1:]) ** -0.5
    return values * gain * scale


@cache
def tokenizer_state() -> dict[str, torch.Tensor]:
    """Of the keys and shapes of the official tokenizer, small."""
    facts = json.loads((FIXTURES / "shared_adaln_no_norm.json").read_text())
    return {
        key: torch.zeros(shape) if key.endswith("ema_vocab_hit_SV") else tensor(key, tuple(shape))
        for key, shape in facts["tokenizer_shapes"].items()
        if "quant_resi" not in key
    } | {
        f"quantize.quant_resi.qresi_ls.{index}.{name}": tensor(f"{index}.{name}", shape)
        for index in range(4)
        for name, shape in (("weight", (CHANNELS, CHANNELS, 3, 3)), ("bias", (CHANNELS,)))
    }


def var_state(sides=SIDES, pattern="causal", depth=DEPTH) -> dict[str, torch.Tensor]:
    """A transformer's, of VAR and of MVAR, with the tables that their code derives and saves."""
    num_tokens = sum(side**2 for side in sides)
    shapes = {
        "pos_start": (1, 1, WIDTH),
        "pos_1LC": (1, num_tokens, WIDTH),
        "lvl_embed.weight": (len(sides), WIDTH),
        "class_emb.weight": (NUM_CLASSES + 1, WIDTH),
        "word_embed.weight": (WIDTH, CHANNELS),
        "word_embed.bias": (WIDTH,),
        "head_nm.ada_lin.1.weight": (2 * WIDTH, WIDTH),
        "head_nm.ada_lin.1.bias": (2 * WIDTH,),
        "head.weight": (CODEBOOK_SIZE, WIDTH),
        "head.bias": (CODEBOOK_SIZE,),
    }
    for block in (f"blocks.{index}" for index in range(depth)):
        shapes |= {
            f"{block}.attn.scale_mul_1H11": (1, HEADS, 1, 1),
            f"{block}.attn.q_bias": (WIDTH,),
            f"{block}.attn.v_bias": (WIDTH,),
            f"{block}.attn.mat_qkv.weight": (3 * WIDTH, WIDTH),
            f"{block}.attn.proj.weight": (WIDTH, WIDTH),
            f"{block}.attn.proj.bias": (WIDTH,),
            f"{block}.ffn.fc1.weight": (4 * WIDTH, WIDTH),
            f"{block}.ffn.fc1.bias": (4 * WIDTH,),
            f"{block}.ffn.fc2.weight": (WIDTH, 4 * WIDTH),
            f"{block}.ffn.fc2.bias": (WIDTH,),
            f"{block}.ada_lin.1.weight": (6 * WIDTH, WIDTH),
            f"{block}.ada_lin.1.bias": (6 * WIDTH,),
        }
    state = {key: tensor(key, shape) for key, shape in shapes.items()}
    state |= {f"blocks.{index}.attn.zero_k_bias": torch.zeros(WIDTH) for index in range(depth)}
    scale_ids = torch.cat([torch.full((1, side**2), scale) for scale, side in enumerate(sides)], dim=1)
    allowed = scale_ids.mT >= scale_ids if pattern == "causal" else scale_ids.mT == scale_ids
    table = torch.where(allowed, 0.0, -torch.inf)[None, None]
    return {**state, "lvl_1L": scale_ids, "attn_bias_for_masking": table}


def hmar_state(num_shared=1) -> dict[str, torch.Tensor]:
    """HMAR's: of blocks that both halves share, of the half that predicts scale after scale, and of the masked one."""
    state = {}
    for key, value in var_state(pattern="markov").items():
        if block := re.match(r"blocks\.(\d+)\.", key):
            index, rest = int(block[1]), key[block.end() :]
            if index < num_shared:
                state[f"base_blocks.{index}.{rest}"] = value
            else:
                state[f"ns_blocks.{index - num_shared}.{rest}"] = value
                state[f"mask_blocks.{index - num_shared}.{rest}"] = value + 1
        elif key.startswith("head"):
            state |= {f"ns_{key}": value, f"mask_{key}": value + 1}
        else:
            state["word_embed_bias" if key == "word_embed.bias" else key] = value
    return {**state, "mask_embed.weight": torch.ones(1, WIDTH)}


def near(place: int, length: int, window: int) -> range:
    start = min(max(place - window // 2, 0), length - window)
    return range(start, start + window)


def allowed(sides, windows=None) -> torch.Tensor:
    """`(N, N)`, true where a token sees another: those of its scale, in a window the square around it."""
    places = [(side, row, column) for side in sides for row in range(side) for column in range(side)]
    windows = dict(zip(sides, windows or [0] * len(sides)))
    rows = []
    for side, row, column in places:
        window = windows[side] or side
        seen = {(side, r, c) for r in near(row, side, window) for c in near(column, side, window)}
        rows.append([place in seen for place in places])
    return torch.tensor(rows)


def plain_logits(state, inputs, labels, mask, tokens=slice(None)) -> torch.Tensor:
    """VAR's training forward over the tokens of some scales, in one piece, from VAR's state dict."""
    linear = lambda x, name: F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    condition, mask = state["class_emb.weight"][labels], mask[tokens, tokens]
    x = linear(inputs, "word_embed")
    if not tokens.start:
        x = torch.cat([condition[:, None] + state["pos_start"], x[:, 1:]], dim=1)
    x = x + state["lvl_embed.weight"][state["lvl_1L"]][:, tokens] + state["pos_1LC"][:, tokens]
    activated = F.silu(condition)[:, None]
    for block in sorted({key.split(".")[1] for key in state if key.startswith("blocks.")}, key=int):
        name = f"blocks.{block}"
        gate1, gate2, scale1, scale2, shift1, shift2 = linear(activated, f"{name}.ada_lin.1").chunk(6, dim=-1)
        modulated = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
        q_bias, v_bias = state[f"{name}.attn.q_bias"], state[f"{name}.attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros(WIDTH), v_bias])
        states = F.linear(modulated, state[f"{name}.attn.mat_qkv.weight"], bias).unflatten(-1, (3, HEADS, -1))
        query, key, value = states.permute(2, 0, 3, 1, 4)  # (B, H, N, D/H) each
        query = F.normalize(query, dim=-1) * state[f"{name}.attn.scale_mul_1H11"].clamp(max=math.log(100)).exp()
        scores = (query @ F.normalize(key, dim=-1).mT).masked_fill(~mask, -torch.inf)
        attended = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        x = x + gate1 * linear(attended, f"{name}.attn.proj")
        modulated = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
        hidden = F.gelu(linear(modulated, f"{name}.ffn.fc1"), approximate="tanh")
        x = x + gate2 * linear(hidden, f"{name}.ffn.fc2")
    scale, shift = linear(activated, "head_nm.ada_lin.1").chunk(2, dim=-1)
    return linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, "head")


def plain_draw(state, vqvae, labels, mask, sides, cfg: float) -> torch.Tensor:
    """Greedy tokens: scale after scale, guided by `(1 + t) cond - t uncond` with `t = cfg k / (K - 1)`."""
    latents, drawn, start = torch.zeros(len(labels), CHANNELS, sides[-1], sides[-1]), [], 0
    for k, side in enumerate(sides):
        inputs = F.interpolate(latents, size=(side, side), mode="area").flatten(2).mT
        tokens, weight = slice(start, start + side**2), cfg * k / (len(sides) - 1)
        cond, uncond = (plain_logits(state, inputs, each, mask, tokens) for each in (labels, NUM_CLASSES + 0 * labels))
        drawn.append(((1 + weight) * cond - weight * uncond).argmax(dim=-1))
        latents = latents + vqvae.residual_map(drawn[-1].unflatten(1, (side, side)))
        start = tokens.stop
    return torch.cat(drawn, dim=1)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vae.pth"
    torch.save(tokenizer_state(), path)
    return path


def saved(content, folder, name="model.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def command(vae, transformer, output, *options) -> SRDDPipeline:
    """What the command writes, as a user loads it."""
    main(["--vae", str(vae), "--transformer", str(transformer), "--output", str(output), *options])
    pipe = SRDDPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_weights(left: SRDDPipeline, right: SRDDPipeline) -> bool:
    states = [pipe.transformer.state_dict() for pipe in (left, right)]
    return all(torch.equal(value, states[1][key]) for key, value in states[0].items())


CASES = {
    "mvar": (
        lambda: {"mvar_wo_ddp": var_state(pattern="markov")},
        WINDOWS,
        {"top_k": 1200, "top_p": 0.99, "guidance_scale": 3.7},
    ),
    "hmar": (hmar_state, None, {"top_k": 1000, "top_p": 0.99, "guidance_scale": 2.7}),
}


@torch.no_grad()
@pytest.mark.parametrize("family", CASES)
def test_folders_compute_what_the_plain_network_does(family, vae, tmp_path):
    content, windows, sampling = CASES[family]
    options = ["--attention-windows", *map(str, windows)] if windows else []
    pipe = command(vae, saved(content(), tmp_path), tmp_path / "out", *options)
    assert pipe.transformer.config.attention_pattern == "markov"
    assert pipe.transformer.config.attention_windows == windows
    assert {name: pipe.scheduler.config[name] for name in sampling} == sampling
    assert pipe.default_guidance_scale == sampling["guidance_scale"]
    state, mask, labels = var_state(), allowed(SIDES, windows), torch.tensor([1, 7])
    inputs = torch.randn(2, len(mask), CHANNELS, generator=torch.Generator().manual_seed(0))
    for given in (labels, torch.tensor([3, NUM_CLASSES])):
        logits = pipe.transformer(inputs, class_labels=given).sample
        assert logits.std() > 0.5
        torch.testing.assert_close(logits, plain_logits(state, inputs, given, mask), atol=1e-4, rtol=0)
    pipe.scheduler = ScaleScheduler.from_config(pipe.scheduler.config, temperature=0.0)
    for cfg in (0.0, 1.4):
        token_ids = pipe(labels.tolist(), guidance_scale=1 + cfg, output_type="latent").token_ids
        assert torch.equal(token_ids, plain_draw(state, pipe.vqvae, labels, mask, SIDES, cfg))
        assert len(token_ids.unique()) > 4


@torch.no_grad()
def test_published_models_see_windows_of_seven_from_the_ninth_scale_on(vae, tmp_path, caplog):
    state = var_state(PUBLISHED_SIDES, "markov", depth=1)
    pipe = convert_checkpoints(vae, saved({"mvar_wo_ddp": state}, tmp_path))
    assert pipe.transformer.config.attention_windows == [0] * 8 + [7, 7]
    assert not caplog.records
    inputs = torch.randn(1, 680, CHANNELS, generator=torch.Generator().manual_seed(0))
    mask = allowed(PUBLISHED_SIDES, [0] * 8 + [7, 7])
    expected = plain_logits(state, inputs, torch.tensor([4]), mask)
    logits = pipe.transformer(inputs, class_labels=torch.tensor([4])).sample
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_scales_of_no_published_model_are_said(vae, tmp_path, caplog):
    path = saved({"mvar_wo_ddp": var_state(pattern="markov")}, tmp_path)
    assert convert_checkpoints(vae, path).transformer.config.attention_windows == [0, 0, 0, 0]
    assert "`attention_windows` says otherwise" in caplog.text
    caplog.clear()
    assert convert_checkpoints(vae, path, attention_windows=WINDOWS).transformer.config.attention_windows == WINDOWS
    start = convert_checkpoints(vae, path, attention_pattern="causal").transformer.config
    assert (start.attention_pattern, start.attention_windows) == ("causal", None)
    assert not caplog.records
    for wrong, message in (([0, 0, 3, 4], r"`attention_windows\[3\]` must be 0 or an odd"), ([3], "a list of 4")):
        with pytest.raises(ValueError, match=f"^{message}|^`attention_windows` must be {message}"):
            convert_checkpoints(vae, path, attention_windows=wrong)
    with pytest.raises(ValueError, match="^`attention_windows` must be None with the attention pattern 'banded'"):
        convert_checkpoints(vae, path, "banded", attention_windows=WINDOWS)


def test_containers_and_tables_tell_the_family(vae, tmp_path):
    causal, markov = var_state(), var_state(pattern="markov")
    plain = convert_checkpoints(vae, saved(markov, tmp_path), family="mvar")
    trainer = {"config": {}, "mvar_wo_ddp": markov, "mvar_opt": {"state": {}}}
    for content in ({"mvar_wo_ddp": markov}, {"epoch": 1, "iter": 0, "trainer": trainer, "args": {"depth": 3}}):
        pipe = convert_checkpoints(vae, saved(content, tmp_path, "other.pth"))
        assert same_weights(pipe, plain)
        assert pipe.transformer.config.attention_windows == [0, 0, 0, 0]
    for content in (causal, {"trainer": {"var_wo_ddp": causal}}, {"trainer": {"var_wo_ddp": markov}}):
        config = convert_checkpoints(vae, saved(content, tmp_path, "other.pth")).transformer.config
        assert (config.attention_pattern, config.attention_windows) == ("causal", None)


@pytest.mark.parametrize("content", ["markov", "no table", "a table of another size", "a table that forbids nothing"])
def test_what_could_be_of_two_families_is_to_be_told(content, vae, tmp_path, capsys):
    state = var_state(pattern="markov" if content == "markov" else "causal")
    if content != "markov":
        del state["attn_bias_for_masking"]
    if content == "a table of another size":
        state["attn_bias_for_masking"] = torch.zeros(1, 1, 3, 3)
    elif content == "a table that forbids nothing":
        state["attn_bias_for_masking"] = torch.zeros(1, 1, 39, 39, dtype=torch.uint8)
    path = saved(state, tmp_path)
    with pytest.raises(SystemExit):
        main(["--vae", str(vae), "--transformer", str(path), "--output", str(tmp_path / "out")])
    message = capsys.readouterr().err.split("error: ")[1]
    assert f"`--transformer` must be an official checkpoint, got {path}." in message
    assert "those of VAR or MVAR" in message
    assert "`--family` must be one of ('var', 'mvar'), got None." in message
    assert not (tmp_path / "out").exists()
    patterns = [convert_checkpoints(vae, path, family=name).transformer.config for name in ("var", "mvar")]
    assert [config.attention_pattern for config in patterns] == ["causal", "markov"]


def test_families_that_do_not_exist_are_refused(vae, tmp_path):
    with pytest.raises(ValueError, match=r"^`family` must be one of \('var', 'mvar', 'hmar'\), got 'MVAR'"):
        convert_checkpoints(vae, saved(var_state(), tmp_path), family="MVAR")
    with pytest.raises(ValueError, match=r"must be an official one, but no key of it starts with base_blocks\."):
        convert_checkpoints(vae, saved(var_state(), tmp_path), family="hmar")
    with pytest.raises(ValueError, match=r"no key of it starts with blocks\. or base_blocks\., got \['x'\]"):
        convert_checkpoints(vae, saved({"x": torch.zeros(2)}, tmp_path))


def test_faults_are_named_as_the_files_name_them(vae, tmp_path):
    state = hmar_state()
    del state["ns_blocks.1.ffn.fc1.bias"]
    state["word_embed_bias"] = torch.zeros(7)
    state["ns_head.weight"][0, 0] = torch.nan
    state["ns_blocks.0.attn.k_bias"] = torch.zeros(WIDTH)
    with pytest.raises(ValueError, match="must be checkpoints of the official layout, but") as caught:
        convert_checkpoints(vae, saved(state, tmp_path))
    faults = [line.split("model.pth: ")[1] for line in str(caught.value).splitlines()[1:]]
    assert faults == [
        "ns_blocks.1.ffn.fc1.bias is missing",
        "ns_blocks.0.attn.k_bias is unknown",
        f"word_embed_bias must have shape ({WIDTH},), got (7,)",
        "ns_head.weight is not finite",
    ]


@pytest.mark.parametrize("num_shared", [1, 2])
def test_the_masked_half_is_left_out_and_that_is_said(num_shared, vae, tmp_path, capsys):
    state = hmar_state(num_shared)
    with_half = command(vae, saved(state, tmp_path), tmp_path / "with")
    said = capsys.readouterr().out
    assert "HMAR" in said
    assert "is left out" in said
    assert "is left out" in re.sub(r"\s+", " ", (tmp_path / "with" / "README.md").read_text())
    state = {key: value for key, value in state.items() if not key.startswith("mask_")}
    assert same_weights(with_half, convert_checkpoints(vae, saved(state, tmp_path)))


@pytest.mark.parametrize("name", FAMILIES)
def test_cards_have_settings_licence_and_citation(name, vae, tmp_path, capsys):
    family, state = FAMILIES[name], hmar_state() if name == "hmar" else var_state()
    command(vae, saved(state, tmp_path, "weights.pth"), tmp_path / "my model", "--family", name)
    text = (tmp_path / "my model" / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.license == ("other" if name == "hmar" else "mit")
    assert {"srdd", "diffusers", name} <= set(card.data.tags)
    assert card.data.library_name == "srdd"
    for expected in (family.citation, family.source, "`weights.pth`", '.from_pretrained("my model")'):
        assert expected in text
    for settings in family.of_depth(DEPTH):
        assert f"| `{settings.name}` | {settings.guidance_scale} | {settings.top_k} | {settings.top_p} |" in text
    assert f"None are published for {DEPTH} blocks" in text
    assert max(len(line) for line in text.splitlines()) < 120


def test_a_start_for_fine_tuning_is_called_one(vae, tmp_path, capsys):
    command(vae, saved(var_state(), tmp_path), tmp_path / "out", "--attention-pattern", "markov")
    text = re.sub(r"\s+", " ", (tmp_path / "out" / "README.md").read_text())
    assert "The authors' model attends by 'causal': this one is a start for fine-tuning." in text


@pytest.mark.parametrize(
    ("family", "file", "depth", "expected"),
    [
        ("var", "var_d30.pth", 30, (2.5, 900, 0.96)),
        ("mvar", "mvar-d16.pth", 16, (3.7, 1200, 0.99)),
        ("mvar", "mvar-finetune-d16.pth", 16, (3.0, 1200, 0.99)),
        ("mvar", "renamed.pth", 16, (3.7, 1200, 0.99)),
        ("mvar", "mvar-d16.pth", 20, (2.5, 900, 0.96)),
        ("mvar", "mine.pth", 100, (2.4, 900, 0.96)),
        ("hmar", "hmar-d20.pth", 20, (2.9, 950, 0.99)),
    ],
)
def test_settings_are_those_of_the_depth_and_the_file(family, file, depth, expected):
    settings = FAMILIES[family].settings(depth, Path(file))
    assert (settings.guidance_scale, settings.top_k, settings.top_p) == expected
