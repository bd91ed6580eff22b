"""
Drawing, inpainting and enlarging as blocks of Modular Diffusers: encode, prepare, draw, decode. Every block does a
step of the pipelines with their own methods, so that a seed means the same picture.
"""

import copy
import os
from typing import Any

import PIL.Image
import torch
from diffusers import ComponentsManager, ModularPipeline
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines import (
    AutoPipelineBlocks,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from transformers import CLIPTextModel, CLIPTokenizer

from srdd.acceleration import CudaGraphs
from srdd.models import MultiScaleVQModel, ScaleTextTransformer2DModel, ScaleTransformer, ScaleTransformer2DModel
from srdd.pipelines.conditions import Conditions
from srdd.pipelines.inpaint_pipeline import InpaintPipeline
from srdd.pipelines.scale_pipeline import CallOptions, ClassPipeline, ScalePipeline
from srdd.pipelines.super_resolution_pipeline import SuperResolutionPipeline
from srdd.pipelines.text_pipeline import TextPipeline
from srdd.pipelines.windowed_canvas import draw_windows
from srdd.schedulers import ScaleScheduler


Result = tuple[ModularPipeline, PipelineState]

# Options of guiders that must stay off: logits of zero draw any token, and those of two scales differ in shape.
GUIDER_OPTIONS = {"zero_init_steps": 0, "adaptive_projected_guidance_momentum": None}


class ClassTasks(InpaintPipeline, SuperResolutionPipeline, ClassPipeline):
    """The methods of all pipelines that draw by class."""


class TextTasks(InpaintPipeline, SuperResolutionPipeline, TextPipeline):
    """The methods of all pipelines that draw from texts."""


def pipeline_of(components: ModularPipeline) -> ClassTasks | TextTasks:
    """
    What does the work of blocks, of their components.

    Raises:
        ValueError: If a component is not loaded, or the guider cannot do its work with logits alone.
    """
    missing = [name for name in ("vqvae", "transformer", "scheduler") if getattr(components, name, None) is None]
    if missing:
        raise ValueError(
            f"`{missing[0]}` must be loaded before blocks run, got None: call `load_components()`, or"
            " `update_components()` with your own. A repository whose `modular_model_index.json` names no other loads"
            " from a folder only: see `huggingface_hub.snapshot_download`."
        )
    tasks = TextTasks if "cross_attention_dim" in components.transformer.config else ClassTasks
    required, optional = tasks._get_signature_keys(tasks)
    pipe = tasks(**{name: getattr(components, name, None) for name in [*required, *optional]})
    pipe._guider = getattr(components, "guider", None)
    if pipe._guider is not None:
        check_guider(pipe._guider)
    return pipe


def check_guider(guider: BaseGuidance) -> None:
    """
    Raises:
        ValueError: If a guider changes the model, wants more than two predictions, or has an option that means nothing
            for scales and their logits.
    """
    name = type(guider).__name__
    joins_two = len(guider._input_predictions) == 2 and type(guider).prepare_models is BaseGuidance.prepare_models
    if not joins_two:
        raise ValueError(
            f"`guider` must join two predictions of one model, as `ClassifierFreeGuidance` does, got a {name}."
        )
    for option, allowed in GUIDER_OPTIONS.items():
        value = guider.config.get(option, allowed)
        if value != allowed:
            raise ValueError(f"`{option}` of a `guider` must be {allowed} here, got {value} of a {name}.")


def options_of(pipe: ScalePipeline, block_state: Any) -> CallOptions:
    """What every call may be told, once it is checked."""
    names = [each.name for each in OPTIONS]
    options = CallOptions(**{name: getattr(block_state, name) for name in names}, return_dict=True)
    pipe.check_inputs(*options)
    check_weight(pipe, options.guidance_scale)
    return options


def check_weight(pipe: ScalePipeline, guidance_scale: float | None) -> None:
    """Raise a `ValueError` if there is a guider and a weight as well."""
    if pipe._guider is not None and guidance_scale is not None:
        name = type(pipe._guider).__name__
        raise ValueError(
            f"`guidance_scale` must be None where a `guider` has its own, got {guidance_scale} and {name}."
        )


OPTIONS = [
    InputParam("guidance_scale", float, description="How strongly to guide, as in `SRDDPipeline`."),
    InputParam("num_images_per_prompt", int, 1, description="Results for each label or text, and image."),
    InputParam("generator", torch.Generator, description="The only source of randomness, or one for each result."),
    InputParam("output_type", str, "pil", description='"pil", "np", "pt" or "latent".'),
]
CONDITIONS = InputParam("conditions", Conditions, required=True, description="What to draw.")

# What a block that prepares gives to those that draw and decode.
PREPARED = [
    OutputParam("conditions", Conditions, "What to draw, one for each result."),
    OutputParam("known_tokens", description="What is known of the tokens, as `sample_scales` takes it, or None."),
    OutputParam("hole", description="What is drawn of given images, or None."),
    OutputParam("canvas", description="What images are enlarged on, or None."),
]


class ScaleBlock(ModularPipelineBlocks):
    """Base of the blocks: the components that all of them know."""

    _transformer: type = ScaleTransformer

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("vqvae", MultiScaleVQModel, "Turns images into tokens and back."),
            ComponentSpec("transformer", self._transformer, "Predicts the tokens of a scale."),
            ComponentSpec("scheduler", ScaleScheduler, "The scale schedule."),
            ComponentSpec("guider", BaseGuidance, "Guides in the place of `guidance_scale`, if there is one."),
        ]

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> Result:
        block_state = self.get_block_state(state)
        self.run(pipeline_of(components), block_state)
        self.set_block_state(state, block_state)
        return components, state

    def run(self, pipe: Any, block_state: Any) -> None:
        """Do the block's step: from the inputs in `block_state` to its outputs there."""
        raise NotImplementedError


