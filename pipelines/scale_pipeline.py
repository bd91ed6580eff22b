"""What all SRDD pipelines are: their components, and a run over the scales."""

import copy
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from math import isfinite
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import HfApi
from tqdm.auto import tqdm
from typing_extensions import Self

from srdd.acceleration import CudaGraphs
from srdd.checks import check_dtype, shown
from srdd.models import MultiScaleVQModel, ScaleHistoryTransformer2DModel, ScaleTransformer, ScaleTransformer2DModel
from srdd.models.saved_weights import reading
from srdd.pictures import Pictures, read_pictures
from srdd.pipelines.callbacks import TENSOR_INPUTS, StepEnd, callback_tensor_inputs
from srdd.pipelines.conditions import Conditions, class_conditions, label_ids
from srdd.pipelines.guided_transformer import Guidance
from srdd.pipelines.model_folders import CARD, copy_card, without_carried_code
from srdd.pipelines.recorded_sampling import sample_recorded
from srdd.pipelines.scale_sampling import KnownTokens, SamplingInputs, sample_scales
from srdd.schedulers import ScaleScheduler


OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# Most images for a label, and the longest side of a canvas: beyond, memory ends before any picture is there.
MAX_IMAGES, MAX_SIDE = 10_000, 16_384


def check_components(vqvae: MultiScaleVQModel, transformer: ScaleTransformer, scheduler: ScaleScheduler) -> None:
    """
    Make sure that tokenizer, transformer and schedule belong together.

    Raises:
        ValueError: If the scheduler is of another kind, its scales are not the transformer's, or tokenizer and
            transformer differ in latent grid, codebook size or channels, or the transformer knows another codebook.
    """
    if not isinstance(scheduler, ScaleScheduler):
        raise ValueError(f"`scheduler` must be a ScaleScheduler, got {type(scheduler).__name__}.")
    if scheduler.config.scale_sizes != transformer.config.scale_sizes:
        raise ValueError(
            "`scheduler.config.scale_sizes` must be the scales of the transformer,"
            f" {transformer.config.scale_sizes}, got {scheduler.config.scale_sizes}. For fewer steps keep"
            " `scale_sizes` and set `scales`."
        )
    facts = [
        ("latent grid", vqvae.config.scale_sizes[-1], transformer.config.scale_sizes[-1]),
        ("codebook_size", vqvae.config.codebook_size, transformer.config.codebook_size),
        ("latent_channels", vqvae.config.latent_channels, transformer.config.latent_channels),
    ]
    for name, ours, theirs in facts:
        if ours != theirs:
            raise ValueError(f"`vqvae` and `transformer` must have the same {name}, got {ours} and {theirs}.")
    ours, theirs = vqvae.config.codebook_fingerprint, transformer.config.codebook_fingerprint
    if ours is not None and theirs is not None and ours != theirs:
        raise ValueError(
            "`vqvae` and `transformer` must have the same codebook, got those with the fingerprints"
            f" {ours} and {theirs}: the transformer was trained on the tokens of another tokenizer."
        )


