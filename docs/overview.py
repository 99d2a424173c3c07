"""README's picture, docs/overview.png: digits that the demo drew (docs/digits.png) beside attention masks.

    python docs/overview.py
"""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tfkernels.mask.recipes import examples

DOCS = Path(__file__).parent
MASKS = (
    "Transfusion, Show-o2", "packed documents", "padding on the left",
    "window 4, images whole", "BAGEL: noised copies", "prefix-LM, Show-o mmu",
    "shared prefix", "attention sinks", "BD3-LM, halves")
SIDE, GAP, LABEL, TOP = 192, 40, 30, 60
VISIBLE, HIDDEN = (31, 104, 178), (237, 242, 248)


def digits(height: int) -> Image.Image:
    """The drawn half of docs/digits.png, without its title."""
    drawn = Image.open(DOCS / "digits.png").convert("RGB").crop((0, 38, 800, 815))
    return drawn.resize((round(drawn.width * height / drawn.height), height), Image.Resampling.LANCZOS)


def masks(columns: int) -> Image.Image:
    """The masks named above, side by side."""
    by_title, font = dict(examples()), ImageFont.load_default(19)
    grid = Image.new("RGB", (columns * (SIDE + GAP), -(-len(MASKS) // columns) * (SIDE + GAP + LABEL) - GAP), "white")
    draw = ImageDraw.Draw(grid)
    for number, title in enumerate(MASKS):
        left, top = number % columns * (SIDE + GAP), number // columns * (SIDE + GAP + LABEL)
        draw.text((left, top), title, "black", font)
        seen = by_title[title].dense()[0, 0].tolist()
        cell = SIDE // len(seen)
        for i, row in enumerate(seen):
            for j, visible in enumerate(row):
                x, y = left + j * cell, top + LABEL + i * cell
                draw.rectangle((x, y, x + cell - 2, y + cell - 2), VISIBLE if visible else HIDDEN)
    return grid


def main() -> None:
    """Write docs/overview.png."""
    right = masks(3)
    left, font = digits(right.height), ImageFont.load_default(26)
    picture = Image.new("RGB", (left.width + right.width + 60, TOP + right.height + 20), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((20, 12), "drawn from captions", "black", font)
    picture.paste(left, (0, TOP))
    draw.text((left.width + 60, 12), "what each token sees: queries down, keys across", "black", font)
    picture.paste(right, (left.width + 60, TOP))
    picture.save(DOCS / "overview.png", optimize=True)


if __name__ == "__main__":
    main()
