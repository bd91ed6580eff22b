"""Parts that a run starts from."""

import pytest
import torch
from training.tiny_runs import assert_same_weights, train_transformer

from srdd import MultiScaleVQModel, SRDDPipeline
from srdd.training.lora import load_lora
from srdd.training.pretrained import find_transformer, load_tokenizer, warn_of_other_tokens


ONE_STEP = ["--report_to", "none", "--max_train_steps", 1]


def test_a_tokenizer_may_be_given_as_the_pipeline_that_has_it(trained):
    wanted = MultiScaleVQModel.from_pretrained(trained / "tokenizer").state_dict()
    for folder in ("tokenizer", "model", "model/vqvae"):
        state_dict = load_tokenizer("vqvae", str(trained / folder)).state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in state_dict.items())


def test_what_has_no_tokenizer_is_refused_in_a_sentence(trained, tmp_path):
    for folder in (trained / "model" / "transformer", tmp_path):
        with pytest.raises(
            ValueError, match=r"^`vqvae` must be a folder or Hub id of a tokenizer, .*, got '.*' \(.*\)\.$"
        ):
            load_tokenizer("vqvae", str(folder))


def test_a_transformer_may_be_given_as_the_pipeline_that_has_it(trained):
    for folder, subfolder in {"model": "transformer", "model/transformer": None}.items():
        config, found = find_transformer("start", str(trained / folder))
        assert (config["_class_name"], found) == ("ScaleTransformer2DModel", subfolder)


def test_what_has_no_transformer_is_refused_in_a_sentence(trained, tmp_path):
    for folder in (trained / "tokenizer", trained / "model" / "vqvae", tmp_path):
        with pytest.raises(
            ValueError, match=r"^`start` must be a folder or Hub id of a scale transformer, .*, got '.*' \(.*\)\.$"
        ):
            find_transformer("start", str(folder))


def test_a_run_from_the_transformer_of_a_pipeline(image_folder, trained, tmp_path):
    still = ["--learning_rate", 0, "--pretrained_model_name_or_path", trained / "model"]
    train_transformer(image_folder, trained / "tokenizer", tmp_path / "run", *ONE_STEP, *still)
    folders = tmp_path / "run", trained / "model"
    assert_same_weights(*(SRDDPipeline.from_pretrained(folder).transformer for folder in folders))


@pytest.mark.parametrize("is_distilled", [True, False])
def test_a_transformer_that_needed_no_guidance_is_guided_once_it_learned_from_data(
    image_folder, trained, tmp_path, caplog, is_distilled
):
    transformer = SRDDPipeline.from_pretrained(trained / "model").transformer
    transformer.register_to_config(guidance_distilled=is_distilled)
    transformer.save_pretrained(tmp_path / "transformer")
    start = ["--pretrained_model_name_or_path", tmp_path / "transformer", "--lora_rank", 2]
    train_transformer(image_folder, trained / "tokenizer", tmp_path / "run", *ONE_STEP, *start)
    assert SRDDPipeline.from_pretrained(tmp_path / "run").transformer.config.guidance_distilled is False
    assert ("is saved with `guidance_distilled` False" in caplog.text) == is_distilled
    load_lora(transformer, tmp_path / "run" / "lora")
    assert transformer.config.guidance_distilled is False


def test_a_run_on_the_tokenizer_of_a_pipeline(image_folder, trained, tmp_path, caplog, capfd):
    start = ["--pretrained_model_name_or_path", trained / "model" / "transformer"]
    train_transformer(image_folder, trained / "model", tmp_path / "run", *ONE_STEP, *start)
    assert "at random" not in caplog.text
    captured = capfd.readouterr()
    assert "Validation is on training images" in captured.err
    assert "step 1: validation on training images: loss" in captured.out + captured.err


def test_a_run_says_where_a_transformer_knows_other_tokens(image_folder, trained, tmp_path, caplog):
    transformer = SRDDPipeline.from_pretrained(trained / "model").transformer
    with torch.no_grad():
        transformer.proj_out.bias[0] += 20  # the only token that it expects
    transformer.save_pretrained(tmp_path / "transformer")
    start = ["--pretrained_model_name_or_path", tmp_path / "transformer"]
    train_transformer(image_folder, trained / "tokenizer", tmp_path / "run", *ONE_STEP, *start)
    assert "is above 2.77, that of drawing any of 16 tokens at random" in caplog.text


def test_a_trained_transformer_names_the_codebook_of_its_tokenizer(image_folder, trained, tmp_path, caplog):
    pipe = SRDDPipeline.from_pretrained(trained / "model")
    fingerprint = MultiScaleVQModel.from_pretrained(trained / "tokenizer").config.codebook_fingerprint
    assert len(fingerprint) == 16
    assert pipe.transformer.config.codebook_fingerprint == pipe.vqvae.config.codebook_fingerprint == fingerprint
    with torch.no_grad():
        pipe.vqvae.quantize.codebook.weight[0] += 1
    pipe.vqvae.sign_codebook()
    pipe.vqvae.save_pretrained(tmp_path / "other")
    start = ["--pretrained_model_name_or_path", trained / "model" / "transformer"]
    train_transformer(image_folder, tmp_path / "other", tmp_path / "run", *ONE_STEP, *start)
    assert "was trained on the tokens of another tokenizer" in caplog.text
    again = SRDDPipeline.from_pretrained(tmp_path / "run")
    assert again.transformer.config.codebook_fingerprint == pipe.vqvae.config.codebook_fingerprint != fingerprint


def test_chance_itself_is_no_reason_to_warn(caplog):
    warn_of_other_tokens(2.77, 16)
    assert not caplog.records
    warn_of_other_tokens(2.78, 16)
    assert len(caplog.records) == 1