class EncodeLabels(ScaleBlock):
    """Labels become conditions. It checks what later blocks are told, too, before any work is done."""

    description = "Says by class what to draw."
    _transformer = ScaleTransformer2DModel

    @property
    def inputs(self) -> list[InputParam]:
        about = "Classes by id or name, one or many; None draws without a class."
        return [InputParam("class_labels", int | str | list, description=about), *OPTIONS]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("conditions", Conditions, "What to draw.")]

    def run(self, pipe: ClassTasks, block_state: Any) -> None:
        options_of(pipe, block_state)
        block_state.conditions = pipe.encode_class_labels(block_state.class_labels)


class EncodePrompts(ScaleBlock):
    """Texts become conditions. It checks what later blocks are told, too, before any work is done."""

    description = "Says by texts, or their embeddings, what to draw."
    _transformer = ScaleTextTransformer2DModel

    @property
    def expected_components(self) -> list[ComponentSpec]:
        encoders = [ComponentSpec(name, CLIPTextModel) for name in ("text_encoder", "text_encoder_2")]
        tokenizers = [ComponentSpec(name, CLIPTokenizer) for name in ("tokenizer", "tokenizer_2")]
        return [*super().expected_components, *encoders, *tokenizers]

    @property
    def prompts(self) -> list[InputParam]:
        """The arguments of `encode_conditions`, in its order."""
        texts = ("prompt", "negative_prompt")
        embeds = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
        about = "As in `SRDDTextPipeline`."
        types = {**dict.fromkeys(texts, str | list), **dict.fromkeys((*embeds, *masks), torch.Tensor)}
        return [InputParam(name, type_hint, description=about) for name, type_hint in types.items()]

    @property
    def inputs(self) -> list[InputParam]:
        return [*self.prompts, *OPTIONS]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("conditions", Conditions, "What to draw.")]

    def run(self, pipe: TextTasks, block_state: Any) -> None:
        options_of(pipe, block_state)
        block_state.conditions = pipe.encode_conditions(*(getattr(block_state, each.name) for each in self.prompts))


class PrepareDrawing(ScaleBlock):
    """Nothing is known of the images."""

    description = "Prepares drawing of whole images."

    @property
    def inputs(self) -> list[InputParam]:
        return [CONDITIONS, *OPTIONS]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return PREPARED

    def run(self, pipe: Any, block_state: Any) -> None:
        count = options_of(pipe, block_state).num_images_per_prompt
        block_state.conditions = block_state.conditions.repeat_interleave(count)
        block_state.known_tokens = block_state.hole = block_state.canvas = None


class PrepareInpainting(PrepareDrawing):
    """What is outside of a mask is known."""

    description = "Prepares drawing of the masked part of images."

    @property
    def told(self) -> list[InputParam]:
        """The arguments of `prepare_hole`, in its order."""
        return [
            InputParam("image", PIL.Image.Image | list, required=True, description="Images of one size."),
            InputParam("mask_image", PIL.Image.Image | list, required=True, description="White is drawn."),
            InputParam("strength", float, 1.0, description="How much the masked part changes."),
            InputParam("padding_mask_crop", int, description="Work on the mask and so many pixels around it only."),
            InputParam("paste_known", bool, True, description="Lay the known pixels over the result."),
            InputParam("feather", int, 4, description="Pixels over which the result fades in."),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, *self.told]

    def run(self, pipe: Any, block_state: Any) -> None:
        count, conditions = options_of(pipe, block_state).num_images_per_prompt, block_state.conditions
        told = [getattr(block_state, each.name) for each in self.told]
        prepared = pipe.prepare_hole(lambda: conditions, *told, count)
        block_state.conditions, block_state.hole, block_state.known_tokens = prepared
        block_state.canvas = None


