"""Flags and defaults of a settings class are those of its fields."""

import argparse
import re
from dataclasses import MISSING, dataclass

import pytest
from training.tiny_runs import SCRIPTS, load_script

from srdd.training.settings import (
    DataSettings,
    TrainingSettings,
    TransformerSettings,
    add_arguments,
    flag,
    float_list,
    from_args,
    int_list,
    make_parser,
    parse_settings,
    positive_int,
)


@dataclass(kw_only=True)
class FruitSettings(TrainingSettings):
    """Fruit."""

    name: str = flag(MISSING, "Of the fruit.")
    sizes: list[int] | None = flag()
    weights: list[float] = flag(None)
    baskets: list[list[int]] | None = flag(type=int_list, action="append")
    count: int = flag(3, type=positive_int)
    price: float | None = flag()
    colour: str = flag("red", choices=["red", "green"])
    ripe: bool = flag(False)
    learning_rate: float = flag(0.5)


def parse(*words: str) -> FruitSettings:
    return parse_settings(make_parser("About fruit.", FruitSettings), FruitSettings, [*words])


def test_defaults_are_those_of_the_fields():
    settings = parse("--name", "pear", "--output_dir", "out")
    expected = FruitSettings(name="pear", output_dir="out", command=settings.command)
    assert settings == expected
    assert (settings.learning_rate, settings.train_batch_size, settings.ripe) == (0.5, 32, False)
    assert settings.command[1:] == ["--name", "pear", "--output_dir", "out"]


def test_warm_up_checkpoints_and_validations_follow_from_the_length():
    settings = parse("--name", "pear", "--output_dir", "out", "--max_train_steps", "400")
    assert (settings.lr_warmup_steps, settings.checkpointing_steps, settings.validation_steps) == (20, 20, 40)
    settings = parse("--name", "pear", "--output_dir", "out", "--max_train_steps", "5")
    assert (settings.lr_warmup_steps, settings.checkpointing_steps, settings.validation_steps) == (0, 1, 1)
    given = ["--lr_warmup_steps", "0", "--checkpointing_steps", "7", "--validation_steps", "9"]
    settings = parse("--name", "pear", "--output_dir", "out", "--max_train_steps", "400", *given)
    assert (settings.lr_warmup_steps, settings.checkpointing_steps, settings.validation_steps) == (0, 7, 9)


def test_flags_are_read_as_their_fields_are_annotated():
    settings = parse(
        "--name", "7", "--output_dir", "out", "--sizes", "1,2", "--weights", "0.5,1", "--baskets", "1,2", "--baskets",
        "3", "--count", "4", "--price", "2", "--colour", "green", "--ripe", "--seed", "5",
    )  # fmt: skip
    assert (settings.name, settings.sizes, settings.weights) == ("7", [1, 2], [0.5, 1.0])
    assert (settings.baskets, settings.count, settings.colour) == ([[1, 2], [3]], 4, "green")
    assert isinstance(settings.price, float)
    assert settings.ripe is True
    assert settings.seed == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --name"),
        (["--name", "pear", "--count", "0"], "argument --count: must be at least 1, got 0"),
        (["--name", "pear", "--sizes", "1,x"], "argument --sizes: invalid int_list value: '1,x'"),
        (["--name", "pear", "--weights", "x"], "argument --weights: invalid float_list value: 'x'"),
        (["--name", "pear", "--price", "much"], "argument --price: invalid float value: 'much'"),
        (["--name", "pear", "--colour", "blue"], "argument --colour: invalid choice: 'blue'"),
        (
            ["--name", "pear", "--lr_scheduler", "piecewise_constant"],
            "--lr_scheduler: invalid choice: 'piecewise_cons",
        ),
        (["--name", "pear", "--lr_scheduler", "cosin"], "--lr_scheduler: invalid choice: 'cosin' (choose from"),
        (["--name", "pear", "--command", "x"], "unrecognized arguments: --command x"),
    ],
)
def test_bad_arguments_are_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        parse(*words, "--output_dir", "out")
    assert message in capsys.readouterr().err


def test_help_has_a_group_for_each_class():
    text = make_parser("About fruit.", FruitSettings).format_help()
    assert text.index("\nFruit:\n") < text.index("\nWhere the images come from:\n") < text.index("\nOptimisation:\n")
    assert text.count("--learning_rate LEARNING_RATE\n") == 1
    assert "Of the fruit." in text


def test_help_has_all_defaults():
    text = " ".join(make_parser("About fruit.", FruitSettings).format_help().split())
    assert "--count COUNT Default: 3. --price PRICE --colour {red,green} Default: red. --ripe" in text
    assert "--train_batch_size TRAIN_BATCH_SIZE Images per process and step. Default: 32. --" in text
    assert "--lr_warmup_steps LR_WARMUP_STEPS Default: a twentieth of `--max_train_steps`. --" in text


@pytest.mark.parametrize("script", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_help_of_scripts_has_defaults(script, capsys):
    with pytest.raises(SystemExit):
        load_script(script).parse_args(["--help"])
    option = "--batch_size BATCH_SIZE [^-]*Default: 49" if script == "ablate_srdd" else "--seed SEED [^-]*Default: 0"
    assert re.search(rf"{option}\. ", " ".join(capsys.readouterr().out.split()))


@pytest.mark.parametrize(("words", "size"), [([], 2048), (["--preset", "32px"], 1024)])
def test_help_has_the_defaults_of_a_preset(words, size, capsys):
    with pytest.raises(SystemExit):
        load_script("train_tokenizer").parse_args([*words, "--help"])
    assert f"--codebook_size CODEBOOK_SIZE Default: {size}." in " ".join(capsys.readouterr().out.split())


def test_a_group_can_be_read_by_itself():
    parser = argparse.ArgumentParser()
    add_arguments(parser, DataSettings)
    parser.add_argument("--split")
    args = parser.parse_args(["--train_data_dir", "pears", "--strict_data", "--split", "train"])
    assert from_args(args, DataSettings) == DataSettings(train_data_dir="pears", strict_data=True)


def test_tokens_are_kept_in_the_folder_of_the_run_by_default():
    assert TransformerSettings(output_dir="out").token_cache_dir == "out/tokens"
    assert TransformerSettings(output_dir="out", token_cache_dir="mine").token_cache_dir == "mine"


def test_a_step_has_the_images_of_all_batches_and_processes():
    settings = TrainingSettings(output_dir="out", train_batch_size=4, gradient_accumulation_steps=3)
    assert settings.images_per_step(num_processes=2) == 24


def test_lists_of_numbers():
    assert int_list("1,2,16") == [1, 2, 16]
    assert float_list("3,2e-1") == [3.0, 0.2]
