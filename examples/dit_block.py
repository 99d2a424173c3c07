"""A DiT block for rows that mix text and images: norms modulated and residuals gated by each image's timestep.

    python examples/dit_block.py

As in DiT (arXiv:2212.09748), a timestep gives scale, shift and gate: here a row for each image, and `index` names the
image of each token (-1: text, not modulated). Two blocks learn to denoise two captioned images, on a CPU or a GPU.
"""
import torch
from torch import Tensor, nn

import tfkernels

WIDTH, HEADS, SIDE, PATCH, PATCHES = 64, 4, 8, 2, 16  # an image of 8x8 is 16 patches of 2x2


class DiTBlock(nn.Module):
    """Attention and an MLP; what lies between them, gate, residual, norm and modulation, is one pass over memory."""

    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        for parameter in self.modulation.parameters():
            nn.init.zeros_(parameter)  # adaLN-zero: gates start shut, so images start unchanged

    def forward(self, x: Tensor, timestep: Tensor, index: Tensor, mask: tfkernels.TransfusionMask) -> Tensor:
        """x (B, S, C), timestep (N, C) of each image, index (B, S) the image of each token."""
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = self.modulation(timestep).chunk(6, dim=1)  # (N, C) each
        normed = tfkernels.modulated_rms_norm(x, None, scale, shift, index)
        q, k, v = self.qkv(normed).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, S, D) each
        attended = self.out(tfkernels.attention(q, k, v, mask).transpose(1, 2).flatten(2))
        x, normed = tfkernels.gated_residual_rms_norm(x, attended, gate, None, mlp_scale, mlp_shift, index)
        return tfkernels.gated_residual(x, self.mlp(normed), mlp_gate, index)


class Denoiser(nn.Module):
    """Captions and noised patches in, a prediction for every patch out."""

    def __init__(self, layers: int = 2):
        super().__init__()
        self.caption, self.positions = nn.Embedding(2, WIDTH), nn.Embedding(1 + PATCHES, WIDTH)
        self.patch, self.head = nn.Linear(PATCH**2, WIDTH), nn.Linear(WIDTH, PATCH**2)
        self.timestep = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU())
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(layers))

    def forward(self, patches: Tensor, t: Tensor) -> Tensor:
        """patches (N * P, D) of images at times t (N,); the row is caption 0, image 0, caption 1, image 1."""
        token = torch.arange(len(t) * (1 + PATCHES), device=t.device)[None]
        pair, place = token // (1 + PATCHES), token % (1 + PATCHES)
        index = pair.masked_fill(place == 0, -1)  # (1, S), -1 for captions
        mask = tfkernels.TransfusionMask.from_token_types(place > 0, documents=pair)
        rows = torch.cat([self.caption.weight[:, None], self.patch(patches).unflatten(0, (len(t), -1))], dim=1)
        x = (rows + self.positions.weight).flatten(0, 1)[None]
        for block in self.blocks:
            x = block(x, self.timestep(t[:, None]), index, mask)
        return self.head(x[index >= 0])


def main(steps: int = 100) -> list[float]:
    """Train, and return the loss of every step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, x0 = Denoiser().to(device), torch.randn(2, 1, SIDE, SIDE, device=device)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(steps):
        t, seed = torch.rand(2, device=device), torch.tensor([0, step], device=device)
        noised = tfkernels.noise_patchify(x0, 1 - t, t, seed, patch_size=PATCH)  # (1 - t) x0 + t eps
        ones = torch.ones_like(t)  # the target is eps - x0; eps is made anew from the seed
        loss = tfkernels.diffusion_loss(model(noised, t), x0, -ones, ones, None, seed, patch_size=PATCH).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} after {steps} steps")
    return losses


if __name__ == "__main__":
    main()
