"""One model for several schedules, as `--schedules` of both scripts trains it."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_scheduler
from tiny_texts import tiny_text_pipeline
from training.comparing import assert_same_run
from training.launching import caption_folders
from training.tiny_runs import assert_same_weights, distill, read_log, train_texts, train_transformer

from srdd import ScaleScheduler, SRDDPipeline, SRDDTextPipeline
from srdd.data.images import image_to_tensor, load_labelled_images
from srdd.training.settings import TransformerSettings
from srdd.training.trained_schedules import TrainedSchedules


BOTH = ["--schedules", "1-2-4", "1-4"]
SIX_STEPS = ["--max_train_steps", 6, "--checkpointing_steps", 3, "--validation_steps", 6, "--ema_decay", 0]
SIX_STEPS += ["--learning_rate", 1e-2]
# Of seed 0: all scales in these steps, two of them in the others. Checkpoints halve them, and both halves have both.
STEPS_WITH_ALL_SCALES = [2, 3, 4]


def load(folder: Path) -> SRDDPipeline:
    pipe = SRDDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def losses(folder: Path) -> list[dict]:
    return [record for record in read_log(folder) if "loss" in record]


def scales_of(record: dict) -> list[str]:
    return [name.removeprefix("loss/") for name in record if name.startswith("loss/")]


@pytest.fixture(scope="module")
def run(image_folder, trained, tmp_path_factory):
    """A function that trains or distils in a folder of its own, with one token cache for all."""
    root = tmp_path_factory.mktemp("runs")

    def start(name: str, *arguments, teacher: Path | None = None) -> Path:
        options = ["--report_to", "none", "--logging_steps", 1, "--token_cache_dir", root / "tokens", *arguments]
        if teacher is None:
            train_transformer(image_folder, trained / "tokenizer", root / name, *options)
        else:
            distill(image_folder, teacher, root / name, *options)
        return root / name

    start.root = root
    return start


@pytest.fixture(scope="module")
def both(run):
    """A model of two schedules."""
    return run("both", *BOTH, *SIX_STEPS)


# Which schedule


def test_every_schedule_has_its_share_of_the_steps_in_no_order():
    scales = [[1, 2, 4], [1, 4], [1, 2, 4]]
    schedules = TrainedSchedules([tiny_scheduler(scales=each) for each in scales], seed=5)
    token_ids = torch.arange(21 + 17 + 21).expand(2, -1)
    assert schedules.mean_num_tokens == pytest.approx(59 / 3)
    firsts = []
    for step in range(3000):
        scheduler, own_ids = schedules.of_step(step, token_ids)
        assert own_ids.shape == (2, scheduler.num_tokens)
        firsts.append(own_ids[0, 0].item())
        assert own_ids[1].tolist() == list(range(firsts[-1], firsts[-1] + scheduler.num_tokens))
    assert set(firsts) == {0, 21, 38}
    assert all(900 < count < 1100 for count in Counter(firsts).values())
    pairs = Counter(zip(firsts, firsts[1:]))
    assert all(250 < count < 420 for count in pairs.values())
    again = TrainedSchedules(schedules.schedulers, seed=5)
    assert again.of_step(7, token_ids)[1][0, 0] == firsts[7]
    other = TrainedSchedules(schedules.schedulers, seed=6)
    assert [other.of_step(step, token_ids)[1][0, 0].item() for step in range(50)] != firsts[:50]


def test_all_schedules_have_the_options_of_the_pipelines_scheduler():
    settings = TransformerSettings(output_dir="out", schedules=[[1, 4], [1, 2, 4]], seed=3)
    schedules = TrainedSchedules.from_settings(settings, tiny_scheduler(top_k=7))
    assert [scheduler.scales for scheduler in schedules.schedulers] == [[[1, 1], [4, 4]], [[1, 1], [2, 2], [4, 4]]]
    assert {scheduler.config.top_k for scheduler in schedules.schedulers} == {7}
    assert schedules.first is schedules.schedulers[0]
    assert schedules.seed == 3
    alone = tiny_scheduler(scales=[1, 4])
    assert TrainedSchedules.from_settings(TransformerSettings(output_dir="out"), alone).schedulers == [alone]


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ([], r"`schedules` must be at least one, and each of them once, got \[\]"),
        ([[1, 4], [1, 2, 4], [1, 4]], r"`schedules` must be at least one, and each of them once, got \[\[1, 4"),
        ([[1, 2, 4], [1, 3, 4]], r"`schedules` must be scales that the model has, got \[1, 3, 4\]: .*\[1, 2, 4\]"),
        ([[1, 2, 4], [1, 2]], r"`schedules` must be scales that the model has, got \[1, 2\]"),
        ([[2, 4]], r"`schedules` must be scales that the model has, got \[2, 4\]"),
        ([[1, 4, 2, 4]], r"`schedules` must be scales that the model has, got \[1, 4, 2, 4\]: .* must grow"),
        ([[1, 2, 4], []], r"`schedules` must be scales that the model has, got \[\]"),
    ],
)
def test_schedules_that_the_model_does_not_know_are_refused(schedules, message):
    with pytest.raises(ValueError, match=message):
        TrainedSchedules.from_settings(TransformerSettings(output_dir="out", schedules=schedules), tiny_scheduler())


def test_weights_of_scales_are_for_one_schedule():
    options = {"output_dir": "out", "scale_loss_weights": [1.0, 2.0]}
    with pytest.raises(ValueError, match=r"`scale_loss_weights` must be left out with several `schedules`, got \[1.0"):
        TrainedSchedules.from_settings(TransformerSettings(schedules=[[1, 4], [1, 2, 4]], **options), tiny_scheduler())
    one = TrainedSchedules.from_settings(TransformerSettings(schedules=[[1, 4]], **options), tiny_scheduler())
    assert one.first.scales == [[1, 1], [4, 4]]


@pytest.mark.parametrize("script", ["train", "distill"])
def test_nothing_is_tokenised_for_schedules_that_cannot_be_trained(run, trained, script, tmp_path):
    teacher = {"teacher": trained / "model"} if script == "distill" else {}
    with pytest.raises(ValueError, match="`schedules` must be scales that the model has"):
        run(f"unknown {script}", "--schedules", "1-2-4", "1-3-4", "--token_cache_dir", tmp_path / "tokens", **teacher)
    assert not (tmp_path / "tokens").exists()


# Training


def test_a_step_learns_one_schedule_and_its_scales_alone_are_logged(both):
    log = losses(both)
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5, 6]
    for record in log:
        has_all = record["step"] in STEPS_WITH_ALL_SCALES
        assert scales_of(record) == (["1x1", "2x2", "4x4"] if has_all else ["1x1", "4x4"])
        counts = [1, 4, 16] if has_all else [1, 16]
        total = sum(count * record[f"loss/{name}"] for count, name in zip(counts, scales_of(record)))
        assert record["loss"] == pytest.approx(total / sum(counts), rel=1e-5)


def test_one_schedule_is_trained_as_without_the_option(run):
    named, plain = run("named", "--schedules", "1-2-4"), run("plain")
    assert read_log(named) == read_log(plain)
    assert_same_weights(load(named).transformer, load(plain).transformer)
    assert load(named).scheduler.scales == load(plain).scheduler.scales


def test_a_step_is_that_of_a_run_with_its_schedule_alone(run):
    options = ["--max_train_steps", 1, "--learning_rate", 1e-2]
    folders = [run(f"step {index}", *options, *each) for index, each in enumerate((BOTH, ["--schedules", "1-4"]))]
    assert scales_of(losses(folders[0])[0]) == ["1x1", "4x4"]
    assert losses(folders[0]) == losses(folders[1])
    assert_same_weights(*(load(folder).transformer for folder in folders))


def test_the_pipeline_draws_over_the_first_schedule_and_over_the_others(both):
    pipe = load(both)
    assert pipe(["warm"], output_type="pt").token_ids.shape == (1, 21)
    pipe.scheduler = ScaleScheduler.from_config(pipe.scheduler.config, scales=[1, 4])
    assert pipe(["warm"], output_type="pt").token_ids.shape == (1, 17)


def test_the_first_schedule_is_the_one_that_was_named_first(run):
    folder = run("turned", "--schedules", "1-4", "1-2-4", "--max_train_steps", 1)
    assert load(folder).scheduler.scales == [[1, 1], [4, 4]]
    assert read_log(folder)[-1]["val_scales"] == [[1, 1], [4, 4]]


@torch.no_grad()
def held_out_loss(pipe: SRDDPipeline, images, scheduler: ScaleScheduler) -> float:
    pixels = torch.stack([image_to_tensor(image, 16) for image in images.train["image"]])
    token_ids = pipe.vqvae.tokenize(pixels, scheduler.scales)
    inputs = pipe.vqvae.teacher_forcing_inputs(token_ids, scheduler.scales)
    timesteps = [scale.timestep for scale in scheduler.visits]
    labels = torch.tensor(images.train["label"])
    logits = pipe.transformer(inputs, timestep=timesteps, class_labels=labels).sample
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids.flatten()).item()


def test_every_schedule_is_validated_on_pyramids_of_its_own(both, image_folder):
    pipe, record = load(both), read_log(both)[-1]
    images = load_labelled_images(
        train_data_dir=str(image_folder), cache_dir=str(image_folder.parent / "datasets"), label_column="auto"
    )
    for name, scales in (("1-2-4", [1, 2, 4]), ("1-4", [1, 4])):
        scheduler = ScaleScheduler.from_config(pipe.scheduler.config, scales=scales)
        assert record[f"val_loss/{name}"] == pytest.approx(held_out_loss(pipe, images, scheduler), abs=1e-5)
    assert record["val_loss"] == record["val_loss/1-2-4"] != record["val_loss/1-4"]
    assert len(record["val_per_scale"]) == len(record["val_accuracy"]) == len(record["val_scales"]) == 3


def test_a_resumed_run_goes_on_with_the_same_schedules(run, both):
    shutil.copytree(both / "checkpoint-3", run.root / "resumed" / "checkpoint-3")
    shutil.copy(both / "train_log.jsonl", run.root / "resumed")  # what comes after the checkpoint is dropped
    assert_same_run(run("resumed", *BOTH, *SIX_STEPS, "--resume_from_checkpoint", "latest"), both)


def test_other_schedules_are_another_run(run, both):
    shutil.copytree(both / "checkpoint-3", run.root / "changed" / "checkpoint-3")
    with pytest.raises(ValueError, match=r"`schedules` was \[\[1, 2, 4\], \[1, 4\]\], now None"):
        run("changed", *SIX_STEPS, "--resume_from_checkpoint", "latest")


def test_all_batches_of_a_step_are_of_its_schedule(run):
    options = [*BOTH, *SIX_STEPS, "--class_dropout_prob", 0]
    whole = run("whole", *options)
    parts = run("parts", *options, "--train_batch_size", 4, "--gradient_accumulation_steps", 2)
    for mine, others in zip(losses(parts), losses(whole), strict=True):
        assert mine == pytest.approx(others, rel=1e-3)


@pytest.mark.parametrize("pattern", ["causal", "banded"])
def test_every_schedule_has_a_mask_of_its_own(run, pattern):
    options = [*BOTH, *SIX_STEPS, "--attention_pattern", pattern, "--class_dropout_prob", 0]
    masked, plain = (
        run(f"{pattern} {way}", *options, "--attention_backend", way, "--adam_epsilon", 1e-3)
        for way in ("mask", "per_scale")
    )
    assert_same_weights(load(masked).transformer, load(plain).transformer, atol=1e-5)
    for mine, others in zip(losses(masked), losses(plain), strict=True):
        assert mine == pytest.approx(others, rel=1e-4)


def test_a_card_names_the_schedules_and_says_how_to_draw_over_another(both, run):
    card = (both / "README.md").read_text()
    assert "trained on the schedules 1-2-4 and 1-4, and draws over the first of these" in card
    [code] = [block for block in card.split("```") if "from_config" in block]
    pipe = load(both)
    exec(code.removeprefix("py\n"), {"pipe": pipe})
    assert pipe.scheduler.scales == [[1, 1], [4, 4]]
    assert "loss/1-2-4 " in card
    one = (run("one", "--schedules", "1-2-4", "--max_train_steps", 1) / "README.md").read_text()
    assert "schedules " not in one.partition("## Training")[0]


# Texts


def test_a_pipeline_that_draws_from_texts_learns_schedules(image_folder, tmp_path):
    captioned = tmp_path / "images"
    shutil.copytree(image_folder, captioned)
    caption_folders(captioned, "blue", "red")
    tiny_text_pipeline(scheduler=tiny_scheduler(guidance_scale=3.0)).save_pretrained(tmp_path / "base")
    options = [*SIX_STEPS, "--report_to", "none", "--logging_steps", 1, "--proportion_empty_prompts", 0]
    folders = [tmp_path / "both", tmp_path / "one"]
    for folder, schedules in zip(folders, (BOTH, ["--schedules", "1-4"])):
        train_texts(captioned, tmp_path / "base", folder, *options, *schedules)
    logs = [losses(folder) for folder in folders]
    assert logs[0][0] == logs[1][0]
    assert [len(scales_of(record)) for record in logs[0]] == [2, 3, 3, 3, 2, 2]
    assert read_log(folders[0])[-1].keys() >= {"val_loss/1-2-4", "val_loss/1-4"}
    scheduler = SRDDTextPipeline.from_pretrained(folders[0]).scheduler
    assert (scheduler.scales, scheduler.config.guidance_scale) == ([[1, 1], [2, 2], [4, 4]], 3.0)


# Distillation


def test_a_student_learns_all_schedules_in_one_stage(run, trained):
    options = [*BOTH, *SIX_STEPS, "--kl_weight", 0.5]
    student = run("student", *options, teacher=trained / "model")
    assert not (student / "stage-1").exists()
    assert [len(scales_of(record)) for record in losses(student)] == [2, 3, 3, 3, 2, 2]
    for record in losses(student):
        assert record["loss"] == pytest.approx(record["cross_entropy"] + 0.5 * record["kl"], abs=1e-5)
    assert losses(student)[0]["kl"] == pytest.approx(0, abs=1e-6)  # the student starts as its teacher
    assert read_log(student)[-1].keys() >= {"val_loss/1-2-4", "val_loss/1-4"}
    assert load(student).scheduler.scales == [[1, 1], [2, 2], [4, 4]]
    shutil.copytree(student / "checkpoint-3", run.root / "resumed student" / "checkpoint-3")
    resumed = run("resumed student", *options, "--resume_from_checkpoint", "latest", teacher=trained / "model")
    assert_same_weights(load(resumed).transformer, load(student).transformer)
    assert losses(resumed) == losses(student)[3:]


def test_a_student_needs_no_guidance_over_any_of_its_schedules(run, trained):
    student = run("guided", *BOTH, "--guidance_scale", 2, "--max_train_steps", 2, teacher=trained / "model")
    assert load(student).transformer.config.guidance_distilled is True
    assert [len(scales_of(record)) for record in losses(student)] == [2, 3]
