"""Prepared captions: what cross-attention needs of a prompt, made once for all steps of a sampling run."""

from collections.abc import Callable, Hashable, Sequence
from uuid import UUID
from weakref import WeakKeyDictionary

from ..sana_core.models.sana import ContextCache


class PreparedContexts:
    """The contexts of the conditionings that are being sampled.

    Core gives each conditioning a new id for each sampling run. Contexts are held as long as that id is, so they end
    with the run, and no later one, with another prompt, LoRA or model, can meet them.
    """

    LIMIT = 4  # batches with the same first conditioning: core may split them anew when memory gets short

    def __init__(self):
        self._batches: WeakKeyDictionary[UUID, dict[Hashable, ContextCache]] = WeakKeyDictionary()

    def __deepcopy__(self, memo) -> "PreparedContexts":
        return PreparedContexts()  # a copy of the model may go to another device

    def get(self, ids: Sequence[UUID], key: Hashable, make: Callable[[], ContextCache]) -> ContextCache:
        """The context of a batch of conditionings. `key`: all else that it depends on."""
        batches = self._batches.setdefault(ids[0], {})
        key = (tuple(one.int for one in ids), key)
        if key not in batches:
            while len(batches) >= self.LIMIT:
                del batches[next(iter(batches))]
            batches[key] = make()
        return batches[key]
