"""A run that is killed and resumed ends exactly like one that is not."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from training.comparing import assert_same_run
from training.launching import Run, make_image_folder, start

from srdd.pipelines.model_folders import CARD
from srdd.training.checkpoints import checkpoint_step, list_checkpoints


pytestmark = pytest.mark.slow

NUM_STEPS = 24


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    make_image_folder(folder / "images", images_per_class=14)  # two processes leave a batch over
    return folder


def common(root: Path, output_dir: Path) -> list:
    return [
        "--train_data_dir", root / "images", "--cache_dir", root / "datasets", "--output_dir", output_dir,
        "--train_batch_size", 4, "--max_train_steps", NUM_STEPS, "--checkpointing_steps", 1, "--logging_steps", 1,
        "--validation_steps", 6, "--num_validation_images", 2, "--lr_warmup_steps", 4, "--random_flip",
        "--report_to", "none", "--resume_from_checkpoint", "latest",
    ]  # fmt: skip


def start_tokenizer(root: Path, output_dir: Path, *more: str | Path, **options) -> Run:
    arguments = [
        *common(root, output_dir), "--resolution", 16, "--scale_sizes", "1,2,4", "--block_out_channels", "32,32",
        "--codebook_size", 16, "--latent_channels", 4, "--perceptual_weight", 0, "--revive_steps", 4, *more,
    ]  # fmt: skip
    return start("train_tokenizer", *arguments, output=output_dir.with_suffix(".txt"), **options)


def start_transformer(root: Path, output_dir: Path, *more: str | Path, **options) -> Run:
    arguments = [
        *common(root, output_dir), "--pretrained_vqvae_name_or_path", root / "tokenizer", "--token_cache_dir",
        root / "tokens", "--num_layers", 1, "--num_attention_heads", 2, "--attention_head_dim", 8,
        "--class_dropout_prob", 0.5, "--drop_path_rate", 0.2, *more,
    ]  # fmt: skip
    return start("train_srdd", *arguments, output=output_dir.with_suffix(".txt"), **options)


def start_distillation(root: Path, output_dir: Path, *more: str | Path, **options) -> Run:
    arguments = [
        *common(root, output_dir), "--max_train_steps", 6, "--teacher", root / "transformer", "--token_cache_dir",
        root / "tokens", "--scales", "1,2,4", "--scales", "1,4", "--kl_weight", 1.0, *more,
    ]  # fmt: skip
    return start("distill_srdd", *arguments, output=output_dir.with_suffix(".txt"), **options)


def start_decoder(root: Path, output_dir: Path, *more: str | Path, **options) -> Run:
    arguments = [
        *common(root, output_dir), "--max_train_steps", 12, "--teacher", root / "transformer",
        "--perceptual_weight", 0, *more,
    ]  # fmt: skip
    return start("distill_decoder", *arguments, output=output_dir.with_suffix(".txt"), **options)


@pytest.fixture(scope="module")
def tokenizer(root):
    """An uninterrupted run."""
    start_tokenizer(root, root / "tokenizer").finish()
    return root / "tokenizer"


@pytest.fixture(scope="module")
def transformer(root, tokenizer):
    """An uninterrupted run that keeps all of its checkpoints, and makes the token cache."""
    start_transformer(root, root / "transformer", "--checkpoints_total_limit", NUM_STEPS).finish()
    return root / "transformer"


@pytest.fixture(scope="module")
def distillation(root, transformer):
    """An uninterrupted run of two stages."""
    start_distillation(root, root / "distilled", "--checkpoints_total_limit", NUM_STEPS).finish()
    return root / "distilled"


class Executioner:
    """
    Kills runs at random moments.

    Args:
        folder (`Path`): Where they write checkpoints.
        seed (`int`): Draws the moments.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.rng = random.Random(seed)
        self.moments = []
        self.kills = 0
        self.kills_while_writing = 0

    def steps(self) -> tuple[list[int], list[int]]:
        """Steps of the finished and of the partial checkpoints that are there now."""
        names = os.listdir(self.folder) if self.folder.exists() else []
        finished = [int(name[11:]) for name in names if name.startswith("checkpoint-")]
        return finished, [int(name[8:]) for name in names if name.startswith("partial-")]

    def is_writing(self) -> bool:
        finished, partial = self.steps()
        return max(partial, default=0) > max(finished, default=0)

    def is_deleting(self) -> bool:
        finished, partial = self.steps()
        return min(partial, default=0) < max(finished, default=0) and len(partial) > 0

    def kill(self, run: Run) -> bool:
        """
        Kill a run when it writes a checkpoint or deletes one, a little later, or at any time.

        Returns:
            `bool`: Whether it was still running.
        """
        if not self.moments:
            self.moments = ["writing", "writing", "writing or later", "writing or later", "deleting", "any"]
            self.rng.shuffle(self.moments)
        moment = self.moments.pop()
        if moment == "any":
            time.sleep(self.rng.uniform(0, 2))
        else:
            condition = self.is_deleting if moment == "deleting" else self.is_writing
            for _ in range(self.rng.randint(1, 2)):
                wait_for(lambda: not condition(), run)
                wait_for(condition, run)
            if moment == "writing or later":
                time.sleep(self.rng.uniform(0, 0.15))
        killed = run.kill()
        self.kills += killed
        self.kills_while_writing += killed and self.is_writing()
        return killed


