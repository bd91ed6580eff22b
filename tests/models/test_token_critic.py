import pytest
import torch
from tiny_models import tiny_critic

from srdd import TokenCritic


def random_hidden_states(batch_size: int = 3, num_tokens: int = 5, dim: int = 16) -> torch.Tensor:
    return torch.randn(batch_size, num_tokens, dim, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_every_token_is_judged_by_itself():
    critic, hidden_states = tiny_critic(), random_hidden_states()
    logits = critic(hidden_states).logits
    assert logits.shape == (3, 5)
    assert logits.std() > 0.1
    for image in range(3):
        for token in range(5):
            alone = critic(hidden_states[image : image + 1, token : token + 1]).logits
            torch.testing.assert_close(alone[0, 0], logits[image, token], atol=1e-6, rtol=0)


@torch.no_grad()
def test_it_is_a_head_with_one_hidden_layer():
    critic, hidden_states = tiny_critic(), random_hidden_states()
    hidden = hidden_states @ critic.proj_in.weight.T + critic.proj_in.bias  # (B, N, 8)
    activated = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = (activated * critic.proj_out.weight[0]).sum(-1) + critic.proj_out.bias
    torch.testing.assert_close(critic(hidden_states).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_output_as_a_tuple():
    critic, hidden_states = tiny_critic(), random_hidden_states()
    (logits,) = critic(hidden_states, return_dict=False)
    assert torch.equal(logits, critic(hidden_states).logits)


@pytest.mark.parametrize("shape", [(3, 5, 17), (5, 16), (3, 5, 16, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"`hidden_states` must have shape \(batch, num_tokens, 16\), got \("):
        tiny_critic()(torch.zeros(shape))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saved_and_loaded(tmp_path, dtype):
    critic, hidden_states = tiny_critic(hidden_dim=6), random_hidden_states()
    critic.save_pretrained(tmp_path)
    loaded = TokenCritic.from_pretrained(tmp_path)
    assert not loaded.training
    assert (loaded.config.dim, loaded.config.hidden_dim) == (16, 6)
    assert torch.equal(loaded(hidden_states).logits, critic(hidden_states).logits)
    half = TokenCritic.from_pretrained(tmp_path, dtype=dtype)
    logits = half(hidden_states.to(dtype)).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), critic(hidden_states).logits, atol=3e-2, rtol=0)