class CallOptions(NamedTuple):
    """
    What every call may be told, beside what to draw: the arguments of `check_inputs`.

    Args:
        guidance_scale (`float`, *optional*): As in [`SRDDPipeline`], as are all others.
        num_images_per_prompt (`int`): Results for each label or text.
        generator (`torch.Generator` or a list, *optional*): The only source of randomness.
        output_type (`str`): What images are returned as.
        return_dict (`bool`): Whether they are returned in a [`SRDDPipelineOutput`].
        callback_on_step_end (`Callable`, *optional*): Called after every pass.
        callback_on_step_end_tensor_inputs (`list[str]`, *optional*): What it is given.
    """

    guidance_scale: float | None
    num_images_per_prompt: int
    generator: torch.Generator | Sequence[torch.Generator] | None
    output_type: str
    return_dict: bool
    callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None
    callback_on_step_end_tensor_inputs: list[str] | None = None

    @property
    def of_draw(self) -> dict[str, Any]:
        """Those that `draw` takes, by their names."""
        names = ("guidance_scale", "generator", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
        return {name: getattr(self, name) for name in names}


class CallState(threading.local):
    """What callbacks may read and set of the call that runs in their thread; each thread has its own."""

    guidance_scale: float | None = None
    interrupt: bool = False

    def __reduce__(self):
        return type(self), ()  # what a thread does is no part of a copy


class ScalePipeline(DiffusionPipeline):
    r"""
    Base of the pipelines: components and their checks, runs over the scales, decoding.

    Nothing of a call stays on the pipeline, and a call changes no component: several threads may draw with one.

    Args:
        vqvae ([`MultiScaleVQModel`]): Tokenizer between images and token pyramids.
        transformer ([`ScaleTransformer2DModel`]): Predicts the tokens of a scale from the latent state before it.
        scheduler ([`ScaleScheduler`]): The scale schedule.
    """

    vqvae: MultiScaleVQModel
    transformer: ScaleTransformer
    scheduler: ScaleScheduler

    model_cpu_offload_seq = "transformer"
    _exclude_from_cpu_offload = ["vqvae"]  # it is needed after every scale, so it stays on the device
    _callback_tensor_inputs = list(TENSOR_INPUTS)
    _usual_guidance_scale = 2.5  # where neither the call nor the scheduler says another
    _told_by = "`conditions`", "conditions"  # the argument that says what to draw, and what it holds
    _guider: BaseGuidance | None = None  # in the place of `guidance_scale`; modular blocks may have one

    def __init__(
        self,
        vqvae: MultiScaleVQModel,
        transformer: ScaleTransformer2DModel | ScaleHistoryTransformer2DModel,
        scheduler: ScaleScheduler,
    ):
        super().__init__()
        self.register_modules(vqvae=vqvae, transformer=transformer, scheduler=scheduler)
        self.vae_scale_factor = vqvae.spatial_compression_ratio if getattr(self, "vqvae", None) is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._call = CallState()
        self._cuda_graphs = CudaGraphs()

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """
        As [`ConfigMixin`] has it, for folders of version 0.1, too.

        Raises:
            ValueError: If a folder has a token critic.
        """
        critic = config_dict.get("token_critic")
        if critic is not None and critic[0] is not None:
            raise ValueError(
                "`token_critic` is gone since version 0.2, and the resampling policy 'learned' with it: it was no"
                f" better than 'masked' (`benchmarks/ABLATIONS.md`), got {critic}. Leave it out of"
                f" `{cls.config_name}`."
            )
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "token_critic"}, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """
        As [`ConfigMixin`] has it. Where a folder carries its own code, the classes of this package stand in for those
        of that code. It is private to diffusers; a test of folders with code pins it.
        """
        return without_carried_code(super()._dict_from_json_file(json_file), __name__.partition(".")[0])

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """
        The pipeline that a folder holds, or a repository of the Hub, as [`DiffusionPipeline`] has it: with `dtype`,
        `variant`, `revision` and `token`, or components by name that take the place of saved ones.

        Raises:
            ValueError: If a file is none of a saved pipeline, or weights are not whole and sound.
            OSError: If a file is missing or cut.
        """
        with reading(pretrained_model_name_or_path, cls.__name__):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """
        A pipeline of another one's components. They are shared and keep their dtypes (diffusers casts them all to
        float32), as the progress bar and CUDA graphs keep their settings.

        By name one may give components to take instead; `dtype` (or `torch_dtype`), to which components that are not
        quantized are cast, for the other pipeline, too; `custom_pipeline` and what belongs to it, as in diffusers.

        Args:
            pipeline (`DiffusionPipeline`): The other one.

        Returns:
            [`ScalePipeline`]: Of this class.

        Raises:
            ValueError: If a component is neither there nor given, an argument is unknown, or `dtype` is none.
        """
        if kwargs.get("custom_pipeline") is not None:
            return super().from_pipe(pipeline, **{"dtype": pipeline.dtype, **kwargs})
        dtypes = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype", "custom_pipeline")]
        dtype = next((each for each in dtypes if each is not None), None)
        if dtype is not None:
            check_dtype("dtype", dtype)
        names, _ = cls._get_signature_keys(cls)
        components = {**pipeline.components, **kwargs}
        if kwargs.keys() - names or names - components.keys():
            raise ValueError(
                f"`from_pipe` must get the components {sorted(names)} from `pipeline` or by name, got"
                f" {sorted(pipeline.components)} from {type(pipeline).__name__} and {sorted(kwargs)} by name."
            )
        made = cls(**{name: components[name] for name in names})
        if pipeline.config.get("_name_or_path") is not None:
            made.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
        made.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        made._cuda_graphs = copy.copy(getattr(pipeline, "_cuda_graphs", made._cuda_graphs))  # without any recordings
        for component in made.components.values() if dtype is not None else ():
            if isinstance(component, torch.nn.Module) and not getattr(component, "is_quantized", False):
                # diffusers' own warns of modules that should stay in float32, even if there are none.
                warns = getattr(component, "_keep_in_fp32_modules", None)
                (type(component).to if warns else torch.nn.Module.to)(component, dtype)
        return made

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> str:
        """
        As `PushToHubMixin` has it. Of the folder that the pipeline was loaded from, the card goes along, and the files
        that it names, but where the repository has a card. It is private to diffusers; a test of the Hub pins it.
        """
        source, working_dir = Path(self.name_or_path or "."), Path(working_dir)
        if self.name_or_path and (source / CARD).is_file() and not source.samefile(working_dir):
            if not HfApi(token=kwargs.get("token")).file_exists(repo_id, CARD):
                copy_card(source, working_dir)
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)

    def enable_cuda_graphs(self) -> None:
        """
        Let whole draws run as CUDA graphs, as they do by default. On CUDA the second draw with a batch size, schedule
        and dtype, and with or without guidance, is recorded, and later ones are replayed: they do not wait for the
        host to launch kernels. A seed means the same picture as without; labels, guidance and generators may change.

        Four graphs are kept, and memory for one draw with the noise of all. Draws that look at their device go
        without: those with a callback, of known tokens (inpainting, super-resolution), and with the policies "masked"
        and "remasked". So do those under autocast, of models that are offloaded, quantized or watched by hooks, and
        those for which there is no memory. While one thread records, others should not use torch's default generator.
        """
        self._cuda_graphs.is_enabled = True

    def disable_cuda_graphs(self) -> None:
        """Draw without CUDA graphs, and give back the memory of those that were recorded."""
        self._cuda_graphs.is_enabled = False
        self._cuda_graphs.clear()

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As [`DiffusionPipeline`] has it. Recorded graphs are forgotten."""
        self._cuda_graphs.clear()
        return super().to(*args, **kwargs)

    @property
    def _guidance_scale(self) -> float | None:
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, guidance_scale: float) -> None:
        self._call.guidance_scale = guidance_scale

    @property
    def guidance_scale(self) -> float | None:
        """Guidance of this thread's call, or of its last one. Callbacks set `_guidance_scale`."""
        return self._call.guidance_scale

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupt

    @_interrupt.setter
    def _interrupt(self, interrupt: bool) -> None:
        self._call.interrupt = interrupt

    @property
    def interrupt(self) -> bool:
        """Whether this thread's call ends after the pass at hand. Callbacks set `_interrupt`."""
        return self._call.interrupt

    @property
    def default_guidance_scale(self) -> float:
        """
        The guidance of calls that name none: 1 with a distilled transformer, or else the scheduler's, or what is usual
        with such models.
        """
        if self.transformer.config.guidance_distilled:
            return 1.0
        guidance_scale = self.scheduler.config.guidance_scale
        return self._usual_guidance_scale if guidance_scale is None else guidance_scale

    @property
    def _execution_device(self) -> torch.device:
        """
        As [`DiffusionPipeline`] has it. That walks through the modules of every component several times to look for
        hooks, for which a recorded draw would wait; this does it once.
        """
        models = [model for model in self.components.values() if isinstance(model, torch.nn.Module)]
        for module in chain.from_iterable(model.modules() for model in models):
            if "_hf_hook" in vars(module) or "_diffusers_hook" in vars(module):
                return super()._execution_device
        return next(models[0].parameters()).device

    @property
    def num_timesteps(self) -> int:
        """Most passes of a run."""
        return len(self.scheduler.timesteps)

    @property
    def sample_size(self) -> tuple[int, int]:
        """`(height, width)` of the images that the model draws."""
        return tuple(side * self.vae_scale_factor for side in self.vqvae.config.scale_sizes[-1])

    def check_inputs(
        self,
        guidance_scale: float | None,
        num_images_per_prompt: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> None:
        """Raise a `ValueError` for components that do not fit, or a value that no pipeline knows."""
        check_components(self.vqvae, self.transformer, self.scheduler)
        is_number = isinstance(guidance_scale, Real) and not isinstance(guidance_scale, bool)
        is_large = isinstance(guidance_scale, int) and abs(guidance_scale) > sys.float_info.max
        is_count = isinstance(num_images_per_prompt, Integral) and not isinstance(num_images_per_prompt, bool)
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        are_generators = all(isinstance(each, torch.Generator) for each in generators)
        is_known = isinstance(output_type, str) and output_type in OUTPUT_TYPES
        for name, value, is_allowed, rule in (
            (
                "guidance_scale",
                guidance_scale,
                is_number and not is_large and isfinite(guidance_scale),
                "a finite number or None",
            ),
            (
                "num_images_per_prompt",
                num_images_per_prompt,
                is_count and 1 <= num_images_per_prompt <= MAX_IMAGES,
                f"an integer in [1, {MAX_IMAGES}]",
            ),
            ("generator", generator, are_generators, "a torch.Generator, a list of them or None"),
            ("output_type", output_type, is_known, f"one of {OUTPUT_TYPES}"),
            ("return_dict", return_dict, isinstance(return_dict, bool), "True or False"),
        ):
            if not is_allowed and (value is not None or "None" not in rule):
                raise ValueError(f"`{name}` must be {rule}, got {shown(value)}.")
        if callback_on_step_end is not None or callback_on_step_end_tensor_inputs is not None:
            callback_tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)

    def prepare_pixels(self, image: Pictures) -> torch.Tensor:
        """
        Images as one batch of pixels in [-1, 1], float32 of shape `(batch, 3, height, width)`.

        Raises:
            ValueError: If something cannot be read as a picture, or images differ in size
                ([`~srdd.pictures.read_pictures`]).
        """
        return read_pictures("image", image).to(self._execution_device) * 2 - 1

    def prepare_batch(
        self, conditions: Conditions, num_images_per_prompt: int, *images: torch.Tensor
    ) -> tuple[Any, ...]:
        """
        Conditions and images, each repeated to one batch.

        Raises:
            ValueError: If there are several images and several conditions, but not one for each.
        """
        num_conditions, num_images = conditions.batch_size, len(images[0])
        num_pairs = max(num_images, num_conditions)
        if num_images not in (1, num_pairs) or num_conditions not in (1, num_pairs):
            argument, kind = self._told_by
            raise ValueError(
                f"{argument} must hold 1 or {num_images} {kind} for {num_images} images, got {num_conditions}."
            )
        batch_size = num_pairs * num_images_per_prompt
        return (
            conditions.repeat_interleave(batch_size // num_conditions),
            *(image.repeat_interleave(batch_size // num_images, dim=0) for image in images),
        )

    def check_latents(self, latents: torch.Tensor, batch_size: int) -> torch.Tensor:
        """
        A caller's latent state to start from.

        Raises:
            ValueError: If it is of another kind or shape, or not finite.
        """
        shape = (batch_size, self.vqvae.config.latent_channels, *self.vqvae.config.scale_sizes[-1])
        if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
            raise ValueError(f"`latents` must be a torch.Tensor of floats, got {shown(latents)}.")
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")
        if not latents.isfinite().all():
            raise ValueError("`latents` must be finite, got NaN or infinite values.")
        return latents

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> Any:
        """Pictures of latent states, as `output_type` says."""
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self.decode_pixels(latents), output_type=output_type)

    def decode_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels of latent states, float32 in [-1, 1]."""
        return self.vqvae.decode(latents, return_dict=False)[0].float().clamp(-1, 1)

    def draw(
        self,
        conditions: Conditions,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        known_tokens: KnownTokens | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        progress_bar: tqdm | None = None,
        decodes: bool = True,
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """
        Draw one image for each condition, with progress bar and callback.

        Args:
            conditions ([`Conditions`]): What to draw.
            guidance_scale (`float`, *optional*): The pipeline's own by default; off where nothing is told that one
                could guide away from.
            generator (`torch.Generator` or a list with one for each image, *optional*): The only source of randomness.
            latents (`torch.Tensor`, *optional*): As in [`SRDDPipeline`].
            known_tokens (`KnownTokens`, *optional*): As in [`~srdd.pipelines.scale_sampling.sample_scales`].
            callback_on_step_end (`Callable`, *optional*): As in [`SRDDPipeline`].
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): As in [`SRDDPipeline`].
            progress_bar (`tqdm`, *optional*): Follows the passes; one of the run's own by default.
            decodes (`bool`, defaults to `True`): Whether latent states are decoded.

        Returns:
            `tuple[torch.Tensor, torch.LongTensor]`: Pixels in [-1, 1] or the last latent state, both float32, and the
            pyramids.

        Raises:
            ValueError: If the number of generators is not that of images, `latents` or a callback do not fit, or the
                transformer's logits are not finite.
        """
        batch_size, on_step_end = conditions.batch_size, None
        if isinstance(generator, (list, tuple)):
            generator = list(generator)
            if len(generator) != batch_size:
                raise ValueError(f"`generator` must be a list of {batch_size} generators, got {len(generator)}.")
        if callback_on_step_end is not None:
            names = callback_tensor_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
            on_step_end = StepEnd(self, callback_on_step_end, names)
        device = next(iter(conditions.conditional.values())).device
        if latents is None:
            channels, grid_size = self.vqvae.config.latent_channels, self.vqvae.config.scale_sizes[-1]
            latents = torch.zeros(batch_size, channels, *grid_size, device=device)
        else:
            latents = self.check_latents(latents, batch_size).to(device, torch.float32)
        if conditions.unconditional is None:
            guidance_scale = 1.0
        elif guidance_scale is None:
            guidance_scale = self.default_guidance_scale
        self._call.guidance_scale, self._call.interrupt = guidance_scale, False
        scheduler = self.scheduler
        inputs = SamplingInputs(conditions, Guidance.of(scheduler, guidance_scale, device, self._guider), latents)
        is_recordable = known_tokens is on_step_end is self._guider is None and scheduler.draws_all_tokens
        is_recordable &= device.type == self._cuda_graphs.device_type
        components, recorded = (self.vqvae, self.transformer, scheduler), None
        total = len(scheduler.timesteps)
        bar = self.progress_bar(total=total) if progress_bar is None else nullcontext(progress_bar)
        with bar as progress_bar:
            if is_recordable:
                decode = self.decode_pixels if decodes else None
                recorded = sample_recorded(self._cuda_graphs, *components, inputs, generator, decode)
            if recorded is not None:
                output, pixels = recorded
                progress_bar.update(total)
            else:
                output = sample_scales(*components, inputs, progress_bar, generator, known_tokens, on_step_end)
                pixels = self.decode_pixels(output.latents) if decodes else None
        if not output.is_finite.all():
            timestep = scheduler.timesteps[output.is_finite.tolist().index(False)].item()
            raise ValueError(
                "`transformer` must give finite logits (-inf may forbid single tokens), got NaN or infinite ones at"
                f" timestep {timestep}."
            )
        return pixels if decodes else output.latents, output.token_ids


class ClassPipeline(ScalePipeline):
    r"""
    Base of the pipelines that draw by class.

    Args:
        vqvae ([`MultiScaleVQModel`]): Tokenizer between images and token pyramids.
        transformer ([`ScaleTransformer2DModel`]): Predicts the tokens of a scale from the latent state before it.
        scheduler ([`ScaleScheduler`]): The scale schedule.
    """

    transformer: ScaleTransformer2DModel | ScaleHistoryTransformer2DModel

    _told_by = "`class_labels`", "labels"

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """
        As [`ScalePipeline`] has it.

        Raises:
            ValueError: If a folder is of a pipeline that draws from texts.
        """
        if "text_encoder" in config_dict:
            raise ValueError(
                f"`pretrained_model_name_or_path` must be a pipeline that draws by class for {cls.__name__}, got"
                f" {config_dict.get('_class_name')}, which draws from texts."
            )
        return super().extract_init_dict(config_dict, **kwargs)

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by id."""
        return self.transformer.id2label

    @property
    def num_classes(self) -> int:
        """Number of classes that can be drawn."""
        return self.transformer.config.num_classes

    def get_label_ids(self, label: int | str | Sequence[int | str]) -> list[int]:
        """
        Class ids of labels given by name or id, mixed as one likes.

        Raises:
            ValueError: If a label is unknown, ambiguous or out of range.
        """
        return label_ids(label, self.transformer.config.num_classes, self.id2label)

    def encode_class_labels(self, class_labels: Any) -> Conditions:
        """
        What the transformer is told of classes, one image each; `None` is one image without a class.

        Raises:
            ValueError: If the transformer does not draw by class, or a label is out of range, unknown or names several
                classes, or there is none.
        """
        transformer, config = self.transformer, self.transformer.config
        if "num_classes" not in config:
            raise ValueError(f"`transformer` must draw by class, got a {type(transformer).__name__}.")
        names = config.num_classes, config.id2label
        return class_conditions(class_labels, *names, self._execution_device, transformer.labels_of_both_halves)
