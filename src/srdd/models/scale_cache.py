"""What one forward of a sampling run leaves for the next: keys and values, and what follows from the condition."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class SeenStates(NamedTuple):
    """
    Keys and values that a scale sees, `(B, N, H, D / H)` each, of one layer: parts of a [`ScaleKVCache`]. Those of its
    own tokens are the last ones, and are still to be written.
    """

    key: torch.Tensor
    value: torch.Tensor

    def completed_by(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, with those of the scale's own tokens."""
        num_before = self.key.shape[1] - key.shape[1]
        self.key[:, num_before:] = key
        self.value[:, num_before:] = value
        return self.key.to(key.dtype), self.value.to(value.dtype)


class ScaleKVCache:
    """
    Keys and values of the scales already drawn, for the attention patterns that look back.

    Pass one object to every forward of a transformer in a sampling run. A pass at a scale replaces what an
    earlier pass stored there; scales are kept apart, so that nothing of a finer scale is ever seen by a coarser one.
    Scales lie one behind the other in one buffer for each layer, so that looking back copies nothing. It is for
    inference: buffers are written in place.

    Args:
        num_tokens (`int`, *optional*): Tokens of all scales to come; without it the buffers grow as needed.
        keeps_own_scale (`bool`, defaults to `True`): Whether it also keeps what no finer scale looks back at, which
            further passes of some tokens of a scale need.
    """

    def __init__(self, num_tokens: int | None = None, keeps_own_scale: bool = True):
        self.num_tokens = num_tokens
        self.keeps_own_scale = keeps_own_scale
        self.is_read_only = False
        self.image_indices: torch.LongTensor | None = None
        self.token_indices: torch.LongTensor | None = None
        self.buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.places: dict[int, slice] = {}

    def make_room(self, layer: int, timestep: int, num_tokens: int, like: torch.Tensor) -> slice:
        """Where a scale lies in the buffers of a layer; new ones are `like` a tensor `(B, ?, H, D / H)`."""
        if timestep not in self.places:
            start = max([0, *(place.stop for place in self.places.values())])
            self.places[timestep] = slice(start, start + num_tokens)
        place = self.places[timestep]
        buffers = self.buffers.get(layer, ())
        if not buffers or buffers[0].shape[1] < place.stop:
            size = max(self.num_tokens or 0, place.stop)
            grown = tuple(like.new_empty(like.shape[0], size, *like.shape[2:]) for _ in range(2))
            for states, stored in zip(grown, buffers):
                states[:, : stored.shape[1]] = stored
            self.buffers[layer] = grown
        return place

    def update(self, layer: int, timestep: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store keys and values `(B, N_k, H, D / H)` of one layer and scale, or of those of its tokens at hand."""
        place = self.make_room(layer, timestep, key.shape[1], value)
        image_indices, tokens = slice(len(key)) if self.image_indices is None else self.image_indices, place
        if self.token_indices is not None:
            image_indices = torch.arange(len(key), device=key.device) if self.image_indices is None else image_indices
            image_indices, tokens = image_indices.unsqueeze(1), place.start + self.token_indices
        for states, stored in zip((key, value), self.buffers[layer]):
            stored[image_indices, tokens] = states

    def seen_by(self, layer: int, timestep: int, seen: Sequence[int], like: torch.Tensor) -> "SeenStates | None":
        """
        What a scale sees that is to be stored whole, and lies behind the others that it sees. `None` where that is not
        so. Compiled blocks want tensors rather than a cache that they would have to look through.

        Args:
            layer (`int`): The layer.
            timestep (`int`): The scale.
            seen (`Sequence[int]`): The scales that it sees, itself the last one.
            like (`torch.Tensor` of shape `(batch, num_scale_tokens, heads, head_dim)`): What its keys are like.
        """
        if self.is_read_only or self.image_indices is not None or self.token_indices is not None:
            return None
        place = self.make_room(layer, timestep, like.shape[1], like)
        places = [self.places[each] for each in seen]
        if any(each.stop != following.start for each, following in zip(places, places[1:])):
            return None
        return SeenStates(*(stored[: len(like), places[0].start : place.stop] for stored in self.buffers[layer]))

    def get(self, layer: int, timesteps: Sequence[int], batch_size: int | None = None) -> tuple[torch.Tensor, ...]:
        """Keys and values of one layer and some scales, for the first images of the batch or all."""
        places = [self.places[timestep] for timestep in timesteps]
        if all(place.stop == following.start for place, following in zip(places, places[1:])):
            places = [slice(places[0].start, places[-1].stop)]
        image_indices = slice(batch_size) if self.image_indices is None else self.image_indices
        pieces = [[stored[image_indices, place] for place in places] for stored in self.buffers[layer]]
        return tuple(piece[0] if len(piece) == 1 else torch.cat(piece, dim=1) for piece in pieces)

    def keeping_own_scale(self) -> "ScaleKVCache":
        """This cache for a forward that further passes of some tokens of its scale will follow."""
        view = copy.copy(self)
        view.keeps_own_scale = True
        return view

    def read_only(self) -> "ScaleKVCache":
        """This cache for forwards that shall leave it as it is."""
        view = copy.copy(self)
        view.is_read_only = True
        return view

    def select(
        self, image_indices: torch.LongTensor | None = None, token_indices: torch.LongTensor | None = None
    ) -> "ScaleKVCache":
        """
        This cache for a forward of some images of the batch, by their places, and of some tokens of a scale that it
        holds, `(num_images, num_indices)`.
        """
        view = copy.copy(self)
        view.image_indices, view.token_indices = image_indices, token_indices
        return view

    def clone(self) -> "ScaleKVCache":
        """A cache of the same content, for forwards that others shall not see."""
        cloned = copy.copy(self)
        cloned.buffers = {layer: tuple(states.clone() for states in pair) for layer, pair in self.buffers.items()}
        cloned.places = dict(self.places)
        return cloned

    @property
    def timesteps(self) -> list[int]:
        """The scales stored, as timesteps, coarse to fine."""
        return sorted(self.places, reverse=True)


@dataclass
class ModulationCache:
    """
    What follows from a condition, class labels or texts: AdaLN modulations, and keys and values of a text. It is the
    same at all scales and passes of a sampling run.

    Pass one object to every forward of a transformer with the same condition; the first fills it. It is for inference.

    Args:
        blocks (`list`): For each block what it returned beside its hidden states, `(batch, ...)` each: the
            modulations, `(batch, 6, dim)`, and of a text keys and values, `(batch, heads, num_text_tokens, head_dim)`.
        out (`torch.Tensor`, *optional*): The modulations of the last norm, `(batch, 2 * dim)`.
    """

    blocks: list[list[torch.Tensor]] = field(default_factory=list)
    out: torch.Tensor | None = None

    def select(self, image_indices: torch.Tensor) -> "ModulationCache":
        """What follows for some images, by their places in the batch."""
        if self.out is None:
            return ModulationCache()
        blocks = [[tensor[image_indices] for tensor in block] for block in self.blocks]
        return ModulationCache(blocks, self.out[image_indices])
