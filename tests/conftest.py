import sys
from pathlib import Path


# With `--import-mode=importlib` pytest leaves `sys.path` alone; this lets tests say `from tiny_models import ...`. The
# folder goes last, so that nothing in it can hide an installed package.
sys.path.append(str(Path(__file__).parent))
