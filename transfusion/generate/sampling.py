"""The options of sampling, each written once: Python calls take them as keywords, the command line as flags."""
from dataclasses import dataclass, fields
from typing import Annotated

from tyro.conf import Suppress, arg

from transfusion.diffusion.guidance import Guidance, Scale
from transfusion.diffusion.solvers import SOLVERS
from transfusion.settings import Count, NotNegative, OneOf, Range, Share, WholeNumber, check, nearest, shown

LONGEST_STOP = 256  # characters of a text that ends a row: what was written is compared with all of it at each token
OF_TEXT = ("max_images", "max_new_tokens", "temperature", "top_p", "min_p", "stop")
"""options that say nothing where one image is drawn in any case"""
RowSeed = Annotated[int, Range(-2**63, 2**64 - 1)]  # what torch.Generator takes


@dataclass(frozen=True)
class TextSampling:
    """How to write."""

    max_new_tokens: WholeNumber = 64
    """text tokens written for each prompt at most"""
    temperature: NotNegative = 0.0
    """of the text: 0 takes the likeliest token, larger values sample"""
    top_p: Share = 1.0
    """sample text from the smallest set of tokens that holds this much probability (arXiv:1904.09751)"""
    min_p: Share = 0.0
    """sample only tokens at least this many times as likely as the likeliest (arXiv:2407.01082)"""
    stop: tuple[str, ...] | None = None
    """texts of up to 256 characters each; what is written ends before the first that appears"""
    seed: RowSeed = 0
    """of noise and text: prompt i draws its random numbers from seed + i, whatever the rest of the batch is"""
    turn_end: Suppress[str] = ""
    """text that ends a turn in the prompt's chat template, at which what is written ends as at `stop`; "": EOS alone"""
    turn_spaces: Suppress[bool] = False
    """leave out a space in front of what is written and one behind it: the template's, which the model writes, too"""

    def __post_init__(self):
        check("generate", self)
        if not all(0 < len(stop) <= LONGEST_STOP for stop in self.stop or ()):
            raise ValueError(f"generate: stop is {shown(self.stop)}; texts, none of them empty, fit, "
                             f"of at most {LONGEST_STOP} characters each")


@dataclass(frozen=True)
class Sampling(TextSampling):
    """How to go on from a prompt, in text and images."""

    max_images: WholeNumber = 1
    """images drawn for each prompt at most; then BOI is not sampled any more"""
    image_size: Annotated[tuple[Count, Count] | None, arg(name="size")] = None
    """height and width of drawn images, of their latents where there is an autoencoder; by default the model's own"""
    steps: Count = 50
    """denoising steps of each image (the paper: 250, of a model trained with 1000)"""
    sampler: Annotated[str, OneOf(SOLVERS)] = "ddim"
    """the solver: ddim (on the straight path: Euler's method), dpm++, unipc or heun"""
    guidance: Annotated[Guidance | Scale, arg(name="")] = Guidance()
    """a `Guidance`, or its scale of the prompt alone; a scale of 1 is no guidance, and then no other rows are run"""
    previews: Suppress[bool] = False
    """make a `Preview` after each denoising step; each one waits for the device"""
    cuda_graph: bool = False
    """replay the denoising step as a CUDA graph, captured for each image anew"""

    def of_one_image(self) -> dict:
        """The options of one image that is drawn in any case: all but how much the model may write and draw."""
        return {name: value for name, value in vars(self).items() if name not in ("max_new_tokens", "max_images")}

    def check_one_image(self, op: str, advice: str) -> None:
        """Refuse options of text in a command that draws one image for each prompt in any case.

        Raises:
            ValueError: one is not its default; the message ends with the advice.
        """
        for name in OF_TEXT:
            value = getattr(self, name)
            if value != getattr(Sampling, name):
                raise ValueError(f"{op}: {name} is {shown(value)}, and one image is drawn and nothing written; "
                                 f"{advice}")

    @classmethod
    def of(cls, options: dict) -> "Sampling":
        """Make one of keyword arguments; a name that is not one is answered with the nearest."""
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                raise ValueError(f"generate: {name} is not an option; {', '.join(names)} fit{nearest(name, names)}")
        return cls(**options)
