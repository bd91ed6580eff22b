"""A MkDocs hook: the site has the folders of the repository, with all that its pages link to, and a reference."""

import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from docstring_markdown import link_names
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:\s]+)[^):\s]*\)")
PICTURES = (".png", ".jpg", ".svg")

PACKAGE = griffe.load("srdd", search_paths=[ROOT / "src"])
REFERENCE = {name: f"reference/{name}.md" for name in PACKAGE.exports}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav.append({"Reference": [{name: page} for name, page in REFERENCE.items()]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages of the navigation, and whatever they link to, below the same paths as in the repository."""
    site = Files([file for file in files if file.src_dir != config.docs_dir])  # the theme's
    for name, page in REFERENCE.items():
        site.append(File.generated(config, page, content=f"::: srdd.{name}\n"))
    to_add = [ROOT / page for page in pages_of(config.nav) if page not in REFERENCE.values()]
    while to_add:
        path = to_add.pop()
        name = path.relative_to(ROOT).as_posix()
        if site.get_file_from_path(name) is None:
            site.append(site_file(path, name, config))
            to_add += linked_from(path)
    return site


def pages_of(nav: list | dict | str) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(item)


def linked_from(path: Path) -> list[Path]:
    """The files and folders that a page links to, and those in a folder."""
    if path.is_dir():
        return listed(path)
    if path.suffix != ".md":
        return []
    targets = LINK.findall(CODE.sub("", path.read_text(encoding="utf-8")))
    linked = [(path.parent / target).resolve() for target in targets]
    return [target for target in linked if target.exists()]  # MkDocs names those that do not


def listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__")))


def site_file(path: Path, name: str, config: MkDocsConfig) -> File:
    """Pages and pictures as they are; of a folder a list, of other files a page with their text."""
    if path.suffix in (".md", *PICTURES):
        return File(name, str(ROOT), config.site_dir, config.use_directory_urls)
    if path.is_dir():
        content = "\n".join(f"- [{each.name}]({path.name}/{each.name})" for each in listed(path))
    else:
        content = f"`````{path.suffix.removeprefix('.')}\n{path.read_text(encoding='utf-8')}\n`````"
    return TextPage(name, config, f"# {name}\n\n{content}\n")


class TextPage(File):
    """A page made of what is no Markdown file; links to the file lead to it."""

    def __init__(self, name: str, config: MkDocsConfig, content: str):
        super().__init__(name, None, config.site_dir, config.use_directory_urls, dest_uri=f"{name}/index.html")
        self.content_string = content

    def is_documentation_page(self) -> bool:
        return True


def on_page_markdown(markdown: str, page: Page, **kwargs: object) -> str:
    """In pages, too, public names lead to the reference."""
    if not page.file.src_uri.startswith("docs/"):
        return markdown
    return link_names(markdown, lambda name: f"srdd.{name}" if name in REFERENCE else None)
