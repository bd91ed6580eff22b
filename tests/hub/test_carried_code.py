"""Models that carry their code: published, and drawn with in processes that cannot import srdd."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from hub.drawing_calls import draw, draw_modular
from hub.fresh_process import run_python
from hub.hub_server import HubServer
from tiny_models import tiny_history_transformer, tiny_latent_diffusion, tiny_pipeline
from tiny_texts import WITHOUT_ENCODERS, tiny_text_pipeline

import srdd
from srdd import ScaleTextTransformer2DModel, SRDDPipeline, SRDDTextPipeline
from srdd.pipelines.model_folders import copy_card
from srdd.pipelines.modular_blocks import SRDDTextBlocks
from srdd.publish import add_code, carried_code
from srdd.publish.__main__ import main
from srdd.publish.carried_code import PACKAGE, PIPELINES, drawing_modules


HERE = Path(__file__).parent
MODELS = {
    "tiny": tiny_pipeline,
    "with-a.dot-0.1": lambda: tiny_pipeline("causal"),
    "history": lambda: tiny_pipeline(transformer=tiny_history_transformer()),
    "texts": tiny_text_pipeline,
}
# What a process needs in which srdd is not installed.
THIRD_PARTIES = {
    *("PIL", "diffusers", "huggingface_hub", "numpy", "safetensors", "torch", "tqdm", "transformers"),
    "typing_extensions",
}
NOT_FOR_DRAWING = ("conversion", "data", "evaluation", "publish", "theory", "training")

CARD = "---\nlicense: cc0-1.0\n---\n\n# Tiny\n\nA card.\n"


def digest_of(folder: Path) -> str:
    (code,) = folder.glob("srdd_*")
    return code.name.removeprefix("srdd_")


def run_without_srdd(hub: HubServer, folder: Path, names: dict[str, str], **variables: str) -> dict:
    """What `draw_without_srdd.py` got, by name; `names` are of models and their code's hashes."""
    models = json.dumps(list(names.items()))
    script = str(HERE / "draw_without_srdd.py")
    process = run_python(hub, folder, script, str(folder / "results.pt"), models, **variables)
    assert process.returncode == 0, process.stderr
    for warning in ("require the following packages", "Expected types"):
        assert warning not in process.stderr
    return torch.load(folder / "results.pt", weights_only=True)


