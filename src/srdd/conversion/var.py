"""VAR (github.com/FoundationVision/VAR): the transformer of [`ScaleTransformer2DModel`], with the pattern "causal"."""

from collections.abc import Mapping

import torch

from srdd.conversion.family import Family, PublishedSettings
from srdd.conversion.official_config import KNOWN_SCALES


def has_causal_table(state: Mapping[str, torch.Tensor]) -> bool:
    """
    Whether the table of what a token must not see lets it see its own and all coarser scales.

    Files have it where their authors saved all that the official code keeps. MVAR's, of the same keys and shapes,
    shows a token its own scale alone.
    """
    scale_ids, table = state.get("lvl_1L"), state.get("attn_bias_for_masking")
    if scale_ids is None or table is None or {scale_ids.device.type, table.device.type} != {"cpu"}:
        return False
    scale_ids = scale_ids.flatten()
    if scale_ids.dtype not in (torch.int64, torch.int32) or table.shape != (1, 1, len(scale_ids), len(scale_ids)):
        return False
    return torch.equal(table[0, 0] == 0, scale_ids.unsqueeze(1) >= scale_ids)


VAR = Family(
    title="VAR",
    model_names=("var_wo_ddp",),
    prefix="blocks.",
    published=(
        *(PublishedSettings(f"var_d{depth}", depth, 2.5, 900, 0.96) for depth in (16, 20, 24, 30)),
        PublishedSettings("var_d36", 36, 2.5, 900, 0.96, KNOWN_SCALES[512]),
    ),
    source="https://github.com/FoundationVision/VAR",
    licence={"license": "mit"},
    licence_note="The authors publish code and weights under the MIT licence.",
    citation="""@article{VAR,
  title   = {Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction},
  author  = {Tian, Keyu and Jiang, Yi and Yuan, Zehuan and Peng, Bingyue and Wang, Liwei},
  journal = {arXiv preprint arXiv:2404.02905},
  year    = {2024}
}""",
    attention_pattern="causal",
    is_sure=has_causal_table,
)
