"""Several processes train what one process would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from safetensors.torch import load_file
from tiny_texts import tiny_text_pipeline
from training.comparing import assert_same_run
from training.launching import caption_folders, free_port, make_image_folder, start
from training.tiny_runs import SCRIPTS

from srdd import SRDDPipeline, SRDDTextPipeline
from srdd.training.accelerator import use_all_cores
from srdd.training.checkpoints import list_checkpoints


pytestmark = pytest.mark.slow

CONFIGS = SCRIPTS / "accelerate_configs"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    make_image_folder(folder / "images", images_per_class=14)
    return folder


def common(root: Path, output_dir: Path) -> list:
    return [
        "--train_data_dir", root / "images", "--cache_dir", root / "datasets", "--output_dir", output_dir,
        "--max_train_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 9, "--logging_steps", 1,
        "--validation_steps", 3, "--num_validation_images", 2, "--learning_rate", 1e-3, "--lr_warmup_steps", 0,
        "--random_flip", "--train_batch_size", 8,
        # Some biases have no gradient but rounding errors, which Adam would scale up to whole steps.
        "--adam_epsilon", 1e-3,
    ]  # fmt: skip


def tokenizer_arguments(root: Path, output_dir: Path) -> list:
    return [
        *common(root, output_dir), "--report_to", "none", "--resolution", 16, "--scale_sizes", "1,2,4",
        "--block_out_channels", "32,32", "--codebook_size", 16, "--latent_channels", 4, "--perceptual_weight", 0,
        "--discriminator_layers", 1, "--discriminator_learning_rate", 1e-4, "--revive_until", 1,
    ]  # fmt: skip


def transformer_arguments(root: Path, output_dir: Path) -> list:
    return [
        *common(root, output_dir), "--pretrained_vqvae_name_or_path", root / "tokenizer", "--token_cache_dir",
        root / "tokens", "--num_layers", 2, "--num_attention_heads", 2, "--attention_head_dim", 8,
        "--class_dropout_prob", 0,
    ]  # fmt: skip


def decoder_arguments(root: Path, output_dir: Path) -> list:
    return [*common(root, output_dir), "--teacher", root / "tokenizer", "--perceptual_weight", 0]


ARGUMENTS = {
    "train_tokenizer": tokenizer_arguments,
    "train_srdd": transformer_arguments,
    "distill_decoder": decoder_arguments,
}


def train(script: str, root: Path, name: str, *more: str | Path | float, **options) -> Path:
    """Run a script to its end; returns its `output_dir`."""
    output_dir = root / name
    words = [*ARGUMENTS[script](root, output_dir), "--report_to", "none", *more]
    start(script, *words, output=output_dir.with_suffix(".txt"), **options).finish()
    return output_dir


@pytest.fixture(scope="module")
def tokenizer(root):
    return train("train_tokenizer", root, "tokenizer")


def log(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "train_log.jsonl").read_text().splitlines()]


def assert_same_training(left: Path, right: Path, logs: bool = True, atol: float = 1e-5) -> None:
    """The same gradients (AdamW's running means of them) and weights after every step, and the same log."""
    names = [path.name for path in list_checkpoints(left)]
    assert names == [path.name for path in list_checkpoints(right)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for name in names:
        files = sorted(path.name for path in (left / name).iterdir())
        optimizers = [file for file in files if file.startswith("optimizer")]
        models = [file for file in files if file.startswith("model")]
        assert optimizers
        assert len(models) == len(optimizers)
        for file in optimizers:
            states = [torch.load(folder / name / file)["state"] for folder in (left, right)]
            assert states[0].keys() == states[1].keys()
            for index in states[0]:
                gradients = [state[index]["exp_avg"] for state in states]
                assert gradients[0].abs().max() > 0
                torch.testing.assert_close(*gradients, rtol=0, atol=atol)
        for file in models:
            weights = [load_file(folder / name / file) for folder in (left, right)]
            torch.testing.assert_close(*weights, rtol=0, atol=atol)
    if logs:
        assert_same_logs(left, right, atol)


def assert_same_logs(left: Path, right: Path, atol: float) -> None:
    for mine, others in zip(log(left), log(right), strict=True):
        assert mine.keys() == others.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], others[name], rtol=atol, atol=atol)


@pytest.fixture(scope="module")
def by_one(root, tokenizer):
    """A transformer trained by one process."""
    return train("train_srdd", root, "by_one")


def test_two_processes_train_a_transformer_like_one_with_twice_the_batch(root, by_one):
    by_two = train("train_srdd", root, "by_two", "--train_batch_size", 4, num_processes=2)
    assert_same_training(by_two, by_one)


def test_two_processes_train_under_a_mask_what_one_does_in_calls_per_scale(root, by_one):
    options = ["--train_batch_size", 4, "--attention_backend", "mask"]
    assert_same_training(train("train_srdd", root, "masked", *options, num_processes=2), by_one)


