"""Every option of `train_tokenizer.py` does what it says."""

import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from training.tiny_runs import assert_same_weights, load_script, read_log, train_tokenizer, weights

from srdd import MultiScaleVQModel
from srdd.data.images import image_to_tensor, load_labelled_images
from srdd.scales import default_scale_sizes
from srdd.training.adversarial_loss import PatchDiscriminator, generator_loss


SCRIPT = load_script("train_tokenizer")
QUIET = ["--report_to", "none", "--logging_steps", 1, "--checkpointing_steps", 4]
ADVERSARIAL = ["--adversarial_weight", 0.5, "--discriminator_layers", 1]


def parse(*arguments):
    return SCRIPT.parse_args(["--output_dir", "out", *(str(argument) for argument in arguments)])


def load(folder: Path) -> MultiScaleVQModel:
    return MultiScaleVQModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def pixels(image_folder) -> torch.Tensor:
    """The training images, cropped in the centre."""
    cache_dir = str(image_folder.parent / "datasets")
    images = load_labelled_images(train_data_dir=str(image_folder), cache_dir=cache_dir)
    return torch.stack([image_to_tensor(image, 16) for image in images.train["image"]])


@pytest.fixture(scope="module")
def plain(image_folder, tmp_path_factory):
    """A run without options, which others are compared to."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train_tokenizer(image_folder, folder, *QUIET)
    return folder


# Presets


@pytest.mark.parametrize(("name", "grid"), [("32px", 8), ("64px", 8), ("128px", 16), ("256px", 16)])
def test_a_preset_fits_its_own_scales(name, grid):
    args = parse("--preset", name)
    assert args.resolution == int(name.removesuffix("px"))
    with torch.device("meta"):
        model = SCRIPT.build_model(args)
    assert model.config.scale_sizes == default_scale_sizes(grid)
    assert model.config.scale_sizes[-1] == [grid, grid]
    assert model.config.scale_sizes[-1][0] * model.spatial_compression_ratio == args.resolution
    assert model.config.codebook_size == SCRIPT.PRESETS[name]["codebook_size"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["32px", "64px"])
def test_a_small_preset_reads_and_draws_images(name):
    model = SCRIPT.build_model(parse("--preset", name)).eval()
    side = int(name.removesuffix("px"))
    assert model(torch.zeros(1, 3, side, side)).sample.shape == (1, 3, side, side)


def test_the_largest_preset_is_vars_tokenizer():
    with torch.device("meta"):
        ours, default = SCRIPT.build_model(parse("--preset", "256px")), MultiScaleVQModel()
    settings = [{k: v for k, v in model.config.items() if not k.startswith("_")} for model in (ours, default)]
    assert settings[0] == settings[1]
    assert {name: tensor.shape for name, tensor in weights(ours).items()} == {
        name: tensor.shape for name, tensor in weights(default).items()
    }


def test_values_of_a_preset_can_be_overridden():
    assert parse().preset == "64px"
    args = parse("--preset", "32px", "--codebook_size", 99, "--block_out_channels", "32,64", "--layers_per_block", 3)
    assert (args.codebook_size, args.block_out_channels, args.layers_per_block) == (99, [32, 64], 3)
    assert (args.resolution, args.latent_channels) == (32, 16)
    model = SCRIPT.build_model(args)
    assert model.config.scale_sizes == default_scale_sizes(16)
    args = parse("--preset=32px", "--scale_sizes", "1,3,8")
    assert args.resolution == 32
    with torch.device("meta"):
        assert SCRIPT.build_model(args).config.scale_sizes == [[1, 1], [3, 3], [8, 8]]


def test_a_resolution_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`resolution` must be a multiple of the compression ratio 8, got 60"):
        SCRIPT.build_model(parse("--preset", "64px", "--resolution", 60))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "63px"], "invalid choice: '63px'"),
        (["--train_decoder_only"], "`--train_decoder_only` needs `--pretrained_model_name_or_path`"),
        (["--scale_sizes", "1,x"], "invalid int_list value: '1,x'"),
        (["--codebook_update", "mean"], "invalid choice: 'mean'"),
        (["--num_validation_images", 0], "argument --num_validation_images: must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert message in capsys.readouterr().err


# Losses


class Output:
    def __init__(self, sample):
        self.sample = sample
        self.codebook_loss, self.commitment_loss = torch.tensor(3.0), torch.tensor(5.0)


@pytest.fixture
def sample():
    """A reconstruction that a last layer made, the layer's weights and the images."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 3, 3, padding=1)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    return Output(layer(images)), layer.weight, images


