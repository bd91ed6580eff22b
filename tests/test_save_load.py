"""Saving to and loading from local folders, casting, swapping schedulers, offloading."""

import json
import os
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers import AutoPipelineForInpainting, AutoPipelineForText2Image, DiffusionPipeline, TorchAoConfig
from diffusers.pipelines import auto_pipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, dynamic_modules_utils
from families import TASKS
from tiny_models import (
    ID2LABEL,
    SCALE_SIZES,
    tiny_pipeline,
    tiny_scheduler,
    tiny_transformer,
    tiny_vqvae,
)
from tiny_texts import tiny_text_pipeline

import srdd
from srdd import (
    MultiScaleVQModel,
    ScaleScheduler,
    ScaleTransformer2DModel,
    SRDDInpaintPipeline,
    SRDDPipeline,
    SRDDSuperResolutionPipeline,
)


ATTENTION_PATTERNS = ("markov", "causal", "banded")
SQUARE_SCALES = [[side, side] for side in SCALE_SIZES]
WEIGHTS = "diffusion_pytorch_model"
PIPELINE_FOLDER = Path(srdd.__file__).parent / "pipelines"

# By class, and from texts.
MAKERS = (tiny_pipeline, tiny_text_pipeline)


def draw(pipe, **arguments):
    pipe.set_progress_bar_config(disable=True)
    told = {} if "prompt" in arguments else {"class_labels": [0, "quince"]}
    arguments = {**told, "output_type": "pt", **arguments}
    return pipe(generator=torch.Generator().manual_seed(0), **arguments).images


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("attention_pattern", ATTENTION_PATTERNS)
def test_pipeline(tmp_path, attention_pattern):
    pipe = tiny_pipeline(attention_pattern)
    pipe.save_pretrained(tmp_path)
    loaded = SRDDPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(loaded), draw(pipe))
    for name in ("vqvae", "transformer", "scheduler"):
        assert public(getattr(loaded, name).config) == public(getattr(pipe, name).config)


@pytest.mark.parametrize("make", [tiny_vqvae, tiny_transformer])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_model(tmp_path, make, low_cpu_mem_usage):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert public(loaded.config) == public(model.config)


@pytest.mark.parametrize(
    "overrides",
    [{"shared_adaln": True}, {"qk_norm": False}, {"num_classes": 0}, {"id2label": {0: "apple", "3": "quince"}}],
)
def test_transformer_options(tmp_path, overrides):
    transformer = tiny_transformer(**overrides)
    transformer.save_pretrained(tmp_path)
    loaded = ScaleTransformer2DModel.from_pretrained(tmp_path)
    inputs = torch.randn(2, 21, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(inputs).sample, transformer(inputs).sample)
    assert loaded.id2label == transformer.id2label


def test_configs_survive_json(tmp_path):
    sizes = [[1, 1], [1, 2], [2, 4]]
    vqvae = tiny_vqvae(scale_sizes=((1, 1), (1, 2), (2, 4)), sample_size=(4, 8))
    transformer = tiny_transformer(scale_sizes=[1, (1, 2), (2, 4)])
    scheduler = tiny_scheduler(scale_sizes=sizes, scales=[(1, 1), (2, 4)], num_resampling_passes=[0, 1, 2])
    pipe = tiny_pipeline(vqvae=vqvae, transformer=transformer, scheduler=scheduler)
    pipe.save_pretrained(tmp_path)
    for name, file in (("vqvae", "config"), ("transformer", "config"), ("scheduler", "scheduler_config")):
        written = json.loads((tmp_path / name / f"{file}.json").read_text())
        assert written["scale_sizes"] == sizes
    loaded = SRDDPipeline.from_pretrained(tmp_path)
    assert [loaded.vqvae.config.scale_sizes, loaded.transformer.config.scale_sizes] == [sizes, sizes]
    assert public(loaded.scheduler.config) == public(scheduler.config)
    assert loaded.scheduler.scales == [[1, 1], [2, 4]]
    assert draw(loaded).shape == (2, 3, 4, 8)
    assert torch.equal(draw(loaded), draw(pipe))


