"""Ctrl-C and a request to end: the step is finished and saved first."""

import logging
import signal
import threading

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """Training was asked to end by a signal and has saved its state; uncaught, the program exits with 128 + signal."""

    def __init__(self, number: int, step: int):
        super().__init__(128 + number)
        self.step = step


class StopSignals:
    """While entered, remembers SIGINT or SIGTERM instead of obeying; a second one is obeyed at once.

    Outside the main thread, where Python allows no handlers, it remembers nothing.
    """

    def __init__(self):
        self.received = 0  # number of the signal; 0: none
        self._before: dict = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        self.received = number
        self.__exit__()
        logger.warning("%s: finishing this step, then saving; once more to end at once", signal.Signals(number).name)
