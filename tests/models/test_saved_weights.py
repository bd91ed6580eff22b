"""Models load completely or not at all, whatever became of their files."""

import json
import struct
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import TorchAoConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_pipeline, tiny_transformer, tiny_vqvae

from srdd import MultiScaleVQModel, ScaleTransformer2DModel, SRDDPipeline
from srdd.models.saved_weights import is_finite_as


WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

# Ways to load a folder: arguments of `from_pretrained`.
LOADINGS = (
    {},
    {"low_cpu_mem_usage": False},
    {"disable_mmap": True},
    {"dtype": torch.bfloat16},
    {"device_map": "cpu"},
    {"use_safetensors": True},
)
MAKERS = {"transformer": tiny_transformer, "vqvae": tiny_vqvae}


@pytest.fixture(autouse=True)
def quiet():
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    yield
    diffusers.utils.logging.set_verbosity(level)


@pytest.fixture(params=MAKERS)
def saved(request, tmp_path):
    """A saved model: class, folder, tensors."""
    model = MAKERS[request.param]()
    model.save_pretrained(tmp_path)
    return type(model), tmp_path, load_file(tmp_path / WEIGHTS)


def refused(model_class, folder: Path, pattern: str, **arguments) -> str:
    """The message with which a folder is refused; it names the folder."""
    with pytest.raises(ValueError, match=pattern) as caught:
        model_class.from_pretrained(folder, **arguments)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_each_tensor_is_missed(saved):
    model_class, folder, tensors = saved
    for index, name in enumerate(tensors):
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / WEIGHTS)
        refused(model_class, folder, f"but {name} is missing", **LOADINGS[index % len(LOADINGS)])


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = torch.nan
    return tensor


FAULTS = {
    "nan": (with_nan, "is not finite"),
    "infinity": (lambda tensor: with_nan(tensor).nan_to_num(nan=-torch.inf), "is not finite"),
    "one more": (lambda tensor: torch.cat([tensor, tensor]), "must have shape"),
    "one axis more": (lambda tensor: tensor[None], "must have shape"),
    "int8": (lambda tensor: tensor.to(torch.int8), "must hold plain floating-point numbers, got torch.int8"),
    "int64": (lambda tensor: tensor.long(), "must hold plain floating-point numbers, got torch.int64"),
    "bool": (lambda tensor: tensor > 0, "must hold plain floating-point numbers, got torch.bool"),
}


def test_each_tensor_is_looked_at(saved):
    model_class, folder, tensors = saved
    faults = list(FAULTS.values())
    for index, name in enumerate(tensors):
        change, words = faults[index % len(faults)]
        save_file({**tensors, name: change(tensors[name]).contiguous()}, folder / WEIGHTS)
        refused(model_class, folder, f"but {name} {words}", **LOADINGS[index % len(LOADINGS)])


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("arguments", LOADINGS)
def test_all_loadings_look(tmp_path, fault, arguments):
    tiny_transformer().save_pretrained(tmp_path)
    tensors, (change, words) = load_file(tmp_path / WEIGHTS), FAULTS[fault]
    save_file({**tensors, "pos_embed": change(tensors["pos_embed"]).contiguous()}, tmp_path / WEIGHTS)
    refused(ScaleTransformer2DModel, tmp_path, f"but pos_embed {words}", **arguments)


@pytest.mark.parametrize("arguments", LOADINGS)
def test_one_error_names_the_first_few(saved, arguments):
    model_class, folder, tensors = saved
    renamed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / WEIGHTS)
    message = refused(model_class, folder, f"… and {2 * len(tensors) - 5} more", **arguments)
    assert message.count("is missing") + message.count("is unexpected") == 5
    save_file({**tensors, "extra.weight": torch.zeros(3)}, folder / WEIGHTS)
    refused(model_class, folder, "but extra.weight is unexpected", **arguments)


def test_numbers_beyond_the_dtype_asked_for(saved):
    model_class, folder, tensors = saved
    name = next(iter(tensors))
    save_file({**tensors, name: torch.full_like(tensors[name], 1e30)}, folder / WEIGHTS)
    assert torch.isfinite(model_class.from_pretrained(folder).state_dict()[name]).all()
    refused(model_class, folder, f"{name} is not finite as torch.float16", dtype=torch.float16)


