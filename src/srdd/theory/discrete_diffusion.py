"""
Proposition 1 of the paper (Appendix D), executed: a scale-wise model as a discrete diffusion over latent states.

Everything that a tiny model can draw is listed, and both sides of the proposition are computed by their own formulas;
`python -m srdd.theory` prints the result. This is float64, where the rest of the package is float32: equality is
claimed, and rounding must not hide a difference.

Notation. A pyramid is `z_1 ... z_K`, its history after k scales is `z_1 ... z_k`, and `f_k` the latent state there
(`f_0 = 0`). The chain has `T = K` steps, numbered as in D3PM (Austin et al. 2021): `x_t = f_{K-t}`, so `x_0` is the
final latent and `x_T` the one start state, the paper's SOS. [`ScaleScheduler.add_noise`] at timestep `t` leads to
`x_{t+1}`. The data are a distribution `q` over pyramids, the model is `p`. `L_o` is the cross-entropy of all scales,
`L_v` the variational bound.

What holds. Assume

A. A step gives its tokens: `z_k -> f_k - f_{k-1} = phi_k(up(C[z_k]))` is one-to-one.
B. The model's `p(z_k | z_1 ... z_{k-1})` is the same for all histories that meet in one state `f_{k-1}`.

Then the joint of the model is that of a chain with the reverse kernels `p(x_{t-1} | x_t) = p(z_k | x_t)` (part 1), and
`L_v = L_o + C` with `C = -sum_t H_q(x_t | x_{t-1})`, the entropy of the forward chain, in which theta does not occur
(part 2).

The paper states the proposition without a proof and is silent on these points:

- It needs A. Two equal codes break it: states forget tokens that the loss counts, and `L_v - L_o` moves with theta.
- The Markov mask gives B, for all that the network is fed is a function of the state. "causal" and "banded", the
  literal reading of Section 4, break B where different histories meet. They do meet: scales that share a `phi`, as
  VAR's 1x1 and 2x2, add constant maps in any order ("code v, then w everywhere" is "w, then v everywhere").
- Where none meet, as with codes in general position and a `phi` for every scale, the state remembers its history, and
  the proposition holds for every pattern, VAR included. So it does over token pyramids as states, which is Austin et
  al.'s view of autoregression (paper, Section 3.1). The mask then adds only that the network can compute the kernel
  from the state (assumption 2).
- Assumption 1, a deterministic forward chain, says that no two histories of the data meet; then `C = 0`. Where some
  do, the kernel of the chain is the data's own `q(x_t | x_{t-1})`, which is random, and `C < 0`.
- States must have full latent resolution. The `x_k = down(f_{k-1}, s_k)` of the paper's text is what the network sees
  of one; nothing makes the next `x_{k+1}` a function of it and of `z_k`.
- It does not order the patterns. Section 3.2 expects a higher ELBO of the Markov variant, but the lowest loss that any
  function of the whole history can reach is never above that of functions of the state.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch

from srdd.models import MultiScaleVQModel, ScaleTransformer2DModel
from srdd.pipelines.scale_pipeline import check_components
from srdd.schedulers import ScaleScheduler
from srdd.theory.pyramid_space import PyramidSpace, draw_weights, enumerate_pyramids, log_conditionals


def _steps(space: PyramidSpace, probabilities: torch.Tensor) -> list[torch.Tensor]:
    """For t = 1 ... T the joint distribution of `(x_{t-1}, x_t)` when pyramids are drawn with `probabilities`."""
    sizes, steps = space.num_states, []
    for fine in range(len(sizes) - 1, 0, -1):
        step = probabilities.new_zeros(sizes[fine], sizes[fine - 1])
        where = (space.state_ids[:, fine], space.state_ids[:, fine - 1])
        steps.append(step.index_put_(where, probabilities, accumulate=True))
    return steps


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """A conditional probability; 0 given what never happens."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def forward_kernels(space: PyramidSpace, data: torch.Tensor) -> list[torch.Tensor]:
    """
    The transition matrices `Q_t` of the forward chain (paper, Section 2 and Definition 2).

    Where the data's histories do not meet, each row has a single 1: the step is the paper's deterministic `M(n)`.

    Args:
        space ([`PyramidSpace`]): All pyramids.
        data (`torch.Tensor` of shape `(num_pyramids,)`): Their probabilities `q`.

    Returns:
        `list[torch.Tensor]`: For t = 1 ... T `q(x_t | x_{t-1})`, of shape `(states of x_{t-1}, states of x_t)`. Rows
        sum to 1, or to 0 for states that the data never reach.
    """
    return [_ratio(step, step.sum(dim=1, keepdim=True)) for step in _steps(space, data)]


