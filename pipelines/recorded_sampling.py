"""A whole run, from conditions to pixels, as one CUDA graph: what it reads, and what tells two runs apart."""

from collections.abc import Callable, Sequence

import torch
from tqdm.auto import tqdm

from srdd.acceleration import CudaGraphs
from srdd.area_means import WINDOWS
from srdd.models import MultiScaleVQModel, ScaleTransformer
from srdd.models.neighbourhoods import scale_masks
from srdd.pipelines.conditions import Conditions
from srdd.pipelines.guided_transformer import Guidance
from srdd.pipelines.scale_sampling import SamplingInputs, SamplingOutput, sample_scales
from srdd.schedulers import ScaleScheduler
from srdd.schedulers.token_sampling import Generators, exponential_noise


def sample_recorded(
    graphs: CudaGraphs,
    vqvae: MultiScaleVQModel,
    transformer: ScaleTransformer,
    scheduler: ScaleScheduler,
    inputs: SamplingInputs,
    generator: Generators = None,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[SamplingOutput, torch.Tensor | None] | None:
    """
    [`~srdd.pipelines.scale_sampling.sample_scales`] and decoding, replayed as a CUDA graph.

    Labels, guidance weights, the state to start from and noise are inputs of the graph. Noise is drawn before, in the
    order in which a run without a graph draws it, so that a seed gives the same picture.

    Args:
        graphs ([`~srdd.acceleration.CudaGraphs`]): What was recorded before.
        vqvae ([`MultiScaleVQModel`]): As in `sample_scales`.
        transformer ([`ScaleTransformer`]): As in `sample_scales`.
        scheduler ([`ScaleScheduler`]): As in `sample_scales`; every pass draws all tokens of its scale.
        inputs ([`SamplingInputs`]): As in `sample_scales`.
        generator (`torch.Generator` or a list with one for each image, *optional*): The only source of randomness.
        decode (`Callable`, *optional*): Makes pixels of latent states.

    Returns:
        `tuple[SamplingOutput, torch.Tensor]`, *optional*: The run's output, and pixels if there is a `decode`. `None`
        for a run that is to go without a graph.
    """

    def run(inputs: SamplingInputs) -> tuple[torch.Tensor, ...]:
        output = sample_scales(vqvae, transformer, scheduler, inputs, tqdm(disable=True))
        pixels = () if decode is None else (decode(output.latents),)
        return output.latents, output.token_ids, output.is_finite, *pixels

    def allocate() -> SamplingInputs:
        halves = [inputs.conditions.conditional, inputs.conditions.unconditional]
        copies = ({name: tensor.clone() for name, tensor in half.items()} if half else half for half in halves)
        return SamplingInputs(
            Conditions(inputs.conditions.batch_size, *copies),
            Guidance(inputs.guidance.is_guided, inputs.guidance.weights.clone()),
            inputs.latents.clone(),
            empty_noise(scheduler, inputs.conditions.batch_size, vqvae.config.codebook_size, inputs.latents.device),
        )

    def fill(recorded: SamplingInputs) -> None:
        for tensor, new in zip(tensors_of(recorded), tensors_of(inputs), strict=True):
            tensor.copy_(new)
        for noise in recorded.noise.values():
            exponential_noise(noise.shape, generator, noise.device, out=noise)

    shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors_of(inputs)]
    schedule = type(scheduler), str(dict(scheduler.config)), tuple(len(passes) for _, passes in scheduler.passes)
    key = (*shapes, *schedule, *inputs.guidance.is_guided.values(), *inputs.conditions.conditional, decode is None)
    grid_size = inputs.latents.shape[-2:]
    constants = [
        WINDOWS[side, new_side, inputs.latents.device]
        for scale in scheduler.visits
        for side, new_side in zip(grid_size, scale.size)
    ]
    if transformer.config.get("attention_windows"):
        neighbourhoods = transformer.neighbourhoods([scale.timestep for scale in scheduler.visits])
        constants.append(scale_masks(neighbourhoods, inputs.latents.device))
    outputs = graphs(run, (vqvae, transformer), key, allocate, fill, constants)
    if outputs is None:
        return None
    return SamplingOutput(*outputs[:3]), *(outputs[3:] or [None])


def tensors_of(inputs: SamplingInputs) -> Sequence[torch.Tensor]:
    """All but the noise."""
    conditions = inputs.conditions
    told = [*conditions.conditional.values(), *(conditions.unconditional or {}).values()]
    return [*told, inputs.guidance.weights, inputs.latents]


def empty_noise(
    scheduler: ScaleScheduler, batch_size: int, codebook_size: int, device: torch.device
) -> dict[int, torch.Tensor]:
    """Tensors for the noise of all passes; none where the most probable tokens are taken."""
    return {
        index: torch.empty(scheduler.noise_shape(scale, batch_size, codebook_size), device=device)
        for scale, passes in scheduler.passes
        if scheduler.temperatures[scale.timestep] > 0
        for index in passes
    }
