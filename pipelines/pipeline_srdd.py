from collections.abc import Callable, Sequence

import torch

from srdd.pipelines import scale_pipeline  # by module: as a `custom_pipeline` this file may hold one pipeline only
from srdd.pipelines.pipeline_output import SRDDPipelineOutput, draws


class SRDDPipeline(scale_pipeline.ClassPipeline):
    r"""
    Draws images scale by scale, coarse to fine, as a discrete diffusion.

    Which scales are visited, how tokens are drawn and whether they are refined is the scheduler's choice; swap it to
    sample as VAR, SDD, SRDD or with a distilled scale set.

    Args:
        vqvae ([`MultiScaleVQModel`]): Tokenizer between images and token pyramids.
        transformer ([`ScaleTransformer2DModel`] or [`ScaleHistoryTransformer2DModel`]): Predicts the tokens of a scale
            from the latent state before it.
        scheduler ([`ScaleScheduler`]): The scale schedule.

    Example:

    ```py
    >>> import torch
    >>> from srdd import SRDDPipeline

    >>> pipe = SRDDPipeline.from_pretrained("model_cards/srdd-fruits64")
    >>> image = pipe("Tomato 2", generator=torch.Generator().manual_seed(0)).images[0]
    ```
    """

    @draws
    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.LongTensor | None = None,
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
                below is off. VAR's and the paper's `cfg` is `guidance_scale - 1`. By default that of the scheduler's
                config, or 2.5 if it has none; 1 with a guidance-distilled transformer.
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
                scales build on). It may set `pipe._guidance_scale` for the scales to come, and `pipe._interrupt` to
                end the run: tokens of the scales that are left out are -1.
                `pipe.decode_latents(callback_kwargs["latents"], "pil")` is the picture so far.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*):
                What `callback_kwargs` holds: "latents" (the default), "token_ids".

        Returns:
            [`SRDDPipelineOutput`] or `(images, token_ids)`.

        Raises:
            ValueError: If an argument, what a callback returns, or the schedule does not fit.
        """
        self.check_inputs(
            guidance_scale,
            num_images_per_prompt,
            generator,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        conditions = self.encode_class_labels(class_labels)
        if num_images_per_prompt > 1:
            conditions = conditions.repeat_interleave(num_images_per_prompt)
        decodes = output_type != "latent"
        images, token_ids = self.draw(
            conditions,
            guidance_scale=guidance_scale,
            generator=generator,
            latents=latents,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            decodes=decodes,
        )
        if decodes:
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return SRDDPipelineOutput(images=images, token_ids=token_ids) if return_dict else (images, token_ids)
