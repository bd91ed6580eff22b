"""Variants of a pipeline, by names that benchmarks and ablations share."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from srdd import ScaleScheduler, SRDDPipeline
from srdd.evaluation.image_sources import PipelineImages
from srdd.evaluation.latent_diffusion import DrawingPipeline, LatentDiffusionPipeline


Model = TypeVar("Model", bound=torch.nn.Module)

# The scales that shorter schedules visit, by index, for a number of all scales and of those to visit.
VISITED_SCALES = {(10, 6): (0, 2, 4, 6, 8, 9), (10, 5): (0, 4, 6, 8, 9), (7, 6): (0, 1, 2, 3, 5, 6)}

# Images that show the bounds of int8 decoding, of a seed that no table has.
NUM_EXAMPLES, EXAMPLE_SEED = 64, 1000


@dataclass(frozen=True)
class PipelineVariant:
    """
    What is different about a pipeline of the same weights.

    Args:
        attention_pattern (`str`, *optional*): Of the transformer; its own by default.
        num_scales (`int`, *optional*): How many scales are visited (`VISITED_SCALES`); those of the scheduler by
            default.
        scheduler (`dict`): Values that replace those of the scheduler; latent diffusion has `num_inference_steps`
            alone, and of the others `guidance_scale`.
        guidance_scale (`float`, *optional*): As in [`SRDDPipeline`].
        linear_layers (`str`, *optional*): Of the transformer: `"torch"` for torch's kernels, `"int8"` for torchao's
            int8 weights in all but `proj_in`; what the transformer has by default.
        int8_decoding (`bool`, defaults to `False`): Whether the tokenizer decodes in int8, between bounds of images
            that the pipeline draws, of all classes alike.
        dtype (`str`, *optional*): Of all weights; what they have by default.
    """

    attention_pattern: str | None = None
    num_scales: int | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    guidance_scale: float | None = None
    linear_layers: str | None = None
    int8_decoding: bool = False
    dtype: str | None = None

    @torch.no_grad()
    def pipeline(self, pipe: DrawingPipeline, num_examples: int = NUM_EXAMPLES) -> DrawingPipeline:
        """
        The variant of a pipeline, which is left as it is. They share all parameters that are not changed.

        Args:
            pipe ([`SRDDPipeline`] or [`~srdd.evaluation.latent_diffusion.LatentDiffusionPipeline`]): The pipeline.
            num_examples (`int`, defaults to 64): How many images show the bounds of int8 decoding.

        Raises:
            ImportError: If int8 linear layers are asked for without torchao.
            ValueError: If a value does not fit the pipeline.
        """
        if isinstance(pipe, LatentDiffusionPipeline):
            return self._latent_diffusion(pipe)
        transformer, vqvae = sharing_parameters(pipe.transformer), pipe.vqvae
        if self.dtype is not None:
            transformer, vqvae = (copy.deepcopy(each).to(getattr(torch, self.dtype)) for each in (transformer, vqvae))
        if self.attention_pattern is not None:
            transformer.register_to_config(attention_pattern=self.attention_pattern)
            if self.attention_pattern != "markov" and "attention_windows" in transformer.config:
                transformer.register_to_config(attention_windows=None)
        if self.linear_layers == "torch":
            transformer.disable_fast_linears()
        elif self.linear_layers == "int8":
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(
                transformer,
                Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
                filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and name != "proj_in",
            )
        scheduler = ScaleScheduler.from_config(pipe.scheduler.config, **self._scheduler_values(pipe))
        changed = SRDDPipeline(
            **{**pipe.components, "vqvae": vqvae, "transformer": transformer, "scheduler": scheduler}
        )
        changed.set_progress_bar_config(disable=True)
        if self.int8_decoding:
            examples = PipelineImages(changed, num_examples, self.guidance_scale, EXAMPLE_SEED)
            latents = examples.draw(range(num_examples), "latent")
            changed.register_modules(vqvae=sharing_parameters(vqvae))
            changed.vqvae.enable_int8_decoding(latents)
        return changed

    def _latent_diffusion(self, pipe: LatentDiffusionPipeline) -> LatentDiffusionPipeline:
        if (
            set(self.scheduler) - {"num_inference_steps"}
            or replace(self, scheduler={}, guidance_scale=None) != NOTHING
        ):
            raise ValueError(
                "Variants of latent diffusion must change nothing but `guidance_scale` and `num_inference_steps`, got"
                f" {self}."
            )
        changed = LatentDiffusionPipeline(
            **pipe.components,
            id2label=pipe.config.id2label,
            num_inference_steps=self.scheduler.get("num_inference_steps", pipe.config.num_inference_steps),
        )
        changed.set_progress_bar_config(disable=True)
        return changed

    def _scheduler_values(self, pipe: SRDDPipeline) -> dict[str, Any]:
        if self.num_scales is None:
            return self.scheduler
        sizes = pipe.scheduler.config.scale_sizes
        visited = VISITED_SCALES.get((len(sizes), self.num_scales))
        if visited is None:
            raise ValueError(
                f"`num_scales` must be in {sorted(VISITED_SCALES)} together with the number of all scales, got"
                f" {(len(sizes), self.num_scales)}."
            )
        return {"scales": [sizes[index] for index in visited], **self.scheduler}


NOTHING = PipelineVariant()

# What a name may say, and what that means.
VARIANT_WORDS: dict[str, dict[str, Any]] = {
    "causal": {"attention_pattern": "causal"},
    "banded": {"attention_pattern": "banded"},
    "sdd": {"attention_pattern": "markov"},
    "6": {"num_scales": 6},
    "5": {"num_scales": 5},
    "unguided": {"guidance_scale": 1.0},
    "interval": {"scheduler": {"guidance_stop": 0.8}},
    "torch": {"linear_layers": "torch"},
    "int8": {"linear_layers": "int8"},
    "int8vae": {"int8_decoding": True},
    "bf16": {"dtype": "bfloat16"},
}


def variant_of(name: str) -> PipelineVariant:
    """
    The variant of a name.

    Args:
        name (`str`): Words of `VARIANT_WORDS` with a `-` between them, such as `"sdd-6-unguided"`; `""` changes
            nothing.

    Raises:
        ValueError: If a word is unknown, or two say different things of the same.
    """
    variant, said = NOTHING, []
    for word in name.split("-") if name else ():
        changes = VARIANT_WORDS.get(word)
        if changes is None or set(changes) & set(said):
            raise ValueError(
                f"Variants must be named by words of {', '.join(VARIANT_WORDS)}, with a '-' between them and no two"
                f" about the same, got {name!r}."
            )
        variant, said = replace(variant, **changes), [*said, *changes]
    return variant


def sharing_parameters(model: Model) -> Model:
    """A copy of a model with the same parameters, not with equal ones, that can be changed while the other is not."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
