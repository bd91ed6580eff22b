"""An ordinary script of a user, for type checkers: `test_types.py` has it checked, nothing runs it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from typing_extensions import assert_type

from srdd import (
    MultiScaleVQModel,
    ScaleScheduler,
    ScaleTransformer2DModel,
    SRDDInpaintPipeline,
    SRDDPipeline,
    SRDDPipelineOutput,
    SRDDSuperResolutionPipeline,
    SRDDTextInpaintPipeline,
    SRDDTextPipeline,
)
from srdd.training.settings import TransformerSettings, make_parser, parse_settings
from srdd.training.token_loss import token_loss


pipe = SRDDPipeline.from_pretrained("model_cards/srdd-fruits64", dtype=torch.float32).to("cpu")
assert_type(pipe, SRDDPipeline)
seed = torch.Generator().manual_seed
result = pipe("Apple 11", generator=seed(0))
assert_type(result, SRDDPipelineOutput[list[Image.Image]])
image = result.images[0]
image.save("apple.png")
assert_type(pipe(1, output_type="pt").images, torch.Tensor)
assert_type(pipe(1, output_type="np").images, np.ndarray)
assert_type(pipe(1, return_dict=False)[1], torch.LongTensor)
labels = list(pipe.id2label.values())
images = pipe(labels, generator=[seed(index) for index in range(len(labels))]).images
images[-1].save("last.png")


def show(pipe: SRDDPipeline, step: int, timestep: int, told: dict) -> dict:
    pipe.decode_latents(told["latents"], "pil")[0].save(f"{step}.png")
    return {}


pipe(1, callback_on_step_end=show)

original = pipe.scheduler.config
pipe.scheduler = ScaleScheduler.from_config(original, top_k=600)
pipe.scheduler = ScaleScheduler.from_pretrained("model_cards/srdd-fruits64", subfolder="scheduler")
assert_type(ScaleScheduler.from_config(original, scales=[1, 2, 8]).num_tokens, int)

inpaint = SRDDInpaintPipeline.from_pipe(pipe)
assert_type(inpaint, SRDDInpaintPipeline)
mask = Image.new("L", image.size)
assert_type(inpaint(image, mask, "Apple 11", padding_mask_crop=8).images, list[Image.Image])
assert_type(inpaint.outpaint(image, padding=(0, 0, 12, 12), output_type="np").images, np.ndarray)
photographs = [Image.open(path) for path in Path("photographs").glob("*.png")]
inpaint(photographs, mask).images[0].show()

enlarge = SRDDSuperResolutionPipeline.from_pipe(inpaint)
assert_type(enlarge(image, scale_factor=4).images, list[Image.Image])

texts = SRDDTextPipeline.from_pretrained("switti-512")
assert_type(texts("a cat", negative_prompt="a dog").images, list[Image.Image])
assert_type(SRDDTextInpaintPipeline.from_pipe(texts)(image, mask, prompt="a cat").images, list[Image.Image])

vqvae = MultiScaleVQModel.from_pretrained("model_cards/srdd-fruits64", subfolder="vqvae")
assert_type(vqvae.decode(vqvae.encode(torch.zeros(1, 3, 64, 64)).latents).sample, torch.Tensor)
token_ids = vqvae.tokenize(torch.zeros(1, 3, 64, 64))
assert_type(vqvae.decode_tokens(token_ids).sample, torch.Tensor)
transformer = ScaleTransformer2DModel(scale_sizes=vqvae.config.scale_sizes, num_classes=len(labels))
logits = transformer(vqvae.teacher_forcing_inputs(token_ids), timestep=[0]).sample
token_loss(logits, token_ids, vqvae.config.scale_sizes).loss.backward()
SRDDPipeline(vqvae, transformer, pipe.scheduler).save_pretrained("my-model")
pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=True)
pipe.push_to_hub("me/my-model")

settings = parse_settings(make_parser("Train.", TransformerSettings), TransformerSettings)
assert_type(settings.max_train_steps, int)
