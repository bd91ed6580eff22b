"""
Families that build on VAR, against a plain version of their network on tiny random weights under the official keys.

Shape legend: B batch, N tokens, D width, H heads.
"""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard
from tiny_checkpoints import (
    CHANNELS,
    DEPTH,
    HEADS,
    NUM_CLASSES,
    SIDES,
    WIDTH,
    greedy_tokens,
    hmar_state,
    markov_var_state,
    saved,
    switti_state,
    tokenizer_state,
    var_state,
)

from srdd import ScaleScheduler, SRDDPipeline
from srdd.conversion import convert_checkpoints
from srdd.conversion.__main__ import main
from srdd.conversion.families import FAMILIES


WINDOWS = [0, 0, 3, 3]
PUBLISHED_SIDES = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]


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


def plain_logits(state, inputs, labels, mask) -> torch.Tensor:
    """VAR's training forward over the first scales, in one piece, from VAR's state dict."""
    linear = lambda x, name: F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])  # noqa: E731
    condition, num_tokens = state["class_emb.weight"][labels], inputs.shape[1]
    mask = mask[:num_tokens, :num_tokens]
    x = torch.cat([condition[:, None] + state["pos_start"], linear(inputs, "word_embed")[:, 1:]], dim=1)
    x = x + state["lvl_embed.weight"][state["lvl_1L"][:, :num_tokens]] + state["pos_1LC"][:, :num_tokens]
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
    """Greedy tokens, guided by a weight that grows over the scales."""
    halves = [lambda inputs, given=given: plain_logits(state, inputs, given, mask)
              for given in (labels, NUM_CLASSES + 0 * labels)]  # fmt: skip
    return greedy_tokens(halves, vqvae, len(labels), sides, [cfg * k / (len(sides) - 1) for k in range(len(sides))])


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vae.pth"
    torch.save(tokenizer_state(), path)
    return path


def command(vae, transformer, output, *options) -> SRDDPipeline:
    """What the command writes, as a user loads it."""
    main(["--vae", str(vae), "--transformer", str(transformer), "--output", str(output), *options])
    pipe = SRDDPipeline.from_pretrained(output)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_weights(left: SRDDPipeline, right: SRDDPipeline) -> bool:
    states = [pipe.transformer.state_dict() for pipe in (left, right)]
    return all(torch.equal(value, states[1][key]) for key, value in states[0].items())


# By family, those that are not VAR's.
STATES = {"hmar": hmar_state, "markov-var": markov_var_state, "switti": switti_state}

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
    with pytest.raises(ValueError, match=r"^`family` must be one of \('var', 'mvar', .*'switti'\), got 'MVAR'"):
        convert_checkpoints(vae, saved(var_state(), tmp_path), family="MVAR")
    with pytest.raises(ValueError, match=r"must be an official one, but no key of it starts with base_blocks\."):
        convert_checkpoints(vae, saved(var_state(), tmp_path), family="hmar")
    with pytest.raises(ValueError, match=r"no key of it starts with blocks\. or base_blocks\. or .*, got \['x'\]"):
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
    family, state = FAMILIES[name], STATES.get(name, var_state)()
    path, output = saved(state, tmp_path, "weights.pth"), tmp_path / "my model"
    main(["--vae", str(vae), "--transformer", str(path), "--output", str(output), "--family", name])
    text = (output / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.license == {"hmar": "other", "switti": "unknown"}.get(name, "mit")
    assert card.data.pipeline_tag == ("text-to-image" if name == "switti" else "unconditional-image-generation")
    assert {"srdd", "diffusers", name} <= set(card.data.tags)
    assert card.data.library_name == "srdd"
    for expected in (family.citation, family.source, "`weights.pth`", '.from_pretrained("my model"'):
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
        ("markov-var", "d16.pth", 16, (6.0, 900, 0.95)),
    ],
)
def test_settings_are_those_of_the_depth_and_the_file(family, file, depth, expected):
    settings = FAMILIES[family].settings(depth, PUBLISHED_SIDES, Path(file))
    assert (settings.guidance_scale, settings.top_k, settings.top_p) == expected


def test_the_table_of_published_settings_is_that_of_the_code():
    page = (Path(__file__).parents[2] / "docs" / "public_weights.md").read_text(encoding="utf-8")
    section = page.split("## Published settings\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| .*?`([\w-]+)`.*? \| ([\d.]+) \| (\d+) \| ([\d.]+) \| \S", section, flags=re.MULTILINE)
    published = [each for family in FAMILIES.values() for each in family.published]
    expected = {(each.name, each.guidance_scale, each.top_k, each.top_p) for each in published}
    assert {(name, float(guidance), int(top_k), float(top_p)) for name, guidance, top_k, top_p in rows} == expected
    assert len(rows) == len(published)
