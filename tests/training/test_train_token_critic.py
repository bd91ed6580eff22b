"""What a token critic is trained on, and every option of `train_token_critic.py`."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_critic, tiny_pipeline, tiny_scheduler, tiny_transformer, tiny_vqvae
from training.tiny_runs import assert_same_weights, load_script, read_log, train_critic

from srdd import ScaleScheduler, SRDDPipeline
from srdd.training.critic import critic_examples, critic_metrics


SCRIPT = load_script("train_token_critic")
QUIET = ["--report_to", "none", "--logging_steps", 1, "--checkpointing_steps", 4]
LEARNING = ["--max_train_steps", 60, "--learning_rate", 2e-2, "--ema_decay", 0.8, "--validation_steps", 60]


def load(folder: Path) -> SRDDPipeline:
    pipe = SRDDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def losses(folder: Path) -> list[dict]:
    return [record for record in read_log(folder) if "loss" in record]


def entropy(share: float) -> float:
    """The loss of the best prediction that is the same for all tokens."""
    return -share * math.log(share) - (1 - share) * math.log(1 - share)


@pytest.fixture(scope="module")
def run(image_folder, trained, tmp_path_factory):
    """A function that trains a critic in a folder of its own, with one token cache for all."""
    root = tmp_path_factory.mktemp("critics")

    def start(name: str, *arguments, images: Path = image_folder, model: Path = trained / "model") -> Path:
        train_critic(images, model, root / name, *QUIET, "--token_cache_dir", root / "tokens", *arguments)
        return root / name

    start.root = root
    return start


@pytest.fixture(scope="module")
def finished(run):
    """A few steps."""
    return run("finished", "--checkpointing_steps", 2)


@pytest.fixture(scope="module")
def sharp_model(run, trained):
    """A transformer that sees its inputs, which gates close to zero hide, and codes that are far from each other."""
    pipe = load(trained / "model")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        pipe.vqvae.quantize.codebook.weight.mul_(30)
    pipe.save_pretrained(run.root / "sharp model")
    return run.root / "sharp model"


@pytest.fixture(scope="module")
def learned(run, sharp_model):
    return run("learned", *LEARNING, "--checkpointing_steps", 60, model=sharp_model)


# Examples


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("pattern", ["causal", "markov", "banded"])
def test_examples_are_what_a_further_pass_of_sampling_shows_the_critic(pattern, guidance_scale):
    # A greedy model draws its own pyramid in the place of its own pyramid: every token is right.
    settings = {"temperature": 0.0, "num_resampling_passes": 1, "resampling_threshold": 0.0}
    scheduler = tiny_scheduler(resampling_policy="learned", **settings)
    pipe = tiny_pipeline(pattern, scheduler=scheduler, token_critic=tiny_critic())
    labels, seen = torch.tensor([1, 4, 0]), []
    pipe.token_critic.register_forward_pre_hook(lambda module, args: seen.append(args))
    token_ids = pipe(labels, guidance_scale=guidance_scale, output_type="latent").token_ids
    assert token_ids.unique().numel() > 3
    hidden_states, judged_ids, is_right = critic_examples(
        pipe.vqvae, pipe.transformer, scheduler, token_ids, labels, guidance_scale, torch.Generator().manual_seed(0)
    )
    assert is_right.shape == (3, 20)
    assert is_right.all()
    assert len(seen) == 2
    torch.testing.assert_close(hidden_states, torch.cat([args[0] for args in seen], dim=1), atol=1e-5, rtol=0)
    assert torch.equal(judged_ids, torch.cat([args[1] for args in seen], dim=1))
    assert torch.equal(judged_ids, token_ids[:, 1:])
    assert not hidden_states.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["causal", "markov", "banded"])
def test_a_scale_is_judged_after_true_coarser_ones_whatever_was_replaced_in_them(pattern):
    vqvae, transformer, scheduler = tiny_vqvae(), tiny_transformer(pattern), tiny_scheduler()
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(32, (200, 21), generator=generator)
    labels = torch.randint(5, (200,), generator=generator)
    hidden_states, judged_ids, is_right = critic_examples(
        vqvae, transformer, scheduler, token_ids, labels, 2.0, generator
    )
    assert torch.equal(judged_ids == token_ids[:, 1:], is_right)
    # The finest scale is as it was, the one before it is not.
    chosen = is_right[:, 4:].all(dim=1) & ~is_right[:, :4].all(dim=1)
    assert chosen.sum() > 3
    inputs, state = vqvae.teacher_forcing_inputs(token_ids), vqvae.latent_states(token_ids)[-1]
    inputs[:, 5:] = state.flatten(2).transpose(1, 2)
    expected = transformer(inputs, class_labels=labels, return_hidden_states=True).hidden_states[:, 5:]
    torch.testing.assert_close(hidden_states[chosen, 4:], expected[chosen], atol=1e-5, rtol=0)
    assert not torch.allclose(hidden_states[~chosen, 4:], expected[~chosen], atol=1e-2)


@pytest.mark.parametrize("scales", [None, [1, 4]])
def test_examples_are_of_the_scales_that_are_visited(scales):
    scheduler = tiny_scheduler(scales=scales)
    token_ids = torch.randint(32, (2, scheduler.num_tokens), generator=torch.Generator().manual_seed(0))
    hidden_states, judged_ids, is_right = critic_examples(
        tiny_vqvae(), tiny_transformer(), scheduler, token_ids, torch.tensor([0, 1]), 2.0
    )
    assert hidden_states.shape == (2, scheduler.num_tokens - 1, 16)
    assert is_right.shape == judged_ids.shape == hidden_states.shape[:2]


@pytest.fixture(scope="module")
def wrong_tokens():
    """A model that never draws the first code."""
    transformer = tiny_transformer(scale_sizes=[1, 8], num_layers=1)
    with torch.no_grad():
        transformer.proj_out.weight[0] = 0
        transformer.proj_out.bias[0] = -1e4
    vqvae = tiny_vqvae(scale_sizes=[1, 8], sample_size=16)
    return vqvae, transformer, tiny_scheduler(scale_sizes=[1, 8])


def test_a_share_of_the_tokens_between_none_and_all_is_replaced(wrong_tokens):
    token_ids = torch.zeros(600, 65, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(600, dtype=torch.long)
    _, _, is_right = critic_examples(*wrong_tokens, token_ids, labels, 1.0, generator)
    # The share of right tokens is uniform; 64 draws of it, too, on the numbers from 0 to 64.
    counts = is_right.sum(dim=1).float() / 64
    quantiles = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(counts.quantile(quantiles), quantiles, atol=0.06, rtol=0)


def test_examples_come_from_the_generator_alone(wrong_tokens):
    token_ids, labels = torch.zeros(3, 65, dtype=torch.long), torch.zeros(3, dtype=torch.long)

    def draw(seed: int | None) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return torch.cat(critic_examples(*wrong_tokens, token_ids, labels, 1.0, generator)[:1])

    state = torch.get_rng_state()
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draw(None), draw(None))


def test_metrics_are_those_of_each_scale_and_of_all_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 20, generator=generator).requires_grad_()
    is_right = torch.rand(8, 20, generator=generator) < (logits * 0.7).sigmoid()
    overall, per_scale = critic_metrics(logits, is_right, [[2, 2], [4, 4]])
    parts = {"all": (logits, is_right), 0: (logits[:, :4], is_right[:, :4]), 1: (logits[:, 4:], is_right[:, 4:])}
    for name, (said, true) in parts.items():
        found = overall if name == "all" else {key: values[name] for key, values in per_scale.items()}
        right, wrong = said[true], said[~true]
        assert found["loss"].item() == pytest.approx(
            -torch.cat([F.logsigmoid(right), F.logsigmoid(-wrong)]).mean().item(), abs=1e-6
        )
        assert found["accuracy"].item() == pytest.approx(((said > 0) == true).float().mean().item())
        assert found["right"].item() == pytest.approx(true.float().mean().item())
        # The chance that a right token is trusted more than a wrong one.
        assert found["auroc"].item() == pytest.approx((right[:, None] > wrong).float().mean().item(), abs=1e-6)
    assert overall["loss"].requires_grad
    assert not any(values.requires_grad for values in per_scale.values())


@pytest.mark.parametrize("is_right", [torch.zeros(2, 4, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)])
def test_tokens_of_one_kind_say_nothing_about_order(is_right):
    overall, _ = critic_metrics(torch.randn(2, 4), is_right, [[2, 2]])
    assert overall["auroc"] == 0.5


# Runs


def test_a_run_ends_with_the_pipeline_and_its_critic(trained, finished):
    before, after = load(trained / "model"), load(finished)
    assert_same_weights(after.vqvae, before.vqvae)
    assert_same_weights(after.transformer, before.transformer)
    assert dict(after.scheduler.config) == dict(before.scheduler.config)
    assert (after.token_critic.config.dim, after.token_critic.config.hidden_dim) == (16, 8)
    after.scheduler = ScaleScheduler.from_config(
        after.scheduler.config, resampling_policy="learned", resampling_threshold=0.5
    )
    images = after(["warm", "cold"], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 3, 16, 16)
    for path in finished.rglob("*.json"):
        assert "_name_or_path" not in path.read_text()


def test_the_card_says_what_was_trained_and_how_to_use_it(finished):
    card = (finished / "README.md").read_text()
    assert "4 steps of 8 images per process, of the token critic alone." in card
    assert "| `token_critic` | 0.0 M | codebook_size 16, dim 16, hidden_dim 8 |" in card
    assert "| auroc_per_scale | " in card
    assert (finished / "samples.png").is_file()
    snippet = card.split("```py\n")[1].split("```")[0].replace('"finished"', repr(str(finished)))
    names: dict = {}
    exec(snippet, names)
    assert names["image"].size == (16, 16)
    assert names["pipe"].scheduler.config.resampling_policy == "learned"


def test_losses_are_those_of_the_scales_that_can_be_judged(finished):
    names = ("loss", "accuracy", "auroc", "right")
    for record in losses(finished):
        assert {name for name in record if "/" in name} == {
            f"{name}/{size}" for name in names for size in ("2x2", "4x4")
        }
        for name in ("loss", "accuracy", "right"):
            assert record[name] == pytest.approx(
                (4 * record[f"{name}/2x2"] + 16 * record[f"{name}/4x4"]) / 20, rel=1e-4
            )
    last = read_log(finished)[-1]
    assert last["val_scales"] == [[2, 2], [4, 4]]
    assert [len(last[f"val_{name}_per_scale"]) for name in names] == [2] * 4
    assert 0 < last["val_loss"] < 2


def test_a_critic_learns_to_tell_right_from_wrong(learned):
    last = read_log(learned)[-1]
    assert last["val_loss"] < 0.8 * entropy(last["val_right"])
    assert min(last["val_auroc_per_scale"]) > 0.8


def test_a_run_goes_on_where_it_was(run, finished):
    folder = run.root / "resumed"
    shutil.copytree(finished / "checkpoint-2", folder / "checkpoint-2")
    shutil.copyfile(finished / "train_log.jsonl", folder / "train_log.jsonl")
    run("resumed", "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
    assert_same_weights(load(folder).token_critic, load(finished).token_critic)
    assert read_log(folder) == read_log(finished)
    assert (folder / "samples.png").read_bytes() == (finished / "samples.png").read_bytes()


def test_validation_does_not_depend_on_when_it_is_run(run, finished):
    often = run("often", "--validation_steps", 1, "--learning_rate", 0)
    values = [record["val_loss"] for record in read_log(often) if "val_loss" in record]
    assert len(values) == 4
    assert len(set(values)) == 1


def test_a_critic_is_trained_further(run, finished):
    folder = run("further", "--learning_rate", 0, "--max_train_steps", 1, "--hidden_dim", 5, model=finished)
    assert_same_weights(load(folder).token_critic, load(finished).token_critic)
    assert "_name_or_path" not in (folder / "token_critic" / "config.json").read_text()


def test_a_new_critic_has_the_width_that_is_asked_for(run):
    folder = run("wide", "--hidden_dim", 24, "--max_train_steps", 1)
    assert load(folder).token_critic.config.hidden_dim == 24


@pytest.mark.parametrize("distilled", [False, True])
def test_guidance_is_the_pipelines_own_by_default(run, sharp_model, distilled):
    model = with_config(sharp_model, run.root / f"distilled {distilled}", guidance_distilled=distilled)

    def first(name: str, *arguments) -> dict:
        [record] = losses(run(f"{name} {distilled}", "--max_train_steps", 1, *arguments, model=model))
        return record

    own = first("default")
    assert first("same", "--guidance_scale", 1.0 if distilled else 2.5) == own
    assert first("other", "--guidance_scale", 6.0) != own


def with_config(model: Path, folder: Path, **changes) -> Path:
    """A copy of a pipeline whose transformer has another configuration."""
    shutil.copytree(model, folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_labels_are_dropped_as_the_transformers_were(run, sharp_model):
    def first(name: str, probability: float, *arguments) -> float:
        model = with_config(sharp_model, run.root / f"model of {name}", class_dropout_prob=probability)
        [record] = losses(run(name, "--max_train_steps", 1, *arguments, model=model))
        return record["loss"]

    always = first("always", 1.0)
    assert first("never", 0.0) != always
    # Without labels all images are of the null class.
    assert first("unlabelled", 0.0, "--label_column", "") == pytest.approx(always, abs=1e-6)


def test_classes_that_the_pipeline_does_not_know_are_refused(image_folder, run, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    shutil.copytree(image_folder / "warm", tmp_path / "images" / "hot")
    message = r"`pretrained_model_name_or_path` must know .*\['cold', 'hot', 'warm'\], got \['cold', 'warm'\]"
    with pytest.raises(ValueError, match=message):
        run("other classes", images=tmp_path / "images")


def test_a_pipeline_is_needed(capsys):
    with pytest.raises(SystemExit):
        SCRIPT.parse_args(["--output_dir", "out"])
    assert "--pretrained_model_name_or_path" in capsys.readouterr().err
