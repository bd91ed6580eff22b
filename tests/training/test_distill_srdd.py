"""Every option of `distill_srdd.py` does what it says."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from training.tiny_runs import assert_same_weights, distill, load_script, read_log, run_script, weights

from srdd import ScaleScheduler, SRDDPipeline
from srdd.data.images import image_to_tensor, load_labelled_images


SCRIPT = load_script("distill_srdd")
QUIET = ["--report_to", "none", "--logging_steps", 1, "--checkpointing_steps", 4]


def parse(*arguments):
    return SCRIPT.parse_args(["--output_dir", "out", "--teacher", "teacher", *(str(word) for word in arguments)])


def load(folder: Path) -> SRDDPipeline:
    pipe = SRDDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: SRDDPipeline, **options) -> torch.Tensor:
    return pipe(["warm", "cold"], generator=torch.Generator().manual_seed(0), output_type="pt", **options).images


def losses(folder: Path) -> list[dict]:
    return [record for record in read_log(folder) if "loss" in record]


@pytest.fixture(scope="module")
def run(image_folder, trained, tmp_path_factory):
    """A function that distils in a folder of its own, with one token cache for all."""
    root = tmp_path_factory.mktemp("students")

    def start(name: str, *arguments, images: Path = image_folder, teacher: Path = trained / "model") -> Path:
        distill(images, teacher, root / name, *QUIET, "--token_cache_dir", root / "tokens", *arguments)
        return root / name

    start.root = root
    return start


@pytest.fixture(scope="module")
def student(run):
    """One stage, over fewer scales."""
    return run("fewer", "--scales", "1,4")


@pytest.fixture(scope="module")
def progressive(run):
    """Two stages."""
    return run("progressive", "--scales", "1,2,4", "--scales", "1,4", "--kl_weight", 0.5)


@pytest.fixture(scope="module")
def sharp_teacher(run, trained):
    """A teacher whose classes differ: there is something to guide to."""
    pipe = load(trained / "model")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    pipe.save_pretrained(run.root / "sharp teacher")
    return run.root / "sharp teacher"


@pytest.fixture(scope="module")
def guided(run, sharp_teacher):
    """A student that needs no guidance."""
    options = ["--guidance_scale", 4, "--max_train_steps", 40, "--learning_rate", 1e-2, "--lr_warmup_steps", 2]
    return run("guided", *options, "--checkpointing_steps", 40, "--validation_steps", 40, teacher=sharp_teacher)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ce_weight", 0], "`--ce_weight` and `--kl_weight` must not be negative, nor both be zero"),
        (["--ce_weight", 1, "--kl_weight", -1], "must not be negative"),
        (["--ce_weight", -1, "--kl_weight", 1], "must not be negative"),
        (["--guidance_scale", 2, "--kl_weight", 0, "--ce_weight", 1], "`--guidance_scale` needs a positive `--kl_w"),
        (["--scales", "1,x"], "invalid int_list value"),
        (["--schedules", "1-2-4", "1-x"], "invalid dashed_ints value: '1-x'"),
        (["--scales", "1,4", "--schedules", "1-4", "1-2-4"], "`--scales` must be left out with `--schedules`"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "ce_weight", "kl_weight"),
    [
        ([], 1, 0),
        (["--guidance_scale", 1], 1, 0),
        (["--kl_weight", 0.5], 1, 0.5),
        (["--ce_weight", 0, "--kl_weight", 2], 0, 2),
        (["--guidance_scale", 2.5], 0, 1),
        (["--guidance_scale", 2.5, "--ce_weight", 0.1, "--kl_weight", 3], 0.1, 3),
    ],
)
def test_the_loss_is_cross_entropy_or_with_guidance_the_divergence(arguments, ce_weight, kl_weight):
    args = parse(*arguments)
    assert (args.ce_weight, args.kl_weight) == (ce_weight, kl_weight)


def test_every_stage_has_a_folder_and_a_schedule():
    config = dict(ScaleScheduler(scale_sizes=[1, 2, 4, 8], top_k=9).config)
    [(folder, schedules)] = SCRIPT.stages(parse(), config)
    assert (folder, schedules.first.scales) == (Path("out"), [[1, 1], [2, 2], [4, 4], [8, 8]])
    assert schedules.first.config.top_k == 9
    plan = SCRIPT.stages(parse("--scales", "1,2,8", "--scales", "1,8"), config)
    assert [folder for folder, _ in plan] == [Path("out/stage-1"), Path("out")]
    assert [[scheduler.scales for scheduler in schedules.schedulers] for _, schedules in plan] == [
        [[[1, 1], [2, 2], [8, 8]]],
        [[[1, 1], [8, 8]]],
    ]
    [(folder, schedules)] = SCRIPT.stages(parse("--schedules", "1-8", "1-2-8"), config)
    assert (folder, len(schedules.schedulers)) == (Path("out"), 2)
    assert schedules.first.scales == [[1, 1], [8, 8]]


def test_a_teacher_with_fewer_scales_passes_them_on():
    config = dict(ScaleScheduler(scale_sizes=[1, 2, 4], scales=[1, 4]).config)
    [(_, schedules)] = SCRIPT.stages(parse(), config)
    assert schedules.first.scales == [[1, 1], [4, 4]]


@pytest.mark.parametrize("scales", ["1,3,4", "2,4", "1,2", "1,2,4,8", "4,2,1"])
def test_scales_that_the_teacher_does_not_know_are_refused_before_anything_is_trained(run, scales):
    with pytest.raises(ValueError, match="`scales` must"):
        run("unknown", "--scales", "1,4", "--scales", scales)
    assert not (run.root / "unknown").exists()


# Fewer scales


def test_a_student_draws_over_its_scales(run, student):
    pipe = load(student)
    assert pipe.scheduler.config.scales == [[1, 1], [4, 4]]
    assert pipe.scheduler.config.scale_sizes == [[1, 1], [2, 2], [4, 4]]
    assert pipe.transformer.config.scale_sizes == [[1, 1], [2, 2], [4, 4]]
    output = pipe(["warm"], generator=torch.Generator().manual_seed(0), output_type="pt")
    assert output.token_ids.shape == (1, 17)
    assert output.images.shape == (1, 3, 16, 16)
    assert output.images.isfinite().all()


def test_a_student_keeps_what_it_is_not_trained_on(trained, student):
    teacher, pipe = load(trained / "model"), load(student)
    assert_same_weights(pipe.vqvae, teacher.vqvae)
    before, after = weights(teacher.transformer), weights(pipe.transformer)
    middle = slice(1, 5)  # positions of the scale that is left out
    assert torch.equal(before["pos_embed"][:, middle], after["pos_embed"][:, middle])
    assert torch.equal(before["scale_embed.weight"][1], after["scale_embed.weight"][1])
    assert not torch.equal(before["proj_out.weight"], after["proj_out.weight"])
    public = [
        {k: v for k, v in model.config.items() if not k.startswith("_")}
        for model in (teacher.transformer, pipe.transformer)
    ]
    assert public[0] == public[1]
    assert pipe.id2label == {0: "cold", 1: "warm"}


def test_a_students_losses_are_those_of_its_scales(student):
    for record in losses(student):
        assert {name for name in record if "/" in name} == {
            f"{what}/{size}" for what in ("loss", "accuracy") for size in ("1x1", "4x4")
        }
        assert record["loss"] == record["cross_entropy"]
        assert record["loss"] == pytest.approx((record["loss/1x1"] + 16 * record["loss/4x4"]) / 17, rel=1e-5)
        assert "kl" not in record
    assert "val_loss" in read_log(student)[-1]


def test_a_student_knows_its_teachers_class_dropout_but_uses_the_null_class_itself(trained, run, student):
    assert load(student).transformer.config.class_dropout_prob == 0.1
    assert load(trained / "model").transformer.config.class_dropout_prob == 0.1
    never = run("never", "--scales", "1,4", "--max_train_steps", 1, teacher=with_dropout(trained, run.root, 0.0))
    always = run("always", "--scales", "1,4", "--max_train_steps", 1, teacher=with_dropout(trained, run.root, 1.0))
    assert losses(never)[0]["loss"] != losses(always)[0]["loss"]


def with_dropout(trained: Path, root: Path, probability: float) -> Path:
    folder = root / f"teacher-{probability}"
    shutil.copytree(trained / "model", folder, ignore=shutil.ignore_patterns("checkpoint-*", "tokens", "logs"))
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "class_dropout_prob": probability}))
    return folder


def test_divergence_from_the_teacher_is_a_term_of_its_own(run):
    log = losses(run("kl", "--ce_weight", 0.25, "--kl_weight", 2, "--learning_rate", 1e-2))
    # The student starts as the teacher.
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert log[-1]["kl"] > 0
    for record in log:
        assert record["loss"] == pytest.approx(0.25 * record["cross_entropy"] + 2 * record["kl"], abs=1e-5)


def test_a_student_that_follows_its_teacher_alone_stays_where_it_is(trained, run):
    folder = run("copy", "--ce_weight", 0, "--kl_weight", 1, "--adam_epsilon", 1, "--adam_weight_decay", 0)
    assert_same_weights(load(folder).transformer, load(trained / "model").transformer, atol=1e-6)


def test_teacher_and_student_attend_under_a_mask(run):
    options = ["--scales", "1,4", "--kl_weight", 1, "--max_train_steps", 2, "--adam_epsilon", 1e-3]
    masked, plain = run("masked", *options, "--attention_backend", "mask"), run("not masked", *options)
    assert_same_weights(load(masked).transformer, load(plain).transformer, atol=1e-5)
    for mine, others in zip(losses(masked), losses(plain), strict=True):
        assert mine == pytest.approx(others, rel=1e-5, abs=1e-6)


# Stages


def test_stages_are_pipelines_of_their_own(progressive):
    first, last = load(progressive / "stage-1"), load(progressive)
    assert first.scheduler.scales == [[1, 1], [2, 2], [4, 4]]
    assert last.scheduler.scales == [[1, 1], [4, 4]]
    assert draw(first).shape == draw(last).shape == (2, 3, 16, 16)
    for folder in (progressive / "stage-1", progressive):
        assert [record["step"] for record in losses(folder)] == [1, 2, 3, 4]
        assert (folder / "README.md").is_file()
        assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4"}
    for folder, scales in ((progressive / "stage-1", "1 2 4"), (progressive, "1 4")):
        assert f"distilled to draw over the scales {scales}.\n" in (folder / "README.md").read_text()


def test_a_stage_starts_from_the_one_before(run, progressive, student):
    by_hand = run("by hand", "--scales", "1,4", teacher=progressive / "stage-1")
    first = [losses(folder)[0]["cross_entropy"] for folder in (progressive, by_hand, student)]
    assert first[0] == first[1] != first[2]
    # It is still compared to the teacher of the whole run.
    assert losses(progressive)[0]["kl"] > 1e-7


def test_finished_stages_are_not_trained_again(run, progressive, image_folder, trained):
    folder = run.root / "interrupted"
    shutil.copytree(progressive / "stage-1", folder / "stage-1")
    before = {path: path.stat().st_mtime_ns for path in (folder / "stage-1").rglob("*") if path.is_file()}
    run(
        "interrupted", "--scales", "1,2,4", "--scales", "1,4", "--kl_weight", 0.5, "--resume_from_checkpoint", "latest"
    )
    after = {path: path.stat().st_mtime_ns for path in (folder / "stage-1").rglob("*") if path.is_file()}
    assert before == after
    assert_same_weights(load(folder).transformer, load(progressive).transformer)
    assert read_log(folder) == read_log(progressive)


@pytest.fixture
def go_on(run, progressive):
    """A function that goes on with a copy of the run of two stages, without its last stage if asked to."""

    def start(name: str, *arguments, scales=("1,2,4", "1,4"), is_finished=False, **options) -> Path:
        if is_finished:
            shutil.copytree(progressive, run.root / name)
        else:
            shutil.copytree(progressive / "stage-1", run.root / name / "stage-1")
        given = [word for sides in scales for word in ("--scales", sides)]
        return run(name, *given, "--kl_weight", 0.5, "--resume_from_checkpoint", "latest", *arguments, **options)

    return start


def test_a_finished_stage_of_other_settings_is_refused(go_on):
    with pytest.raises(
        ValueError, match=r"got '.*stage-1.*checkpoint-4'.* `kl_weight` was 0.5, now 2.0\. Go on as be"
    ):
        go_on("other weight", "--kl_weight", 2)
    with pytest.raises(ValueError, match=r"`scales` was \[\[1, 2, 4\]\], now \[\[1, 4\]\]"):
        go_on("other scales", scales=("1,4", "1,4"))
    with pytest.raises(ValueError, match="`guidance_scale` was 1.0, now 3.0"):
        go_on("other guidance", "--guidance_scale", 3)


def test_a_finished_stage_of_other_data_or_another_teacher_is_refused(go_on, student, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    next(iter((tmp_path / "images" / "warm").iterdir())).unlink()
    with pytest.raises(ValueError, match="the number of training images was 24, now 23"):
        go_on("other images", images=tmp_path / "images")
    with pytest.raises(ValueError, match="the weights of the teacher are others"):
        go_on("other teacher", teacher=student)


def test_a_finished_stage_stays_with_its_learning_rate_and_says_so(go_on, progressive, caplog):
    folder = go_on("other rate", "--learning_rate", 0)
    assert "stage-1' stays as it is, trained with `learning_rate` 0.0001 (now: 0.0)." in caplog.text
    assert_same_weights(load(folder / "stage-1").transformer, load(progressive / "stage-1").transformer)
    # The new rate holds for the next stage.
    assert_same_weights(load(folder).transformer, load(progressive / "stage-1").transformer)


def test_a_finished_stage_without_checkpoints_is_taken_with_a_warning(run, progressive, caplog):
    folder = run.root / "no checkpoints"
    shutil.copytree(progressive / "stage-1", folder / "stage-1", ignore=shutil.ignore_patterns("checkpoint-*"))
    run(folder.name, "--scales", "1,2,4", "--scales", "1,4", "--kl_weight", 0.5, "--resume_from_checkpoint", "latest")
    assert "stage-1' has no checkpoint: nothing is compared" in caplog.text
    assert_same_weights(load(folder).transformer, load(progressive).transformer)


def test_a_finished_run_is_refused_as_by_other_scripts(go_on, progressive):
    with pytest.raises(ValueError, match="`max_train_steps` must be more than 4, .* and is finished, got 4"):
        go_on("finished", is_finished=True)
    with pytest.raises(ValueError, match="`train_batch_size` was 8, now 4"):
        go_on("finished otherwise", "--train_batch_size", 4, is_finished=True)


# Guidance


def test_a_guided_student_draws_without_guidance_by_default(guided, student):
    pipe = load(guided)
    assert pipe.transformer.config.guidance_distilled is True
    assert load(student).transformer.config.guidance_distilled is False
    assert torch.equal(draw(pipe), draw(pipe, guidance_scale=1.0))
    assert not torch.equal(draw(pipe), draw(pipe, guidance_scale=4.0))
    assert pipe.guidance_scale == 4
    draw(pipe)
    assert pipe.guidance_scale == 1


@pytest.mark.parametrize(("weights_of_loss", "is_distilled"), [((0, 1), True), ((1, 0.5), True), ((1, 0), False)])
def test_a_student_needs_no_guidance_as_long_as_it_follows_a_teacher_that_does_not(
    run, guided, caplog, weights_of_loss, is_distilled
):
    options = ["--scales", "1,2,4", "--scales", "1,4", "--max_train_steps", 1]
    options += ["--ce_weight", weights_of_loss[0], "--kl_weight", weights_of_loss[1]]
    folder = run(f"pruned {weights_of_loss}", *options, teacher=guided)
    for stage in (folder / "stage-1", folder):
        assert load(stage).transformer.config.guidance_distilled is is_distilled
    assert caplog.text.count("is saved with `guidance_distilled` False") == (not is_distilled)


def test_a_guided_student_sees_every_label_and_learns_the_divergence_alone(guided):
    for record in losses(guided):
        assert record["loss"] == pytest.approx(record["kl"], rel=1e-5)
    assert losses(guided)[0]["kl"] > 0


def test_a_guided_student_learns_what_guidance_does(guided):
    log = losses(guided)
    assert log[0]["kl"] > 0.1
    assert sum(record["kl"] for record in log[-4:]) / 4 < 0.3 * log[0]["kl"]


def test_the_sample_script_uses_no_guidance_for_a_guided_student(guided, tmp_path):
    pictures = []
    for name, options in {"default": [], "one": ["--guidance_scale", 1], "three": ["--guidance_scale", 3]}.items():
        run_script(
            "sample_srdd", "--pretrained_model_name_or_path", guided, "--num_images_per_prompt", 2, "--device", "cpu",
            "--output", tmp_path / f"{name}.png", *options,
        )  # fmt: skip
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]


def test_the_card_of_a_guided_student_draws_without_guidance(guided, student):
    assert 'pipe("cold").images' in (guided / "README.md").read_text().replace("'", '"')
    assert "guidance_scale=2.5" in (student / "README.md").read_text()


# Data


def test_classes_that_the_teacher_does_not_know_are_refused(image_folder, run, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    shutil.copytree(image_folder / "warm", tmp_path / "images" / "hot")
    with pytest.raises(ValueError, match=r"`teacher` must know .*\['cold', 'hot', 'warm'\], got \['cold', 'warm'\]"):
        run("other classes", images=tmp_path / "images")


def test_data_without_labels_train_and_validate_the_null_class(image_folder, trained, run):
    options = ["--label_column", "", "--learning_rate", 0, "--max_train_steps", 1]
    log = read_log(run("unlabelled", *options, "--kl_weight", 1))
    teacher = load(trained / "model")
    images = load_labelled_images(
        train_data_dir=str(image_folder), cache_dir=str(image_folder.parent / "datasets"), label_column=None
    )
    assert images.id2label == {}
    assert log[-1]["val_loss"] == pytest.approx(null_class_loss(teacher, images), abs=1e-6)


@torch.no_grad()
def null_class_loss(pipe: SRDDPipeline, images) -> float:
    pixels = torch.stack([image_to_tensor(image, 16) for image in images.train["image"]])
    token_ids = pipe.vqvae.tokenize(pixels)
    logits = pipe.transformer(pipe.vqvae.teacher_forcing_inputs(token_ids)).sample
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids.flatten()).item()


def test_a_teacher_in_half_precision_has_a_student_in_full(trained, run, tmp_path):
    load(trained / "model").to(torch.float16).save_pretrained(tmp_path / "half")
    folder = run("from half", "--kl_weight", 1, "--max_train_steps", 1, teacher=tmp_path / "half")
    assert {tensor.dtype for tensor in weights(load(folder).transformer).values()} == {torch.float32}
    assert math.isfinite(losses(folder)[0]["kl"])
