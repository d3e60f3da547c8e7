"""rank1_linear against float64 F.linear with every member's own weight. K members, B rows a member."""

import itertools

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import latephase_kernels as lp
from latephase_kernels.ops import rank1_linear as module
from latephase_kernels.ops import rank1_linear_by_rows as by_rows
from latephase_kernels.ops import rank1_linear_folded as folded
from latephase_kernels.ops import rank1_linear_tiled as tiled
from latephase_kernels.ops import rank1_linear_tiled_rows as tiled_rows

rank1_linear = lp.functional.rank1_linear
NAMES = ("x", "weight", "s", "r", "bias")

pytestmark = pytest.mark.usefixtures("poison_unwritten_memory")

WAYS = {"folded": folded, "by rows": by_rows, "tiled": tiled, "tiled rows": tiled_rows}


def choose(monkeypatch, way):
    """The same way for every shape, whatever the rule would choose; by rows where it cannot take the type."""

    def chosen(x, weight, num_members, dtype=None):
        can = WAYS[way] in (folded, by_rows) or (dtype or x.dtype) in (torch.float32, torch.float64)
        return WAYS[way] if can else by_rows

    monkeypatch.setattr(module, "_way", chosen)


@pytest.fixture(
    params=[
        "folded",
        "folded one by one",
        "by rows",
        "by rows one by one",
        "by rows without kernels",
        "tiled",
        "tiled rows",
    ],
)
def way(request, monkeypatch):
    """Every way for every shape; members together and one after the other."""
    choose(monkeypatch, request.param.removesuffix(" one by one").removesuffix(" without kernels"))
    if request.param.endswith("one by one"):
        monkeypatch.setattr(folded, "_CACHED_VALUES", 1)
    lp.set_backend("reference" if request.param.endswith("without kernels") else "auto")
    yield
    lp.set_backend("auto")


def make_inputs(leading, K, in_features, out_features, *, bias="shared", dtype=torch.float64, parameters=None):
    """Leading dimensions [K·B, …]; gains of both signs, some exactly zero."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    s, r = normal(K, in_features), normal(K, out_features)
    s.flatten()[::5] = 0
    r.flatten()[::4] = 0
    biases = {"none": None, "shared": normal(out_features), "per member": normal(K, out_features)}
    inputs = {"x": normal(*leading, in_features), "weight": normal(out_features, in_features), "s": s, "r": r}
    inputs |= {"bias": biases[bias], "dy": normal(*leading, out_features)}
    types = {name: dtype if name in ("x", "dy") else parameters or dtype for name in inputs}
    return {name: None if t is None else t.to(types[name]) for name, t in inputs.items()}


def run(function, inputs, *, dtype=None):
    """Call function and run backward; return the output and every gradient; dtype: convert everything first."""
    leaves = {n: None if t is None else t.detach().to(dtype or t.dtype, copy=True) for n, t in inputs.items()}
    dy = leaves.pop("dy")
    for leaf in leaves.values():
        if leaf is not None:
            leaf.requires_grad_()
    y = function(*leaves.values())
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{n}": leaf.grad for n, leaf in leaves.items() if leaf is not None}}


def by_member(x, weight, s, r, bias=None):
    """The truth: each member's slice through F.linear with its own weight."""
    biases = [None] * len(s) if bias is None else bias.to(x.dtype).expand(len(s), -1)
    own = ((weight * r_k.unsqueeze(1) * s_k).to(x.dtype) for s_k, r_k in zip(s, r))
    return torch.cat([F.linear(x_k, w_k, b_k) for x_k, w_k, b_k in zip(x.chunk(len(s)), own, biases)])


