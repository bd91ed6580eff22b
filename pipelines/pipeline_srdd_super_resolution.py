from collections.abc import Callable, Sequence
from functools import partial

import torch

from srdd.pictures import Pictures
from srdd.pipelines import scale_pipeline, super_resolution_pipeline  # by module: a `custom_pipeline` file holds one
from srdd.pipelines.pipeline_output import SRDDPipelineOutput, draws
from srdd.pipelines.scale_pipeline import CallOptions


class SRDDSuperResolutionPipeline(super_resolution_pipeline.SuperResolutionPipeline, scale_pipeline.ClassPipeline):
    r"""
    Enlarges images without fine-tuning: the coarse scales that the small image determines are forced, the finer ones
    drawn (paper, Section 4.3).

    Args:
        vqvae ([`MultiScaleVQModel`]): Tokenizer between images and token pyramids.
        transformer ([`ScaleTransformer2DModel`]): Predicts the tokens of a scale from the latent state before it.
        scheduler ([`ScaleScheduler`]): The scale schedule.

    Example:

    ```py
    >>> import torch
    >>> from PIL import Image
    >>> from srdd import SRDDSuperResolutionPipeline

    >>> pipe = SRDDSuperResolutionPipeline.from_pretrained("model_cards/srdd-fruits64")
    >>> small = Image.open("tomato.png").resize((16, 16))
    >>> large = pipe(small, scale_factor=4, class_labels="Tomato 2").images[0]
    ```
    """

    @draws
    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        scale_factor: int = 4,
        class_labels: int | str | Sequence[int | str] | torch.LongTensor | None = None,
        num_known_scales: int | None = None,
        consistent: bool = True,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["SRDDSuperResolutionPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> SRDDPipelineOutput | tuple:
        r"""
        Enlarge images.

        A result of the model's size is drawn in one go; a larger one in windows that overlap by half and fade into
        each other, each taking what was drawn before as known. A smaller one is cut from a continued image.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one kind):
                Small images of any one size, read by [`~srdd.pictures.read_pictures`].
            scale_factor (`int`, defaults to 4): How many times larger the result is.
            class_labels (`int`, `str`, a list of both, or `torch.LongTensor`, *optional*): Classes, one for all images
                or one each. `None` draws without a class.
            num_known_scales (`int`, *optional*): How many scales the small image determines, coarse to fine; by
                default those whose tokens cover 2 x 2 of its pixels or more ([`num_determined_scales`]).
            consistent (`bool`, defaults to `True`): Change the result as little as possible so that, made small again
                (bicubic, antialiased), it is the given image. Where contrasts are so high that no image is that, it
                comes as near as it can, and a warning says how near.
            guidance_scale (`float`, *optional*): As in [`SRDDPipeline`].
            num_images_per_prompt (`int`, defaults to 1): Results for each image.
            generator (`torch.Generator` or a list, *optional*): The only source of randomness; one, or one for each
                result.
            output_type (`str`, defaults to `"pil"`): "pil", "np", "pt" (both in [0, 1]).
            return_dict (`bool`, defaults to `True`): Whether to return a [`SRDDPipelineOutput`].
            callback_on_step_end (`Callable`, *optional*): As in [`SRDDPipeline`].
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): As in [`SRDDPipeline`].

        Returns:
            [`SRDDPipelineOutput`] or `(images, token_ids)`; the tokens are those of the window drawn last.

        Raises:
            ValueError: If images, labels or another argument do not fit.
        """
        callback = callback_on_step_end, callback_on_step_end_tensor_inputs
        options = CallOptions(guidance_scale, num_images_per_prompt, generator, output_type, return_dict, *callback)
        encode = partial(self.encode_class_labels, class_labels)
        return self.enlarge_with(encode, image, scale_factor, num_known_scales, consistent, options=options)
