"""Where ComfyUI, which takes float32 on every CPU, misses that some are faster in bfloat16."""

import comfy.model_management
import torch
from comfy.cli_args import args

from ..sana_core.processor import multiplies_bfloat16


def computes_on_cpu(device: torch.device) -> bool:
    """Whether the device is a CPU that is fast in bfloat16."""
    return comfy.model_management.is_device_cpu(device) and multiplies_bfloat16()


def chooses_for_cpu(device: torch.device, chosen: torch.dtype, asked: bool) -> bool:
    """Whether float32 is only what core takes on every CPU, and not what the user started ComfyUI with.

    `asked`: the option for this kind of network; --force-fp32 is one for all.
    """
    return chosen == torch.float32 and not (asked or args.force_fp32) and computes_on_cpu(device)
