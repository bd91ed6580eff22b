"""Ending a run early: SIGTERM and Ctrl-C let it finish its step and write a checkpoint."""

import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec

import torch
from accelerate import Accelerator
from diffusers.utils import logging

from srdd.training.output_lock import unlock_output_dirs


logger = logging.get_logger(__name__)

Arguments = ParamSpec("Arguments")

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ReceivedSignal:
    """
    The first signal that this process got. While steps are taken, it is only noted; before and after them there is
    nothing to save, and it ends the process as `SystemExit`. A second one ends the process at once, by the system.
    """

    def __init__(self):
        self.number = 0
        self.is_awaited = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handler of `SIGNALS`."""
        self.number = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if not self.is_awaited:
            logger.warning(
                f"Stopped by {signal.Signals(number).name}. Go on with the same command and `--resume_from_checkpoint"
                " latest`, which starts anew where there is no checkpoint yet."
            )
            raise SystemExit(128 + number)


received = ReceivedSignal()


def ends_gracefully(main: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Decorator of a training script's `main`: signals end it gracefully, and its folder is let go at its end."""

    @functools.wraps(main)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        handles_signals = threading.current_thread() is threading.main_thread()
        received.number = 0
        before = [signal.signal(number, received.handle) for number in SIGNALS] if handles_signals else []
        try:
            main(*args, **kwargs)
        finally:
            received.is_awaited = False
            for number, handler in zip(SIGNALS, before):
                signal.signal(number, handler or signal.SIG_DFL)  # none: not one of Python's
            unlock_output_dirs()

    return run


class StopAgreement:
    """
    Lets all processes stop after the same step, whichever of them got the signal.

    The processes exchange their signals on the CPUs while the next step is taken, so that no step waits for that: they
    stop a step later than one process alone would.

    Args:
        accelerator (`Accelerator`): The processes.
    """

    def __init__(self, accelerator: Accelerator):
        self._group = None
        self._exchange: tuple[torch.distributed.Work, torch.Tensor] | None = None
        received.is_awaited = True
        if accelerator.num_processes > 1:
            try:
                self._group = torch.distributed.new_group(backend="gloo")
            except (RuntimeError, ValueError) as error:
                received.is_awaited = False
                logger.warning(f"SIGTERM and Ctrl-C will end the run at once: its processes cannot agree ({error}).")

    def agreed_signal(self) -> int:
        """The signal to stop for, the same on all processes, else 0. Called at the end of every step."""
        if self._group is None:
            return received.number
        number = self._result()
        flag = torch.tensor([received.number])
        work = torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
        self._exchange = work, flag
        return number

    def close(self) -> int:
        """The signal that came in the last step, 0 if none did. From now on signals end the process."""
        number = self._result()
        if self._group is not None:
            self.agreed_signal()
            number = max(number, self._result())
        number = number or received.number
        received.is_awaited = False
        return number

    def _result(self) -> int:
        """What the last exchange gave, 0 if there is none."""
        if self._exchange is None:
            return 0
        work, flag = self._exchange
        work.wait()
        self._exchange = None
        return int(flag)