def wait_for(condition: Callable[[], bool], run: Run, timeout: float = 120) -> None:
    """Wait until a condition is true, or the run has ended."""
    deadline = time.monotonic() + timeout
    while not condition() and run.is_running():
        assert time.monotonic() < deadline, run.output.read_text()
        time.sleep(2e-4)


def wait_until_paused(run: Run) -> None:
    wait_for(run.is_paused, run)
    assert run.is_paused(), run.output.read_text()


def assert_kills_change_nothing(
    start_run: Callable[[], Run], output_dir: Path, reference: Path, executioner: Executioner, kills: int
) -> None:
    """Kill a run again and again and resume it; where it was done before, go on with another one."""
    while executioner.kills < kills:
        run = start_run()
        if not executioner.kill(run):
            run.finish()
        elif not (output_dir / CARD).exists():
            continue
        assert_same_run(output_dir, reference)
        shutil.rmtree(output_dir)
    start_run().finish()
    assert_same_run(output_dir, reference)
    assert executioner.kills == kills
    print(f"{kills} kills, {executioner.kills_while_writing} while a checkpoint was written")


def test_a_tokenizer_killed_again_and_again_ends_as_if_it_was_not(root):
    options = [
        "--codebook_update", "ema", "--adversarial_weight", 0.2, "--adversarial_start_step", 4,
        "--discriminator_layers", 1, "--scale_dropout_prob", 0.5, "--max_train_steps", 12,
    ]  # fmt: skip
    start_tokenizer(root, root / "gan", *options, "--checkpoints_total_limit", NUM_STEPS).finish()
    output_dir = root / "gan_killed"
    executioner = Executioner(output_dir, seed=0)
    assert_kills_change_nothing(
        lambda: start_tokenizer(root, output_dir, *options), output_dir, root / "gan", executioner, kills=6
    )
    assert executioner.kills_while_writing >= 1


def test_a_transformer_killed_again_and_again_ends_as_if_it_was_not(root, transformer):
    output_dir = root / "transformer_killed"
    executioner = Executioner(output_dir, seed=1)
    assert_kills_change_nothing(
        lambda: start_transformer(root, output_dir), output_dir, transformer, executioner, kills=12
    )
    assert executioner.kills_while_writing >= 2


@pytest.mark.parametrize("start_run", [start_tokenizer, start_transformer])
def test_two_processes_killed_again_and_again_end_as_if_they_were_not(root, transformer, start_run):
    reference = root / f"{start_run.__name__}_by_two"
    options = ["--max_train_steps", 8, "--gradient_accumulation_steps", 2]
    limit = ["--checkpoints_total_limit", NUM_STEPS]
    start_run(root, reference, *options, *limit, num_processes=2).finish()
    assert {path.name for path in list_checkpoints(reference)[-1].glob("random_states_*")} == {
        "random_states_0.pkl",
        "random_states_1.pkl",
    }
    output_dir = root / f"{start_run.__name__}_by_two_killed"
    executioner = Executioner(output_dir, seed=2)
    assert_kills_change_nothing(
        lambda: start_run(root, output_dir, *options, num_processes=2), output_dir, reference, executioner, kills=6
    )
    assert executioner.kills_while_writing >= 1


