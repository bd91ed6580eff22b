import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from srdd.acceleration import accelerate, dequantize_decoder, quantize_decoder, run_decoder
from srdd.area_means import area_means
from srdd.checks import check_list, described, shown
from srdd.models.configuration import check_configuration, check_groups, check_num_parameters, check_sample_size
from srdd.models.quantizer_multiscale import MultiScaleQuantizer
from srdd.models.saved_weights import SavedModelMixin, is_finite_as
from srdd.scales import ScaleSizes, normalize_scale_sizes, num_tokens_per_scale, split_scales


@dataclass
class MultiScaleVQEncoderOutput(BaseOutput):
    """
    Output of [`MultiScaleVQModel.encode`].

    Args:
        latents (`torch.Tensor` of shape `(batch, latent_channels, latent_height, latent_width)`):
            The latent map before quantization.
    """

    latents: torch.Tensor


@dataclass
class MultiScaleVQModelOutput(BaseOutput):
    """
    Output of [`MultiScaleVQModel.forward`], which sets all of it: fields are optional so that accelerate can rebuild
    it in another precision.

    Args:
        sample (`torch.Tensor` of shape `(batch, out_channels, height, width)`): Reconstructed pixels, around [-1, 1].
        token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`, *optional*): The packed token pyramid.
        codebook_loss (`torch.Tensor`, *optional*): Distance that moves the codes towards the latents (float32 scalar).
        commitment_loss (`torch.Tensor`, *optional*): Distance that keeps the encoder near the codes (float32 scalar).
        latents (`torch.Tensor` of shape `(batch, latent_channels, latent_height, latent_width)`, *optional*):
            The latent map before quantization.
    """

    sample: torch.Tensor
    token_ids: torch.LongTensor | None = None
    codebook_loss: torch.Tensor | None = None
    commitment_loss: torch.Tensor | None = None
    latents: torch.Tensor | None = None


