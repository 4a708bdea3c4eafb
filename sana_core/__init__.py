"""Sana in plain PyTorch: `from sana_core import SanaPipeline`, or `python -m sana_core generate --help`."""


def __getattr__(name: str):
    # Imported on first use: the configuration and the kernels stay importable without transformers and Pillow.
    if name == "SanaPipeline":
        from .pipeline import SanaPipeline

        return SanaPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["SanaPipeline"]
