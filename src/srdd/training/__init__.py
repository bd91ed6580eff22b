"""What the training scripts share. Needs the `train` extra: `pip install srdd[train]`."""
