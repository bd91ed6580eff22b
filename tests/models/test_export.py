"""`torch.export` of what a draw runs: one scale's transformer and the decoder, for any batch size."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from families import FAMILIES, TEXTS, Family
from tiny_models import SCALE_SIZES, tiny_vqvae
from torch.utils._pytree import tree_map

from srdd.acceleration import linear_layers
from srdd.area_means import WINDOWS, area_means
from srdd.models import MaskedScaleAttnProcessor, ScaleAttnProcessor
from srdd.models.attention_scale import DENSE_MASKS
from srdd.models.neighbourhoods import NEIGHBOURHOOD_MASKS
from srdd.pipelines.scale_pipeline import ScalePipeline
from srdd.scales import Scale
from srdd.schedulers.token_sampling import exponential_noise


FAMILY = {family.name: family for family in FAMILIES}
BATCH = torch.export.Dim("batch")


@pytest.fixture(autouse=True)
def kernels_of_torch(monkeypatch):
    """What graphs have: other CPUs would have oneDNN's linear layers to compare with."""
    monkeypatch.setattr(linear_layers, "MKL_IS_SLOW", False)


def needs_no_cache(family: Family) -> bool:
    transformer = family.pipeline().transformer
    return transformer.config.attention_pattern in transformer.patterns_without_cache


NEED_NO_CACHE = [family for family in FAMILIES if needs_no_cache(family)]


