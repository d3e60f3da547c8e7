"""The products of rank1_linear with the gains inside: the CPU's kernels against their formulas in float64."""

import pytest
import torch

from latephase_kernels.ops import rank1_linear_products as module

OPS = torch.ops.latephase_kernels
FORMULAS = {
    OPS.rank1_product.default: module._product,
    OPS.rank1_product_backward.default: module._product_backward,
    OPS.rank1_weight_gradient.default: module._weight_gradient,
    OPS.rank1_gradients.default: module._gradients,
}
# Members, rows a member, in, out: one of each; parts of a sum, of rows and of columns, some ragged; members that share
# a group of rows, and one that is larger than a group.
SIZES = [(1, 1, 1, 1), (3, 85, 37, 33), (2, 300, 521, 97), (2, 7, 40, 1040), (70, 9, 600, 35), (3, 0, 3, 4)]

pytestmark = pytest.mark.usefixtures("poison_unwritten_memory")


def make_calls(sizes, dtype):
    """Yield every op with arguments that it takes in a layer."""
    K, rows, in_features, out_features = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((K * rows, in_features), (out_features, in_features), (K, in_features), (K, out_features))
    shapes += ((K, out_features), (K, rows, out_features))
    x, weight, s, r, bias, dy = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    s.flatten()[::5] = 0
    r.flatten()[::4] = 0
    x, weight, s, r, bias, dy = (t.to(dtype) for t in (x, weight, s, r, bias, dy))
    _, u = module._product(x, weight, True, s, r, None, True)
    product, product_backward, weight_gradient, gradients = FORMULAS
    for kept in (True, False):
        yield product, (x, weight, True, s, r, bias, kept)
        yield product, (x, weight, True, s, r, bias[0].contiguous(), kept)
        yield product, (dy, weight, False, r, s, None, kept)
        yield product_backward, (dy, x.view(K, rows, in_features), weight, s, r, u, kept)
        yield gradients, (dy, x, weight, s, r, kept)
    yield weight_gradient, (dy, x, s, r)


def run(op, arguments):
    found = op(*arguments)
    return [found] if isinstance(found, torch.Tensor) else list(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values(sizes, dtype):
    eps = torch.finfo(dtype).eps
    for op, arguments in make_calls(sizes, dtype):
        wide = [t.double() if isinstance(t, torch.Tensor) else t for t in arguments]
        for value, true in zip(run(op, arguments), run(FORMULAS[op], wide), strict=True):
            assert value.dtype == dtype
            largest = true.abs().max().item() if true.numel() else 0
            torch.testing.assert_close(value.double(), true, rtol=0, atol=64 * eps * max(1, largest))
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("sizes", [(3, 7, 1300, 700), (3, 300, 130, 170), (70, 9, 130, 170)], ids=str)
def test_threads_do_not_change_a_bit(sizes):
    for op, arguments in make_calls(sizes, torch.float32):
        torch.set_num_threads(1)
        one = run(op, arguments)
        torch.set_num_threads(2)
        for _ in range(2):
            assert all(torch.equal(*pair) for pair in zip(one, run(op, arguments), strict=True))


def test_other_members_do_not_change_a_bit():
    """A member's values come out the same whether its rows go through with few others or with many."""
    product, product_backward, *_ = FORMULAS
    K, rows = 70, 9
    x, u, s, r = torch.randn(K, rows, 600), torch.randn(K, rows, 35), torch.randn(K, 600), torch.randn(K, 35)
    weight = torch.randn(35, 600)
    for op, arguments in (
        (product, lambda some: (x[some], weight, True, s[some], r[some], r[some], True)),
        (product_backward, lambda some: (u[some], x[some], weight, s[some], r[some], u[some], False)),
    ):
        for alone, together in zip(op(*arguments(slice(2))), op(*arguments(slice(K))), strict=True):
            assert torch.equal(alone, together[:2])


def test_wrong_arguments():
    x, weight, s, r, bias = (torch.ones(*sizes) for sizes in ((6, 5), (4, 5), (3, 5), (3, 4), (3, 4)))
    product, product_backward, weight_gradient, gradients = FORMULAS
    wrong = [
        ("input must be float32 or float64", product, (x.bfloat16(), weight, True, s, r, bias, True)),
        (r"input must be \[K·B, …, in\]", product, (x[:5], weight, True, s, r, bias, True)),
        ("weight must be contiguous, .4, 5.", product, (x, weight.t().contiguous().t(), True, s, r, bias, True)),
        ("weight must have input's type", product, (x, weight.double(), True, s, r, bias, True)),
        ("output's gain must be contiguous, .3, 4.", product, (x, weight, True, s, s, bias, True)),
        ("bias must be contiguous, .4.", product, (x, weight, True, s, r, bias[0, :3], True)),
        ("bias must be contiguous, .3, 4.", product, (x, weight, True, s, r, bias[:2], True)),
        ("output's gradient must be contiguous, .6, …, 4.", gradients, (x, x, weight, s, r, True)),
        ("output's gradient must be contiguous, .6, …, 4.", weight_gradient, (x[:3], x, s, r)),
        ("product must be contiguous, .6, …, 4.", product_backward, (x[:, :4].contiguous(), x, weight, s, r, x, True)),
        ("output_gain must have two dimensions", weight_gradient, (x, x, s, r[0])),
    ]
    for message, op, arguments in wrong:
        with pytest.raises(RuntimeError, match="rank1_linear: " + message):
            op(*arguments)