def test_labels_survive_json(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    loaded = SRDDPipeline.from_pretrained(tmp_path)
    assert loaded.id2label == ID2LABEL
    assert loaded.get_label_ids(["apple", "love apple", 2]) == [0, 4, 2]
    loaded.save_pretrained(tmp_path)
    assert SRDDPipeline.from_pretrained(tmp_path).id2label == ID2LABEL


def as_version_0_1(folder: Path, critic: list) -> None:
    """Rewrite a saved pipeline's index and schedule as version 0.1 wrote them."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "token_critic": critic}))
    path = folder / "scheduler" / "scheduler_config.json"
    old = {"resampling_feedback": None, "keep_accepted_tokens": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **old}))


@pytest.mark.parametrize("attention_pattern", ATTENTION_PATTERNS)
@pytest.mark.parametrize("pipeline_class", [SRDDPipeline, SRDDInpaintPipeline, SRDDSuperResolutionPipeline])
def test_folders_of_version_0_1_load_without_a_word(attention_pattern, pipeline_class, tmp_path, capfd):
    pipe = tiny_pipeline(attention_pattern, scheduler=tiny_scheduler(resampling_policy="masked"))
    pipe.save_pretrained(tmp_path)
    as_version_0_1(tmp_path, [None, None])
    loaded = pipeline_class.from_pretrained(tmp_path)
    assert "not expected" not in capfd.readouterr().err
    assert torch.equal(draw(SRDDPipeline.from_pipe(loaded)), draw(pipe))
    loaded.save_pretrained(tmp_path / "again")
    assert "token_critic" not in (tmp_path / "again" / "model_index.json").read_text()


def test_a_folder_with_a_token_critic_says_what_became_of_it(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    as_version_0_1(tmp_path, ["srdd", "TokenCritic"])
    with pytest.raises(ValueError, match="`token_critic` is gone since version 0.2.*'masked'.*got .*TokenCritic"):
        SRDDPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype(tmp_path, dtype):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    latents = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    inputs = latents.flatten(2).transpose(1, 2)
    with torch.no_grad():
        logits, pixels = pipe.transformer(inputs, 0).sample, pipe.vqvae.decode(latents).sample
        loaded = SRDDPipeline.from_pretrained(tmp_path, dtype=dtype)
        half_logits, half_pixels = loaded.transformer(inputs.to(dtype), 0).sample, loaded.vqvae.decode(latents).sample
    for model in (loaded.transformer, loaded.vqvae):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert half_logits.dtype == half_pixels.dtype == dtype
    rounding = torch.finfo(dtype).eps
    assert (half_logits.float() - logits).abs().mean() < 4 * rounding
    assert (half_pixels.float() - pixels).abs().mean() < 4 * rounding
    images = draw(loaded)
    assert images.dtype == torch.float32
    assert torch.equal(images, draw(pipe.to(dtype)))


def test_pipeline_moves_between_dtypes():
    pipe = tiny_pipeline()
    half = draw(pipe.to(torch.bfloat16))
    assert torch.equal(draw(pipe.to(torch.float32).to(torch.bfloat16)), half)


def test_variant(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    half = tiny_pipeline().to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    for name in ("vqvae", "transformer"):
        weights = {path.name for path in (tmp_path / name).glob("*.safetensors")}
        assert weights == {f"{WEIGHTS}.safetensors", f"{WEIGHTS}.fp16.safetensors"}
    loaded = SRDDPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert torch.equal(draw(loaded), draw(half))
    assert torch.equal(draw(SRDDPipeline.from_pretrained(tmp_path)), draw(tiny_pipeline()))
    # Without `dtype` the halves are loaded as float32, as in diffusers.
    assert SRDDPipeline.from_pretrained(tmp_path, variant="fp16").transformer.dtype == torch.float32


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded(tmp_path, variant):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, max_shard_size="20KB", variant=variant)
    index = "safetensors.index.json" if variant is None else f"safetensors.index.{variant}.json"
    for name in ("vqvae", "transformer"):
        assert (tmp_path / name / f"{WEIGHTS}.{index}").is_file()
        assert len(list((tmp_path / name).glob("*-of-*.safetensors"))) > 1
    assert torch.equal(draw(SRDDPipeline.from_pretrained(tmp_path, variant=variant)), draw(pipe))


def test_from_pipe():
    pipe = tiny_pipeline()
    other = SRDDPipeline.from_pipe(pipe)
    assert all(other.components[name] is component for name, component in pipe.components.items())
    assert torch.equal(draw(other), draw(pipe))
    short = SRDDPipeline.from_pipe(pipe, scheduler=tiny_scheduler(scales=[1, 4]))
    assert short.scheduler.num_tokens == 17
    assert pipe.scheduler.num_tokens == 21


def dtypes(pipe):
    return pipe.vqvae.dtype, pipe.transformer.dtype


@pytest.mark.parametrize("from_texts", [False, True], ids=["class", "text"])
@pytest.mark.parametrize("source", TASKS)
@pytest.mark.parametrize("target", TASKS)
def test_from_pipe_leaves_components_alone(source, target, from_texts, caplog):
    source, target = TASKS[source][from_texts], TASKS[target][from_texts]
    pipe = source(**MAKERS[from_texts]().components)
    pipe.transformer.to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True, desc="drawing")
    caplog.clear()
    other = target.from_pipe(pipe)
    assert type(other) is target
    assert all(other.components[name] is component for name, component in pipe.components.items())
    assert dtypes(other) == dtypes(pipe) == (torch.float32, torch.bfloat16)
    assert other._progress_bar_config == {"disable": True, "desc": "drawing"}
    assert not caplog.records
    other.set_progress_bar_config(disable=False)
    assert pipe._progress_bar_config == {"disable": True, "desc": "drawing"}


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_from_pipe_casts_if_told(name):
    other = SRDDInpaintPipeline.from_pipe(tiny_pipeline().to(torch.bfloat16), **{name: torch.float16})
    assert dtypes(other) == (torch.float16, torch.float16)
    for wrong in ("float16", torch.int8, 16):
        with pytest.raises(ValueError, match="`dtype` must be a floating-point torch.dtype, got"):
            SRDDInpaintPipeline.from_pipe(tiny_pipeline(), **{name: wrong})


def test_from_pipe_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"`from_pipe` must get the components .*\['guidance_scale'\] by name"):
        SRDDPipeline.from_pipe(tiny_pipeline(), guidance_scale=2.0)


def test_from_pipe_leaves_quantized_components_alone(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    tiny_transformer().save_pretrained(tmp_path)
    transformer = ScaleTransformer2DModel.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    weight = transformer.proj_out.weight
    pipe = tiny_pipeline(transformer=transformer)
    assert SRDDInpaintPipeline.from_pipe(pipe).transformer.proj_out.weight is weight
    half = SRDDInpaintPipeline.from_pipe(pipe, dtype=torch.bfloat16)
    assert half.transformer.proj_out.weight is weight
    assert half.vqvae.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model name or path")
@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", "{", '{"_class_name": 3}'])
@pytest.mark.parametrize("file", ["model_index.json", "vqvae/config.json", "transformer/config.json"])
def test_files_that_are_none_of_a_pipeline(tmp_path, file, text):
    tiny_pipeline().save_pretrained(tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises((OSError, ValueError)):
        SRDDPipeline.from_pretrained(tmp_path)


PIPELINE_FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/{name}" for part in ("transformer", "vqvae") for name in ("config.json", SAFETENSORS_WEIGHTS_NAME)),
]


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model name or path")
@pytest.mark.parametrize("share", [None, 0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("file", PIPELINE_FILES)
def test_files_of_a_pipeline_that_are_missing_or_cut_off(tmp_path, file, share):
    tiny_pipeline().save_pretrained(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(names) == sorted(PIPELINE_FILES)
    path = tmp_path / file
    path.unlink() if share is None else os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises((OSError, ValueError)) as caught:
        SRDDPipeline.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model name or path")
@pytest.mark.parametrize("file", PIPELINE_FILES)
def test_files_of_a_pipeline_with_flipped_bits(tmp_path, file):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    path, random = tmp_path / file, Random(file)
    content = path.read_bytes()
    refused = 0
    for _ in range(15):
        flipped = bytearray(content)
        flipped[random.randrange(min(len(content), 4000))] ^= 1 << random.randrange(8)  # headers of weights
        path.write_bytes(flipped)
        try:
            loaded = SRDDPipeline.from_pretrained(tmp_path)
        except (OSError, ValueError):
            refused += 1
            continue
        for part in ("vqvae", "transformer"):  # what one cannot see is then a value of the same kind
            weights, ours = getattr(loaded, part).state_dict(), getattr(pipe, part).state_dict()
            assert weights.keys() == ours.keys()
            assert all(
                tensor.isfinite().all() and tensor.shape == ours[name].shape for name, tensor in weights.items()
            )
    assert refused > 3


def test_component_passed_to_from_pretrained(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    transformer = tiny_transformer(seed=7)
    loaded = SRDDPipeline.from_pretrained(tmp_path, transformer=transformer)
    assert loaded.transformer is transformer
    assert not torch.equal(draw(loaded), draw(pipe))


def test_scheduler_swapped_by_config():
    pipe = tiny_pipeline()
    images = draw(pipe)
    pipe.scheduler = ScaleScheduler.from_config(pipe.scheduler.config, scales=[1, 4], temperature=0.5)
    assert pipe.scheduler.config.scale_sizes == SQUARE_SCALES
    assert pipe.scheduler.scales == [[1, 1], [4, 4]]
    assert draw(pipe).shape == images.shape
    pipe.scheduler = ScaleScheduler.from_config(pipe.scheduler.config, scales=None, temperature=1.0)
    assert torch.equal(draw(pipe), images)


@pytest.mark.parametrize("subfolder", [None, "presets/distilled-2"])
def test_scheduler_swapped_from_a_folder(tmp_path, subfolder):
    scheduler = tiny_scheduler(scales=[1, 4], resampling_policy="masked", num_resampling_passes=[0, 3, 1], top_k=20)
    scheduler.save_pretrained(tmp_path / (subfolder or ""))
    loaded = ScaleScheduler.from_pretrained(tmp_path, subfolder=subfolder)
    assert public(loaded.config) == public(scheduler.config)
    assert loaded.timesteps.tolist() == scheduler.timesteps.tolist() == [2, 0, 0]
    pipe = tiny_pipeline()
    pipe.scheduler = loaded
    assert torch.equal(draw(pipe), draw(tiny_pipeline(scheduler=scheduler)))


def test_scheduler_of_other_weights_is_refused(tmp_path):
    pipe = tiny_pipeline()
    pipe.scheduler = ScaleScheduler.from_config(pipe.scheduler.config, scale_sizes=[1, 3, 4])
    with pytest.raises(ValueError, match=r"`scheduler.config.scale_sizes` must be the scales of the transformer"):
        draw(pipe)


def test_diffusion_pipeline_does_not_know_our_class(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="module diffusers has no attribute SRDDPipeline"):
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.fixture
def module_cache(tmp_path, monkeypatch):
    """Where diffusers copies custom pipelines to; it also appends the folder to `sys.path`."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = dict(sys.modules)
    yield
    for name in sys.modules.keys() - modules.keys():
        if name.split(".")[0] == "diffusers_modules":
            del sys.modules[name]


def test_pipeline_file_as_custom_pipeline(tmp_path, module_cache):
    # The file runs as a copy in another place, so it must not import its neighbours relatively.
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    loaded = DiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(PIPELINE_FOLDER / "pipeline_srdd.py"), trust_remote_code=True
    )
    assert type(loaded).__name__ == "SRDDPipeline"
    assert type(loaded) is not SRDDPipeline
    assert torch.equal(draw(loaded), draw(pipe))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(draw(SRDDPipeline.from_pretrained(tmp_path / "again")), draw(pipe))


