import sys
from pathlib import Path

import pytest
import torch


# With `--import-mode=importlib` pytest leaves `sys.path` alone; this lets tests say `from tiny_models import ...`. The
# folder goes last, so that nothing in it can hide an installed package.
sys.path.append(str(Path(__file__).parent))

if sys.platform == "win32":  # these fork, and use signals and limits of POSIX
    collect_ignore = [
        "conversion/test_official_var.py",
        "data/test_token_cache.py",
        "evaluation/test_evaluate_srdd.py",
        "evaluation/test_feature_cache.py",
        "evaluation/test_real_images.py",
        "hub/test_published_runs.py",
        "test_growth.py",
        "training",
    ]
if sys.platform == "darwin":  # GitHub's machines say that they have MPS, and have no memory for it
    torch.backends.mps.is_available = lambda: False

# Tiny tensors gain nothing from threads, and threads that wait for each other suffer on a busy machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
