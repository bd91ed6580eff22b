"""Saved weights: what a file must hold to be loaded, and what a folder may hold after it was saved."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_INDEX_NAME
from diffusers.utils.hub_utils import _add_variant
from safetensors import SafetensorError


# What a file or index of another structure makes of code that takes it for granted. OSError and ValueError have words
# of their own; those of memory, of devices and of missing libraries are not about files.
STRUCTURE_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    RecursionError,
    TypeError,
    SafetensorError,
    UnicodeDecodeError,
    json.JSONDecodeError,
)


@contextlib.contextmanager
def reading(source: Any, name: str) -> Iterator[None]:
    """
    Code that reads a saved model or pipeline and does not expect files of another structure.

    Args:
        source (`Any`): The file or folder.
        name (`str`): What it should hold.

    Raises:
        ValueError: In place of errors that only say what the code stumbled over.
        OSError: With the name of `source`.
    """
    try:
        yield
    except STRUCTURE_ERRORS as error:
        raise ValueError(
            f"{source} must be a saved {name}, but reading it failed with {type(error).__name__}: {error}"
        ) from error
    except OSError as error:
        if str(source) in str(error):
            raise
        raise OSError(f"{source}: {error}") from error


def is_finite_as(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """
    Whether all numbers of a tensor are finite, and stay so in another dtype. One pass, no copies.

    Args:
        tensor (`torch.Tensor`): The numbers; integers always are.
        dtype (`torch.dtype`, *optional*): A floating-point dtype; the tensor's own by default.

    Returns:
        `bool`
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    largest = torch.finfo(dtype or tensor.dtype).max
    # Bounds of NaN are NaN. There are none of float8 without a step to a larger dtype.
    low, high = torch.aminmax(tensor.detach() if tensor.element_size() > 1 else tensor.detach().float())
    return -largest <= low.item() and high.item() <= largest


def weights_hash(*modules: nn.Module) -> str:
    """Twelve hexadecimal digits of SHA-256 over the weights of modules, their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            for plain in _plain_tensors(tensor.detach()):
                digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
                digest.update(plain.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def _plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor, or those that one of torchao is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain_tensors(getattr(tensor, name))


def check_finite_weights(model: nn.Module, argument: str, source: str | None = None) -> None:
    """
    Make sure that all weights of a model are finite.

    Args:
        model (`torch.nn.Module`): The model.
        argument (`str`): The argument that it came from, or what else it is, for the message.
        source (`str`, *optional*): The value of that argument.

    Raises:
        ValueError: If weights are not finite; names some of them.
    """
    tensors = model.state_dict()
    broken = [name for name, tensor in tensors.items() if not is_finite_as(tensor)]
    if broken:
        what = argument if " " in argument else f"`{argument}`"
        named = f" {source!r}," if source else ""
        raise ValueError(
            f"{what} must have finite weights, got{named} NaN or infinity in {len(broken)} of {len(tensors)} tensors:"
            f" {', '.join(broken[:5])}{', …' * (len(broken) > 5)}."
        )


def tensor_fault(tensor: Any, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> str | None:
    """
    What is wrong with a saved tensor, if anything is.

    Args:
        tensor (`Any`): What was saved.
        shape (`tuple[int, ...]`): The shape that it must have.
        dtype (`torch.dtype`, *optional*): The floating-point dtype it will be loaded in; its own by default.

    Returns:
        `str`, *optional*: The end of a sentence that starts with the tensor's name.
    """
    if not isinstance(tensor, torch.Tensor):
        return f"must be a tensor, got {type(tensor).__name__}"
    if tuple(tensor.shape) != tuple(shape):
        return f"must have shape {tuple(shape)}, got {tuple(tensor.shape)}"
    is_quantized = hasattr(tensor, "__tensor_flatten__")
    if is_quantized or tensor.is_meta or tensor.layout != torch.strided or not tensor.is_floating_point():
        kind = type(tensor).__name__ if is_quantized else f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        return f"must hold plain floating-point numbers, got {kind}"
    if not is_finite_as(tensor, dtype):
        return "is not finite" if dtype in (None, tensor.dtype) else f"is not finite as {dtype}"
    return None


def quantized_fault(tensor: torch.Tensor, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a tensor that torchao may have quantized; it is dequantized for a moment."""
    if not hasattr(tensor, "__tensor_flatten__") or tensor.shape != shape:
        return tensor_fault(tensor, shape)
    names, _ = tensor.__tensor_flatten__()
    if not any(getattr(tensor, name).is_floating_point() for name in names):
        return "must have a scale of floating-point numbers"
    try:
        return tensor_fault(tensor.dequantize(), shape)
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        return f"must be made of tensors that fit together, got {error}"


def faults_of_files(
    contents: Iterable[Mapping[str, Any]], expected: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> list[str]:
    """
    What is wrong with the files of a model without quantized weights: one phrase for each tensor.

    Args:
        contents (`Iterable[Mapping[str, Any]]`): What each file holds; mapped files stay mapped.
        expected (`Mapping[str, torch.Tensor]`): The state dict of the model, with or without memory.
        dtype (`torch.dtype`, *optional*): The dtype it will be loaded in; the model's by default.

    Returns:
        `list[str]`
    """
    faults, names = [], set()
    for tensors in contents:
        names.update(tensors)
        for name in expected.keys() & tensors.keys():
            fault = tensor_fault(tensors[name], expected[name].shape, dtype or expected[name].dtype)
            faults += [f"{name} {fault}"] if fault else []
    faults += [f"{name} is missing" for name in expected if name not in names]
    faults += [f"{name} is unexpected" for name in names if name not in expected]
    return faults


def faults_beside_quantized(
    contents: Iterable[Mapping[str, Any]], model: nn.Module, quantizer: DiffusersQuantizer
) -> list[str]:
    """What is wrong with those tensors of a quantized model's files that are not quantized: one phrase for each."""
    faults, expected = [], model.state_dict()
    for tensors in contents:
        for name in expected.keys() & tensors.keys():
            if not quantizer.check_if_quantized_param(model, tensors[name], name, tensors):
                fault = tensor_fault(tensors[name], expected[name].shape)
                faults += [f"{name} {fault}"] if fault else []
    return faults


def faults_of_quantized(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], missing: set[str], is_torchao: bool
) -> list[str]:
    """What is wrong with a quantized model after it was loaded: one phrase for each tensor."""
    missing = missing | {name for name, tensor in state.items() if tensor.is_meta}
    faults = [f"{name} is missing" for name in missing]
    for name in (expected.keys() & state.keys()) - missing if is_torchao else ():
        fault = quantized_fault(state[name], expected[name].shape)
        faults += [f"{name} {fault}"] if fault else []
    return faults


