"""Load a checkpoint and use it: draw from captions, caption images, and let the model write and draw as it sees fit.

    make demo && python examples/sample.py runs/digits

Runs on the CPU or, where there is one, on a CUDA GPU.
"""
import sys
from pathlib import Path

import torch

from transfusion import Image, Text, Transfusion
from transfusion.data.model_images import save_image


def main(checkpoint: Path, out: Path = Path("samples"), steps: int = 25) -> list[str]:
    """Save what is drawn in `out`; return the captions that the model writes of it."""
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Transfusion.from_pretrained(checkpoint).eval().to(device)

    # one image for each prompt, all of them denoised together
    prompts = ["a handwritten three", "a handwritten seven", "a handwritten nine"]
    images = model.draw(prompts, steps=steps, guidance=2.0, seed=1)
    for prompt, image in zip(prompts, images):
        save_image(image, out / f"{prompt}.png", model.vae)

    # what the model writes of images
    captions = model.caption(images)
    for prompt, caption in zip(prompts, captions):
        print(f"asked for {prompt!r}, captioned {caption.strip()!r}")

    # text and images in turn: the model begins an image by writing a token, and ends by writing another
    for part in model.generate([Text("a handwritten two")], max_images=2, steps=steps, temperature=1.0):
        print("an image" if isinstance(part, Image) else f"the text {part.text!r}")

    # the same as it happens
    for event in model.stream([Text("a handwritten four")], max_images=1, steps=steps):
        print(type(event).__name__)
    return captions


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits"))
