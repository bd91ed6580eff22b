"""Latent diffusion of diffusers' own models, DiT and UNet, drawn as the pipelines that it is compared with."""

import os
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    UNet2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from srdd import SRDDPipeline
from srdd.checks import check_choice, check_int, check_number, shown
from srdd.models.guidance import guide
from srdd.pipelines.conditions import label_ids


# With which DiT and LDM report their best distances on ImageNet at 256px.
USUAL_GUIDANCE_SCALE = 1.5


class LatentDiffusionPipeline(DiffusionPipeline):
    r"""
    Draws images by latent diffusion, with DDIM and by class, as [`SRDDPipeline`] is called. Loads what
    `train_baseline.py` makes, and the folders of diffusers' `DiTPipeline`.

    Args:
        vae (`AutoencoderKL`): Decodes latents, which are scaled by the `scaling_factor` of its config.
        scheduler (`DDIMScheduler`): The noise schedule.
        transformer (`DiTTransformer2DModel`, *optional*): What removes the noise; either this or `unet`. The id after
            its classes says nothing.
        unet (`UNet2DModel`, *optional*): The same. Its last class says nothing; without classes it is told none.
        id2label (`dict`, *optional*): Names of the classes by id; empty for a model without classes. By
            default there are as many as the model has, without names.
        num_inference_steps (`int`, defaults to 50): Steps of a draw. Folders of a DiT do not keep it: diffusers'
            pipeline has no place for it.

    Raises:
        ValueError: If not exactly one of `transformer` and `unet` is given, or it has not the channels of the latents.
    """

    _optional_components = ["transformer", "unet"]

    def __init__(
        self,
        vae: AutoencoderKL,
        scheduler: DDIMScheduler,
        transformer: DiTTransformer2DModel | None = None,
        unet: UNet2DModel | None = None,
        id2label: dict | None = None,
        num_inference_steps: int = 50,
    ):
        super().__init__()
        if (transformer is None) == (unet is None):
            raise ValueError("Give either `transformer` or `unet`, got both or none of them.")
        self.register_modules(vae=vae, scheduler=scheduler, transformer=transformer, unet=unet)
        channels, wanted = self.denoiser.config.in_channels, vae.config.latent_channels
        if channels != wanted:
            raise ValueError(f"`in_channels` of the model must be those of the latents, {wanted}, got {channels}.")
        check_int("num_inference_steps", num_inference_steps, low=1, high=scheduler.config.num_train_timesteps)
        self.register_to_config(id2label=id2label, num_inference_steps=num_inference_steps)
        self.image_processor = VaeImageProcessor()

    @property
    def denoiser(self) -> DiTTransformer2DModel | UNet2DModel:
        """The model that removes the noise."""
        return self.unet if self.transformer is None else self.transformer

    @property
    def null_class(self) -> int | None:
        """The id that says nothing; `None` where the model is told no classes."""
        if self.transformer is not None:
            return self.transformer.config.num_embeds_ada_norm
        return None if self.unet.config.num_class_embeds is None else self.unet.config.num_class_embeds - 1

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by id."""
        return {int(index): name for index, name in (self.config.id2label or {}).items()}

    @property
    def num_classes(self) -> int:
        """Number of classes that can be drawn."""
        return (self.null_class or 0) if self.config.id2label is None else len(self.config.id2label)

    @property
    def default_guidance_scale(self) -> float:
        """The guidance of calls that name none."""
        return USUAL_GUIDANCE_SCALE

    @property
    def sample_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        side = self.denoiser.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        return side, side

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As [`~diffusers.DiffusionPipeline.save_pretrained`]; with a DiT the folder is one of diffusers' pipeline."""
        if self.transformer is None:
            return super().save_pretrained(save_directory, **kwargs)
        pipe = DiTPipeline(self.transformer, self.vae, self.scheduler)
        if self.config.id2label is not None:
            pipe.register_to_config(id2label=self.config.id2label)
        pipe.save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        r"""
        Draw images.

        Args:
            class_labels (`int`, `str` or a list of both, *optional*):
                Classes by id or name; one image each. `None` draws without a class.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance `uncond + g (cond - uncond)`, alike in all steps; 1 and below is off. 1.5 by
                default.
            num_images_per_prompt (`int`, defaults to 1): Images per label.
            generator (`torch.Generator` or a list, *optional*):
                The only source of randomness. With one generator for each image, an image does not depend on the
                others in its batch.
            output_type (`str`, defaults to `"pil"`): "pil", "np" or "pt" (both in [0, 1]).

        Returns:
            `ImagePipelineOutput`

        Raises:
            ValueError: If an argument does not fit, or the model's output is not finite.
        """
        guidance_scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        check_number("guidance_scale", guidance_scale)
        check_int("num_images_per_prompt", num_images_per_prompt, low=1)
        check_choice("output_type", output_type, ("pil", "np", "pt"))
        generator = list(generator) if isinstance(generator, tuple) else generator
        generators = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(each, torch.Generator) for each in generators):
            raise ValueError(f"`generator` must be a torch.Generator, a list of them or None, got {shown(generator)}.")
        ids = [self.null_class]
        if class_labels is not None:
            ids = label_ids(class_labels, self.num_classes, self.id2label)
        device, is_told = self._execution_device, self.null_class is not None
        labels = torch.tensor(ids, device=device).repeat_interleave(num_images_per_prompt) if is_told else None
        batch_size = len(ids) * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` must be a list of {batch_size} generators, got {len(generator)}.")
        config = self.denoiser.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        latents = randn_tensor(shape, generator=generator, device=device)
        is_guided = class_labels is not None and guidance_scale > 1
        self.scheduler.set_timesteps(self.config.num_inference_steps)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            prediction = self.predict(latents, timestep, labels, guidance_scale if is_guided else 1.0)
            latents = self.scheduler.step(prediction, timestep, latents).prev_sample
        if not latents.isfinite().all():
            raise ValueError("The model must give finite latents, got NaN or infinity after the last step.")
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        images = self.image_processor.postprocess(self.vae.decode(latents).sample.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, labels: torch.LongTensor | None, guidance_scale: float
    ) -> torch.Tensor:
        """
        What the model says of noisy latents.

        Args:
            latents (`torch.Tensor` of shape `(batch, channels, height, width)`): float32.
            timestep (`torch.Tensor`): One for all, or one for each.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*): Class ids; for models that are told none
                `None`.
            guidance_scale (`float`): 1 asks for the labels alone.

        Returns:
            `torch.Tensor` of the shape of `latents`, float32.
        """
        if guidance_scale != 1:
            latents, labels = (
                torch.cat([latents, latents]),
                torch.cat([labels, torch.full_like(labels, self.null_class)]),
            )
        timesteps = timestep.to(latents.device).expand(len(latents))
        prediction = self.denoiser(latents.to(self.denoiser.dtype), timesteps, class_labels=labels).sample.float()
        prediction = prediction[:, : latents.shape[1]]  # the rest is a variance that DDIM does without
        return prediction if guidance_scale == 1 else guide(*prediction.chunk(2), guidance_scale - 1)


DrawingPipeline = SRDDPipeline | LatentDiffusionPipeline


def load_drawing_pipeline(name: str, dtype: torch.dtype | None = None) -> DrawingPipeline:
    """
    The pipeline of a folder or of the Hub that draws by class.

    Args:
        name (`str`): The folder or Hub id.
        dtype (`torch.dtype`, *optional*): Of its weights; diffusers' default, float32.

    Returns:
        [`LatentDiffusionPipeline`] where the folder is one, or a `DiTPipeline`; else [`SRDDPipeline`].
    """
    try:
        class_name = DiffusionPipeline.load_config(name).get("_class_name")
    except OSError:  # said better below
        class_name = None
    is_latent_diffusion = class_name in (DiTPipeline.__name__, LatentDiffusionPipeline.__name__)
    return (LatentDiffusionPipeline if is_latent_diffusion else SRDDPipeline).from_pretrained(name, dtype=dtype)
