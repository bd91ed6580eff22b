"""What the transformers over scales share that draw by class: labels, their names and their embedding."""

import re
from collections.abc import Mapping
from types import NoneType

import torch

from srdd.checks import described, shown
from srdd.models.scale_transformer import ScaleTransformer


def class_names(id2label: Mapping[int | str, str] | None, num_classes: int) -> dict[str, str]:
    """
    Names of classes as JSON has them: it turns integer keys into strings.

    Raises:
        ValueError: If a class does not exist, or a name is no string.
    """
    if not isinstance(id2label, (Mapping, NoneType)):
        raise ValueError(f"`id2label` must be a dict of names by class id, got {shown(id2label)}.")
    names = {str(index): name for index, name in (id2label or {}).items()}
    unknown = sorted(index for index in names if not re.fullmatch(r"[0-9]{1,9}", index) or int(index) >= num_classes)
    if unknown:
        raise ValueError(f"`id2label` must name classes in [0, {num_classes - 1}], got {shown(unknown)}.")
    wrong = [name for name in names.values() if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"`id2label` must hold names that are strings, got {shown(wrong)}.")
    return names


class ClassScaleTransformer(ScaleTransformer):
    """
    Base of the transformers that draw by class.

    A model of this kind has a `class_embed`, whose last row is the null class, and `num_classes`, `id2label` and
    `class_dropout_prob` in its configuration.
    """

    # Arguments of `forward` that tell both halves of guidance the image's class, the unconditional one, too.
    labels_of_both_halves: tuple[str, ...] = ()

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by id, in the order of the ids: files have them in that of texts."""
        return dict(sorted((int(index), name) for index, name in self.config.id2label.items()))

    def _embed_classes(
        self,
        hidden_states: torch.Tensor,
        class_labels: torch.LongTensor | None,
        dropout_prob: float = 0.0,
        name: str = "class_labels",
    ) -> torch.Tensor:
        """
        Embedding `(B, D)` of class labels, by default of the null class.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, ...)`): Of the images.
            class_labels (`torch.LongTensor` of shape `(batch,)`, *optional*): Their labels.
            dropout_prob (`float`, defaults to 0.0): Share of labels that the null class replaces in training.
            name (`str`, defaults to `"class_labels"`): What messages call the labels.

        Raises:
            ValueError: If there is not one label for each image, or one is out of range.
        """
        null_class = self.config.num_classes
        if class_labels is None:
            class_labels = torch.full((hidden_states.shape[0],), null_class, device=hidden_states.device)
        if not isinstance(class_labels, torch.Tensor) or class_labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`{name}` must be an int64 or int32 tensor, got {described(class_labels)}.")
        if class_labels.shape != hidden_states.shape[:1]:
            raise ValueError(f"`{name}` must have shape ({hidden_states.shape[0]},), got {tuple(class_labels.shape)}.")
        # A training step wants gradients; drawing with a model in training mode does not depend on that mode.
        if self.training and torch.is_grad_enabled() and dropout_prob > 0:
            dropped = torch.rand(class_labels.shape, device=class_labels.device) < dropout_prob
            class_labels = torch.where(dropped, null_class, class_labels)
        try:
            return self.class_embed(class_labels)  # (B, D)
        except IndexError as error:
            low, high = (bound.item() for bound in class_labels.aminmax())
            raise ValueError(f"`{name}` must lie in [0, {null_class}], got [{low}, {high}].") from error