def test_a_distillation_killed_in_its_first_stage_and_its_second_ends_as_if_it_was_not(root, distillation):
    output_dir = root / "distilled_killed"
    for folder in (output_dir / "stage-1", output_dir):
        for step in (2, 4):
            run = start_distillation(root, output_dir, pause_at=folder / f"checkpoint-{step}")
            wait_until_paused(run)
            assert (folder / f"partial-{step}").exists()
            assert run.kill()
    start_distillation(root, output_dir).finish()
    assert_same_run(output_dir, distillation)


def test_a_decoder_killed_again_and_again_ends_as_if_it_was_not(root, transformer):
    reference = root / "decoder"
    start_decoder(root, reference, "--checkpoints_total_limit", NUM_STEPS).finish()
    output_dir = root / "decoder_killed"
    executioner = Executioner(output_dir, seed=6)
    assert_kills_change_nothing(lambda: start_decoder(root, output_dir), output_dir, reference, executioner, kills=4)
    assert executioner.kills_while_writing >= 1


def stop_in_the_middle(run: Run, number: int, which: slice = slice(None)) -> list[int]:
    """Send a signal to some processes of a run where it pauses, and let it go on; returns the exit codes."""
    wait_until_paused(run)
    for process in run.processes[which]:
        os.kill(process.pid, number)
    run.go_on()
    for process in run.processes:
        process.join(60)
    return [process.exitcode for process in run.processes]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_and_says_how_to_go_on(root, transformer, number):
    output_dir = root / f"stopped_{number}"
    options = ["--checkpointing_steps", 3]
    for step in (3, 12):
        run = start_transformer(root, output_dir, *options, pause_at=output_dir / f"checkpoint-{step}")
        assert stop_in_the_middle(run, number) == [128 + number], run.output.read_text()
        last = checkpoint_step(list_checkpoints(output_dir)[-1])
        assert (
            f"Stopped by {number.name} after step {last}, with a checkpoint: go on with the same command and"
            " `--resume_from_checkpoint latest`.\n"
        ) in run.output.read_text()
        assert "Traceback" not in run.output.read_text()
    start_transformer(root, output_dir, *options).finish()
    shutil.rmtree(output_dir / f"checkpoint-{last}", ignore_errors=True)
    assert_same_run(output_dir, transformer)


@pytest.mark.parametrize("which", [slice(None), slice(1), slice(1, 2)], ids=["both", "the first", "the second"])
def test_two_processes_stop_after_the_same_step_whichever_got_the_signal(root, transformer, which):
    options = ["--max_train_steps", 12, "--gradient_accumulation_steps", 2]
    reference = root / "reference_of_two"
    if not reference.exists():
        start_transformer(root, reference, *options, "--checkpoints_total_limit", NUM_STEPS, num_processes=2).finish()
    output_dir = root / f"stopped_{which.start}_{which.stop}"
    run = start_transformer(root, output_dir, *options, num_processes=2, pause_at=output_dir / "checkpoint-2")
    assert stop_in_the_middle(run, signal.SIGTERM, which) == [143, 143], run.output.read_text()
    assert run.output.read_text().count("Stopped by SIGTERM after step") == 1
    assert not (output_dir / "README.md").exists()
    start_transformer(root, output_dir, *options, num_processes=2).finish()
    assert_same_run(output_dir, reference)


def test_a_distillation_that_is_asked_to_stop_goes_on_in_its_stage(root, distillation):
    output_dir = root / "distilled_stopped"
    for folder in (output_dir / "stage-1", output_dir):
        run = start_distillation(root, output_dir, pause_at=folder / "checkpoint-2")
        assert stop_in_the_middle(run, signal.SIGTERM) == [143], run.output.read_text()
    start_distillation(root, output_dir).finish()
    assert_same_run(output_dir, distillation)