@pytest.mark.parametrize("from_texts", [False, True], ids=["class", "text"])
@pytest.mark.parametrize("task", TASKS)
def test_every_pipeline_file_may_serve_as_custom_pipeline(task, from_texts, tmp_path, module_cache):
    MAKERS[from_texts]().save_pretrained(tmp_path)
    cls = TASKS[task][from_texts]
    file = PIPELINE_FOLDER / f"{cls.__module__.rpartition('.')[2]}.py"
    loaded = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(file), trust_remote_code=True)
    assert type(loaded).__name__ == cls.__name__
    assert type(loaded) is not cls


def test_folder_with_a_pipeline_file_as_custom_pipeline(tmp_path, module_cache):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    (tmp_path / "pipeline.py").write_text("from srdd import SRDDPipeline\n")
    loaded = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True)
    assert type(loaded) is SRDDPipeline
    assert torch.equal(draw(loaded), draw(pipe))


def tokenizer_calls(vqvae):
    """Every public method that touches weights, by name."""
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    token_ids = torch.randint(32, (2, 21), generator=torch.Generator().manual_seed(2))
    token_map = token_ids[:, 1:5].unflatten(1, (2, 2))
    return {
        "encode": lambda: vqvae.encode(pixels).latents,
        "decode": lambda: vqvae.decode(latents).sample,
        "quantize_latents": lambda: vqvae.quantize_latents(latents),
        "tokenize": lambda: vqvae.tokenize(pixels),
        "residual_map": lambda: vqvae.residual_map(token_map),
        "latent_states": lambda: torch.stack(vqvae.latent_states(token_ids)),
        "teacher_forcing_inputs": lambda: vqvae.teacher_forcing_inputs(token_ids),
        "decode_tokens": lambda: vqvae.decode_tokens(token_ids).sample,
        "forward": lambda: vqvae(pixels).sample,
    }


