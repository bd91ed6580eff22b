"""What the folder of a saved pipeline holds beside its components: a card and, it may be, code (`srdd.publish`)."""

import re
import shutil
from pathlib import Path
from typing import Any


CARD = "README.md"

# The package that a folder may carry, by its name in `model_index.json`, and what the card says of it.
CARRIED_CODE = re.compile(r"srdd_[0-9a-f]{8}")
CODE_HEADING = "## Without srdd"


def without_carried_code(index: dict[str, Any], package: str) -> dict[str, Any]:
    """
    A `model_index.json` with classes of an installed package in place of those of the code that the folder carries.

    Args:
        index (`dict`): The file's values.
        package (`str`): Name of the installed package.

    Returns:
        `dict`
    """
    index = dict(index)
    for name, entry in index.items():
        if name == "_class_name" and isinstance(entry, list):
            index[name] = entry[1]
        elif isinstance(entry, list) and entry and CARRIED_CODE.fullmatch(str(entry[0])):
            index[name] = [package, *entry[1:]]
    return index


def without_code_section(card: str) -> str:
    """A card without its section on carried code, if it has one."""
    return re.sub(rf"^{CODE_HEADING}\n.*?(?=^## |\Z)", "", card, flags=re.MULTILINE | re.DOTALL)


def links_into(card: str, folder: Path) -> bool:
    """Whether a card shows or names by a link, of Markdown or HTML, what lies in a folder beside it."""
    return re.search(rf"""[("'](\./)?{re.escape(folder.name)}/""", card) is not None


def copy_card(source: Path, folder: Path) -> None:
    """
    Copy the card of a pipeline's folder, the files beside it that it names and the folders that it links into, to one
    that carries no code. What is there already, as it was saved anew, stays.
    """
    card = without_code_section((source / CARD).read_text(encoding="utf-8"))
    (folder / CARD).write_text(card, encoding="utf-8")
    for path in source.iterdir():
        if path.is_file() and path.name in card and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and links_into(card, path) and not (folder / path.name).exists():
            shutil.copytree(path, folder / path.name)
