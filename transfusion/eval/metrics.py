"""Distances between sets of features and between pictures.

    Frechet distance   ||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))
                       (arXiv:1706.08500, equation 6)
    kernel distance    mean k(a, a') + mean k(b, b') - 2 mean k(a, b), k(x, y) = (x . y / width + 1)^3, over pairs of
                       different rows: unbiased (arXiv:1801.01401, equation 4)
    precision          share of drawn features inside the k-nearest-neighbour balls of the real ones
    recall             share of real features inside the balls of the drawn ones
                       (arXiv:1904.06991, equations 1, 2)
    PSNR               10 log10(peak^2 / mean squared error), the peak 2
    SSIM               mean of (2 mu_a mu_b + C1)(2 s_ab + C2) / ((mu_a^2 + mu_b^2 + C1)(s_a^2 + s_b^2 + C2))
                       (Wang et al. 2004, equation 13)

With centred rows A = Q_a R_a and B = Q_b R_b, over the root of their count less one, the eigenvalues of S_a S_b =
R_a^T R_a R_b^T R_b are the squares of the singular values of R_a R_b^T: the last trace is their sum, and covariances
of any rank fit without a root of a matrix.
"""
from typing import NamedTuple

import torch
from torch import Tensor

WINDOW, SIGMA, K1, K2, PEAK = 11, 1.5, 0.01, 0.03, 2.0  # Wang et al. 2004, section III-B and III-C; pictures in [-1, 1]
EXACT = "donot_use_mm_for_euclid_dist"  # equal rows are at a distance of exactly 0
SPARE, DOUBT = 8, 1e-6  # neighbours beside those asked for, and a share of squared norms: a product rounds, and where
# that could decide, differences do


class PrecisionRecall(NamedTuple):
    """How much of what is drawn looks real, and how much of what is real is drawn."""

    precision: float
    recall: float


class KernelDistance(NamedTuple):
    """The mean over subsets, the deviation among them, and the mean's own: deviation / sqrt(subsets)."""

    distance: float
    deviation: float
    standard_error: float


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of the Gaussians that fit features a (N, F) and b (M, F), in float64.

    Covariances are over N - 1 and M - 1.

    Raises:
        ValueError: fewer than 2 rows, widths that differ, or values that are not finite.
    """
    _check_features("frechet_distance", 2, a=a, b=b)
    (mean_a, root_a), (mean_b, root_b) = _mean_and_root(a.double()), _mean_and_root(b.double())
    traces = root_a.square().sum() + root_b.square().sum() - 2 * torch.linalg.svdvals(root_a @ root_b.mT).sum()
    return ((mean_a - mean_b).square().sum() + traces.clamp(min=0)).item()


def kernel_distance(a: Tensor, b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> KernelDistance:
    """Return the kernel distance of features a (N, F) and b (M, F): a mean over random subsets, in float64.

    Each subset takes `size` rows of both without replacement, or as many as the smaller set has. The standard error is
    that of the subsets' mean given these rows; the rows' own sampling is not in it.

    Raises:
        ValueError: fewer than 2 rows, subsets or rows in one, widths that differ, or values that are not finite.
    """
    for name, value in (("subsets", subsets), ("size", size)):
        if value < 2:
            raise ValueError(f"kernel_distance: {name} is {value}; 2 or more fit")
    _check_features("kernel_distance", 2, a=a, b=b)
    rows, generator = min(size, len(a), len(b)), torch.Generator().manual_seed(seed)
    found = torch.tensor([_kernel_distance(*(x[torch.randperm(len(x), generator=generator)[:rows]].double()
                                             for x in (a, b))) for _ in range(subsets)], dtype=torch.float64)
    deviation = found.std().item()
    return KernelDistance(found.mean().item(), deviation, deviation / subsets**0.5)


def precision_recall(real: Tensor, drawn: Tensor, k: int = 3) -> PrecisionRecall:
    """Return improved precision and recall of drawn (M, F) against real (N, F) features.

    A ball reaches its centre's k-th nearest other feature.

    Distances are taken 500 rows at a time: 10,000 against 10,000 features need some 200 MB beside the features.

    Raises:
        ValueError: no more than k rows, k below 1, widths that differ, or values that are not finite.
    """
    if k < 1:
        raise ValueError(f"precision_recall: k is {k}; 1 or more neighbours fit")
    _check_features("precision_recall", k + 1, real=real, drawn=drawn)
    real, drawn = real.float(), drawn.float()
    return PrecisionRecall(_covered(drawn, real, _radii(real, k)), _covered(real, drawn, _radii(drawn, k)))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (N,) in dB of pictures (N, C, H, W) in [-1, 1]; infinity for equal ones."""
    _check_pictures("psnr", a, b)
    return 10 * torch.log10(PEAK**2 / (a.double() - b.double()).square().mean((1, 2, 3))).float()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean structural similarity (N,) of pictures (N, C, H, W) in [-1, 1].

    The mean is over channels and every whole window.

    The window is the paper's Gaussian of 11x11 and 1.5 pixels; where a side is below 11, its width is the largest odd
    number that fits: on 8x8 pictures it is 7x7, so that values compare among pictures of one size only. Intensities
    are the pixels plus 1: black is 0, as in the paper.
    """
    _check_pictures("ssim", a, b)
    width = min(WINDOW, *(side - (side + 1) % 2 for side in a.shape[-2:]))
    distance = torch.arange(width, dtype=torch.float64, device=a.device) - width // 2
    curve = torch.exp(-distance.square() / (2 * SIGMA**2))
    window = torch.outer(curve, curve)[None, None] / curve.sum().square()

    def local_mean(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x.flatten(0, 1)[:, None], window)

    a, b = a.double() + 1, b.double() + 1  # the paper's intensities start at 0, and luminance is compared by ratios
    mean_a, mean_b = local_mean(a), local_mean(b)
    variance_a, variance_b = local_mean(a * a) - mean_a.square(), local_mean(b * b) - mean_b.square()
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    bound = (mean_a.square() + mean_b.square() + c1) * (variance_a + variance_b + c2)
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / bound
    return similarity.view(len(a), -1).mean(1).float()


def _kernel_distance(a: Tensor, b: Tensor) -> float:
    """The unbiased estimate of two sets of as many rows."""
    rows = len(a)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.mT / x.shape[1] + 1) ** 3

    own = sum((k.sum() - k.diagonal().sum()) / (rows * (rows - 1)) for k in (kernel(a, a), kernel(b, b)))
    return (own - 2 * kernel(a, b).mean()).item()


def _mean_and_root(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and a root R (min(N, F), F) of the covariance: R^T R."""
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R


