"""Diffusers' pipelines over its own networks, set up once, and the inputs that both sides are given."""

from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler, SanaPAGPipeline, SanaSprintPipeline, SCMScheduler
from diffusers import SanaPipeline as DiffusersPipeline
from torch import Tensor, nn

from benchmarks.networks import HuggingFaceTokenizer, Place
from sana_core.config import SanaConfig
from sana_core.text import CHI, TextEncoder

POSITIONS, CAPTION, EMPTY = 300, 47, 1  # of text features: all, attended in a caption, attended in an empty prompt


def normal(place: Place, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
    """Noise of unit deviation."""
    generator = torch.Generator(place.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=place.device, dtype=torch.float32).to(dtype or place.dtype)


def caption_mask(place: Place, lengths: list[int]) -> Tensor:
    """[B, 300], 1 at so many first positions."""
    positions = torch.arange(POSITIONS, device=place.device)
    return (positions < torch.tensor(lengths, device=place.device)[:, None]).long()


@dataclass(frozen=True)
class KeptFeatures:
    """Text features of one caption and of the empty prompt; stands in for our text encoder."""

    caption: tuple[Tensor, Tensor]  # [1, 300, C] and the mask
    empty: tuple[Tensor, Tensor]

    @classmethod
    def random(cls, place: Place, channels: int) -> "KeptFeatures":
        """Noise for features."""
        embeds = normal(place, 2, POSITIONS, channels, seed=2)
        mask = caption_mask(place, [CAPTION, EMPTY])
        return cls((embeds[:1], mask[:1]), (embeds[1:], mask[1:]))

    @property
    def channels(self) -> int:
        """Width of the features."""
        return self.caption[0].shape[-1]

    def encode(self, prompts: list[str], *, chi: bool | str = True) -> tuple[Tensor, Tensor]:
        """The features, whatever the text is."""
        return self.caption if any(prompts) else self.empty

    def for_diffusers(self, dtype: torch.dtype, guided: bool = True) -> dict[str, Tensor | None]:
        """The same as arguments of its pipelines."""
        arguments = {"prompt_embeds": self.caption[0].to(dtype), "prompt_attention_mask": self.caption[1]}
        if guided:
            arguments |= {"negative_prompt": None, "negative_prompt_embeds": self.empty[0].to(dtype)}
            arguments |= {"negative_prompt_attention_mask": self.empty[1]}
        return arguments


class Prompts:
    """Texts of one length, of which `turn` takes the next."""

    def __init__(self):
        self.count = 0

    @property
    def text(self) -> str:
        """Lower case, which diffusers would make of it."""
        return f"a red cat on the left of a blue background, number {self.count:05d}"

    def turn(self) -> None:
        """A new prompt."""
        self.count += 1


def flow_pipeline(
    transformer: nn.Module, dc_ae: nn.Module, config: SanaConfig, perturbs: bool = False
) -> DiffusersPipeline | SanaPAGPipeline:
    """Flow-DPM-Solver with our model's shift, and our layer under perturbed-attention guidance."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=config.shift, final_sigmas_type="zero"
    )
    parts = None, None, dc_ae, transformer, scheduler
    if perturbs:
        return _quiet(SanaPAGPipeline(*parts, pag_applied_layers=f"transformer_blocks.{config.perturbed_layer}"))
    return _quiet(DiffusersPipeline(*parts))


def sprint_pipeline(transformer: nn.Module, dc_ae: nn.Module) -> SanaSprintPipeline:
    """SCM, as Sprint is published with it."""
    return _quiet(SanaSprintPipeline(None, None, dc_ae, transformer, SCMScheduler()))


def text_pipeline(encoder: TextEncoder, model: nn.Module) -> DiffusersPipeline:
    """What `encode` needs: our encoder's tokenizer over a Gemma2Model."""
    return DiffusersPipeline(HuggingFaceTokenizer(encoder.tokenizer), model, None, None, None)


def encode(pipe: DiffusersPipeline, prompt: str) -> tuple[Tensor, Tensor]:
    """Text features [1, 300, C] and mask by diffusers' code, with our wording of the instruction; none if empty."""
    instruction = CHI.split("\n") if prompt else None
    return pipe.encode_prompt(prompt, False, device=pipe.text_encoder.device, complex_human_instruction=instruction)[:2]


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
