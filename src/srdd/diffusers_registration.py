"""
Tells diffusers that `srdd` is a library it may load components from.

Without this, a saved pipeline names our classes by file path and cannot be loaded back from the Hub. What is used here
is private to diffusers; nothing else in the package touches it, and a test pushes and pulls a pipeline to pin it.
"""

from diffusers.pipelines import pipeline_loading_utils


METHODS = ["save_pretrained", "from_pretrained"]


def register(class_names: list[str]) -> None:
    """Make `model_index.json` say `["srdd", class_name]` for these public classes."""
    entries = dict.fromkeys(class_names, METHODS)
    pipeline_loading_utils.LOADABLE_CLASSES["srdd"] = entries
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(entries)