def test_the_configuration_decides(saved):
    model_class, folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "codebook_size": 33}))
    refused(model_class, folder, r"must have shape \(33")
    refused(model_class, folder, r"must have shape \(33", low_cpu_mem_usage=False)
    for name in ("ignore_mismatched_sizes", "use_flashpack"):
        with pytest.raises(ValueError, match=f"`{name}` must be False for a {model_class.__name__}, got True"):
            model_class.from_pretrained(folder, **{name: True})


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_shards(tmp_path, low_cpu_mem_usage):
    model = tiny_transformer()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    arguments = {"low_cpu_mem_usage": low_cpu_mem_usage}
    for shard in shards:
        content, tensors = shard.read_bytes(), load_file(shard)
        name = next(iter(tensors))
        for changed, words in (
            (
                {key: tensor for key, tensor in tensors.items() if key != name} or {"other": torch.zeros(1)},
                "is missing",
            ),
            ({**tensors, name: with_nan(tensors[name])}, "is not finite"),
            ({**tensors, "extra": torch.zeros(1)}, "extra is unexpected"),
        ):
            save_file(changed, shard)
            refused(ScaleTransformer2DModel, tmp_path, words, **arguments)
        shard.write_bytes(content[:-1])
        with pytest.raises(OSError, match=shard.name):
            ScaleTransformer2DModel.from_pretrained(tmp_path, **arguments)
        shard.unlink()
        with pytest.raises(OSError, match=shard.name):
            ScaleTransformer2DModel.from_pretrained(tmp_path, **arguments)
        shard.write_bytes(content)
    assert torch.equal(ScaleTransformer2DModel.from_pretrained(tmp_path, **arguments).pos_embed, model.pos_embed)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"weight_map": 3}', '{"metadata": {}}', "é".encode("latin-1")]
)
def test_index_of_shards(tmp_path, text):
    tiny_transformer().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / f"{WEIGHTS}.index.json"
    index.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(ScaleTransformer2DModel, tmp_path, "must be a saved ScaleTransformer2DModel")


def test_a_variant(tmp_path):
    tiny_vqvae().half().save_pretrained(tmp_path, variant="fp16")
    file = tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: with_nan(tensors[name])}, file)
    message = refused(MultiScaleVQModel, tmp_path, f"{name} is not finite", variant="fp16")
    assert file.name in message


@pytest.mark.parametrize("name", MAKERS)
def test_parts_of_a_pipeline(tmp_path, name):
    tiny_pipeline().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / name / WEIGHTS)
    first, *others = tensors
    save_file({key: tensors[key] for key in others}, tmp_path / name / WEIGHTS)
    for arguments in ({}, {"low_cpu_mem_usage": False}, {"dtype": torch.float16}):
        with pytest.raises(ValueError, match=f"{name}.*but {first} is missing"):
            SRDDPipeline.from_pretrained(tmp_path, **arguments)


# What a file may have become: the bytes of it made of those it had.
NO_WEIGHTS = {
    "empty": lambda content: b"",
    "cut in the length": lambda content: content[:4],
    "cut in the header": lambda content: content[:100],
    "cut in the data": lambda content: content[: len(content) // 2],
    "cut at the end": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "a git-lfs pointer": lambda content: LFS_POINTER.encode(),
    "a text": lambda content: b"Not found",
    "a page": lambda content: b"<!DOCTYPE html><html><body>404</body></html>",
    "zeros": lambda content: bytes(len(content)),
    "a huge header": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "a list as header": lambda content: struct.pack("<Q", 2) + b"[]",
    "no tensors": lambda content: struct.pack("<Q", 2) + b"{}",
}


@pytest.mark.parametrize("became", NO_WEIGHTS)
@pytest.mark.parametrize("file_name", [WEIGHTS, PICKLE])
def test_a_file_that_holds_no_weights(tmp_path, became, file_name):
    tiny_transformer().save_pretrained(tmp_path, safe_serialization=file_name == WEIGHTS)
    file = tmp_path / file_name
    file.write_bytes(NO_WEIGHTS[became](file.read_bytes()))
    if file_name == PICKLE and became == "longer":
        return  # zip archives may have a comment
    for arguments in ({}, {"low_cpu_mem_usage": False}, {"disable_mmap": True}):
        with pytest.raises((OSError, ValueError), match=str(tmp_path)):
            ScaleTransformer2DModel.from_pretrained(tmp_path, **arguments)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.zeros(3),
        {},
        {"proj_in.bias": 1},
        {1: torch.zeros(3)},
        {"model": {"proj_in.bias": torch.zeros(16)}},
    ],
)
def test_a_pickle_of_something_else(tmp_path, content):
    tiny_transformer().save_pretrained(tmp_path, safe_serialization=False)
    torch.save(content, tmp_path / PICKLE)
    refused(ScaleTransformer2DModel, tmp_path, "must ")


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_of_tensors_of_other_kinds(tmp_path):
    tiny_transformer().save_pretrained(tmp_path, safe_serialization=False)
    tensors = torch.load(tmp_path / PICKLE)
    name = "proj_in.weight"
    for kind in (
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to_sparse_csr(),
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor.to("meta"),
        with_nan,
    ):
        torch.save({**tensors, name: kind(tensors[name])}, tmp_path / PICKLE)
        with pytest.raises((OSError, ValueError), match=str(tmp_path)):
            ScaleTransformer2DModel.from_pretrained(tmp_path)
    torch.save({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / PICKLE)
    refused(ScaleTransformer2DModel, tmp_path, f"{name} is missing")


def test_flipped_bits(tmp_path):
    """In the header all are noticed, or change nothing; in the data, those that leave no finite number."""
    model = tiny_vqvae()
    model.save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    content = file.read_bytes()
    (header_size,) = struct.unpack("<Q", content[:8])
    generator = torch.Generator().manual_seed(0)
    noticed, places = 0, torch.randint(8 + header_size, (60,), generator=generator).tolist()
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        file.write_bytes(flipped)
        try:
            loaded = MultiScaleVQModel.from_pretrained(tmp_path)
        except (OSError, ValueError):
            noticed += 1
        else:
            assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    assert noticed > 50
    file.write_bytes(content)
    tensors = load_file(file)
    name = "quantize.codebook.weight"
    bits = torch.where(tensors[name] == tensors[name].max(), torch.tensor(2.0), tensors[name]).view(torch.int32)
    save_file({**tensors, name: (bits | 0x7F800000).view(torch.float32)}, file)
    refused(MultiScaleVQModel, tmp_path, f"{name} is not finite")


def test_finite_numbers():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2):
        numbers = torch.tensor([0.0, -2.0, torch.finfo(dtype).max], dtype=torch.float64).to(dtype)
        assert is_finite_as(numbers)
        assert not is_finite_as(torch.cat([numbers, torch.tensor([torch.nan]).to(dtype)]))
    assert is_finite_as(torch.tensor([70_000.0]), torch.bfloat16)
    assert not is_finite_as(torch.tensor([70_000.0]), torch.float16)
    assert is_finite_as(torch.empty(0, 3))
    assert is_finite_as(torch.tensor([1]))