def test_losses_are_weighted_and_added(sample):
    output, last_layer, images = sample
    args = parse(
        "--l1_weight", 2, "--l2_weight", 3, "--perceptual_weight", 0, "--codebook_weight", 0.5,
        "--commitment_weight", 0.25,
    )  # fmt: skip
    losses = SCRIPT.TokenizerLosses(args, Accelerator(), last_layer)(output, images, None)
    error = (output.sample - images).detach()
    expected = {
        "l1": 2 * error.abs().mean().item(),
        "l2": 3 * error.square().mean().item(),
        "codebook": 1.5,
        "commitment": 1.25,
    }
    assert {name: value.item() for name, value in losses.items() if name != "loss"} == pytest.approx(expected)
    assert losses["loss"].item() == pytest.approx(sum(expected.values()))


def test_the_perceptual_loss_is_one_of_them(sample):
    output, last_layer, images = sample
    losses = SCRIPT.TokenizerLosses(parse("--perceptual_weight", 0.5), Accelerator(), last_layer)(output, images, None)
    assert losses["perceptual"] > 0
    parts = [value for name, value in losses.items() if name != "loss"]
    torch.testing.assert_close(losses["loss"], sum(parts))


def test_the_adversarial_loss_is_relative_to_the_reconstruction_or_fixed(sample):
    output, last_layer, images = sample
    discriminator = PatchDiscriminator(channels=8, num_layers=1)
    generated = generator_loss(discriminator(output.sample))
    options = ["--adversarial_weight", 0.5, "--perceptual_weight", 0]
    fixed = SCRIPT.TokenizerLosses(parse(*options, "--fixed_adversarial_weight"), Accelerator(), last_layer)
    torch.testing.assert_close(fixed(output, images, discriminator)["adversarial"], 0.5 * generated)
    relative = SCRIPT.TokenizerLosses(parse(*options), Accelerator(), last_layer)
    losses = relative(output, images, discriminator)
    pulls = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (losses["l1"] + losses["l2"], losses["adversarial"])
    ]
    torch.testing.assert_close(pulls[1], 0.5 * pulls[0], rtol=1e-3, atol=0)
    assert "adversarial" not in relative(output, images, None)


def test_scale_dropout_keeps_the_share_of_whole_images():
    args, sample = parse("--scale_dropout_prob", 0.3), torch.zeros(10_000, 1)
    torch.manual_seed(0)
    counts = SCRIPT.kept_scales(args, 4, sample).bincount(minlength=5)
    # Fewer scales are drawn among all of them, so that a quarter of the images drawn keep theirs.
    expected = torch.tensor([0.0, 750, 750, 750, 7750])
    assert ((counts - expected).abs() <= 4 * expected.sqrt()).all()
    assert SCRIPT.kept_scales(parse(), 4, sample) is None
    assert SCRIPT.kept_scales(parse("--scale_dropout_prob", 1.0), 1, sample).unique().tolist() == [1]


# Runs


def test_terms_of_the_loss_are_logged_and_add_up(plain):
    log = [record for record in read_log(plain) if "loss" in record]
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    for record in log:
        terms = [record[name] for name in ("l1", "l2", "codebook", "commitment")]
        assert record["loss"] == pytest.approx(sum(terms), rel=1e-5)
        assert "adversarial" not in record
    assert "revived_codes" in log[1]
    [validation] = [record for record in read_log(plain) if "val_psnr" in record]
    assert validation.keys() == {
        "step", "val_num_images", "val_psnr", "val_ssim", "val_usage", "val_perplexity", "val_codes_used"
    }  # fmt: skip
    assert validation["val_num_images"] == 24
    assert len(validation["val_usage"]) == 3


def test_a_discriminator_joins_at_its_step_and_changes_nothing_before(image_folder, plain, tmp_path):
    train_tokenizer(image_folder, tmp_path / "late", *QUIET, *ADVERSARIAL, "--adversarial_start_step", 100)
    assert_same_weights(load(tmp_path / "late"), load(plain))
    train_tokenizer(image_folder, tmp_path / "run", *QUIET, *ADVERSARIAL, "--adversarial_start_step", 2)
    log = [record for record in read_log(tmp_path / "run") if "loss" in record]
    assert ["adversarial" in record for record in log] == [False, False, True, True]
    assert ["discriminator" in record for record in log] == [False, False, True, True]
    assert all(math.isfinite(value) for record in log for value in record.values())
    for record in log[2:]:
        assert record["loss"] == pytest.approx(
            sum(record[name] for name in ("l1", "l2", "codebook", "commitment", "adversarial")), rel=1e-4
        )
    assert 0 < log[-1]["discriminator"] < 2
    different = [
        name
        for name, tensor in weights(load(plain)).items()
        if not tensor.equal(weights(load(tmp_path / "run"))[name])
    ]
    assert any(name.startswith("decoder") for name in different)


