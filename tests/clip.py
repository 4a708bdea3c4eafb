"""A CLIP model of a few thousand random weights, saved as transformers saves a real one."""

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
START, END = "<|startoftext|>", "<|endoftext|>"


def save_clip(folder: Path) -> Path:
    """A folder with the model, the tokenizer, which knows small letters only, and the image processor."""
    folder.mkdir(parents=True)
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), START, END]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=20)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": words.index(START), "eos_token_id": words.index(END), "pad_token_id": words.index(END)}
    config = CLIPConfig(
        text_config=layers | ids | {"vocab_size": len(words), "max_position_embeddings": 20},
        vision_config=layers | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # transformers' own start is so small that all features look alike
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder
