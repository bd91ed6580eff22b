from pathlib import Path

import pytest
import torch

from srdd import SRDDPipeline


FOLDER = Path(__file__).parents[2] / "model_cards" / "srdd-fruits64"


@pytest.fixture(scope="session")
def bundled_pipe():
    """The bundled model."""
    pipe = SRDDPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def drawn_fruit(bundled_pipe) -> tuple[list[str], torch.Tensor]:
    """Labels, and pictures `(2, 3, 64, 64)` in [0, 1] that the bundled model drew for them."""
    labels = ["Tomato 11", "Cherry Wax Yellow 1"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    return labels, bundled_pipe(labels, generator=generators, output_type="pt").images