def _radii(x: Tensor, k: int, rows: int = 500) -> Tensor:
    """Distance (N,) of each feature to its k-th nearest other one; the nearest of all is the feature itself."""
    found = []
    for chunk in x.split(rows):
        squares, _ = _squares(chunk, x)
        nearest = squares.topk(min(k + 1 + SPARE, len(x)), largest=False).indices
        found.append(_exact(chunk[:, None], x[nearest]).squeeze(1).kthvalue(k + 1).values)
    return torch.cat(found)


def _covered(points: Tensor, centres: Tensor, radii: Tensor, rows: int = 500) -> float:
    """Share of points that lie in at least one ball, its surface included."""
    inside = []
    for chunk in points.split(rows):
        squares, error = _squares(chunk, centres)
        beyond = squares - radii.double().square()
        found = (beyond < -error).any(1)
        doubtful = ((beyond <= error) & ~found[:, None]).nonzero()
        for pairs in doubtful.split(10_000):
            distances = _exact(chunk[pairs[:, 0], None], centres[pairs[:, 1], None]).flatten()
            found[pairs[distances <= radii[pairs[:, 1]], 0]] = True
        inside.append(found)
    return torch.cat(inside).double().mean().item()


def _squares(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (N, M) by a product in float64, which is fast, and how far (N, M) they may be off."""
    a, b = a.double(), b.double()
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    squares = torch.addmm(norms, a, b.mT, alpha=-2)
    return squares, DOUBT * norms


def _exact(a: Tensor, b: Tensor) -> Tensor:
    """Distances (..., N, M) by differences, the same for a pair whatever stands beside it."""
    return torch.cdist(a, b, compute_mode=EXACT)


def _check_features(where: str, rows: int, **features: Tensor) -> None:
    for name, x in features.items():
        if x.ndim != 2 or len(x) < rows:
            raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}; (rows, width) with {rows} rows or more fits")
        if not torch.isfinite(x).all():
            raise ValueError(f"{where}: {name} has {int((~torch.isfinite(x)).sum())} values that are not finite; "
                             "finite features fit")
    (name, x), (other, y) = features.items()
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{where}: {name} is {x.shape[1]} wide and {other} {y.shape[1]}; features of one width fit; "
                         "take both from one classifier")


def _check_pictures(where: str, a: Tensor, b: Tensor) -> None:
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"{where}: a has shape {tuple(a.shape)} and b {tuple(b.shape)}; two equal shapes (N, C, H, "
                         "W) fit")
