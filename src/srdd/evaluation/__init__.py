"""Measuring what models draw. Needs the `train` extra for EfficientNet."""
