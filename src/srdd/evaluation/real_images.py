"""
What a distance between real images is: the least that drawn ones can be expected to reach.

A Fréchet distance of finite sets is never 0, the less so the fewer images there are. So every distance is reported
beside that of as many real images to the same reference; where there are not as many, beside that of two parts of the
reference, whose sizes are then said.
"""

import torch

from srdd.evaluation.image_sources import RealImages


def other_real_images(reference: RealImages, count: int) -> RealImages | None:
    """
    As many real images as `count` that are not in the reference.

    Args:
        reference ([`DataSetImages`], [`FolderImages`] or [`NpzImages`]): What drawn images are compared with.
        count (`int`): Number of drawn images.

    Returns:
        Images of the same kind, at most `count`; `None` if a part of the reference is as many or more.
    """
    others = reference.others(count)
    return others if others is not None and others.count >= min(count, reference.count // 2) else None


def real_against_real(
    reference: torch.Tensor, others: torch.Tensor | None, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Features of real images to be compared with each other.

    Args:
        reference (`torch.Tensor` of shape `(num_images, num_features)`): Features of the reference.
        others (`torch.Tensor` of shape `(num_others, num_features)`, *optional*): Of other real images.
        count (`int`): Number of drawn images.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: What stands for the reference, and what for drawn images: the reference
        and the others; without others the reference's rest and `count` images of it, half of them at most, a choice
        that is always the same.
    """
    if others is not None:
        return reference, others
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(0)).to(reference.device)
    held_out = min(count, len(reference) // 2)
    return reference[order[held_out:]], reference[order[:held_out]]
