"""A preset for one's own pictures and texts: `transfusion train own --data mix.yaml`. docs/data.md walks through it."""
from pathlib import Path

from transfusion.data.mixture_data import MixtureFileSettings
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig


def own() -> TrainConfig:
    """Files of your own, named with --data mix.yaml: a small model for a few hundred pictures and more.

    Pictures are pixels in patches of 16x16, 256 patches for one of 256x256, and are predicted themselves (x0), as in
    the showcase. For pictures of 64x64 take --model.patch-size 8; for large ones name an autoencoder with --data.vae
    and take --model.patch-size 2. Before it trains, it says how many steps an epoch has and how long one takes.
    """
    return TrainConfig(
        out=Path("runs/own"), data=MixtureFileSettings(),
        model=ModelSettings(vocabulary=4096, hidden=256, layers=6, heads=8, kv_heads=8, mlp=688, patch_size=16,
                            backbone="adaln", positions="2d", objective="x0", diffusion_weight=50.0),
        optim=OptimSettings(steps=5000, rows=4, seq_len=1024, lr=1e-3, min_lr=1e-5, warmup=100, weight_decay=0.02,
                            ema=0.995))