class PrepareEnlarging(PrepareDrawing):
    """The coarse scales of small images are known."""

    description = "Prepares enlarging of images."

    @property
    def told(self) -> list[InputParam]:
        """The arguments of `prepare_canvas`, in its order."""
        return [
            InputParam("image", PIL.Image.Image | list, required=True, description="Small images of one size."),
            InputParam("scale_factor", int, 4, description="How many times larger the result is."),
            InputParam("num_known_scales", int, description="How many scales the small image determines."),
            InputParam("consistent", bool, True, description="Whether the result made small is the given image."),
        ]

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, *self.told]

    def run(self, pipe: Any, block_state: Any) -> None:
        options, conditions = options_of(pipe, block_state), block_state.conditions
        told = [getattr(block_state, each.name) for each in self.told]
        counts = options.num_images_per_prompt, options.output_type
        block_state.conditions, block_state.canvas = pipe.prepare_canvas(lambda: conditions, *told, *counts)
        block_state.known_tokens = block_state.hole = None


class Prepare(AutoPipelineBlocks):
    """Inpainting with a mask, enlarging with an image alone, drawing without either."""

    description = "Inpaints with `mask_image`, enlarges with `image` alone, and draws without either."
    block_classes = [PrepareInpainting, PrepareEnlarging, PrepareDrawing]
    block_names = ["inpaint", "enlarge", "draw"]
    block_trigger_inputs = ["mask_image", "image", None]


class DrawScales(LoopSequentialPipelineBlocks):
    """
    The run over the scales. Blocks that are inserted run after every pass, with `i` and `t`, its index and timestep:
    they find "latents", "token_ids" and "guidance_scale" in the block state, and may change them for the scales to
    come, and set "interrupt".
    """

    description = "Draws scale by scale, coarse to fine; blocks inserted here run after every pass."

    def __init__(self):
        super().__init__()
        self._cuda_graphs = CudaGraphs()

    @property
    def loop_expected_components(self) -> list[ComponentSpec]:
        return ScaleBlock().expected_components

    @property
    def loop_inputs(self) -> list[InputParam]:
        prepared = [InputParam(each.name, description=each.description) for each in PREPARED[1:]]
        latents = InputParam("latents", torch.Tensor, description="Latent state to start from; zeros by default.")
        return [CONDITIONS, *OPTIONS, latents, *prepared]

    @property
    def loop_intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("latents", torch.Tensor, "The last latent state."),
            OutputParam("token_ids", torch.LongTensor, "The drawn pyramids."),
        ]

    @property
    def required_inputs(self) -> list[str]:
        """Those of diffusers' loops, which must have blocks."""
        return super().required_inputs if self.sub_blocks else self.loop_required_inputs

    @property
    def outputs(self) -> list[OutputParam]:
        """Of the loop, and of the blocks in it."""
        return self.intermediate_outputs

    @torch.no_grad()
    def __call__(self, components: ModularPipeline, state: PipelineState) -> Result:
        block_state, pipe = self.get_block_state(state), pipeline_of(components)
        pipe.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        pipe._cuda_graphs = self._cuda_graphs
        conditions, canvas, is_weighted = block_state.conditions, block_state.canvas, pipe._guider is None
        if canvas is not None and block_state.latents is not None:
            raise ValueError("`latents` must be left out where images are enlarged: every window starts anew.")

        def after_pass(pipe: ScalePipeline, index: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            block_state.latents, block_state.token_ids = tensors["latents"], tensors["token_ids"]
            block_state.interrupt = pipe.interrupt
            block_state.guidance_scale = pipe.guidance_scale if is_weighted else None
            self.loop_step(components, block_state, i=index, t=timestep)
            pipe._interrupt = block_state.interrupt
            if is_weighted:
                pipe._guidance_scale = block_state.guidance_scale
            else:
                check_weight(pipe, block_state.guidance_scale)
            return {"latents": block_state.latents, "token_ids": block_state.token_ids}

        callback, names = (after_pass, ["latents", "token_ids"]) if self.sub_blocks else (None, None)
        options = options_of(pipe, block_state)._replace(
            callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names
        )
        if canvas is not None:
            token_ids = draw_windows(pipe, canvas, conditions, canvas.known_tokens, **options.of_draw)
        else:
            told = {"latents": block_state.latents, "known_tokens": block_state.known_tokens, "decodes": False}
            block_state.latents, token_ids = pipe.draw(conditions, **options.of_draw, **told)
        block_state.token_ids, block_state.guidance_scale = token_ids, options.guidance_scale
        self.set_block_state(state, block_state)
        return components, state


class PreviewScales(ScaleBlock):
    """To be inserted into [`DrawScales`]: keeps the pictures after every pass, in "previews"."""

    description = "Decodes what is drawn so far."

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("previews", list, "Lists of pictures, one after every pass.")]

    def __call__(self, components: ModularPipeline, block_state: Any, i: int, t: int) -> tuple[ModularPipeline, Any]:
        pictures = pipeline_of(components).decode_latents(block_state.latents, "pil")
        block_state.previews = [*(block_state["previews"] or []), pictures]
        return components, block_state


