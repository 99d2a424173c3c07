"""The model: its configuration, backbones, image layers, autoencoder and adapters."""
from transfusion.model.config import TransfusionConfig
from transfusion.model.transfusion import Transfusion, TransfusionOutput

__all__ = ["Transfusion", "TransfusionConfig", "TransfusionOutput"]
