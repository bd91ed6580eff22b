"""Another class for a module that is there, by which all that refers to it stays true."""

from collections.abc import Mapping

import torch.nn as nn


def recast(module: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """
    Put a module and all below it into other classes. Parameters, children, settings and hooks stay as they are.

    Args:
        module (`nn.Module`): The module.
        classes (`Mapping[type, type]`): The new class for a class. Its instances must need nothing that those of the
            old one lack. Subclasses of the old one, such as adapters, keep theirs.
    """
    for child in module.modules():
        if type(child) in classes:
            child.__class__ = classes[type(child)]
