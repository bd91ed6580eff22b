import hashlib
import json

import pytest
import torch
from accelerate import Accelerator
from diffusers import TorchAoConfig
from PIL import Image, features
from tiny_models import tiny_pipeline, tiny_scheduler, tiny_transformer
from training.launching import make_image_folder

from srdd import ScaleTransformer2DModel
from srdd.data.images import load_labelled_images
from srdd.evaluation.feature_cache import collect
from srdd.evaluation.features import EfficientNetLite0Features, FeatureExtractor
from srdd.evaluation.image_sources import DataSetImages, FolderImages, PipelineImages
from srdd.evaluation.report import check_pairs


class MeanColours(FeatureExtractor):
    """Features of an image that can be computed by hand."""

    name = "mean colours"
    has_logits = True

    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert images.dtype == torch.uint8
        return images.float().mean(dim=(2, 3)), images.float().amax(dim=(2, 3))


class Brightness(FeatureExtractor):
    name = "brightness"

    def features_and_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        return images.float().mean(dim=(1, 2, 3))[:, None], None


@pytest.fixture
def accelerator():
    return Accelerator()


class Recorder:
    """A source that notes what is read of it."""

    def __init__(self, source):
        self.source, self.batches = source, []
        self.count, self.key = source.count, source.key

    def read(self, indices: range) -> torch.Tensor:
        self.batches.append(indices)
        return self.source.read(indices)


def test_images_are_of_all_classes_in_turn_with_a_generator_each():
    source = PipelineImages(tiny_pipeline(), 12)
    for index, image in enumerate(source.read(range(12))):
        generator = torch.Generator().manual_seed(index)
        alone = source.pipe(index % 5, generator=generator, output_type="pt").images[0]
        assert (image.int() - alone.mul(255).round().int()).abs().max() <= 1


def test_an_image_depends_on_its_index_and_seed_alone():
    source = PipelineImages(tiny_pipeline(), 12)
    whole = source.read(range(12))
    assert whole.shape == (12, 3, 8, 8)
    assert whole.dtype == torch.uint8
    in_batches = torch.cat([source.read(range(start, min(start + 5, 12))) for start in (0, 5, 10)])
    # Sums in another order may move a value that lies between two steps to the other one.
    assert (in_batches.int() - whole.int()).abs().max() <= 1
    assert torch.equal(source.read(range(12)), whole)
    other = PipelineImages(tiny_pipeline(), 12, seed=1).read(range(12))
    assert not torch.equal(other, whole)


def test_seeds_have_no_images_in_common():
    # Were a seed a shift of another one, the sixth image of seed 0 would be the first of seed 5: five classes.
    first, other = (PipelineImages(tiny_pipeline(), 6, seed=seed).read(range(6)) for seed in (0, 5))
    assert not any(torch.equal(a, b) for a in first for b in other)


def test_the_key_names_all_that_the_pixels_depend_on():
    def key(pipe=None, **options):
        return PipelineImages(pipe or tiny_pipeline(), 10, **options).key

    same = key()
    assert key() == same
    assert key(guidance_scale=2.5) == same  # the default
    others = [
        key(guidance_scale=2.0),
        key(seed=1),
        key(tiny_pipeline(scheduler=tiny_scheduler(top_k=3))),
        key(tiny_pipeline(transformer=tiny_transformer(seed=7))),
        key(tiny_pipeline("causal")),  # the same weights
    ]
    assert same not in others
    assert len({str(each) for each in others}) == len(others)