class Transformer(torch.nn.Module):
    """What is exported of a transformer: its logits for scales that do not change."""

    def __init__(self, pipe: ScalePipeline, timestep: int | list[int], **arguments: Any):
        super().__init__()
        self.transformer, self.arguments = pipe.transformer, {"timestep": timestep, **arguments}

    def forward(self, hidden_states: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.transformer(hidden_states, **self.arguments, **conditions).sample


class GuidedTransformer(Transformer):
    def forward(self, hidden_states: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = conditions["class_labels"]
        both = torch.cat([labels, torch.full_like(labels, self.transformer.config.num_classes)])
        return super().forward(hidden_states.repeat(2, 1, 1), {"class_labels": both})


class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.vqvae = tiny_vqvae()

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.vqvae.decode(latents).sample


class ScaleStep(torch.nn.Module):
    """All that happens at a scale, as docs/export.md has it."""

    def __init__(self, pipe: ScalePipeline, scale: Scale):
        super().__init__()
        self.pipe, self.transformer, self.vqvae, self.scale = pipe, pipe.transformer, pipe.vqvae, scale

    def forward(self, latents: torch.Tensor, class_labels: torch.LongTensor, noise: torch.Tensor) -> torch.Tensor:
        hidden_states = self.pipe.scheduler.scale_model_input(latents, self.scale.timestep)
        logits = self.transformer(hidden_states, self.scale.timestep, class_labels).sample
        token_map = (logits.softmax(-1) / noise).argmax(-1).unflatten(1, self.scale.size)
        return latents + self.vqvae.residual_map(token_map)


class AreaMeans(torch.nn.Module):
    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return area_means(maps, (3, 3))


def forget() -> None:
    """Let all be made anew that is kept, by what is exported next."""
    for kept in (DENSE_MASKS, NEIGHBOURHOOD_MASKS, WINDOWS):
        kept.clear()


def inputs_of(family: Family, pipe: ScalePipeline, num_tokens: int, batch_size: int) -> tuple:
    told = [TEXTS[number] for number in range(batch_size)] if family.draws_from_texts else [*range(batch_size)]
    encode = pipe.encode_conditions if family.draws_from_texts else pipe.encode_class_labels
    hidden_states = torch.randn(batch_size, num_tokens, pipe.vqvae.config.latent_channels)
    return hidden_states, encode(told).conditional


def program_of(module: torch.nn.Module, inputs: tuple) -> torch.export.ExportedProgram:
    """The graph of a module; the first dimension of all its inputs is the batch's."""
    return torch.export.export(module, inputs, dynamic_shapes=tree_map(lambda _: {0: BATCH}, inputs))


def exported(module: torch.nn.Module, inputs: tuple) -> torch.nn.Module:
    return program_of(module, inputs).module()


@pytest.mark.parametrize("family", NEED_NO_CACHE, ids=lambda family: family.name)
@torch.no_grad()
def test_a_scale_is_a_graph_for_any_batch(family):
    pipe = family.pipeline()
    module, num_tokens = Transformer(pipe, 0), SCALE_SIZES[-1] ** 2
    graph = exported(module, inputs_of(family, pipe, num_tokens, 3))
    for batch_size in (1, 4):
        inputs = inputs_of(family, pipe, num_tokens, batch_size)
        torch.testing.assert_close(graph(*inputs), module(*inputs), atol=1e-6, rtol=0)


@torch.no_grad()
def test_guidance_is_a_constant_of_a_graph():
    family = FAMILY["class markov"]
    pipe = family.pipeline()
    module = GuidedTransformer(pipe, 0, guidance_weight=1.5)
    graph = exported(module, inputs_of(family, pipe, 16, 3))
    for batch_size in (1, 4):
        inputs = inputs_of(family, pipe, 16, batch_size)
        torch.testing.assert_close(graph(*inputs), module(*inputs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["class causal", "class history"])
@torch.no_grad()
def test_scales_that_look_back_are_a_graph_with_those_before(name):
    family = FAMILY[name]
    pipe = family.pipeline()
    module = Transformer(pipe, [2, 1])
    graph = exported(module, inputs_of(family, pipe, 5, 3))
    inputs = inputs_of(family, pipe, 5, 1)
    torch.testing.assert_close(graph(*inputs), module(*inputs), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_decoder_is_a_graph_for_any_batch():
    module, latents = Decoder(), torch.randn(7, 8, 4, 4)
    graph = exported(module, (latents[:3],))
    for batch_size in (1, 7):
        torch.testing.assert_close(graph(latents[:batch_size]), module(latents[:batch_size]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("processor", [ScaleAttnProcessor, MaskedScaleAttnProcessor])
@torch.no_grad()
def test_an_export_leaves_nothing_for_later_calls(processor):
    forget()
    family = FAMILY["class windows"]
    pipe = family.new_pipeline()
    pipe.transformer.set_attn_processor(processor())
    inputs, maps = inputs_of(family, pipe, 21, 2), torch.randn(2, 8, 4, 4)
    graph = exported(Transformer(pipe, [2, 1, 0]), inputs)
    assert torch.equal(exported(AreaMeans(), (maps,))(maps), area_means(maps, (3, 3)))
    logits = pipe.transformer(inputs[0], **inputs[1]).sample
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(graph(*inputs), logits, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_draw_by_graphs_alone_is_the_pipelines():
    family = FAMILY["class windows"]
    pipe = family.new_pipeline()
    arguments = {"class_labels": [3, 1], "guidance_scale": 1.0, "output_type": "latent"}
    expected = pipe(generator=torch.Generator().manual_seed(0), **arguments).images
    forget()
    batch_size, codebook_size, generator = 2, pipe.vqvae.config.codebook_size, torch.Generator().manual_seed(0)
    state = torch.zeros(batch_size, 8, 4, 4)
    for scale in pipe.scheduler.visits:
        noise_shape = pipe.scheduler.noise_shape(scale, batch_size, codebook_size)
        noise = exponential_noise(noise_shape, generator, state.device)
        inputs = state, torch.tensor([3, 1]), noise
        step = exported(ScaleStep(pipe, scale), tuple(each.repeat_interleave(2, dim=0) for each in inputs))
        state = step(*inputs)
    torch.testing.assert_close(state, expected, atol=1e-5, rtol=0)
    assert torch.equal(pipe(generator=torch.Generator().manual_seed(0), **arguments).images, expected)


@torch.no_grad()
def test_graphs_are_files_that_need_no_srdd(tmp_path):
    module, latents = Decoder(), torch.randn(2, 8, 4, 4)
    torch.export.save(program_of(module, (latents,)), tmp_path / "decoder.pt2")
    torch.save(latents[:1], tmp_path / "latents.pt")
    script = """
import sys, torch
sys.modules["srdd"] = None  # to import it is an error
decode = torch.export.load("decoder.pt2").module()
torch.save(decode(torch.load("latents.pt")).detach(), "pixels.pt")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "pixels.pt"), module(latents[:1]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_onnx_has_the_same_numbers(tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    module, latents = Decoder(), torch.randn(2, 8, 4, 4)
    torch.export.save(program_of(module, (latents,)), tmp_path / "decoder.pt2")
    torch.onnx.export(torch.export.load(tmp_path / "decoder.pt2"), dynamo=True).save(tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    (pixels,) = session.run(None, {"latents": latents[:1].numpy()})
    torch.testing.assert_close(torch.from_numpy(pixels), module(latents[:1]), atol=1e-4, rtol=0)
