"""
Official VAR checkpoints (MIT, github.com/FoundationVision/VAR) as srdd pipelines.

On the command line:

    python -m srdd.conversion --vae vae_ch160v4096z32.pth --transformer var_d16.pth --output var-d16

In Python:

```py
>>> from srdd.conversion import convert_checkpoints

>>> pipe = convert_checkpoints("vae_ch160v4096z32.pth", "var_d16.pth")
>>> pipe.save_pretrained("var-d16")
```
"""

from srdd.conversion.official_checkpoints import convert_checkpoints, imagenet_class_names


__all__ = ["convert_checkpoints", "imagenet_class_names"]
