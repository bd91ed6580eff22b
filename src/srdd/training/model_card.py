"""The model card of a finished run, and the curve in it."""

import shlex
from pathlib import Path

import diffusers
import torch
from huggingface_hub import ModelCard, ModelCardData

from srdd import __version__
from srdd.data.class_labels import printable
from srdd.data.images import LabelledImages
from srdd.evaluation.tables import markdown_table, readable
from srdd.pipelines.model_folders import CARD
from srdd.training.run_identity import describe_changes
from srdd.training.settings import TrainingSettings


# Of a configuration, what the card's table leaves out.
NOT_IN_TABLE = ("id2label", "scale_sizes", "up_block_types", "down_block_types")


def draw_curve(log: list[dict], path: Path) -> None:
    """
    Draw training and validation losses over the steps of a log. With several schedules the training losses are points,
    as steps learn different ones, and every schedule has a line of validation losses.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    schedules = sorted({name for record in log for name in record if name.startswith("val_loss/")})
    lines = {"loss": {"label": "training"}}
    if schedules:
        lines["loss"] |= {"linestyle": "", "marker": ".", "color": "lightgrey"}
    for name in schedules or ["val_loss"]:
        lines[name] = {"label": name.removeprefix("val_loss/") if schedules else "validation", "marker": "."}
    for name, style in lines.items():
        points = [(record["step"], record[name]) for record in log if name in record]
        if points:
            axes.plot(*zip(*points), **style)
    quality = [(record["step"], record["val_psnr"]) for record in log if "val_psnr" in record]
    if quality:
        other = axes.twinx()
        other.set_ylabel("PSNR on validation images, dB")
        other.plot(*zip(*quality), color="tab:red", marker=".", label="PSNR")
    figure.legend(loc="outside upper center", ncols=3)  # inside it hides points
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def model_card(
    settings: TrainingSettings,
    images: LabelledImages,
    models: dict,
    snippet: str,
    picture: str,
    log: list[dict],
    trained_part: str | None = None,
    resumed: list[dict] | None = None,
    prompts: list[str] | None = None,
    tokenizer_psnr: float | None = None,
) -> str:
    """
    A model card in the Hub's format, from what a run knows about itself.

    Args:
        settings ([`TrainingSettings`]): What the script was told.
        images ([`LabelledImages`]): Its data.
        models (`dict[str, ModelMixin]`): The finished models by name.
        snippet (`str`): How to use them.
        picture (`str`): Stem of the PNG file with results.
        log (`list[dict]`): The loss log.
        trained_part (`str`, *optional*): What alone was trained.
        resumed (`list[dict]`, *optional*): What was changed when the run was resumed.
        prompts (`list[str]`, *optional*): The texts that the pictures were drawn from, one by one.
        tokenizer_psnr (`float`, *optional*): Of training images that come back of their tokens, in dB.

    Returns:
        `str`: Markdown with a YAML header.
    """
    task = "image-feature-extraction"
    is_srdd = any("scale_sizes" in model.config for model in models.values())
    if "transformer" in models or "unet" in models:
        task = "text-to-image" if prompts else "unconditional-image-generation"
    base_model, licence = _base(settings)
    inherited = ", that of the base model" if licence and not settings.license else ""
    if settings.license:
        licence = {"license": settings.license}
    data = ModelCardData(
        base_model=base_model,
        **licence,
        library_name="srdd" if is_srdd or "unet" in models else "diffusers",
        pipeline_tag=task,
        tags=["srdd", "diffusers", *(["discrete-diffusion", "visual-autoregressive"] if is_srdd else [])],
    )
    source = settings.dataset_name or settings.train_data_dir
    description = settings.data_description or images.train.info.description or f"`{Path(source).name}`"
    classes = f", {len(images.id2label)} classes" if images.id2label else ", without labels"
    if images.caption_column is not None:
        classes = f", with captions (`{images.caption_column}`)"
    validation = f", {len(images.validation):,} for validation" if images.validation is not None else ""
    trained = f", of the {trained_part} alone" if trained_part else ""
    sections = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {Path(settings.output_dir).name}\n",
        f"```py\n{snippet}\n```\n",
        *_about_schedules(settings),
        f"![{picture}]({picture}.png)\n",
        *([f"Drawn from these texts, row by row:\n\n{_text_list(prompts)}"] if prompts else []),
        "## Model\n",
        _model_table(models),
        "## Training data\n",
        f"{description.strip()}\n\n{len(images.train):,} training images{validation}{classes}. Licence of the weights:"
        f" {licence.get('license', 'not stated')}{inherited}.\n",
        *(
            []
            if tokenizer_psnr is None
            else [f"Training images come back of their tokens at {tokenizer_psnr:.1f} dB PSNR.\n"]
        ),
        "## Training\n",
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, srdd {__version__}, seed {settings.seed},"
        f" {settings.max_train_steps:,} steps of {settings.train_batch_size} images per process{trained}. The weights"
        f" are averages over the steps (EMA {settings.ema_decay}), stored as {settings.save_dtype}.\n",
        *(f"{describe_changes(changes)}\n" for changes in resumed or []),
        f"```sh\n{_command(settings.command)}\n```\n",
        "![Training curve](training_curve.png)\n",
        "## Validation\n",
        "" if images.validation is not None else "There is no validation split: these are training images.\n",
        _validation_tables(log, models),
    ]
    card = "\n".join(sections)
    ModelCard(card, ignore_metadata_errors=False)  # raises where the header is malformed
    return card


def _base(settings: TrainingSettings) -> tuple[str | None, dict[str, str]]:
    """
    The Hub id of the model that a run started from, and its licence, as far as its card tells; a local folder stands
    for the model that it started from itself.
    """
    name = getattr(settings, "teacher", None) or getattr(settings, "pretrained_model_name_or_path", None)
    if name is None:
        return None, {}
    is_local, data = Path(name).exists(), {}
    cards = [folder / CARD for folder in (Path(name), Path(name).parent)] if is_local else [name]
    for card in cards:
        try:
            data = ModelCard.load(card).data.to_dict()
        except Exception:  # of files or networks, of many kinds; no card is worth a finished run
            continue
        break
    licence = {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}
    return data.get("base_model") if is_local else name, licence


def _about_schedules(settings: TrainingSettings) -> list[str]:
    """Which scales a student draws over; which schedules a model learned, and how to draw over another of them."""
    if stages := getattr(settings, "scales", None):
        return [f"It was distilled to draw over the scales {' '.join(map(str, stages[-1]))}.\n"]
    schedules = getattr(settings, "schedules", None) or []
    if len(schedules) < 2:
        return []
    names = ["-".join(map(str, sides)) for sides in schedules]
    return [
        f"It was trained on the schedules {', '.join(names[:-1])} and {names[-1]}, and draws over the first of these."
        " For another of them:\n",
        "```py\nfrom srdd import ScaleScheduler\n\n"
        f"pipe.scheduler = ScaleScheduler.from_config(pipe.scheduler.config, scales={schedules[1]})\n```\n",
    ]


def _text_list(texts: list[str]) -> str:
    """Texts that stand one after the other as a list, each once."""
    return "".join(f"1. {printable(text)}\n" for text in dict.fromkeys(texts))


def _command(command: list[str]) -> str:
    """The command line without secrets and the folders of this machine, an option to a line."""
    lines, hidden = ["accelerate launch"], False
    for word in command:
        name = word.partition("=")[0]
        secret = name.startswith("--hub_t") and "--hub_token".startswith(name)  # argparse knows abbreviations
        if not secret and not hidden:
            if word.startswith("--"):
                lines.append("   ")
            lines[-1] += f" {shlex.quote(_without_folders(word))}"
        hidden = secret and "=" not in word
    return " \\\n".join(lines)


def _without_folders(word: str) -> str:
    """A word of a command line, or the value in it, where it is an absolute path only with its last part."""
    option, sign, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return option + sign + (Path(value).name if Path(value).is_absolute() else value)


def _model_table(models: dict) -> str:
    rows = []
    for name, model in models.items():
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        facts = {
            key: value
            for key, value in model.config.items()
            if value is not None and not key.startswith("_") and key not in NOT_IN_TABLE
        }
        text = ", ".join(f"{key} {value}" for key, value in facts.items())
        if "scale_sizes" in model.config:
            text = f"scales {readable(model.config.scale_sizes)}; {text}"
        rows.append([f"`{name}`", f"{count:.1f} M", text])
    return markdown_table(["part", "parameters", "configuration"], rows)


def _validation_tables(log: list[dict], models: dict) -> str:
    """The last validation in the log: single numbers in a line, lists as a table over the scales."""
    records = [record for record in log if any(name.startswith("val_") for name in record)]
    if not records:
        return "No validation was run.\n"
    last = {name.removeprefix("val_"): value for name, value in records[-1].items() if name.startswith("val_")}
    sizes = last.pop("scales", None) or next(iter(models.values())).config.get("scale_sizes")
    lists = {name: value for name, value in last.items() if isinstance(value, list)}
    numbers = [f"{name} {value:.4g}" for name, value in last.items() if name not in lists]
    text = f"At step {records[-1]['step']:,}, averaged weights: {', '.join(numbers)}.\n"
    if lists:
        header = ["scale", *(f"{height}x{width}" for height, width in sizes)]
        rows = [[name, *(f"{value:.3g}" for value in values)] for name, values in lists.items()]
        text += "\n" + markdown_table(header, rows)
    return text
