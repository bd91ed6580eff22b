"""Adapters (LoRA) in a folder of their own, with the classes and their embedding that were trained with them."""

import json
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import safe_open
from safetensors.torch import save_file

from srdd import ScaleTextTransformer2DModel, ScaleTransformer2DModel
from srdd.models.saved_weights import check_finite_weights, faults_of_files, reading, refuse


CLASSES = "class_embed"

# What an adapter changes of a configuration; all else that shapes the model must be the same.
OWN_CONFIG = ("num_classes", "id2label", "attention_pattern", "attention_windows", "guidance_distilled")
SHAPE_CONFIG = (
    *("codebook_size", "latent_channels", "scale_sizes", "num_layers", "num_attention_heads", "attention_head_dim"),
    *("mlp_ratio", "qk_norm", "shared_adaln", "norm_eps"),
    *("cross_attention_dim", "pooled_projection_dim", "rope_theta", "rope_extent"),
    *("history_window", "history_head_dim"),
)


def save_lora(transformer: ScaleTransformer2DModel | ScaleTextTransformer2DModel, folder: str | Path) -> None:
    """
    Save an adapter, PEFT's `"default"`, with all that was trained with it.

    Args:
        transformer ([`ScaleTransformer2DModel`] or [`ScaleTextTransformer2DModel`]): With the adapter, not merged.
        folder (`str` or `Path`): Gets `pytorch_lora_weights.safetensors` and `config.json`.

    Raises:
        ValueError: If weights are not finite, before anything is saved.
    """
    from peft.utils import get_peft_model_state_dict

    check_finite_weights(transformer, "the trained adapter")
    weights = dict(get_peft_model_state_dict(transformer))
    config = transformer.peft_config["default"].to_dict()
    if hasattr(transformer, CLASSES):
        weights[f"{CLASSES}.weight"] = transformer.get_submodule(CLASSES).weight
        # As PEFT names it, so that diffusers' own `load_lora_adapter` does not leave the classes out.
        config["modules_to_save"] = [CLASSES]
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    transformer.save_config(folder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(weights, Path(folder) / LORA_WEIGHT_NAME_SAFE, metadata)


def load_lora(
    transformer: ScaleTransformer2DModel | ScaleTextTransformer2DModel,
    folder: str | Path,
    adapter_name: str | None = None,
) -> None:
    """
    Give a transformer the adapter that `train_srdd.py --lora_rank` left in `output_dir/lora`: with that of its base it
    is the trained model. The classes become those of the adapter; `fuse_lora` and `unload_lora` merge it.

    Args:
        transformer ([`ScaleTransformer2DModel`] or [`ScaleTextTransformer2DModel`]): The base that the adapter was
            trained on.
        folder (`str` or `Path`): Where the adapter lies.
        adapter_name (`str`, *optional*): Its name in the model; diffusers finds one by default.

    Raises:
        ValueError: If the folder holds no adapter, or one of other sizes; if a tensor of it is missing,
            unexpected, of another shape or not finite. The transformer is then as it was.
    """
    path = Path(folder) / LORA_WEIGHT_NAME_SAFE
    if not path.is_file() or not (Path(folder) / "config.json").is_file():
        raise ValueError(f"`folder` must hold {LORA_WEIGHT_NAME_SAFE!r} and 'config.json', got {str(folder)!r}.")
    with reading(folder, "adapter"):
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        # Adapters of version 0.1 do not say.
        config = {"attention_windows": None, "guidance_distilled": False, **config}
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            adapter = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
        targets, rank = tuple(adapter["target_modules"]), adapter["r"]
        kind = config["_class_name"]
    ours = [name for name in (*SHAPE_CONFIG, *OWN_CONFIG) if name in transformer.config]
    if not set(ours) <= config.keys():
        raise ValueError(f"`transformer` must be a {kind}, as the adapter's base, got a {type(transformer).__name__}.")
    theirs = {name: config[name] for name in ours}
    for name in SHAPE_CONFIG:
        if name in theirs and theirs[name] != transformer.config[name]:
            raise ValueError(
                f"`transformer` must have the {name} of the adapter's base, {theirs[name]}, got"
                f" {transformer.config[name]}."
            )
    shapes = {f"{CLASSES}.weight": (theirs["num_classes"] + 1, transformer.dim)} if "num_classes" in theirs else {}
    for name, module in transformer.named_modules():
        if name.endswith(targets) and isinstance(module, torch.nn.Linear):
            shapes[f"{name}.lora_A.weight"] = rank, module.in_features
            shapes[f"{name}.lora_B.weight"] = module.out_features, rank
    expected = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    refuse(path, "adapter", faults_of_files([weights], expected, transformer.dtype))
    if "num_classes" in theirs:
        classes = weights.pop(f"{CLASSES}.weight").to(transformer.device, transformer.dtype)
        transformer.class_embed = torch.nn.Embedding.from_pretrained(classes)
    transformer.register_to_config(**{name: theirs[name] for name in OWN_CONFIG if name in theirs})
    transformer.load_lora_adapter(
        weights, prefix=None, metadata={**adapter, "modules_to_save": None}, adapter_name=adapter_name
    )