def test_the_key_of_a_quantized_pipeline_can_be_written(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    tiny_transformer().save_pretrained(tmp_path)
    options = {"quantization_config": config, "dtype": torch.float32}
    transformers = [ScaleTransformer2DModel.from_pretrained(tmp_path, **options) for _ in range(2)]
    keys = [PipelineImages(tiny_pipeline(transformer=transformer), 4).key for transformer in transformers]
    plain = PipelineImages(tiny_pipeline(), 4).key
    assert json.dumps(keys[0]) == json.dumps(keys[1])
    assert keys[0]["weights"] != plain["weights"]


def test_models_without_classes_are_not_guided():
    pipe = tiny_pipeline(transformer=tiny_transformer(num_classes=0))
    source = PipelineImages(pipe, 6)
    assert source.guidance_scale == 1.0
    assert source.read(range(2, 6)).shape == (4, 3, 8, 8)


def test_features_are_those_of_the_images(tmp_path, accelerator):
    source = PipelineImages(tiny_pipeline(), 10)
    images = torch.cat([source.read(batch) for batch in (range(0, 4), range(4, 8), range(8, 10))])
    collected = collect(source, [MeanColours(), Brightness()], tmp_path, accelerator, batch_size=4)
    torch.testing.assert_close(collected.features["mean colours"], images.float().mean(dim=(2, 3)))
    torch.testing.assert_close(collected.features["brightness"][:, 0], images.float().mean(dim=(1, 2, 3)))
    assert collected.logits.keys() == {"mean colours"}
    assert torch.equal(collected.logits["mean colours"], images.float().amax(dim=(2, 3)))
    assert torch.equal(collected.pictures, images)
    digests = b"".join(hashlib.sha256(image.numpy().tobytes()).digest() for image in images)
    assert collected.image_hash == hashlib.sha256(digests).hexdigest()[:12]


def test_batches_that_are_there_are_not_made_again(tmp_path, accelerator):
    source = Recorder(PipelineImages(tiny_pipeline(), 10))
    first = collect(source, [MeanColours()], tmp_path, accelerator, batch_size=4)
    assert source.batches == [range(0, 4), range(4, 8), range(8, 10)]

    def again(extractors, count=10):
        recorder = Recorder(PipelineImages(tiny_pipeline(), count))
        return collect(recorder, extractors, tmp_path, accelerator, batch_size=4), recorder.batches

    collected, batches = again([MeanColours()])
    assert batches == []
    assert torch.equal(collected.features["mean colours"], first.features["mean colours"])
    assert (collected.image_hash, len(collected.pictures)) == (first.image_hash, 10)
    # As an interrupted run leaves it: one batch is missing, another one was being written.
    (lost,) = tmp_path.rglob("0000004-0000008.safetensors")
    lost.rename(lost.with_suffix(".123.partial"))
    collected, batches = again([MeanColours()])
    assert batches == [range(4, 8)]
    assert torch.equal(collected.features["mean colours"], first.features["mean colours"])
    assert collected.image_hash == first.image_hash
    # More images and another extractor.
    assert again([MeanColours()], count=12)[1] == [range(8, 12)]
    collected, batches = again([MeanColours(), Brightness()])
    assert batches == [range(0, 4), range(4, 8), range(8, 10)]
    assert collected.features.keys() == {"mean colours", "brightness"}


def test_extractors_of_one_name_are_refused(tmp_path, accelerator):
    # Folders a/vit and b/vit both give the name "vit".
    extractors = [MeanColours(), Brightness()]
    extractors[1].name = "mean colours"
    with pytest.raises(ValueError, match=r"`extractors` must have names of their own, got \['mean colours', 'mean"):
        collect(PipelineImages(tiny_pipeline(), 4), extractors, tmp_path, accelerator)


def test_other_images_and_other_weights_have_other_files(tmp_path, accelerator):
    def collected(source, extractor):
        recorder = Recorder(source)
        collect(recorder, [extractor], tmp_path, accelerator)
        return bool(recorder.batches)

    pipe, extractor = tiny_pipeline(), EfficientNetLite0Features()
    assert collected(PipelineImages(pipe, 4), extractor)
    assert not collected(PipelineImages(pipe, 4), extractor)
    assert collected(PipelineImages(pipe, 4, seed=1), extractor)
    pipe.scheduler = tiny_scheduler(temperature=0.5)
    assert collected(PipelineImages(pipe, 4), extractor)
    with torch.no_grad():
        extractor.network._fc.bias[0] += 1
    assert collected(PipelineImages(pipe, 4), extractor)


def test_data_sets_give_the_pictures_that_training_sees(tmp_path):
    folder = make_image_folder(tmp_path / "images")
    images = load_labelled_images(train_data_dir=str(folder), cache_dir=str(tmp_path / "datasets"))
    source = DataSetImages(images, "train", 15, resolution=16)
    assert source.count == 15
    whole = source.read(range(15))
    assert whole.shape == (15, 3, 16, 16)
    assert torch.equal(torch.cat([source.read(range(0, 4)), source.read(range(4, 15))]), whole)
    warm = whole[:, 0].float().mean(dim=(1, 2)) > 128
    assert 3 < warm.sum() < 12  # of both classes, though the folder is sorted
    again = DataSetImages(images, "train", 24, resolution=16)
    assert again.key == source.key  # the first images are the same: their features are as well
    assert torch.equal(again.read(range(15)), whole)
    assert DataSetImages(images, "train", 1000, resolution=16).count == 24
    assert DataSetImages(images, "train", 15, resolution=8).key != source.key
    with pytest.raises(ValueError, match="`split` must be one the data set has, got 'validation'"):
        DataSetImages(images, "validation", 15, resolution=16)


def save_pictures(folder, images: torch.Tensor):
    for index, image in enumerate(images):
        path = folder / f"class {index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


def test_folders_give_their_pictures_by_name(tmp_path):
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    folder = save_pictures(tmp_path, images)
    (folder / "class 0" / "notes.txt").write_text("no picture")
    source = FolderImages(folder)
    assert (source.count, source.resolution) == (6, 8)
    assert source.names()[:3] == ["class 0/00", "class 0/02", "class 0/04"]
    assert torch.equal(source.read(range(6)), images[[0, 2, 4, 1, 3, 5]])
    some = FolderImages(folder, count=4)
    assert some.names() == FolderImages(folder, count=4).names()
    assert {name.split("/")[0] for name in some.names()} == {"class 0", "class 1"}
    assert some.key != source.key


def test_folders_of_other_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`folder` must hold pictures \(\.png, .*\), got none in"):
        FolderImages(tmp_path)
    with pytest.raises(ValueError, match=r"`samples_dir` must be a folder with pictures, got '.*gone' \(No such file"):
        FolderImages(tmp_path / "gone", argument="samples_dir")
    folder = save_pictures(tmp_path, torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="`folder` must hold pictures of 16x16 pixels, got 8x8 in .*00.png"):
        FolderImages(folder, resolution=16)
    Image.new("RGB", (8, 9)).save(folder / "class 1" / "zz.png")
    with pytest.raises(ValueError, match="`folder` must hold pictures of 8x8 pixels, got 8x9 in .*zz.png"):
        FolderImages(folder).read(range(5))


def eight_pictures(folder):
    return save_pictures(folder, torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 8, 8))