def test_a_second_signal_ends_a_run_at_once(root, transformer, tmp_path):
    run = start_transformer(root, tmp_path / "output", "--validation_steps", 1, "--num_validation_images", 4096)
    wait_for(lambda: (tmp_path / "output" / "train_log.jsonl").exists(), run)  # it draws for long
    [process] = run.processes
    os.kill(process.pid, signal.SIGTERM)
    process.join(0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    process.join(10)
    assert process.exitcode == -signal.SIGTERM


def test_a_run_that_is_asked_to_stop_while_it_tokenises_ends_cleanly(root, tokenizer, tmp_path):
    tokens = tmp_path / "tokens"
    options = ["--token_cache_dir", tokens, "--random_crops", 200, "--max_train_steps", 1]
    run = start_transformer(root, tmp_path / "output", *options, "--dataloader_num_workers", 1)
    wait_for(lambda: bool(list(tokens.glob("*.partial"))), run)
    os.kill(run.processes[0].pid, signal.SIGTERM)
    run.processes[0].join(30)
    assert run.processes[0].exitcode == 143, run.output.read_text()
    assert "Stopped by SIGTERM. Go on with the same command" in run.output.read_text()
    assert "Traceback" not in run.output.read_text()
    assert list(tokens.iterdir()) == []


def test_a_second_run_in_a_folder_is_refused_and_the_first_is_left_alone(root, transformer):
    output_dir = root / "shared"
    first = start_transformer(root, output_dir, pause_at=output_dir / "checkpoint-2")
    wait_until_paused(first)
    second = start_transformer(root, output_dir, num_processes=2)
    second.output = root / "second.txt"
    codes = [process.exitcode for process in second.processes if process.join(60) is None]
    assert codes == [1, 1]
    first.go_on()
    first.finish()
    text = first.output.read_text()
    assert "ValueError: `output_dir` must be a folder in which no other run trains" in text
    assert_same_run(output_dir, transformer)


def test_a_stage_killed_while_it_is_finished_is_finished_again(root, distillation):
    output_dir = root / "finished_killed"
    stage = output_dir / "stage-1"
    for name in ("transformer/config.json", "model_index.json", "training_curve.png"):
        run = start_distillation(root, output_dir, pause_at=output_dir / "checkpoint-1")  # if it is not killed before
        wait_for((stage / name).exists, run)
        assert run.kill()
        assert not (output_dir / "model_index.json").exists()
    start_distillation(root, output_dir).finish()
    assert_same_run(output_dir, distillation)
    assert (stage / "README.md").exists()


def copy_until(reference: Path, output_dir: Path, step: int) -> Path:
    """The folder of a run that was killed some time after a step; returns that step's checkpoint."""
    output_dir.mkdir()
    name = f"checkpoint-{step}"
    shutil.copytree(reference / name, output_dir / name)
    for path in reference.iterdir():
        if path.name == "train_log.jsonl" or path.suffix == ".png" and path.stem[-6:].isdigit():
            shutil.copyfile(path, output_dir / path.name)
    return output_dir / name


def test_a_half_written_checkpoint_is_never_loaded(root, transformer, tmp_path):
    for damage in ("missing", "cut off"):
        output_dir = tmp_path / damage.replace(" ", "_")
        copy_until(transformer, output_dir, 20)
        partial = output_dir / "partial-22"
        shutil.copytree(transformer / "checkpoint-22", partial)
        for path in sorted(partial.iterdir())[::2]:
            if damage == "missing":
                path.unlink()
            else:
                os.truncate(path, path.stat().st_size // 2)
        start_transformer(root, output_dir).finish()
        assert_same_run(output_dir, transformer)


def test_a_half_written_checkpoint_cannot_be_asked_for(root, transformer, tmp_path):
    output_dir = tmp_path / "output"
    copy_until(transformer, output_dir, 20).rename(output_dir / "partial-20")
    run = start_transformer(root, output_dir, "--resume_from_checkpoint", "partial-20")
    assert run.wait() == [1]
    assert "`resume_from_checkpoint` must be 'latest' or one of [], got 'partial-20'" in run.output.read_text()


def test_a_run_killed_while_it_deletes_a_checkpoint_leaves_no_broken_one(root, transformer, tmp_path):
    output_dir = tmp_path / "output"
    oldest = copy_until(transformer, output_dir, 12)
    whole = sorted(path.name for path in oldest.iterdir())
    for name in whole[:3]:
        run = start_transformer(root, output_dir, "--checkpoints_total_limit", 1, pause_at=name)
        wait_until_paused(run)
        assert run.kill()
        [partial] = output_dir.glob("partial-*")
        assert name in {path.name for path in partial.iterdir()}
        [oldest] = list_checkpoints(output_dir)
        assert sorted(path.name for path in oldest.iterdir()) == whole
    start_transformer(root, output_dir).finish()
    assert_same_run(output_dir, transformer)


def test_a_line_of_the_log_that_was_cut_off_is_repaired(root, transformer, tmp_path):
    output_dir = tmp_path / "output"
    copy_until(transformer, output_dir, 20)
    log = output_dir / "train_log.jsonl"
    lines = [line for line in log.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= 21]
    log.write_text("".join(lines)[:-20])
    start_transformer(root, output_dir).finish()
    assert_same_run(output_dir, transformer)


@pytest.mark.parametrize("largest_file", [20_000, 50_000])
def test_a_full_disk_stops_the_run_and_leaves_the_last_good_checkpoint(root, transformer, tmp_path, largest_file):
    output_dir = tmp_path / "output"
    copy_until(transformer, output_dir, 20)
    run = start_transformer(root, output_dir, largest_file=largest_file)
    assert run.wait() == [1]
    message = f"OSError: Could not write '{output_dir / 'checkpoint-21'}' ("
    assert message in run.output.read_text()
    assert "); the last good one is 'checkpoint-20'. Is the disk full?" in run.output.read_text()
    assert not list(output_dir.glob("partial-*"))
    start_transformer(root, output_dir).finish()
    assert_same_run(output_dir, transformer)


def test_a_disk_that_is_full_from_the_first_checkpoint_on_says_so(root, transformer, tmp_path):
    run = start_transformer(root, tmp_path / "output", largest_file=20_000)
    assert run.wait() == [1]
    assert "); there is no earlier one. Is the disk full?" in run.output.read_text()


def test_a_disk_too_full_for_the_token_cache_says_so_and_leaves_no_part_of_it(root, transformer, tmp_path):
    output_dir, cache = tmp_path / "output", tmp_path / "tokens"
    options = ["--token_cache_dir", cache, "--random_crops", 20, "--max_train_steps", 1]
    run = start_transformer(root, output_dir, *options, largest_file=20_000)
    assert run.wait() == [1]
    assert f"OSError: Could not write the token cache '{cache}/tokens-" in run.output.read_text()
    assert "). Is the disk full?" in run.output.read_text()
    assert list(cache.iterdir()) == []
    start_transformer(root, output_dir, *options).finish()
    assert [path.suffix for path in cache.iterdir()] == [".npy", ".npy"]


def test_a_run_killed_while_it_tokenises_ends_as_if_it_was_not(root, tokenizer, tmp_path):
    def start_run(name: str) -> Run:
        folder = tmp_path / name
        return start_transformer(
            root, folder / "output", "--token_cache_dir", folder / "tokens", "--cache_dir", folder / "datasets",
            "--random_crops", 20, "--max_train_steps", 4, "--checkpointing_steps", 4,
        )  # fmt: skip

    def times(pattern: str) -> list[int]:
        with suppress(FileNotFoundError):
            return [path.stat().st_mtime_ns for path in tokens.glob(pattern)]
        return []

    for name in ("reference", "killed"):
        (tmp_path / name).mkdir()
    start_run("reference").finish()

    tokens, output_dir, rng = tmp_path / "killed" / "tokens", tmp_path / "killed" / "output", random.Random(5)
    for pattern in ("*.partial", "*.partial", "*.npy"):
        before = times(pattern)
        run = start_run("killed")
        wait_for(lambda: times(pattern) != before, run)
        time.sleep(rng.uniform(0, 0.1) if pattern == "*.partial" else 0)
        assert run.kill()
        assert not list_checkpoints(output_dir)
    start_run("killed").finish()
    assert_same_run(output_dir, tmp_path / "reference" / "output")
    killed, reference = (
        sorted(path.read_bytes() for path in tmp_path.glob(f"{name}/tokens/*")) for name in ("killed", "reference")
    )
    assert killed == reference
