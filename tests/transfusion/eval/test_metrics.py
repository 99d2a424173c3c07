"""Measures of features and pictures against scipy, closed forms and plain loops."""
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.ndimage import gaussian_filter
from sklearn.metrics.pairwise import polynomial_kernel

from transfusion.eval.metrics import frechet_distance, kernel_distance, precision_recall, psnr, ssim


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scipy_frechet(a, b):
    a, b = a.numpy(), b.numpy()
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariance_a + covariance_b - 2 * root)


def with_moments(rows, mean, root):
    """Rows whose sample mean is `mean` and whose sample covariance is root^T root, exactly."""
    x = normal(rows, len(mean), seed=3)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.mT @ x / (rows - 1)), x.mT, upper=False).mT
    return mean + white @ root


@pytest.mark.parametrize("rows,others,width", [(50, 70, 5), (200, 90, 40), (3000, 2000, 16)])
def test_the_frechet_distance_is_scipys_where_covariances_have_full_rank(rows, others, width):
    a, b = normal(rows, width) @ normal(width, width, seed=1), normal(others, width, seed=2) + 0.3
    assert frechet_distance(a, b) == pytest.approx(scipy_frechet(a, b), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_the_frechet_distance_of_diagonal_gaussians_has_its_closed_form():
    deviations, others = torch.tensor([1.0, 2.0, 0.5, 0.0]).double(), torch.tensor([3.0, 2.0, 0.0, 0.0]).double()
    mean = torch.tensor([0.5, -1.0, 0.0, 2.0]).double()
    a, b = with_moments(40, torch.zeros(4).double(), deviations.diag()), with_moments(30, mean, others.diag())
    assert frechet_distance(a, b) == pytest.approx((mean.square().sum() + (deviations - others).square().sum()).item(),
                                                   rel=1e-12)
    shifted = frechet_distance(a, a + 2)
    assert shifted == pytest.approx(4 * 4, rel=1e-12)


def test_the_frechet_distance_of_features_wider_than_many_is_that_of_their_span():
    """Rotating both sets into more dimensions changes nothing, though both covariances are singular then.

    A set is at 0 from itself.
    """
    a, b = normal(30, 6), normal(20, 6, seed=1) * 2 + 1
    turn = torch.linalg.qr(normal(100, 100, seed=2)).Q[:6]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(scipy_frechet(a, b), rel=1e-10)
    wide = normal(5, 300, seed=4)
    assert 0 <= frechet_distance(wide, wide) < 1e-10 and 0 <= frechet_distance(wide, wide.flip(0)) < 1e-10
    assert frechet_distance(torch.zeros(3, 4), torch.ones(2, 4)) == 4


def test_features_that_do_not_fit_are_refused_by_name():
    good = normal(4, 3)
    for bad, what in [(good[:1], r"a has shape \(1, 3\)"), (good[0], r"a has shape \(3,\)"),
                      (normal(4, 2), "a is 2 wide and b 3"),
                      (good / 0 * (good > 0), "a has .* values that are not finite")]:
        with pytest.raises(ValueError, match=f"frechet_distance: {what}"):
            frechet_distance(bad, good)
    with pytest.raises(ValueError, match=r"precision_recall: drawn has shape \(4, 3\); \(rows, width\) with 5 rows"):
        precision_recall(normal(9, 3), good, k=4)
    with pytest.raises(ValueError, match="k is 0"):
        precision_recall(good, good, k=0)


def scikit_kernel_distance(a, b):
    """The unbiased estimate of arXiv:1801.01401, equation 4, by scikit-learn's kernel, pair by pair."""
    m, n, kernels = len(a), len(b), [polynomial_kernel(x, y, degree=3, coef0=1) for x, y in ((a, a), (b, b), (a, b))]
    own = sum(kernels[0][i, j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    other = sum(kernels[1][i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return own + other - 2 * kernels[2].mean()


def test_the_kernel_distance_of_all_rows_is_that_of_scikit_learns_kernel():
    a, b = normal(30, 6), normal(30, 6, seed=1) * 1.5 + 0.3
    found = kernel_distance(a, b, subsets=3)
    assert found.distance == pytest.approx(scikit_kernel_distance(a, b), rel=1e-12)
    assert found.deviation < 1e-12, "each subset is all rows"


def test_the_kernel_distance_is_the_mean_of_random_subsets_with_its_standard_error():
    a, b = normal(200, 4), normal(150, 4, seed=1) + 0.2
    found = kernel_distance(a, b, subsets=50, size=40, seed=3)
    generator, each = torch.Generator().manual_seed(3), []
    for _ in range(50):
        rows = [torch.randperm(len(x), generator=generator)[:40] for x in (a, b)]
        each.append(scikit_kernel_distance(a[rows[0]], b[rows[1]]))
    assert found.distance == pytest.approx(np.mean(each), rel=1e-10)
    assert found.deviation == pytest.approx(np.std(each, ddof=1), rel=1e-10)
    assert found.standard_error == pytest.approx(np.std(each, ddof=1) / 50**0.5, rel=1e-10)
    assert kernel_distance(a, b, subsets=50, size=40, seed=3) == found != kernel_distance(a, b, subsets=50, size=40)


def test_the_kernel_distance_of_sets_of_one_kind_is_zero_but_for_its_error():
    a, b = normal(2000, 8), normal(2000, 8, seed=1)
    assert abs(kernel_distance(a, b, 20, 500).distance) < 0.01 < kernel_distance(a, b + 0.5, 20, 500).distance
    with pytest.raises(ValueError, match="kernel_distance: size is 1; 2 or more fit"):
        kernel_distance(normal(5, 2), normal(5, 2), size=1)
    with pytest.raises(ValueError, match="kernel_distance: b has shape"):
        kernel_distance(normal(5, 2), normal(1, 2))


def plain_coverage(points, centres, k):
    """A loop over points and balls."""
    inside = 0
    for point in points:
        found = False
        for i, centre in enumerate(centres):
            radius = sorted(math.dist(centre, other) for j, other in enumerate(centres) if j != i)[k - 1]
            found = found or math.dist(point, centre) <= radius
        inside += found
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_those_of_a_plain_loop(k):
    real, drawn = normal(25, 4), 0.7 * normal(31, 4, seed=1) + 0.5
    ours = precision_recall(real, drawn, k=k)
    assert ours == (plain_coverage(drawn.tolist(), real.tolist(), k), plain_coverage(real.tolist(), drawn.tolist(), k))
    assert 0 < ours.precision < 1 and 0 < ours.recall < 1 and ours.precision != ours.recall


def test_precision_and_recall_of_sets_whose_answer_is_known():
    real = normal(2100, 8)  # more rows than a chunk
    assert precision_recall(real, real.flip(0)) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    collapsed = real[:1] + 1e-4 * normal(50, 8, seed=1)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1 and recall <= 1 / 2100
    assert precision_recall(real, real[:1].repeat(50, 1)) == (1, 1 / 2100)


def test_rows_that_are_equal_or_near_each_other_far_from_the_origin_are_told_apart():
    """Squared norms are 1e4 and distances 1e-4: products of float32 would see no difference."""
    real, drawn = (1e-4 * normal(40, 4, seed=seed).round(decimals=2) + 50 for seed in (5, 6))
    drawn[:8], real[10:16] = real[:8], real[9]
    for a, b in ((real, drawn), (drawn, real)):
        exact = [x.float().double().tolist() for x in (a, b)]
        assert precision_recall(a, b).precision == plain_coverage(exact[1], exact[0], 3)
    assert precision_recall(real, real) == (1, 1)
    equal = torch.ones(700, 3)
    assert precision_recall(equal, equal) == (1, 1) and precision_recall(equal, equal + 1) == (0, 0)


def test_psnr_of_known_errors():
    a = torch.zeros(3, 1, 4, 4)
    assert psnr(a, a + torch.tensor([0.2, 2.0, 0.0]).view(3, 1, 1, 1)).tolist() == pytest.approx([20, 0, math.inf])
    b = torch.rand(2, 3, 5, 6)
    assert psnr(b, -b).tolist() == pytest.approx([10 * math.log10(4 / np.mean(np.square(2 * x.double().numpy())))
                                                  for x in b])


def plain_ssim(a, b, radius):
    """Wang et al.'s map of 8-bit intensities by scipy's Gaussian filter, cut to where the window is whole.

    Arrays are (C, H, W) in [-1, 1].
    """
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def local(x):
        return gaussian_filter(x, 1.5, radius=radius, mode="constant")[radius:x.shape[0] - radius,
                                                                       radius:x.shape[1] - radius]

    values = []
    for x, y in zip((a + 1) * 127.5, (b + 1) * 127.5):
        mx, my = local(x), local(y)
        sx, sy, sxy = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
        values.append(((2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2))).mean())
    return np.mean(values)


@pytest.mark.parametrize("shape,radius",
                         [((3, 1, 32, 32), 5), ((2, 3, 16, 24), 5), ((2, 1, 11, 11), 5), ((2, 1, 8, 8), 3),
                          ((2, 3, 9, 40), 4)])
def test_ssim_is_that_of_scipys_gaussian_filter(shape, radius):
    a = torch.tanh(normal(*shape)).float()
    b = (0.8 * a + 0.2 * torch.tanh(normal(*shape, seed=1)) + 0.05).float()
    expected = [plain_ssim(x, y, radius) for x, y in zip(a.double().numpy(), b.double().numpy())]
    assert ssim(a, b).tolist() == pytest.approx(expected, rel=1e-5)
    assert ssim(a, a).tolist() == pytest.approx([1] * len(a)) and all(ssim(a, b) < 1) and all(ssim(a, -a) < 0)


def test_pictures_of_different_shapes_are_refused():
    for measure in (psnr, ssim):
        with pytest.raises(ValueError, match=r"a has shape \(1, 1, 8, 8\) and b \(1, 3, 8, 8\)"):
            measure(torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8))