def offload(model, where, folder):
    """Leave no weight in `model`; every submodule fetches its own for the time of its forward."""
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    return model


@pytest.mark.parametrize("method", tokenizer_calls(None))
@torch.no_grad()
def test_offloaded_tokenizer(method):
    wanted = tokenizer_calls(tiny_vqvae())[method]()
    assert torch.equal(tokenizer_calls(offload(tiny_vqvae(), "cpu", None))[method](), wanted)


@pytest.mark.parametrize("normalize_codes", [True, False])
@torch.no_grad()
def test_tokenizer_offloaded_to_disk(tmp_path, normalize_codes):
    calls = tokenizer_calls(offload(tiny_vqvae(normalize_codes=normalize_codes), "disk", tmp_path))
    for method, wanted in tokenizer_calls(tiny_vqvae(normalize_codes=normalize_codes)).items():
        assert torch.equal(calls[method](), wanted()), method


@pytest.mark.parametrize("attention_pattern", ATTENTION_PATTERNS)
@pytest.mark.parametrize("shared_adaln", [False, True])
def test_offloaded_pipeline(attention_pattern, shared_adaln):
    pipe = tiny_pipeline(transformer=tiny_transformer(attention_pattern, shared_adaln=shared_adaln))
    images = draw(pipe)
    for model in (pipe.transformer, pipe.vqvae):
        offload(model, "cpu", None)
    assert pipe.device.type == "meta"
    assert torch.equal(draw(pipe), images)


