"""What the sampling benchmarks run: our pipeline under several settings, and a reference with the same weights."""

import argparse
import contextlib
import copy
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from measuring import TimedCall

from srdd import MultiScaleVQModel, ScaleKVCache, ScaleScheduler, ScaleTransformer2DModel, SRDDPipeline
from srdd.conversion import convert_checkpoints
from srdd.pipelines.scale_sampling import GuidedTransformer
from srdd.scales import default_scale_sizes, split_scales
from srdd.training.light_decoder import light_tokenizer


Model = TypeVar("Model", bound=torch.nn.Module)

# VAR's published settings; its `cfg` is `guidance_scale - 1`.
GUIDANCE_SCALE, TOP_K, TOP_P = 2.5, 900, 0.96

REFERENCE = "reference"
PARTS = ("transformer", "sampling", "quantizer", "decoder")


@dataclass(frozen=True)
class Row:
    """
    A setting of our pipeline.

    Args:
        attention_pattern (`str`): The transformer's.
        kept (`tuple[int, ...]`, *optional*): The scales to visit, by index among ten; all by default.
        guidance_scale (`float`): 1 for a student of the guided distribution, which needs no second half.
        guidance_stop (`float`): As in [`ScaleScheduler`].
        linears (`str`, *optional*): The transformer's linear layers: its own choice by default, "torch" for torch's
            kernels, "int8" for torchao's int8 weights.
        dtype (`torch.dtype`, *optional*): Of weights, in place of `--dtype`.
        light_decoder (`bool`): Whether a decoder as `distill_decoder.py` makes it stands in for the tokenizer's.
        int8_decoder (`bool`): Whether the tokenizer's decoder multiplies int8.
        num_further_passes (`int`): Passes that draw all tokens of every scale again.
    """

    attention_pattern: str
    kept: tuple[int, ...] | None = None
    guidance_scale: float = GUIDANCE_SCALE
    guidance_stop: float = 1.0
    linears: str | None = None
    dtype: torch.dtype | None = None
    light_decoder: bool = False
    int8_decoder: bool = False
    num_further_passes: int = 0


ATTENTION_PATTERNS = {"causal": "causal", "sdd": "markov"}

# What a row's name may say after its pattern, and what that means.
ROW_OPTIONS = {
    "6": {"kept": (0, 2, 4, 6, 8, 9)},
    "5": {"kept": (0, 4, 6, 8, 9)},
    "unguided": {"guidance_scale": 1.0},
    "interval": {"guidance_stop": 0.8},
    "torch": {"linears": "torch"},
    "int8": {"linears": "int8"},
    "bf16": {"dtype": torch.bfloat16},
    "light": {"light_decoder": True},
    "int8vae": {"int8_decoder": True},
}


def row_of(name: str) -> Row:
    """
    The row of a name such as `"sdd-6-unguided"`.

    Raises:
        ValueError: If it is none.
    """
    pattern, *options = name.split("-")
    changes = [ROW_OPTIONS.get(option) for option in options]
    fields = [field for change in changes if change for field in change]
    if pattern not in ATTENTION_PATTERNS or None in changes or len(set(fields)) < len(fields):
        raise ValueError(
            f"Rows must be named {' or '.join(ATTENTION_PATTERNS)}, with any of {', '.join(ROW_OPTIONS)} after a '-'"
            f" each, and none twice, got {name!r}."
        )
    row = Row(ATTENTION_PATTERNS[pattern])
    for change in changes:
        row = replace(row, **change)
    return row


def row_name(text: str) -> str:
    """The name of a row, from the command line."""
    try:
        row_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


