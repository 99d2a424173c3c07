"""Draw the masks of `tfkernels.mask.recipes`: in the terminal, and as one picture with --out (needs matplotlib).

    python -m tfkernels.mask
    python -m tfkernels.mask --out masks.png
"""
import argparse

from tfkernels.mask.recipes import Example, examples


def main() -> None:
    """Print every example; write them to --out as well where it is given."""
    parser = argparse.ArgumentParser(prog="python -m tfkernels.mask",
                                     description="Draw attention masks: queries down, keys across.")
    parser.add_argument("--out", metavar="FILE", help="also write a picture there, e.g. masks.png (needs matplotlib)")
    arguments = parser.parse_args()
    for example in examples():
        print(text(example), end="\n\n")
    if arguments.out:
        picture(examples(), arguments.out)
        print(f"wrote {arguments.out}")


def text(example: Example) -> str:
    """Return the mask with two characters for each pair of a query and a key."""
    rows = example.mask.dense()[0, 0].tolist()
    return "\n".join([example.title, *("".join("██" if seen else "· " for seen in row) for row in rows)])


def picture(chosen: list[Example], path: str) -> None:
    """Draw the masks side by side into the file `path`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 6
    rows = -(-len(chosen) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(2.2 * columns, 2.35 * rows), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, mask) in zip(axes.flat, chosen):
        seen = mask.dense()[0, 0]
        axis.set_axis_on()
        axis.pcolormesh(seen.flip(0).float(), cmap="Blues", vmin=0, vmax=1.3, edgecolors="white", linewidth=0.5)
        axis.set(title=title, aspect="equal", xticks=[], yticks=[])
        axis.title.set_fontsize(9)
    axes[0, 0].set_ylabel("query", fontsize=8)
    axes[0, 0].set_xlabel("key", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
