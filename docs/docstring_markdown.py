"""A griffe extension: docstrings in the form of diffusers become Markdown whose names of this package are links."""

import re
from collections.abc import Callable

import griffe


SECTION = re.compile(r"(Args|Parameters|Attributes|Returns|Yields|Raises|Examples?):")
ENTRY = re.compile(r"(\*{0,2}\w+)(?= \(|:)")
# Blocks of code and links, which stay as they are, and names: `X`, [`X`], or [`~a.b.X`], which shows its last word.
NAME = re.compile(
    r"^ *(?P<fence>```+).*?^ *(?P=fence)$|\[[^\[\]]*\][(\[][^)\]]*[)\]]"
    r"|(?P<bracket>\[)?`(?P<short>~)?(?P<name>[A-Za-z_][\w.]*)`(?(bracket)\])",
    flags=re.MULTILINE | re.DOTALL,
)


def sections_to_markdown(docstring: str) -> str:
    """`Args:` becomes a bold line, and each argument below it an entry of a list; `Returns:` keeps its paragraphs."""
    lines, section = [], None
    for line in docstring.splitlines():
        if match := SECTION.fullmatch(line):
            section = match[1]
            lines += [f"**{section}**", ""]
            continue
        if line and not line.startswith(" "):
            section = None
        if section is not None:
            line = line.removeprefix("    ")
            if section not in ("Returns", "Yields"):
                line = ENTRY.sub(r"- **`\1`**", line, count=1) if ENTRY.match(line) else line
        lines.append(line)
    return "\n".join(lines)


def link_names(text: str, resolve: Callable[[str], str | None]) -> str:
    """Make links of names in backticks, with or without brackets; those that `resolve` does not know are code."""

    def link(match: re.Match) -> str:
        if match["name"] is None:
            return match[0]
        target = resolve(match["name"])
        shown = f"`{match['name'].rpartition('.')[2] if match['short'] else match['name']}`"
        return shown if target is None else f"[{shown}][{target}]"

    return NAME.sub(link, text)


class DocstringMarkdown(griffe.Extension):
    """Rewrites the docstrings of a package when it is loaded. What its `__all__` exports can be linked."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: object) -> None:
        self.rewrite(pkg, pkg)

    def rewrite(self, obj: griffe.Object, package: griffe.Module) -> None:
        def resolve(name: str) -> str | None:
            # As it stands, or as a sibling of a method.
            for owner, _, member in (name.partition("."), (obj.parent.name if obj.parent else "", ".", name)):
                if owner in package.exports and (not member or member in package[owner].all_members):
                    return f"{package.name}.{owner}.{member}".rstrip(".")
            return None

        if obj.docstring is not None:
            obj.docstring.value = link_names(sections_to_markdown(obj.docstring.value), resolve)
        for member in obj.members.values():
            if not member.is_alias:
                self.rewrite(member, package)
