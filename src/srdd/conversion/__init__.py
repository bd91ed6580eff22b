"""
Official checkpoints of VAR and of models that build on it as srdd pipelines; `families.py` is the table of them.

On the command line:

    python -m srdd.conversion --vae vae_ch160v4096z32.pth --transformer mvar-d16.pth --output mvar-d16
    python -m srdd.conversion --vae VQVAE-Switti/model.safetensors --transformer Switti/model.safetensors \\
        --text-encoders stabilityai/stable-diffusion-xl-base-1.0 --output switti-512

In Python:

```py
>>> from srdd.conversion import convert_checkpoints

>>> pipe = convert_checkpoints("vae_ch160v4096z32.pth", "mvar-d16.pth")
>>> pipe.save_pretrained("mvar-d16")
```
"""

from srdd.conversion.official_checkpoints import convert_checkpoints, imagenet_class_names
from srdd.conversion.text_encoders import load_text_encoders


__all__ = ["convert_checkpoints", "imagenet_class_names", "load_text_encoders"]
