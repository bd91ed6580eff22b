"""A light decoder for the tokens of another tokenizer, and every option of `distill_decoder.py`."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import tiny_vqvae
from training.tiny_runs import (
    assert_same_weights,
    distill_decoder,
    load_script,
    read_log,
    run_script,
    train_tokenizer,
    weights,
)

from srdd import MultiScaleVQModel, SRDDPipeline
from srdd.data.images import image_to_tensor, load_labelled_images
from srdd.training.light_decoder import light_tokenizer


SCRIPT = load_script("distill_decoder")
QUIET = ["--report_to", "none", "--logging_steps", 1, "--checkpointing_steps", 4]
LEARNING = ["--max_train_steps", 30, "--learning_rate", 1e-2, "--ema_decay", 0.8, "--validation_steps", 30]


def parse(*arguments):
    return SCRIPT.parse_args(["--output_dir", "out", "--teacher", "model", *(str(word) for word in arguments)])


def load(folder: Path) -> SRDDPipeline:
    pipe = SRDDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: SRDDPipeline, **options):
    return pipe(["warm", "cold"], generator=torch.Generator().manual_seed(0), **options)


def losses(folder: Path) -> list[dict]:
    return [record for record in read_log(folder) if "loss" in record]


def parts_but_the_decoder(model: MultiScaleVQModel) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(model).items() if not name.startswith("decoder.")}


def assert_same_tokens(left: MultiScaleVQModel, right: MultiScaleVQModel) -> None:
    """The same bits everywhere but in the decoder."""
    left, right = parts_but_the_decoder(left), parts_but_the_decoder(right)
    assert left.keys() == right.keys()
    assert {name.split(".")[0] for name in left} == {"encoder", "quant_conv", "quantize", "post_quant_conv"}
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.fixture(scope="module")
def run(image_folder, trained, tmp_path_factory):
    """A function that distils in a folder of its own."""
    root = tmp_path_factory.mktemp("light")

    def start(name: str, *arguments, teacher: Path = trained / "model") -> Path:
        distill_decoder(image_folder, teacher, root / name, *QUIET, *arguments)
        return root / name

    start.root = root
    return start


@pytest.fixture(scope="module")
def finished(run):
    """A few steps."""
    return run("finished", "--checkpointing_steps", 2, "--random_flip")


@pytest.fixture(scope="module")
def pixels(image_folder) -> torch.Tensor:
    """The training images, cropped in the centre."""
    cache_dir = str(image_folder.parent / "datasets")
    images = load_labelled_images(train_data_dir=str(image_folder), cache_dir=cache_dir)
    return torch.stack([image_to_tensor(image, 16) for image in images.train["image"]])


# The light tokenizer


@pytest.mark.parametrize("patch_size", [1, 2])
def test_all_but_the_decoder_is_the_teachers(patch_size):
    teacher = tiny_vqvae(patch_size=patch_size, sample_size=8 * patch_size, normalize_codes=True)
    light = light_tokenizer(teacher)
    assert_same_tokens(light, teacher)
    images = torch.rand(2, 3, *[8 * patch_size] * 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        outputs = [model(images) for model in (light, teacher)]
    assert torch.equal(outputs[0].token_ids, outputs[1].token_ids)
    assert outputs[0].sample.shape == images.shape
    trained = {name.split(".")[0] for name, parameter in light.named_parameters() if parameter.requires_grad}
    assert trained == {"decoder"}


def test_a_decoder_has_a_quarter_of_the_channels():
    sizes = {"block_out_channels": [160, 320], "norm_num_groups": 32, "mid_block_add_attention": True}
    teacher = tiny_vqvae(**sizes, up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"])
    light = light_tokenizer(teacher)
    config = light.config
    assert (config.decoder_block_out_channels, config.decoder_norm_num_groups) == ([40, 80], 8)
    assert (config.block_out_channels, config.norm_num_groups) == ([160, 320], 32)
    assert not [name for name in weights(light.decoder) if "attentions" in name]
    assert light.num_parameters() < teacher.num_parameters()
    lighter = light_tokenizer(light, layers_per_block=0)  # of the light one's
    assert lighter.config.decoder_block_out_channels == [8, 16]
    assert_same_tokens(lighter, teacher)


def test_a_decoder_has_the_sizes_that_are_asked_for():
    light = light_tokenizer(tiny_vqvae(), [12, 20], layers_per_block=2, mid_block_add_attention=True)
    config = light.config
    assert (config.decoder_block_out_channels, config.decoder_layers_per_block) == ([12, 20], 2)
    assert config.decoder_norm_num_groups == 4
    assert len(light.decoder.up_blocks[0].resnets) == 3
    assert light.decoder.mid_block.attentions[0] is not None
    assert light.decoder.conv_out.in_channels == 12


# Runs


def test_a_pipeline_ends_as_a_pipeline_with_the_same_tokens(trained, finished):
    before, after = load(trained / "model"), load(finished)
    assert_same_tokens(after.vqvae, before.vqvae)
    assert_same_weights(after.transformer, before.transformer)
    assert dict(after.scheduler.config) == dict(before.scheduler.config)
    assert after.vqvae.config.decoder_block_out_channels == [8, 8]
    assert after.vqvae.decoder.conv_in.out_channels == 8
    drawn = [draw(pipe, output_type="latent") for pipe in (before, after)]
    assert torch.equal(drawn[0].token_ids, drawn[1].token_ids)
    assert draw(after, output_type="pt").images.shape == (2, 3, 16, 16)
    for path in finished.rglob("*.json"):
        assert "_name_or_path" not in path.read_text()


def test_a_light_decoder_is_swapped_into_another_pipeline(trained, finished):
    light = MultiScaleVQModel.from_pretrained(finished, subfolder="vqvae")
    pipe = SRDDPipeline.from_pretrained(trained / "model", vqvae=light)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe, output_type="pt").images, draw(load(finished), output_type="pt").images)


def test_a_tokenizer_ends_as_a_tokenizer(trained, run):
    folder = run("tokenizer", teacher=trained / "tokenizer")
    assert not (folder / "model_index.json").exists()
    light = MultiScaleVQModel.from_pretrained(folder)
    assert_same_tokens(light, MultiScaleVQModel.from_pretrained(trained / "tokenizer"))
    card = (folder / "README.md").read_text()
    assert "of the decoder alone." in card
    assert "MultiScaleVQModel.from_pretrained" in card


def test_the_card_says_what_was_trained_and_shows_it(finished):
    card = (finished / "README.md").read_text()
    assert "4 steps of 8 images per process, of the decoder alone." in card
    assert "decoder_block_out_channels [8, 8], decoder_layers_per_block 1" in card
    assert "None" not in card
    last = read_log(finished)[-1]
    for name in ("psnr", "teacher_psnr", "psnr_to_teacher"):
        assert f"{name} {last[f'val_{name}']:.4g}" in card
    with Image.open(finished / "reconstruction.png") as picture:
        assert picture.size == (2 * 16, 3 * 16)  # images, the teacher's pictures, the light decoder's
    snippet = card.split("```py\n")[1].split("```")[0].replace('"finished"', repr(str(finished)))
    names: dict = {}
    exec(snippet, names)
    assert names["image"].size == (16, 16)


def test_terms_of_the_loss_are_weighted_and_add_up(run):
    terms = ("image_l1", "image_l2", "teacher_l1", "teacher_l2")
    [plain] = losses(run("plain", "--max_train_steps", 1))
    [heavy] = losses(
        run(
            "heavy", "--max_train_steps", 1, "--image_weight", 2, "--teacher_weight", 3, "--l1_weight", 5,
            "--l2_weight", 7,
        )
    )  # fmt: skip
    factors = (2 * 5, 2 * 7, 3 * 5, 3 * 7)
    for name, factor in zip(terms, factors):
        assert heavy[name] == pytest.approx(factor * plain[name], rel=1e-5)
    for record in (plain, heavy):
        assert record["loss"] == pytest.approx(sum(record[name] for name in terms), rel=1e-5)
        assert all(record[name] > 0 for name in terms)


@pytest.mark.parametrize(("left_out", "kept"), [("image", "teacher"), ("teacher", "image")])
def test_a_target_without_weight_is_left_out(run, left_out, kept):
    [record] = losses(run(f"no {left_out}", "--max_train_steps", 1, f"--{left_out}_weight", 0))
    assert record.keys() == {"step", "loss", "lr", f"{kept}_l1", f"{kept}_l2"}


def test_the_first_loss_is_that_of_the_new_decoder(trained, run, pixels):
    torch.manual_seed(0)
    teacher = MultiScaleVQModel.from_pretrained(trained / "tokenizer")
    light = light_tokenizer(teacher)
    with torch.no_grad():
        found = light(pixels)
        wanted = teacher.decode_tokens(found.token_ids).sample.clamp(-1, 1)
    [record] = losses(run("first", "--max_train_steps", 1, "--train_batch_size", 24, "--center_crop"))
    for target, name in ((pixels, "image"), (wanted, "teacher")):
        error = found.sample - target
        assert record[f"{name}_l1"] == pytest.approx(error.abs().mean().item(), abs=1e-5)
        assert record[f"{name}_l2"] == pytest.approx(error.square().mean().item(), abs=1e-5)


def test_the_perceptual_distance_to_the_images_is_a_part(run):
    [record] = losses(run("perceptual", "--max_train_steps", 1, "--perceptual_weight", 0.5))
    assert record["image_perceptual"] > 0
    assert "teacher_perceptual" not in record
    assert record["loss"] == pytest.approx(
        sum(value for name, value in record.items() if name.startswith(("image_", "teacher_"))), rel=1e-5
    )


def test_a_light_decoder_learns_to_draw_what_it_shall(run):
    # The teacher had four steps and draws something else than the images.
    last = {}
    for target, other in (("teacher", "image"), ("image", "teacher")):
        folder = run(f"learned from {target}", *LEARNING, f"--{other}_weight", 0)
        log = losses(folder)
        assert log[-1]["loss"] < 0.7 * log[0]["loss"]
        last[target] = read_log(folder)[-1]
    assert last["teacher"]["val_psnr_to_teacher"] > last["image"]["val_psnr_to_teacher"] + 3
    assert last["image"]["val_psnr"] > last["teacher"]["val_psnr"] + 1
    assert last["image"]["val_psnr"] > last["image"]["val_teacher_psnr"] + 1


def test_a_run_goes_on_where_it_was(run, finished):
    folder = run.root / "resumed"
    shutil.copytree(finished / "checkpoint-2", folder / "checkpoint-2")
    shutil.copyfile(finished / "train_log.jsonl", folder / "train_log.jsonl")
    run("resumed", "--checkpointing_steps", 2, "--random_flip", "--resume_from_checkpoint", "latest")
    assert_same_weights(load(folder).vqvae, load(finished).vqvae)
    assert read_log(folder) == read_log(finished)
    assert (folder / "reconstruction.png").read_bytes() == (finished / "reconstruction.png").read_bytes()


def test_weights_are_averages_over_the_steps(run, finished):
    last = run("last", "--random_flip", "--ema_decay", 0)
    left, right = (weights(load(folder).vqvae) for folder in (last, finished))
    different = [name for name, tensor in left.items() if not tensor.equal(right[name])]
    assert {name.split(".")[0] for name in different} == {"decoder"}


def test_a_light_decoder_is_trained_further_as_others_are(image_folder, finished, tmp_path):
    train_tokenizer(
        image_folder, tmp_path / "run", *QUIET, "--pretrained_model_name_or_path", finished / "vqvae",
        "--train_decoder_only", "--max_train_steps", 1,
    )  # fmt: skip
    light = MultiScaleVQModel.from_pretrained(tmp_path / "run")
    assert light.config.decoder_block_out_channels == [8, 8]
    before, after = (parts_but_the_decoder(model) for model in (load(finished).vqvae, light))
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed <= {"post_quant_conv"}


def test_gradient_checkpointing_changes_nothing(run, finished):
    folder = run("checkpointing", "--random_flip", "--gradient_checkpointing")
    assert_same_weights(load(folder).vqvae, load(finished).vqvae, atol=1e-5)


@pytest.mark.usefixtures("_own_precision")
def test_half_precision_finishes_with_a_finite_loss_and_the_same_tokens(trained, run):
    folder = run("half", "--mixed_precision", "bf16")
    assert all(math.isfinite(record["loss"]) for record in losses(folder))
    assert_same_tokens(load(folder).vqvae, load(trained / "model").vqvae)


def test_the_finished_decoder_is_measured_as_the_run_did(image_folder, trained, finished, tmp_path, capsys):
    run_script(
        "evaluate_tokenizer", "--pretrained_vqvae_name_or_path", finished / "vqvae", "--teacher_vqvae_name_or_path",
        trained / "tokenizer", "--train_data_dir", image_folder, "--cache_dir", image_folder.parent / "datasets",
        "--split", "train", "--no_rfd", "--device", "cpu", "--num_pictures", 4, "--output", tmp_path / "rows.png",
    )  # fmt: skip
    report, last = json.loads(capsys.readouterr().out), read_log(finished)[-1]
    for name in ("psnr", "teacher_psnr", "psnr_to_teacher", "ssim"):
        assert report[name] == pytest.approx(last[f"val_{name}"], abs=1e-3)
    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.size == (4 * 16, 3 * 16)


# Bad input


def test_a_teacher_must_be_a_pipeline_or_a_tokenizer(trained, tmp_path):
    for name in (trained / "model" / "transformer", tmp_path, "no/such/teacher"):
        with pytest.raises(
            ValueError, match=rf"`teacher` must be a folder or Hub id of a tokenizer, .*, got '{name}'"
        ):
            SCRIPT.load_teacher(str(name))


def test_a_tokenizer_has_no_code_to_draw_with(trained, run):
    with pytest.raises(ValueError, match="`with_code` must be left out with a `teacher` that is a tokenizer"):
        run("tokenizer with code", "--with_code", teacher=trained / "tokenizer")
    assert not (run.root / "tokenizer with code" / "train_log.jsonl").exists()


def test_a_pipeline_carries_its_code_where_it_was_asked_to(run):
    folder = run("with code", "--with_code")
    names = {path.name for path in (folder / "vqvae").glob("*.py")}
    assert [f"{path.name}.py" for path in folder.glob("srdd_*")] == [*names]
    assert draw(SRDDPipeline.from_pretrained(folder), output_type="pt").images.isfinite().all()


def test_sizes_that_do_not_fit_the_teacher_are_refused(run):
    with pytest.raises(ValueError, match=r"`decoder_block_out_channels` must be 2 positive integers.* got \[8\]"):
        run("one level", "--decoder_block_out_channels", "8")
    assert not (run.root / "one level" / "train_log.jsonl").exists()


@pytest.mark.parametrize(
    "arguments", [["--image_weight", -1], ["--teacher_weight", -1], ["--image_weight", 0, "--teacher_weight", 0]]
)
def test_weights_that_make_no_loss_are_refused(capsys, arguments):
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert "`--image_weight` and `--teacher_weight` must not be negative" in capsys.readouterr().err


def test_a_teacher_is_needed(capsys):
    with pytest.raises(SystemExit):
        SCRIPT.parse_args(["--output_dir", "out"])
    assert "--teacher" in capsys.readouterr().err
