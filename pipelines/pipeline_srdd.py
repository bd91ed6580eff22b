from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor

from srdd.models import MultiScaleVQModel, ScaleTransformer2DModel
from srdd.pipelines.pipeline_output import SRDDPipelineOutput
from srdd.pipelines.scale_sampling import check_components, label_ids, sample_scales
from srdd.schedulers import ScaleScheduler
from srdd.schedulers.scheduling_scale import MASK_TOKEN_ID


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class SRDDPipeline(DiffusionPipeline):
    r"""
    Draws images scale by scale, coarse to fine, as a discrete diffusion.

    Which scales are visited, how tokens are drawn and whether they are refined is the scheduler's choice; swap it to
    sample as VAR, SDD, SRDD or with a distilled scale set.

    Args:
        vqvae ([`MultiScaleVQModel`]): Tokenizer between images and token pyramids.
        transformer ([`ScaleTransformer2DModel`]): Predicts the tokens of a scale from the latent state before it.
        scheduler ([`ScaleScheduler`]): The scale schedule.

    Example:

    ```py
    >>> import torch
    >>> from srdd import SRDDPipeline

    >>> pipe = SRDDPipeline.from_pretrained("model_cards/srdd-fruits64")
    >>> image = pipe("Tomato 2", generator=torch.Generator().manual_seed(0)).images[0]
    ```
    """

    model_cpu_offload_seq = "transformer"
    # The tokenizer is needed after every scale, so the whole of it stays on the device while sampling.
    _exclude_from_cpu_offload = ["vqvae"]
    _callback_tensor_inputs = ["latents", "token_ids"]

    def __init__(self, vqvae: MultiScaleVQModel, transformer: ScaleTransformer2DModel, scheduler: ScaleScheduler):
        super().__init__()
        self.register_modules(vqvae=vqvae, transformer=transformer, scheduler=scheduler)
        self.vae_scale_factor = vqvae.spatial_compression_ratio if getattr(self, "vqvae", None) is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by id."""
        return self.transformer.id2label

    def get_label_ids(self, label: int | str | list[int | str]) -> list[int]:
        """
        Class ids of labels given by name or id, mixed as one likes.

        Raises:
            ValueError: If a label is unknown, ambiguous or out of range.
        """
        return label_ids(label, self.transformer.config.num_classes, self.id2label)

    def check_inputs(
        self,
        num_images_per_prompt: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        check_components(self.vqvae, self.transformer, self.scheduler)
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be a positive integer, got {num_images_per_prompt!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, got {output_type!r}.")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be a part of {self._callback_tensor_inputs}, got"
                f" {unknown}."
            )

    def encode_class_labels(self, class_labels: Any, num_images_per_prompt: int) -> tuple[torch.LongTensor, bool]:
        """Class ids of shape `(batch,)`, and whether they are classes at all rather than the null class."""
        null_class = self.transformer.config.num_classes
        conditional = class_labels is not None
        ids = self.get_label_ids(class_labels) if conditional else [null_class]
        ids = torch.tensor(ids, dtype=torch.long, device=self._execution_device)
        return ids.repeat_interleave(num_images_per_prompt), conditional

    def prepare_latents(self, batch_size: int, latents: torch.Tensor | None = None) -> torch.Tensor:
        """The latent state to start from, float32: zeros, or the caller's."""
        shape = (batch_size, self.vqvae.config.latent_channels, *self.vqvae.config.scale_sizes[-1])
        if latents is None:
            return torch.zeros(shape, device=self._execution_device)
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(self._execution_device, torch.float32)

    def decode_latents(self, latents: torch.Tensor, output_type: str) -> Any:
        """Pictures of latent states, as `output_type` says."""
        if output_type == "latent":
            return latents
        sample = self.vqvae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(sample.float(), output_type=output_type)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | torch.LongTensor | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SRDDPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> SRDDPipelineOutput | tuple:
        r"""
        Draw images.

        Args:
            class_labels (`int`, `str`, a list of both, or `torch.LongTensor`, *optional*):
                Classes by id or name; one image each. `None` draws without a class.
            guidance_scale (`float`, *optional*):
                Classifier-free guidance `uncond + g (cond - uncond)`, ramped over the scales by the scheduler; 1 and
                below is off. VAR's and the paper's `cfg` is `guidance_scale - 1`. By default 2.5, or 1 with a
                guidance-distilled transformer.
            num_images_per_prompt (`int`, defaults to 1): Images per label.
            generator (`torch.Generator` or a list, *optional*):
                The only source of randomness. With one generator for each image, an image does not depend on the
                others in its batch.
            latents (`torch.Tensor` of shape `(batch, latent_channels, latent_height, latent_width)`, *optional*):
                Latent state that the drawn scales are added to; zeros by default.
            output_type (`str`, defaults to `"pil"`): "pil", "np", "pt" (both in [0, 1]) or "latent".
            return_dict (`bool`, defaults to `True`): Whether to return a [`SRDDPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*):
                Called after every pass as `callback(pipe, step_index, timestep, callback_kwargs)`; tensors in the
                dictionary that it returns replace those of the run (the latents of a scale's last pass are what later
                scales build on), and it may set `pipe._guidance_scale`.
                `pipe.decode_latents(callback_kwargs["latents"], "pil")` is the picture so far.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*):
                What `callback_kwargs` holds: "latents" (the default), "token_ids".

        Returns:
            [`SRDDPipelineOutput`] or `(images, token_ids)`.

        Raises:
            ValueError: If a label, a shape, the number of generators, an output type, or the schedule does not fit.
        """
        tensor_inputs = (
            ["latents"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        )
        self.check_inputs(num_images_per_prompt, output_type, tensor_inputs)
        class_ids, conditional = self.encode_class_labels(class_labels, num_images_per_prompt)
        batch_size = class_ids.shape[0]
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` must be a list of {batch_size} generators, got {len(generator)}.")
        latents = self.prepare_latents(batch_size, latents)
        if guidance_scale is None:
            guidance_scale = 1.0 if self.transformer.config.guidance_distilled else 2.5
        self._guidance_scale = guidance_scale if conditional else 1.0

        self.scheduler.set_timesteps(device=self._execution_device)
        self._num_timesteps = len(self.scheduler.timesteps)
        shape = (batch_size, self.scheduler.num_tokens)
        token_ids = torch.full(shape, MASK_TOKEN_ID, dtype=torch.long, device=self._execution_device)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:

            def on_step_end(index: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
                progress_bar.update(index + 1 - progress_bar.n)
                if callback_on_step_end is None:
                    return tensors
                callback_kwargs = {name: tensors[name] for name in tensor_inputs}
                changed = callback_on_step_end(self, index, timestep, callback_kwargs)
                return {**tensors, **changed, "guidance_scale": self.guidance_scale}

            latents, token_ids = sample_scales(
                vqvae=self.vqvae,
                transformer=self.transformer,
                scheduler=self.scheduler,
                class_labels=class_ids,
                guidance_scale=self.guidance_scale,
                token_ids=token_ids,
                latents=latents,
                generator=generator,
                on_step_end=on_step_end,
            )
            progress_bar.update(self._num_timesteps - progress_bar.n)

        images = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return SRDDPipelineOutput(images=images, token_ids=token_ids) if return_dict else (images, token_ids)
