"""Prepared captions: what cross-attention needs of a prompt, made once for all steps of a sampling run."""

from collections.abc import Callable, Hashable, Sequence
from uuid import UUID, uuid4
from weakref import WeakKeyDictionary

import comfy.conds

from ..sana_core.models.controlnet import Control, SanaControlNet
from ..sana_core.models.sana import ContextCache


class CaptionIds(comfy.conds.CONDRegular):
    """What tells the captions of a batch apart, one id for each conditioning.

    Core's own ids do not: where a conditioning has an area, core gives its opposite a copy of it, id and all, with the
    opposite's caption in it. This id goes where the caption goes.
    """

    def __init__(self, cond: tuple[UUID, ...] | None = None):
        """None is for a caption that had no id before."""
        super().__init__((uuid4(),) if cond is None else cond)

    def process_cond(self, batch_size, **kwargs) -> "CaptionIds":
        """One id serves all rows of a conditioning."""
        return self

    def can_concat(self, other) -> bool:
        """Always."""
        return True

    def concat(self, others) -> tuple[UUID, ...]:
        """The ids in the order of the rows."""
        return sum((one.cond for one in others), self.cond)

    def size(self) -> list[int]:
        """Core asks each cond for its shape."""
        return [len(self.cond)]


def kept_nets(controls: Sequence[Control]) -> tuple[SanaControlNet, ...]:
    """The ControlNets whose weights stay as they are for all steps of a run, each once."""
    nets = (one.net for one in controls if one.strength)
    return tuple(dict.fromkeys(net for net in nets if not getattr(net, "model_lowvram", True)))


class PreparedContexts:
    """The contexts of the captions that are being sampled.

    Each caption gets a new id for each sampling run. Contexts are held as long as that id is, so they end with the run,
    and no later one, with another prompt, LoRA or model, can meet them.
    """

    LIMIT = 4  # batches with the same first caption: core may split them anew when memory gets short

    def __init__(self):
        self._batches: WeakKeyDictionary[UUID, dict[Hashable, ContextCache]] = WeakKeyDictionary()

    def __deepcopy__(self, memo) -> "PreparedContexts":
        return PreparedContexts()  # a copy of the model may go to another device

    def get(self, ids: Sequence[UUID], key: Hashable, make: Callable[[], ContextCache]) -> ContextCache:
        """The context of a batch of captions. `key`: all else that it depends on."""
        batches = self._batches.setdefault(ids[0], {})
        key = (tuple(one.int for one in ids), key)
        if key not in batches:
            while len(batches) >= self.LIMIT:
                del batches[next(iter(batches))]
            batches[key] = make()
        return batches[key]
