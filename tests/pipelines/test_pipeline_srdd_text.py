"""Drawing from texts: what they are encoded to, who may give what, and that all else is as with classes."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from stand_ins import TracedGraph
from tiny_models import POOLED_DIM, SAMPLE_SIZE, TEXT_DIM, random_texts, tiny_scheduler, tiny_transformer
from tiny_texts import ENCODED, MAX_LENGTH, WITHOUT_ENCODERS, tiny_text_encoder, tiny_text_pipeline

from srdd import (
    SRDDInpaintPipeline,
    SRDDPipeline,
    SRDDSuperResolutionPipeline,
    SRDDTextInpaintPipeline,
    SRDDTextPipeline,
)
from srdd.acceleration import CudaGraphs
from srdd.pipelines.conditions import text_conditions


NAMES = {
    "encoder_hidden_states": "prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
}


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def draw(pipe, *args, generator=None, **options):
    return pipe(*args, generator=generator or seeds(0, 1), output_type="pt", **options)


def embeddings(texts: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Encoded texts by the names of the pipeline's arguments."""
    return {f"{prefix}{NAMES[name]}": tensor for name, tensor in texts.items()}


@torch.no_grad()
def test_texts_are_the_last_states_of_both_encoders_and_the_pooled_output_of_the_second():
    pipe = tiny_text_pipeline()
    told, pooled, mask = pipe.encode_texts(["red", "a cat", ""])
    assert told.shape == (3, MAX_LENGTH, TEXT_DIM)
    assert mask.sum(dim=1).tolist() == [5, 6, 2]
    for index, text in enumerate(["red", "a cat", ""]):
        length = mask[index].sum()
        ids = torch.tensor([pipe.tokenizer(text).input_ids])
        first, second = pipe.text_encoder(ids), pipe.text_encoder_2(ids)
        states = torch.cat([first.last_hidden_state, second.last_hidden_state], dim=-1)
        torch.testing.assert_close(told[index, :length], states[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(pooled[index], second.pooler_output[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pattern", ["causal", "markov"])
def test_a_batch_is_as_many_single_draws(pattern):
    pipe = tiny_text_pipeline(pattern)
    both = draw(pipe, ["red", "a cat"])
    assert both.images.shape == (2, 3, SAMPLE_SIZE, SAMPLE_SIZE)
    for index, text in enumerate(["red", "a cat"]):
        alone = draw(pipe, text, generator=seeds(index))
        assert torch.equal(alone.token_ids[0], both.token_ids[index])
    assert pipe.guidance_scale == 7.0
    twice = draw(pipe, "red", num_images_per_prompt=2)
    assert torch.equal(twice.token_ids[0], both.token_ids[0])
    assert not torch.equal(twice.token_ids[1], both.token_ids[1])


def test_the_empty_text_is_guided_away_from_by_default():
    pipe = tiny_text_pipeline()
    plain = draw(pipe, ["red", "a cat"])
    assert torch.equal(draw(pipe, ["red", "a cat"], negative_prompt="").token_ids, plain.token_ids)
    other = draw(pipe, ["red", "a cat"], negative_prompt="ugly")
    assert not torch.equal(other.token_ids, plain.token_ids)
    mixed = draw(pipe, ["red", "a cat"], negative_prompt=["", "ugly"])
    assert torch.equal(mixed.token_ids[0], plain.token_ids[0])
    assert torch.equal(mixed.token_ids[1], other.token_ids[1])
    unguided = [draw(pipe, "red", guidance_scale=1.0, negative_prompt=text, generator=seeds(0)) for text in ("", "x")]
    assert torch.equal(unguided[0].token_ids, unguided[1].token_ids)


@torch.no_grad()
def test_embeddings_take_the_place_of_texts():
    pipe = tiny_text_pipeline()
    expected = draw(pipe, ["red", "a cat"], negative_prompt="ugly")
    given = dict(zip(ENCODED, pipe.encode_prompt(["red", "a cat"], "ugly")))
    for each in (pipe, tiny_text_pipeline(**WITHOUT_ENCODERS)):
        assert torch.equal(draw(each, **given).token_ids, expected.token_ids)
    # Halves of other lengths, and without a mask where there is no padding.
    short = {**given, "negative_prompt_embeds": given["negative_prompt_embeds"][:, :6]}
    del short["negative_prompt_attention_mask"]
    assert torch.equal(draw(pipe, **short).token_ids, expected.token_ids)
    # Nothing to guide away from.
    bare = tiny_text_pipeline(**WITHOUT_ENCODERS)
    unguided = draw(bare, **{name: tensor for name, tensor in given.items() if "negative" not in name})
    assert bare.guidance_scale == 1.0
    assert torch.equal(unguided.token_ids, draw(pipe, ["red", "a cat"], guidance_scale=1.0).token_ids)


def test_texts_that_are_too_long_are_cut_with_a_warning(caplog):
    pipe = tiny_text_pipeline()
    with torch.no_grad():
        told, _, mask = pipe.encode_texts(["abcdefghijkl", "abcdefg"])
        whole, _, _ = pipe.encode_texts(["abcdefg"])
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"Texts of more than {MAX_LENGTH} tokens are cut: ['abcdefghijkl']."]
    # The start and six letters; the seventh is a word's last one, and then comes the end.
    torch.testing.assert_close(told[0, :7], whole[0, :7], atol=1e-5, rtol=0)
    assert mask.all()


@pytest.mark.parametrize("components", [{}, WITHOUT_ENCODERS], ids=["whole", "without encoders"])
def test_a_saved_pipeline_draws_the_same(components, tmp_path):
    pipe = tiny_text_pipeline("causal", **components)
    pipe.save_pretrained(tmp_path)
    loaded = SRDDTextPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    given = {"prompt": ["red", "a cat"]} if not components else embeddings(random_texts())
    assert torch.equal(draw(loaded, **given).images, draw(pipe, **given).images)
    other = SRDDTextPipeline.from_pipe(pipe)
    assert torch.equal(draw(other, **given).images, draw(pipe, **given).images)


def test_texts_and_guidance_are_inputs_of_a_graph():
    pipe, plain = tiny_text_pipeline("causal"), tiny_text_pipeline("causal")
    pipe._cuda_graphs = CudaGraphs(TracedGraph, "cpu")
    plain.disable_cuda_graphs()
    calls = [{"prompt": ["red", "a cat"]}] * 2 + [
        {"prompt": ["x", "yy"], "negative_prompt": "z", "guidance_scale": 3.0}
    ]
    for options in calls:
        recorded, expected = draw(pipe, **options), draw(plain, **options)
        assert torch.equal(recorded.token_ids, expected.token_ids)
        assert torch.equal(recorded.images, expected.images)
    assert [recording.graph.num_replays for recording in pipe._cuda_graphs._recordings.values()] == [2]


@pytest.mark.parametrize("pattern", ["causal", "markov"])
def test_adapters_by_the_names_of_diffusers(pattern, tmp_path):
    pipe, other, told = tiny_text_pipeline(pattern), tiny_text_pipeline(pattern), ["red", "a cat"]
    plain = draw(pipe, told).images
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    adapted = draw(pipe, told).images
    assert not torch.equal(adapted, plain)
    pipe.transformer.save_lora_adapter(tmp_path)
    # Pipelines of diffusers name the model that an adapter belongs to.
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    other.transformer.load_lora_adapter({f"transformer.{name}": tensor for name, tensor in weights.items()})
    assert torch.equal(draw(other, told).images, adapted)
    inpaint = SRDDTextInpaintPipeline.from_pipe(other)
    everything = {"image": torch.zeros(1, 3, 8, 8), "mask_image": torch.ones(1, 1, 8, 8), "paste_known": False}
    assert torch.equal(draw(inpaint, told, **everything).images, adapted)
    other.transformer.unload_lora()
    assert torch.equal(draw(other, told).images, plain)


def test_callbacks_and_latents_are_as_with_classes():
    pipe, seen = tiny_text_pipeline(scheduler=tiny_scheduler(temperature=[1.0, 0.5, 0.0])), []

    def watch(pipe, index, timestep, tensors):
        seen.append((index, timestep, pipe.guidance_scale))
        return tensors

    images, token_ids = pipe(
        "red",
        guidance_scale=3.0,
        generator=seeds(0),
        output_type="latent",
        callback_on_step_end=watch,
        return_dict=False,
    )
    assert seen == [(0, 2, 3.0), (1, 1, 3.0), (2, 0, 3.0)]
    assert images.shape == (1, 8, 4, 4)
    assert token_ids.shape == (1, 21)
    assert len(pipe("red", generator=seeds(0)).images) == 1


TEXTS = embeddings(random_texts())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`prompt` must be a text or a list of texts, got None"),
        ({"prompt": []}, r"`prompt` must be a text or a list of texts, got \[\]"),
        ({"prompt": ["a", 3]}, r"`prompt` must be a text or a list of texts, got \['a', 3\]"),
        ({"prompt": "a", "negative_prompt": 3}, "`negative_prompt` must be a text or a list of texts, got 3"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, "`negative_prompt` .* must be one or 2, .*got 3"),
        ({"prompt": "a", **TEXTS}, "`prompt` must be left out with `prompt_embeds`, `pooled_prompt_embeds`"),
        ({"prompt_embeds": TEXTS["prompt_embeds"]}, "`pooled_prompt_embeds` must be a floating-point tensor"),
        ({"pooled_prompt_embeds": TEXTS["pooled_prompt_embeds"]}, "`prompt_embeds` must be a floating-point tensor"),
        ({**TEXTS, "prompt_attention_mask": torch.ones(2, 4) > 0}, r"`prompt_attention_mask` .* \(2, 5\), got"),
        ({**TEXTS, "prompt_attention_mask": torch.zeros(2, 5) > 0}, "must leave at least one token of each text"),
        ({**TEXTS, "pooled_prompt_embeds": torch.zeros(3, POOLED_DIM)}, "must be of as many texts"),
        (
            {**TEXTS, "prompt_embeds": torch.zeros(2, 5, 3), "negative_prompt_embeds": torch.zeros(1, 5, 3),
             "negative_pooled_prompt_embeds": torch.zeros(1, POOLED_DIM)},
            "`prompt_embeds` must have 12 channels, got a tensor of torch.float32 and shape .2, 5, 3.",
        ),
        (
            {"prompt": "a", "negative_prompt_embeds": torch.zeros(1, 5, TEXT_DIM)},
            "`negative_pooled_prompt_embeds` must be a floating-point tensor",
        ),
        ({"prompt": "a", "guidance_scale": "high"}, "`guidance_scale` must be a finite number"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(tiny_text_pipeline(), **arguments)


def test_components_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="`prompt` must be given as embeddings to a pipeline without text_encoder, "):
        draw(tiny_text_pipeline(**WITHOUT_ENCODERS), "red")
    with pytest.raises(ValueError, match="must have 12 channels together and 6 in the second, got 14 and 6"):
        draw(tiny_text_pipeline(text_encoder=tiny_text_encoder(8, seed=0)), "red")
    with pytest.raises(ValueError, match="`transformer` must draw from texts, got a ScaleTransformer2DModel"):
        draw(tiny_text_pipeline(transformer=tiny_transformer()), "red")


@pytest.mark.parametrize("pipeline", [SRDDPipeline, SRDDInpaintPipeline, SRDDSuperResolutionPipeline])
def test_pipelines_that_draw_by_class_do_not_load_a_folder(pipeline, tmp_path):
    tiny_text_pipeline(**WITHOUT_ENCODERS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"draws by class for {pipeline.__name__}, got SRDDTextPipeline, which draws"):
        pipeline.from_pretrained(tmp_path)


def test_conditions_of_texts_have_one_length():
    states, mask, pooled = random_texts([2, 3], num_tokens=3).values()
    away, _, pooled_away = random_texts([5], num_tokens=5).values()
    conditions = text_conditions(states, away, pooled, pooled_away, mask)
    halves = conditions.conditional, conditions.unconditional
    assert [half["encoder_hidden_states"].shape for half in halves] == [(2, 5, TEXT_DIM)] * 2
    assert conditions.conditional["encoder_attention_mask"].sum(dim=1).tolist() == [2, 3]
    assert conditions.unconditional["encoder_attention_mask"].sum(dim=1).tolist() == [5, 5]
    assert text_conditions(states, None, pooled, None).unconditional is None
