"""The loop around the gradient step, with a linear model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srdd.training.accelerator import make_accelerator
from srdd.training.optimizer import make_optimizer
from srdd.training.settings import TrainingSettings
from srdd.training.training_data import make_loader
from srdd.training.training_run import TrainingRun, evaluation_copy, truncate_log


class Numbers(torch.utils.data.Dataset):
    """Counts, and which epoch it was told of."""

    def __init__(self, length: int):
        self.length = length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"number": torch.tensor(float(index)), "epoch": torch.tensor(self.epoch)}


class Session:
    """A run of a linear model, as the scripts set it up."""

    def __init__(self, output_dir: Path, length: int = 6, **options):
        defaults = {"train_batch_size": 2, "max_train_steps": 5, "lr_scheduler": "constant", "lr_warmup_steps": 0}
        settings = TrainingSettings(output_dir=str(output_dir), report_to="none", **{**defaults, **options})
        self.accelerator = make_accelerator(settings)
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        self.averaged = evaluation_copy(model, self.accelerator)
        optimizer, schedule = make_optimizer(settings, model.parameters())
        loader = make_loader(settings, Numbers(length))
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.run = TrainingRun(settings, self.accelerator, self.model, schedule)

    def train(self) -> list[tuple[int, list[int]]]:
        """Train to the end; returns epoch and items of every batch."""
        seen = []
        for batch in self.run.batches(self.loader):
            seen.append((int(batch["epoch"][0]), batch["number"].int().tolist()))
            with self.accelerator.accumulate(self.model):
                loss = (self.model(batch["number"][:, None] / 10) - 1).square().mean()
                self.accelerator.backward(loss)
                self.run.clip_gradients(self.model.parameters())
                self.optimizer.step()
                self.optimizer.zero_grad()
            if not self.accelerator.sync_gradients:
                self.run.add_batch({"loss": loss, "number": batch["number"].mean()})
                continue
            self.run.finish_step({"loss": loss, "two": torch.tensor(2.0), "number": batch["number"].mean()})
            self.run.checkpoint()
        self.run.close()
        return seen


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def test_epochs_visit_every_item_once_in_changing_order(tmp_path):
    seen = Session(tmp_path, max_train_steps=7).train()
    assert [epoch for epoch, _ in seen] == [0, 0, 0, 1, 1, 1, 2]
    epochs = [[item for epoch, items in seen if epoch == wanted for item in items] for wanted in (0, 1)]
    assert [sorted(items) for items in epochs] == [list(range(6))] * 2
    assert epochs[0] != epochs[1]


def test_an_accumulated_step_may_take_batches_of_two_epochs(tmp_path):
    session = Session(tmp_path, gradient_accumulation_steps=2, logging_steps=1)
    assert [epoch for epoch, _ in session.train()] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert session.run.step == 5
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_sees_the_rest_of_the_batches(tmp_path, stop, accumulation):
    options = {"checkpointing_steps": 1, "checkpoints_total_limit": 9, "logging_steps": 1}
    options["gradient_accumulation_steps"] = accumulation
    whole = Session(tmp_path / "whole", **options)
    seen = whole.train()
    Session(tmp_path / "parts", **options, max_train_steps=stop).train()
    resumed = Session(tmp_path / "parts", **options, resume_from_checkpoint="latest")
    assert resumed.run.step == stop
    assert resumed.train() == seen[stop * accumulation :]
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert read_log(tmp_path / "parts") == read_log(tmp_path / "whole")


def test_the_log_has_the_means_of_the_losses_and_the_learning_rate(tmp_path):
    session = Session(tmp_path, logging_steps=2, learning_rate=0.25)
    session.train()
    log = read_log(tmp_path)
    assert [record["step"] for record in log] == [2, 4, 5]
    assert all(record.keys() == {"step", "loss", "two", "number", "lr"} for record in log)
    assert {record["two"] for record in log} == {2.0}
    assert {record["lr"] for record in log} == {0.25}


def test_averages_start_with_the_model_and_end_in_the_copy(tmp_path):
    session = Session(tmp_path, ema_decay=0.5)
    session.train()
    averaged = session.averaged
    session.run.copy_averages_to(averaged)
    assert not averaged.training
    assert torch.equal(averaged.weight, session.run.ema.shadow_params[0])
    assert not torch.equal(averaged.weight, session.model.weight)
    assert not any(parameter.requires_grad for parameter in averaged.parameters())


@pytest.mark.parametrize(("steps", "due"), [(2, [2, 4, 5]), (5, [5]), (100, [5]), (1, [1, 2, 3, 4, 5])])
def test_things_are_due_every_so_often_and_at_the_end(tmp_path, steps, due):
    run = Session(tmp_path).run
    due_steps = []
    for run.step in range(1, 6):
        if run.is_due(steps):
            due_steps.append(run.step)
    assert due_steps == due


def test_a_loss_that_is_no_number_is_named_with_its_step(tmp_path):
    run = Session(tmp_path).run
    run.step = 41
    run.check_finite({"loss": torch.tensor(1.0), "l1": torch.tensor(0.0)})
    values = {"loss": torch.tensor(math.nan), "l1": torch.tensor(0.5), "l2": torch.tensor(math.inf)}
    with pytest.raises(
        FloatingPointError, match=r"not finite at step 42: \{'loss': nan, 'l2': inf\}\. A lower `--learning_rate`"
    ):
        run.check_finite(values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_no_numbers_stop_the_run(tmp_path, value):
    session = Session(tmp_path)
    session.model.weight.grad = torch.tensor([[value]])
    session.model.bias.grad = torch.tensor([1.0])
    with pytest.raises(FloatingPointError, match=r"The norm of the gradients is (nan|inf) at step 1\."):
        session.run.clip_gradients(session.model.parameters())


class Broken(Session):
    """A run as on a GPU, that nothing waits for, with a loss or gradient in its second step that is no number."""

    def __init__(self, output_dir: Path, broken: str, **options):
        super().__init__(output_dir, **{"logging_steps": 100, "checkpointing_steps": 100, **options})
        self.run._finite.reads_at_once = False
        self.broken = broken

    def step(self, number: int) -> None:
        with self.accelerator.accumulate(self.model):
            loss = self.model(torch.ones(1, 1)).sum()
            factor = math.nan if number == 2 else 1.0
            self.run.check_finite({"loss": loss * factor if self.broken == "loss" else loss, "part": loss})
            self.accelerator.backward(loss * factor)
            self.run.clip_gradients(self.model.parameters())
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.run.finish_step({"loss": loss})


MESSAGES = {"loss": r"not finite at step 2: \{'loss': nan\}\.", "norm": r"gradients is nan at step 2\."}


@pytest.mark.parametrize("broken", MESSAGES)
@pytest.mark.parametrize("due", ["log", "checkpoint", "averages"])
def test_a_run_that_waits_for_nothing_keeps_nothing_of_a_broken_step(tmp_path, broken, due):
    options = {"log": {"logging_steps": 4}, "checkpoint": {"checkpointing_steps": 4}}.get(due, {})
    session = Broken(tmp_path, broken, max_train_steps=9, **options)
    before = session.averaged.weight.clone()
    for number in (1, 2, 3):
        session.step(number)
        session.run.checkpoint()
    assert session.model.weight.isnan()
    with pytest.raises(FloatingPointError, match=MESSAGES[broken]):  # noqa: PT012
        if due == "averages":
            session.run.copy_averages_to(session.averaged)
        session.step(4)
        session.run.checkpoint()
    assert torch.equal(session.averaged.weight, before)
    assert [path.name for path in tmp_path.iterdir()] == [".training.lock"]


def test_values_are_read_once(tmp_path):
    session = Broken(tmp_path, "nothing", logging_steps=1)
    session.step(1)
    assert session.run._finite._unread == []
    assert [record["step"] for record in read_log(tmp_path)] == [1]


def test_gradients_are_clipped_to_their_norm(tmp_path):
    session = Session(tmp_path, max_grad_norm=0.5)
    session.model.weight.grad, session.model.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    session.run.clip_gradients(session.model.parameters())
    assert [session.model.weight.grad.item(), session.model.bias.grad.item()] == pytest.approx([0.3, 0.4], abs=1e-5)


def test_gradients_are_clipped_only_where_a_step_is_due(tmp_path):
    session = Session(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.5)
    with session.accelerator.accumulate(session.model):
        session.model.weight.grad = torch.tensor([[3.0]])
        session.run.clip_gradients(session.model.parameters())
        assert session.model.weight.grad.item() == 3


def test_no_clipping_at_all(tmp_path):
    session = Session(tmp_path, max_grad_norm=0)
    with session.accelerator.accumulate(session.model):
        session.model.weight.grad, session.model.bias.grad = torch.tensor([[3e4]]), torch.tensor([4e4])
        session.run.clip_gradients(session.model.parameters())
        assert [session.model.weight.grad.item(), session.model.bias.grad.item()] == [3e4, 4e4]
        session.model.weight.grad = torch.tensor([[math.inf]])
        with pytest.raises(FloatingPointError, match="The norm of the gradients is inf at step 1"):
            session.run.clip_gradients(session.model.parameters())


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_what_is_logged_of_a_step_covers_all_its_batches(tmp_path, logging_steps):
    options = {"logging_steps": logging_steps, "length": 12, "max_train_steps": 4}
    logs = []
    for size, batches in ((6, 1), (3, 2), (2, 3), (1, 6)):
        folder = tmp_path / str(size)
        seen = Session(folder, train_batch_size=size, gradient_accumulation_steps=batches, **options).train()
        logs.append(read_log(folder))
        of_steps = [sum((items for _, items in seen[start : start + batches]), []) for start in range(0, 24, batches)]
        means = [sum(items) / 6 for items in of_steps[:4]]
        assert [record["number"] for record in logs[-1]] == pytest.approx(means[logging_steps - 1 :: logging_steps])
    for log in logs[1:]:
        assert [record["loss"] for record in log] == pytest.approx([record["loss"] for record in logs[0]], rel=1e-5)


def test_pictures_are_named_by_their_step(tmp_path):
    run = Session(tmp_path).run
    run.step = 7
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    path = run.save_images("samples", pixels)
    assert path == tmp_path / "samples-000007.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)


def test_a_validation_is_logged_and_shown(tmp_path):
    run = Session(tmp_path).run
    run.step = 7
    run.record_validation({"loss": 0.5, "usage": [1, 2]}, "samples", [torch.zeros(2, 3, 4, 5)])
    assert read_log(tmp_path) == [{"step": 7, "val_loss": 0.5, "val_usage": [1, 2]}]
    with Image.open(tmp_path / "samples-000007.png") as picture:
        assert picture.size == (10, 4)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_speed_counts_what_all_steps_since_the_last_log_took(tmp_path, monkeypatch, accumulation):
    session = Session(tmp_path, logging_steps=2, gradient_accumulation_steps=accumulation)
    session.run.units_per_step *= 10
    seconds, speeds = iter(range(0, 400, 4)), []
    monkeypatch.setattr("srdd.training.training_run.time.perf_counter", lambda: float(next(seconds)))
    session.run._time = 0.0
    next(seconds)
    monkeypatch.setattr(session.accelerator, "log", lambda values, step: speeds.append(values.get("img/s")))
    session.train()
    # Batches of two, ten units to an image: two steps in four seconds, and the last one in four.
    images = 2 * accumulation
    assert [speed for speed in speeds if speed] == [10 * images * 2 / 4] * 2 + [10 * images / 4]


def write_log(folder: Path, *steps: int, torn: str = "") -> Path:
    path = folder / "train_log.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.5}) + "\n" for step in steps) + torn)
    return path


@pytest.mark.parametrize(
    ("steps", "torn", "last_step", "kept"),
    [
        ([10, 20, 20, 30], "", 20, [10, 20, 20]),
        ([10, 20], "", 20, [10, 20]),
        ([10, 20], '{"step": 30, "lo', 20, [10, 20]),
        ([10, 20], '{"step": 20, "lo', 20, [10, 20]),
        ([10, 20], '{"step": 20, "loss": 1.5}', 20, [10, 20]),
        ([10, 20], "", 0, []),
        ([], '{"st', 10, []),
        ([], "", 10, []),
    ],
)
def test_a_log_ends_with_the_checkpoint(tmp_path, steps, torn, last_step, kept):
    path = write_log(tmp_path, *steps, torn=torn)
    truncate_log(path, last_step)
    assert [record["step"] for record in read_log(tmp_path)] == kept
    assert list(tmp_path.iterdir()) == [path]


def test_there_may_be_no_log_yet(tmp_path):
    truncate_log(tmp_path / "train_log.jsonl", 3)
    assert list(tmp_path.iterdir()) == []
