"""
MVAR (github.com/CVL-UESTC/MVAR): VAR's transformer, keys and shapes, with the pattern "markov" and windows.

From the ninth scale on, sides 13 and 16, a token sees the 7 x 7 tokens around it. The tensors do not show that.
"""

from typing import Any

from srdd.conversion.family import Family, PublishedSettings
from srdd.conversion.official_config import OfficialTransformer, transformer_config


# What the official build function sets.
FIRST_WINDOWED_SCALE = 8
WINDOW = 7


def mvar_config(official: OfficialTransformer) -> dict[str, Any]:
    """[`~srdd.conversion.official_config.transformer_config`] with windows."""
    windows = [WINDOW if scale >= FIRST_WINDOWED_SCALE else 0 for scale in range(len(official.scale_sizes))]
    return {**transformer_config(official), "attention_windows": windows}


MVAR = Family(
    title="MVAR",
    model_names=("mvar_wo_ddp",),
    prefix="blocks.",
    published=(
        PublishedSettings("mvar-d16", 16, 3.7, 1200, 0.99),
        PublishedSettings("mvar-finetune-d16", 16, 3.0, 1200, 0.99),
        PublishedSettings("mvar-finetune-d20", 20, 2.5, 900, 0.96),
        PublishedSettings("mvar-finetune-d24", 24, 2.4, 900, 0.96),
    ),
    source="https://github.com/CVL-UESTC/MVAR",
    licence={"license": "mit"},
    licence_note="The authors publish their code under the MIT licence. The tokenizer is VAR's, under MIT, too.",
    citation="""@article{zhang2025mvar,
  title   = {MVAR: Visual Autoregressive Modeling with Scale and Spatial Markovian Conditioning},
  author  = {Zhang, Jinhua and Long, Wei and Han, Minghao and You, Weiyi and Gu, Shuhang},
  journal = {arXiv preprint arXiv:2505.12742},
  year    = {2025}
}""",
    attention_pattern="markov",
    config=mvar_config,
    about="In its finest scales a token sees the square of tokens around it alone (`attention_windows`).",
)
