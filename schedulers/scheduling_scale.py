import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from srdd.scales import Scale, ScaleSizes, normalize_scale_sizes, num_tokens_per_scale, scale_slices
from srdd.schedulers.token_sampling import Generators, sample_tokens


GUIDANCE_SCHEDULES = ("linear", "constant")
RESAMPLING_POLICIES = ("none", "simple", "masked", "learned")
RESAMPLING_FEEDBACKS = ("full", "kept", "time_travel", "redraw")

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
            Tokens that a further pass at this timestep draws again; with the policy "learned" those that it may draw
            again, as the critic has yet to judge them.
        feedback_mask (`torch.BoolTensor` of shape `(batch, num_scale_tokens)`, *optional*):
            Tokens that the further pass sees; `None` if it sees all.
    """

    prev_sample: torch.LongTensor
    token_probabilities: torch.Tensor
    resample_mask: torch.BoolTensor
    feedback_mask: torch.BoolTensor | None = None


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
        temperature (`float`, defaults to 1.0): Temperature of the draw; 0 takes the most probable token.
        top_k (`int`, defaults to 0): Draw among this many most probable tokens; 0 is off.
        top_p (`float`, defaults to 1.0): Draw among the most probable tokens with this total probability; 1 is off.
        resampling_policy (`str`, defaults to `"none"`): `"none"` (SDD); `"simple"` (SR) draws all tokens of a scale
            again in each further pass; `"masked"` (MR) those whose probability is below the threshold (paper Section
            4.2). `"learned"`, not in the paper: those whose probability of being right, as a token critic judges it
            from the pass that they are fed back to, is below the threshold. It makes no further pass at the coarsest
            scale, whose input the transformer does not read, and needs the feedback `"full"`.
        resampling_threshold (`float`, defaults to 0.01): The threshold of `"masked"` and of `"learned"`. A critic's
            probabilities lie higher than a token's own: 0.01 is far too low for them.
        num_resampling_passes (`int` or `list[int]`, defaults to 5): Most further passes at a scale; a list gives one
            number for each of `scale_sizes`.
        resampling_feedback (`str`, *optional*): What a further pass is fed, which the paper leaves open. `"full"`: the
            state with all tokens of the last pass. `"kept"`: with those that are not drawn again. `"time_travel"`: the
            state before the scale, re-tokenised from the state after it. `"redraw"`: nothing; low tokens are drawn
            again from the same logits, which costs no pass. By default `"kept"` with the policy `"masked"` where
            `keep_accepted_tokens` is false, `"full"` otherwise.
        keep_accepted_tokens (`bool`, defaults to `True`): With the policy `"masked"` and the feedback `"full"` or
            `"kept"`, whether tokens at or above the threshold are final. Further passes then compute nothing but the
            tokens that they draw again, which see the others as the pass did that accepted them. Otherwise every pass
            computes and judges all tokens anew, as the paper may be read: it takes longer and, with the feedback
            `"full"`, spoils the images of a well-trained model. The defaults are the best of what was measured
            (`benchmarks/ABLATIONS.md`).

    Raises:
        ValueError: If a value is not one of those above.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        scale_sizes: ScaleSizes = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        scales: ScaleSizes | None = None,
        guidance_schedule: str = "linear",
        guidance_start: float = 0.0,
        guidance_stop: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        resampling_policy: str = "none",
        resampling_threshold: float = 0.01,
        num_resampling_passes: int | list[int] = 5,
        resampling_feedback: str | None = None,
        keep_accepted_tokens: bool = True,
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
        self.register_to_config(scale_sizes=scale_sizes, scales=scales)
        self.scales: list[list[int]] = scales or scale_sizes
        # What a run visits, coarse to fine: the one description of a scale for all that follows.
        self.visits: tuple[Scale, ...] = tuple(
            Scale(len(scale_sizes) - 1 - scale_sizes.index(size), tuple(size), tokens)
            for size, tokens in zip(self.scales, scale_slices(self.scales))
        )
        _check_choice("guidance_schedule", guidance_schedule, GUIDANCE_SCHEDULES)
        _check_choice("resampling_policy", resampling_policy, RESAMPLING_POLICIES)
        _check_choice("resampling_feedback", resampling_feedback, (*RESAMPLING_FEEDBACKS, None))
        if resampling_policy == "simple" and resampling_feedback in ("kept", "redraw"):
            raise ValueError(
                "`resampling_feedback` must be 'full' or 'time_travel' with the policy 'simple', which keeps no token,"
                f" got {resampling_feedback!r}."
            )
        if resampling_policy == "learned" and resampling_feedback not in ("full", None):
            raise ValueError(
                "`resampling_feedback` must be 'full' with the policy 'learned', which judges all tokens that are fed"
                f" back, got {resampling_feedback!r}."
            )
        passes = [num_resampling_passes] if isinstance(num_resampling_passes, int) else list(num_resampling_passes)
        if any(not isinstance(count, int) or count < 0 for count in passes) or (
            not isinstance(num_resampling_passes, int) and len(passes) != len(scale_sizes)
        ):
            raise ValueError(
                "`num_resampling_passes` must be a non-negative integer, or a list of"
                f" {len(scale_sizes)} of them, got {num_resampling_passes}."
            )
        for name, value, allowed, rule in (
            ("guidance_start", guidance_start, 0 <= guidance_start <= 1, "in [0, 1]"),
            ("guidance_stop", guidance_stop, guidance_start <= guidance_stop <= 1, "in [guidance_start, 1]"),
            ("temperature", temperature, 0 <= temperature < math.inf, "at least 0"),
            ("top_k", top_k, isinstance(top_k, int) and top_k >= 0, "a non-negative integer"),
            ("top_p", top_p, 0 < top_p <= 1, "in (0, 1]"),
            ("resampling_threshold", resampling_threshold, 0 <= resampling_threshold <= 1, "in [0, 1]"),
        ):
            if not allowed:
                raise ValueError(f"`{name}` must be {rule}, got {value}.")
        self.set_timesteps()

    @property
    def compatibles(self) -> list[type[SchedulerMixin]]:
        """Scheduler classes that understand this config: this one; no other draws tokens scale by scale."""
        return [type(self)]

    @property
    def resampling_feedback(self) -> str:
        """What a further pass is fed: the config's choice, or the policy's."""
        judges_anew = self.config.resampling_policy == "masked" and not self.config.keep_accepted_tokens
        return self.config.resampling_feedback or ("kept" if judges_anew else "full")

    @property
    def has_partial_passes(self) -> bool:
        """Whether accepted tokens stay, and further passes compute only those that they draw again."""
        keeps = self.config.resampling_policy == "masked" and self.config.keep_accepted_tokens
        return keeps and self.resampling_feedback in ("full", "kept")

    @property
    def num_train_timesteps(self) -> int:
        """Number of all scales K."""
        return len(self.config.scale_sizes)

    @property
    def num_tokens(self) -> int:
        """Tokens of a pyramid over the visited scales."""
        return sum(num_tokens_per_scale(self.scales))

    def scale_size(self, timestep: int | torch.Tensor) -> tuple[int, int]:
        """`(height, width)` of a timestep's scale."""
        return tuple(self.config.scale_sizes[-1 - self._check_timestep(timestep)])

    def token_slice(self, timestep: int | torch.Tensor) -> slice:
        """Where a timestep's scale lies in the packed pyramid."""
        return scale_slices(self.scales)[self.scales.index(list(self.scale_size(timestep)))]

    def coarser_scales(self, timestep: int | torch.Tensor) -> list[list[int]]:
        """The visited scales before a timestep's, coarse to fine."""
        return self.scales[: self.scales.index(list(self.scale_size(timestep)))]

    def scale_timesteps(self) -> list[int]:
        """One timestep for each visited scale, coarse to fine."""
        last = len(self.config.scale_sizes) - 1
        return [last - self.config.scale_sizes.index(size) for size in self.scales]

    def _check_timestep(self, timestep: int | torch.Tensor) -> int:
        value, allowed = int(timestep), self.scale_timesteps()
        if value not in allowed:
            raise ValueError(f"`timestep` must be one of {allowed}, got {value}.")
        return value

    def num_passes(self, timestep: int | torch.Tensor) -> int:
        """How often a timestep is repeated at most: one pass, and the further ones of the resampling policy."""
        return 1 if self.resampling_feedback == "redraw" else 1 + self._num_further_passes(timestep)

    def _num_further_passes(self, timestep: int | torch.Tensor) -> int:
        coarsest = self._check_timestep(timestep) == self.num_train_timesteps - 1
        if self.config.resampling_policy == "none" or (self.config.resampling_policy == "learned" and coarsest):
            return 0
        passes = self.config.num_resampling_passes
        return passes if isinstance(passes, int) else passes[-1 - self._check_timestep(timestep)]

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
                scales; every visited scale occurs, coarse to fine.

        Raises:
            ValueError: If the steps do not fit the visited scales.
        """
        scale_timesteps = self.scale_timesteps()
        if num_inference_steps is not None and num_inference_steps != len(scale_timesteps):
            raise ValueError(
                f"`num_inference_steps` must be {len(scale_timesteps)}, the number of scales in"
                f" {_readable(self.scales)}, got {num_inference_steps}. Other steps are other scales:"
                " `ScaleScheduler.from_config(scheduler.config, scales=...)`."
            )
        if timesteps is None:
            timesteps = [t for t in scale_timesteps for _ in range(self.num_passes(t))]
        elif list(dict.fromkeys(timesteps)) != scale_timesteps or sorted(timesteps, reverse=True) != list(timesteps):
            raise ValueError(f"`timesteps` must be {scale_timesteps}, each once or repeated, got {list(timesteps)}.")
        self.num_inference_steps = len(scale_timesteps)
        self.timesteps = torch.tensor(list(timesteps), dtype=torch.long, device=device)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        """
        What the transformer sees of the latent state: `x_k = down(f_hat_{k-1}, s_k)`, area interpolation.

        Args:
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`): A latent state.
            timestep (`int`): The timestep of scale k.

        Returns:
            `torch.Tensor` of shape `(batch, num_scale_tokens, channels)`.
        """
        size = self.scale_size(timestep)
        if tuple(sample.shape[-2:]) != size:
            sample = F.interpolate(sample, size=size, mode="area")
        return sample.flatten(2).transpose(1, 2)  # (B, N_k, C)

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
        scale = num_scales - 1 - self._check_timestep(timestep)
        if not self.config.guidance_start <= scale / num_scales < self.config.guidance_stop:
            return 0.0
        if self.config.guidance_schedule == "constant" or num_scales == 1:
            return weight
        return weight * scale / (num_scales - 1)

    def guidance_weights(self, guidance_scale: float) -> torch.Tensor:
        """The weight of every token of the pyramid, float32 of shape `(num_tokens,)`."""
        weights = [self.guidance_weight(timestep, guidance_scale) for timestep in self.scale_timesteps()]
        return torch.tensor(weights).repeat_interleave(torch.tensor(num_tokens_per_scale(self.scales)))

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.LongTensor,
        resample_mask: torch.BoolTensor | None = None,
        known_mask: torch.BoolTensor | None = None,
        confidence: torch.Tensor | None = None,
        generator: Generators = None,
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
            confidence (`torch.Tensor` of shape `(batch, num_scale_tokens)`, *optional*): Probabilities that the tokens
                of the scale in `sample` are right. The policy `"learned"` needs them in every pass with a
                `resample_mask`; nothing else reads them.
            generator (`torch.Generator` or a list with one for each image, *optional*): The only source of randomness.
            return_dict (`bool`, defaults to `True`): Whether to return a [`ScaleSchedulerOutput`].

        Returns:
            [`ScaleSchedulerOutput`] or the tuple of its fields.

        Raises:
            ValueError: If shapes do not fit the schedule, the number of generators is not the batch size, the logits
                are not finite, or the policy `"learned"` gets no probabilities as `confidence`.
        """
        tokens = self.token_slice(timestep)
        batch_size, num_scale_tokens = sample.shape[0], tokens.stop - tokens.start
        if tuple(sample.shape) != (batch_size, self.num_tokens):
            raise ValueError(f"`sample` must have shape (batch, {self.num_tokens}), got {tuple(sample.shape)}.")
        if tuple(model_output.shape[:2]) != (batch_size, num_scale_tokens) or model_output.ndim != 3:
            raise ValueError(
                f"`model_output` must have shape ({batch_size}, {num_scale_tokens}, codebook_size) at timestep"
                f" {int(timestep)}, got {tuple(model_output.shape)}."
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` must be a list of {batch_size} generators, got {len(generator)}.")
        log_normalizer = model_output.float().logsumexp(dim=-1)  # (B, N_k)
        if not log_normalizer.isfinite().all():
            raise ValueError(
                "`model_output` must be finite (-inf may forbid single tokens), got NaN or infinite logits at timestep"
                f" {int(timestep)}."
            )

        token_ids = sample[:, tokens]
        if self.config.resampling_policy == "learned" and resample_mask is not None:
            resample_mask = resample_mask & self._is_distrusted(confidence, token_ids.shape)
        if known_mask is not None:
            resample_mask = ~known_mask if resample_mask is None else resample_mask & ~known_mask
        redraws = self._num_further_passes(timestep) if self.resampling_feedback == "redraw" else 0
        for index in range(1 + redraws):
            token_ids = self._draw(model_output, token_ids, resample_mask, generator)
            chosen = model_output.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1).float()
            probabilities = (chosen - log_normalizer).exp()
            wanted = self._resample_mask(probabilities)
            if known_mask is not None:
                wanted = wanted & ~known_mask
            if resample_mask is not None:
                # An image without tokens to draw again is finished at this scale, whatever its neighbours still need.
                may_be = resample_mask if self.has_partial_passes else resample_mask.any(dim=1, keepdim=True)
                wanted = wanted & may_be
            resample_mask = wanted
            # Asking the device makes it wait, so only where there is something to decide.
            if index < redraws and not resample_mask.any():
                break

        prev_sample = sample.clone()
        prev_sample[:, tokens] = token_ids
        feedback_mask = ~resample_mask if self.resampling_feedback == "kept" else None
        output = ScaleSchedulerOutput(prev_sample, probabilities, resample_mask, feedback_mask)
        return output if return_dict else (prev_sample, probabilities, resample_mask, feedback_mask)

    def _draw(self, logits, token_ids, resample_mask, generator) -> torch.LongTensor:
        rows = None if resample_mask is None else resample_mask.any(dim=1)
        if rows is not None and not rows.any():
            return token_ids
        drawn = sample_tokens(
            logits, self.config.temperature, self.config.top_k, self.config.top_p, generator=generator, rows=rows
        )
        return drawn if resample_mask is None else torch.where(resample_mask, drawn, token_ids)

    def _resample_mask(self, probabilities: torch.Tensor) -> torch.BoolTensor:
        """Tokens that the policy wants to draw again, or to have judged before that."""
        if self.config.resampling_policy == "masked":
            return probabilities < self.config.resampling_threshold
        return torch.full_like(probabilities, self.config.resampling_policy != "none", dtype=torch.bool)

    def _is_distrusted(self, confidence: torch.Tensor | None, shape: torch.Size) -> torch.BoolTensor:
        """Tokens that the critic takes for wrong."""
        if confidence is None or confidence.shape != shape:
            raise ValueError(
                f"`confidence` must have shape {tuple(shape)} in further passes of the policy 'learned', got"
                f" {None if confidence is None else tuple(confidence.shape)}."
            )
        if not ((confidence >= 0) & (confidence <= 1)).all():
            low, high = (bound.item() for bound in confidence.aminmax())
            raise ValueError(f"`confidence` must hold probabilities in [0, 1], got [{low:.3g}, {high:.3g}].")
        return confidence < self.config.resampling_threshold

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
        """
        if original_samples.ndim != 2 or original_samples.shape[1] != self.num_tokens:
            raise ValueError(
                f"`original_samples` must have shape (batch, {self.num_tokens}), got {tuple(original_samples.shape)}."
            )
        device = original_samples.device
        timesteps = torch.as_tensor(timesteps, device=device).expand(original_samples.shape[0])
        starts = torch.tensor([self.token_slice(t).start for t in timesteps.tolist()], device=device)
        forgotten = torch.arange(self.num_tokens, device=device) >= starts.unsqueeze(1)
        return original_samples.masked_fill(forgotten, MASK_TOKEN_ID)

    def __len__(self) -> int:
        return self.num_train_timesteps


def _readable(sizes: list[list[int]]) -> list:
    return [height if height == width else (height, width) for height, width in sizes]


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {tuple(allowed)}, got {value!r}.")
