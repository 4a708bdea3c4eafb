"""All tests of training run in one thread."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def small_networks(one_thread):
    """Micro networks all over."""
