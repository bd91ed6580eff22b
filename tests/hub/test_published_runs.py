"""Training runs with `--push_to_hub`, in a process of their own, to a Hub on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub.hub_server import HubServer, card_metadata


HERE = Path(__file__).parent
REPOSITORIES = {"me/tokenizer": "tokenizer", "me/fruit": "run", "me/student": "student", "me/captions": "captions"}
NAMES_TO_STAY = ("checkpoint-", "stage-1", "tokens", "ids/", "data/", "logs/", "partial", ".arrow", ".npy", ".pkl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("published-runs")


@pytest.fixture(scope="module")
def hub(folder):
    """A Hub on which `train_and_push.py` has published."""
    with HubServer(folder / "storage") as server:
        (folder / "work").mkdir()
        environment = {**os.environ, **server.environment(folder / "hf-home"), "ACCELERATE_USE_CPU": "true"}
        environment.pop("HF_TOKEN")
        process = subprocess.run(
            [sys.executable, str(HERE / "train_and_push.py"), server.token],
            cwd=folder / "work",
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr
        yield server
        assert server.failures == []


@pytest.fixture(scope="module")
def results(hub, folder):
    return torch.load(folder / "work" / "results.pt", weights_only=True)


def test_there_are_the_finished_models_and_no_others(hub):
    assert set(hub.repositories) == set(REPOSITORIES)
    assert [len(hub.repositories[name].commits) for name in REPOSITORIES] == [2] * 4  # the empty one and the model


def test_files_of_a_pipeline(hub):
    _, files = hub.files("me/fruit")
    assert set(files) == {
        ".gitattributes",
        "README.md",
        "model_index.json",
        "samples.png",
        "scheduler/scheduler_config.json",
        "train_log.jsonl",
        "training_curve.png",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vqvae/config.json",
        "vqvae/diffusion_pytorch_model.safetensors",
    }
    assert set(files) == set(hub.files("me/student")[1])


def test_files_of_a_pipeline_of_texts_with_an_adapter_and_code(hub):
    texts = {
        "lora/config.json",
        "lora/pytorch_lora_weights.safetensors",
        "modular_config.json",
        "modular_model_index.json",
        *(f"text_encoder{which}/{name}" for which in ("", "_2") for name in ("config.json", "model.safetensors")),
        *(f"tokenizer{which}/{name}" for which in ("", "_2") for name in ("tokenizer.json", "tokenizer_config.json")),
    }
    files = {path for path in hub.files("me/captions")[1] if not path.endswith(".py")}
    assert files == set(hub.files("me/fruit")[1]) | texts


def test_a_run_publishes_its_code_where_it_was_asked_to(hub):
    index = json.loads(hub.read("me/captions", "model_index.json"))
    package, _ = index["transformer"]
    files = {path for path in hub.files("me/captions")[1] if path.endswith(".py")}
    assert {f"{index['_class_name'][0]}.py", f"{package}/__init__.py", f"vqvae/{package}.py"} <= files
    _, _, where = json.loads(hub.read("me/captions", "modular_model_index.json"))["transformer"]
    assert where["pretrained_model_name_or_path"] == "me/captions"
    card = hub.read("me/captions", "README.md").decode()
    assert 'DiffusionPipeline.from_pretrained("me/captions", trust_remote_code=True)' in card
    assert not [path for path in hub.files("me/fruit")[1] if path.endswith(".py")]


def test_files_of_a_tokenizer(hub):
    assert set(hub.files("me/tokenizer")[1]) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "reconstruction.png",
        "train_log.jsonl",
        "training_curve.png",
    }


@pytest.mark.parametrize("name", REPOSITORIES)
def test_what_belongs_to_the_run_alone_stays_at_home(hub, results, name):
    _, files = hub.files(name)
    local = results["local_files"][REPOSITORIES[name]]
    assert any(path.startswith("checkpoint-4/") for path in local)
    assert any(path.startswith("logs/") for path in local)
    assert not [path for path in files if any(part in path for part in NAMES_TO_STAY)]
    assert set(files) - {".gitattributes"} <= set(local)


def test_the_runs_had_something_to_keep_at_home(results):
    assert any(path.startswith("data/") for path in results["local_files"]["run"])
    assert any(path.startswith("ids/tokens-") for path in results["local_files"]["run"])
    assert any(path.startswith("stage-1/checkpoint-4/") for path in results["local_files"]["student"])


@pytest.mark.parametrize("name", REPOSITORIES)
def test_nothing_published_holds_the_token_or_a_local_path(hub, folder, name):
    commit_id, files = hub.files(name)
    for path in files:
        content = hub.read(name, path)
        assert hub.token.encode() not in content, path
        if path.endswith(".json"):
            assert str(folder).encode() not in content, path
            assert "_name_or_path" not in json.loads(content)


@pytest.mark.parametrize("name", REPOSITORIES)
def test_cards_are_metadata_of_the_hub_and_name_the_repository(hub, name):
    card = hub.read(name, "README.md").decode()
    facts = card_metadata(card)
    assert facts["license"] == "cc0-1.0"
    assert facts["library_name"] == "srdd"
    assert f'from_pretrained("{name}")' in card


def test_published_models_are_those_of_the_run(results):
    assert torch.equal(results["published"]["fruit"], results["local"]["run"])
    assert torch.equal(results["published"]["student"], results["local"]["student"])
    assert torch.equal(*results["texts"])
    assert results["tokenizer"].keys() == results["local_tokenizer"].keys()
    assert all(torch.equal(tensor, results["local_tokenizer"][name]) for name, tensor in results["tokenizer"].items())
