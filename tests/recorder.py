"""Stands in for CUDA graphs on a CPU: what is recorded is a function and the memory that it works on."""

from collections import Counter

import torch


class PlainRecorder:
    """Replays by running the function again, on the recorded inputs and into the recorded result."""

    def __init__(self, failure: Exception | None = None):
        """`failure`: what each recording raises."""
        self.counts = Counter()
        self.failure = failure

    def __call__(self, device: torch.device) -> "PlainRecorder":
        self.counts["devices"] += 1
        return self

    def warm_up(self, run):
        self.counts["warm-ups"] += 1
        return run()

    def record(self, run):
        self.counts["recordings"] += 1
        if self.failure is not None:
            raise self.failure
        result = run()

        def replay():
            self.counts["replays"] += 1
            result.copy_(run())

        return replay, result