class Sampler(Protocol):
    """Draws images `(batch, 3, height, width)` in [0, 1]."""

    def __call__(self, labels: torch.LongTensor, greedy: bool = False) -> torch.Tensor: ...

    def timed_calls(self) -> list[TimedCall]: ...


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reference", type=Path, help="A checkout of the official VAR code, for the reference.")
    parser.add_argument("--depth", type=int, default=16, help="Width is 64 times this, 64 per head, as in VAR.")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument(
        "--rows",
        type=row_name,
        nargs="+",
        default=["causal", "sdd", "sdd-6"],
        help=f"{' or '.join(ATTENTION_PATTERNS)}, and after a '-' each any of {', '.join(ROW_OPTIONS)}; such as"
        " sdd-6-unguided-light.",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae_channels", type=int, default=160, help="Channels at the full resolution.")
    parser.add_argument("--codebook_size", type=int, default=4096)
    parser.add_argument("--output", type=Path, help="JSON file for all that was measured.")


def twin(model: Model) -> Model:
    """A model with the same parameters, not with equal ones, that can be changed while the other is not."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def with_linears(transformer: ScaleTransformer2DModel, linears: str | None) -> ScaleTransformer2DModel:
    """A transformer whose linear layers are those of [`Row`]; it shares what it can with the given one."""
    if linears is None:
        return transformer
    shared = twin(transformer)
    if linears == "torch":
        shared.disable_fast_linears()
    else:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(
            shared,
            Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
            filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and name != "proj_in",
        )
    return shared


def with_light_decoder(vqvae: MultiScaleVQModel) -> MultiScaleVQModel:
    """A tokenizer with a light decoder of random weights in the place of its own."""
    light = light_tokenizer(vqvae).eval()
    draw_weights(light.decoder)
    return light.to(vqvae.device, vqvae.dtype)


def with_int8_decoder(vqvae: MultiScaleVQModel) -> MultiScaleVQModel:
    """A tokenizer that decodes in int8, with bounds from random tokens; it shares parameters with the given one."""
    shared = twin(vqvae)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(vqvae.config.codebook_size, (1, vqvae.num_tokens), generator=generator)
    shared.enable_int8_decoding(shared.latent_states(token_ids)[-1])
    return shared


class PipelineSampler:
    """Our pipeline under a [`Row`]."""

    def __init__(self, pipe: SRDDPipeline, row: Row):
        transformer = with_linears(pipe.transformer, row.linears)
        vqvae = with_light_decoder(pipe.vqvae) if row.light_decoder else pipe.vqvae
        if row.dtype is not None:
            transformer, vqvae = copy.deepcopy(transformer).to(row.dtype), copy.deepcopy(vqvae).to(row.dtype)
        if row.int8_decoder:
            vqvae = with_int8_decoder(vqvae)
        pipe = SRDDPipeline(vqvae=vqvae, transformer=transformer, scheduler=pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.row = pipe, row
        sizes = pipe.transformer.config.scale_sizes
        if row.kept is not None and len(sizes) != 10:
            raise ValueError(f"`--rows` with fewer scales need ten to choose from, got {len(sizes)}.")
        scales = None if row.kept is None else [sizes[index] for index in row.kept]
        self.schedulers = {
            greedy: ScaleScheduler(
                scale_sizes=sizes,
                scales=scales,
                guidance_stop=row.guidance_stop,
                top_k=top_k,
                top_p=top_p,
                resampling_policy="simple" if row.num_further_passes else "none",
                num_resampling_passes=row.num_further_passes,
            )
            for greedy, top_k, top_p in ((False, TOP_K, TOP_P), (True, 1, 1.0))
        }
        self.token_ids: torch.LongTensor | None = None

    def __call__(self, labels: torch.LongTensor, greedy: bool = False) -> torch.Tensor:
        self.pipe.transformer.register_to_config(attention_pattern=self.row.attention_pattern)
        self.pipe.scheduler = self.schedulers[greedy]
        output = self.pipe(labels, guidance_scale=self.row.guidance_scale, output_type="pt")
        self.token_ids = output.token_ids
        return output.images

    def timed_calls(self) -> list[TimedCall]:
        scheduler, vqvae = self.schedulers[False], self.pipe.vqvae
        return [
            (self.pipe.transformer, "forward", "transformer"),
            (scheduler, "step", "sampling"),
            (scheduler, "scale_model_input", "quantizer"),
            (vqvae, "residual_map", "quantizer"),
            (vqvae, "decode", "decoder"),
        ]


class RecipeSampler:
    """
    VAR's recipe in our modules, for want of its code: a cache of all scales, both halves of the guidance everywhere,
    top-p by sorting the whole vocabulary, the whole batch decoded at once by diffusers' own code.
    """

    def __init__(self, pipe: SRDDPipeline):
        self.pipe = pipe
        self.scheduler = ScaleScheduler(scale_sizes=pipe.transformer.config.scale_sizes)

    @torch.no_grad()
    def __call__(self, labels: torch.LongTensor, greedy: bool = False) -> torch.Tensor:
        vqvae, transformer = self.pipe.vqvae, self.pipe.transformer
        transformer.register_to_config(attention_pattern="causal")
        cache, state, token_ids = ScaleKVCache(), self.pipe.prepare_latents(len(labels)), []
        guided = GuidedTransformer(transformer, labels)
        for timestep in self.scheduler.timesteps.tolist():
            hidden_states = self.scheduler.scale_model_input(state, timestep).to(transformer.dtype)
            weight = self.scheduler.guidance_weight(timestep, GUIDANCE_SCALE)
            logits, _ = guided(hidden_states, timestep, weight, cache, keep_unconditional=True)
            drawn = self.draw(logits.float(), 1 if greedy else TOP_K, 0.0 if greedy else TOP_P)
            token_ids.append(drawn)
            token_map = drawn.unflatten(1, self.scheduler.scale_size(timestep))
            state = state + vqvae.residual_map(token_map).float()
        self.token_ids = torch.cat(token_ids, dim=1)
        vqvae.disable_fast_decoding()
        pixels = vqvae.decode(state).sample.float()
        vqvae.enable_fast_decoding()
        return pixels.clamp(-1, 1) / 2 + 0.5

    @staticmethod
    def draw(logits: torch.Tensor, top_k: int, top_p: float) -> torch.LongTensor:
        """Tokens among the `top_k` best, of which the worst that make up `1 - top_p` are left out."""
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
        if top_p:
            ascending, order = logits.sort(dim=-1)
            unlikely = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
            logits = logits.masked_fill(torch.zeros_like(unlikely).scatter(-1, order, unlikely), -torch.inf)
        return logits.softmax(dim=-1).flatten(0, 1).multinomial(1).view(logits.shape[:2])

    def timed_calls(self) -> list[TimedCall]:
        return [
            (self.pipe.transformer, "forward", "transformer"),
            (self, "draw", "sampling"),
            (self.scheduler, "scale_model_input", "quantizer"),
            (self.pipe.vqvae, "residual_map", "quantizer"),
            (self.pipe.vqvae, "decode", "decoder"),
        ]


@contextlib.contextmanager
def torch_restored() -> Iterator[None]:
    """The official code switches off the initialisation of torch's layers, and reports to stdout."""
    layers = [value for value in vars(torch.nn).values() if isinstance(value, type)]
    own = {layer: vars(layer)["reset_parameters"] for layer in layers if "reset_parameters" in vars(layer)}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for layer in layers:
            if layer in own:
                layer.reset_parameters = own[layer]
            elif "reset_parameters" in vars(layer):
                del layer.reset_parameters


class OfficialSampler:
    """The official code, as it is in a checkout; in half precision under autocast, as its demo does."""

    def __init__(self, args: argparse.Namespace):
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        torch.manual_seed(0)
        sys.path.insert(0, str(args.reference))
        with torch_restored():
            from models import build_vae_var
            from models import var as var_module

            self.vae, self.var = build_vae_var(
                device=args.device,
                patch_nums=tuple(height for height, _ in default_scale_sizes(args.image_size // 16)),
                V=args.codebook_size,
                ch=args.vae_channels,
                depth=args.depth,
            )
        sys.path.remove(str(args.reference))
        self.module = var_module
        for layer in self.vae.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        for model in (self.vae, self.var):
            draw_weights(model.eval())

    @torch.no_grad()
    def __call__(self, labels: torch.LongTensor, greedy: bool = False) -> torch.Tensor:
        looked_up = []
        handle = self.vae.quantize.embedding.register_forward_hook(lambda _, args, __: looked_up.append(args[0]))
        try:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                images = self.var.autoregressive_infer_cfg(
                    len(labels),
                    labels,
                    cfg=GUIDANCE_SCALE - 1,
                    top_k=1 if greedy else TOP_K,
                    top_p=0.0 if greedy else TOP_P,
                )
        finally:
            handle.remove()
        self.token_ids = torch.cat(looked_up, dim=1)
        return images

    @torch.no_grad()
    def markov_logits(self, token_ids: torch.LongTensor, labels: torch.LongTensor) -> torch.Tensor:
        """Guided logits of whole pyramids, in one forward under a block-diagonal mask."""
        sizes = [(side, side) for side in self.var.patch_nums]
        inputs = self.vae.quantize.idxBl_to_var_input([ids.flatten(1) for ids in split_scales(token_ids, sizes)])
        scales = self.var.lvl_1L[0]
        mask, dropout = self.var.attn_bias_for_masking, self.var.cond_drop_rate
        self.var.attn_bias_for_masking = torch.where(scales[:, None] == scales, 0.0, -torch.inf)[None, None]
        self.var.cond_drop_rate = 0.0
        try:
            conditional = self.var(labels, inputs)
            unconditional = self.var(torch.full_like(labels, self.var.num_classes), inputs)
        finally:
            self.var.attn_bias_for_masking, self.var.cond_drop_rate = mask, dropout
        weight = (GUIDANCE_SCALE - 1) * scales / (len(sizes) - 1)
        return conditional + weight[None, :, None] * (conditional - unconditional)

    def timed_calls(self) -> list[TimedCall]:
        return [
            *((block, "forward", "transformer") for block in self.var.blocks),
            (self.var, "get_logits", "transformer"),
            (self.module, "sample_with_top_k_top_p_", "sampling"),
            (self.vae.quantize, "get_next_autoregressive_input", "quantizer"),
            (self.vae, "fhat_to_img", "decoder"),
        ]


@torch.no_grad()
def draw_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Move all weights away from an initialisation that leaves biases and whole branches without effect."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        noise = torch.empty_like(parameter).normal_(std=0.5 * fan_in**-0.5, generator=generator)
        parameter.add_(noise)


def our_pipeline(args: argparse.Namespace) -> SRDDPipeline:
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
    pipe = SRDDPipeline(vqvae=vqvae, transformer=transformer, scheduler=ScaleScheduler(scale_sizes=scale_sizes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def convert(official: OfficialSampler) -> SRDDPipeline:
    """Our pipeline with the official models' weights."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("vae.pth", "var.pth")]
        for model, path in zip((official.vae, official.var), paths):
            torch.save(model.state_dict(), path)
        pipe = convert_checkpoints(*paths)
        for model in (pipe.vqvae, pipe.transformer):
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()  # out of the file
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(official.device)


def build_sampler(args: argparse.Namespace, name: str, num_further_passes: int = 0) -> Sampler:
    """The reference or a row, on random weights; only rows make further passes."""
    if name == REFERENCE and args.reference is not None:
        return OfficialSampler(args)
    pipe = our_pipeline(args)
    if args.dtype != "float32":
        pipe.to(getattr(torch, args.dtype))
    if name == REFERENCE:
        return RecipeSampler(pipe)
    return PipelineSampler(pipe, replace(row_of(name), num_further_passes=num_further_passes))
