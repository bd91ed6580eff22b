import sys
from pathlib import Path

import torch


# With `--import-mode=importlib` pytest leaves `sys.path` alone; this lets tests say `from tiny_models import ...`. The
# folder goes last, so that nothing in it can hide an installed package.
sys.path.append(str(Path(__file__).parent))

# Tiny tensors gain nothing from threads, and threads that wait for each other suffer on a busy machine.
torch.set_num_threads(1)