class MultiScaleVQModel(SavedModelMixin, AutoencoderMixin, ConfigMixin):
    r"""
    Image tokenizer that writes an image as a pyramid of token maps and reads it back.

    An image becomes a latent map `f`; scale by scale, coarse to fine, the nearest codes of the area-downsampled rest
    are taken and their upsampled, convolved map is subtracted (paper Section 3.2 and Appendix B; VAR, Algorithm 1 and
    2). The sum of all maps is the latent state `f_hat` that the decoder turns into pixels.

    Token pyramids are packed: `(batch, num_tokens)` int64 ids in `[0, codebook_size - 1]`, scales coarse to fine, each
    in row-major order. Pixels are in [-1, 1].

    Parameters:
        in_channels (`int`, defaults to 3): Channels of the input image.
        out_channels (`int`, defaults to 3): Channels of the reconstruction.
        down_block_types (`tuple[str]`): Encoder blocks, names of diffusers' UNet blocks.
        up_block_types (`tuple[str]`): Decoder blocks.
        block_out_channels (`tuple[int]`): Channels of every resolution, finest first.
        layers_per_block (`int`, defaults to 2): Residual layers per resolution (the decoder has one more).
        mid_block_add_attention (`bool`, defaults to `True`): Whether the middle blocks attend.
        act_fn (`str`, defaults to `"silu"`): Activation of encoder and decoder.
        norm_num_groups (`int`, defaults to 32): Groups of the group norms.
        latent_channels (`int`, defaults to 32): Channels of the latent map and of a code.
        codebook_size (`int`, defaults to 4096): Number of codes, shared by all scales. (The paper's text says 6000;
            the tokenizer it uses, VAR's, has 4096.)
        scale_sizes (`list`): The model's own scales as side lengths or `(height, width)` pairs; the last one is the
            latent grid of a `sample_size` image.
        sample_size (`int` or `tuple[int, int]`, defaults to 256): Image side, or `(height, width)`, of the training
            data.
        patch_size (`int`, defaults to 1): Pixels are folded into channels in squares of this side before the encoder
            and unfolded after the decoder; 2 makes a small model about four times cheaper.
        quant_conv_kernel_size (`int`, defaults to 3): Kernel of the convolutions around the quantizer.
        num_residual_convs (`int`, defaults to 4): Residual convolutions `phi` shared among the scales.
        residual_ratio (`float`, defaults to 0.5): The `r` in `phi(x) = (1 - r) x + r conv(x)`.
        normalize_codes (`bool`, defaults to `False`): Find codes by cosine similarity.
        decoder_block_out_channels (`tuple[int]`, *optional*): Channels of the decoder, where they are not the
            encoder's `block_out_channels`; as many, finest first.
        decoder_layers_per_block (`int`, *optional*): The decoder's `layers_per_block`; it has one more, so that 0 is
            the fewest.
        decoder_mid_block_add_attention (`bool`, *optional*): Whether the decoder's middle block attends.
        decoder_norm_num_groups (`int`, *optional*): Groups of the decoder's group norms.
        codebook_fingerprint (`str`, *optional*): Of the codebook as it was trained ([`sign_codebook`]), 16
            hexadecimal digits. A transformer's names the codebook that it knows.

    Raises:
        ValueError: If an argument is of another kind or out of the bounds in [`~srdd.models.configuration`],
            `scale_sizes` is no growing list of scales or does not end at the latent grid of `sample_size`, lists of
            blocks and channels differ in length, groups do not divide channels, `quant_conv_kernel_size` is even, or
            the model would have more than 2 * 10^10 parameters.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["quantize"]
    _no_split_modules = ["MultiScaleQuantizer", "ResnetBlock2D", "LeanResnetBlock2D", "Attention"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        block_out_channels: tuple[int, ...] = (160, 160, 320, 320, 640),
        layers_per_block: int = 2,
        mid_block_add_attention: bool = True,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        latent_channels: int = 32,
        codebook_size: int = 4096,
        scale_sizes: ScaleSizes = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        sample_size: int | tuple[int, int] = 256,
        patch_size: int = 1,
        quant_conv_kernel_size: int = 3,
        num_residual_convs: int = 4,
        residual_ratio: float = 0.5,
        normalize_codes: bool = False,
        decoder_block_out_channels: tuple[int, ...] | None = None,
        decoder_layers_per_block: int | None = None,
        decoder_mid_block_add_attention: bool | None = None,
        decoder_norm_num_groups: int | None = None,
        codebook_fingerprint: str | None = None,
    ):
        super().__init__()
        checked, sample_size = check_configuration(self.config), check_sample_size(sample_size)
        scale_sizes = normalize_scale_sizes(scale_sizes)
        # JSON turns tuples into lists; the config holds lists from the start.
        self.register_to_config(**checked, scale_sizes=scale_sizes, sample_size=sample_size)
        for name in ("down_block_types", "up_block_types"):
            check_list(name, checked[name], len(block_out_channels))
        check_groups("norm_num_groups", norm_num_groups, checked["block_out_channels"])
        if quant_conv_kernel_size % 2 == 0:
            raise ValueError(f"`quant_conv_kernel_size` must be odd, got {quant_conv_kernel_size}.")
        self.spatial_compression_ratio = patch_size * 2 ** (len(block_out_channels) - 1)
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self._check_grid(scale_sizes, self._grid_of(height, width))
        decoder_sizes = self._decoder_sizes()
        check_num_parameters(
            18 * layers_per_block * sum(width**2 for width in block_out_channels)
            + 18 * decoder_sizes["layers_per_block"] * sum(width**2 for width in decoder_sizes["block_out_channels"])
            + (in_channels + out_channels) * patch_size**2 * 9 * max(block_out_channels)
            + latent_channels
            * (codebook_size + latent_channels * (quant_conv_kernel_size**2 + 9 * num_residual_convs)),
            "`block_out_channels`, `layers_per_block`, `in_channels`, `out_channels`, `patch_size`, `latent_channels`,"
            " `codebook_size`, `quant_conv_kernel_size` and `num_residual_convs`",
        )

        self.encoder = Encoder(
            in_channels=in_channels * patch_size**2,
            out_channels=latent_channels,
            down_block_types=down_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            double_z=False,
            mid_block_add_attention=mid_block_add_attention,
        )
        padding = quant_conv_kernel_size // 2
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, quant_conv_kernel_size, padding=padding)
        self.quantize = MultiScaleQuantizer(
            codebook_size=codebook_size,
            latent_channels=latent_channels,
            scale_sizes=scale_sizes,
            num_residual_convs=num_residual_convs,
            residual_ratio=residual_ratio,
            normalize_codes=normalize_codes,
        )
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, quant_conv_kernel_size, padding=padding)
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels * patch_size**2,
            up_block_types=up_block_types,
            act_fn=act_fn,
            **decoder_sizes,
        )
        accelerate(self.decoder)
        # Numbers of the decoder's largest feature map for a cell of the latent grid: the last up-sampling writes the
        # channels of the last block but one.
        channels = decoder_sizes["block_out_channels"]
        self._largest_map = max(channels[:2]) * 4 ** (len(channels) - 1)
        self.use_slicing = False
        self.use_fast_decoding = True

    def _decoder_sizes(self) -> dict[str, Any]:
        """The decoder's own arguments: those of the encoder that the configuration does not override."""
        names = ("block_out_channels", "layers_per_block", "mid_block_add_attention", "norm_num_groups")
        own = {name: self.config[f"decoder_{name}"] for name in names}
        sizes = {name: self.config[name] if value is None else value for name, value in own.items()}
        if all(value is None for value in own.values()):
            return sizes

        levels = len(self.config.block_out_channels)
        if len(sizes["block_out_channels"]) != levels:
            raise ValueError(
                f"`decoder_block_out_channels` must be {levels} positive integers, as many as `block_out_channels`,"
                f" got {sizes['block_out_channels']}."
            )
        name = "norm_num_groups" if own["norm_num_groups"] is None else "decoder_norm_num_groups"
        check_groups(name, sizes["norm_num_groups"], sizes["block_out_channels"])
        return sizes

    @property
    def resolution(self) -> int:
        """Side of the square images that the scales are of."""
        return self.config.scale_sizes[-1][0] * self.spatial_compression_ratio

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        ratio = self.spatial_compression_ratio
        if height % ratio or width % ratio:
            raise ValueError(f"`sample` must have sides that are multiples of {ratio}, got ({height}, {width}).")
        return height // ratio, width // ratio

    @staticmethod
    def _check_grid(scale_sizes: list[list[int]], grid_size: Sequence[int]) -> None:
        if tuple(scale_sizes[-1]) != tuple(grid_size):
            raise ValueError(
                f"`scale_sizes` must end at the latent grid {tuple(grid_size)}, got"
                f" {[tuple(size) for size in scale_sizes]}."
            )

    def _own_or(self, scale_sizes: ScaleSizes | None) -> list[list[int]]:
        return self.config.scale_sizes if scale_sizes is None else normalize_scale_sizes(scale_sizes)

    def _check_token_ids(self, token_ids: torch.Tensor, scale_sizes: list[list[int]]) -> None:
        if not isinstance(token_ids, torch.Tensor) or token_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`token_ids` must be an int64 or int32 tensor, got {described(token_ids)}.")
        num_tokens = sum(num_tokens_per_scale(scale_sizes))
        if token_ids.ndim != 2 or token_ids.shape[1] != num_tokens:
            raise ValueError(
                f"`token_ids` must have shape (batch, {num_tokens}) for the scales {shown(scale_sizes)}, got"
                f" {tuple(token_ids.shape)}."
            )

    def _outside_codebook(self, name: str, token_ids: torch.Tensor) -> ValueError:
        low, high = (bound.item() for bound in token_ids.aminmax())
        return ValueError(f"`{name}` must lie in [0, {self.config.codebook_size - 1}], got [{low}, {high}].")

    def _check_num_scales(self, num_scales: torch.Tensor, batch_size: int) -> None:
        dtypes, last = (torch.int64, torch.int32), len(self.config.scale_sizes)
        is_tensor = isinstance(num_scales, torch.Tensor) and num_scales.dtype in dtypes
        if not is_tensor or tuple(num_scales.shape) != (batch_size,):
            raise ValueError(
                f"`num_scales` must be an int64 or int32 tensor of shape ({batch_size},), got {described(num_scales)}."
            )
        low, high = (int(bound) for bound in torch.aminmax(num_scales))
        if low < 1 or high > last:
            raise ValueError(f"`num_scales` must lie in [1, {last}], got [{low}, {high}].")

    @staticmethod
    def _check_maps(name: str, maps: torch.Tensor, num_channels: int) -> None:
        is_batch = isinstance(maps, torch.Tensor) and maps.is_floating_point() and maps.ndim == 4 and maps.numel() > 0
        if not is_batch or maps.shape[1] != num_channels:
            raise ValueError(
                f"`{name}` must be a floating-point tensor of shape (batch, {num_channels}, height, width), got"
                f" {described(maps)}."
            )

    def _quantize(self, name: str, latents: torch.Tensor, scale_sizes: list[list[int]]) -> torch.LongTensor:
        # No code is near to NaN: all of an image's tokens would be the first.
        if not is_finite_as(latents):
            raise ValueError(f"`{name}` must give finite latents, got NaN or infinity.")
        return self.quantize.quantize(latents, scale_sizes)

    def _encode(self, sample: torch.Tensor) -> torch.Tensor:
        if self.use_slicing and len(sample) > 1:
            return torch.cat([self._encode(image) for image in sample.split(1)])
        return self.quant_conv(self.encoder(F.pixel_unshuffle(sample.to(self.dtype), self.config.patch_size)))

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(latents)), self.config.patch_size)

    def enable_fast_decoding(self) -> None:
        """
        Let `decode` go other ways than diffusers' decoder where no gradient is asked for, as it does by default: in
        place, in slices of a few images, and on a CPU in float32 with channels innermost and up-sampling merged into
        the convolutions. Pixels agree to about 1e-5. diffusers' code runs in training, under autocast, in compiled
        code, and for who calls the decoder itself.
        """
        self.use_fast_decoding = True

    def disable_fast_decoding(self) -> None:
        """Decode with diffusers' own code, the whole batch at once unless `enable_slicing` was called."""
        self.use_fast_decoding = False

    def enable_int8_decoding(self, latents: torch.Tensor) -> None:
        """
        Let `decode` multiply int8 in the decoder's 3 x 3 convolutions but the first and the last, on a CPU in float32
        where no gradient is asked for. Pixels change a little; what that gains and costs is in `benchmarks/SPEED.md`.

        Bounds of the feature maps are found on examples, which should be like what will be decoded: a few dozen
        latent states, such as a pipeline's `pipe(class_labels, output_type="latent").images`, or
        `latent_states(tokenize(sample))[-1]` of given images. What lies outside of the bounds later is moved to them.
        As they stay, no image depends on others in its batch, unless float32 layers round in another order in larger
        batches: such a difference can then become a step of int8.

        Weights stay in float32 beside their int8 versions: training, autocast, compiled code, other dtypes and other
        devices use them, as does `decode` after `disable_fast_decoding`, and `save_pretrained` saves them. **Bounds
        are not saved: a model that was loaded decodes in float32 until this is called again.** Call it again, too,
        for new weights; those that were changed behind `.data` are not even noticed before.

        Args:
            latents (`torch.Tensor` of shape `(batch, latent_channels, latent_height, latent_width)`): The examples,
                finite, on the CPU.

        Raises:
            ValueError: If `latents` are none, the decoder's weights are not in float32 on the CPU, or the CPU lacks
                VNNI.
        """
        quantize_decoder(self.decoder, self.decode, latents)

    def disable_int8_decoding(self) -> None:
        """Decode in float32 again, with the very weights that there were."""
        dequantize_decoder(self.decoder)

    @overload
    def encode(self, sample: torch.Tensor, return_dict: Literal[True] = True) -> MultiScaleVQEncoderOutput: ...
    @overload
    def encode(self, sample: torch.Tensor, return_dict: bool) -> MultiScaleVQEncoderOutput | tuple: ...
    @apply_forward_hook
    def encode(self, sample: torch.Tensor, return_dict: bool = True) -> MultiScaleVQEncoderOutput | tuple:
        """
        Encode pixels into the latent map before quantization.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Pixels in [-1, 1].
            return_dict (`bool`, defaults to `True`): Whether to return a [`MultiScaleVQEncoderOutput`].

        Returns:
            [`MultiScaleVQEncoderOutput`] or `(latents,)`.

        Raises:
            ValueError: If `sample` has another shape, or height or width is not a multiple of the compression ratio.
        """
        self._check_maps("sample", sample, self.config.in_channels)
        self._grid_of(*sample.shape[-2:])
        latents = self._encode(sample)
        return MultiScaleVQEncoderOutput(latents) if return_dict else (latents,)

    @overload
    def decode(self, latents: torch.Tensor, return_dict: Literal[True] = True) -> DecoderOutput: ...
    @overload
    def decode(self, latents: torch.Tensor, return_dict: bool) -> DecoderOutput | tuple: ...
    @apply_forward_hook
    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple:
        """
        Decode a latent state into pixels. Without gradients this happens in slices of the batch, so that memory does
        not grow with it, and in another way than with them ([`~MultiScaleVQModel.enable_fast_decoding`]).

        Args:
            latents (`torch.Tensor` of shape `(batch, latent_channels, latent_height, latent_width)`): A latent state.
            return_dict (`bool`, defaults to `True`): Whether to return a `DecoderOutput`.

        Returns:
            `DecoderOutput` or `(sample,)`: Pixels of shape `(batch, out_channels, height, width)`, around [-1, 1], not
            clamped.

        Raises:
            ValueError: If `latents` have another shape or hold no floating-point numbers.
        """
        channels = self.config.latent_channels
        is_batch = isinstance(latents, torch.Tensor) and latents.is_floating_point() and latents.ndim == 4
        if not is_batch or latents.shape[1] != channels or latents.numel() == 0:
            self._check_maps("latents", latents, channels)
        latents = latents.to(self.dtype)
        fast = self.use_fast_decoding and not self.training
        bytes_per_image = latents.shape[-2:].numel() * self._largest_map * latents.element_size()
        # By `module.compile()`, or `torch.compile(module)` in the decoder's place.
        compiled = self.decoder._compiled_call_impl is not None or hasattr(self.decoder, "_orig_mod")
        sample = run_decoder(self._decode, latents, fast, bytes_per_image, self.use_slicing, compiled)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def quantize_latents(self, latents: torch.Tensor, scale_sizes: ScaleSizes | None = None) -> torch.LongTensor:
        """
        Token pyramid of a latent map.

        Args:
            latents (`torch.Tensor` of shape `(batch, latent_channels, latent_height, latent_width)`): A latent map or
                state.
            scale_sizes (`list`, *optional*): Any growing list of scales; the model's own by default. It may stop
                before the latent grid, which gives the coarse part of a pyramid.

        Returns:
            `torch.LongTensor` of shape `(batch, num_tokens)`.

        Raises:
            ValueError: If `latents` have another shape or are not finite, or `scale_sizes` is no growing list.
        """
        self._check_maps("latents", latents, self.config.latent_channels)
        return self._quantize("latents", latents, self._own_or(scale_sizes))

    def sign_codebook(self) -> None:
        """Write the fingerprint of the codebook as it is now, a hash of its codes in float32, into the config."""
        codes = self.quantize.codebook.weight.detach().float().cpu()
        self.register_to_config(codebook_fingerprint=hashlib.sha256(codes.numpy().tobytes()).hexdigest()[:16])

    @apply_forward_hook
    def tokenize(self, sample: torch.Tensor, scale_sizes: ScaleSizes | None = None) -> torch.LongTensor:
        """
        Token pyramid of images.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Pixels in [-1, 1].
            scale_sizes (`list`, *optional*): Any growing list of scales that ends at the latent grid of `sample`; the
                model's own by default.

        Returns:
            `torch.LongTensor` of shape `(batch, num_tokens)`.

        Raises:
            ValueError: If the scales do not end at the latent grid, or `sample` has another shape or its latents are
                not finite.
        """
        scale_sizes = self._own_or(scale_sizes)
        self._check_maps("sample", sample, self.config.in_channels)
        self._check_grid(scale_sizes, self._grid_of(*sample.shape[-2:]))
        return self._quantize("sample", self._encode(sample), scale_sizes)

    @apply_forward_hook
    def residual_map(self, token_map: torch.LongTensor) -> torch.Tensor:
        """
        What one scale adds to the latent state: `phi_k(up(C[z_k]))`.

        Args:
            token_map (`torch.LongTensor` of shape `(batch, scale_height, scale_width)`): Token ids of one scale.

        Returns:
            `torch.Tensor` of shape `(batch, latent_channels, latent_height, latent_width)`.

        Raises:
            ValueError: If `token_map` is of another kind or shape, or there are ids outside the codebook. Nothing is
                read back from accelerators for it: on CUDA such ids are a device-side assertion.
        """
        is_map = isinstance(token_map, torch.Tensor) and token_map.dtype in (torch.int64, torch.int32)
        if not is_map or token_map.ndim != 3 or token_map.numel() == 0:
            raise ValueError(
                "`token_map` must be an int64 or int32 tensor of shape (batch, scale_height, scale_width), got"
                f" {described(token_map)}."
            )
        try:
            return self.quantize.residual_map(token_map, self.config.scale_sizes[-1])
        except IndexError as error:
            raise self._outside_codebook("token_map", token_map) from error

    @apply_forward_hook
    def latent_states(
        self,
        token_ids: torch.LongTensor,
        scale_sizes: ScaleSizes | None = None,
        grid_size: Sequence[int] | None = None,
    ) -> list[torch.Tensor]:
        """
        The latent state after every scale: the reverse process, step by step.

        Args:
            token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`): A packed pyramid over `scale_sizes`.
            scale_sizes (`list`, *optional*): Its scales; the model's own by default.
            grid_size (`(int, int)`, *optional*): The latent grid; the last scale by default.

        Returns:
            `list[torch.Tensor]`: For every scale, float32 of shape `(batch, latent_channels, *grid_size)`.

        Raises:
            ValueError: If `token_ids` is of another kind or length or has ids outside the codebook, or `scale_sizes`
                or `grid_size` is none. Nothing is read back from accelerators for it: on CUDA such ids are a
                device-side assertion.
        """
        scale_sizes = self._own_or(scale_sizes)
        [grid] = scale_sizes[-1:] if grid_size is None else normalize_scale_sizes([grid_size], "grid_size")
        self._check_token_ids(token_ids, scale_sizes)
        try:
            return self.quantize.latent_states(token_ids, scale_sizes, grid)
        except IndexError as error:
            raise self._outside_codebook("token_ids", token_ids) from error

    @apply_forward_hook
    def teacher_forcing_inputs(
        self, token_ids: torch.LongTensor, scale_sizes: ScaleSizes | None = None
    ) -> torch.Tensor:
        """
        The transformer's inputs `x_k = down(f_hat_{k-1}, s_k)` for all scales of a known pyramid. `x_1` is zero: the
        transformer puts the class embedding there.

        Args:
            token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`): A packed pyramid over `scale_sizes`.
            scale_sizes (`list`, *optional*): Its scales; the model's own by default.

        Returns:
            `torch.Tensor` of shape `(batch, num_tokens, latent_channels)`, float32, packed like `token_ids`.

        Raises:
            ValueError: As [`~MultiScaleVQModel.latent_states`] does. No input depends on the ids of the last scale,
                which are not looked at.
        """
        scale_sizes = self._own_or(scale_sizes)
        self._check_token_ids(token_ids, scale_sizes)
        counts = num_tokens_per_scale(scale_sizes)
        shape = (len(token_ids), self.config.latent_channels, counts[0])
        packed = [torch.zeros(shape, dtype=torch.float32, device=token_ids.device)]
        if len(scale_sizes) > 1:
            states = self.latent_states(token_ids[:, : -counts[-1]], scale_sizes[:-1], scale_sizes[-1])
            packed += [area_means(state, size).flatten(2) for state, size in zip(states, scale_sizes[1:])]
        return torch.cat(packed, dim=2).transpose(1, 2)  # (B, N, C)

    @overload
    def decode_tokens(
        self, token_ids: torch.LongTensor, scale_sizes: ScaleSizes | None = None, return_dict: Literal[True] = True
    ) -> DecoderOutput: ...
    @overload
    def decode_tokens(
        self, token_ids: torch.LongTensor, scale_sizes: ScaleSizes | None = None, *, return_dict: bool
    ) -> DecoderOutput | tuple: ...
    def decode_tokens(
        self, token_ids: torch.LongTensor, scale_sizes: ScaleSizes | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple:
        """Pixels of a whole pyramid; arguments as in [`~MultiScaleVQModel.latent_states`], output as in `decode`."""
        return self.decode(self.latent_states(token_ids, scale_sizes)[-1], return_dict=return_dict)

    def codebook_usage(
        self, token_ids: torch.LongTensor, scale_sizes: ScaleSizes | None = None
    ) -> dict[str, list[float]]:
        """
        How much of the codebook every scale uses.

        Args:
            token_ids (`torch.LongTensor` of shape `(batch, num_tokens)`): Pyramids of many images.
            scale_sizes (`list`, *optional*): Their scales; the model's own by default.

        Returns:
            `dict[str, list[float]]`: Per scale, `"usage"`, the share of all codes that occur, in [0, 1], and
            `"perplexity"`, the exponential of the entropy of their distribution, in [1, codebook_size].

        Raises:
            ValueError: If `token_ids` is of another kind or length, empty, or has ids outside the codebook.
        """
        scale_sizes = self._own_or(scale_sizes)
        self._check_token_ids(token_ids, scale_sizes)
        if len(token_ids) == 0:
            raise ValueError(f"`token_ids` must hold at least one pyramid, got {tuple(token_ids.shape)}.")
        if token_ids.min() < 0 or token_ids.max() >= self.config.codebook_size:
            raise self._outside_codebook("token_ids", token_ids)
        usage, perplexity = [], []
        for token_map in split_scales(token_ids, scale_sizes):
            counts = token_map.flatten().bincount(minlength=self.config.codebook_size).float()
            probabilities = counts / counts.sum()
            usage.append((counts > 0).float().mean().item())
            perplexity.append(torch.special.entr(probabilities).sum().exp().item())
        return {"usage": usage, "perplexity": perplexity}

    def forward(
        self, sample: torch.Tensor, num_scales: torch.LongTensor | None = None, return_dict: bool = True
    ) -> MultiScaleVQModelOutput | tuple:
        """
        Reconstruct images through the quantizer, with the quantizer's losses.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, height, width)`): Pixels in [-1, 1], of
                `sample_size`.
            num_scales (`torch.LongTensor` of shape `(batch,)`, *optional*): Of how many scales, coarse to fine, each
                image is decoded, in [1, number of scales]; all of them by default (residual-scale dropout).
            return_dict (`bool`, defaults to `True`): Whether to return a [`MultiScaleVQModelOutput`].

        Returns:
            [`MultiScaleVQModelOutput`] or the tuple of its fields.

        Raises:
            ValueError: If `sample` has another shape, the model's scales do not end at its latent grid, or
                `num_scales` is of another kind or out of range.
        """
        self._check_maps("sample", sample, self.config.in_channels)
        if num_scales is not None:
            self._check_num_scales(num_scales, len(sample))
        self._check_grid(self.config.scale_sizes, self._grid_of(*sample.shape[-2:]))
        latents = self.encode(sample).latents
        quantized = self.quantize(latents, self.config.scale_sizes, num_scales)
        reconstruction = self.decode(quantized.latents).sample
        output = MultiScaleVQModelOutput(
            sample=reconstruction,
            token_ids=quantized.token_ids,
            codebook_loss=quantized.codebook_loss,
            commitment_loss=quantized.commitment_loss,
            latents=latents,
        )
        return output if return_dict else output.to_tuple()

    @property
    def num_tokens(self) -> int:
        """Tokens of a whole pyramid over the model's own scales."""
        return sum(num_tokens_per_scale(self.config.scale_sizes))
