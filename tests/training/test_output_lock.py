"""One run in a folder at a time, whatever becomes of the run before it."""

import errno
import signal

import pytest
from training.launching import other_run

from srdd.training.output_lock import lock_output_dir, unlock_output_dirs


@pytest.fixture(autouse=True)
def _unlocked():
    yield
    unlock_output_dirs()


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path, end):
    folder = tmp_path / "new" / "run"
    with other_run(lock_output_dir, folder) as (process, connection):
        assert connection.recv() == "held"
        message = "`output_dir` must be a folder in which no other run trains, got '.*run', .*--resume_from_checkpoint"
        with pytest.raises(ValueError, match=message):
            lock_output_dir(folder)
        lock_output_dir(tmp_path / "new" / "another")
        process.kill() if end == "kill" else connection.send("end")
        process.join()
        assert process.exitcode == (-signal.SIGKILL if end == "kill" else 0)
    lock_output_dir(folder)


def test_runs_of_a_process_follow_each_other(tmp_path):
    lock_output_dir(tmp_path)
    lock_output_dir(str(tmp_path / ".." / tmp_path.name))
    with other_run(lock_output_dir, tmp_path) as (_, connection):
        assert "`output_dir` must be a folder in which no other run trains" in connection.recv()
    unlock_output_dirs()
    with other_run(lock_output_dir, tmp_path) as (_, connection):
        assert connection.recv() == "held"


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_where_there_are_no_locks_a_run_starts_with_a_warning(tmp_path, monkeypatch, caplog, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    lock_output_dir(tmp_path)
    assert "has no locks" in caplog.text
    assert "make sure that no other run is here" in caplog.text


@pytest.mark.parametrize("folder", ["file", "file/run"])
def test_what_is_no_folder_is_refused(tmp_path, folder):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=rf"`output_dir` must be a folder that can be written, got '.*{folder}' \(\["):
        lock_output_dir(tmp_path / folder)


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match="`output_dir` must be a folder that can be written.*Permission denied"):
        lock_output_dir(tmp_path)
