"""`train_srdd.py` with captions: it learns which text belongs to which picture, and ends with a whole pipeline."""

import gc
import shutil
from itertools import permutations
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from tiny_models import (
    random_texts,
    tiny_history_transformer,
    tiny_scheduler,
    tiny_text_transformer,
    tiny_transformer,
    tiny_vqvae,
)
from tiny_texts import tiny_text_encoder, tiny_text_pipeline
from training.launching import caption_folders, make_image_folder, write_captions
from training.tiny_runs import (
    assert_same_weights,
    common,
    load_script,
    read_log,
    run_script,
    train_texts,
    weights,
)
from transformers import CLIPTextModel

from srdd import ScaleTextTransformer2DModel, SRDDTextPipeline
from srdd.training.lora import load_lora, save_lora
from srdd.training.training_run import TrainingRun


SCRIPT = load_script("train_srdd")
QUIET = ["--report_to", "none", "--logging_steps", 1, "--checkpointing_steps", 4]
FAST = ["--learning_rate", 1e-2, "--lr_scheduler", "constant", "--ema_decay", 0]
ADAPTER = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Path:
    """24 pictures of two colours, with captions."""
    return caption_folders(make_image_folder(tmp_path_factory.mktemp("captions") / "images"), "blue", "red")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A pipeline with settings of its own, and a schedule over fewer scales than it knows."""
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    tiny_text_pipeline(scheduler=tiny_scheduler(guidance_scale=3.0, top_k=20)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(captioned, base, tmp_path_factory):
    """A function that trains in a folder of its own, with one cache for all."""
    root = tmp_path_factory.mktemp("runs")

    def begin(name: str, *arguments, images: Path = captioned, pipeline: Path = base) -> Path:
        cache = ["--token_cache_dir", root / "tokens"]
        train_texts(images, pipeline, root / name, *QUIET, *cache, *arguments)
        return root / name

    begin.root = root
    return begin


@pytest.fixture(scope="module")
def plain(run):
    return run("plain", "--validation_prompts", "red", "a|b")


def parse(*arguments):
    return SCRIPT.parse_args([str(argument) for argument in ("--output_dir", "out", *arguments)])


def load(folder: Path) -> ScaleTextTransformer2DModel:
    return ScaleTextTransformer2DModel.from_pretrained(folder, subfolder="transformer")


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder) if "loss" in record]


# What comes out


def test_captioned_pictures_become_a_pipeline(plain, base):
    pipe, before = (SRDDTextPipeline.from_pretrained(folder) for folder in (plain, base))
    for name in ("text_encoder", "text_encoder_2", "vqvae"):
        assert_same_weights(getattr(pipe, name), getattr(before, name))
    assert dict(pipe.scheduler.config) == dict(before.scheduler.config)
    changed = [
        name
        for name, tensor in weights(before.transformer).items()
        if not tensor.equal(load(plain).state_dict()[name])
    ]
    assert set(weights(pipe.transformer)) - set(changed) == {"size_embed.frequencies"}
    images = pipe(["red", "blue"], output_type="pt").images
    assert images.shape == (2, 3, 8, 8)
    assert images.isfinite().all()
    assert len(list(plain.glob("samples-000004.png"))) == 1


def test_a_card_names_captions_and_prompts(plain):
    card = ModelCard.load(plain / "README.md")
    assert card.data.pipeline_tag == "text-to-image"
    assert "`images`\n\n24 training images, with captions (`text`)." in card.text
    assert "Drawn from these texts, row by row:\n\n1. red\n1. a|b\n" in card.text
    snippet = card.text.split("```py\n")[1].split("```")[0]
    assert "pipe('red', guidance_scale=3.0)" in snippet
    names: dict = {}
    exec(snippet.replace('"plain"', repr(str(plain))), names)
    assert names["image"].size == (8, 8)


def test_pictures_show_captions_by_default(run):
    card = (run("captions", "--max_train_steps", 1) / "README.md").read_text()
    assert sorted(card.split("row by row:\n\n")[1].split("\n\n")[0].splitlines()) == ["1. blue", "1. red"]


def test_a_transformer_learns_which_text_belongs_to_which_picture(run, tmp_path):
    def pair(name: str, *texts: str) -> Path:
        (tmp_path / name).mkdir()
        for index, colour in enumerate(("red", "blue")):
            Image.new("RGB", (8, 8), colour).save(tmp_path / name / f"{index}.png")
        return write_captions(tmp_path / name, {f"{index}.png": text for index, text in enumerate(texts)})

    options = [*FAST, "--train_batch_size", 2, "--lr_warmup_steps", 0, "--adam_weight_decay", 0]
    folder = run("learned", *options, "--max_train_steps", 80, "--validation_steps", 80, images=pair("ab", "a", "b"))
    assert losses(folder)[0] > 3
    learned = read_log(folder)[-1]["val_loss"]
    assert learned < 0.5
    still = ["--learning_rate", 0, "--max_train_steps", 1, "--train_batch_size", 2, "--proportion_empty_prompts", 0]
    right = run("right", *still, images=tmp_path / "ab", pipeline=folder)
    assert losses(right)[0] == pytest.approx(learned, abs=1e-3)
    wrong = run("wrong", *still, images=pair("ba", "b", "a"), pipeline=folder)
    assert losses(wrong)[0] > learned + 1


def test_where_all_texts_are_replaced_they_say_nothing(run, captioned, tmp_path):
    others = caption_folders(shutil.copytree(captioned, tmp_path / "images"), "red", "blue")
    options = ["--proportion_empty_prompts", 1, "--validation_prompts", "red"]
    assert_same_weights(*(load(run(images.parent.name, *options, images=images)) for images in (captioned, others)))


def test_other_patterns_schedules_and_tokenizers(run, base, tmp_path):
    pipeline = shutil.copytree(base, tmp_path / "pipeline")
    tiny_scheduler(scales=[1, 4]).save_pretrained(pipeline / "scheduler")
    tiny_vqvae(seed=5).save_pretrained(tmp_path / "vqvae")
    options = ["--attention_pattern", "causal", "--pretrained_vqvae_name_or_path", tmp_path / "vqvae"]
    folder = run("others", *options, "--attention_backend", "mask", "--gradient_checkpointing", pipeline=pipeline)
    assert load(folder).config.attention_pattern == "causal"
    assert [name for name in read_log(folder)[0] if name.startswith("loss/")] == ["loss/1x1", "loss/4x4"]
    pipe = SRDDTextPipeline.from_pretrained(folder)
    assert_same_weights(pipe.vqvae, tiny_vqvae(seed=5))
    assert pipe("red", output_type="pt").images.isfinite().all()


def test_a_pipeline_that_needed_no_guidance_is_guided_once_it_learned_from_captions(run, base, tmp_path, caplog):
    pipeline = shutil.copytree(base, tmp_path / "pipeline")
    tiny_text_transformer(guidance_distilled=True).save_pretrained(pipeline / "transformer")
    folder = run("guided again", "--max_train_steps", 1, pipeline=pipeline)
    assert load(folder).config.guidance_distilled is False
    assert "is saved with `guidance_distilled` False" in caplog.text


# Caches, checkpoints and memory


def test_caches_are_made_once_and_encoders_leave_before_the_first_step(run, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (run("first") and run.root / "tokens").iterdir()}
    gc.collect()
    outside = sum(type(each) is CLIPTextModel for each in gc.get_objects())
    encoded, inside, batches = [], [], TrainingRun.batches

    def observed(self, loader):
        gc.collect()
        inside.append(sum(type(each) is CLIPTextModel for each in gc.get_objects()))
        return batches(self, loader)

    monkeypatch.setattr(TrainingRun, "batches", observed)
    forward = CLIPTextModel.forward
    monkeypatch.setattr(
        CLIPTextModel, "forward", lambda *args, **kwargs: encoded.append(1) or forward(*args, **kwargs)
    )
    folder = run("second")
    assert {path: path.stat().st_mtime_ns for path in (run.root / "tokens").iterdir()} == before
    assert encoded == []
    assert inside == [outside]
    assert_same_weights(load(folder), load(run.root / "first"))


@pytest.mark.parametrize("options", [[], ["--lora_rank", 2]], ids=["all weights", "adapter"])
def test_a_run_resumes_where_it_was(run, options):
    name = f"whole {len(options)}"
    options = [*options, "--checkpointing_steps", 2, "--proportion_empty_prompts", 0.5]
    whole, parts = run(name, *options), run.root / f"parts of {name}"
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    run(parts.name, *options, "--resume_from_checkpoint", "latest")
    assert_same_weights(load(parts), load(whole))
    assert read_log(parts)[-2:] == read_log(whole)[-2:]


@pytest.mark.parametrize("changed", ["captions", "encoders", "share"])
def test_other_texts_are_another_run(run, plain, captioned, base, tmp_path, changed):
    images, pipeline, options, message = captioned, base, [], "the training images have other names, labels, captions"
    if changed == "captions":
        images = caption_folders(shutil.copytree(captioned, tmp_path / "images"), "red", "blue")
    elif changed == "encoders":
        pipeline = shutil.copytree(base, tmp_path / "pipeline")
        tiny_text_encoder(6, seed=9).save_pretrained(pipeline / "text_encoder_2")
        message = "the weights of the text_encoder_2 are others"
    else:
        options, message = ["--proportion_empty_prompts", 0.2], "`proportion_empty_prompts` was 0.1, now 0.2"
    output = run.root / f"other {changed}"
    shutil.copytree(plain, output)
    options += ["--max_train_steps", 6, "--resume_from_checkpoint", "latest"]
    with pytest.raises(ValueError, match=message):
        run(output.name, *options, images=images, pipeline=pipeline)


# LoRA


def test_an_adapter_and_its_base_are_the_trained_model(run, base):
    folder = run("lora", "--lora_rank", 2, "--lora_alpha", 6, "--learning_rate", 1e-2)
    adapter = load_file(folder / "lora" / ADAPTER)
    parts = [f"{attention}.{name}" for attention in ("attn", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")]
    parts += ["ff.net.0.proj", "ff.net.2"]
    assert set(adapter) == {
        f"blocks.{layer}.{part}.lora_{half}.weight" for layer in range(2) for part in parts for half in "AB"
    }
    by_diffusers, by_us, merged = load(base), load(base), load(folder)
    by_diffusers.load_lora_adapter(folder / "lora", prefix=None, weight_name=ADAPTER)
    load_lora(by_us, folder / "lora")
    inputs, told = torch.randn(2, 21, 8, generator=torch.Generator().manual_seed(0)), random_texts()
    with torch.no_grad():
        outputs = [model.eval()(inputs, **told).sample for model in (by_diffusers, by_us, merged, load(base))]
    torch.testing.assert_close(outputs[0], outputs[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs[1], outputs[2], atol=1e-5, rtol=0)
    assert (outputs[3] - outputs[2]).abs().max() > 1e-3
    by_us.fuse_lora()
    by_us.unload_lora()
    assert_same_weights(by_us, merged)


KINDS = tiny_transformer, tiny_text_transformer, tiny_history_transformer


@pytest.mark.parametrize("kinds", list(permutations(KINDS, 2)))
def test_an_adapter_of_another_kind_of_model_is_refused(tmp_path, kinds):
    trained, other = (make() for make in kinds)
    trained.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    save_lora(trained, tmp_path)
    names = type(trained).__name__, type(other).__name__
    with pytest.raises(ValueError, match="`transformer` must be a {}, as the adapter's base, got a {}".format(*names)):
        load_lora(other, tmp_path)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--class_dropout_prob", 0.2],
            "`class_dropout_prob` must be left out with a model that draws from texts, got",
        ),
        (["--drop_path_rate", 0.1], "`drop_path_rate` must be left out with a model that draws from texts, got 0.1"),
        (["--label_column", ""], "`label_column` must be left out with a model that draws from texts, got ''"),
        (["--caption_column", "prompt"], r"`caption_column` must hold a text .* 24 of 24 have none \(cold/0.png: no"),
        (["--train_batch_size", 25], "`train_batch_size` must be at most 24"),
    ],
)
def test_settings_that_mean_nothing_or_cannot_be_are_refused(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        run("refused", *arguments)
    assert not (run.root / "refused" / "model_index.json").exists()


def test_captions_that_are_missing_are_named_before_anything_is_encoded(run, captioned, tmp_path):
    images = shutil.copytree(captioned, tmp_path / "images")
    lines = (images / "metadata.jsonl").read_text().splitlines()
    (images / "metadata.jsonl").write_text("\n".join(line for line in lines if "warm/3.png" not in line))
    with pytest.raises(ValueError, match=r"1 of 24 have none \(warm/3.png: no caption\)"):
        run("missing", "--token_cache_dir", tmp_path / "tokens", images=images)
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--proportion_empty_prompts", 1.5], "must lie in [0, 1], got 1.5"),
        (["--proportion_empty_prompts", "nan"], "must lie in [0, 1], got nan"),
    ],
)
def test_a_share_lies_between_none_and_all(capsys, words, message):
    with pytest.raises(SystemExit):
        parse("--pretrained_model_name_or_path", "x", *words)
    assert message in capsys.readouterr().err


def test_a_pipeline_without_encoders_is_refused(run, base, tmp_path):
    tiny_text_pipeline(text_encoder=None, tokenizer=None).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match="must have two text encoders with their tokenizers, got '.*pipeline'"):
        run("no encoders", pipeline=tmp_path / "pipeline")


def test_a_transformer_of_texts_alone_is_refused(base):
    args = parse("--pretrained_vqvae_name_or_path", "vqvae", "--pretrained_model_name_or_path", base / "transformer")
    with pytest.raises(ValueError, match="must be a whole pipeline where the transformer draws from texts, got"):
        SCRIPT.build_model(args, tiny_vqvae(), {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--caption_column", "x"], "`caption_column` must be left out with a model that draws by class, got 'x'"),
        (["--validation_prompts", "a", "b"], r"`validation_prompts` must be left out .* got \['a', 'b'\]"),
        (["--proportion_empty_prompts", 0], "`proportion_empty_prompts` must be left out .* got 0.0"),
    ],
)
def test_settings_of_texts_are_refused_with_classes(words, message):
    with pytest.raises(ValueError, match=message):
        SCRIPT.main(parse("--pretrained_vqvae_name_or_path", "vqvae", *words))


@pytest.mark.parametrize(("num_images", "shown"), [(2, 2), (11, 8), (16, 16)])
def test_texts_that_no_picture_would_show_are_refused(num_images, shown):
    words = ["--pretrained_model_name_or_path", "x", "--num_validation_images", num_images, "--validation_prompts"]
    SCRIPT.check_settings(parse(*words, *"a" * shown), is_text=True)
    with pytest.raises(ValueError, match=f"`validation_prompts` must be at most {shown} texts, .* got {shown + 1}. `"):
        SCRIPT.check_settings(parse(*words, *"a" * (shown + 1)), is_text=True)


def test_classes_need_a_tokenizer(base):
    with pytest.raises(
        ValueError, match="`pretrained_vqvae_name_or_path` must be given, or a pipeline that draws from"
    ):
        SCRIPT.main(parse("--pretrained_model_name_or_path", base / "transformer"))


def test_scripts_for_classes_refuse_texts(base, captioned, tmp_path):
    message = "must be a pipeline that draws by class for SRDDPipeline, got SRDDTextPipeline"
    for name, arguments in {
        "distill_srdd": [*common(captioned, tmp_path / "run"), "--teacher", base, "--report_to", "none"],
        "distill_decoder": [*common(captioned, tmp_path / "run"), "--teacher", base, "--report_to", "none"],
        "sample_srdd": ["--pretrained_model_name_or_path", base, "--device", "cpu"],
        "evaluate_srdd": [
            "--pretrained_model_name_or_path", base, "--train_data_dir", captioned, "--output_dir", tmp_path / "e",
        ],
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run_script(name, *arguments)


def test_data_sets_with_columns(run, captioned, base, tmp_path):
    paths = [str(path) for path in sorted(captioned.rglob("*.png"))]
    columns = {"photo": paths, "prompt": [Path(path).parent.name for path in paths]}
    features = datasets.Features({"photo": datasets.Image(), "prompt": datasets.Value("string")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "train-00000.parquet")
    arguments = common(captioned, tmp_path / "run")
    arguments[arguments.index("--train_data_dir")] = "--dataset_name"
    arguments[arguments.index(captioned)] = tmp_path / "set"
    arguments += [*QUIET, "--image_column", "photo", "--caption_column", "prompt", "--max_train_steps", 1]
    run_script("train_srdd", *arguments, "--pretrained_model_name_or_path", base)
    assert "24 training images, with captions (`prompt`)." in (tmp_path / "run" / "README.md").read_text()
