import pytest
import torch
from tiny_models import CODEBOOK_SIZE, tiny_critic

from srdd import TokenCritic


def random_hidden_states(batch_size: int = 3, num_tokens: int = 5, dim: int = 16) -> torch.Tensor:
    return torch.randn(batch_size, num_tokens, dim, generator=torch.Generator().manual_seed(0))


def random_token_ids(batch_size: int = 3, num_tokens: int = 5) -> torch.Tensor:
    return torch.randint(CODEBOOK_SIZE, (batch_size, num_tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_every_token_is_judged_by_itself():
    critic, hidden_states, token_ids = tiny_critic(), random_hidden_states(), random_token_ids()
    logits = critic(hidden_states, token_ids).logits
    assert logits.shape == (3, 5)
    assert logits.std() > 0.1
    for image in range(3):
        for token in range(5):
            place = slice(image, image + 1), slice(token, token + 1)
            alone = critic(hidden_states[place], token_ids[place]).logits
            torch.testing.assert_close(alone[0, 0], logits[image, token], atol=1e-6, rtol=0)


@torch.no_grad()
def test_it_is_a_head_with_one_hidden_layer():
    critic, hidden_states, token_ids = tiny_critic(), random_hidden_states(), random_token_ids()
    hidden = hidden_states @ critic.proj_in.weight.T + critic.proj_in.bias  # (B, N, 8)
    hidden += critic.token_embed.weight[token_ids]
    activated = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = (activated * critic.proj_out.weight[0]).sum(-1) + critic.proj_out.bias
    torch.testing.assert_close(critic(hidden_states, token_ids).logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_output_as_a_tuple():
    critic, hidden_states, token_ids = tiny_critic(), random_hidden_states(), random_token_ids()
    (logits,) = critic(hidden_states, token_ids, return_dict=False)
    assert torch.equal(logits, critic(hidden_states, token_ids).logits)


@pytest.mark.parametrize("shape", [(3, 5, 17), (5, 16), (3, 5, 16, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"`hidden_states` must have shape \(batch, num_tokens, 16\), got \("):
        tiny_critic()(torch.zeros(shape), torch.zeros(shape[:2], dtype=torch.long))


def test_there_is_a_token_for_each_hidden_state():
    with pytest.raises(ValueError, match=r"`token_ids` must have shape \(3, 5\), got \(3, 4\)"):
        tiny_critic()(random_hidden_states(), random_token_ids(num_tokens=4))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_saved_and_loaded(tmp_path, dtype):
    critic, hidden_states, token_ids = tiny_critic(hidden_dim=6), random_hidden_states(), random_token_ids()
    critic.save_pretrained(tmp_path)
    loaded = TokenCritic.from_pretrained(tmp_path)
    assert not loaded.training
    assert (loaded.config.dim, loaded.config.hidden_dim) == (16, 6)
    assert torch.equal(loaded(hidden_states, token_ids).logits, critic(hidden_states, token_ids).logits)
    half = TokenCritic.from_pretrained(tmp_path, dtype=dtype)
    logits = half(hidden_states.to(dtype), token_ids).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), critic(hidden_states, token_ids).logits, atol=3e-2, rtol=0)
