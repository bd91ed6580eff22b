"""Text for consoles, of which not all can write every letter."""

import sys
import unicodedata


# What has no decomposition that a console of fewer letters could write.
REPLACEMENTS = {"±": "+-", "–": "-", "—": "-", "…": "...", "×": "x"}


def write_text(text: str) -> None:
    """Write to the standard output; letters that its encoding has not are written as the nearest that it has."""
    sys.stdout.write(encodable(text, sys.stdout.encoding or "utf-8"))


def encodable(text: str, encoding: str) -> str:
    """
    A text that an encoding can write.

    Args:
        text (`str`): Any text.
        encoding (`str`): Name of the encoding, such as `"cp932"`.

    Returns:
        `str`: The text, with letters that the encoding has not without their accents, in other signs, or escaped.
    """
    return "".join(_encodable_letter(letter, encoding) for letter in text)


def _encodable_letter(letter: str, encoding: str) -> str:
    bare = "".join(each for each in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(each))
    for candidate in (letter, REPLACEMENTS.get(letter, bare)):
        try:
            candidate.encode(encoding)
        except UnicodeEncodeError:
            continue
        return candidate
    return letter.encode("ascii", "backslashreplace").decode()
