"""The model card of converted weights: how their authors draw with them, under which licence, and whom to cite."""

import json
import textwrap

from huggingface_hub import ModelCard, ModelCardData

from srdd import __version__
from srdd.conversion.official_checkpoints import Converted
from srdd.evaluation.tables import markdown_table, readable


def converted_card(converted: Converted, name: str) -> str:
    """
    A model card in the Hub's format.

    Args:
        converted ([`Converted`]): The weights.
        name (`str`): Their name: the folder's.

    Returns:
        `str`: Markdown with a YAML header.
    """
    family, pipeline = converted.family, converted.pipeline
    vae_file, file = converted.files
    data = ModelCardData(
        library_name="srdd",
        pipeline_tag="unconditional-image-generation",
        tags=["srdd", "diffusers", "discrete-diffusion", "visual-autoregressive", family.title.lower()],
        **family.licence,
    )
    label = pipeline.id2label.get(207, 0)
    snippet = [
        "from srdd import SRDDPipeline\n",
        f"pipe = SRDDPipeline.from_pretrained({json.dumps(name, ensure_ascii=False)})",
        f"image = pipe({json.dumps(label)}).images[0]",
    ]
    sections = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name}\n",
        _paragraph(
            f"{family.title} ({family.source}): `{file}` with the tokenizer `{vae_file}`, converted by"
            f" `python -m srdd.conversion` of srdd {__version__}. {family.about}"
        ),
        "\n".join(["```py", *snippet, "```\n"]),
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


def _settings(converted: Converted) -> str:
    depth, settings = converted.pipeline.transformer.config.num_layers, converted.settings
    rows = [
        [f"`{each.name}`", each.guidance_scale, each.top_k, each.top_p] for each in converted.family.of_depth(depth)
    ]
    text = (
        f"Unless told otherwise, the pipeline draws with guidance {settings.guidance_scale}, top-k {settings.top_k}"
        f" and top-p {settings.top_p}, as its scheduler says. `guidance_scale` is 1 + the `cfg` of the authors' code;"
        " its weight grows linearly over the scales."
    )
    if depth != settings.depth:
        text = f"None are published for {depth} blocks, these are those of the nearest number. {text}"
    return markdown_table(["weights", "`guidance_scale`", "`top_k`", "`top_p`"], rows) + "\n" + _paragraph(text)


def _model(converted: Converted) -> str:
    pipeline, usual = converted.pipeline, converted.family.attention_pattern
    config = pipeline.transformer.config
    counts = {
        part: sum(parameter.numel() for parameter in model.parameters()) / 1e6
        for part, model in (("tokenizer", pipeline.vqvae), ("transformer", pipeline.transformer))
    }
    facts = [f"{part} {count:.1f} M parameters" for part, count in counts.items()]
    facts += [f"{config.num_layers} blocks", f"scales {readable(config.scale_sizes)}"]
    facts += [f"attention {config.attention_pattern!r}"]
    facts += [f"windows {readable(config.attention_windows)}"] if config.attention_windows else []
    text = f"{'; '.join(facts)}."
    if config.attention_pattern != usual:
        text += f" The authors' model attends by {usual!r}: this one is a start for fine-tuning."
    return _paragraph(text)
