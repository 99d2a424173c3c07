"""Package metadata of tfkernels, transfusion and ptxrun; tools are configured in pyproject.toml."""
from pathlib import Path

from setuptools import find_packages, setup

TRAIN = ["tyro>=1.0", "matplotlib>=3.8"]
GGUF = ["gguf>=0.17", "accelerate>=1.0"]
DATA = ["pyarrow>=15", "pyyaml>=6"]
EVAL = ["lm-eval>=0.4.13", "openpyxl>=3.1"]  # and, without what it asks for: pip install --no-deps lmms-eval
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "python-multipart>=0.0.18"]
QUANTIZE = ["accelerate>=1.0", "bitsandbytes>=0.46.1", "torchao>=0.18"]
APP = [*SERVE, "gradio>=6.20"]
DEMO = ["scikit-learn>=1.4", "scipy>=1.11"]
TESTS = ["pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3", "hypothesis>=6.100", "transfusion-pytorch>=0.20",
         "httpx2>=2.12"]

setup(
    name="tfkernels",
    version="0.1.0",
    description="Triton kernels for Transfusion models, and Transfusion: "
                "one LLaMA-shaped model that writes text and draws images",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["tfkernels*", "transfusion*", "ptxrun*"]),
    package_data={"transfusion.recipes": ["assets/emoji/*", "assets/emoji/licences/*"]},
    install_requires=[
        "torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "numpy", "transformers>=5.17,<6", "tokenizers>=0.22",
        "diffusers>=0.35", "peft>=0.17", "safetensors>=0.5", "pillow>=10", "tqdm>=4.66", *TRAIN,
    ],
    extras_require={
        "train": DEMO,  # the data set `digits`; what training itself needs is always there
        "demo": DEMO,
        "gguf": GGUF,
        "data": DATA,
        "eval": [*DATA, *EVAL],
        "serve": SERVE,
        "quantize": QUANTIZE,
        "app": APP,
        "log": ["tensorboard>=2.20", "wandb>=0.20"],
        "dev": [*DEMO, *GGUF, *DATA, *SERVE, *TESTS, "ruff>=0.8"],
        "flash": ["flash-attn>=2.8"],
        "xformers": ["xformers>=0.0.35"],
        "liger": ["liger-kernel>=0.8"],
    },
    entry_points={
        "console_scripts": ["transfusion = transfusion.cli:main"],
        "lmms_eval.models": ["transfusion = transfusion.eval.lmms:manifests"],
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Environment :: GPU :: NVIDIA CUDA",
    ],
)
