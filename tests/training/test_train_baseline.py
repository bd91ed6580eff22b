"""Diffusion baselines: `train_baseline.py` from pictures to rows of a table."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiTPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_models import LATENT_CHANNELS, redraw
from training.launching import start
from training.tiny_runs import (
    assert_same_weights,
    common,
    load_script,
    read_log,
    run_script,
    train_autoencoder,
    train_diffusion,
)

from srdd.data.images import LabelledImages, image_to_tensor, load_labelled_images
from srdd.data.latent_cache import cached_latents
from srdd.evaluation.latent_diffusion import LatentDiffusionPipeline, load_drawing_pipeline
from srdd.training.denoisers import describe_size, new_dit, new_unet


SCRIPT = load_script("train_baseline")
QUIET = ["--report_to", "none", "--logging_steps", 1]
KINDS = ("dit", "ldm")


@pytest.fixture(scope="module")
def root(image_folder, tmp_path_factory):
    """An autoencoder, and a DiT and an LDM on it, all of a few steps."""
    root = tmp_path_factory.mktemp("baselines")
    for model in ("vae", *KINDS):
        train(model, image_folder, root, root / model)
    return root


def train(model: str, image_folder: Path, root: Path, output_dir: Path, *more) -> None:
    """Any of the three, on the autoencoder of `root`."""
    if model == "vae":
        train_autoencoder(image_folder, output_dir, *QUIET, *more)
    else:
        train_diffusion(image_folder, root / "vae", output_dir, model, *QUIET, *more)


@pytest.fixture(scope="module")
def images(image_folder) -> LabelledImages:
    return load_labelled_images(
        train_data_dir=str(image_folder), cache_dir=str(image_folder.parent / "datasets"), label_column="label"
    )


@pytest.fixture(scope="module")
def pixels(images) -> torch.Tensor:
    """The training images, cropped in the centre."""
    return torch.stack([image_to_tensor(image, 16) for image in images.train["image"]])


def trained_model(folder: Path) -> torch.nn.Module:
    if folder.name.startswith("vae"):
        return AutoencoderKL.from_pretrained(folder)
    return load_drawing_pipeline(str(folder)).denoiser


# What comes of it


@torch.no_grad()
def test_an_autoencoder_has_the_scale_of_its_latents(root, pixels):
    vae = AutoencoderKL.from_pretrained(root / "vae")
    assert vae.config.sample_size == 16
    posterior = vae.encode(pixels).latent_dist
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([posterior.sample(generator) for _ in range(20)])
    assert vae.config.scaling_factor * drawn.std().item() == pytest.approx(1, abs=0.01)
    last = read_log(root / "vae")[-1]
    assert last["val_latent_deviation"] == pytest.approx(1 / vae.config.scaling_factor)
    mean_square = (vae.decode(posterior.mean).sample.clamp(-1, 1) - pixels).div(2).square().mean(dim=(1, 2, 3))
    assert last["val_psnr"] == pytest.approx((-10 * mean_square.log10()).mean().item(), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_latent_diffusion_draws_the_classes_of_the_data(root, kind):
    pipe = load_drawing_pipeline(str(root / kind))
    assert type(pipe) is LatentDiffusionPipeline
    assert pipe.id2label == {0: "cold", 1: "warm"}
    assert pipe.sample_size == (16, 16)
    assert_same_weights(pipe.vae, AutoencoderKL.from_pretrained(root / "vae"))
    assert pipe.vae.config.scaling_factor == AutoencoderKL.from_pretrained(root / "vae").config.scaling_factor
    images = pipe(["cold", "warm"], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    schedule = pipe.scheduler.config
    assert (schedule.clip_sample, schedule.timestep_spacing, schedule.prediction_type) == (
        False,
        "trailing",
        "epsilon",
    )
    assert schedule.beta_schedule == {"dit": "linear", "ldm": "scaled_linear"}[kind]


def test_diffusers_draws_with_a_trained_dit(root):
    pipe = DiTPipeline.from_pretrained(root / "dit")
    assert pipe.labels == {"cold": 0, "warm": 1}
    assert pipe([0, 1], num_inference_steps=3, output_type="np").images.shape == (2, 16, 16, 3)


@pytest.mark.parametrize("name", ["vae", *KINDS])
def test_logs_pictures_checkpoints_and_cards_are_written(root, name):
    log = read_log(root / name)
    assert [record["step"] for record in log] == [1, 2, 3, 4, 4]
    assert all(math.isfinite(record["loss"]) for record in log[:4])
    assert {path.name for path in (root / name).glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    picture = "reconstruction" if name == "vae" else "samples"
    with Image.open(root / name / f"{picture}.png") as image:
        assert image.size == (2 * 16, 16 * (2 if name == "vae" else 1))
    card = (root / name / "README.md").read_text()
    assert f"![{picture}]" in card
    assert "discrete-diffusion" not in card
    snippet = {"vae": "AutoencoderKL", "dit": "DiTPipeline", "ldm": "LatentDiffusionPipeline"}[name]
    assert f"import {snippet}\n" in card
    for path in (root / name).rglob("*config.json"):
        assert str(root) not in path.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_models_without_classes(image_folder, root, tmp_path, kind):
    train(kind, image_folder, root, tmp_path / kind, "--label_column", "")
    pipe = load_drawing_pipeline(str(tmp_path / kind))
    assert pipe.num_classes == 0
    assert len(pipe(num_images_per_prompt=2).images) == 2
    if kind == "ldm":
        assert pipe.unet.config.num_class_embeds is None


@pytest.mark.parametrize("name", ["vae", *KINDS])
def test_a_run_goes_on_where_it_was(image_folder, root, tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(root / name / "checkpoint-2", folder / "checkpoint-2")
    shutil.copyfile(root / name / "train_log.jsonl", folder / "train_log.jsonl")
    train(name, image_folder, root, folder, "--resume_from_checkpoint", "latest")
    assert_same_weights(trained_model(folder), trained_model(root / name))
    assert read_log(folder) == read_log(root / name)


@pytest.mark.parametrize("name", ["vae", *KINDS])
def test_gradient_checkpointing_changes_nothing(image_folder, root, tmp_path, name):
    train(name, image_folder, root, tmp_path / name, "--gradient_checkpointing")
    assert_same_weights(trained_model(tmp_path / name), trained_model(root / name), atol=1e-5)


@pytest.mark.usefixtures("_own_precision")
@pytest.mark.parametrize("name", ["vae", *KINDS])
def test_half_precision_finishes_with_finite_losses(image_folder, root, tmp_path, name):
    train(name, image_folder, root, tmp_path / name, "--mixed_precision", "bf16", "--save_dtype", "float16")
    half, single = ([record["loss"] for record in read_log(folder / name)[:4]] for folder in (tmp_path, root))
    assert half == pytest.approx(single, rel=0.05)
    assert half != single
    part = {"vae": "", "dit": "transformer", "ldm": "unet"}[name]
    (path,) = (tmp_path / name / part).glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", *KINDS])
def test_two_processes_train_together(image_folder, root, tmp_path, name):
    sizes = {"vae": ["--resolution", 16, "--perceptual_weight", 0], "dit": ["--num_layers", 1], "ldm": []}[name]
    sizes += [] if name == "dit" else ["--block_out_channels", "32,32"]
    sizes += [] if name == "vae" else ["--pretrained_vae_name_or_path", root / "vae"]
    words = [*common(image_folder, tmp_path / name), "--model", name, *sizes, *QUIET]
    start("train_baseline", *words, output=tmp_path / "log.txt", num_processes=2).finish()
    assert (tmp_path / "log.txt").read_text().count(" M parameters") == 1
    assert [record["step"] for record in read_log(tmp_path / name)] == [1, 2, 3, 4, 4]
    trained_model(tmp_path / name)


def test_another_autoencoder_is_another_run(image_folder, root, tmp_path):
    train_autoencoder(image_folder, tmp_path / "vae", *QUIET, "--max_train_steps", 1, "--seed", 1)
    shutil.copytree(root / "ldm" / "checkpoint-2", tmp_path / "ldm" / "checkpoint-2")
    with pytest.raises(ValueError, match="the weights of the autoencoder are others"):
        train_diffusion(
            image_folder, tmp_path / "vae", tmp_path / "ldm", "ldm", *QUIET, "--resume_from_checkpoint", "latest"
        )


LEARNING = ["--max_train_steps", 40, "--learning_rate", 5e-3, "--ema_decay", 0.8, "--validation_steps", 40]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_learned(image_folder, root, tmp_path, kind, prediction_type):
    train(kind, image_folder, root, tmp_path / kind, *LEARNING, "--prediction_type", prediction_type)
    log = read_log(tmp_path / kind)
    assert log[-1]["val_loss"] < 0.8 * log[0]["loss"]


def test_pictures_are_learned(image_folder, root, tmp_path):
    train("vae", image_folder, root, tmp_path / "vae", *LEARNING)
    log = read_log(tmp_path / "vae")
    assert log[-1]["val_psnr"] > read_log(root / "vae")[-1]["val_psnr"] + 3
    assert log[-2]["loss"] < 0.7 * log[0]["loss"]


# Losses


def training_of(kind: str, images: LabelledImages, root: Path, *more):
    """What the loop trains, with weights at random, and a batch for it."""
    arguments = [
        "--model",
        kind,
        "--pretrained_vae_name_or_path",
        root / "vae",
        "--output_dir",
        root / "unused",
        *more,
    ]
    arguments += ["--block_out_channels", "32,32"] if kind == "ldm" else ["--num_layers", 1]
    training = SCRIPT.DiffusionTraining(
        SCRIPT.parse_args([str(word) for word in arguments]), Accelerator(cpu=True), images
    )
    redraw(training.model, seed=0).train()
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(6, 8, 8, 8, generator=generator)
    return training, {"moments": moments, "class_labels": torch.tensor([0, 1, 0, 1, 0, 1])}


def rows_with_gradients(training) -> set[int]:
    """Ids of the classes whose embeddings learn."""
    gradients = {
        parameter.grad
        for name, parameter in training.model.named_parameters()
        if "class_embedding" in name or "embedding_table" in name
    }
    return {row for gradient in gradients for row in gradient.abs().sum(dim=1).nonzero().flatten().tolist()}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_dropped_as_asked(images, root, kind):
    null_class = 1000 if kind == "dit" else 2
    for share, expected in ((0, {0, 1}), (1, {null_class}), (0.5, {0, 1, null_class})):
        training, batch = training_of(kind, images, root, "--class_dropout_prob", share)
        torch.manual_seed(1)
        training.losses(training.model, batch)["loss"].backward()
        assert rows_with_gradients(training) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_distance_to_the_noise_or_velocity(images, root, kind):
    for prediction_type in ("epsilon", "v_prediction"):
        training, batch = training_of(kind, images, root, "--prediction_type", prediction_type)
        generator = torch.Generator().manual_seed(3)
        latents, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
        timesteps = torch.tensor([0, 10, 200, 500, 900, 999])
        signal = training.scheduler.alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
        scaled = latents * training.vae.config.scaling_factor
        noisy = signal * scaled + (1 - signal**2).sqrt() * noise
        target = noise if prediction_type == "epsilon" else signal * noise - (1 - signal**2).sqrt() * scaled
        with torch.no_grad():
            said = training.model(noisy, timesteps, class_labels=batch["class_labels"]).sample
            loss = training.loss(training.model, latents, noise, timesteps, batch["class_labels"])
        torch.testing.assert_close(loss, (said - target).square().mean(), rtol=1e-4, atol=0)


# Models


def test_blocks_of_a_new_dit_are_the_identity_and_drop_no_labels():
    model = new_dit(4, LATENT_CHANNELS, 5, num_layers=2, num_attention_heads=2, attention_head_dim=8, patch_size=2)
    noisy, timesteps, labels = torch.randn(64, LATENT_CHANNELS, 4, 4), torch.arange(64), torch.arange(64) % 5
    hidden = torch.randn(64, 4, 16)
    assert torch.equal(model(noisy, timesteps, labels).sample, torch.zeros_like(noisy))
    assert torch.equal(model.transformer_blocks[1](hidden, timestep=timesteps, class_labels=labels), hidden)
    redraw(model, 0).train()
    assert torch.equal(model(noisy, timesteps, labels).sample, model(noisy, timesteps, labels).sample)


def test_sizes_are_told():
    model = new_dit(4, LATENT_CHANNELS, 5, num_layers=2, num_attention_heads=2, attention_head_dim=64, patch_size=1)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert describe_size(model, 5) == (
        f"DiTTransformer2DModel: {count / 1e6:.2f} M parameters, of which {2 * 995 * 128 / 1e6:.2f} M embed class ids"
        " that the data has not."
    )
    unet = new_unet(4, LATENT_CHANNELS, 5, [32, 32], layers_per_block=1, attention_head_dim=16)
    assert describe_size(unet, 5).endswith(" M parameters.")


# Latents


def test_latents_are_encoded_once(images, root, pixels, tmp_path):
    vae = AutoencoderKL.from_pretrained(root / "vae")
    make = {"vae": vae, "images": images, "split": images.train, "cache_dir": tmp_path, "resolution": 16}
    data = cached_latents(**make, batch_size=5)
    (path,) = tmp_path.glob("latents-*.npy")
    written = path.stat().st_mtime_ns
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.parameters
    moments = torch.stack([item["moments"] for item in data])
    torch.testing.assert_close(moments, expected, atol=1e-2, rtol=1e-2)
    assert moments.dtype == torch.float32
    assert [int(item["class_labels"]) for item in data] == images.train["label"][:]
    mirrored = cached_latents(**make, random_flip=True)
    assert len(mirrored) == 2 * len(data)
    with torch.no_grad():
        expected = vae.encode(pixels[3:4].flip(-1)).latent_dist.parameters[0]
    torch.testing.assert_close(mirrored[len(data) + 3]["moments"], expected, atol=1e-2, rtol=1e-2)
    cached_latents(**make)
    assert path.stat().st_mtime_ns == written
    vae.encoder.conv_in.bias.data.add_(1)
    cached_latents(**make)
    assert len(list(tmp_path.glob("latents-*.npy"))) == 3


def test_an_autoencoder_that_gives_no_numbers_is_refused(images, root, tmp_path):
    vae = AutoencoderKL.from_pretrained(root / "vae")
    with torch.no_grad():
        vae.quant_conv.bias.fill_(1e5)  # too large for half precision
    with pytest.raises(
        ValueError, match=r"`vae` must give finite latents, got NaN or infinity for image 0 \(.*0\.png\)"
    ):
        cached_latents(vae, images, images.train, tmp_path, 16)
    vae.quant_conv.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="`vae` must have finite weights"):
        cached_latents(vae, images, images.train, tmp_path, 16)
    assert not list(tmp_path.iterdir())


# Tables


def evaluate(image_folder, model, output_dir, *more) -> dict:
    run_script(
        "evaluate_srdd", "--pretrained_model_name_or_path", model, "--train_data_dir", image_folder, "--split",
        "train", "--cache_dir", image_folder.parent / "datasets", "--num_samples", 8, "--batch_size", 3,
        "--num_bootstrap", 2, "--output_dir", output_dir, *more,
    )  # fmt: skip
    return json.loads((output_dir / "evaluation.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_baselines_are_evaluated_as_ours_are(image_folder, root, trained, tmp_path, kind):
    report = evaluate(image_folder, root / kind, tmp_path / "theirs", "--num_inference_steps", 3)
    ours = evaluate(image_folder, trained / "model", tmp_path / "ours")
    assert report["metrics"].keys() == ours["metrics"].keys()
    assert report["settings"]["reference"] == ours["settings"]["reference"]
    samples = report["settings"]["samples"]
    expected = {"num_inference_steps": 3, "guidance_scale": 1.5, "num_classes": 2, "count": 8}
    assert {name: samples[name] for name in expected} == expected
    assert report["metrics"]["FD (efficientnet-lite0)"]["value"] > 0


def test_options_of_the_other_kind_of_pipeline_are_refused(image_folder, root, trained, tmp_path):
    with pytest.raises(ValueError, match="`top_k` must come with a pipeline that draws scale by scale"):
        evaluate(image_folder, root / "ldm", tmp_path, "--top_k", 3)
    with pytest.raises(ValueError, match="`scheduler` must come with a pipeline that draws scale by scale"):
        evaluate(image_folder, root / "ldm", tmp_path, "--scheduler", trained / "model")
    with pytest.raises(ValueError, match="`num_inference_steps` must come with latent diffusion"):
        evaluate(image_folder, trained / "model", tmp_path, "--num_inference_steps", 3)


def ablate(image_folder, root, trained, tmp_path, *tables) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"defaults": {"num_images": 8}, "tables": tables}))
    run_script(
        "ablate_srdd", "--config", tmp_path / "config.json", "--train_data_dir", image_folder, "--cache_dir",
        image_folder.parent / "datasets", "--model", f"SDD={trained / 'model'}", "--model", f"LDM={root / 'ldm'}",
        "--model", f"DiT={root / 'dit'}", "--output_dir", tmp_path / "out", "--num_reference_images", 12,
        "--batch_size", 5, "--num_bootstrap", 2,
    )  # fmt: skip
    return tmp_path / "out"


def test_tables_have_rows_of_baselines(image_folder, root, trained, tmp_path):
    steps = {"num_inference_steps": 3}
    rows = {
        "LDM": {"model": "LDM", "guidance_scale": 1, "scheduler": steps},
        "LDM + cfg": {"model": "LDM", "guidance_scale": 2.5, "scheduler": steps},
        "DiT": {"model": "DiT", "scheduler": steps},
        "SDD": {"model": "SDD"},
    }
    sweep = {"axis": "num_inference_steps", "values": [2, 3], "curves": {"LDM": {"model": "LDM"}}}
    table = {"name": "table1", "title": "T", "kind": "samples"}
    out = ablate(
        image_folder, root, trained, tmp_path, {**table, "rows": rows}, {**table, "name": "s", "sweep": sweep}
    )
    cells = json.loads((out / "ablations.json").read_text())["cells"]
    distances = [cell["result"]["frechet_distance"] for cell in cells]
    assert len({distances[index] for index in (0, 2, 3, 5)}) == 4  # an untrained model is hardly guided
    assert [line.split(" | ")[0] for line in (out / "table1.md").read_text().splitlines()[4:]] == [
        "| LDM", "| LDM + cfg", "| DiT", "| SDD", "| real images",
    ]  # fmt: skip
    assert Image.open(out / "table1.png").size == (10 * 16, 4 * 16)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kind": "editing", "tasks": ["2x"]}, "'kind' of the table 't' must be 'samples' for latent diffusion"),
        ({"kind": "likelihood"}, "'kind' of the table 't' must be 'samples' for latent diffusion"),
        ({"rows": {"r": {"model": "LDM", "variant": "int8"}}}, "Variants of latent diffusion must change nothing but"),
        ({"rows": {"r": {"model": "LDM", "scheduler": {"top_k": 2}}}}, "Variants of latent diffusion must change"),
    ],
)
def test_what_baselines_have_not_is_refused_before_anything_is_measured(
    image_folder, root, trained, tmp_path, table, message
):
    plain = {"name": "t", "title": "T", "kind": "samples", "rows": {"LDM": {"model": "LDM"}}}
    with pytest.raises(ValueError, match=message):
        ablate(image_folder, root, trained, tmp_path, {**plain, **table})
    assert not (tmp_path / "out").exists()


# Bad input


def test_an_autoencoder_must_be_named(capsys):
    with pytest.raises(SystemExit):
        SCRIPT.parse_args(["--model", "dit", "--output_dir", "out"])
    assert "`--pretrained_vae_name_or_path` is needed with `--model dit`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("vae", ["--random_crops", 2], "`random_crops` must be left out with `model` 'vae', got 2"),
        ("vae", ["--num_layers", 2], "`num_layers` must be left out with `model` 'vae', got 2"),
        ("dit", ["--kl_weight", 1], "`kl_weight` must be left out with `model` 'dit', got 1.0"),
        ("dit", ["--block_out_channels", "32"], "`block_out_channels` must be left out with `model` 'dit'"),
        ("ldm", ["--patch_size", 2], "`patch_size` must be left out with `model` 'ldm', got 2"),
        ("ldm", ["--center_crop"], "`center_crop` must be left out with `model` 'ldm', got True"),
        ("vae", ["--resolution", 15], "`resolution` must be a multiple of 2, by which the .*, got 15"),
        ("dit", ["--resolution", 17], "`resolution` must be a multiple of 2, by which the .*, got 17"),
        ("dit", ["--patch_size", 3], "`patch_size` must divide the side of the latents, 8, got 3"),
        ("vae", ["--block_out_channels", "32,40"], r"`block_out_channels` must be positive .* got \[32, 40\]"),
        ("ldm", ["--block_out_channels", "0,32"], r"`block_out_channels` must be positive .* got \[0, 32\]"),
        ("ldm", ["--block_out_channels", "32,32,32,32,32"], "the side of the latents, 8, can be halved between them"),
        ("ldm", ["--attention_head_dim", 24], r"`attention_head_dim` must divide all of \[32, 32\], got 24"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(image_folder, root, tmp_path, model, more, message):
    with pytest.raises(ValueError, match=message):
        train(model, image_folder, root, tmp_path / "run", *more)
    assert not (tmp_path / "run" / "train_log.jsonl").exists()


def test_the_autoencoder_may_be_that_of_a_pipeline(images, root):
    training, _ = training_of("dit", images, root, "--pretrained_vae_name_or_path", root / "ldm")
    assert_same_weights(training.vae, AutoencoderKL.from_pretrained(root / "vae"))


def test_the_autoencoder_must_be_one(image_folder, trained, tmp_path):
    for name in (trained / "tokenizer", tmp_path / "nothing"):
        with pytest.raises(ValueError, match="`pretrained_vae_name_or_path` must be a folder or Hub id of an `Auto"):
            train_diffusion(image_folder, name, tmp_path / "run", "ldm", *QUIET)


def test_a_dit_has_at_most_a_thousand_classes():
    with pytest.raises(ValueError, match="`label_column` must have at most 1000 classes for a DiT, got 1001"):
        new_dit(4, LATENT_CHANNELS, 1001, num_layers=1, num_attention_heads=1, attention_head_dim=8, patch_size=1)
