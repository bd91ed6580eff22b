"""
Tells diffusers that `srdd` is a library it may load components from.

Without this, a saved pipeline names our classes by file path and cannot be loaded back from the Hub. What is used here
is private to diffusers; nothing else in the package touches it, and a test pushes and pulls a pipeline to pin it.
"""

from diffusers.pipelines import pipeline_loading_utils


METHODS = ["save_pretrained", "from_pretrained"]


def register(class_names: list[str]) -> None:
    """
    Make `model_index.json` say `["srdd", class_name]` for these public classes. Code that a model's folder carries is
    a package of another name.
    """
    entries = dict.fromkeys(class_names, METHODS)
    pipeline_loading_utils.LOADABLE_CLASSES[__name__.partition(".")[0]] = entries
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(entries)


def register_auto_pipelines() -> None:
    """
    Let diffusers' `AutoPipelineForText2Image` and `AutoPipelineForInpainting` find SRDD's pipelines, for folders and
    in `from_pipe`. Opt-in, as it changes tables of diffusers:

    ```py
    >>> from diffusers import AutoPipelineForInpainting
    >>> import srdd

    >>> srdd.register_auto_pipelines()
    >>> pipe = AutoPipelineForInpainting.from_pretrained("model_cards/srdd-fruits64")
    ```

    Under "srdd-text" [`SRDDTextPipeline`] and [`SRDDTextInpaintPipeline`] are registered, under "srdd"
    [`SRDDPipeline`] (which draws by class) and [`SRDDInpaintPipeline`]; what was saved as one of a pair is found for
    the other's task. diffusers has no such table for super-resolution.
    """
    from diffusers.pipelines import auto_pipeline  # imports all of diffusers' pipelines

    from srdd.pipelines import SRDDInpaintPipeline, SRDDPipeline, SRDDTextInpaintPipeline, SRDDTextPipeline

    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["srdd"] = SRDDPipeline
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING["srdd"] = SRDDInpaintPipeline
    auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["srdd-text"] = SRDDTextPipeline
    auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING["srdd-text"] = SRDDTextInpaintPipeline
