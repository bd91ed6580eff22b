import torch
from accelerate import init_empty_weights

from srdd.checks import check_choice, shown
from srdd.conversion.official_checkpoints import MAX_LINES, StateDict, _dtype_of
from srdd.conversion.switti_layout import SWITTI_BUFFERS, switti_config, switti_origins
from srdd.models import ATTENTION_PATTERNS, ScaleTextTransformer2DModel
from srdd.models.saved_weights import tensor_fault


def convert_switti_transformer(
    state: StateDict, attention_pattern: str | None = None, dtype: torch.dtype | None = None
) -> ScaleTextTransformer2DModel:
    """
    Turn the state dict of an official Switti into a model.

    The architecture follows from names and shapes. Most tensors stay views of those in `state`.

    Args:
        state (`dict[str, torch.Tensor]`): The state dict.
        attention_pattern (`str`, *optional*): By default that of the checkpoint, "markov" or "causal".
        dtype (`torch.dtype`, *optional*): The weights' dtype; the checkpoint's by default.

    Returns:
        [`ScaleTextTransformer2DModel`]

    Raises:
        ValueError: If this is no official Switti, or an argument is of another kind. The message names unknown and
            missing keys, and tensors that are misshapen, no floating-point numbers or not finite in `dtype`, up to 50.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` must be a floating-point torch.dtype, got {shown(dtype)}.")
    config = switti_config(state)
    if attention_pattern is not None:
        config["attention_pattern"] = check_choice("attention_pattern", attention_pattern, ATTENTION_PATTERNS)
    with init_empty_weights():
        model = ScaleTextTransformer2DModel(**config)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    origins, dtype = switti_origins(shapes), dtype or _dtype_of(state)
    expected = {key: shape for origin in origins.values() for key, shape in origin.shapes.items()}
    wrong = [f"{key} is missing" for key in expected if key not in state]
    wrong += [f"{key} is unknown" for key in state if key not in expected and not SWITTI_BUFFERS.fullmatch(key)]
    faults = {key: tensor_fault(state[key], shape, dtype) for key, shape in expected.items() if key in state}
    wrong += [f"{key} {fault}" for key, fault in faults.items() if fault]
    if wrong:
        more = f"; … and {len(wrong) - MAX_LINES} more" if len(wrong) > MAX_LINES else ""
        raise ValueError(f"The transformer must be an official Switti, but {'; '.join(wrong[:MAX_LINES])}{more}.")
    kept = {key: torch.float32 for key in shapes if key.split(".")[-1] in model._keep_in_fp32_modules}
    tensors = {key: origin.take(state, shapes[key]).to(kept.get(key, dtype)) for key, origin in origins.items()}
    model.load_state_dict(tensors, assign=True)
    return model.eval()
