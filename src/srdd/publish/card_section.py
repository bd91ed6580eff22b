"""What a model card says of the code beside it."""

from srdd.pipelines.model_folders import CODE_HEADING, without_code_section
from srdd.publish.carried_code import CarriedCode


SECTION = """{heading}

This repository holds the code that draws with it, so that nothing but diffusers, torch and transformers is needed:

```py
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
```

To edit pictures, add {others}.
"""


def card_with_code(card: str, name: str, code: CarriedCode) -> str:
    """
    A model card that says how to draw without this package; a section on that which is there already is replaced.

    Args:
        card (`str`): The card.
        name (`str`): Repository or folder, as one gives it to `from_pretrained`.
        code ([`CarriedCode`]): The code in the folder.

    Returns:
        `str`: The card, with the section at its end.
    """
    _, *others = [f'`custom_pipeline="{file}_{code.digest}"` ({each})' for file, each in code.pipelines.items()]
    section = SECTION.format(heading=CODE_HEADING, name=name, others=" or ".join(others))
    return f"{without_code_section(card).rstrip()}\n\n{section}"
