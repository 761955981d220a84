"""Networks and texts of the study of transformers: a ViT, a Llama of transformers', and the documentation of Python."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasterai.display import Brief
from fasterai.study.data import Data, load_data
from fasterai.study.sizes import Size

__all__ = ["Both", "Text", "Widths", "load_both", "make_llama", "make_vit", "read_text"]

#: Characters of a sequence, and of the text that `tiny` reads.
LENGTH, TINY = 64, 20_000
#: Every so many topics one is measured on.
HELD_OUT = 10


@dataclass(frozen=True, repr=False)
class Widths(Brief):
    """Widths of a transformer.

    Attributes:
        stream: Channels of the residual stream.
        heads: Heads of each attention; a Llama has half as many of keys and values.
        head: Channels of a head.
        hidden: Channels inside each MLP.
        depth: Number of blocks.
    """

    stream: int = 64
    heads: int = 4
    head: int = 16
    hidden: int = 192
    depth: int = 4

    def halved(self) -> Widths:
        """Return half of all widths: the stream, the heads and the MLPs; a head stays as wide as it is."""
        return Widths(self.stream // 2, self.heads // 2, self.head, self.hidden // 2, self.depth)


class Block(nn.Module):
    """An attention and an MLP, each behind a layer norm and beside a shortcut."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        stream, inner = widths.stream, widths.heads * widths.head
        self.head = widths.head
        self.norm1, self.norm2 = nn.LayerNorm(stream), nn.LayerNorm(stream)
        self.qkv, self.out = nn.Linear(stream, 3 * inner), nn.Linear(inner, stream)
        self.up, self.down = nn.Linear(stream, widths.hidden), nn.Linear(widths.hidden, stream)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream `(N, L, C)` after both."""
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, length, 3, -1, self.head).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return found


class ViT(nn.Module):
    """Patches of an image, a class token and learned positions, blocks, and a head on the class token."""

    def __init__(self, channels: int, side: int, classes: int, widths: Widths) -> None:
        super().__init__()
        patch = max(1, side // 4)
        self.patches = nn.Conv2d(channels, widths.stream, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, widths.stream))
        self.places = nn.Parameter(0.02 * torch.randn(1, 1 + (side // patch) ** 2, widths.stream))
        self.blocks = nn.Sequential(*(Block(widths) for _ in range(widths.depth)))
        self.norm, self.last = nn.LayerNorm(widths.stream), nn.Linear(widths.stream, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(N, classes)` of images `(N, C, S, S)`."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        logits: Tensor = self.last(self.norm(self.blocks(x))[:, 0])
        return logits


class Logits(nn.Module):
    """A language model of transformers', from numbers of characters to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, numbers: Tensor) -> Tensor:
        """Return the logits `(N, classes, L)` of the next character at each place of `(N, L)`."""
        logits: Tensor = self.model(numbers).logits
        return logits.transpose(1, 2)


def make_vit(data: Data, widths: Widths) -> nn.Module:
    """Make a ViT of 16 patches for the images."""
    return ViT(data.channels, data.side, len(data.classes), widths).to(data.train[0].device)


def make_llama(text: Text, widths: Widths) -> nn.Module:
    """Make transformers' `LlamaForCausalLM` with grouped queries, whose head is its embedding.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError("network 'Llama' needs transformers: pip install '.[huggingface]'; ViT alone does not") from error
    config = LlamaConfig(
        vocab_size=len(text.characters),
        hidden_size=widths.stream,
        num_hidden_layers=widths.depth,
        num_attention_heads=widths.heads,
        num_key_value_heads=widths.heads // 2,
        head_dim=widths.head,
        intermediate_size=widths.hidden,
        max_position_embeddings=2 * LENGTH,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return Logits(LlamaForCausalLM(config)).to(text.train[0].device)


@dataclass(frozen=True, repr=False, eq=False)
class Text(Brief):
    """Sequences of characters, as numbers, and the next character at each place.

    Attributes:
        train: Sequences `(N, L)` and their next characters `(N, L)` to train on.
        test: The same, of other topics, to measure on.
        characters: All characters, in order.
        fingerprint: Equal for equal texts.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    characters: str
    fingerprint: str


def read_text(size: Size) -> Text:
    """Read the topics of Python's `help()`, as the version at hand has them; every tenth topic is kept back."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    held = "\n".join(texts[HELD_OUT - 1 :: HELD_OUT])
    rest = "\n".join(text for i, text in enumerate(texts, 1) if i % HELD_OUT)
    characters = "".join(sorted({*held, *rest}))
    if size.name == "tiny":
        held, rest = held[: TINY // 10], rest[:TINY]
    fingerprint = hashlib.sha256((held + "|" + rest).encode()).hexdigest()[:16]
    train, test = (_sequences(text, characters, size.device) for text in (rest, held))
    return Text(train, test, characters, fingerprint)


def _sequences(text: str, characters: str, device: str) -> tuple[Tensor, Tensor]:
    number = {character: i for i, character in enumerate(characters)}
    numbers = torch.tensor([number[character] for character in text], device=device)
    count = (len(numbers) - 1) // LENGTH
    before, after = numbers[: count * LENGTH], numbers[1 : count * LENGTH + 1]
    return before.view(count, LENGTH), after.view(count, LENGTH)


@dataclass(frozen=True, repr=False, eq=False)
class Both(Brief):
    """Images and a text.

    Attributes:
        images: What the ViT is trained on.
        text: What the Llama is trained on.
    """

    images: Data
    text: Text

    @property
    def name(self) -> str:
        """The images and the text in a few words."""
        train, test = self.text.train[0].numel(), self.text.test[0].numel()
        return f"{self.images.name}; topics of Python's help ({train:,} + {test:,} characters)"

    @property
    def fingerprint(self) -> str:
        """Equal for equal files and texts."""
        return f"{self.images.fingerprint} {self.text.fingerprint}"


def load_both(folder: Path | None, size: Size) -> Both:
    """Read as many images as a size asks for, and the text."""
    return Both(load_data(folder, size), read_text(size))
