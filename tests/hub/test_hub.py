"""Push to and pull from a Hub-shaped server on loopback, each in a process of its own."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from hub.fresh_process import run_python
from hub.hub_server import HubServer, card_metadata
from tiny_models import ID2LABEL, tiny_pipeline, tiny_scheduler
from tiny_texts import tiny_text_pipeline


HERE = Path(__file__).parent

CARD = """---
license: apache-2.0
library_name: srdd
tags:
- image-generation
---

# Tiny

A card that was written by hand.
"""

MODEL_INDEX = {
    "_class_name": "SRDDPipeline",
    "scheduler": ["srdd", "ScaleScheduler"],
    "transformer": ["srdd", "ScaleTransformer2DModel"],
    "vqvae": ["srdd", "MultiScaleVQModel"],
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub on which `push_models.py` has published."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "README.md").write_text(CARD)
    with HubServer(folder / "storage") as server:
        pushed = run_python(server, folder / "push", str(HERE / "push_models.py"), str(folder / "README.md"))
        assert pushed.returncode == 0, pushed.stderr
        yield server
        assert server.failures == []


@pytest.fixture(scope="module")
def pulled(hub, tmp_path_factory):
    """What `pull_models.py` got, by the name of the load."""
    folder = tmp_path_factory.mktemp("pulled")
    process = run_python(hub, folder / "pull", str(HERE / "pull_models.py"), str(folder / "results.pt"))
    assert process.returncode == 0, process.stderr
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def images():
    """What the published pipeline draws before it is published."""
    return draw(tiny_pipeline())


def draw(pipe):
    return pipe([0, "quince"], generator=torch.Generator().manual_seed(0), output_type="pt").images


def assert_same_weights(state_dict, model):
    wanted = model.state_dict()
    assert state_dict.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state_dict.items())


def test_model_index_is_pinned(hub):
    # What it says about our classes is public: every published repository carries it.
    index = json.loads(hub.read("me/tiny", "model_index.json"))
    assert index.pop("_diffusers_version")
    assert {name: entry for name, entry in index.items() if entry != [None, None]} == MODEL_INDEX


def test_pushed_files(hub):
    _, files = hub.files("me/tiny")
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "vqvae/config.json",
        "vqvae/diffusion_pytorch_model.fp16.safetensors",
        "vqvae/diffusion_pytorch_model.safetensors",
    }
    large = {path for path, file in files.items() if file.sha256}
    assert large == {path for path in files if path.endswith(".safetensors")}


def test_a_loaded_pipeline_takes_its_card_along_and_the_files_that_it_names(hub):
    card = hub.read("me/loaded", "README.md").decode()
    assert card_metadata(card) == yaml.safe_load(CARD.split("---")[1])
    # No code goes along, and nothing that is said of it.
    assert "A card that was written by hand.\n\n![Pears](pears.png)\n\n## Limits\n\nPears.\n" in card
    _, files = hub.files("me/loaded")
    assert "pears.png" in files
    # What the card names and was saved anew is as it was saved.
    assert json.loads(hub.read("me/loaded", "model_index.json"))["_class_name"] == "SRDDInpaintPipeline"
    assert "pears-000001.png" not in files
    assert "pears.png" not in hub.files("me/carded")[1]
    assert "pears.png" not in hub.read("me/carded", "README.md").decode()


def test_push_keeps_a_model_card(hub):
    card = hub.read("me/tiny", "README.md").decode()
    assert card_metadata(card) == yaml.safe_load(CARD.split("---")[1])
    assert card.split("---")[2].strip() == CARD.split("---")[2].strip()


def test_push_without_a_card_makes_one(hub):
    assert card_metadata(hub.read("me/sharded", "README.md").decode()) == {"library_name": "diffusers"}


def test_pipeline_draws_the_same_images(pulled, images):
    result = pulled["pipeline"]
    names = {name: MODEL_INDEX[name][1] for name in ("scheduler", "transformer", "vqvae")}
    assert result["components"] == names
    assert result["id2label"] == ID2LABEL
    assert torch.equal(result["images"], images)


def test_pipeline_from_cache_without_the_hub(pulled, images):
    assert torch.equal(pulled["pipeline_from_cache"]["images"], images)


def test_fp16_variant(pulled, images):
    result = pulled["fp16_variant"]
    assert result["dtypes"] == [torch.float16, torch.float16]
    assert result["files"] == ["diffusion_pytorch_model.fp16.safetensors"] * 2
    assert torch.equal(result["images"], draw(tiny_pipeline().to(torch.float16)))


def test_text_pipeline_draws_the_same_images(hub, pulled):
    index = json.loads(hub.read("me/texts", "model_index.json"))
    assert index["transformer"] == ["srdd", "ScaleTextTransformer2DModel"]
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModel"]
    pipe, generator = tiny_text_pipeline(), torch.Generator().manual_seed(0)
    images = pipe(["a cat", "dogs"], negative_prompt="fog", generator=generator, output_type="pt").images
    assert torch.equal(pulled["texts"]["images"], images)
    assert pulled["texts"]["components"]["text_encoder_2"] == "CLIPTextModel"
    assert torch.equal(pulled["embeddings"]["images"], images)
    assert pulled["embeddings"]["components"]["tokenizer"] == "NoneType"


def test_sharded_pipeline(hub, pulled, images):
    _, files = hub.files("me/sharded")
    shards = [path.split("/")[1] for path in files if path.endswith(".safetensors")]
    assert all("-of-" in name for name in shards)
    assert len(shards) > 4
    assert sorted(shards) == pulled["sharded"]["files"]
    assert torch.equal(pulled["sharded"]["images"], images)
    assert_same_weights(pulled["sharded_model"], tiny_pipeline().transformer)


@pytest.mark.parametrize("name", ["transformer", "vqvae"])
def test_single_model(pulled, name):
    assert_same_weights(pulled[name], getattr(tiny_pipeline(), name))


@pytest.mark.parametrize("name", ["scheduler", "scheduler_repository"])
def test_single_scheduler(pulled, name):
    config = {key: value for key, value in pulled[name].items() if not key.startswith("_")}
    assert config == {key: value for key, value in tiny_scheduler().config.items() if not key.startswith("_")}


def test_scheduler_preset(pulled):
    pipe = tiny_pipeline(scheduler=tiny_scheduler(scales=[1, 4]))
    assert pulled["preset"]["num_tokens"] == 17
    assert torch.equal(pulled["preset"]["images"], draw(pipe))


def test_diffusion_pipeline_does_not_know_our_class(pulled):
    # diffusers looks pipelines up among its own names. Documented: say `SRDDPipeline.from_pretrained`.
    assert pulled["generic"] == "AttributeError: module diffusers has no attribute SRDDPipeline"


def test_diffusion_pipeline_through_a_pipeline_file_in_the_repository(pulled, images):
    result = pulled["generic_with_remote_code"]
    assert result["is_ours"]
    assert torch.equal(result["images"], images)


def test_diffusion_pipeline_needs_srdd_imported(hub, tmp_path):
    code = """
from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained("me/tiny", custom_pipeline="me/tiny", trust_remote_code=True)
"""
    process = run_python(hub, tmp_path / "generic", "-c", code)
    assert process.returncode == 1
    assert "/srdd.py as defined in `model_index.json` does not exist in me/tiny" in process.stderr
