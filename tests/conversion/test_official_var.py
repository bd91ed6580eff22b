"""
Official checkpoints against what the official code computes from them; `fixtures/README.md` says how it was run.

The fixtures hold keys, shapes and outputs. The weights are drawn here, by [`official_tensor`], as they were there.
"""

import json
import math
import os
import time
import zipfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from arguments import seeded
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from training.launching import run_module

from srdd import ScaleScheduler, SRDDPipeline
from srdd.conversion import convert_checkpoints, imagenet_class_names
from srdd.conversion.__main__ import main
from srdd.conversion.official_config import transformer_scale_sizes
from srdd.models.quantizer_multiscale import MultiScaleQuantizer


FIXTURES = Path(__file__).parent / "fixtures"
CASES = ("per_block_adaln_l2_norm", "shared_adaln_no_norm")
SMALL, OTHER = CASES[1], CASES[0]


def official_tensor(key: str, shape: list[int], seed: int, scale_sizes: list[int]) -> torch.Tensor:
    """A tensor of a random official checkpoint. numpy promises that `RandomState` never changes its stream."""
    if key == "lvl_1L":
        return torch.cat([torch.full((1, side**2), scale) for scale, side in enumerate(scale_sizes)], dim=1)
    if key == "attn_bias_for_masking":
        scale_ids = official_tensor("lvl_1L", [], seed, scale_sizes)
        return torch.where(scale_ids.mT >= scale_ids, 0.0, -torch.inf)[None, None].reshape(shape)
    if key.endswith(("zero_k_bias", "ema_vocab_hit_SV")):
        return torch.zeros(shape)
    random = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    values = torch.from_numpy(random.standard_normal(shape).astype(np.float32))
    if key.endswith(".scale_mul_1H11"):
        values = math.log(4) + 0.2 * values
        values[0, 0] = 5.0  # Above the official maximum, log(100).
        return values
    if len(shape) == 1:
        is_gain = "norm" in key and key.endswith(".weight")
        return float(is_gain) + 0.1 * values
    if key.startswith(("class_emb", "pos_", "lvl_embed")):
        return values
    gain = {"head.weight": 3.0, "quantize.embedding.weight": 0.5}.get(key, 1.0)
    return values * gain / math.sqrt(math.prod(shape[1:]))


@cache
def case_facts(case: str) -> dict:
    return json.loads((FIXTURES / f"{case}.json").read_text())


@cache
def expected(case: str) -> dict[str, torch.Tensor]:
    """What the official code computes."""
    return load_file(FIXTURES / f"{case}.safetensors")


@cache
def drawn_state(case: str, model: str) -> dict[str, torch.Tensor]:
    facts = case_facts(case)
    seed, scale_sizes = facts["settings"]["seed"], facts["settings"]["scale_sizes"]
    return {key: official_tensor(key, shape, seed, scale_sizes) for key, shape in facts[f"{model}_shapes"].items()}


