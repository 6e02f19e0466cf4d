"""The end of every exported model.py: loading the weights and generating text.

The exporter copies this file's definitions, so they use nothing of this package but the model they serve.
Text is bytes: a token is a byte's value.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from mixforge.search_space.model import LanguageModel


def build() -> LanguageModel:
    """Stands for the call that builds the architecture, which the exporter writes in its place."""
    raise NotImplementedError


def load(folder: str | Path = Path(__file__).parent, device: str = "cpu") -> LanguageModel:
    """The trained model. Raises ValueError where the weights are not those that config.json names."""
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    stored = Path(folder, "model.safetensors").read_bytes()
    found = hashlib.sha256(stored).hexdigest()
    if found != config["weights_sha256"]:
        raise ValueError(
            f"{Path(folder, 'model.safetensors')} is damaged: sha256 {found}, not {config['weights_sha256']}"
        )
    model = build()
    model.load_state_dict(safetensors.torch.load(stored))
    return model.to(device).eval()


@torch.no_grad()
def generate(
    model: LanguageModel, prompt: str, tokens: int = 200, temperature: float = 0.8, seed: int = 0
) -> Iterator[bytes]:
    """Yield `tokens` bytes that follow the prompt: one pass over it, then one recurrent step for each.

    Temperature 0 takes the likeliest byte. Raises ValueError for an empty prompt, no tokens or a negative
    temperature.
    """
    if not prompt or tokens < 1 or temperature < 0:
        raise ValueError("give a prompt of at least one character, tokens >= 1 and temperature >= 0")
    device = next(model.parameters()).device
    prompt_BT = torch.tensor([list(prompt.encode())], device=device)
    random = torch.Generator().manual_seed(seed)
    logits_BX, state = model.prefill(prompt_BT, capacity=prompt_BT.shape[1] + tokens)
    for number in range(tokens):
        token_B = _choose(logits_BX, temperature, random)
        yield bytes([int(token_B)])
        if number < tokens - 1:
            logits_BX, state = model.step(token_B.to(device), state)


def _choose(logits_BX: Tensor, temperature: float, random: torch.Generator) -> Tensor:
    logits_BX = logits_BX.float().cpu()
    if temperature == 0:
        return logits_BX.argmax(-1)
    return torch.multinomial(torch.softmax(logits_BX / temperature, -1), 1, generator=random)[:, 0]


def main() -> None:
    """Read the command line, print the prompt and what follows it."""
    parser = argparse.ArgumentParser(description="Generate text, byte by byte.")
    parser.add_argument("--prompt", default="def ", help="text to go on from (default: 'def ')")
    parser.add_argument("--tokens", type=int, default=200, help="bytes to generate (default: 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest byte (default: 0.8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    parser.add_argument("--device", default="cpu", help="a torch device (default: cpu)")
    asked = parser.parse_args()
    out = sys.stdout.buffer
    try:
        following = generate(
            load(device=asked.device), asked.prompt, asked.tokens, asked.temperature, asked.seed
        )
        out.write(asked.prompt.encode())
        for byte in following:
            out.write(byte)
            out.flush()
    except ValueError as error:
        parser.error(str(error))
    out.write(b"\n")