def forward_marginals(space: PyramidSpace, data: torch.Tensor) -> list[torch.Tensor]:
    """`q(x_t)` for t = 0 ... T, the data pushed through the `Q_t`; arguments as in [`forward_kernels`]."""
    marginals = [_steps(space, data)[0].sum(dim=1)]
    for kernel in forward_kernels(space, data):
        marginals.append(marginals[-1] @ kernel)
    return marginals


def forward_entropy(space: PyramidSpace, data: torch.Tensor) -> float:
    """`sum_t H_q(x_t | x_{t-1})` in nats, 0 for a deterministic chain; arguments as in [`forward_kernels`]."""
    pairs = zip(forward_marginals(space, data), forward_kernels(space, data))
    return sum((torch.special.entr(kernel).sum(dim=1) * marginal).sum().item() for marginal, kernel in pairs)


def reverse_kernels(space: PyramidSpace, model: torch.Tensor) -> list[torch.Tensor]:
    """
    The model's `p(x_{t-1} | x_t)`: of all Markov chains over the states the one nearest to the model.

    Under assumption B this is what the network predicts in the state. Otherwise it averages over the histories that
    lead there, as the model draws them.

    Args:
        space ([`PyramidSpace`]): All pyramids.
        model (`torch.Tensor` of shape `(num_pyramids,)`): Their probabilities under the model.

    Returns:
        `list[torch.Tensor]`: For t = 1 ... T a matrix of shape `(states of x_t, states of x_{t-1})`; rows sum to 1.
    """
    return [_ratio(step, step.sum(dim=0)).T for step in _steps(space, model)]


def diffusion_log_joint(space: PyramidSpace, kernels: list[torch.Tensor]) -> torch.Tensor:
    """
    `log p(x_0, ..., x_T) = log p(x_T) + sum_t log p(x_{t-1} | x_t)` of every pyramid's path (Definition 2), of shape
    `(num_pyramids,)`; `p(x_T)` is 1 at the start state. `kernels` are those of [`reverse_kernels`].
    """
    states = space.state_ids.flip(1)  # column t is x_t
    return sum(kernel[states[:, t + 1], states[:, t]].log() for t, kernel in enumerate(kernels))


@dataclass
class DiffusionBound:
    """
    The terms of the variational bound, in nats.

    Args:
        prior (`float`): `L_T`.
        steps (`list[float]`): `L_1 ... L_{T-1}`, the KL divergences for t = 2 ... T.
        reconstruction (`float`): `L_0`, its sign included.
    """

    prior: float
    steps: list[float]
    reconstruction: float

    @property
    def total(self) -> float:
        """`L_v`."""
        return self.prior + sum(self.steps) + self.reconstruction


def diffusion_bound(space: PyramidSpace, data: torch.Tensor, kernels: list[torch.Tensor]) -> DiffusionBound:
    """
    The D3PM bound `L_v` (Proposition 1, part 2; Austin et al. 2021, Equation 1), term by term.

    `q(x_t | x_0)` is the product of the `Q_t`, and `q(x_{t-1} | x_t, x_0)` follows by Bayes' rule.

    Args:
        space ([`PyramidSpace`]): All pyramids.
        data (`torch.Tensor` of shape `(num_pyramids,)`): Their probabilities `q`.
        kernels (`list[torch.Tensor]`): The reverse chain, as [`reverse_kernels`] gives it.

    Returns:
        [`DiffusionBound`]
    """
    forward = forward_kernels(space, data)
    start = forward_marginals(space, data)[0]
    given = forward[0]  # q(x_1 | x_0), (x_0, x_1)
    reconstruction = -(start[:, None] * torch.xlogy(given, kernels[0].T)).sum().item()
    steps = []
    for transition, kernel in zip(forward[1:], kernels[1:]):
        before, given = given, given @ transition  # q(x_{t-1} | x_0), q(x_t | x_0)
        posterior = _ratio(before[:, None] * transition.T, given[:, :, None])  # (x_0, x_t, x_{t-1})
        divergence = (torch.xlogy(posterior, posterior) - torch.xlogy(posterior, kernel)).sum(dim=2)
        steps.append((start[:, None] * given * divergence).sum().item())
    prior = (start[:, None] * torch.xlogy(given, given)).sum().item()  # p(x_T) is 1 at the one state x_T has
    return DiffusionBound(prior, steps, reconstruction)


