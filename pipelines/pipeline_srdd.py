from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor

from srdd.models import MultiScaleVQModel, ScaleTransformer2DModel, TokenCritic
from srdd.pipelines.pipeline_output import SRDDPipelineOutput
from srdd.pipelines.scale_pipeline_mixin import ScalePipelineMixin
from srdd.schedulers import ScaleScheduler


class SRDDPipeline(DiffusionPipeline, ScalePipelineMixin):
    r"""
    Draws images scale by scale, coarse to fine, as a discrete diffusion.

    Which scales are visited, how tokens are drawn and whether they are refined is the scheduler's choice; swap it to
    sample as VAR, SDD, SRDD or with a distilled scale set.

    Args:
        vqvae ([`MultiScaleVQModel`]): Tokenizer between images and token pyramids.
        transformer ([`ScaleTransformer2DModel`]): Predicts the tokens of a scale from the latent state before it.
        scheduler ([`ScaleScheduler`]): The scale schedule.
        token_critic ([`TokenCritic`], *optional*): Tells right tokens from wrong ones, for the resampling policy
            "learned".

    Example:

    ```py
    >>> import torch
    >>> from srdd import SRDDPipeline

    >>> pipe = SRDDPipeline.from_pretrained("model_cards/srdd-fruits64")
    >>> image = pipe("Tomato 2", generator=torch.Generator().manual_seed(0)).images[0]
    ```
    """

    model_cpu_offload_seq = "transformer"
    # The tokenizer is needed after every scale and the critic in every pass, so they stay on the device.
    _exclude_from_cpu_offload = ["vqvae", "token_critic"]
    _optional_components = ["token_critic"]

    def __init__(
        self,
        vqvae: MultiScaleVQModel,
        transformer: ScaleTransformer2DModel,
        scheduler: ScaleScheduler,
        token_critic: TokenCritic | None = None,
    ):
        super().__init__()
        self.register_modules(vqvae=vqvae, transformer=transformer, scheduler=scheduler, token_critic=token_critic)
        self.vae_scale_factor = vqvae.spatial_compression_ratio if getattr(self, "vqvae", None) is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

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
        class_ids = self.encode_class_labels(class_labels, num_images_per_prompt)
        latents, token_ids = self.run_scales(
            class_ids,
            self.prepare_latents(len(class_ids), latents),
            guidance_scale,
            generator,
            callback_on_step_end,
            tensor_inputs,
        )
        images = self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return SRDDPipelineOutput(images=images, token_ids=token_ids) if return_dict else (images, token_ids)
