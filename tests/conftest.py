import sys
from pathlib import Path

import pytest
import torch


# With `--import-mode=importlib` pytest leaves `sys.path` alone; this lets tests say `from tiny_models import ...`. The
# folder goes last, so that nothing in it can hide an installed package.
sys.path.append(str(Path(__file__).parent))

# Tiny tensors gain nothing from threads, and threads that wait for each other suffer on a busy machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
