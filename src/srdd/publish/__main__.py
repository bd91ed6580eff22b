import argparse
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

from srdd.console import write_text
from srdd.pipelines.model_folders import CARD, links_into
from srdd.pipelines.scale_pipeline import ScalePipeline
from srdd.publish.card_section import card_with_code
from srdd.publish.carried_code import CarriedCode, add_code
from srdd.whole_folders import is_free, whole_folder


def copy_pipeline(source: Path, folder: Path) -> None:
    """
    Copy a saved pipeline: its components' folders, an adapter, folders that the card links into, and the files beside
    them that are not hidden.
    """
    folder.mkdir()
    card = (source / CARD).read_text(encoding="utf-8") if (source / CARD).is_file() else ""
    parts = {"lora", *(name for name, entry in ScalePipeline.load_config(source).items() if isinstance(entry, list))}
    for path in source.iterdir():
        if path.is_dir() and (path.name in parts or links_into(card, path)):
            shutil.copytree(path, folder / path.name)
        elif path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, folder / path.name)


def publish(model: str, folder: Path, repository: str | None = None) -> CarriedCode:
    """
    Write a pipeline's folder with the code that draws, whole or not at all.

    Args:
        model (`str`): Folder or repository of the pipeline.
        folder (`Path`): What to write.
        repository (`str`, *optional*): Where it will be on the Hub, as in [`add_code`].

    Returns:
        [`CarriedCode`]

    Raises:
        ValueError: If `model` is no pipeline of this package, or `folder` is not free.
        OSError: If `model` is not there, or `folder` cannot be written.
    """
    if not is_free(folder):
        raise ValueError(f"`folder` must be a new or an empty folder, got {folder}.")
    source = Path(model) if Path(model).is_dir() else Path(snapshot_download(model))
    with whole_folder(folder) as unfinished:
        copy_pipeline(source, unfinished)
        code = add_code(unfinished, repository)
        card = unfinished / CARD
        if card.is_file():
            card.write_text(
                card_with_code(card.read_text(encoding="utf-8"), repository or folder.name, code), encoding="utf-8"
            )
    return code


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m srdd.publish",
        description="Write a pipeline's folder with the code that draws: where srdd is not installed, it draws through"
        " DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True). srdd loads it as any other.",
    )
    parser.add_argument("model", metavar="MODEL", help="Folder or Hub id of a pipeline of srdd.")
    parser.add_argument("output", metavar="OUT", help="Folder to write, which must not exist yet, or be empty.")
    parser.add_argument(
        "--hub_model_id",
        help="Repository that the folder will be uploaded to; from the Hub, diffusers' ModularPipeline needs it.",
    )
    args = parser.parse_args(arguments)
    try:
        code = publish(args.model, Path(args.output).resolve(), args.hub_model_id)
    except (OSError, ValueError) as error:
        parser.error(str(error).replace("`folder`", "`OUT`"))
    names = ", ".join(f"{file}_{code.digest}.py ({pipeline})" for file, pipeline in code.pipelines.items())
    write_text(f"{args.output}: draws without srdd, with {names}.\n")


if __name__ == "__main__":
    main()
