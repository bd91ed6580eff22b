import pytest
from accelerate import Accelerator

from srdd.training.accelerator import check_processes, make_accelerator
from srdd.training.settings import TrainingSettings


def test_settings_reach_the_tracker_without_the_token(tmp_path):
    settings = TrainingSettings(
        output_dir=str(tmp_path / "run"), hub_token="hf_secret", data_description="pears", report_to="tensorboard"
    )
    accelerator = make_accelerator(settings)
    assert isinstance(accelerator, Accelerator)
    accelerator.end_training()
    written = [path for path in (tmp_path / "run" / "logs").rglob("*") if path.is_file()]
    text = b"".join(path.read_bytes() for path in written)
    assert b"pears" in text
    assert b"hf_secret" not in text


def test_processes_must_know_of_each_other(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`WORLD_SIZE` must be the number of processes that work together, 1, got 2"):
        check_processes(Accelerator())