@dataclass
class Proposition1Check:
    """
    Both sides of Proposition 1 for several random models theta.

    Args:
        num_pyramids (`int`): Size of the space.
        num_paths (`int`): Different paths of states; as many as pyramids if assumption A holds.
        num_states (`list[int]`): Different states after 0 ... K scales.
        joint_difference (`float`): Largest `|log p_model - log p_diffusion|` over all paths and models, nats (part 1).
        network_difference (`float`): Largest `|log p(z_k | history) - log p(z_k | x_k alone)|` of the network, nats: 0
            if the network computes the reverse kernel from the state (assumption 2).
        losses (`list[float]`): `L_o` of every model, the cross-entropy of all scales in nats per image. Training
            minimises it over the number of tokens.
        bounds (`list[float]`): `L_v` of every model, nats per image.
        forward_entropy (`float`): `-C` as the proposition predicts it, nats.
    """

    num_pyramids: int
    num_paths: int
    num_states: list[int]
    joint_difference: float
    network_difference: float
    losses: list[float]
    bounds: list[float]
    forward_entropy: float

    @property
    def gaps(self) -> list[float]:
        """`L_v - L_o` of every model."""
        return [bound - loss for bound, loss in zip(self.bounds, self.losses)]

    @property
    def gap_spread(self) -> float:
        """Largest less smallest `L_v - L_o`: 0 if it is a constant (part 2)."""
        return max(self.gaps) - min(self.gaps)


@torch.no_grad()
def verify_proposition_1(
    vqvae: MultiScaleVQModel,
    transformer: ScaleTransformer2DModel,
    data: torch.Tensor | None = None,
    states: str = "latents",
    num_models: int = 8,
    generator: torch.Generator | None = None,
) -> Proposition1Check:
    """
    Compute both sides of Proposition 1 for random weights of a transformer.

    Args:
        vqvae ([`MultiScaleVQModel`]): A tokenizer with few enough pyramids to list.
        transformer ([`ScaleTransformer2DModel`]): A model over its scales; it is copied and stays as it is.
        data (`torch.Tensor` of shape `(num_pyramids,)`, *optional*): Probabilities of the pyramids in the data, in the
            order of [`enumerate_pyramids`]; a random distribution over all by default.
        states (`str`, defaults to `"latents"`): What a state of the chain is, as in [`enumerate_pyramids`].
        num_models (`int`, defaults to 8): How many times the weights are drawn.
        generator (`torch.Generator`, *optional*): The only source of randomness.

    Returns:
        [`Proposition1Check`]

    Raises:
        ValueError: If tokenizer and transformer do not fit, `states` is unknown, there are too many pyramids,
            `num_models` is not positive, or `data` are no probabilities of the pyramids.
    """
    if num_models < 1:
        raise ValueError(f"`num_models` must be at least 1, got {num_models}.")
    check_components(vqvae, transformer, ScaleScheduler(scale_sizes=transformer.config.scale_sizes))
    space = enumerate_pyramids(vqvae, states)
    num_pyramids = len(space.token_ids)
    if data is None:
        data = torch.empty(num_pyramids, dtype=torch.float64).exponential_(generator=generator)
        data = data / data.sum()
    data = data.double()
    if data.shape != (num_pyramids,) or not (data >= 0).all() or not abs(data.sum() - 1) < 1e-6:
        raise ValueError(
            f"`data` must be {num_pyramids} numbers, none negative, that sum to 1, got shape {tuple(data.shape)} and"
            f" sum {data.sum():.6g}."
        )
    transformer = deepcopy(transformer).cpu().double().eval()
    path_ids = space.path_ids
    num_paths = int(path_ids.max()) + 1
    joint_differences, network_differences, losses, bounds = [], [], [], []
    for _ in range(num_models):
        draw_weights(transformer, generator)
        conditionals = log_conditionals(transformer, space)
        alone = log_conditionals(transformer, space, from_state=True)
        model = conditionals.sum(dim=1).exp()
        kernels = reverse_kernels(space, model)
        path_probabilities = model.new_zeros(num_paths).index_add(0, path_ids, model)
        joint = diffusion_log_joint(space, kernels)
        joint_differences.append((path_probabilities.log()[path_ids] - joint).abs().max().item())
        network_differences.append((conditionals - alone).abs().max().item())
        losses.append(-(data * conditionals.sum(dim=1)).sum().item())
        bounds.append(diffusion_bound(space, data, kernels).total)
    return Proposition1Check(
        num_pyramids=num_pyramids,
        num_paths=num_paths,
        num_states=space.num_states,
        joint_difference=max(joint_differences),
        network_difference=max(network_differences),
        losses=losses,
        bounds=bounds,
        forward_entropy=forward_entropy(space, data),
    )