def test_a_run_with_all_its_parts_resumes_exactly(image_folder, tmp_path):
    options = [
        *QUIET, *ADVERSARIAL, "--codebook_update", "ema", "--scale_dropout_prob", 0.5, "--gradient_checkpointing",
        "--gradient_accumulation_steps", 2, "--random_flip", "--discriminator_learning_rate", 1e-3,
        "--checkpointing_steps", 2,
    ]  # fmt: skip
    train_tokenizer(image_folder, tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    train_tokenizer(image_folder, tmp_path / "parts", *options, "--resume_from_checkpoint", "latest")
    assert_same_weights(load(tmp_path / "parts"), load(tmp_path / "whole"))
    assert read_log(tmp_path / "parts") == [record for record in read_log(tmp_path / "whole") if record["step"] > 2]


def test_a_discriminator_too_deep_for_the_images_is_refused_at_once(image_folder, tmp_path):
    with pytest.raises(ValueError, match="`discriminator_layers` must be at most 2 for images of 16 pixels, got 3"):
        train_tokenizer(
            image_folder, tmp_path / "run", *QUIET, "--adversarial_weight", 0.5, "--adversarial_start_step", 3
        )
    train_tokenizer(
        image_folder, tmp_path / "deepest", *QUIET, "--adversarial_weight", 0.5, "--discriminator_layers", 2,
        "--max_train_steps", 1,
    )  # fmt: skip


def test_codes_follow_running_means_if_asked_to(image_folder, tmp_path):
    train_tokenizer(image_folder, tmp_path / "run", *QUIET, "--codebook_update", "ema")
    tracker = torch.load(tmp_path / "run" / "checkpoint-4" / "custom_checkpoint_2.pkl", weights_only=True)
    used = tracker["counts"] >= 0.01
    assert used.any()
    means = tracker["sums"][used] / tracker["counts"][used, None]
    # The averaged weights hold the codes as they are, not averaged once more.
    codes = load(tmp_path / "run").quantize.codebook.weight.detach()
    torch.testing.assert_close(codes[used], means, atol=1e-5, rtol=0)


def test_the_codebook_has_no_gradients_with_running_means():
    model = SCRIPT.build_model(parse("--preset", "32px"))
    SCRIPT.freeze(model, parse("--codebook_update", "ema"))
    assert not model.quantize.codebook.weight.requires_grad
    assert model.encoder.conv_in.weight.requires_grad
    SCRIPT.freeze(model, parse("--train_decoder_only", "--pretrained_model_name_or_path", "x"))
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"decoder", "post_quant_conv"}


def test_the_tokenizer_of_a_pipeline_can_be_the_start(trained):
    folders = trained / "model", trained / "model" / "vqvae"
    pair = [SCRIPT.build_model(parse("--pretrained_model_name_or_path", str(folder))) for folder in folders]
    for mine, alone in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
        assert torch.equal(mine, alone)


def test_convolutions_that_no_scale_uses_are_left_out():
    model = SCRIPT.build_model(parse("--preset", "32px", "--scale_sizes", "1,8"))
    SCRIPT.freeze(model, parse())
    trained = [conv.weight.requires_grad for conv in model.quantize.residual_convs]
    assert trained == [True, False, False, True]


@pytest.mark.parametrize(("until", "revivals"), [(1.0, [1, 2, 3, 4]), (0.5, [1, 2]), (0, [])])
def test_codes_are_revived_for_a_share_of_the_run(image_folder, tmp_path, until, revivals):
    train_tokenizer(image_folder, tmp_path / "run", *QUIET, "--revive_steps", 1, "--revive_until", until)
    assert [record["step"] for record in read_log(tmp_path / "run") if "revived_codes" in record] == revivals


def test_scale_dropout_trains_the_decoder_on_fewer_scales(image_folder, plain, tmp_path):
    train_tokenizer(image_folder, tmp_path / "run", *QUIET, "--scale_dropout_prob", 1.0)
    logs = [[record for record in read_log(folder) if "loss" in record] for folder in (plain, tmp_path / "run")]
    # The quantizer's losses are those of all scales; pixels come from fewer.
    assert logs[0][0]["codebook"] == logs[1][0]["codebook"]
    assert logs[0][0]["l1"] != logs[1][0]["l1"]


def test_gradient_checkpointing_changes_nothing(image_folder, plain, tmp_path):
    train_tokenizer(image_folder, tmp_path / "run", *QUIET, "--gradient_checkpointing")
    assert_same_weights(load(tmp_path / "run"), load(plain), atol=1e-5)


