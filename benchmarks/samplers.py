"""What the sampling benchmarks run: variants of a pipeline of VAR's shape."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measuring import TimedCall

from srdd import MultiScaleVQModel, ScaleScheduler, ScaleTransformer2DModel, SRDDPipeline
from srdd.evaluation.pipeline_variants import VARIANT_WORDS, PipelineVariant, sharing_parameters, variant_of
from srdd.scales import default_scale_sizes
from srdd.training.light_decoder import light_tokenizer


# VAR's published settings; its `cfg` is `guidance_scale - 1`.
GUIDANCE_SCALE, TOP_K, TOP_P = 2.5, 900, 0.96

REFERENCE = "reference"
COMPONENTS = ("transformer", "sampling", "quantizer", "decoder")

# In the name of a row, beside the words of a variant: a decoder as `distill_decoder.py` makes it, with random weights;
# no CUDA graphs; fused projections of queries, keys and values; compiled blocks and a compiled decoder. The last three
# change how images are drawn, not which.
LIGHT, EAGER, FUSED, COMPILED = OWN_WORDS = ("light", "eager", "fused", "compiled")

# Rows, batch sizes and depths of one process share torch's limit of how often it compiles a layer, 8 by default.
MOST_COMPILATIONS = 64


def add_model_arguments(parser: argparse.ArgumentParser, reference: bool = True) -> None:
    if reference:
        parser.add_argument(
            "--reference", type=Path, help="A checkout of the official VAR code, for a row of its own."
        )
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument(
        "--rows",
        type=row_name,
        nargs="+",
        default=["causal", "sdd", "sdd-6"],
        help=f"Any of {', '.join([*VARIANT_WORDS, *OWN_WORDS])}, with a '-' between them, such as sdd-6-compiled.",
    )
    parser.add_argument("--compile_backend", default="inductor", help="Of `torch.compile`, for compiled rows.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae_channels", type=int, default=160, help="Channels at the full resolution.")
    parser.add_argument("--codebook_size", type=int, default=4096)
    parser.add_argument("--output", type=Path, help="JSON file for all that was measured.")


@dataclass(frozen=True)
class Row:
    """What the name of a row says: the variant, and which of `OWN_WORDS`."""

    variant: PipelineVariant
    words: frozenset[str]


def row_of(name: str) -> Row:
    """
    The row of a name.

    Raises:
        ValueError: If a word is unknown, or is there twice.
    """
    words = name.split("-")
    own = [word for word in words if word in OWN_WORDS]
    if len(set(own)) < len(own):
        raise ValueError(f"Rows must have every word once, got {name!r}.")
    return Row(variant_of("-".join(word for word in words if word not in OWN_WORDS)), frozenset(own))


def row_name(text: str) -> str:
    """The name of a row, from the command line."""
    try:
        row_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


class PipelineSampler:
    """
    Draws images `(batch, 3, height, width)` in [0, 1].

    Args:
        pipe ([`SRDDPipeline`]): Draws them.
        guidance_scale (`float`, *optional*): As in [`SRDDPipeline`].
        uncompiled ([`PipelineSampler`], *optional*): The same before it was compiled, where it is.
    """

    def __init__(
        self,
        pipe: SRDDPipeline,
        guidance_scale: float | None = None,
        uncompiled: "PipelineSampler | None" = None,
    ):
        self.pipe, self.guidance_scale, self.uncompiled = pipe, guidance_scale, uncompiled
        self.num_classes = pipe.transformer.config.num_classes
        self.token_ids: torch.LongTensor | None = None

    def __call__(self, labels: torch.LongTensor) -> torch.Tensor:
        output = self.pipe(labels, guidance_scale=self.guidance_scale, output_type="pt")
        self.token_ids = output.token_ids
        return output.images

    def without_graphs(self) -> "PipelineSampler":
        """The same without CUDA graphs, within which no component can be timed."""
        pipe = SRDDPipeline(**self.pipe.components)
        pipe.set_progress_bar_config(disable=True)
        pipe.disable_cuda_graphs()
        return PipelineSampler(pipe, self.guidance_scale)

    def timed_calls(self) -> list[TimedCall]:
        scheduler, vqvae = self.pipe.scheduler, self.pipe.vqvae
        return [
            (self.pipe.transformer, "forward", "transformer"),
            (scheduler, "step", "sampling"),
            (scheduler, "scale_model_input", "quantizer"),
            (vqvae, "residual_map", "quantizer"),
            (vqvae, "decode", "decoder"),
        ]


def row_sampler(
    pipe: SRDDPipeline, name: str, num_further_passes: int = 0, compile_backend: str = "inductor"
) -> PipelineSampler:
    """A row of a pipeline, with so many passes that draw all tokens of every scale again."""
    row = row_of(name)
    variant = row.variant
    if LIGHT in row.words:
        light = light_tokenizer(pipe.vqvae).eval()
        draw_weights(light.decoder)
        pipe = SRDDPipeline(**{**pipe.components, "vqvae": light.to(pipe.device, pipe.vqvae.dtype)})
    if num_further_passes:
        passes = {"resampling_policy": "simple", "num_resampling_passes": num_further_passes}
        variant = replace(variant, scheduler={**variant.scheduler, **passes})
    sampler = PipelineSampler(variant.pipeline(pipe, num_examples=1), variant.guidance_scale)
    if FUSED in row.words:
        sampler.pipe.transformer.fuse_qkv_projections()  # the variant's own
    if COMPILED in row.words:
        sampler = PipelineSampler(compiled(sampler.pipe, compile_backend), variant.guidance_scale, uncompiled=sampler)
    if EAGER in row.words:
        sampler.pipe.disable_cuda_graphs()
    return sampler


def compiled(pipe: SRDDPipeline, backend: str) -> SRDDPipeline:
    """A pipeline of the same parameters whose blocks and decoder are compiled, as `docs/performance.md` has it."""
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, MOST_COMPILATIONS)
    transformer, vqvae = sharing_parameters(pipe.transformer), sharing_parameters(pipe.vqvae)
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=backend)
    vqvae.decoder.compile(fullgraph=True, backend=backend)
    made = SRDDPipeline(**{**pipe.components, "vqvae": vqvae, "transformer": transformer})
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def draw_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Move all weights away from an initialisation that leaves biases and whole branches without effect."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        noise = torch.empty_like(parameter).normal_(std=0.5 * fan_in**-0.5, generator=generator)
        parameter.add_(noise)


def random_pipeline(args: argparse.Namespace) -> SRDDPipeline:
    """A pipeline of VAR's shape with random weights."""
    scale_sizes = default_scale_sizes(args.image_size // 16)
    channels = [args.vae_channels * factor for factor in (1, 1, 2, 2, 4)]
    torch.manual_seed(0)
    with torch.device(args.device):
        vqvae = MultiScaleVQModel(
            block_out_channels=channels,
            codebook_size=args.codebook_size,
            scale_sizes=scale_sizes,
            sample_size=args.image_size,
        )
        transformer = ScaleTransformer2DModel(
            codebook_size=args.codebook_size,
            scale_sizes=scale_sizes,
            num_layers=args.depth,
            num_attention_heads=args.depth,
            attention_head_dim=64,
        )
    for model in (vqvae, transformer):
        draw_weights(model.eval())
    scheduler = ScaleScheduler(scale_sizes=scale_sizes, top_k=TOP_K, top_p=TOP_P)
    pipe = SRDDPipeline(vqvae=vqvae, transformer=transformer, scheduler=scheduler)
    return pipe if args.dtype == "float32" else pipe.to(getattr(torch, args.dtype))