def official_state(case: str, model: str) -> dict[str, torch.Tensor]:
    return dict(drawn_state(case, model))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Paths of the tokenizer and transformer checkpoints by case."""
    folder = tmp_path_factory.mktemp("official")
    paths = {}
    for case in CASES:
        paths[case] = folder / f"{case}-vae.pth", folder / f"{case}-var.pth"
        torch.save(official_state(case, "tokenizer"), paths[case][0])
        torch.save(official_state(case, "transformer"), paths[case][1])
    return paths


def convert(paths, attention_pattern=None, **arguments) -> SRDDPipeline:
    pipeline = convert_checkpoints(*paths, attention_pattern=attention_pattern, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_equal_pipelines(left: SRDDPipeline, right: SRDDPipeline) -> None:
    for ours, theirs in ((left.vqvae, right.vqvae), (left.transformer, right.transformer)):
        configs = [{**json.loads(model.to_json_string()), "_name_or_path": None} for model in (ours, theirs)]
        assert configs[0] == configs[1]
        torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_tokenizer_agrees_with_the_official_code(case, checkpoints):
    vqvae, official = convert(checkpoints[case]).vqvae, expected(case)
    pixels = official["image"].float() / 127.5 - 1
    torch.testing.assert_close(vqvae.encode(pixels).latents, official["latents"], atol=1e-4, rtol=0)
    token_ids = vqvae.tokenize(pixels)
    assert torch.equal(token_ids, official["token_ids"])
    states = vqvae.latent_states(token_ids)
    torch.testing.assert_close(torch.stack(states), official["latent_states"], atol=1e-5, rtol=0)
    inputs = vqvae.teacher_forcing_inputs(token_ids)[:, 1:]
    torch.testing.assert_close(inputs, official["teacher_forcing_inputs"], atol=1e-5, rtol=0)
    reconstruction = vqvae.decode(states[-1][:1]).sample.clamp(-1, 1)
    torch.testing.assert_close(reconstruction, official["reconstruction"], atol=1e-3, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("attention_pattern", ["causal", "markov"])
@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_the_official_code(case, attention_pattern, checkpoints):
    pipeline, official = convert(checkpoints[case], attention_pattern), expected(case)
    inputs = pipeline.vqvae.teacher_forcing_inputs(official["token_ids"])
    for name, labels in (("logits", official["class_labels"]), ("null_logits", None)):
        logits = pipeline.transformer(inputs, class_labels=labels).sample
        torch.testing.assert_close(logits, official[f"{attention_pattern}.{name}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention_pattern", ["causal", "markov"])
@pytest.mark.parametrize("case", CASES)
def test_greedy_samples_agree_with_the_official_code(case, attention_pattern, checkpoints):
    pipeline, official = convert(checkpoints[case], attention_pattern), expected(case)
    pipeline.scheduler = ScaleScheduler.from_config(pipeline.scheduler.config, temperature=0.0)
    guidance_scale = case_facts(case)["settings"]["cfg"] + 1
    output = pipeline(official["class_labels"], guidance_scale=guidance_scale, output_type="latent")
    assert torch.equal(output.token_ids, official[f"{attention_pattern}.greedy_token_ids"])
    latents = official[f"{attention_pattern}.greedy_latents"]
    torch.testing.assert_close(output.images, latents, atol=1e-5, rtol=0)
    image = pipeline.decode_latents(output.images[:1], "pt")
    torch.testing.assert_close(image, official[f"{attention_pattern}.greedy_image"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_convs", [0, 1, 2, 3, 4, 5, 6, 7, 8, 10])
def test_every_scale_uses_the_official_residual_conv(num_convs):
    """0 is one for each scale. Many scales lie midway between two convolutions, where rounding decides."""
    table = json.loads((FIXTURES / "residual_convs.json").read_text())[str(num_convs)]
    for num_scales, official in table.items():
        scale_sizes = [[side, side] for side in range(1, int(num_scales) + 1)]
        quantizer = MultiScaleQuantizer(4, 4, scale_sizes, num_convs or int(num_scales))
        convs = list(quantizer.residual_convs)
        assert [convs.index(quantizer.residual_conv(size, scale_sizes[-1])) for size in scale_sizes] == official


@pytest.mark.parametrize("case", CASES)
def test_architecture_is_inferred(case, checkpoints):
    pipeline, settings = convert(checkpoints[case]), case_facts(case)["settings"]
    sides = [[side, side] for side in settings["scale_sizes"]]
    vqvae, transformer, scheduler = pipeline.vqvae.config, pipeline.transformer.config, pipeline.scheduler.config
    assert vqvae.scale_sizes == transformer.scale_sizes == scheduler.scale_sizes == sides
    assert vqvae.sample_size == 16 * settings["scale_sizes"][-1]
    assert list(vqvae.block_out_channels) == [32, 32, 64, 64, 128]
    assert vqvae.num_residual_convs == (settings["share_quant_resi"] or len(sides))
    assert vqvae.codebook_size == transformer.codebook_size == settings["codebook_size"]
    assert vqvae.latent_channels == transformer.latent_channels == settings["latent_channels"]
    assert transformer.num_layers == settings["depth"]
    assert transformer.num_attention_heads == settings["num_heads"]
    assert transformer.attention_head_dim == settings["embed_dim"] // settings["num_heads"]
    assert transformer.mlp_ratio == settings["mlp_ratio"]
    assert transformer.num_classes == settings["num_classes"]
    assert transformer.qk_norm == settings["attn_l2_norm"]
    assert transformer.shared_adaln == settings["shared_aln"]
    assert transformer.attention_pattern == "causal"
    assert (scheduler.top_k, scheduler.top_p, scheduler.guidance_schedule) == (900, 0.96, "linear")


@pytest.mark.parametrize(("num_tokens", "last"), [(680, 16), (2240, 32)])
def test_scales_of_published_models_need_no_table(num_tokens, last):
    state = {"pos_1LC": torch.empty(1, num_tokens, 1), "lvl_embed.weight": torch.empty(10, 1)}
    sides = transformer_scale_sizes(state)
    assert (sides[-1], sum(side**2 for side in sides)) == (last, num_tokens)
    with pytest.raises(ValueError, match="those of a published model.*10 scales and 681 tokens"):
        transformer_scale_sizes({**state, "pos_1LC": torch.empty(1, 681, 1)})


def test_scale_table_must_hold_square_scales():
    with pytest.raises(ValueError, match=r"`lvl_1L` must give every scale a square number of tokens, got \[1, 3\]"):
        transformer_scale_sizes({"lvl_1L": torch.tensor([[0, 1, 1, 1]])})


def test_one_residual_conv_shared_by_all_scales(tmp_path, checkpoints):
    state = official_state(OTHER, "tokenizer")
    convs = {key: state.pop(key) for key in list(state) if "quant_resi" in key}
    for name in ("weight", "bias"):
        state[f"quantize.quant_resi.qresi.{name}"] = convs[f"quantize.quant_resi.qresi_ls.2.{name}"]
    torch.save(state, tmp_path / "vae.pth")
    vqvae = convert((tmp_path / "vae.pth", checkpoints[OTHER][1])).vqvae
    (conv,) = vqvae.quantize.residual_convs
    assert torch.equal(conv.weight, convs["quantize.quant_resi.qresi_ls.2.weight"])


def test_training_checkpoints_and_safetensors_give_the_same_pipeline(tmp_path, checkpoints):
    vae, transformer = official_state(SMALL, "tokenizer"), official_state(SMALL, "transformer")
    trainer = {"config": {"prog_it": 0}, "var_wo_ddp": transformer, "vae_local": vae, "var_opt": {"state": {}}}
    training = tmp_path / "ar-ckpt-last.pth"
    torch.save({"epoch": 1, "iter": 0, "trainer": trainer, "args": {"depth": 3}}, training)
    files = tmp_path / "vae.safetensors", tmp_path / "var.safetensors"
    save_file(vae, files[0])
    save_file({key: tensor for key, tensor in transformer.items() if key != "attn_bias_for_masking"}, files[1])
    plain = convert(checkpoints[SMALL])
    assert_equal_pipelines(convert((training, training)), plain)
    assert_equal_pipelines(convert(files, family="var"), plain)


def test_folder_loads_back(tmp_path, checkpoints):
    pipeline = convert(checkpoints[SMALL], "markov")
    pipeline.save_pretrained(tmp_path)
    loaded = SRDDPipeline.from_pretrained(tmp_path)
    assert_equal_pipelines(loaded, pipeline)
    assert loaded.scheduler.to_json_string() == pipeline.scheduler.to_json_string()
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"][0] == "srdd"


def test_dtype_is_the_checkpoints_or_the_callers(tmp_path, checkpoints):
    half = tmp_path / "var.pth"
    state = official_state(SMALL, "transformer")
    torch.save({key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}, half)
    kept = convert((checkpoints[SMALL][0], half))
    assert {parameter.dtype for parameter in kept.vqvae.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in kept.transformer.parameters()} == {torch.float16}
    cast = convert(checkpoints[SMALL], dtype=torch.bfloat16)
    for model in (cast.vqvae, cast.transformer):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert cast(3, generator=torch.Generator().manual_seed(0), output_type="pt").images.isfinite().all()


def test_models_of_1000_classes_get_imagenets_names(tmp_path, checkpoints):
    state = official_state(SMALL, "transformer")
    state["class_emb.weight"] = torch.zeros(1001, state["class_emb.weight"].shape[1])
    torch.save(state, tmp_path / "var.pth")
    pipeline = convert((checkpoints[SMALL][0], tmp_path / "var.pth"))
    assert pipeline.id2label == imagenet_class_names()
    assert pipeline.id2label[0] == "tench, Tinca tinca"
    assert pipeline.get_label_ids(["goldfish", "golden retriever", "toilet paper"]) == [1, 207, 999]
    assert convert(checkpoints[SMALL]).id2label == {}


@pytest.fixture
def broken_checkpoints(tmp_path):
    """Two files with six faults."""
    vae, transformer = official_state(SMALL, "tokenizer"), official_state(SMALL, "transformer")
    vae["encoder.extra.weight"] = torch.zeros(2)
    del vae["decoder.up.1.block.2.norm1.bias"]
    vae["encoder.mid.attn_1.qkv.weight"] = torch.zeros(3, 128, 1, 1)
    transformer["blocks.1.ada_lin.1.bias"] = torch.zeros(288)
    del transformer["class_emb.weight"]
    transformer["word_embed.weight"] = torch.zeros(48, 9)
    torch.save(vae, tmp_path / "vae.pth")
    torch.save(transformer, tmp_path / "var.pth")
    return tmp_path / "vae.pth", tmp_path / "var.pth"


FAULTS = (
    "vae.pth: decoder.up.1.block.2.norm1.bias is missing",
    "vae.pth: encoder.extra.weight is unknown",
    "vae.pth: encoder.mid.attn_1.qkv.weight must have shape (384, 128, 1, 1), got (3, 128, 1, 1)",
    "var.pth: class_emb.weight is missing",
    "var.pth: blocks.1.ada_lin.1.bias is unknown",
    "var.pth: word_embed.weight must have shape (48, 8), got (48, 9)",
)


def test_one_error_names_all_faults(broken_checkpoints):
    with pytest.raises(ValueError, match="official layout") as caught:
        convert(broken_checkpoints)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == len(FAULTS)
    assert all(line.endswith(fault) for line, fault in zip(lines, FAULTS))


def test_error_names_the_faults_of_both_models_in_one_file(tmp_path, broken_checkpoints):
    vae, transformer = map(torch.load, broken_checkpoints)
    training = tmp_path / "training.pth"
    torch.save({"trainer": {"vae_local": vae, "var_wo_ddp": transformer}}, training)
    with pytest.raises(ValueError, match="official layout") as caught:
        convert((training, training))
    assert all(fault.split(": ", 1)[1] in str(caught.value) for fault in FAULTS)


def test_swapped_files_and_other_files_are_refused(tmp_path, checkpoints):
    with pytest.raises(ValueError, match="tokenizer must be an official one.*encoder.down.0.block"):
        convert((checkpoints[SMALL][1], checkpoints[SMALL][1]))
    with pytest.raises(ValueError, match=r"transformer must be an official one.*blocks\."):
        convert((checkpoints[SMALL][0], checkpoints[SMALL][0]))
    torch.save({"weights": [1, 2]}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth must hold a state dict, or a training checkpoint"):
        convert((tmp_path / "other.pth", checkpoints[SMALL][1]))


def test_tokenizer_and_transformer_must_belong_together(tmp_path, checkpoints):
    state = official_state(SMALL, "tokenizer")
    state["quantize.embedding.weight"] = torch.zeros(65, 8)
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"head.weight must have shape \(65, 48\), got \(64, 48\)"):
        convert((tmp_path / "vae.pth", checkpoints[SMALL][1]))


class Malicious:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_code_in_a_checkpoint_is_refused(tmp_path, checkpoints):
    state = official_state(SMALL, "transformer")
    torch.save({"trainer": {"var_wo_ddp": state}, "args": Malicious(tmp_path / "attacked")}, tmp_path / "var.pth")
    with pytest.raises(
        ValueError, match="var.pth must hold a state dict, .* an archive of something else, or of code"
    ):
        convert((checkpoints[SMALL][0], tmp_path / "var.pth"))
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("own_process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_command_writes_a_pipeline(own_process, tmp_path, checkpoints):
    vae, transformer = checkpoints[SMALL]
    arguments = ["--vae", str(vae), "--transformer", str(transformer), "--output", str(tmp_path)]
    arguments += ["--attention-pattern", "markov", "--dtype", "float16"]
    if own_process:
        assert run_module("srdd.conversion", *arguments) == 0
    else:
        main(arguments)
    loaded = SRDDPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    assert_equal_pipelines(loaded, convert((vae, transformer), "markov", dtype=torch.float16))


def test_command_reports_faults_and_writes_nothing(tmp_path, broken_checkpoints, capsys):
    vae, transformer = map(str, broken_checkpoints)
    message = refused_by_command(vae, transformer, tmp_path / "out", capsys)
    assert all(fault in message for fault in FAULTS)


def refused_by_command(vae: Path, transformer: Path, output: Path, capsys) -> str:
    """What the command says; it leaves nothing behind."""
    with pytest.raises(SystemExit) as caught:
        main(["--vae", str(vae), "--transformer", str(transformer), "--output", str(output)])
    assert caught.value.code == 2
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if output.name in path.name]
    return capsys.readouterr().err.split("error: ", 1)[1]


# Files that are no checkpoints, made of one that is, and what is said of them.
NO_CHECKPOINTS = {
    "empty": (lambda content: b"", "is an empty file"),
    "pointer": (
        lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "git-lfs pointer",
    ),
    "page": (lambda content: b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
    "text": (lambda content: b"Entry not found\n", "is a text"),
    "cut early": (lambda content: content[:300], "is something else, or cut"),
    "cut": (lambda content: content[: len(content) // 2], "is something else, or cut"),
    "cut late": (lambda content: content[:-10], "is something else, or cut"),
    "zeros": (lambda content: bytes(1000), "is something else, or cut"),
}


@pytest.mark.parametrize("became", NO_CHECKPOINTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_checkpoints(became, suffix, tmp_path, checkpoints, capsys):
    change, words = NO_CHECKPOINTS[became]
    good = checkpoints[SMALL]
    for place, (argument, model) in enumerate((("vae", "tokenizer"), ("transformer", "transformer"))):
        whole = good[place] if suffix == ".pth" else tmp_path / f"whole{suffix}"
        if suffix == ".safetensors":
            save_file(official_state(SMALL, model), whole)
        bad = tmp_path / f"bad{suffix}"
        bad.write_bytes(change(whole.read_bytes()))
        paths = [bad if index == place else path for index, path in enumerate(good)]
        with pytest.raises(
            ValueError, match=f"^`{argument}_path` .*bad{suffix} must hold a state dict, .*{words}"
        ) as caught:
            convert(paths)
        assert len(str(caught.value).splitlines()) == 1
        message = refused_by_command(*paths, tmp_path / "out", capsys)
        assert message.startswith(f"`--{argument}` {bad} must hold")


@pytest.mark.parametrize("what", ["missing", "folder"])
def test_paths_that_are_no_files(what, tmp_path, checkpoints, capsys):
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    message = refused_by_command(path, checkpoints[SMALL][1], tmp_path / "out", capsys)
    assert message.startswith(f"`--vae` must be a file, got {str(path)!r}")
    for wrong in (None, 3, b"x", ["a"]):
        with pytest.raises(ValueError, match="`transformer_path` must be a file, got"):
            convert_checkpoints(checkpoints[SMALL][0], wrong)


@pytest.mark.parametrize(
    "content", [{}, [], 3, {"a": 1}, {1: torch.zeros(2)}, torch.zeros(3), {"trainer": {}}, {"trainer": 1}]
)
def test_pickles_of_something_else(content, tmp_path, checkpoints):
    torch.save(content, tmp_path / "other.pth")
    for paths in ((tmp_path / "other.pth", checkpoints[SMALL][1]), (checkpoints[SMALL][0], tmp_path / "other.pth")):
        with pytest.raises(ValueError, match="other.pth must hold a state dict"):
            convert(paths)


def test_archives_without_a_pickle(tmp_path, checkpoints):
    with zipfile.ZipFile(tmp_path / "var.pth", "w") as archive:
        archive.writestr("archive/data/0", bytes(64))
    with pytest.raises(ValueError, match="var.pth must hold a state dict, .* an archive of something else"):
        convert((checkpoints[SMALL][0], tmp_path / "var.pth"))


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = torch.nan
    return tensor


STRANGE_TENSORS = {
    "nan": (with_nan, "head.weight is not finite"),
    "infinity": (lambda tensor: tensor / 0, "head.weight is not finite"),
    "int8": (
        lambda tensor: tensor.to(torch.int8),
        "head.weight must hold plain floating-point numbers, got torch.int8",
    ),
    "quantized": (
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        "quantized, sparse or repeated",
    ),
    "float8": (lambda tensor: tensor.to(torch.float8_e4m3fn), "quantized, sparse or repeated"),
    "sparse": (lambda tensor: tensor.to_sparse(), "quantized, sparse or repeated"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "head.weight must hold plain floating-point numbers"),
    "repeated": (lambda tensor: torch.zeros(1).expand(10**9, 10**6), "quantized, sparse or repeated"),
    "meta": (lambda tensor: tensor.to("meta"), "must hold plain floating-point numbers, got .* on meta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE_TENSORS)
def test_tensors_of_other_kinds(kind, tmp_path, checkpoints):
    change, words = STRANGE_TENSORS[kind]
    state = official_state(SMALL, "transformer")
    torch.save({**state, "head.weight": change(state["head.weight"])}, tmp_path / "var.pth")
    with pytest.raises(ValueError, match=f"(?s)transformer_path.*var.pth.*{words}"):
        convert((checkpoints[SMALL][0], tmp_path / "var.pth"))


def test_numbers_beyond_the_dtype_asked_for(tmp_path, checkpoints):
    state = official_state(SMALL, "transformer")
    torch.save({**state, "head.bias": state["head.bias"] + 1e6}, tmp_path / "var.pth")
    paths = checkpoints[SMALL][0], tmp_path / "var.pth"
    assert convert(paths).transformer.dtype == torch.float32
    with pytest.raises(ValueError, match="head.bias is not finite as torch.float16"):
        convert(paths, dtype=torch.float16)
    for wrong in ("float16", torch.int8, 16):
        with pytest.raises(ValueError, match="`dtype` must be a floating-point torch.dtype, got"):
            convert(paths, dtype=wrong)
    with pytest.raises(ValueError, match="`attention_pattern` must be one of"):
        convert(paths, "full")


HOSTILE = {
    "blocks": ("transformer", {f"blocks.{index}.x": torch.zeros(1) for index in range(2000)}),
    "a far block": ("transformer", {"blocks.999999999.attn.proj.bias": torch.zeros(1)}),
    "levels": ("tokenizer", {f"encoder.down.{index}.x": torch.zeros(1) for index in range(2000)}),
    "layers": ("tokenizer", {f"encoder.down.0.block.{index}.x": torch.zeros(1) for index in range(2000)}),
    "convs": ("tokenizer", {f"quantize.quant_resi.qresi_ls.{index}.x": torch.zeros(1) for index in range(2000)}),
    "unknown": ("transformer", {f"{index}": torch.zeros(1) for index in range(2000)}),
    "no width": ("transformer", {name: torch.zeros(1, 0, 0) for name in ("pos_1LC", "class_emb.weight")}),
    "far scales": ("transformer", {"lvl_1L": torch.tensor([[0, 10**12]])}),
    "negative scales": ("transformer", {"lvl_1L": torch.tensor([[-1, 0]])}),
    "no scales": ("transformer", {"lvl_1L": torch.zeros(1, 0, dtype=torch.long)}),
    "scales in float": ("transformer", {"lvl_1L": torch.tensor([[torch.nan, torch.inf]])}),
    "no heads": (
        "transformer",
        {f"blocks.{index}.attn.scale_mul_1H11": torch.zeros(1, 0, 1, 1) for index in range(9)},
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_sizes_take_no_time(name, tmp_path, checkpoints):
    model, added = HOSTILE[name]
    place = ("tokenizer", "transformer").index(model)
    torch.save({**official_state(SMALL, model), **added}, tmp_path / "hostile.pth")
    paths = [tmp_path / "hostile.pth" if index == place else path for index, path in enumerate(checkpoints[SMALL])]
    started = time.perf_counter()
    with pytest.raises(ValueError, match="hostile.pth") as caught:
        convert(paths)
    assert time.perf_counter() - started < 10
    assert len(str(caught.value)) < 20_000


def test_output_is_a_new_or_an_empty_folder(tmp_path, checkpoints, capsys):
    arguments = ["--vae", str(checkpoints[SMALL][0]), "--transformer", str(checkpoints[SMALL][1]), "--output"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, str(tmp_path / name)])
        assert caught.value.code == 2
        assert f"`--output` must be a new or an empty folder, got {tmp_path / name}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, str(tmp_path / "file" / "below")])
    assert "`--output` must be a folder that can be written" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    main([*arguments, str(tmp_path / "a" / "new" / "one")])
    assert [path.name for path in (tmp_path / "a" / "new").iterdir()] == ["one"]
    SRDDPipeline.from_pretrained(tmp_path / "a" / "new" / "one")


def test_a_command_that_fails_leaves_nothing(tmp_path, checkpoints, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ScaleScheduler, "save_pretrained", fail)
    message = refused_by_command(*checkpoints[SMALL], tmp_path / "out", capsys)
    assert "No space left on device" in message
    assert not list(tmp_path.iterdir())


# What may have happened to a tensor.
CHANGES = {
    "gone": lambda tensor: None,
    "renamed": lambda tensor: tensor,
    "flat": lambda tensor: tensor.flatten(),
    "one less": lambda tensor: tensor[:-1] if tensor.ndim else tensor.new_zeros(2),
    "empty": lambda tensor: tensor[:0] if tensor.ndim else tensor.new_zeros(0),
    "half": lambda tensor: tensor.half(),
    "integers": lambda tensor: tensor.long(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "NaN": lambda tensor: tensor.float().index_fill(0, torch.tensor(0), math.nan) if tensor.ndim else tensor,
    "infinite": lambda tensor: tensor.float() / 0,
    "an expanded number": lambda tensor: torch.zeros(()).expand(tensor.shape),
    "sparse": lambda tensor: tensor.to_sparse(),
    "text": str,
    "a list": lambda tensor: tensor.tolist(),
    "a pair": lambda tensor: (tensor, tensor),
}
KEYS = {model: sorted(case_facts(SMALL)[f"{model}_shapes"]) for model in ("tokenizer", "transformer")}
EDITS = st.sampled_from(["tokenizer", "transformer"]).flatmap(
    lambda model: st.tuples(
        st.just(model),
        st.dictionaries(st.sampled_from(KEYS[model]), st.sampled_from(sorted(CHANGES)), min_size=1, max_size=3),
    )
)


@seeded(100)
@given(EDITS)
def test_edited_checkpoints_convert_or_are_refused(tmp_path_factory, checkpoints, edits):
    model, changes = edits
    state = official_state(SMALL, model)
    for key, change in changes.items():
        changed = CHANGES[change](state.pop(key))
        if changed is not None:
            state[f"{key}.old" if change == "renamed" else key] = changed
    path = tmp_path_factory.getbasetemp() / "edited.pth"
    torch.save(state, path)
    vae, transformer = checkpoints[SMALL]
    try:
        pipe = convert((path, transformer) if model == "tokenizer" else (vae, path))
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
        return
    for part in (pipe.vqvae, pipe.transformer):
        assert all(tensor.isfinite().all() for tensor in part.state_dict().values())


@seeded(100)
@given(st.sampled_from([0, 1]), st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_checkpoints_convert_or_are_refused(tmp_path_factory, checkpoints, place, flips):
    content = bytearray(checkpoints[SMALL][place].read_bytes())
    for where, bits in flips:
        content[min(int(where * len(content)), len(content) - 1)] ^= bits
    path = tmp_path_factory.getbasetemp() / "flipped.pth"
    path.write_bytes(content)
    paths = list(checkpoints[SMALL])
    paths[place] = path
    try:
        pipe = convert(paths)
    except ValueError as error:
        assert "`" in str(error)  # noqa: PT017
        return
    for part in (pipe.vqvae, pipe.transformer):
        assert all(tensor.isfinite().all() for tensor in part.state_dict().values())
