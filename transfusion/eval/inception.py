"""The Inception network of FID: TensorFlow's of 2015-12-05, whose weights pytorch-fid and torch-fidelity share.

Its file is pt_inception-2015-12-05-6726825d.pth (pytorch-fid) or weights-inception-2015-12-05-6726825d.pth
(torch-fidelity), one file under two names: it ends with the first digits of its SHA-256, and by these it is known.
The network is Inception v3 (arXiv:1512.00567) but for its pooling branches: averages leave the padding out, and the
last one takes the maximum, as TensorFlow's graph does.
"""
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transfusion.eval.results import weights_hash

FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
FID_HASH, SIDE, WIDTH = "6726825d", 299, 2048

average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halved = partial(F.max_pool2d, kernel_size=3, stride=2)


class Convolution(nn.Module):
    """Convolution, batch norm and ReLU; kernels keep the size but for those with a stride of 2."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        padding = tuple(side // 2 if pad and stride == 1 else 0 for side in kernel)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H', W')."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side: each a list of steps, and a step one convolution or two whose outputs are joined.

    Args:
        inputs: channels.
        branches: of each branch its steps, of each step {name: (channels, kernel, stride)}.
        pool: the pooling of the last branch.
        pooled: channels of the convolution behind it, None: there is none.
    """

    def __init__(self, inputs: int, branches: list[list[dict]], pool: Callable, pooled: int | None):
        super().__init__()
        self.names = [[list(step) for step in branch] for branch in branches]
        self.pool, self.has_convolution = pool, pooled is not None
        for branch in branches:
            width = inputs
            for step in branch:
                for name, (outputs, kernel, stride) in step.items():
                    self.add_module(name, Convolution(width, outputs, kernel, stride))
                width = sum(outputs for outputs, _, _ in step.values())
        if pooled is not None:
            self.branch_pool = Convolution(inputs, pooled, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, sum of the branches' channels, H', W')."""
        found = []
        for branch in self.names:
            y = x
            for step in branch:
                y = torch.cat([getattr(self, name)(y) for name in step], 1)
            found.append(y)
        pooled = self.pool(x)
        return torch.cat([*found, self.branch_pool(pooled) if self.has_convolution else pooled], 1)


class Inception(nn.Module):
    """The network up to its last pooling: 2,048 features of a picture of 299x299."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(128), _c(160), _c(160), _c(192)
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, average), _e(2048, maximum)

    @classmethod
    def from_file(cls, path: Path) -> "Inception":
        """Load the file of weights, without its head.

        Raises:
            ValueError: a file that holds other weights, or more than tensors.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            network = cls()
            network.load_state_dict({name: x for name, x in state.items() if not name.startswith("fc.")})
        except Exception as error:  # unpickling raises of many kinds
            raise ValueError(f"Inception.from_file: path is {str(path)!r}, which holds no weights of Inception "
                             f"({str(error).splitlines()[0]}); {' or '.join(FILES)} fits") from error
        return network.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (N, 3, 299, 299) in [-1, 1] to features (N, 2048); the network sees (pixel - 128) / 128."""
        x = (pictures * 127.5 - 0.5) / 128
        x = halved(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = halved(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def inception_file(path: Path | None = None) -> Path:
    """Return the file of weights: `path`, or the one in the cache of torch.hub.

    Raises:
        ValueError: there is none.
    """
    places = [Path(torch.hub.get_dir()) / "checkpoints" / name for name in FILES] if path is None else [Path(path)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(f"inception_file: {' and '.join(map(str, places))} are not there; {' or '.join(FILES)} fits")
    return found


def is_fid_file(path: Path) -> bool:
    """Whether a file is that of FID's weights, by its SHA-256."""
    return weights_hash(path).startswith(FID_HASH)


def _chain(**steps: tuple) -> list[dict]:
    """A branch of convolutions one behind the other."""
    return [{name: _step(*step)} for name, step in steps.items()]


def _step(outputs: int, height: int = 1, width: int = 1, stride: int = 1) -> tuple:
    return outputs, (height, width), stride


def _a(inputs: int, pooled: int) -> Mixed:
    return Mixed(inputs, [
        _chain(branch1x1=(64,)), _chain(branch5x5_1=(48,), branch5x5_2=(64, 5, 5)),
        _chain(branch3x3dbl_1=(64,), branch3x3dbl_2=(96, 3, 3), branch3x3dbl_3=(96, 3, 3))], average, pooled)


def _b(inputs: int) -> Mixed:
    return Mixed(inputs, [
        _chain(branch3x3=(384, 3, 3, 2)),
        _chain(branch3x3dbl_1=(64,), branch3x3dbl_2=(96, 3, 3), branch3x3dbl_3=(96, 3, 3, 2))], halved, None)


def _c(inner: int) -> Mixed:
    return Mixed(768, [
        _chain(branch1x1=(192,)),
        _chain(branch7x7_1=(inner,), branch7x7_2=(inner, 1, 7), branch7x7_3=(192, 7, 1)),
        _chain(branch7x7dbl_1=(inner,), branch7x7dbl_2=(inner, 7, 1), branch7x7dbl_3=(inner, 1, 7),
               branch7x7dbl_4=(inner, 7, 1), branch7x7dbl_5=(192, 1, 7))], average, 192)


def _d(inputs: int) -> Mixed:
    return Mixed(inputs, [
        _chain(branch3x3_1=(192,), branch3x3_2=(320, 3, 3, 2)),
        _chain(branch7x7x3_1=(192,), branch7x7x3_2=(192, 1, 7), branch7x7x3_3=(192, 7, 1),
               branch7x7x3_4=(192, 3, 3, 2))], halved, None)


def _e(inputs: int, pool: Callable) -> Mixed:
    def fork(name: str) -> dict:
        return {f"{name}a": _step(384, 1, 3), f"{name}b": _step(384, 3, 1)}

    return Mixed(inputs, [
        _chain(branch1x1=(320,)), [*_chain(branch3x3_1=(384,)), fork("branch3x3_2")],
        [*_chain(branch3x3dbl_1=(448,), branch3x3dbl_2=(384, 3, 3)), fork("branch3x3dbl_3")]], pool, 192)
