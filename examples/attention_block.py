"""A GPT whose attention reads images both ways: nanoGPT's block with one call of `tfkernels.attention`.

    python examples/attention_block.py

Sixty-four tokens hold two packed documents and two images. Each step trains the blocks to repeat the token before last
of the same document, which attention alone can find. The mask is made once and serves every block; new images or
documents in the next batch need no recompilation. It runs on the CPU and, where there is one, on a CUDA GPU.
"""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tfkernels

VOCABULARY, WIDTH, HEADS, KV_HEADS, TOKENS = 64, 128, 4, 2, 64


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and around a residual; two query heads share each key/value head."""

    def __init__(self):
        super().__init__()
        head = WIDTH // HEADS
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * head, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, mask: tfkernels.TransfusionMask) -> Tensor:
        """(B, S, C) to (B, S, C)."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)  # (B, H or K, S, D): views, nothing is copied
        x = x + self.out(tfkernels.attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Embeddings, blocks, a head; positions are learned."""

    def __init__(self, layers: int = 2):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, mask: tfkernels.TransfusionMask) -> Tensor:
        """Logits (B, S, V) of tokens (B, S)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def main(steps: int = 60) -> list[float]:
    """Train, and return the loss of every step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    documents = torch.tensor([[0] * 40 + [1] * 24], device=device)
    mask = tfkernels.TransfusionMask.from_spans([[(4, 20), (44, 60)]], TOKENS, documents=documents)
    model = GPT().to(device)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(steps):
        tokens = torch.randint(VOCABULARY, (8, TOKENS), device=device)
        targets = tokens.roll(2, dims=1).masked_fill(documents != documents.roll(2, dims=1), -100)
        loss = F.cross_entropy(model(tokens, mask).flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} after {steps} steps; {mask.area()} visible pairs of tokens")
    return losses


if __name__ == "__main__":
    main()
