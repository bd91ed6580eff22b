"""The end of a training run: the finished folder with its model card, and its upload to the Hub."""

import json
import shlex
import shutil
from argparse import Namespace
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin
from huggingface_hub import HfApi, ModelCard, ModelCardData

from srdd import MultiScaleVQModel, SRDDPipeline, __version__
from srdd.data.images import LabelledImages
from srdd.training.loop import LOSS_LOG


CARD = "README.md"
# Of the folder of a run, what does not belong to the finished model.
NOT_PUBLISHED = ["checkpoint-*", "partial-*", "stage-*", "*-[0-9][0-9][0-9][0-9][0-9][0-9].png"]
# Of a configuration, what the card's table leaves out.
NOT_IN_TABLE = ("id2label", "scale_sizes", "up_block_types", "down_block_types")
SAVED_CONFIGS = [
    "model_index.json",
    "config.json",
    "vqvae/config.json",
    "transformer/config.json",
    "scheduler/scheduler_config.json",
]

TOKENIZER_SNIPPET = """from srdd import MultiScaleVQModel

vqvae = MultiScaleVQModel.from_pretrained("{name}")
token_ids = vqvae.tokenize(pixels)  # (batch, num_tokens), from pixels in [-1, 1]
reconstruction = vqvae.decode_tokens(token_ids).sample"""

PIPELINE_SNIPPET = """from srdd import SRDDPipeline

pipe = SRDDPipeline.from_pretrained("{name}")
image = pipe({labels}{guidance}).images[0]"""


def finish_tokenizer(
    args: Namespace, model: MultiScaleVQModel, images: LabelledImages, part: str | None = None
) -> None:
    """
    Save a trained tokenizer with its card in `output_dir`, and upload it if asked to. `part` is what alone was
    trained, or `None`.
    """
    _cast(model, args.save_dtype)
    model.save_pretrained(args.output_dir)
    _publish(args, images, {"tokenizer": model}, TOKENIZER_SNIPPET, "reconstruction", part)


def finish_pipeline(args: Namespace, pipe: SRDDPipeline, images: LabelledImages, part: str | None = None) -> None:
    """
    Save a trained pipeline with its card in `output_dir`, and upload it if asked to. `part` is what alone was trained,
    "decoder", or `None`.
    """
    models = {"vqvae": pipe.vqvae, "transformer": pipe.transformer}
    for model in models.values():
        _cast(model, args.save_dtype)
    pipe.save_pretrained(args.output_dir)
    snippet = PIPELINE_SNIPPET.replace("{labels}", repr(pipe.id2label[0]) if pipe.id2label else "")
    distilled = pipe.transformer.config.guidance_distilled
    guidance = "" if distilled or not pipe.id2label else f", guidance_scale={args.validation_guidance_scale}"
    picture = "reconstruction" if part == "decoder" else "samples"
    _publish(args, images, models, snippet.replace("{guidance}", guidance), picture, part)


def _cast(model: ModelMixin, dtype: str) -> None:
    """Cast all weights of a model; not by diffusers' own `to`, which warns of every cast."""
    torch.nn.Module.to(model, getattr(torch, dtype))


def _publish(
    args: Namespace, images: LabelledImages, models: dict, snippet: str, picture: str, part: str | None
) -> None:
    folder = Path(args.output_dir)
    for name in SAVED_CONFIGS:
        _forget_local_paths(folder / name)
    drawn = folder / f"{picture}-{args.max_train_steps:06d}.png"
    if drawn.is_file():
        shutil.copyfile(drawn, folder / f"{picture}.png")
    log = [json.loads(line) for line in (folder / LOSS_LOG).read_text(encoding="utf-8").splitlines()]
    draw_curve(log, folder / "training_curve.png")

    def write_card(repository: str) -> None:
        text = model_card(args, images, models, snippet.replace("{name}", repository), picture, log, part)
        # The card comes last and at once: a folder with a card is finished.
        partial = folder / "README.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / CARD)

    repository = args.hub_model_id or folder.name
    write_card(repository)
    if args.push_to_hub:
        api = HfApi(token=args.hub_token)
        repository = api.create_repo(repository, exist_ok=True).repo_id
        write_card(repository)  # now with the account in its name, as others need it
        api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=not_published(args))


def not_published(args: Namespace) -> list[str]:
    """Patterns of what stays at home: checkpoints, and logs and caches where they lie in the folder of the run."""
    folder = Path(args.output_dir).resolve()
    places = [folder / args.logging_dir, args.cache_dir, getattr(args, "token_cache_dir", None)]
    places = [Path(place).resolve() for place in places if place is not None]
    inside = [place.relative_to(folder).as_posix() for place in places if place.is_relative_to(folder)]
    return [*NOT_PUBLISHED, *(f"{place}/*" for place in inside)]