def naive(x, weight, s, r, bias=None):
    """What a user writes: the formula with broadcast gains, each operation rounded to x's type."""
    shape = (len(s), x.size(0) // len(s), *x.shape[1:])

    def gains(gain):
        return gain.to(x.dtype).view(len(s), *[1] * (x.dim() - 1), -1)

    y = F.linear((x.view(shape) * gains(s)), weight.to(x.dtype)) * gains(r)
    if bias is not None:
        y = y + (gains(bias) if bias.dim() == 2 else bias.to(x.dtype))
    return y.flatten(0, 1)


def compare(inputs):
    """At most twice PyTorch's own error on the same inputs, plus one output rounding at the tensor's scale.

    Its own: the larger of what its two ways lose, gains over the rows and gains in the weights.
    In float64 there is no truer truth than PyTorch's own result: there, 64 roundings.
    """
    result, truth = run(rank1_linear, inputs), run(by_member, inputs, dtype=torch.float64)
    plain = [run(naive, inputs), run(by_member, inputs)]
    assert result.keys() == truth.keys()
    for name, value in result.items():
        assert value.dtype == (inputs["x"].dtype if name == "y" else inputs[name[1:]].dtype)
        assert value.shape == truth[name].shape
        error, *others = ((t[name].double() - truth[name]).abs().max().item() for t in (result, *plain))
        own = max(others)
        roundings = 64 if value.dtype == torch.float64 else 1
        allowed = 2 * own + roundings * torch.finfo(value.dtype).eps * truth[name].abs().max().item()
        assert error <= allowed, f"{name}: {error}, PyTorch: {own}"


SHAPES = [  # leading dimensions, K, in, out: one member, one row, odd everything, tokens, one feature on either side
    ((4,), 1, 3, 5),
    ((3,), 3, 7, 2),
    ((6, 5), 2, 33, 17),
    ((10, 2, 3), 5, 8, 16),
    ((6,), 3, 1, 9),
    ((6,), 3, 9, 1),
    ((402,), 2, 67, 35),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", ["none", "shared", "per member"])
def test_values_and_gradients(shape, bias, way):
    for dtype in (torch.float64, torch.float32):
        compare(make_inputs(*shape, bias=bias, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32 parameters", "same type"])
def test_half_precision(dtype, parameters, way):
    for bias in ("none", "shared", "per member"):
        compare(make_inputs((24, 5), 3, 33, 18, bias=bias, dtype=dtype, parameters=parameters))


@pytest.mark.parametrize("in_features, out_features", [(8000, 40), (40, 8000)])
def test_long_sums_of_one_sign_lose_no_more_than_the_loops(in_features, out_features, way):
    inputs = make_inputs((8,), 2, in_features, out_features, bias="none", dtype=torch.float32)
    inputs = {name: None if t is None else t.abs() for name, t in inputs.items()}
    truth = run(by_member, inputs, dtype=torch.float64)

    def errors(found):
        return {name: ((found[name] - t) / t).nan_to_num().abs().max().item() for name, t in truth.items()}

    ours, loop = errors(run(rank1_linear, inputs)), errors(run(by_member, inputs))
    for name, error in ours.items():
        assert error <= 3 * loop[name] + 2 * torch.finfo(torch.float32).eps, name


def test_the_rule_chooses_by_rows_in_and_out_alone():
    shapes = {(3152, 384, 1536): folded, (3152, 1536, 384): folded, (200, 784, 512): tiled, (32, 500, 2000): tiled_rows}
    shapes |= {(4, 100, 130): tiled, (4, 200, 130): tiled_rows}
    shapes[0, 0, 5] = folded  # no division by a size of 0
    for (rows, in_features, out_features), expected in shapes.items():
        for num_members in (1, 3):
            for leading in ((num_members * rows,), (num_members, rows)):
                x = torch.empty(*leading, in_features)
                assert module._way(x, torch.empty(out_features, in_features), num_members) is expected
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float32, "meta")):
        x, weight = torch.empty(2, 200, 784, dtype=dtype, device=device), torch.empty(512, 784)
        assert module._way(x, weight, 2) is by_rows and module.passes_over_rows(x, weight, 2)


def test_no_kernels_where_the_reference_is_chosen():
    x, weight = torch.empty(400, 784), torch.empty(512, 784)
    assert module._way(x, weight, 2) is tiled
    lp.set_backend("reference")
    try:
        assert module._way(x, weight, 2) is by_rows
    finally:
        lp.set_backend("auto")


def test_autocast_decides_whether_gains_pass_over_rows():
    x, weight = torch.empty(400, 784), torch.empty(512, 784)
    assert not module.passes_over_rows(x, weight, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.passes_over_rows(x, weight, 2)
        assert not module.passes_over_rows(x.double(), weight.double(), 2)


@pytest.mark.parametrize(
    "leading, in_features, out_features",
    [((0,), 3, 4), ((0, 4), 3, 4), ((6, 0), 3, 4), ((6,), 0, 4), ((6,), 3, 0)],
    ids=str,
)
def test_empty(leading, in_features, out_features, way):
    inputs = make_inputs(leading, 3, in_features, out_features)
    result = run(rank1_linear, inputs)
    expected = {f"d{name}": torch.zeros_like(inputs[name]) for name in NAMES}
    expected["y"] = torch.zeros_like(inputs["dy"])
    if in_features == 0:
        expected |= {"y": inputs["bias"].expand(6, 4), "dbias": inputs["dy"].sum(0)}
    for name, value in result.items():
        torch.testing.assert_close(value, expected[name])


def test_gradcheck(way):
    for bias in ("none", "per member", "shared"):
        inputs = make_inputs((4, 2), 2, 3, 2, bias=bias)
        arguments = [inputs[name].requires_grad_() for name in NAMES if inputs[name] is not None]
        assert gradcheck(rank1_linear, arguments, check_batched_grad=True)
        assert gradgradcheck(rank1_linear, arguments)


def test_only_the_gradients_that_are_needed(way):
    inputs = make_inputs((6, 2), 3, 5, 4, bias="per member")
    everything = run(rank1_linear, inputs)
    for needed in itertools.product([False, True], repeat=5):
        if not any(needed):
            continue
        leaves = [inputs[name].detach().clone().requires_grad_(need) for name, need in zip(NAMES, needed)]
        rank1_linear(*leaves).backward(inputs["dy"])
        for name, leaf, need in zip(NAMES, leaves, needed):
            assert need == (leaf.grad is not None)
            if need:
                torch.testing.assert_close(leaf.grad, everything[f"d{name}"])


@pytest.mark.parametrize("way", WAYS)
def test_keeps_the_product_only_with_few_rows(way, monkeypatch):
    choose(monkeypatch, way)
    inputs = make_inputs((6, 2), 3, 5, 4)
    for gain_needs_one in (True, False):
        leaves = [inputs[name].clone().requires_grad_(name != "r" or gain_needs_one) for name in NAMES]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.data_ptr()), lambda t: t):
            rank1_linear(*leaves)
        assert {leaf.data_ptr() for leaf in leaves} <= set(kept)
        assert len(set(kept)) == len(leaves) + (gain_needs_one and way in ("by rows", "tiled rows"))
    arguments = [inputs[name] for name in NAMES]
    y, product = module._forward(*arguments, keep=False)
    assert torch.equal(y, module._forward(*arguments)[0]) and product.numel() == 0


def test_members_do_not_meet(way):
    """A member's values and gradients are the same bits whatever another member holds; dW and a shared bias mix."""
    inputs = make_inputs((12, 3), 4, 33, 18, bias="per member", dtype=torch.float32)
    clean = run(rank1_linear, inputs)
    for name, value in itertools.product(("x", "s", "r", "bias", "dy"), (float("nan"), 1e30)):
        spoilt = {n: t.clone() for n, t in inputs.items()}
        spoilt[name].unflatten(0, (4, -1))[1] = value
        result = run(rank1_linear, spoilt)
        others = torch.tensor([0, 2, 3])
        for of in ("y", "dx", "ds", "dr", "dbias"):
            mine, before = (t[of].unflatten(0, (4, -1))[others] for t in (result, clean))
            assert torch.equal(mine, before), (name, value, of)


def test_member_order(way):
    # 12 rows of 33 values: every member begins at a multiple of 16 bytes, on which the bits of a BLAS may depend.
    inputs = make_inputs((12, 4), 4, 33, 18, bias="per member", dtype=torch.float32)
    order = torch.tensor([2, 0, 3, 1])
    permuted = {n: t if n == "weight" else t.unflatten(0, (4, -1))[order].flatten(0, 1) for n, t in inputs.items()}
    result, moved = run(rank1_linear, inputs), run(rank1_linear, permuted)
    torch.testing.assert_close(moved.pop("dweight"), result.pop("dweight"))  # a sum in another order
    for name, value in moved.items():
        assert torch.equal(value, result[name].unflatten(0, (4, -1))[order].flatten(0, 1)), name


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("leading", [(8, 3), (64, 3)], ids=["few rows", "many rows"])
def test_repeats_are_bit_equal(leading, threads, way):
    torch.set_num_threads(threads)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(leading, 4, 131, 150, bias="per member", dtype=dtype)
        first, *repeats = (run(rank1_linear, inputs) for _ in range(3))
        assert all(torch.equal(value, again[name]) for again in repeats for name, value in first.items())


def test_strides(way):
    """Transposed, expanded and offset arguments and gradients give what their copies do."""
    inputs = make_inputs((6, 5), 2, 8, 4, bias="per member")
    strided = {n: t.mT.contiguous().mT for n, t in inputs.items()}
    strided["s"] = inputs["s"][:1].expand(2, 8)
    inputs["s"] = strided["s"].contiguous()
    strided["dy"] = torch.cat([inputs["dy"], inputs["dy"]], -1)[..., 4:]
    leaves = {n: t.detach().requires_grad_() for n, t in strided.items() if n != "dy"}
    y = rank1_linear(*leaves.values())
    grads = torch.autograd.grad(y, list(leaves.values()), strided["dy"])
    expected = run(rank1_linear, inputs)
    torch.testing.assert_close(y, expected.pop("y"))
    for grad, value in zip(grads, expected.values()):
        torch.testing.assert_close(grad, value)
    y = rank1_linear(*leaves.values())
    y.sum().backward()  # an expanded gradient
    torch.testing.assert_close(leaves["x"].grad, run(rank1_linear, inputs | {"dy": torch.ones_like(y)})["dx"])


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast(parameters, way):
    inputs = make_inputs((24, 5), 3, 33, 18, dtype=torch.float32, parameters=parameters)
    with torch.autocast("cpu", torch.bfloat16):
        result, half = run(rank1_linear, inputs), rank1_linear(*(inputs[n] for n in NAMES))
        alone = run(rank1_linear, {n: t.double() for n, t in inputs.items()})
    assert result["y"].dtype == half.dtype == torch.bfloat16 and alone["y"].dtype == torch.float64
    truth = run(by_member, inputs, dtype=torch.float64)
    for name, value in result.items():
        assert name == "y" or value.dtype == inputs[name[1:]].dtype
        error = (value.double() - truth[name]).abs().max() / truth[name].abs().max()
        assert error < 2e-2, name
        torch.testing.assert_close(alone[name], truth[name])


def test_meta_tensors_have_shapes():
    leaves = [t.to("meta").requires_grad_() for n, t in make_inputs((6, 2), 3, 5, 4).items() if n != "dy"]
    y = rank1_linear(*leaves)
    y.backward(torch.empty_like(y))
    assert y.is_meta and y.shape == (6, 2, 4) and all(leaf.grad.shape == leaf.shape for leaf in leaves)


def test_under_transforms():
    inputs = make_inputs((6,), 2, 3, 4)
    arguments = tuple(inputs[name] for name in NAMES)
    expected = run(rank1_linear, inputs)
    _, vjp = torch.func.vjp(rank1_linear, *arguments)
    for name, grad in zip(NAMES, vjp(inputs["dy"])):
        torch.testing.assert_close(grad, expected[f"d{name}"])
    several = torch.stack([arguments[0], 2 * arguments[0]])
    mapped = torch.func.vmap(rank1_linear, (0, None, None, None, None))(several, *arguments[1:])
    torch.testing.assert_close(mapped, torch.stack([rank1_linear(x, *arguments[1:]) for x in several]))
    jvp = torch.func.jvp(lambda x: rank1_linear(x, *arguments[1:]), arguments[:1], arguments[:1])[1]
    torch.testing.assert_close(jvp, by_member(*arguments[:4]))


@pytest.mark.parametrize("leading", [(6,), (6, 2)])
def test_the_output_may_be_changed_in_place(leading, way):
    inputs = make_inputs(leading, 3, 5, 4)
    changed = run(lambda *arguments: F.relu(rank1_linear(*arguments), inplace=True), inputs)
    torch.testing.assert_close(changed, run(lambda *arguments: F.relu(rank1_linear(*arguments)), inputs))


def test_compiled_without_a_graph_break(way):
    torch._dynamo.reset()  # one function for every way: dynamo counts its recompilations
    compiled = torch.compile(rank1_linear, backend="aot_eager", fullgraph=True)
    for bias in ("none", "shared", "per member"):
        inputs = make_inputs((6, 2), 3, 5, 4, bias=bias, dtype=torch.float32)
        torch.testing.assert_close(run(compiled, inputs), run(rank1_linear, inputs))


def test_compiled_for_any_number_of_members():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rank1_linear, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for num_members in (3, 4, 5, 6):
        inputs = make_inputs((num_members * 100,), num_members, 50, 40, dtype=torch.float32)
        torch.testing.assert_close(run(compiled, inputs), run(rank1_linear, inputs))
        counts.append(counter.frame_count)
    assert counts[1] == counts[-1]


def test_opcheck(way):
    for bias in ("none", "shared", "per member"):
        inputs = make_inputs((6, 2), 3, 5, 4, bias=bias, dtype=torch.float32)
        arguments = [None if inputs[n] is None else inputs[n].requires_grad_() for n in NAMES]
        torch.library.opcheck(torch.ops.latephase_kernels.rank1_linear.default, arguments)
        needs = [t is not None for t in arguments]
        detached = [None if t is None else t.detach() for t in arguments]
        backward = torch.ops.latephase_kernels.rank1_linear_backward.default
        _, product = torch.ops.latephase_kernels.rank1_linear.default(*detached)
        for kept in (product, None):
            torch.library.opcheck(backward, (inputs["dy"], *detached, kept, needs))


def test_opcheck_without_the_product(monkeypatch):
    choose(monkeypatch, "by rows")  # which would keep it
    inputs = make_inputs((6, 2), 3, 5, 4, dtype=torch.float32)
    arguments = *(inputs[n].requires_grad_() for n in NAMES), False
    op = torch.ops.latephase_kernels.rank1_linear.default
    assert op(*arguments)[1].numel() == 0
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own_type", [True, False], ids=["weight in the data's type", "weight in float32"])
def test_the_ops_around_the_products(dtype, own_type):
    """Against their formulas in float64; rows and columns beside a whole register and a whole part."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    for K, out_features, in_features in ((1, 1, 1), (3, 37, 33), (2, 64, 16), (2, 70, 131)):
        inputs = make_inputs((K,), K, in_features, out_features)
        weight = inputs["weight"].to(dtype if own_type else accumulate)
        s, r = inputs["s"].to(accumulate), inputs["r"].to(accumulate)
        products = torch.randn(K, out_features, in_features, dtype=torch.float64).to(dtype)
        wide = [t.double() for t in (products, weight, s, r)]
        eps = torch.finfo(accumulate).eps

        own = torch.empty_like(products)
        torch.ops.latephase_kernels.rank1_fold(weight, s, r, own)
        truth = torch.empty_like(wide[0])
        folded._fold(*wide[1:], truth)
        error, scale = (own.double() - truth).abs(), truth.abs()
        assert (error <= (torch.finfo(dtype).eps + 4 * eps) * scale + torch.finfo(dtype).smallest_normal).all()

        start = torch.randn(out_features, in_features, dtype=torch.float64).to(accumulate)
        dweight, true_dweight = start.clone(), start.double()
        found = torch.ops.latephase_kernels.rank1_fold_backward(products, weight, s, r, dweight)
        expected = folded._fold_backward(*wide, true_dweight)
        for value, true in zip((dweight, *found), (true_dweight, *expected)):
            assert value.dtype == accumulate
            torch.testing.assert_close(value.double(), true, rtol=0, atol=64 * eps * max(1, true.abs().max().item()))
        alone = torch.ops.latephase_kernels.rank1_fold_backward(products, weight, s, r, None)
        assert all(torch.equal(*pair) for pair in zip(alone, found))
        torch.library.opcheck(torch.ops.latephase_kernels.rank1_fold.default, (weight, s, r, own))
        backward = torch.ops.latephase_kernels.rank1_fold_backward.default
        torch.library.opcheck(backward, (products, weight, s, r, dweight))


def test_wrong_arguments_of_the_ops_around_the_products():
    weight, s, r, products = torch.ones(4, 5), torch.ones(3, 5), torch.ones(3, 4), torch.ones(3, 4, 5)
    wrong = [
        ("folded weights must be contiguous", (weight, s, r, products.mT)),
        ("weight must be contiguous", (weight.t(), s, r, products)),
        ("input_gain must be contiguous, .3, 5.", (weight, s[:2], r, products)),
        ("output_gain must be contiguous, .3, 4.", (weight, s, s, products)),
        ("weight must have the data's type", (weight.double(), s, r, products)),
        ("gains must have the accumulation type", (weight, s.bfloat16(), r, products)),
    ]
    for message, arguments in wrong:
        with pytest.raises(RuntimeError, match="rank1_linear: " + message):
            torch.ops.latephase_kernels.rank1_fold(*arguments)
    with pytest.raises(RuntimeError, match="rank1_linear: dweight must be contiguous"):
        torch.ops.latephase_kernels.rank1_fold_backward(products, weight, s, r, weight[:2])


def test_wrong_arguments():
    x, w, s, r, b = (make_inputs((6,), 3, 5, 4)[name] for name in NAMES)
    wrong = [
        (TypeError, "input must be a Tensor, got list", ([1], w, s, r)),
        (TypeError, "weight must be a Tensor, got NoneType", (x, None, s, r)),
        (TypeError, "bias must be a Tensor or None, got int", (x, w, s, r, 1)),
        (ValueError, r"input must be \[K·B, …, in\], got shape \[5\]", (x[0], w, s, r)),
        (ValueError, r"weight must be \[out, 5\] for input of shape \[6, 5\], got shape \[5, 4\]", (x, w.t(), s, r)),
        (ValueError, r"input_gain must be \[K, 5\] with at least one member", (x, w, s[0], r)),
        (ValueError, r"input_gain must have shape \[3, 5\]", (x, w, r, r)),
        (ValueError, r"output_gain must have shape \[3, 4\]", (x, w, s, r[:2])),
        (ValueError, r"bias must have shape \[3, 4\] or \[4\]", (x, w, s, r, b[:3])),
        (ValueError, r"input.size\(0\)=5 is not divisible by the 3 members", (x[:5], w, s, r)),
        (NotImplementedError, "got torch.int64; convert", (x.long(), w, s, r)),
        (NotImplementedError, "weight must be torch.float64 for torch.float64 input", (x, w.float(), s, r)),
        (NotImplementedError, "weight must be a dense strided tensor, got layout .*sparse", (x, w.to_sparse(), s, r)),
        (ValueError, "output_gain is on meta, input on cpu", (x, w, s, r.to("meta"))),
    ]
    for error, message, arguments in wrong:
        with pytest.raises(error, match="rank1_linear: .*" + message):
            rank1_linear(*arguments)