def test_what_systems_put_into_folders_is_not_counted(tmp_path, caplog):
    folder = eight_pictures(tmp_path)
    for name in (".ipynb_checkpoints/00-checkpoint.png", "class 0/._00.png", "__MACOSX/a.png", "class 1/Thumbs.db"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / "class 0" / "00.png").read_bytes())
    (folder / "class 0" / "metadata.csv").write_text("x")
    (folder / "class 0" / "again").symlink_to("..")
    source = FolderImages(folder)
    assert (source.count, len(source.names()), source.read(range(8)).shape) == (8, 8, (8, 3, 8, 8))
    assert [record.getMessage().removeprefix(f"Left out of {folder}, ") for record in caplog.records] == [
        "hidden or made by the system (4): .ipynb_checkpoints, __MACOSX, class 0/._00.png, ….",
        "no pictures by the ending of their names (1): class 0/metadata.csv.",
        "links to folders that are read already (1): class 0/again.",
    ]


def test_results_in_the_folder_of_the_pictures_are_not_measured(tmp_path):
    folder = eight_pictures(tmp_path)
    (folder / "out").mkdir()
    (folder / "out" / "evaluation.json").write_text("{}")
    Image.new("RGB", (64, 8)).save(folder / "out" / "samples.png")
    assert FolderImages(folder).count == 8


@pytest.mark.parametrize("suffix", ["PNG", "webp", "gif", "bmp", "tif", "avif"])
def test_folders_may_hold_what_training_reads(tmp_path, suffix):
    folder = eight_pictures(tmp_path)
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    Image.new("RGB", (8, 8)).save(folder / f"[x].{suffix}")
    source = FolderImages(folder)
    assert source.count == 9
    assert source.names()[0] == "[x]"
    assert source.read(range(1)).max() == 0


@pytest.mark.parametrize("content", [b"", b"text", "cut"])
@pytest.mark.parametrize("name", ["class 0/00.png", "class 1/zz.png"])
def test_pictures_that_cannot_be_read_are_named(tmp_path, content, name):
    folder = eight_pictures(tmp_path)
    noise = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(folder / name)
    (folder / name).write_bytes((folder / name).read_bytes()[:150] if content == "cut" else content)
    with pytest.raises(ValueError, match=rf"`samples_dir` must hold readable pictures, got '.*{name}' \(\w+Error: "):
        FolderImages(folder, argument="samples_dir").read(range(9))


def test_pairs_do_not_depend_on_endings(tmp_path):
    for folder, suffix in (("one", "png"), ("two", "webp")):
        (tmp_path / folder).mkdir()
        for index, name in enumerate(("a", "a.n", "a-b")):
            Image.new("RGB", (8, 8), (80 * index, 0, 0)).save(tmp_path / folder / f"{name}.{suffix}", lossless=True)
    one, two = (FolderImages(tmp_path / folder) for folder in ("one", "two"))
    check_pairs(one, two)
    assert one.names() == two.names()
    assert torch.equal(one.read(range(3)), two.read(range(3)))
    Image.new("RGB", (8, 8)).save(tmp_path / "two" / "a.png")
    with pytest.raises(
        ValueError, match=r"`references` must hold one picture of each name, .* got several of \['a'\]"
    ):
        check_pairs(one, FolderImages(tmp_path / "two"))
