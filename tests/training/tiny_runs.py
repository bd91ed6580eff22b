"""Runs of the training scripts in this process that take a second: tiny models, a few steps."""

import json
from pathlib import Path
from types import ModuleType

import torch
from file_modules import load_file


SCRIPTS = Path(__file__).parents[2] / "training_scripts"


def load_script(name: str) -> ModuleType:
    """A training script as a module."""
    return load_file(SCRIPTS / f"{name}.py")


def run_script(name: str, *arguments: str | Path) -> None:
    """Run a training script in this process."""
    module = load_script(name)
    module.main(module.parse_args([str(argument) for argument in arguments]))


def common(image_folder: Path, output_dir: Path) -> list:
    return [
        "--train_data_dir", image_folder, "--cache_dir", image_folder.parent / "datasets", "--output_dir", output_dir,
        "--train_batch_size", 8, "--max_train_steps", 4, "--checkpointing_steps", 2, "--validation_steps", 4,
        "--num_validation_images", 2, "--lr_warmup_steps", 1,
    ]  # fmt: skip


def train_tokenizer(image_folder: Path, output_dir: Path, *more: str | Path) -> None:
    """Scales 1-2-4 of 16 codes, images of 16 x 16 pixels."""
    run_script(
        "train_tokenizer", *common(image_folder, output_dir), "--resolution", 16, "--scale_sizes", "1,2,4",
        "--block_out_channels", "32,32", "--codebook_size", 16, "--latent_channels", 4, "--perceptual_weight", 0,
        "--revive_steps", 2, *more,
    )  # fmt: skip


def train_transformer(image_folder: Path, tokenizer: Path, output_dir: Path, *more: str | Path) -> None:
    """One layer of width 16."""
    run_script(
        "train_srdd", *common(image_folder, output_dir), "--pretrained_vqvae_name_or_path", tokenizer,
        "--num_layers", 1, "--num_attention_heads", 2, "--attention_head_dim", 8, *more,
    )  # fmt: skip


def train_texts(image_folder: Path, pipeline: Path, output_dir: Path, *more: str | Path) -> None:
    """From a pipeline that draws from texts."""
    run_script("train_srdd", *common(image_folder, output_dir), "--pretrained_model_name_or_path", pipeline, *more)


def distill(image_folder: Path, teacher: Path, output_dir: Path, *more: str | Path) -> None:
    run_script("distill_srdd", *common(image_folder, output_dir), "--teacher", teacher, *more)


def distill_decoder(image_folder: Path, teacher: Path, output_dir: Path, *more: str | Path) -> None:
    """Channels 8 and 8, where the teacher has 32 and 32."""
    run_script(
        "distill_decoder", *common(image_folder, output_dir), "--teacher", teacher, "--perceptual_weight", 0, *more
    )


def train_autoencoder(image_folder: Path, output_dir: Path, *more: str | Path) -> None:
    """Images of 16 x 16 pixels, latents of 8 x 8."""
    run_script(
        "train_baseline", *common(image_folder, output_dir), "--model", "vae", "--resolution", 16,
        "--block_out_channels", "32,32", "--perceptual_weight", 0, *more,
    )  # fmt: skip


def train_diffusion(image_folder: Path, autoencoder: Path, output_dir: Path, model: str, *more: str | Path) -> None:
    """A DiT of one layer of width 16, or a UNet of two levels."""
    sizes = {
        "dit": ["--num_layers", 1, "--num_attention_heads", 2, "--attention_head_dim", 8],
        "ldm": ["--block_out_channels", "32,32"],
    }
    run_script(
        "train_baseline", *common(image_folder, output_dir), "--model", model, "--pretrained_vae_name_or_path",
        autoencoder, *sizes[model], *more,
    )  # fmt: skip


def read_log(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]


def weights(model) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def assert_same_weights(left, right, atol: float = 0.0):
    left, right = weights(left), weights(right)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(
            tensor, right[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
