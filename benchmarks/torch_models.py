"""The models of `train_models` written in torch, for peers, and the loss that all train.

The head is untied, as ghost clipping refuses tied weights, and dense layers are `Linear`, which
the peers have norms for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Any) -> Any:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(4096, width)
        self.blocks = nn.ModuleList(Block(width, heads, True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Any) -> Any:
        # Positions with a batch axis of their own: peers take norms example by example.
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = self.tokens(tokens) + self.places(places.contiguous())
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ViT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, patch: int, classes: int) -> None:
        super().__init__()
        self.patches, self.places = nn.Linear(patch * patch * 3, width), nn.Embedding(4096, width)
        self.blocks = nn.ModuleList(Block(width, heads, False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, patches: Any) -> Any:
        places = torch.arange(patches.shape[1], device=patches.device)
        x = self.patches(patches) + self.places(places.expand(patches.shape[:2]).contiguous())
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))[:, None]


class Adapted(nn.Module):
    """A frozen dense layer with a trained low-rank one beside it."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(rows, columns, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        self.a, self.b = nn.Linear(rows, rank, bias=False), nn.Linear(rank, columns, bias=False)

    def forward(self, x: Any) -> Any:
        return self.base(x) + self.b(self.a(x))


class LlamaBlock(nn.Module):
    def __init__(
        self, width: int, heads: int, kv_heads: int, hidden: int, rank: int | None
    ) -> None:
        super().__init__()
        size = width // heads
        self.heads, self.kv_heads = heads, kv_heads

        def dense(rows: int, columns: int, adapted: bool = False) -> nn.Module:
            if rank is not None and adapted:
                return Adapted(rows, columns, rank)
            return nn.Linear(rows, columns, bias=False)

        self.query, self.value = dense(width, width, True), dense(width, kv_heads * size, True)
        self.key, self.out = dense(width, kv_heads * size), dense(width, width)
        self.gate, self.up, self.down = (
            dense(width, hidden), dense(width, hidden), dense(hidden, width),
        )  # fmt: skip
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)

    def forward(self, x: Any) -> Any:
        batch, length, width = x.shape
        y = self.norm1(x)
        query = _rotated(self.query(y).reshape(batch, length, self.heads, -1))
        key = _rotated(self.key(y).reshape(batch, length, self.kv_heads, -1))
        value = self.value(y).reshape(batch, length, self.kv_heads, -1)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        mixed = functional.scaled_dot_product_attention(
            query, key.to(query.dtype), value, is_causal=True, enable_gqa=True
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(
        self, layers: int, width: int, heads: int, kv_heads: int, hidden: int, rank: int | None
    ) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(32000, width), nn.Linear(width, 32000, bias=False)
        self.blocks = nn.ModuleList(
            LlamaBlock(width, heads, kv_heads, hidden, rank) for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width, eps=1e-5)
        if rank is not None:
            for name, parameter in self.named_parameters():
                if ".a." not in name and ".b." not in name:
                    parameter.requires_grad_(False)
                    parameter.data = parameter.data.bfloat16()

    def forward(self, tokens: Any) -> Any:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _rotated(x: Any) -> Any:
    length, half = x.shape[1], x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(length, device=x.device)[:, None] * rates
    cosine, sine = (f(angles)[None, :, None].to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2-small": lambda: GPT2(12, 768, 12, 50304),
    "gpt2-medium": lambda: GPT2(24, 1024, 16, 50304),
    "vit-b": lambda: ViT(12, 768, 12, 16, 1000),
    "llama-1b": lambda: Llama(16, 2048, 32, 8, 8192, None),
    "llama-1b-lora": lambda: Llama(16, 2048, 32, 8, 8192, 16),
    "gpt2-tiny": lambda: GPT2(1, 32, 2, 64),
    "vit-tiny": lambda: ViT(1, 32, 2, 2, 8),
    "llama-tiny": lambda: Llama(1, 32, 4, 2, 64, None),
    "llama-tiny-lora": lambda: Llama(1, 32, 4, 2, 64, 2),
}


def examples_of(model: nn.Module, batch: int, length: int, device: str) -> tuple[Any, Any]:
    """(inputs, targets of (B, T))."""
    if isinstance(model, ViT):
        inputs = torch.randn(batch, length, model.patches.in_features, device=device)
        return inputs, torch.randint(0, model.head.out_features, (batch, 1), device=device)
    tokens = torch.randint(0, model.head.out_features, (batch, length + 1), device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
