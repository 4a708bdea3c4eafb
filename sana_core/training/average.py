"""What training changes in a model, and the moving average of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters and the buffers that are saved, by name, without autograd: views, no copies."""
    return {
        name: tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }


class Average:
    """Exponential moving average of what training changes."""

    def __init__(self, model: nn.Module, decay: float):
        """Starts at the model's weights; a decay of 0 keeps no average, and the model itself stands for it."""
        self._model, self._decay = model, decay
        self.tensors = {name: tensor.clone() for name, tensor in trained_tensors(model).items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average = decay * average + (1 - decay) * model; the first steps, counted from 0, decay faster."""
        if not self.tensors:
            return
        decay = min(self._decay, (1 + step) / (10 + step))
        now = trained_tensors(self._model)
        for name, mean in self.tensors.items():
            mean.lerp_(now[name], 1 - decay) if mean.is_floating_point() else mean.copy_(now[name])

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The model with its averaged weights, in eval mode; afterwards it is as it was."""
        training = self._model.training
        self._swap()
        try:
            yield self._model.eval()
        finally:
            self._swap()
            self._model.train(training)

    @torch.no_grad()
    def keep(self) -> nn.Module:
        """Puts the averaged weights into the model for good; returns it, in eval mode."""
        now = trained_tensors(self._model)
        for name, mean in self.tensors.items():
            now[name].copy_(mean)
        return self._model.eval()

    @torch.no_grad()
    def _swap(self) -> None:
        now = trained_tensors(self._model)
        for name, mean in self.tensors.items():
            current = now[name].clone()
            now[name].copy_(mean)
            mean.copy_(current)
