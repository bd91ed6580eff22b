from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging
from typing_extensions import Self

from srdd.area_means import area_means
from srdd.checks import check_choice, check_int, check_number, described, shown
from srdd.scales import Scale, ScaleSizes, normalize_scale_sizes, scale_slices
from srdd.schedulers.token_sampling import Generators, num_candidates, sample_tokens


logger = logging.get_logger(__name__)

GUIDANCE_SCHEDULES = ("linear", "constant")
RESAMPLING_POLICIES = ("none", "simple", "masked", "remasked")

# Options of version 0.1 that are gone: what they may still say in an old config, and what stands in their place.
REMOVED_OPTIONS = {
    "resampling_feedback": (
        (None, "full"),
        "A further pass sees all tokens now; others were no better (`benchmarks/ABLATIONS.md` of version 0.1)",
    ),
    "keep_accepted_tokens": ((True,), 'Where it was False, `resampling_policy="remasked"` judges all tokens anew'),
}

# Most further passes at a scale.
MAX_PASSES = 1000

# A token that is not drawn yet: the absorbing state of the discrete diffusion.
MASK_TOKEN_ID = -1


@dataclass
class ScaleSchedulerOutput(BaseOutput):
    """
    Output of [`ScaleScheduler.step`].

    Args:
        prev_sample (`torch.LongTensor` of shape `(batch, num_tokens)`):
            The packed pyramid with the tokens of this timestep's scale drawn; finer scales are still -1.
        token_probabilities (`torch.Tensor` of shape `(batch, num_scale_tokens)`):
            Probability of every token of the scale under the model's own distribution (float32 softmax of the guided
            logits, before temperature, top-k and top-p).
        resample_mask (`torch.BoolTensor` of shape `(batch, num_scale_tokens)`):
            Tokens that a further pass at this timestep draws again, if there is one.
        is_finite (`torch.BoolTensor` of shape `()`):
            Whether the logits are finite; -inf may forbid single tokens. Where it is false the tokens mean nothing. To
            read it is to wait for the device: pipelines do so once, after their last step.
    """

    prev_sample: torch.LongTensor
    token_probabilities: torch.Tensor
    resample_mask: torch.BoolTensor
    is_finite: torch.BoolTensor