def refuse(source: Any, model_name: str, faults: list[str], shown: int = 5) -> None:
    """
    Raise the error that names what is wrong with saved weights, if anything is.

    Args:
        source (`Any`): The file or folder.
        model_name (`str`): What it should hold.
        faults (`list[str]`): One phrase for each tensor.
        shown (`int`, defaults to 5): How many of them the message lists.

    Raises:
        ValueError: If there are faults.
    """
    if faults:
        faults = sorted(faults)
        more = f" … and {len(faults) - shown} more" if len(faults) > shown else ""
        raise ValueError(
            f"{source} must hold the weights of a {model_name} with the configuration beside them, but"
            f" {'; '.join(faults[:shown])}{more}."
        )


class SavedModelMixin(ModelMixin):
    """
    A model of diffusers whose weights load completely or not at all.

    All ways of loading a folder, one of the Hub or a pipeline's part lead to `_load_pretrained_model`, which gets the
    files, the model without weights and what a quantizer knows. diffusers itself draws with uninitialised memory where
    a tensor is missing, and turns integers to floats.
    """

    config: Any  # diffusers says a dict, of which type checkers know no attributes

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",  # by name: pipelines look for it
        **kwargs: Any,
    ) -> None:
        """
        As [`~diffusers.ModelMixin.save_pretrained`]. The folder then loads these weights, whatever it held: an index
        of older shards is removed before.

        Raises:
            ValueError: If the weights shall be a pickle beside safetensors, which would be loaded instead; or if
                projections are fused or adapters are there, whose weights no folder can hold.
        """
        added = [name for name in self.state_dict() if ".to_qkv." in name or ".base_layer." in name]
        if added:
            raise ValueError(
                "Fused projections and adapters must be undone before a model is saved (`unfuse_qkv_projections`, or"
                f" `fuse_lora` and `unload_lora`), got the weight {added[0]}."
            )
        folder = Path(save_directory)
        index = folder / _add_variant(SAFE_WEIGHTS_INDEX_NAME if safe_serialization else WEIGHTS_INDEX_NAME, variant)
        preferred = [
            folder / _add_variant(name, variant) for name in (SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        ]
        preferred = [path.name for path in preferred if not safe_serialization and path.exists()]
        if preferred:
            raise ValueError(
                f"`save_directory` must not hold {preferred[0]} with `safe_serialization=False`, as that would be"
                f" loaded instead, got {save_directory}."
            )
        if is_main_process:
            index.unlink(missing_ok=True)
        super().save_pretrained(
            save_directory, is_main_process, save_function, safe_serialization, variant, max_shard_size, **kwargs
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, **kwargs: Any):
        """
        As [`~diffusers.ModelMixin.from_pretrained`], for whole and sound weights only.

        Raises:
            ValueError: If a tensor is missing, unexpected, of another shape, not finite (in the dtype asked for, too)
                or no floating-point number, where it was not quantized by the means of diffusers; if the files cannot
                be read as a model; and for `ignore_mismatched_sizes` and `use_flashpack`, which look at none of it.
            OSError: If a file is missing or cut.
        """
        for name in ("ignore_mismatched_sizes", "use_flashpack"):
            if kwargs.get(name):
                raise ValueError(f"`{name}` must be False for a {cls.__name__}, got {kwargs[name]!r}.")
        with reading(pretrained_model_name_or_path, cls.__name__):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _load_pretrained_model(
        cls,
        model: ModelMixin,
        state_dict: Mapping[str, Any] | None,
        resolved_model_file: list[str],
        pretrained_model_name_or_path: str | os.PathLike,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        files = [os.fspath(file) for file in resolved_model_file]
        source = files[0] if len(files) == 1 else f"{Path(files[0]).parent} ({len(files)} files)"
        contents = [state_dict] if state_dict is not None else map(load_state_dict, files)
        quantizer, dtype = kwargs.get("hf_quantizer"), kwargs.get("dtype")
        if quantizer is None or not quantizer.pre_quantized:
            refuse(source, cls.__name__, faults_of_files(contents, model.state_dict(), dtype))
            return super()._load_pretrained_model(
                model, state_dict, resolved_model_file, pretrained_model_name_or_path, *args, **kwargs
            )

        expected = model.state_dict()
        refuse(source, cls.__name__, faults_beside_quantized(contents, model, quantizer))
        loaded = super()._load_pretrained_model(
            model, state_dict, resolved_model_file, pretrained_model_name_or_path, *args, **kwargs
        )
        _, missing, unexpected, *_ = loaded
        is_torchao = quantizer.quantization_config.quant_method == "torchao"  # others check their own formats
        faults = faults_of_quantized(model.state_dict(), expected, {*missing}, is_torchao)
        refuse(source, cls.__name__, faults + [f"{name} is unexpected" for name in unexpected])
        return loaded