def test_processes_that_read_images_change_nothing(image_folder, plain, tmp_path):
    train_tokenizer(image_folder, tmp_path / "run", *QUIET, "--dataloader_num_workers", 2)
    assert_same_weights(load(tmp_path / "run"), load(plain))


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_training_the_decoder_alone_keeps_all_tokens(image_folder, trained, pixels, tmp_path, update):
    train_tokenizer(
        image_folder, tmp_path / "run", *QUIET, *ADVERSARIAL, "--pretrained_model_name_or_path",
        trained / "tokenizer", "--train_decoder_only", "--codebook_update", update, "--learning_rate", 1e-2,
        "--revive_until", 1,
    )  # fmt: skip
    before, after = load(trained / "tokenizer"), load(tmp_path / "run")
    assert torch.equal(before.tokenize(pixels), after.tokenize(pixels))
    for name, tensor in weights(before).items():
        if not name.startswith(("decoder", "post_quant_conv")):
            assert torch.equal(weights(after)[name], tensor), name
    assert (before.decoder.conv_out.weight - after.decoder.conv_out.weight).abs().max() > 1e-3
    assert (before.post_quant_conv.weight - after.post_quant_conv.weight).abs().max() > 1e-3


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_run_may_start_from_a_tokenizer_and_its_configuration(image_folder, trained, tmp_path, update):
    train_tokenizer(
        image_folder, tmp_path / "run", *QUIET, "--pretrained_model_name_or_path", trained / "tokenizer",
        "--learning_rate", 0, "--codebook_update", update, "--codebook_size", 64, "--resolution", 32,
    )  # fmt: skip
    before, after = load(trained / "tokenizer"), load(tmp_path / "run")
    public = [{k: v for k, v in model.config.items() if not k.startswith("_")} for model in (before, after)]
    fingerprints = [config.pop("codebook_fingerprint") for config in public]
    assert public[0] == public[1]
    assert (fingerprints[0] == fingerprints[1]) == (update == "gradient")
    if update == "gradient":
        assert_same_weights(before, after)
    else:
        moved = [name for name in weights(before) if not torch.equal(weights(before)[name], weights(after)[name])]
        assert moved == ["quantize.codebook.weight"]


def test_small_batches_add_up_to_a_large_one(image_folder, trained, tmp_path):
    options = [
        *QUIET, "--pretrained_model_name_or_path", trained / "tokenizer", "--max_train_steps", 2, "--adam_epsilon",
        1e-2, "--learning_rate", 1e-2, "--lr_warmup_steps", 0, "--center_crop", "--scale_dropout_prob", 0,
    ]  # fmt: skip
    train_tokenizer(image_folder, tmp_path / "large", *options, "--train_batch_size", 8)
    train_tokenizer(
        image_folder, tmp_path / "small", *options, "--train_batch_size", 4, "--gradient_accumulation_steps", 2
    )
    assert_same_weights(load(tmp_path / "small"), load(tmp_path / "large"), atol=1e-5)
    before, after = (
        weights(load(folder))["decoder.conv_out.weight"] for folder in (trained / "tokenizer", tmp_path / "large")
    )
    assert (before - after).abs().max() > 1e-4


@pytest.mark.usefixtures("_own_precision")
def test_half_precision_finishes_with_a_finite_loss(image_folder, tmp_path):
    train_tokenizer(image_folder, tmp_path / "run", *QUIET, *ADVERSARIAL, "--mixed_precision", "bf16")
    assert all(math.isfinite(record["loss"]) for record in read_log(tmp_path / "run") if "loss" in record)
    assert {tensor.dtype for tensor in weights(load(tmp_path / "run")).values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights(load(tmp_path / "run")).values())


def test_a_loss_that_is_no_number_stops_the_run_with_its_step(image_folder, tmp_path):
    with pytest.raises(FloatingPointError, match=r"at step [23]\b"):
        train_tokenizer(image_folder, tmp_path / "run", *QUIET, "--learning_rate", 1e30, "--checkpointing_steps", 1)
    assert not (tmp_path / "run" / "diffusion_pytorch_model.safetensors").exists()
    assert read_log(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def test_scales_that_use_few_codes_are_named_in_a_warning(image_folder, tmp_path, caplog):
    def warnings(threshold):
        caplog.clear()
        train_tokenizer(
            image_folder, tmp_path / f"run-{threshold}", *QUIET, "--usage_warning", threshold, "--max_train_steps", 1
        )
        return [record.getMessage() for record in caplog.records if "use less than" in record.getMessage()]

    with caplog.at_level(logging.WARNING):
        [message] = warnings(1.0)
        assert message.startswith("Step 1: the scales 1x1 (perplexity ")
        assert "use less than 100% of the codes they could" in message
        assert warnings(0.0) == []


def test_bad_pictures_are_left_out_or_refused(image_folder, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    (folder / "cold" / "bad.png").write_bytes(b"")
    options = [*QUIET, "--max_train_steps", 1, "--cache_dir", tmp_path / "datasets"]
    train_tokenizer(folder, tmp_path / "run", *options)
    assert read_log(tmp_path / "run")[-1]["val_num_images"] == 24
    with pytest.raises(ValueError, match=r"must hold readable pictures, but 1 of 25"):
        train_tokenizer(folder, tmp_path / "strict", *options, "--strict_data")