class Decode(ScaleBlock):
    """Latent states become pictures, and these a part of those that were given."""

    description = "Makes the images."

    @property
    def inputs(self) -> list[InputParam]:
        latents = InputParam("latents", torch.Tensor, description="The last latent state.")
        prepared = [InputParam(each.name, description=each.description) for each in PREPARED[2:]]
        return [latents, *OPTIONS[-1:], *prepared]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("images", description="Pictures, as `output_type` says.")]

    def run(self, pipe: Any, block_state: Any) -> None:
        if block_state.canvas is None and block_state.output_type == "latent":
            block_state.images = block_state.latents
            return
        if block_state.canvas is not None:
            pixels = block_state.canvas.finished()
        else:
            pixels = pipe.decode_pixels(block_state.latents)
            pixels = pixels if block_state.hole is None else block_state.hole.filled(pixels)
        block_state.images = pipe.image_processor.postprocess(pixels, output_type=block_state.output_type)


class SRDDBlocks(SequentialPipelineBlocks):
    r"""
    Drawing, inpainting and enlarging by class, as blocks of Modular Diffusers.

    With `mask_image` they inpaint, with `image` alone they enlarge, without either they draw; all else is told them as
    [`SRDDPipeline`], [`SRDDInpaintPipeline`] and [`SRDDSuperResolutionPipeline`] are. Outputs are "images" and
    "token_ids". `get_workflow("draw")`, or "inpaint" or "enlarge", are the blocks of one task.

    Example:

    ```py
    >>> import torch
    >>> from srdd.pipelines.modular_blocks import SRDDBlocks

    >>> pipe = SRDDBlocks().init_pipeline("model_cards/srdd-fruits64")
    >>> pipe.load_components()
    >>> image = pipe(class_labels="Tomato 2", generator=torch.Generator().manual_seed(0), output="images")[0]
    ```
    """

    description = "Draws, inpaints and enlarges images by class."
    block_classes = [EncodeLabels, Prepare, DrawScales, Decode]
    block_names = ["encode", "prepare", "draw", "decode"]
    _workflow_map = {"draw": {}, "inpaint": {"mask_image": True}, "enlarge": {"image": True}}

    def init_pipeline(
        self,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        components_manager: ComponentsManager | None = None,
        collection: str | None = None,
    ) -> ModularPipeline:
        """
        A pipeline of these blocks, whose components `load_components` loads.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*): Folder or repository of a saved
                pipeline, or of one of these. Whether it carries code does not matter: the classes are those of this
                package.
            components_manager (`ComponentsManager`, *optional*): As in diffusers.
            collection (`str`, *optional*): As in diffusers.

        Raises:
            OSError: If there is no such pipeline.
        """
        index, name_or_path = None, pretrained_model_name_or_path
        if name_or_path is not None:
            name_or_path = os.fspath(name_or_path)  # as text, or diffusers finds no component
            try:
                entries = ScalePipeline.load_config(name_or_path).items()
                index = {name: entry for name, entry in entries if isinstance(entry, list) and entry[0] is not None}
            except OSError:
                ModularPipeline.load_config(name_or_path)  # as `save_pretrained` of such a pipeline writes
        return ModularPipeline(
            blocks=copy.deepcopy(self),
            pretrained_model_name_or_path=name_or_path,
            components_manager=components_manager,
            collection=collection,
            config_dict=index,
        )


class SRDDTextBlocks(SRDDBlocks):
    r"""
    Drawing, inpainting and enlarging from texts: [`SRDDBlocks`] that are told what [`SRDDTextPipeline`],
    [`SRDDTextInpaintPipeline`] and [`SRDDTextSuperResolutionPipeline`] are.
    """

    description = "Draws, inpaints and enlarges images from texts."
    block_classes = [EncodePrompts, *SRDDBlocks.block_classes[1:]]