class ScaleScheduler(SchedulerMixin, ConfigMixin):
    r"""
    The scale schedule as diffusion timesteps: `t = K - 1` is the coarsest of the K scales, `t = 0` the finest.

    The sample of the chain is the packed token pyramid. The forward process ([`~ScaleScheduler.add_noise`]) forgets
    scales from the finest on, deterministically: their tokens fall into the absorbing state -1 (paper, Definition 2).
    The reverse step draws the tokens of one scale from the transformer's logits. The scheduler has no weights: what
    tokens look like, the latent state, is the tokenizer's business.

    Parameters:
        scale_sizes (`list`): All scales the model knows, as side lengths or `(height, width)` pairs, coarse to fine.
        scales (`list`, *optional*): The scales to visit, a part of `scale_sizes` that keeps the first and the last;
            all of them by default. A distilled model is the same model with a shorter list (paper Section 3.3 d).
        guidance_schedule (`str`, defaults to `"linear"`): How the guidance weight runs over the scales. `"linear"`
            (VAR) grows from 0 at the coarsest to its full value at the finest, `"constant"` is the same everywhere.
        guidance_start (`float`, defaults to 0.0): The share of all scales, counted from the coarsest, before which
            there is no guidance, as in diffusers' guiders.
        guidance_stop (`float`, defaults to 1.0): The share of all scales from which on there is none. A Markov model
            then draws the scales outside at half the cost; the finest two of ten hold 62 % of the tokens.
        temperature (`float` or `list[float]`, defaults to 1.0): Temperature of the draw; 0 takes the most probable
            token. A list gives one number for each of `scale_sizes`.
        top_k (`int`, defaults to 0): Draw among this many most probable tokens; 0 is off.
        top_p (`float`, defaults to 1.0): Draw among the most probable tokens with this total probability; 1 is off.
        resampling_policy (`str`, defaults to `"none"`): Which tokens of a scale further passes draw again (paper,
            Section 4.2); they see the state with all tokens of the pass before. `"none"` (SDD) makes none. `"simple"`
            (SR): all tokens. `"masked"` (MR): those whose probability is below the threshold; the others are final,
            and what they made others see stays, so that a pass computes only what it draws. `"remasked"`: the same,
            but every pass computes and judges all tokens anew, as the paper may be read. It takes longer, helps a
            weak model and spoils the images of a well-trained one (`benchmarks/ABLATIONS.md`).
        resampling_threshold (`float`, defaults to 0.01): The threshold of `"masked"` and `"remasked"`.
        num_resampling_passes (`int` or `list[int]`, defaults to 5): Most further passes at a scale; a list gives one
            number for each of `scale_sizes`.
        guidance_scale (`float`, *optional*): The guidance of calls that name none, which was found best with the
            options above; the pipeline's own by default. A guidance-distilled transformer needs none all the same.

    Raises:
        ValueError: If a value is not one of those above.
    """

    order = 1
    init_noise_sigma = 1.0

    config: Any  # diffusers says a dict, of which type checkers know no attributes
    if TYPE_CHECKING:  # and that these two give tuples, as they do with `return_unused_kwargs`

        @classmethod
        def from_config(cls, config: Any = None, **kwargs: Any) -> Self: ...
        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any = None, **kwargs: Any) -> Self: ...

    @register_to_config
    def __init__(
        self,
        scale_sizes: ScaleSizes = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        scales: ScaleSizes | None = None,
        guidance_schedule: str = "linear",
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        temperature: float | list[float] = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        resampling_policy: str = "none",
        resampling_threshold: float = 0.01,
        num_resampling_passes: int | list[int] = 5,
        guidance_scale: float | None = None,
    ):
        scale_sizes = normalize_scale_sizes(scale_sizes)
        if scales is not None:
            scales = normalize_scale_sizes(scales, "scales")
            ends_kept = scales[0] == scale_sizes[0] and scales[-1] == scale_sizes[-1]
            if not ends_kept or any(size not in scale_sizes for size in scales):
                raise ValueError(
                    "`scales` must be a part of `scale_sizes` that keeps its first and its last, got"
                    f" {_readable(scales)} for {_readable(scale_sizes)}."
                )
        self.scales: list[list[int]] = scales or scale_sizes
        # What a run visits, coarse to fine, and the tokens of a pyramid over it.
        self.visits: tuple[Scale, ...] = tuple(
            Scale(len(scale_sizes) - 1 - scale_sizes.index(size), tuple(size), tokens)
            for size, tokens in zip(self.scales, scale_slices(self.scales))
        )
        self.num_tokens: int = self.visits[-1].tokens.stop
        check_choice("guidance_schedule", guidance_schedule, GUIDANCE_SCHEDULES)
        check_choice("resampling_policy", resampling_policy, RESAMPLING_POLICIES)
        num_scales = len(scale_sizes)
        if not isinstance(temperature, (list, tuple)):
            temperature = check_number("temperature", temperature, 0)
        else:
            _check_one_for_each("temperature", temperature, "a number", num_scales)
            temperature = [check_number("temperature", each, 0) for each in temperature]
        if not isinstance(num_resampling_passes, (list, tuple)):
            passes = check_int("num_resampling_passes", num_resampling_passes, 0, MAX_PASSES)
        else:
            _check_one_for_each("num_resampling_passes", num_resampling_passes, "an integer", num_scales)
            passes = [check_int("num_resampling_passes", count, 0, MAX_PASSES) for count in num_resampling_passes]
        guidance_start = check_number("guidance_start", guidance_start, 0, 1)
        self.register_to_config(
            scale_sizes=scale_sizes,
            scales=scales,
            guidance_start=guidance_start,
            guidance_stop=check_number("guidance_stop", guidance_stop, guidance_start, 1),
            temperature=temperature,
            top_k=check_int("top_k", top_k, 0),
            top_p=check_number("top_p", top_p, over=0, high=1),
            resampling_threshold=check_number("resampling_threshold", resampling_threshold, 0, 1),
            num_resampling_passes=passes,
            guidance_scale=guidance_scale
            if guidance_scale is None
            else check_number("guidance_scale", guidance_scale),
        )
        # By timestep.
        self.temperatures: dict[int, float] = {
            scale.timestep: temperature[-1 - scale.timestep] if isinstance(temperature, list) else temperature
            for scale in self.visits
        }
        self.set_timesteps()

    @property
    def compatibles(self) -> list[type[SchedulerMixin]]:
        """
        Scheduler classes that understand this config: this one; no other draws tokens scale by scale. diffusers looks
        for names in itself alone, and its tests of schedulers fail where it finds none.
        """
        return [type(self)]

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """
        As [`ConfigMixin`] has it, for configs of version 0.1, too.

        Raises:
            ValueError: If an option that is gone has another value than the one that all configs mean now.
        """
        options = {**config_dict, **kwargs}
        for name, (allowed, replacement) in REMOVED_OPTIONS.items():
            if name in options and options[name] not in allowed:
                raise ValueError(f"`{name}` is gone since version 0.2, got {options[name]!r}. {replacement}.")
        policy = options.get("resampling_policy")
        if isinstance(policy, str) and policy == "learned":
            raise ValueError(
                "`resampling_policy` 'learned' is gone since version 0.2, and its token critic with it: it was no"
                " better than 'masked' (`benchmarks/ABLATIONS.md`)."
            )
        given = {name for name, value in kwargs.items() if value is not None}  # modular pipelines tell `variant=None`
        unknown = sorted(given - {*REMOVED_OPTIONS} - cls._get_init_keys(cls))
        if unknown:
            logger.warning(f"{cls.__name__} has no options {unknown}: they are ignored.")
        config_dict, kwargs = (
            {name: value for name, value in given.items() if name not in REMOVED_OPTIONS}
            for given in (config_dict, kwargs)
        )
        return super().extract_init_dict(config_dict, **kwargs)

    @property
    def keeps_accepted_tokens(self) -> bool:
        """Whether accepted tokens are final, and further passes compute only those that they draw again."""
        return self.config.resampling_policy == "masked"

    @property
    def num_train_timesteps(self) -> int:
        """Number of all scales K."""
        return len(self.config.scale_sizes)

    def visit(self, timestep: int | torch.Tensor) -> Scale:
        """
        The visited scale of a timestep.

        Raises:
            ValueError: If no visited scale has it.
        """
        if isinstance(timestep, (torch.Tensor, np.ndarray)):
            timestep = timestep.item() if timestep.shape in ((), (1,)) else timestep.tolist()
        for scale in self.visits:
            if scale.timestep == timestep:
                return scale
        raise ValueError(
            f"`timestep` must be one of {[scale.timestep for scale in self.visits]}, got {shown(timestep)}."
        )

    def num_passes(self, timestep: int | torch.Tensor) -> int:
        """How many passes the config wants at a scale at most: one, and the further ones of the resampling policy."""
        timestep, further = self.visit(timestep).timestep, self.config.num_resampling_passes
        if self.config.resampling_policy == "none":
            return 1
        return 1 + (further if isinstance(further, int) else further[-1 - timestep])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """
        Set the timesteps of a run. A further pass at a scale repeats its timestep.

        Args:
            num_inference_steps (`int`, *optional*): Number of visited scales. It follows from the config; another
                value is an error rather than another schedule.
            device (`str` or `torch.device`, *optional*): Where `timesteps` lies.
            timesteps (`Sequence[int]`, *optional*): The timesteps themselves, for another number of passes at chosen
                scales; every visited scale occurs, coarse to fine. Pipelines draw with them until they are set anew.
                With the policy "none" a repeated one draws all tokens of its scale again.

        Raises:
            ValueError: If the steps do not fit the visited scales.
        """
        scale_timesteps = [scale.timestep for scale in self.visits]
        if num_inference_steps is not None and num_inference_steps != len(scale_timesteps):
            raise ValueError(
                f"`num_inference_steps` must be {len(scale_timesteps)}, the number of scales in"
                f" {_readable(self.scales)}, got {shown(num_inference_steps)}. Other steps are other scales:"
                " `ScaleScheduler.from_config(scheduler.config, scales=...)`."
            )
        if timesteps is None:
            timesteps = [t for t in scale_timesteps for _ in range(self.num_passes(t))]
        else:
            values = timesteps.tolist() if isinstance(timesteps, (torch.Tensor, np.ndarray)) else timesteps
            timesteps = list(values) if isinstance(values, (list, tuple, range)) else []
            are_integers = all(isinstance(t, Integral) and not isinstance(t, bool) for t in timesteps)
            if not are_integers or timesteps != sorted(timesteps, reverse=True) or {*timesteps} != {*scale_timesteps}:
                raise ValueError(f"`timesteps` must be {scale_timesteps}, each once or repeated, got {shown(values)}.")
            if len(timesteps) > (1 + MAX_PASSES) * len(scale_timesteps):
                raise ValueError(f"`timesteps` must repeat none more than {MAX_PASSES} times, got {len(timesteps)}.")
        self.num_inference_steps = len(scale_timesteps)
        self.timesteps = torch.tensor(timesteps, dtype=torch.long, device=device)
        # Every visited scale with the places of its passes in `timesteps`, for who must not read these from a device.
        starts = [timesteps.index(t) for t in scale_timesteps]
        self.passes: tuple[tuple[Scale, range], ...] = tuple(
            (scale, range(start, start + timesteps.count(scale.timestep))) for scale, start in zip(self.visits, starts)
        )
        # Whether every pass draws all tokens of its scale. What is computed then does not depend on what was drawn,
        # and a run need not look at it.
        self.draws_all_tokens: bool = self.config.resampling_policy in ("none", "simple") or len(timesteps) == len(
            scale_timesteps
        )

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        """
        What the transformer sees of the latent state: `x_k = down(f_hat_{k-1}, s_k)`, area interpolation.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): A latent state.
            timestep (`int`): The timestep of scale k.

        Returns:
            `torch.Tensor` of shape `(batch, num_scale_tokens, channels)`.

        Raises:
            ValueError: If `sample` is no latent state, or no visited scale has the timestep.
        """
        if not isinstance(sample, torch.Tensor) or not sample.is_floating_point() or sample.ndim != 4:
            raise ValueError(
                f"`sample` must be a latent state, (batch, channels, height, width), got {shown(sample)}."
            )
        return area_means(sample, self.visit(timestep).size).flatten(2).transpose(1, 2)  # (B, N_k, C)

    def guidance_weight(self, timestep: int | torch.Tensor, guidance_scale: float) -> float:
        """
        The weight `w_k` in `cond + w_k (cond - uncond)`, which is `uncond + g_k (cond - uncond)` with `g_k = 1 + w_k`.

        This is the one place where diffusers' `guidance_scale` becomes VAR's and the paper's `cfg = guidance_scale -
        1` and where the ramp is applied. Ramp, start and stop belong to the scale: a schedule over fewer scales guides
        those it has as the full one does.

        Args:
            timestep (`int`): A timestep.
            guidance_scale (`float`): Guidance in diffusers' sense; 1 and below is off.

        Returns:
            `float`: At least 0.
        """
        weight = max(guidance_scale - 1.0, 0.0)
        num_scales = len(self.config.scale_sizes)
        scale = num_scales - 1 - self.visit(timestep).timestep
        if not self.config.guidance_start <= scale / num_scales < self.config.guidance_stop:
            return 0.0
        if self.config.guidance_schedule == "constant" or num_scales == 1:
            return weight
        return weight * scale / (num_scales - 1)

    def guidance_weights(self, guidance_scale: float) -> torch.Tensor:
        """The weight of every token of the pyramid, float32 of shape `(num_tokens,)`."""
        weights = [self.guidance_weight(scale.timestep, guidance_scale) for scale in self.visits]
        return torch.tensor(weights).repeat_interleave(torch.tensor([scale.num_tokens for scale in self.visits]))

    def noise_shape(self, scale: Scale, batch_size: int, codebook_size: int) -> tuple[int, int, int]:
        """Shape of the noise that a pass at a scale needs, where the temperature is not 0."""
        return batch_size, scale.num_tokens, num_candidates(codebook_size, self.config.top_k)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        resample_mask: torch.BoolTensor | None = None,
        known_mask: torch.BoolTensor | None = None,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> ScaleSchedulerOutput | tuple:
        """
        Draw the tokens of one scale: the reverse step of the chain, or a further pass at it.

        Args:
            model_output (`torch.Tensor` of shape `(batch, num_scale_tokens, codebook_size)`): Guided logits.
            timestep (`int`): The timestep of the scale.
            sample (`torch.LongTensor` of shape `(batch, num_tokens)`): The packed pyramid.
            resample_mask (`torch.BoolTensor` of shape `(batch, num_scale_tokens)`, *optional*): The tokens to draw,
                from the output of the pass before; all by default.
            known_mask (`torch.BoolTensor` of shape `(batch, num_scale_tokens)`, *optional*): Tokens that stay as they
                are in `sample`, in every pass (inpainting); none by default.
            generator (`torch.Generator` or a list with one for each image, *optional*): The only source of randomness.
            noise (`torch.Tensor` of shape `(batch, num_scale_tokens, num_candidates)`, *optional*): Exponential noise
                that was drawn before, of [`~ScaleScheduler.noise_shape`], in place of the generator's.
            return_dict (`bool`, defaults to `True`): Whether to return a [`ScaleSchedulerOutput`].

        Returns:
            [`ScaleSchedulerOutput`] or the tuple of its fields. Logits that are not finite are told there, in
            `is_finite`.

        Raises:
            ValueError: If shapes do not fit the schedule, or the number of generators is not the batch size.
        """
        scale = self.visit(timestep)
        for name, tensor in (("model_output", model_output), ("sample", sample)):
            if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point() == (name == "sample"):
                kind = "integers" if name == "sample" else "floats"
                raise ValueError(f"`{name}` must be a torch.Tensor of {kind}, got {shown(tensor)}.")
        if sample.ndim != 2 or sample.shape[1] != self.num_tokens or sample.dtype == torch.bool:
            raise ValueError(
                f"`sample` must be ids of shape (batch, {self.num_tokens}), got {sample.dtype} of shape"
                f" {tuple(sample.shape)}."
            )
        batch_size = len(sample)
        token_ids = sample[:, scale.tokens]
        if model_output.shape[:2] != token_ids.shape or model_output.ndim != 3:
            raise ValueError(
                f"`model_output` must have shape ({batch_size}, {scale.num_tokens}, codebook_size) at timestep"
                f" {scale.timestep}, got {tuple(model_output.shape)}."
            )
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * (generator is not None)
        if not all(isinstance(each, torch.Generator) for each in generators):
            raise ValueError(f"`generator` must be a torch.Generator, a list of them or None, got {shown(generator)}.")
        if isinstance(generator, (list, tuple)) and len(generator) != batch_size:
            raise ValueError(f"`generator` must be a list of {batch_size} generators, got {len(generator)}.")
        for name, mask in (("resample_mask", resample_mask), ("known_mask", known_mask)):
            is_mask = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.shape == token_ids.shape
            if mask is not None and not is_mask:
                given = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else shown(mask)
                raise ValueError(
                    f"`{name}` must be a torch.BoolTensor of shape {tuple(token_ids.shape)}, got {given}."
                )
        if noise is not None:
            noise_shape = self.noise_shape(scale, batch_size, model_output.shape[-1])
            if not isinstance(noise, torch.Tensor) or noise.shape != noise_shape or not noise.is_floating_point():
                raise ValueError(f"`noise` must be floats of shape {noise_shape}, got {described(noise)}.")

        log_normalizer = model_output.float().logsumexp(dim=-1)  # (B, N_k)
        config, draw_mask = self.config, resample_mask
        if known_mask is not None:
            draw_mask = ~known_mask if resample_mask is None else resample_mask & ~known_mask
        image_mask = None if draw_mask is None else draw_mask.any(dim=1)
        if image_mask is None or image_mask.any():
            temperature = self.temperatures[scale.timestep]
            drawn_ids = sample_tokens(
                model_output, temperature, config.top_k, config.top_p, generator, image_mask, noise
            )
            token_ids = drawn_ids if draw_mask is None else torch.where(draw_mask, drawn_ids, token_ids)
        chosen = model_output.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1).float()
        probabilities = (chosen - log_normalizer).exp()

        if config.resampling_policy in ("masked", "remasked"):
            resample_mask = probabilities < config.resampling_threshold
        else:
            resample_mask = torch.ones_like(token_ids, dtype=torch.bool)
        if draw_mask is not None:
            # An image without tokens to draw is finished at this scale, whatever its neighbours still need.
            resample_mask &= draw_mask if self.keeps_accepted_tokens else image_mask.unsqueeze(1)
        if known_mask is not None:
            resample_mask &= ~known_mask
        prev_sample = sample.clone()
        prev_sample[:, scale.tokens] = token_ids
        is_finite = log_normalizer.isfinite().all()
        if not return_dict:
            return prev_sample, probabilities, resample_mask, is_finite
        return ScaleSchedulerOutput(prev_sample, probabilities, resample_mask, is_finite)

    def add_noise(
        self,
        original_samples: torch.LongTensor,
        noise: torch.Tensor | None = None,
        timesteps: int | torch.LongTensor = 0,
    ) -> torch.LongTensor:
        """
        The forward process `q(x_t | x_0)`: at timestep `t` the scales of timesteps `t ... 0` are forgotten.

        It is deterministic (paper, Proposition 1, assumption 1). [`~ScaleScheduler.step`] at `t` undoes its last step.

        Args:
            original_samples (`torch.LongTensor` of shape `(batch, num_tokens)`): Whole pyramids.
            noise (`torch.Tensor`, *optional*): Not used; the process has no noise.
            timesteps (`int` or `torch.LongTensor` of shape `(batch,)`, defaults to 0):
                Timesteps of the visited scales.

        Returns:
            `torch.LongTensor` of shape `(batch, num_tokens)`: Pyramids with -1 for every forgotten token.

        Raises:
            ValueError: If `original_samples` are no ids or of another shape, no visited scale has a timestep, or there
                are neither one nor as many timesteps as images.
        """
        is_tensor = isinstance(original_samples, torch.Tensor) and original_samples.dtype != torch.bool
        if not is_tensor or original_samples.is_floating_point():
            raise ValueError(f"`original_samples` must be a torch.Tensor of ids, got {described(original_samples)}.")
        if original_samples.ndim != 2 or original_samples.shape[1] != self.num_tokens:
            raise ValueError(
                f"`original_samples` must have shape (batch, {self.num_tokens}), got {tuple(original_samples.shape)}."
            )
        device, batch_size = original_samples.device, len(original_samples)
        values = timesteps.tolist() if isinstance(timesteps, (torch.Tensor, np.ndarray)) else timesteps
        values = list(values) if isinstance(values, (list, tuple)) else [values]
        if len(values) not in (1, batch_size):
            raise ValueError(
                f"`timesteps` must be an integer or {batch_size} of them, one for each image, got {shown(values)}."
            )
        starts = torch.tensor([self.visit(timestep).tokens.start for timestep in values], device=device)
        forgotten = torch.arange(self.num_tokens, device=device) >= starts.unsqueeze(1)
        return original_samples.masked_fill(forgotten, MASK_TOKEN_ID)

    def __len__(self) -> int:
        return self.num_train_timesteps


def _check_one_for_each(name: str, values: Sequence, kind: str, num_scales: int) -> None:
    if len(values) != num_scales:
        raise ValueError(f"`{name}` must be {kind} or a list of {num_scales} of them, got {shown(values)}.")


def _readable(sizes: list[list[int]]) -> list:
    return [height if height == width else (height, width) for height, width in sizes]
