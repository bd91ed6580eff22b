"""What the SRDD pipelines have in common besides the sampling loop."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.image_processor import PipelineImageInput

from srdd.pipelines.image_regions import check_one_size, resize
from srdd.pipelines.known_region import KnownRegion
from srdd.pipelines.scale_sampling import check_components, label_ids, sample_scales
from srdd.schedulers.scheduling_scale import MASK_TOKEN_ID


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ScalePipelineMixin:
    """Labels, latent states, decoding and the run over the scales, for pipelines with the components of SRDD."""

    _callback_tensor_inputs = ["latents", "token_ids"]

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by id."""
        return self.transformer.id2label

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def default_guidance_scale(self) -> float:
        """The guidance of calls that name none."""
        return 1.0 if self.transformer.config.guidance_distilled else 2.5

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def sample_size(self) -> tuple[int, int]:
        """`(height, width)` of the images that the model draws."""
        return tuple(side * self.vae_scale_factor for side in self.vqvae.config.scale_sizes[-1])

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
        check_components(self.vqvae, self.transformer, self.scheduler, self.token_critic)
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

    def encode_class_labels(self, class_labels: Any, num_images_per_prompt: int) -> torch.LongTensor:
        """Class ids of shape `(batch,)`; the null class for `None`."""
        ids = [self.transformer.config.num_classes] if class_labels is None else self.get_label_ids(class_labels)
        ids = torch.tensor(ids, dtype=torch.long, device=self._execution_device)
        return ids.repeat_interleave(num_images_per_prompt)

    def prepare_pixels(self, image: PipelineImageInput) -> torch.Tensor:
        """
        Images as one batch of pixels in [-1, 1], float32 of shape `(batch, 3, height, width)`.

        Raises:
            ValueError: If images differ in size or have other than 3 channels.
        """
        check_one_size("image", image)
        pixels = self.image_processor.preprocess(image).to(self._execution_device, torch.float32)
        if pixels.shape[1] != 3:
            raise ValueError(f"`image` must have 3 channels, got {pixels.shape[1]}.")
        return pixels

    def prepare_batch(
        self, class_labels: Any, num_images_per_prompt: int, *images: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """
        Class ids and images, each repeated to one batch.

        Raises:
            ValueError: If there are several images and several labels, but not one for each.
        """
        class_ids = self.encode_class_labels(class_labels, 1)
        batch_size = max(len(images[0]), len(class_ids))
        if len(images[0]) not in (1, batch_size) or len(class_ids) not in (1, batch_size):
            raise ValueError(
                f"`class_labels` must hold 1 or {len(images[0])} labels for {len(images[0])} images, got"
                f" {len(class_ids)}."
            )
        repeats = [batch_size // len(part) * num_images_per_prompt for part in (class_ids, *images)]
        return tuple(part.repeat_interleave(count, dim=0) for part, count in zip((class_ids, *images), repeats))

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
        return self.image_processor.postprocess(self.decode_pixels(latents), output_type=output_type)

    def hint_tokens(self, pixels: torch.Tensor, num_scales: int) -> torch.LongTensor | None:
        """Tokens of the coarsest scales of images of any size, in [-1, 1]; `None` for no scale."""
        if num_scales == 0:
            return None
        pixels = resize(pixels, self.sample_size)
        latents = self.vqvae.encode(pixels.to(self.vqvae.dtype)).latents
        return self.vqvae.quantize_latents(latents, self.scheduler.scales[:num_scales])

    def decode_pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels of latent states, float32 in [-1, 1]."""
        return self.vqvae.decode(latents, return_dict=False)[0].float().clamp(-1, 1)

    def run_scales(
        self,
        class_ids: torch.LongTensor,
        latents: torch.Tensor,
        guidance_scale: float | None,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        known: KnownRegion | None = None,
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """
        Draw one pyramid for each class id, with progress bar and callback.

        Returns:
            `tuple[torch.Tensor, torch.LongTensor]`: The last latent state and the pyramids.

        Raises:
            ValueError: If the number of generators is not that of images.
        """
        batch_size = class_ids.shape[0]
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` must be a list of {batch_size} generators, got {len(generator)}.")
        if guidance_scale is None:
            guidance_scale = self.default_guidance_scale
        conditional = bool((class_ids != self.transformer.config.num_classes).any())
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
                callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                changed = callback_on_step_end(self, index, timestep, callback_kwargs)
                return {**tensors, **changed, "guidance_scale": self.guidance_scale}

            drawn = sample_scales(
                vqvae=self.vqvae,
                transformer=self.transformer,
                scheduler=self.scheduler,
                token_critic=self.token_critic,
                class_labels=class_ids,
                guidance_scale=self.guidance_scale,
                token_ids=token_ids,
                latents=latents,
                generator=generator,
                known=known,
                on_step_end=on_step_end,
            )
            progress_bar.update(self._num_timesteps - progress_bar.n)
        return drawn