def expected(name: str) -> dict[str, torch.Tensor]:
    """What the installed package draws."""
    pipe = MODELS[name]()
    classes = next(each for each in PIPELINES if type(pipe).__name__ in each.values())
    tasks = {file.removeprefix("text_"): getattr(srdd, name) for file, name in classes.items()}
    return {task: draw(each.from_pipe(pipe), task) for task, each in tasks.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_images(images: dict, others: dict) -> None:
    assert images.keys() == others.keys()
    for task, each in images.items():
        assert torch.equal(each, others[task]), task


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folders with code, by name."""
    root = tmp_path_factory.mktemp("carried")
    for name, make in MODELS.items():
        make().save_pretrained(root / "plain" / name)
        (root / "plain" / name / "README.md").write_text(CARD)
        main([str(root / "plain" / name), str(root / "published" / name), "--hub_model_id", f"me/{name}"])
    return {name: root / "published" / name for name in MODELS}


@pytest.fixture(scope="module")
def hub(published, tmp_path_factory):
    """A Hub that has them."""
    folder = tmp_path_factory.mktemp("hub")
    with HubServer(folder / "storage") as server:
        root = next(iter(published.values())).parent
        pushed = run_python(server, folder / "push", str(HERE / "push_with_code.py"), str(root))
        assert pushed.returncode == 0, pushed.stderr
        yield server
        assert server.failures == []


@pytest.fixture(scope="module")
def pulled(hub, published, tmp_path_factory):
    """What a process without srdd drew with the models on the Hub."""
    names = {f"me/{name}": digest_of(folder) for name, folder in published.items()}
    return run_without_srdd(hub, tmp_path_factory.mktemp("pulled") / "run", names)


@pytest.mark.parametrize("name", MODELS)
def test_models_on_the_hub_draw_without_srdd(pulled, published, name):
    result, images = pulled[f"me/{name}"], expected(name)
    assert_same_images(result["images"], images)
    assert_same_images(result["modular"], images)
    assert torch.equal(result["again"], images["draw"])
    assert result["is_one_class"]
    assert result["class"] == type(MODELS[name]()).__name__
    assert result["packages"] == [f"srdd_{digest_of(published[name])}"]
    assert pulled["imported"] == ["srdd"]  # which stands for no module


def test_folders_draw_offline_without_srdd_each_with_its_own_code(hub, published, tmp_path, monkeypatch):
    other = tmp_path / "package"
    shutil.copytree(PACKAGE, other)
    path = other / "pipelines" / "scale_pipeline.py"
    changed = path.read_text().replace("_usual_guidance_scale = 2.5", "_usual_guidance_scale = 1.5")
    assert changed != path.read_text()
    path.write_text(changed)
    monkeypatch.setattr(carried_code, "PACKAGE", other)
    tiny_pipeline().save_pretrained(tmp_path / "other")
    add_code(tmp_path / "other")
    assert digest_of(tmp_path / "other") != digest_of(published["tiny"])

    folders = [published["tiny"], tmp_path / "other", published["texts"]]
    names = {str(each): digest_of(each) for each in folders}
    results = run_without_srdd(hub, tmp_path / "run", names, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    for name in ("tiny", "texts"):
        assert_same_images(results[str(published[name])]["images"], expected(name))
        assert_same_images(results[str(published[name])]["modular"], expected(name))
    assert [results[str(each)]["default_guidance_scale"] for each in folders[:2]] == [2.5, 1.5]
    by_hand = tiny_pipeline()
    by_hand.scheduler.register_to_config(guidance_scale=1.5)
    assert torch.equal(results[str(tmp_path / "other")]["images"]["draw"], draw(by_hand, "draw"))
    # What such a process saves is for installed users, and for itself.
    assert torch.equal(results[str(published["tiny"])]["saved"], expected("tiny")["draw"])
    saved = SRDDPipeline.from_pretrained(tmp_path / "run" / "saved" / "tiny")
    assert torch.equal(draw(saved, "draw"), expected("tiny")["draw"])


@pytest.mark.parametrize("name", MODELS)
def test_installed_classes_load_such_folders_without_trust(published, name):
    pipe = type(MODELS[name]()).from_pretrained(published[name])
    assert type(pipe.transformer) is type(MODELS[name]().transformer)
    assert_same_images({"draw": draw(pipe, "draw")}, {"draw": expected(name)["draw"]})


def test_installed_classes_load_and_publish_such_repositories_without_trust(hub, published, tmp_path):
    code = """
import torch
from hub.drawing_calls import draw
from srdd import SRDDInpaintPipeline, SRDDTextPipeline
from srdd.publish.__main__ import main
main(["me/tiny", "again/tiny", "--hub_model_id", "me/tiny"])
images = draw(SRDDInpaintPipeline.from_pretrained("me/tiny"), "inpaint"), draw(
    SRDDTextPipeline.from_pretrained("me/texts"), "draw"
)
torch.save(images, "images.pt")
"""
    process = run_python(hub, tmp_path / "run", "-c", code)
    assert process.returncode == 0, process.stderr
    images = torch.load(tmp_path / "run" / "images.pt", weights_only=True)
    assert torch.equal(images[0], expected("tiny")["inpaint"])
    assert torch.equal(images[1], expected("texts")["draw"])
    assert contents(tmp_path / "run" / "again" / "tiny") == contents(published["tiny"])


def test_installed_blocks_load_such_folders_without_trust(published):
    made = SRDDTextBlocks().init_pipeline(published["texts"])
    made.load_components()
    assert type(made.transformer) is ScaleTextTransformer2DModel
    images = {"draw": draw_modular(made, "draw")}
    assert_same_images(images, {"draw": expected("texts")["draw"]})


@pytest.mark.parametrize("pipeline", [DiffusionPipeline, ModularPipeline])
def test_diffusers_asks_for_trust(published, pipeline):
    with pytest.raises(ValueError, match="contains custom code"):
        pipeline.from_pretrained(published["tiny"])


def test_the_code_imports_nothing_of_srdd_and_no_more_than_drawing_needs(published):
    (code,) = published["tiny"].glob("srdd_*")
    modules = {path.stem for path in code.iterdir()}
    assert {"pipelines_scale_sampling", "schedulers_scheduling_scale", "models_transformer_scale_2d"} <= modules
    assert not [name for name in modules if name.startswith(NOT_FOR_DRAWING)]
    for path in code.iterdir():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert {name.split(".")[0] for name in names} <= THIRD_PARTIES | sys.stdlib_module_names, path.name


def test_files_of_a_folder(published):
    folder = published["texts"]
    digest = digest_of(folder)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == [f"text_draw_{digest}", "SRDDTextPipeline"]
    assert index["vqvae"] == [f"srdd_{digest}", "MultiScaleVQModel"]
    assert index["text_encoder_2"] == ["transformers", "CLIPTextModel"]
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "README.md",
        *("model_index.json", "modular_config.json", "modular_model_index.json"),
        *(f"text_{task}_{digest}.py" for task in ("draw", "inpaint", "super_resolution", "modular")),
    }
    assert not list((folder / "tokenizer").glob("*.py"))


@pytest.mark.parametrize("link", ["![Pears](assets/pears.png)", '<img src="./assets/pears.png">'])
def test_folders_that_a_card_links_into_go_along(tmp_path, link):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(f"{CARD}\nOf others/pears.png: {link}\n")
    for name in ("assets", "others"):
        (tmp_path / "model" / name).mkdir()
        (tmp_path / "model" / name / "pears.png").write_bytes(b"pears")
    copy_card(tmp_path / "model", tmp_path)
    main([str(tmp_path / "model"), str(tmp_path / "published")])
    for folder in (tmp_path, tmp_path / "published"):
        assert (folder / "assets" / "pears.png").read_bytes() == b"pears"
        assert not (folder / "others").exists()


def test_a_card_says_how_to_draw_without_srdd(published):
    card = (published["tiny"] / "README.md").read_text()
    assert card.startswith(CARD)
    assert f'custom_pipeline="inpaint_{digest_of(published["tiny"])}"' in card
    names: dict = {}
    exec(card.split("```py\n")[1].split("```")[0].replace('"me/tiny"', repr(str(published["tiny"]))), names)
    assert type(names["pipe"]).__name__ == "SRDDPipeline"


def test_publishing_again_replaces_the_code(published, tmp_path, monkeypatch):
    old = tmp_path / "old"
    shutil.copytree(published["tiny"], old)
    monkeypatch.setattr(carried_code, "drawing_modules", lambda *_: {"__init__": "# Of another version.\n"})
    add_code(old)
    assert digest_of(old) != digest_of(published["tiny"])
    monkeypatch.undo()
    main([str(old), str(tmp_path / "new" / "tiny"), "--hub_model_id", "me/tiny"])
    assert contents(tmp_path / "new" / "tiny") == contents(published["tiny"])


def test_a_pipeline_without_text_encoders(tmp_path):
    tiny_text_pipeline(**WITHOUT_ENCODERS).save_pretrained(tmp_path)
    add_code(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["text_encoder"] == [None, None]
    assert SRDDTextPipeline.from_pretrained(tmp_path).text_encoder is None


def test_imports_are_rewritten_one_by_one(tmp_path):
    sources = {
        "__init__": 'from srdd.a import (\n    B,\n    C as D,\n)\n__version__ = "1"\n',
        "a/__init__": "def f():\n    from srdd import __version__, b as c  # late\n\nB = C = 1\n",
        "b": "import srddlike\nfrom srdd.a.deep import E\n",
        "a/deep": "E = 'from srdd.a import B'\n",
        "unused": "from srdd.nothing import X\n",
    }
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(source)
    assert drawing_modules(tmp_path, ["srdd"]) == {
        "__init__": 'from . a import B, C as D\n__version__ = "1"\n',
        "a": "def f():\n    from . import __version__; from . import b as c  # late\n\nB = C = 1\n",
        "a_deep": "E = 'from srdd.a import B'\n",
        "b": "import srddlike\nfrom . a_deep import E\n",
    }


@pytest.mark.parametrize(
    ("model", "output", "message"),
    [
        ("other", "new", "`_class_name` of .* must be one of .*'SRDDPipeline'.*, got 'LatentDiffusionPipeline'"),
        ("empty", "new", "model_index.json"),
        ("tiny", "full", "`OUT` must be a new or an empty folder, got .*full"),
    ],
)
def test_refusals_leave_nothing_behind(published, tmp_path, capsys, model, output, message):
    tiny_latent_diffusion().save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit):
        main([str(published.get(model, tmp_path / model)), str(tmp_path / output)])
    error = capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert re.search(message, error), error
