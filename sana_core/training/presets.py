"""Settings for the memory of a GPU.

What fits was followed tensor by tensor (benchmarks/training_memory.py), and not measured on a GPU yet.
"""

from dataclasses import dataclass

PRECISION = "bf16"
RECOMPUTE = True


@dataclass(frozen=True)
class Preset:
    """Batch, and the optimiser for all weights; a LoRA's own state is small with any."""

    batch_size: int
    full_optimizer: str
    meant_for: str

    def optimizer(self, mode: str) -> str:
        """The optimiser for this mode of training."""
        return self.full_optimizer if mode == "full" else "adamw"


PRESETS = {
    "12gb": Preset(1, "adamw8bit", "LoRA of 0.6B and 1.6B at 1024 px; all weights of 0.6B at 512 px"),
    "16gb": Preset(4, "adamw8bit", "the same with larger batches; all weights of 0.6B at 1024 px"),
    "24gb": Preset(4, "adamw8bit", "LoRA of 4.8B at 1024 px; all weights of 1.6B at 1024 px"),
    "32gb": Preset(8, "adamw", "all weights of 1.6B at 1024 px with AdamW's whole state, without an average (EMA)"),
}