def test_tokenizer_does_not_push_the_transformer_out():
    # It runs after every scale; a hook that makes room for it would move the transformer back and forth each time.
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    hook = getattr(pipe.vqvae, "_hf_hook", None)
    assert hook is None or hook.prev_module_hook is None


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_of_the_transformer(offload_type):
    pipe = tiny_pipeline("causal")
    images = draw(pipe)
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1
    )
    assert torch.equal(draw(pipe), images)


def test_group_offload_of_the_pipeline():
    pipe = tiny_pipeline()
    images = draw(pipe)
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(draw(pipe), images)


def test_weights_load_under_a_device_map(tmp_path):
    model = tiny_vqvae()
    model.save_pretrained(tmp_path)
    loaded = MultiScaleVQModel.from_pretrained(tmp_path, device_map={"": "cpu"})
    pixels = torch.zeros(1, 3, 8, 8)
    assert torch.equal(loaded.tokenize(pixels), model.tokenize(pixels))


@pytest.fixture
def auto_mappings(monkeypatch):
    """Tables of diffusers that `register_auto_pipelines` changes, as they are without it."""
    for name in ("AUTO_TEXT2IMAGE_PIPELINES_MAPPING", "AUTO_INPAINT_PIPELINES_MAPPING"):
        for key in ("srdd", "srdd-text"):
            monkeypatch.delitem(getattr(auto_pipeline, name), key, raising=False)


@pytest.mark.parametrize("from_texts", [False, True], ids=["class", "text"])
def test_auto_pipelines_find_ours_once_asked_to(from_texts, tmp_path, auto_mappings):
    pipe = MAKERS[from_texts]("causal")
    told = {"prompt": ["red", "a cat"]} if from_texts else {"class_labels": [0, "quince"]}
    drawing, inpainting, enlarging = (classes[from_texts] for classes in TASKS.values())
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"can't find a pipeline linked to {drawing.__name__}"):
        AutoPipelineForInpainting.from_pretrained(tmp_path)
    srdd.register_auto_pipelines()
    loaded = AutoPipelineForInpainting.from_pretrained(tmp_path)
    assert type(loaded) is inpainting
    again = AutoPipelineForText2Image.from_pipe(loaded)
    assert type(again) is drawing
    assert torch.equal(draw(again, **told), draw(pipe, **told))
    # What was saved for another task is found, too.
    loaded.save_pretrained(tmp_path)
    assert type(AutoPipelineForText2Image.from_pretrained(tmp_path)) is drawing
    inpaint = AutoPipelineForInpainting.from_pipe(pipe.to(torch.bfloat16))
    assert type(inpaint) is inpainting
    assert dtypes(inpaint) == (torch.bfloat16, torch.bfloat16)
    # There is no table for enlarging.
    with pytest.raises(ValueError, match=f"can't find a pipeline linked to {enlarging.__name__}"):
        AutoPipelineForText2Image.from_pipe(enlarging.from_pipe(pipe))
