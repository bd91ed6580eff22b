"""Encoded texts on disk, so that no step of the training runs text encoders, which then need not be in memory."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from tqdm.auto import tqdm

from srdd.checks import shown
from srdd.data.array_cache import cached_array
from srdd.models.saved_weights import check_finite_weights, weights_hash


logger = logging.get_logger(__name__)

# Part of every name.
CACHE_FORMAT = 1

# Of a text encoder's configuration, what changes nothing of what it gives.
NOT_IN_KEY = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


class EncodedTexts(torch.utils.data.Dataset):
    """
    Texts as the transformer is told them: an item has `"encoder_hidden_states"` of shape `(num_tokens, width)`,
    `"encoder_attention_mask"` `(num_tokens,)` and `"pooled_projections"` `(pooled_dim,)`.

    Args:
        rows (`np.ndarray` of shape `(num_rows, width)`): Of a text its pooled output, filled up with zeros, and then
            the states of its tokens without padding.
        first_rows (`np.ndarray` of shape `(num_texts,)`): Where each text begins.
        lengths (`np.ndarray` of shape `(num_texts,)`): How many tokens it has.
        num_tokens (`int`): How many tokens texts are padded to.
        pooled_dim (`int`): Width of the pooled output.
    """

    def __init__(
        self, rows: np.ndarray, first_rows: np.ndarray, lengths: np.ndarray, num_tokens: int, pooled_dim: int
    ):
        self.rows = rows
        self.first_rows = first_rows
        self.lengths = lengths
        self.num_tokens = num_tokens
        self.pooled_dim = pooled_dim

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first, length = self.first_rows[index], self.lengths[index]
        rows = torch.from_numpy(np.array(self.rows[first : first + 1 + length]))
        return {
            "encoder_hidden_states": F.pad(rows[1:], (0, 0, 0, self.num_tokens - length)),
            "encoder_attention_mask": torch.arange(self.num_tokens) < length,
            "pooled_projections": rows[0, : self.pooled_dim],
        }


def cached_texts(
    pipe: DiffusionPipeline,
    texts: Sequence[str],
    cache_dir: str | Path,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
) -> EncodedTexts:
    """
    Encode texts once; later calls map the file. The cache holds another file for other encoders or other tokens. Texts
    that occur many times are encoded once. With several processes each encodes a share; all must call this.

    Kept are the pooled output and the states of a text's tokens without padding, in float16: of `n` tokens
    `2 * (n + 1)` bytes for each channel, 12 to 312 KB a text with Switti's encoders.

    Args:
        pipe (`DiffusionPipeline`): With text encoders and tokenizers, such as a [`SRDDTextPipeline`]. Encoders that
            have been used lie on the CPU afterwards.
        texts (`Sequence[str]`): At least one text. Those that are longer than encoders allow are cut, with a warning.
        cache_dir (`str` or `Path`): Folder of the cache files, shared by all processes.
        batch_size (`int`, defaults to 64): Texts per forward.
        accelerator (`Accelerator`, *optional*): The processes to share the work among, and their device.

    Returns:
        [`EncodedTexts`]: One for each text, in their order.

    Raises:
        ValueError: If encoders have weights, or give states, that are not finite in float16; if the folder cannot be
            written, or the file in it is damaged.
        OSError: If there is no room for the file.
    """
    encoders = {name: getattr(pipe, name) for name in ("text_encoder", "text_encoder_2")}
    for name, encoder in encoders.items():
        check_finite_weights(encoder, name)
    configs = [
        {key: value for key, value in encoder.config.to_dict().items() if key not in NOT_IN_KEY}
        for encoder in encoders.values()
    ]
    about = json.dumps([CACHE_FORMAT, weights_hash(*encoders.values()), configs], sort_keys=True, default=str)
    digest, lengths, cut = hashlib.sha256(about.encode()), [], []
    different = list(dict.fromkeys(texts))
    batches = [different[first : first + batch_size] for first in range(0, len(different), batch_size)]
    for batch in batches:
        tokens, too_long = pipe.tokenize_texts(batch)
        cut += too_long
        for each in tokens:
            digest.update(each.input_ids.numpy().tobytes() + each.attention_mask.numpy().tobytes())
        lengths += tokens[-1].attention_mask.sum(dim=1).tolist()
        num_tokens = tokens[-1].attention_mask.shape[1]
    if cut:
        logger.warning(
            f"{len(cut)} of {len(different)} texts have more tokens than the {num_tokens} that are read, and are cut:"
            f" {shown(cut)}."
        )
    lengths = np.array(lengths)
    first_rows = np.cumsum([0, *(lengths + 1)])
    width = sum(encoder.config.hidden_size for encoder in encoders.values())
    path = Path(cache_dir) / f"texts-{digest.hexdigest()[:16]}.npy"
    make = partial(_encode, pipe, batches, first_rows[::batch_size], width, accelerator)
    rows = cached_array(path, (int(first_rows[-1]), width), np.float16, make, "text cache", accelerator)
    text_ids = dict(zip(different, range(len(different))))
    text_ids = [text_ids[text] for text in texts]
    pooled_dim = encoders["text_encoder_2"].config.hidden_size
    return EncodedTexts(rows, first_rows[text_ids], lengths[text_ids], num_tokens, pooled_dim)


@torch.no_grad()
def _encode(
    pipe: DiffusionPipeline,
    batches: list[list[str]],
    first_rows: np.ndarray,
    width: int,
    accelerator: Accelerator | None,
) -> Iterator[tuple[int, np.ndarray]]:
    """This process's share of the texts: the first row of each batch, and its rows."""
    encoders = [pipe.text_encoder, pipe.text_encoder_2]
    device = encoders[0].device if accelerator is None else accelerator.device
    is_main = accelerator is None or accelerator.is_main_process
    mine = list(zip(first_rows.tolist(), batches))
    if accelerator is not None:
        mine = mine[accelerator.process_index :: accelerator.num_processes]
    for encoder in encoders:
        encoder.to(device)
    for first_row, batch in tqdm(mine, desc="Encoding texts", disable=not is_main):
        tokens, _ = pipe.tokenize_texts(batch)
        states, pooled, mask = pipe.encode_tokens([each.to(device) for each in tokens])
        pooled = F.pad(pooled, (0, width - pooled.shape[1]))
        rows = [torch.cat([pooled[i, None], states[i, mask[i]]]).half() for i in range(len(batch))]
        broken = [text for text, of_text in zip(batch, rows) if not of_text.isfinite().all()]
        if broken:
            raise ValueError(
                "`text_encoder` and `text_encoder_2` must give states that are finite in float16, got NaN or infinity"
                f" for the text {shown(broken[0])}."
            )
        yield first_row, torch.cat(rows).cpu().numpy()
    for encoder in encoders:
        encoder.to("cpu")
