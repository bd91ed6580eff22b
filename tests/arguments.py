"""Arguments of all kinds, for tests that call what a user calls with what nobody foresaw."""

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def seeded(max_examples: int) -> settings:
    """As many examples, the same ones in every run."""
    return settings(
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=max_examples,
        suppress_health_check=list(HealthCheck),
    )


# What a careless caller may give for anything.
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([10**6, 10**9, -(10**9), 10**30]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["", "1", "apple", "true", "none", "pil", "latents", "犬", b"apple"]),
    st.sampled_from([[], {}, (), set(), [None], [[]], object(), Exception, print]),
    st.sampled_from([np.int64(2), np.float32(0.5), np.bool_(True), np.array([]), np.array([1, 2]), np.zeros((3, 3))]),
    st.sampled_from(
        [torch.tensor(1), torch.tensor(0.5), torch.tensor([]), torch.zeros(2, 3), torch.zeros(1, 3, 8, 8)]
    ),
)


def usually(strategy: st.SearchStrategy, share: int = 3) -> st.SearchStrategy:
    """Values that are mostly right."""
    return st.one_of(*[strategy] * share, ODD)
