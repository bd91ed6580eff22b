"""Images and their tokens, read by training and evaluation. Needs the `train` extra: `pip install srdd[train]`."""
