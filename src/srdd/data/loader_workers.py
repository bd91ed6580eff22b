"""Processes that read images."""

import signal


def leave_signals_to_main_process(worker_id: int) -> None:
    """
    A `worker_init_fn`: Ctrl-C and SIGTERM often reach all processes of a run, and the main one decides what follows.
    Workers end with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
