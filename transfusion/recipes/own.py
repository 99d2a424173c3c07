"""A preset for pictures and texts of one's own: `transfusion train own --data mix.yaml`; docs/data.md walks through it."""
from pathlib import Path

from transfusion.data.mixture_data import MixtureFileSettings
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig


def own() -> TrainConfig:
    """Files of your own, named with --data mix.yaml: a model of 14 M parameters for a few hundred to many thousand pictures.

    Its pictures are pixels in patches of 8x8, which it predicts themselves (x0), as the showcase does; for larger ones name
    an autoencoder with --data.vae and take --model.patch-size 2. Before it trains, it says how many steps an epoch has.
    """
    return TrainConfig(
        out=Path("runs/own"), data=MixtureFileSettings(),
        model=ModelSettings(vocabulary=4096, hidden=256, layers=6, heads=8, kv_heads=8, mlp=688, patch_size=8, backbone="adaln",
                            positions="2d", objective="x0", diffusion_weight=50.0),
        optim=OptimSettings(steps=5000, rows=8, seq_len=512, lr=1e-3, min_lr=1e-5, warmup=100, weight_decay=0.02, ema=0.995))