@pytest.fixture
def int8(tmp_path):
    """A folder of int8 weights: folder, tensors, metadata."""
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(
        torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), modules_to_not_convert=["proj_in"]
    )
    tiny_transformer().save_pretrained(tmp_path)
    model = ScaleTransformer2DModel.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    folder = tmp_path / "int8"
    model.save_pretrained(folder)
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    inputs = torch.randn(1, 21, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(inputs).sample
        assert torch.equal(ScaleTransformer2DModel.from_pretrained(folder, dtype=torch.float32)(inputs).sample, logits)
    return folder, load_file(folder / WEIGHTS), metadata


@pytest.mark.filterwarnings("ignore")
def test_each_tensor_of_int8_weights(int8):
    folder, tensors, metadata = int8
    for name, tensor in tensors.items():
        changes = [None, torch.cat([tensor, tensor])]
        changes += [with_nan(tensor), tensor.to(torch.int8)] if tensor.is_floating_point() else []
        if "zero_point" in name:
            changes = [None]  # torchao does not look at it
        for changed in changes:
            save_file(
                {k: t for k, t in {**tensors, name: changed}.items() if t is not None}, folder / WEIGHTS, metadata
            )
            module = name.rsplit(".", 1)[0]
            refused(ScaleTransformer2DModel, folder, f"but {module}", dtype=torch.float32)


def test_int8_weights_without_the_word(int8):
    folder, tensors, metadata = int8
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    refused(ScaleTransformer2DModel, folder, "_weight_qdata is unexpected")


def test_weights_are_looked_at_before_they_are_quantized(int8):
    folder, _, _ = int8
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    tensors = load_file(folder.parent / WEIGHTS)
    name = "blocks.0.attn.to_q.weight"
    save_file({**tensors, name: with_nan(tensors[name])}, folder.parent / WEIGHTS)
    refused(ScaleTransformer2DModel, folder.parent, f"{name} is not finite", quantization_config=config)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_a_whole_save_after_shards(tmp_path, variant, safe_serialization):
    arguments = {"variant": variant, "safe_serialization": safe_serialization}
    for seed, size in ((0, "10KB"), (1, "1GB"), (2, "30KB"), (3, "10KB"), (4, "1GB")):
        model = tiny_transformer(seed=seed)
        model.save_pretrained(tmp_path, max_shard_size=size, **arguments)
        loaded = ScaleTransformer2DModel.from_pretrained(tmp_path, variant=variant, use_safetensors=safe_serialization)
        assert torch.equal(loaded.pos_embed, model.pos_embed)
        assert len(list(tmp_path.glob("*index*"))) == (size != "1GB")


def test_pipelines_save_whole_after_shards(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.rglob("*.index.json"))) == 2
    pipe = tiny_pipeline(transformer=tiny_transformer(seed=7), vqvae=tiny_vqvae(seed=8))
    pipe.save_pretrained(tmp_path)
    loaded = SRDDPipeline.from_pretrained(tmp_path)
    for name in MAKERS:
        ours, theirs = (getattr(each, name).state_dict() for each in (loaded, pipe))
        assert all(map(torch.equal, ours.values(), theirs.values()))


@pytest.mark.parametrize("size", ["10KB", "1GB"])
def test_a_pickle_beside_safetensors_is_not_saved(tmp_path, size):
    tiny_transformer().save_pretrained(tmp_path, max_shard_size=size)
    with pytest.raises(ValueError, match="`save_directory` must not hold diffusion_pytorch_model.safetensors"):
        tiny_transformer(seed=2).save_pretrained(tmp_path, safe_serialization=False)


def test_loading_warns_of_nothing(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ScaleTransformer2DModel.from_pretrained(tmp_path)
