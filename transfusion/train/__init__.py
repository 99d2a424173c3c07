"""Training: one loop, and a file for each thing that is trained."""
from transfusion.train.transfusion import ModelSettings, OptimSettings, TrainConfig, build_model, train

__all__ = ["ModelSettings", "OptimSettings", "TrainConfig", "build_model", "train"]