def _forget_local_paths(path: Path) -> None:
    """Drop from a saved configuration, if there is one, where the trainer's machine had its parts."""
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def draw_curve(log: list[dict], path: Path) -> None:
    """Draw training and validation losses over the steps of a log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    for name, label in (("loss", "training"), ("val_loss", "validation")):
        points = [(record["step"], record[name]) for record in log if name in record]
        if points:
            axes.plot(*zip(*points), label=label, marker="." if name == "val_loss" else None)
    quality = [(record["step"], record["val_psnr"]) for record in log if "val_psnr" in record]
    if quality:
        other = axes.twinx()
        other.set_ylabel("PSNR on validation images, dB")
        other.plot(*zip(*quality), color="tab:red", marker=".", label="PSNR")
        other.legend(loc="center right")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def model_card(
    args: Namespace,
    images: LabelledImages,
    models: dict,
    snippet: str,
    picture: str,
    log: list[dict],
    part: str | None = None,
) -> str:
    """
    A model card in the Hub's format, from what a run knows about itself.

    Args:
        args (`Namespace`): The arguments of the run.
        images ([`LabelledImages`]): Its data.
        models (`dict[str, ModelMixin]`): The finished models by name.
        snippet (`str`): How to use them.
        picture (`str`): Stem of the PNG file with results.
        log (`list[dict]`): The loss log.
        part (`str`, *optional*): What alone was trained.

    Returns:
        `str`: Markdown with a YAML header.
    """
    is_pipeline = "transformer" in models
    data = ModelCardData(
        license=args.license,
        library_name="srdd",
        pipeline_tag="unconditional-image-generation" if is_pipeline else "image-feature-extraction",
        tags=["srdd", "diffusers", "discrete-diffusion", "visual-autoregressive"],
    )
    source = args.dataset_name or args.train_data_dir
    description = args.data_description or images.train.info.description or f"`{Path(source).name}`"
    classes = f", {len(images.id2label)} classes" if images.id2label else ", without labels"
    validation = f", {len(images.validation):,} for validation" if images.validation is not None else ""
    trained = f", of the {part} alone" if part else ""
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {Path(args.output_dir).name}\n",
        f"```py\n{snippet}\n```\n",
        f"![{picture}]({picture}.png)\n",
        "## Model\n",
        _model_table(models),
        "## Training data\n",
        f"{description.strip()}\n\n{len(images.train):,} training images{validation}{classes}. Licence of the weights:"
        f" {args.license or 'not stated'}.\n",
        "## Training\n",
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, srdd {__version__}, seed {args.seed},"
        f" {args.max_train_steps:,} steps of {args.train_batch_size} images per process{trained}. The weights are"
        f" averages over the steps (EMA {args.ema_decay}), stored as {args.save_dtype}.\n",
        f"```sh\n{_command(args)}\n```\n",
        "![Training curve](training_curve.png)\n",
        "## Validation\n",
        "" if images.validation is not None else "There is no validation split: these are training images.\n",
        _validation_tables(log, models),
    ]
    card = "\n".join(parts)
    ModelCard(card, ignore_metadata_errors=False)  # raises where the header is malformed
    return card


def _command(args: Namespace) -> str:
    """The command line without secrets, an option to a line."""
    lines, hidden = ["accelerate launch"], False
    for word in args.command:
        name = word.partition("=")[0]
        secret = name.startswith("--hub_t") and "--hub_token".startswith(name)  # argparse knows abbreviations
        if not secret and not hidden:
            if word.startswith("--"):
                lines.append("   ")
            lines[-1] += f" {shlex.quote(word)}"
        hidden = secret and "=" not in word
    return " \\\n".join(lines)


def _model_table(models: dict) -> str:
    rows = ["| part | parameters | configuration |", "|---|---|---|"]
    for name, model in models.items():
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        facts = {
            key: value
            for key, value in model.config.items()
            if value is not None and not key.startswith("_") and key not in NOT_IN_TABLE
        }
        text = ", ".join(f"{key} {value}" for key, value in facts.items())
        if "scale_sizes" in model.config:
            scales = " ".join(str(h) if h == w else f"{h}x{w}" for h, w in model.config.scale_sizes)
            text = f"scales {scales}; {text}"
        rows.append(f"| `{name}` | {count:.1f} M | {text} |")
    return "\n".join(rows) + "\n"


def _validation_tables(log: list[dict], models: dict) -> str:
    """The last validation in the log: single numbers in a line, lists as a table over the scales."""
    records = [record for record in log if any(name.startswith("val_") for name in record)]
    if not records:
        return "No validation was run.\n"
    last = {name.removeprefix("val_"): value for name, value in records[-1].items() if name.startswith("val_")}
    sizes = last.pop("scales", None) or next(iter(models.values())).config.scale_sizes
    lists = {name: value for name, value in last.items() if isinstance(value, list)}
    numbers = [f"{name} {value:.4g}" for name, value in last.items() if name not in lists]
    text = f"At step {records[-1]['step']:,}, averaged weights: {', '.join(numbers)}.\n"
    if lists:
        header = " | ".join(f"{height}x{width}" for height, width in sizes)
        rows = [f"| scale | {header} |", "|---" * (len(sizes) + 1) + "|"]
        for name, values in lists.items():
            rows.append(f"| {name} | " + " | ".join(f"{value:.3g}" for value in values) + " |")
        text += "\n" + "\n".join(rows) + "\n"
    return text
