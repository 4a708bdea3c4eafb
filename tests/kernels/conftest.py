"""Fixtures of the kernels' tests."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """New memory is NaN: an element that a kernel does not write is seen."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))
