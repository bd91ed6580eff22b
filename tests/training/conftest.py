import pytest
from accelerate.state import AcceleratorState
from training.launching import make_image_folder
from training.tiny_runs import train_tokenizer, train_transformer


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A stranger's folder: two classes of small pictures of different sizes."""
    return make_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def trained(image_folder, tmp_path_factory):
    """A tokenizer and a pipeline, as the scripts make them."""
    root = tmp_path_factory.mktemp("trained")
    train_tokenizer(image_folder, root / "tokenizer")
    train_transformer(image_folder, root / "tokenizer", root / "model")
    return root


@pytest.fixture
def _own_precision():
    """Lets a test choose `--mixed_precision`, which accelerate fixes for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
