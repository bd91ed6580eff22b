"""The end of a training run: the finished folder with its model card, and its upload to the Hub."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin
from huggingface_hub import HfApi

from srdd import MultiScaleVQModel, SRDDPipeline, SRDDTextPipeline
from srdd.data.images import LabelledImages
from srdd.evaluation.latent_diffusion import LatentDiffusionPipeline
from srdd.models.saved_weights import check_finite_weights
from srdd.pipelines.model_folders import CARD
from srdd.publish import CarriedCode, add_code, card_with_code
from srdd.training.model_card import draw_curve, model_card
from srdd.training.output_lock import LOCK_FILE
from srdd.training.settings import PipelineSettings, TrainingSettings
from srdd.training.training_run import LOSS_LOG


# Of the folder of a run, what does not belong to the finished model.
NOT_PUBLISHED = [LOCK_FILE, "checkpoint-*", "partial-*", "stage-*", "*-[0-9][0-9][0-9][0-9][0-9][0-9].png"]
SAVED_CONFIGS = [
    "model_index.json",
    "config.json",
    "vqvae/config.json",
    "vae/config.json",
    "unet/config.json",
    "transformer/config.json",
    "lora/config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
]

TOKENIZER_SNIPPET = """from srdd import MultiScaleVQModel

vqvae = MultiScaleVQModel.from_pretrained("{name}")
token_ids = vqvae.tokenize(pixels)  # (batch, num_tokens), from pixels in [-1, 1]
reconstruction = vqvae.decode_tokens(token_ids).sample"""

AUTOENCODER_SNIPPET = """from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{name}")
latents = vae.encode(pixels).latent_dist.mode()  # from pixels in [-1, 1]; their deviation is 1 / scaling_factor
reconstruction = vae.decode(latents).sample"""

DIT_SNIPPET = """from diffusers import DiTPipeline

pipe = DiTPipeline.from_pretrained("{name}")
image = pipe([{label}], guidance_scale={guidance_scale}).images[0]"""

LDM_SNIPPET = """from srdd.evaluation.latent_diffusion import LatentDiffusionPipeline

pipe = LatentDiffusionPipeline.from_pretrained("{name}")
image = pipe({label}, guidance_scale={guidance_scale}).images[0]"""

PIPELINE_SNIPPET = """from srdd import {pipeline}

