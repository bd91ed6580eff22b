"""Which checkpoint a run starts from, and that what carries a checkpoint's name is whole."""

import errno
import fcntl
import hashlib
import os
import stat
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from srdd.training.checkpoints import (
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    remove_partial_checkpoints,
    resume,
    save_checkpoint,
)


def make_checkpoints(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"weights")
    return folder


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run():
    """An accelerator with a model, as a training run has it."""
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    return accelerator, model


def test_checkpoints_are_listed_by_step_and_other_names_ignored(tmp_path):
    names = ["checkpoint-10", "checkpoint-9", "checkpoint-100", "checkpoint-abc", "checkpoint-", "checkpoint-5-old"]
    make_checkpoints(tmp_path, *names, "partial-7", "old-checkpoint-3", "checkpoint-7/checkpoint-8")
    (tmp_path / "checkpoint-11").write_text("a file")
    found = list_checkpoints(tmp_path)
    assert [path.name for path in found] == ["checkpoint-7", "checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert [checkpoint_step(path) for path in found] == [7, 9, 10, 100]
    assert list_checkpoints(tmp_path / "nothing") == []


def test_latest_is_the_one_with_most_steps_or_a_new_start(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    assert find_checkpoint(tmp_path / "nothing", "latest") is None
    make_checkpoints(tmp_path, "checkpoint-9", "checkpoint-10", "checkpoint-abc", "partial-11")
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-10"


@pytest.mark.parametrize("given", [None, ""])
def test_a_new_start_needs_a_folder_without_checkpoints(tmp_path, given):
    make_checkpoints(tmp_path, "checkpoint-abc", "partial-4")
    assert find_checkpoint(tmp_path, given) is None
    make_checkpoints(tmp_path, "checkpoint-4")
    with pytest.raises(ValueError, match=r"no later checkpoints than .* \(0\), got \['checkpoint-4'\]"):
        find_checkpoint(tmp_path, given)


def test_a_checkpoint_is_found_by_name_or_path(tmp_path):
    run = make_checkpoints(tmp_path / "run", "checkpoint-2")
    other = make_checkpoints(tmp_path / "other", "checkpoint-7")
    assert find_checkpoint(run, "checkpoint-2") == run / "checkpoint-2"
    assert find_checkpoint(run, str(run / "checkpoint-2")) == run / "checkpoint-2"
    assert find_checkpoint(run, f"{run}/checkpoint-2/") == run / "checkpoint-2"
    assert find_checkpoint(run, str(other / "checkpoint-7")) == other / "checkpoint-7"
    assert find_checkpoint(tmp_path / "new", str(other / "checkpoint-7")) == other / "checkpoint-7"


def test_later_checkpoints_than_the_one_named_are_refused(tmp_path):
    make_checkpoints(tmp_path, "checkpoint-2", "checkpoint-4", "checkpoint-6")
    with pytest.raises(ValueError, match=r"`output_dir` must .* \(2\), got \['checkpoint-4', 'checkpoint-6'\]"):
        find_checkpoint(tmp_path, "checkpoint-2")
    assert find_checkpoint(tmp_path, "checkpoint-6") == tmp_path / "checkpoint-6"


@pytest.mark.parametrize("name", ["checkpoint-3", "nope", "checkpoint-abc", "partial-5", "..", "last"])
def test_unknown_checkpoints_are_refused_with_those_there_are(tmp_path, name):
    folder = make_checkpoints(tmp_path / "run", "checkpoint-2", "checkpoint-abc", "partial-5")
    with pytest.raises(ValueError, match=r"must be 'latest' or one of \['checkpoint-2'\], got '"):
        find_checkpoint(folder, name)


def test_a_saved_state_is_resumed(tmp_path, run):
    accelerator, model = run
    saved = model.weight.detach().clone()
    save_checkpoint(accelerator, tmp_path, 5, total_limit=None)
    assert names_of(tmp_path) == ["checkpoint-5"]
    with torch.no_grad():
        model.weight.zero_()
    assert resume(accelerator, tmp_path, "latest") == 5
    assert torch.equal(model.weight, saved)
    assert resume(accelerator, tmp_path / "other", None) == 0


@pytest.mark.parametrize(("limit", "kept"), [(1, [12]), (2, [9, 12]), (10, [3, 6, 9, 12]), (None, [3, 6, 9, 12])])
def test_only_the_newest_are_kept(tmp_path, run, limit, kept):
    make_checkpoints(tmp_path, "checkpoint-abc")
    for step in (3, 6, 9, 12):
        save_checkpoint(run[0], tmp_path, step, total_limit=limit)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == kept
    assert names_of(tmp_path) == sorted([*(f"checkpoint-{step}" for step in kept), "checkpoint-abc"])


def test_leftovers_of_interrupted_runs_are_removed(tmp_path, run):
    make_checkpoints(tmp_path, "checkpoint-2", "partial-4", "partial-6")
    remove_partial_checkpoints(tmp_path)
    assert names_of(tmp_path) == ["checkpoint-2"]
    make_checkpoints(tmp_path, "partial-4")
    (tmp_path / "partial-4" / "stale.bin").write_bytes(b"of another run")
    save_checkpoint(run[0], tmp_path, 4, total_limit=None)
    assert names_of(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert not (tmp_path / "checkpoint-4" / "stale.bin").exists()


def test_what_only_looks_like_a_leftover_is_left_alone(tmp_path):
    make_checkpoints(tmp_path, "partial-results", "partial-4b", "a-partial-4")
    (tmp_path / "partial-notes.txt").write_text("mine")
    (tmp_path / "partial-9").write_text("mine")
    remove_partial_checkpoints(tmp_path)
    assert names_of(tmp_path) == ["a-partial-4", "partial-4b", "partial-9", "partial-notes.txt", "partial-results"]


def test_a_finished_checkpoint_is_never_overwritten(tmp_path, run):
    # A run cannot come here: it starts at the latest checkpoint of its folder.
    accelerator, model = run
    save_checkpoint(accelerator, tmp_path, 4, total_limit=None)
    before = (tmp_path / "checkpoint-4" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(OSError, match="checkpoint-4"):
        save_checkpoint(accelerator, tmp_path, 4, total_limit=None)
    assert (tmp_path / "checkpoint-4" / "model.safetensors").read_bytes() == before


def test_a_checkpoint_that_cannot_be_written_names_the_last_good_one(tmp_path, run):
    accelerator, _ = run
    save_checkpoint(accelerator, tmp_path, 2, total_limit=1)
    accelerator.register_for_checkpointing(Unwritable())
    with pytest.raises(
        OSError, match=r"Could not write '.*checkpoint-4' \(no space left\); the last good one is 'che"
    ):
        save_checkpoint(accelerator, tmp_path, 4, total_limit=1)
    assert names_of(tmp_path) == ["checkpoint-2"]
    with pytest.raises(OSError, match="there is no earlier one"):
        save_checkpoint(accelerator, tmp_path / "new", 4, total_limit=1)
    assert names_of(tmp_path / "new") == []


class Unwritable:
    """A part of a run whose state no disk has room for."""

    def state_dict(self) -> dict:
        raise OSError("no space left")

    def load_state_dict(self, state_dict: dict) -> None:
        pass


def imitate_fsync(monkeypatch, refuses) -> list[str]:
    """Let `os.fsync` fail as another system's would: `refuses(is_folder, is_readable_only)` gives an error or none."""
    fsync, flushed = os.fsync, []

    def imitation(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        is_readable_only = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        error = refuses(is_folder, is_readable_only)
        if error:
            raise OSError(error, os.strerror(error))
        flushed.append("folder" if is_folder else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", imitation)
    return flushed


def test_windows_flushes_files_that_are_open_for_writing(tmp_path, run, monkeypatch):
    flushed = imitate_fsync(
        monkeypatch, lambda is_folder, is_readable_only: errno.EBADF if is_readable_only or is_folder else None
    )
    save_checkpoint(run[0], tmp_path, 1, total_limit=None)
    assert flushed == ["file"] * len(names_of(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("name", ["EBADF", "EINVAL", "EPERM", "ENOTSUP", "EACCES", "ENOSYS"])
@pytest.mark.parametrize("everything", [False, True])
def test_where_nothing_can_be_flushed_checkpoints_are_written_all_the_same(
    tmp_path, run, monkeypatch, name, everything
):
    imitate_fsync(monkeypatch, lambda is_folder, _: getattr(errno, name) if is_folder or everything else None)
    save_checkpoint(run[0], tmp_path, 1, total_limit=None)
    assert names_of(tmp_path) == ["checkpoint-1"]
    assert resume(run[0], tmp_path, "latest") == 1


def test_folders_that_cannot_be_opened_are_not_flushed(tmp_path, run, monkeypatch):
    open_, attempts = os.open, []

    def imitation(path, *arguments, **options):
        if Path(path) == tmp_path:
            attempts.append(path)
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_(path, *arguments, **options)

    monkeypatch.setattr(os, "open", imitation)
    save_checkpoint(run[0], tmp_path, 1, total_limit=None)
    assert attempts
    assert names_of(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EDQUOT"])
def test_a_disk_that_is_full_or_broken_when_it_is_flushed_is_an_error(tmp_path, run, monkeypatch, name):
    save_checkpoint(run[0], tmp_path, 1, total_limit=None)
    imitate_fsync(monkeypatch, lambda *_: getattr(errno, name))
    with pytest.raises(OSError, match="Could not write .*checkpoint-2.* the last good one is 'checkpoint-1'"):
        save_checkpoint(run[0], tmp_path, 2, total_limit=None)
    assert names_of(tmp_path) == ["checkpoint-1"]


FILES = [
    "SHA256SUMS", "custom_checkpoint_0.pkl", "model.safetensors", "optimizer.bin", "random_states_0.pkl", "run.json",
]  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """A whole checkpoint with all kinds of files, and the accelerator that wrote it."""
    accelerator = Accelerator()
    model = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    accelerator.register_for_checkpointing(torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer))
    save_checkpoint(accelerator, tmp_path, 2, total_limit=None)
    save_checkpoint(accelerator, tmp_path, 4, total_limit=None)
    return accelerator, tmp_path / "checkpoint-4"


def test_a_checkpoint_has_a_digest_of_every_file(saved):
    checkpoint = saved[1]
    assert names_of(checkpoint) == FILES
    lines = [line.split("  ") for line in (checkpoint / "SHA256SUMS").read_text().splitlines()]
    digests = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in FILES[1:]}
    assert {name: digest for digest, name in lines} == digests


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", ["missing", "empty", "cut off", "flipped at the start", "in the middle", "at the end"]
)
def test_a_damaged_checkpoint_is_refused_and_the_file_named(saved, name, damage):
    accelerator, checkpoint = saved
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage in ("empty", "cut off"):
        os.truncate(path, 0 if damage == "empty" else len(content) // 2)
    else:
        place = {"flipped at the start": 0, "in the middle": len(content) // 2, "at the end": len(content) - 1}[damage]
        content[place] ^= 1
        path.write_bytes(content)
    # A flipped letter in the list of digests is one of a digest, or of the name of a file that is then missing.
    pattern = rf"must be a whole checkpoint, got '.*checkpoint-4', of which the file '({name})' is (missing|damaged)"
    pattern = pattern.replace(f"({name})", ".*") if name == "SHA256SUMS" else pattern
    for resume_from_checkpoint in ("latest", "checkpoint-4"):
        with pytest.raises(ValueError, match=pattern) as e:
            resume(accelerator, checkpoint.parent, resume_from_checkpoint)
        assert "Delete that checkpoint to go on from an earlier one" in str(e.value)


@pytest.mark.parametrize(
    "name", ["custom_checkpoint_0.pkl", "model.safetensors", "optimizer.bin", "random_states_0.pkl"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off"])
def test_a_damaged_checkpoint_without_digests_is_refused_in_a_sentence(saved, name, damage):
    accelerator, checkpoint = saved
    for unknown in ("SHA256SUMS", "run.json"):
        (checkpoint / unknown).unlink()
    assert resume(accelerator, checkpoint.parent, "latest") == 4
    path = checkpoint / name
    path.unlink() if damage == "missing" else os.truncate(path, path.stat().st_size // 2 * (damage == "cut off"))
    with pytest.raises(ValueError, match="a checkpoint of this model, got '.*checkpoint-4', which cannot be loaded"):
        resume(accelerator, checkpoint.parent, "latest")


def test_files_of_others_in_a_checkpoint_do_no_harm(saved):
    (saved[1] / "notes.txt").write_text("mine")
    assert resume(saved[0], saved[1].parent, "latest") == 4


def test_optimizers_keep_the_options_that_they_were_made_with(saved):
    accelerator, checkpoint = saved
    [optimizer] = accelerator._optimizers
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.25, betas=(0.1, 0.2))
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    resume(accelerator, checkpoint.parent, "latest")
    options = optimizer.param_groups[0]
    assert (options["lr"], options["weight_decay"], options["betas"]) == (0.5, 0.25, (0.1, 0.2))
    assert all(torch.equal(state["exp_avg"], old) for state, old in zip(optimizer.state.values(), moments))
