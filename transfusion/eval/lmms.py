"""The entry point `lmms_eval.models`: names the model class; it is imported where lmms-eval is asked for it."""


def manifests() -> list:
    """What lmms-eval reads: `--model transfusion` is the class in transfusion/eval/lmms_model.py."""
    from lmms_eval.models.registry_v2 import ModelManifest
    return [ModelManifest(model_id="transfusion", simple_class_path="transfusion.eval.lmms_model.TransfusionModel")]
