"""VAR's official code, as it is in a checkout, and our pipeline with its weights."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import TimedCall
from samplers import GUIDANCE_SCALE, TOP_K, TOP_P, draw_weights

from srdd import ScaleScheduler, SRDDPipeline
from srdd.conversion import convert_checkpoints
from srdd.scales import default_scale_sizes, split_scales


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

    uncompiled = None

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
        self.module, self.num_classes = var_module, self.var.num_classes
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

    def without_graphs(self) -> "OfficialSampler":
        """Itself: there are none."""
        return self

    def timed_calls(self) -> list[TimedCall]:
        return [
            *((block, "forward", "transformer") for block in self.var.blocks),
            (self.var, "get_logits", "transformer"),
            (self.module, "sample_with_top_k_top_p_", "sampling"),
            (self.vae.quantize, "get_next_autoregressive_input", "quantizer"),
            (self.vae, "fhat_to_img", "decoder"),
        ]


def convert(official: OfficialSampler) -> SRDDPipeline:
    """Our pipeline with the official models' weights."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("vae.pth", "var.pth")]
        for model, path in zip((official.vae, official.var), paths):
            torch.save(model.state_dict(), path)
        pipe = convert_checkpoints(*paths, family="var")
        for model in (pipe.vqvae, pipe.transformer):
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()  # out of the file
    pipe.scheduler = ScaleScheduler.from_config(pipe.scheduler.config, top_k=TOP_K, top_p=TOP_P)
    return pipe.to(official.device)
