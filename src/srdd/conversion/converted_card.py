"""The model card of converted weights: how their authors draw with them, under which licence, and whom to cite."""

import json
import textwrap

from huggingface_hub import ModelCard, ModelCardData

from srdd import __version__
from srdd.conversion.official_checkpoints import Converted
from srdd.evaluation.tables import markdown_table, readable
from srdd.pipelines import SRDDTextPipeline
from srdd.pipelines.scale_pipeline import ScalePipeline


# What the snippet of a model that draws from texts asks for.
PROMPT = "a red fox in the snow, photograph"


def converted_card(converted: Converted, name: str) -> str:
    """
    A model card in the Hub's format.

    Args:
        converted ([`Converted`]): The weights.
        name (`str`): Their name: the folder's.

    Returns:
        `str`: Markdown with a YAML header.
    """
    family, (vae_file, file) = converted.family, converted.files
    draws_from_texts = isinstance(converted.pipeline, SRDDTextPipeline)
    data = ModelCardData(
        library_name="srdd",
        pipeline_tag="text-to-image" if draws_from_texts else "unconditional-image-generation",
        tags=["srdd", "diffusers", "discrete-diffusion", "visual-autoregressive", family.title.lower()],
        **family.licence,
    )
    sections = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name}\n",
        _paragraph(
            f"{family.title} ({family.source}): `{file}` with the tokenizer `{vae_file}`, converted by"
            f" `python -m srdd.conversion` of srdd {__version__}. {family.about}"
        ),
        _snippet(converted.pipeline, json.dumps(name, ensure_ascii=False)),
        "## Published settings\n",
        _settings(converted),
        "## Model\n",
        _model(converted),
        "## Licence and citation\n",
        _paragraph(family.licence_note),
        f"```bibtex\n{family.citation}\n```\n",
    ]
    card = "\n".join(sections)
    ModelCard(card, ignore_metadata_errors=False)  # raises where the header is malformed
    return card


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False) + "\n"


def _snippet(pipeline: ScalePipeline, name: str) -> str:
    kind, draws_from_texts = type(pipeline).__name__, isinstance(pipeline, SRDDTextPipeline)
    wanted = json.dumps(PROMPT if draws_from_texts else pipeline.id2label.get(207, 0))
    if not draws_from_texts or pipeline.encodes_texts:
        imports, loading, notes, encoders = [], [], [], ""
    else:
        imports, encoders = ["from srdd.conversion import load_text_encoders"], ", **encoders"
        loading = ['encoders = load_text_encoders("stabilityai/stable-diffusion-xl-base-1.0")']
        text = (
            "There are no text encoders here. Load them as above, or give what they make of texts: `prompt_embeds` and"
            " `pooled_prompt_embeds`, `negative_prompt_embeds` and `negative_pooled_prompt_embeds`."
        )
        notes = [_paragraph(text)]
    lines = [
        f"from srdd import {kind}",
        *imports,
        "",
        *loading,
        f"pipe = {kind}.from_pretrained({name}{encoders})",
        f"image = pipe({wanted}).images[0]",
    ]
    return "\n".join(["```py", *lines, "```\n", *notes])


def _settings(converted: Converted) -> str:
    config, settings = converted.pipeline.transformer.config, converted.settings
    published, depth = converted.family.of_depth(config.num_layers), config.num_layers
    columns = {
        "weights": [f"`{each.name}`" for each in published],
        **{f"`{name}`": [getattr(each, name) for each in published] for name in ("guidance_scale", "top_k", "top_p")},
    }
    text = (
        f"Unless told otherwise, the pipeline draws with guidance {settings.guidance_scale}, top-k {settings.top_k}"
        f" and top-p {settings.top_p}, as its scheduler says. `guidance_scale` is 1 + the `cfg` of the authors' code;"
        " its weight grows linearly over the scales."
    )
    if settings.num_guided_scales is not None:
        columns["guided scales"] = [f"{each.num_guided_scales} of {len(each.scale_sizes)}" for each in published]
        columns["`temperature` of the others"] = [each.unguided_temperature for each in published]
        is_published = converted.pipeline.scheduler.config.guidance_stop < 1
        text += " The finest scales are drawn without guidance." if is_published else " All scales are guided here."
    if depth != settings.depth:
        text = f"None are published for {depth} blocks, these are those of the nearest number. {text}"
    rows = [list(row) for row in zip(*columns.values())]
    return markdown_table(list(columns), rows) + "\n" + _paragraph(text)


def _model(converted: Converted) -> str:
    pipeline, usual = converted.pipeline, converted.attention_pattern
    config = pipeline.transformer.config
    parts = {"tokenizer": [pipeline.vqvae], "transformer": [pipeline.transformer]}
    if isinstance(pipeline, SRDDTextPipeline) and pipeline.encodes_texts:
        parts["text encoders"] = [pipeline.text_encoder, pipeline.text_encoder_2]
    counts = {
        part: sum(parameter.numel() for model in models for parameter in model.parameters()) / 1e6
        for part, models in parts.items()
    }
    facts = [f"{part} {count:.1f} M parameters" for part, count in counts.items()]
    height, width = pipeline.sample_size
    facts += [f"{config.num_layers} blocks", f"pictures of {height} x {width} pixels"]
    facts += [f"scales {readable(config.scale_sizes)}"]
    facts += [f"attention {config.attention_pattern!r}"]
    windows = config.get("attention_windows")
    facts += [f"windows {readable(windows)}"] if windows else []
    text = f"{'; '.join(facts)}."
    if config.attention_pattern != usual:
        text += f" The authors' model attends by {usual!r}: this one is a start for fine-tuning."
    return _paragraph(text)