pipe = {pipeline}.from_pretrained("{name}")
image = pipe({told}).images[0]"""


def finish_tokenizer(
    settings: TrainingSettings,
    model: MultiScaleVQModel | AutoencoderKL,
    images: LabelledImages,
    trained_part: str | None = None,
    resumed: list[dict] | None = None,
) -> None:
    """
    Save a trained tokenizer or autoencoder with its card in `output_dir`, and upload it if asked to.

    Args:
        settings ([`TrainingSettings`]): What the script was told.
        model ([`MultiScaleVQModel`] or `AutoencoderKL`): The tokenizer or autoencoder.
        images ([`LabelledImages`]): What it was trained on.
        trained_part (`str`, *optional*): What alone was trained, if not all of it; the codebook then keeps its
            fingerprint, by which transformers know it.
        resumed (`list[dict]`, *optional*): What was changed when the run was resumed.

    Raises:
        ValueError: If weights are not finite, before anything is saved.
    """
    is_continuous = isinstance(model, AutoencoderKL)
    name, snippet = ("autoencoder", AUTOENCODER_SNIPPET) if is_continuous else ("tokenizer", TOKENIZER_SNIPPET)
    _cast(model, settings.save_dtype)
    check_finite_weights(model, f"the trained {name} as {settings.save_dtype}")
    if not is_continuous and trained_part is None:
        model.sign_codebook()
    model.save_pretrained(settings.output_dir)
    _publish(settings, images, {name: model}, snippet, "reconstruction", trained_part, resumed)


def finish_latent_diffusion(
    settings: TrainingSettings,
    pipe: LatentDiffusionPipeline,
    images: LabelledImages,
    guidance_scale: float | None,
    resumed: list[dict] | None = None,
) -> None:
    """
    Save a trained pipeline of latent diffusion with its card in `output_dir`, and upload it if asked to.

    Args:
        settings ([`TrainingSettings`]): What the script was told.
        pipe ([`~srdd.evaluation.latent_diffusion.LatentDiffusionPipeline`]): The pipeline.
        images ([`LabelledImages`]): What it was trained on.
        guidance_scale (`float`, *optional*): Of the card's example; the pipeline's own by default.
        resumed (`list[dict]`, *optional*): What was changed when the run was resumed.

    Raises:
        ValueError: If weights are not finite, before anything is saved.
    """
    models = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    for name, model in models.items():
        _cast(model, settings.save_dtype)
        check_finite_weights(model, f"the trained {name} as {settings.save_dtype}")
    pipe.save_pretrained(settings.output_dir)
    guidance_scale = pipe.default_guidance_scale if guidance_scale is None else guidance_scale
    snippet, nothing = (LDM_SNIPPET, None) if pipe.transformer is None else (DIT_SNIPPET, pipe.null_class)
    snippet = snippet.replace("{label}", str(0 if pipe.num_classes else nothing))
    snippet = snippet.replace("{guidance_scale}", str(guidance_scale if pipe.num_classes else 1.0))
    _publish(settings, images, models, snippet, "samples", None, resumed)


def finish_pipeline(
    settings: PipelineSettings,
    pipe: SRDDPipeline | SRDDTextPipeline,
    images: LabelledImages,
    guidance_scale: float | None,
    trained_part: str | None = None,
    resumed: list[dict] | None = None,
    prompts: list[str] | None = None,
    tokenizer_psnr: float | None = None,
) -> None:
    """
    Save a trained pipeline with its card in `output_dir`, and upload it if asked to.

    Args:
        settings ([`PipelineSettings`]): What the script was told.
        pipe ([`SRDDPipeline`] or [`SRDDTextPipeline`]): The pipeline, with all its components.
        images ([`LabelledImages`]): What it was trained on.
        guidance_scale (`float`, *optional*): Of the card's example, where classes or texts are guided to; the
            pipeline's own by default.
        trained_part (`str`, *optional*): What alone was trained, "decoder" if not the transformer.
        resumed (`list[dict]`, *optional*): What was changed when the run was resumed.
        prompts (`list[str]`, *optional*): The texts of the last pictures, one by one.
        tokenizer_psnr (`float`, *optional*): Of training images that come back of their tokens, in dB.

    Raises:
        ValueError: If weights are not finite, before anything is saved.
    """
    models = {"vqvae": pipe.vqvae, "transformer": pipe.transformer}  # text encoders stay as they are
    for name, model in models.items():
        _cast(model, settings.save_dtype)
        check_finite_weights(model, f"the trained {name} as {settings.save_dtype}")
    pipe.save_pretrained(settings.output_dir)
    code = add_code(settings.output_dir) if settings.with_code else None
    told = [repr(prompts[0])] if prompts else [repr(pipe.id2label[0])] if pipe.id2label else []
    if told and not pipe.transformer.config.guidance_distilled:
        told.append(f"guidance_scale={pipe.default_guidance_scale if guidance_scale is None else guidance_scale}")
    snippet = PIPELINE_SNIPPET.replace("{pipeline}", type(pipe).__name__).replace("{told}", ", ".join(told))
    picture = "reconstruction" if trained_part == "decoder" else "samples"
    _publish(settings, images, models, snippet, picture, trained_part, resumed, prompts, tokenizer_psnr, code)


def _cast(model: ModelMixin, dtype: str) -> None:
    """Cast all weights of a model; not by diffusers' own `to`, which warns of every cast."""
    torch.nn.Module.to(model, getattr(torch, dtype))


def _publish(
    settings: TrainingSettings,
    images: LabelledImages,
    models: dict,
    snippet: str,
    picture: str,
    trained_part: str | None,
    resumed: list[dict] | None,
    prompts: list[str] | None = None,
    tokenizer_psnr: float | None = None,
    carried_code: CarriedCode | None = None,
) -> None:
    folder = Path(settings.output_dir)
    for name in SAVED_CONFIGS:
        _forget_local_paths(folder / name)
    last_picture = folder / f"{picture}-{settings.max_train_steps:06d}.png"
    if last_picture.is_file():
        shutil.copyfile(last_picture, folder / f"{picture}.png")
    log = [json.loads(line) for line in (folder / LOSS_LOG).read_text(encoding="utf-8").splitlines()]
    draw_curve(log, folder / "training_curve.png")

    def write_card(repository: str) -> None:
        code = snippet.replace("{name}", repository)
        text = model_card(settings, images, models, code, picture, log, trained_part, resumed, prompts, tokenizer_psnr)
        if carried_code is not None:
            text = card_with_code(text, repository, carried_code)
        # The card comes last and at once: a folder with a card is finished.
        partial = folder / "README.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / CARD)

    repository = settings.hub_model_id or folder.name
    write_card(repository)
    if settings.push_to_hub:
        api = HfApi(token=settings.hub_token)
        repository = api.create_repo(repository, exist_ok=True).repo_id
        if carried_code is not None:
            add_code(folder, repository)
        write_card(repository)  # now with the account in its name, as others need it
        api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=not_published(settings))


def not_published(settings: TrainingSettings) -> list[str]:
    """Patterns of what stays at home: checkpoints, and logs and caches where they lie in the folder of the run."""
    folder = Path(settings.output_dir).resolve()
    places = [folder / settings.logging_dir, settings.cache_dir, getattr(settings, "token_cache_dir", None)]
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