@pytest.mark.usefixtures("tokenizer")
def test_two_processes_train_the_same_schedules_as_one(root):
    options = ["--schedules", "1-2-4", "1-4"]
    by_one = train("train_srdd", root, "schedules_by_one", *options)
    by_two = train("train_srdd", root, "schedules_by_two", *options, "--train_batch_size", 4, num_processes=2)
    assert_same_training(by_two, by_one)
    assert ["loss/2x2" in record for record in log(by_one)[:3]] == [False, True, True]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_accumulated_batches_train_a_transformer_like_one_of_their_size(root, by_one, num_processes):
    options = ["--gradient_accumulation_steps", 2, "--train_batch_size", 4 // num_processes]
    accumulated = train("train_srdd", root, f"accumulated_{num_processes}", *options, num_processes=num_processes)
    assert_same_training(accumulated, by_one)


@pytest.mark.parametrize(
    ("name", "options"), [("gan", ["--adversarial_weight", 0.5]), ("ema", ["--codebook_update", "ema"])]
)
def test_two_processes_train_a_tokenizer_like_one_with_twice_the_batch(root, name, options):
    # The codes start on features of the first batch, so these have to come together from both processes.
    by_one = train("train_tokenizer", root, f"{name}_by_one", *options)
    by_two = train("train_tokenizer", root, f"{name}_by_two", *options, "--train_batch_size", 4, num_processes=2)
    assert_same_training(by_two, by_one)


@pytest.mark.usefixtures("tokenizer")
def test_two_processes_distil_a_decoder_like_one_with_twice_the_batch(root):
    by_one = train("distill_decoder", root, "decoder_by_one")
    by_two = train("distill_decoder", root, "decoder_by_two", "--train_batch_size", 4, num_processes=2)
    assert_same_training(by_two, by_one)


def test_accumulated_batches_train_a_tokenizer_like_one_of_their_size(root, tokenizer):
    # A weight relative to the gradient of a batch is another one for every batch, and so are the codes that are new.
    options = [
        "--pretrained_model_name_or_path", tokenizer, "--adversarial_weight", 0.1, "--fixed_adversarial_weight",
        "--revive_steps", 100,
    ]  # fmt: skip
    at_once = train("train_tokenizer", root, "at_once", *options)
    accumulated = train(
        "train_tokenizer", root, "in_parts", *options, "--train_batch_size", 4, "--gradient_accumulation_steps", 2
    )
    assert_same_training(accumulated, at_once, logs=False)


def test_two_processes_make_the_same_token_cache_as_one(root, tokenizer):
    caches = []
    for num_processes in (1, 2):
        folder = root / f"tokens_by_{num_processes}"
        options = ["--token_cache_dir", folder, "--random_crops", 20, "--max_train_steps", 1, "--train_batch_size", 4]
        train("train_srdd", root, f"cache_by_{num_processes}", *options, num_processes=num_processes)
        caches.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert caches[0] == caches[1]
    assert len(caches[0]) == 2


@pytest.fixture(scope="module")
def train_texts(root):
    """A function that trains on captions, with all texts, and a cache of its own."""
    captioned = caption_folders(make_image_folder(root / "captioned"), "blue", "red")
    tiny_text_pipeline().save_pretrained(root / "pipeline")

    def begin(name: str, *more, **options) -> Path:
        words = [*common(root, root / name), "--train_data_dir", captioned, "--report_to", "none"]
        words += ["--pretrained_model_name_or_path", root / "pipeline", "--proportion_empty_prompts", 0, *more]
        start("train_srdd", *words, output=root / f"{name}.txt", **options).finish()
        return root / name

    return begin


@pytest.fixture(scope="module")
def texts_by_one(train_texts):
    return train_texts("texts_by_one")


def test_two_processes_train_on_texts_like_one_with_twice_the_batch(train_texts, texts_by_one):
    by_two = train_texts("texts_by_two", "--train_batch_size", 4, num_processes=2)
    assert_same_training(by_two, texts_by_one)
    caches = [
        {path.name: path.read_bytes() for path in (folder / "tokens").iterdir()} for folder in (by_two, texts_by_one)
    ]
    assert caches[0] == caches[1]
    assert len([name for name in caches[0] if name.startswith("texts-")]) == 3


def launch(*arguments: str | Path, **environment: str) -> subprocess.Popen:
    """Start `accelerate launch` on the CPU."""
    words = [sys.executable, "-m", "accelerate.commands.launch", *(str(argument) for argument in arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)


def wait_for(*launched: subprocess.Popen) -> tuple[list[int], str]:
    """Exit codes of launched runs, and all that they printed."""
    try:
        printed = [process.communicate(timeout=300)[0] for process in launched]
    finally:
        for process in launched:
            process.terminate()
    return [process.returncode for process in launched], "\n".join(printed)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_of_accelerate_are_complete(config, caplog):
    parser = launch_command_parser()
    wanted = load_config_from_file(str(config))
    args, defaults, has_precision = _validate_launch_command(parser.parse_args(["--config_file", str(config), "x.py"]))
    assert defaults == wanted
    assert has_precision
    assert args.num_processes == wanted.num_processes
    assert not caplog.records


OBSERVED_SCRIPT = """
import importlib.util, os, sys
from safetensors.torch import save_file

spec = importlib.util.spec_from_file_location("train_srdd", {script!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
rank, token_loss, losses = int(os.environ["RANK"]), module.token_loss, []


class ObservedRun(module.TrainingRun):
    def copy_averages_to(self, model):
        super().copy_averages_to(model)
        save_file(model.state_dict(), f"{{self.log_path.parent}}/averaged-of-{{rank}}.safetensors")


def broken_token_loss(*arguments):
    losses.append(token_loss(*arguments))
    if rank == 1 and len(losses) == 2:
        losses[-1].loss = losses[-1].loss * float("nan")
    return losses[-1]


module.TrainingRun = ObservedRun
if os.environ.get("BREAK") == "yes":
    module.token_loss = broken_token_loss
module.main(module.parse_args())
"""


@pytest.fixture(scope="module")
def observed_script(root):
    """`train_srdd.py`, but every process also saves the averaged weights that it ends with, or one process breaks."""
    path = root / "observed.py"
    path.write_text(OBSERVED_SCRIPT.format(script=str(SCRIPTS / "train_srdd.py")))
    return path


def test_an_error_in_one_process_ends_the_whole_run(root, tokenizer, observed_script):
    output_dir = root / "broken"
    process = launch(
        "--config_file", CONFIGS / "multi_gpu.yaml", "--num_processes", 2, "--mixed_precision", "no", observed_script,
        *transformer_arguments(root, output_dir), "--report_to", "none", BREAK="yes",
    )  # fmt: skip
    codes, printed = wait_for(process)
    assert codes != [0]
    assert "FloatingPointError: The loss is not finite at step 2: {'loss': nan}" in printed
    assert [path.name for path in list_checkpoints(output_dir)] == ["checkpoint-1"]
    assert not (output_dir / "model_index.json").exists()


def test_two_machines_train_together_and_write_everything_once(root, tokenizer, by_one, observed_script):
    output_dir, port = root / "two_machines", free_port()
    machines = [
        launch(
            "--config_file", CONFIGS / "multi_node.yaml", "--num_processes", 2, "--mixed_precision", "no",
            "--machine_rank", rank, "--main_process_port", port, observed_script,
            *transformer_arguments(root, output_dir), "--train_batch_size", 4,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    codes, printed = wait_for(*machines)
    assert codes == [0, 0], printed
    assert "were not passed to `accelerate launch`" not in printed
    assert printed.count("step 3: validation on training images: loss") == printed.count("Tokenizer: PSNR") == 1
    assert [record["step"] for record in log(output_dir)] == [1, 2, 3, 3]
    assert len(list((output_dir / "logs" / "two_machines").glob("events.out.tfevents.*"))) == 1
    assert_same_training(output_dir, by_one)
    first, second = (load_file(output_dir / f"averaged-of-{rank}.safetensors") for rank in (0, 1))
    finished = SRDDPipeline.from_pretrained(output_dir).transformer.state_dict()
    assert first.keys() == second.keys() == finished.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], finished[name]) for name in first)


def test_one_process_under_accelerate_launch_trains_as_without(root, tokenizer, by_one):
    output_dir = root / "by_cpu_config"
    process = launch(
        "--config_file", CONFIGS / "cpu.yaml", SCRIPTS / "train_srdd.py", *transformer_arguments(root, output_dir),
        "--report_to", "none", ACCELERATE_USE_CPU="",
    )  # fmt: skip
    codes, printed = wait_for(process)
    assert codes == [0], printed
    assert "Warning" not in printed
    assert "were not passed to `accelerate launch`" not in printed
    assert_same_run(output_dir, by_one)


@pytest.mark.parametrize(
    ("options", "by_launch", "wanted"),
    [([], "1", "all"), (["--num_cpu_threads_per_process", "3"], "3", 1), (["--cpu"], None, 1)],
)
def test_a_launch_that_was_not_told_of_the_cpu_trains_on_all_cores(options, by_launch, wanted, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*options, "train_srdd.py"]))
    _, variables = prepare_simple_launcher_cmd_env(args)
    assert by_launch in (None, variables["OMP_NUM_THREADS"])
    for name in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, variables[name])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        use_all_cores(torch.device("cuda"))
        assert torch.get_num_threads() == 1
        use_all_cores(torch.device("cpu"))
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
        cores = min(psutil.cpu_count(logical=False) or 1, len(allowed))
        assert torch.get_num_threads() == (cores if wanted == "all" else wanted)
    finally:
        torch.set_num_threads(before)


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch` with the FSDP config tells the processes, but in float32 as on the CPU."""
    arguments = ["--config_file", str(CONFIGS / "fsdp.yaml"), "--mixed_precision", "no", "train_srdd.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    variables = prepare_multi_gpu_env(args)
    return {name: value for name, value in variables.items() if os.environ.get(name) != value}


def train_sharded(root: Path, name: str, *more: str | Path | float) -> Path:
    return train(
        "train_srdd", root, name, "--train_batch_size", 4, *more, num_processes=2, environment=fsdp_environment()
    )


@pytest.fixture(scope="module")
def sharded(root, tokenizer):
    """A transformer that two processes trained with FSDP2."""
    return train_sharded(root, "sharded")


def assert_same_results(left: Path, right: Path, atol: float = 1e-5, pipeline: type = SRDDPipeline) -> None:
    """The same log and the same finished weights."""
    assert_same_logs(left, right, atol)
    weights = [pipeline.from_pretrained(folder).transformer.state_dict() for folder in (left, right)]
    torch.testing.assert_close(*weights, rtol=0, atol=atol)


def test_sharded_training_gives_the_same_losses_and_weights(sharded, by_one):
    assert_same_results(sharded, by_one)


def test_sharded_training_on_texts_gives_the_same_losses_and_weights(train_texts, texts_by_one):
    options = ["--train_batch_size", 4]
    sharded = train_texts("texts_sharded", *options, num_processes=2, environment=fsdp_environment())
    assert_same_results(sharded, texts_by_one, pipeline=SRDDTextPipeline)


def test_an_adapter_of_a_sharded_model_trains_as_on_one_process(root, by_one):
    options = ["--pretrained_model_name_or_path", by_one / "transformer", "--lora_rank", 2]
    alone = train("train_srdd", root, "adapter", *options)
    sharded = train_sharded(root, "sharded_adapter", *options)
    assert_same_results(sharded, alone)
    adapters = [load_file(folder / "lora" / "pytorch_lora_weights.safetensors") for folder in (sharded, alone)]
    torch.testing.assert_close(*adapters, rtol=0, atol=1e-5)


COMPILED_SCRIPT = """
import importlib.util
from srdd.training.attention_choice import compile_blocks

spec = importlib.util.spec_from_file_location("train_srdd", {script!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
main, parse_args, set_attention = module.main, module.parse_args, module.set_attention


def set_compiled_attention(models, *arguments):
    set_attention(models, *arguments)
    compile_blocks(models, backend="eager", fullgraph=True)


module.set_attention = set_compiled_attention
"""


def test_compiled_blocks_are_sharded(root, by_one):
    (root / "compiled.py").write_text(COMPILED_SCRIPT.format(script=str(SCRIPTS / "train_srdd.py")))
    output_dir = root / "sharded_compiled"
    start(
        str(root / "compiled"), *transformer_arguments(root, output_dir), "--report_to", "none", "--train_batch_size",
        4, "--attention_backend", "mask", "--gradient_checkpointing", output=output_dir.with_suffix(".txt"),
        num_processes=2, environment=fsdp_environment(),
    ).finish()  # fmt: skip
    assert_same_results(output_dir, by_one)


def test_checkpoints_of_sharded_training_hold_whole_weights(sharded):
    finished = SRDDPipeline.from_pretrained(sharded).transformer
    checkpoint = sharded / "checkpoint-3"
    averaged = torch.load(checkpoint / "custom_checkpoint_1.pkl")["shadow_params"]
    parameters = list(finished.parameters())
    assert [type(tensor) for tensor in averaged] == [torch.Tensor] * len(parameters)
    assert all(torch.equal(tensor, parameter) for tensor, parameter in zip(averaged, parameters, strict=True))
    trained = torch.load(checkpoint / "pytorch_model_fsdp.bin")
    wanted = finished.state_dict()
    assert {name: tensor.shape for name, tensor in trained.items()} == {name: wanted[name].shape for name in wanted}


def test_sharded_training_resumes_exactly(root, sharded):
    resumed = root / "sharded_resumed"
    resumed.mkdir()
    (resumed / "checkpoint-2").symlink_to(sharded / "checkpoint-2")
    (resumed / "train_log.jsonl").write_bytes((sharded / "train_log.jsonl").read_bytes())
    train_sharded(root, "sharded_resumed", "--resume_from_checkpoint", "latest")
    assert_same_run(resumed, sharded)
