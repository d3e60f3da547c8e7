"""Malformed calls: the right exception, naming the argument and the remedy, and nothing modified."""

import pytest
import torch

import latephase_kernels as lp

K, B, C = 2, 3, 4


def good():
    return dict(
        input=torch.randn(K * B, C, 5, 5),
        running_mean=torch.zeros(K, C),
        running_var=torch.ones(K, C),
        weight=torch.ones(K, C),
        bias=torch.zeros(K, C),
        training=True,
        momentum=0.1,
        eps=1e-5,
        num_members=K,
        residual=None,
        activation="none",
    )


CASES = [
    # what is changed, the exception, words the message must have
    (dict(input=[[1.0]]), TypeError, ["input", "Tensor", "list"]),
    (dict(input=None), TypeError, ["input", "NoneType"]),
    (dict(input=torch.randn(6)), ValueError, ["input", "(6,)"]),
    (dict(input=torch.tensor(1.0)), ValueError, ["input", "()"]),
    (dict(input=torch.randn(6, 4, 1, 1, 1, 1)), ValueError, ["input", "spatial"]),
    (dict(input=torch.ones(6, 4, dtype=torch.int64)), NotImplementedError, ["input", "int64", ".float()"]),
    (dict(input=torch.ones(6, 4, dtype=torch.bool)), NotImplementedError, ["input", "bool"]),
    (dict(input=torch.ones(6, 4, dtype=torch.complex64)), NotImplementedError, ["input", "complex64"]),
    (dict(input=torch.randn(6, 4).to_sparse()), NotImplementedError, ["input", "dense", "sparse"]),
    (dict(input=torch.randn(7, 4, 5, 5)), ValueError, ["input.size(0)=7", "num_members=2", "minibatches"]),
    (dict(input=torch.randn(6, 9, 5, 5)), ValueError, ["running_mean", "[2, 9]", "[2, 4]"]),
    (dict(num_members=0), ValueError, ["num_members", "at least 1", "0"]),
    (dict(num_members=-2), ValueError, ["num_members", "-2"]),
    (dict(num_members=2.0), TypeError, ["num_members", "int", "float"]),
    (dict(num_members=True), TypeError, ["num_members", "bool"]),
    (dict(num_members="2"), TypeError, ["num_members", "str"]),
    (dict(num_members=3), ValueError, ["running_mean", "[3, 4]"]),
    (dict(num_members=4), ValueError, ["input.size(0)=6", "num_members=4"]),
    (dict(weight=torch.ones(C, K)), ValueError, ["weight", "[2, 4] or [4]", "[4, 2]"]),
    (dict(weight=torch.ones(K * C)), ValueError, ["weight", "[8]"]),
    (dict(weight=torch.ones(1, C)), ValueError, ["weight", "[1, 4]"]),
    (dict(weight=1.0), TypeError, ["weight", "float"]),
    (dict(weight=torch.ones(K, C, dtype=torch.int32)), NotImplementedError, ["weight", "int32"]),
    (dict(weight=torch.ones(K, C, dtype=torch.float64)), NotImplementedError, ["weight", "float64"]),
    (dict(weight=torch.ones(K, C, dtype=torch.bfloat16)), NotImplementedError, ["weight", "bfloat16"]),
    (dict(weight=torch.ones(K, C, device="meta")), ValueError, ["weight", "meta", "cpu"]),
    (dict(bias=torch.ones(K, C + 1)), ValueError, ["bias", "[2, 5]"]),
    (dict(bias=[0.0] * C), TypeError, ["bias", "list"]),
    (dict(bias=torch.zeros(K, C, device="meta")), ValueError, ["bias", "meta"]),
    (dict(running_mean=None), ValueError, ["running_mean", "None", "both"]),
    (dict(running_var=None), ValueError, ["running_var", "None", "both"]),
    (dict(running_mean=torch.zeros(C)), ValueError, ["running_mean", "[4]"]),
    (dict(running_var=torch.ones(K, C, dtype=torch.int64)), NotImplementedError, ["running_var", "int64"]),
    (dict(running_var=torch.ones(K, C, device="meta")), ValueError, ["running_var", "meta"]),
    (dict(running_mean=torch.zeros(1, C).expand(K, C)), ValueError, ["running_mean", "clone"]),
    (dict(running_mean=torch.zeros(K, C, requires_grad=True)), ValueError, ["running_mean", "grad"]),
    (dict(running_mean=None, running_var=None, training=False), ValueError, ["running_mean", "training=False"]),
    (dict(eps=0.0), ValueError, ["eps", "> 0"]),
    (dict(eps=-1e-5), ValueError, ["eps", "-1e-05"]),
    (dict(eps=float("nan")), ValueError, ["eps", "nan"]),
    (dict(eps=float("inf"), training=False), ValueError, ["eps", "inf"]),
    (dict(eps="small"), TypeError, ["eps", "str"]),
    (dict(momentum=None), TypeError, ["momentum", "NoneType", "latephase_kernels.nn"]),
    (dict(momentum="fast"), TypeError, ["momentum", "float or a Tensor", "str"]),
    (dict(momentum=torch.ones(K)), ValueError, ["momentum", "[] or [2, 1]", "[2]", "momentum.view(2, 1)"]),
    (dict(momentum=torch.ones(C)), ValueError, ["momentum", "[4]"]),
    (dict(momentum=torch.ones(1, C)), ValueError, ["momentum", "[1, 4]"]),
    (dict(momentum=torch.ones(K, C)), ValueError, ["momentum", "[2, 4]"]),
    (dict(momentum=torch.ones(K + 1, 1)), ValueError, ["momentum", "[3, 1]"]),
    (dict(group="x"), TypeError, ["group", "StatisticsGroup", "str"]),
    (dict(group="x", training=False), TypeError, ["group", "StatisticsGroup", "str"]),
    (dict(weight=torch.ones(K, C).to_sparse()), NotImplementedError, ["weight", "dense", "sparse", ".to_dense()"]),
    (dict(residual=torch.zeros(K * B, C, 5, 5).to_sparse()), NotImplementedError, ["residual", "dense", "sparse"]),
    (dict(momentum=float("nan")), ValueError, ["momentum", "nan"]),
    (dict(training=1), TypeError, ["training", "bool", "int"]),
    (dict(training=torch.zeros(K, C)), TypeError, ["training", "Tensor"]),
    (dict(activation="gelu"), ValueError, ["activation", "none, relu", "gelu"]),
    (dict(activation="silu", residual=torch.zeros(K * B, C, 5, 5)), ValueError, ["residual", "silu", "F.silu"]),
    (
        dict(activation="hardswish", output_gain=torch.ones(K, C)),
        ValueError,
        ["output_gain", "hardswish", "F.hardswish"],
    ),
    (dict(activation=None), TypeError, ["activation", "NoneType"]),
    (dict(residual=torch.zeros(K * B, C, 5, 4)), ValueError, ["residual", "[6, 4, 5, 4]"]),
    (dict(residual=torch.zeros(1, C, 5, 5)), ValueError, ["residual", "[1, 4, 5, 5]"]),
    (dict(residual=torch.zeros(K * B, C, 5, 5).half()), NotImplementedError, ["residual", "float16"]),
    (dict(residual=torch.zeros(K * B, C, 5, 5, device="meta")), ValueError, ["residual", "meta"]),
    (dict(residual=0.5), TypeError, ["residual", "float"]),
    (dict(input=torch.randn(K, C)), ValueError, ["more than one value", "[2, 4]", "larger batch"]),
    (dict(input=torch.randn(K, C, 1, 1)), ValueError, ["more than one value"]),
]


@pytest.mark.parametrize("change, error, words", CASES, ids=[f"{i}: {', '.join(c[2])}" for i, c in enumerate(CASES)])
def test_bad_call_is_refused_and_changes_nothing(change, error, words):
    arguments = good() | change
    before = {n: t.clone() for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.layout == torch.strided}
    with pytest.raises(error) as caught:
        lp.functional.ensemble_batch_norm(**arguments)
    message = str(caught.value)
    assert message.startswith("ensemble_batch_norm: ")
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    for name, tensor in before.items():
        if tensor.device.type != "meta":
            assert torch.equal(tensor, arguments[name])


def test_same_tensor_as_mean_and_variance():
    arguments = good()
    arguments["running_var"] = arguments["running_mean"]
    with pytest.raises(ValueError, match="same tensor"):
        lp.functional.ensemble_batch_norm(**arguments)


def test_the_good_call_is_good():
    y = lp.functional.ensemble_batch_norm(**good())
    assert y.shape == (K * B, C, 5, 5)


def test_unknown_backend():
    with pytest.raises(ValueError, match="native, triton, reference, auto, got 'cuda'"):
        lp.set_backend("cuda")


RAW = torch.ops.latephase_kernels


def raw_arguments():
    x = torch.randn(K * B, C, 5, 5)
    return dict(dy=x, input=x, mean=torch.zeros(K, C), rstd=torch.ones(K, C), weight=None, bias=None,
                mask=torch.zeros(0, dtype=torch.uint8))  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        dict(input=torch.randn(K * B, C, 5, 10)[..., ::2]),
        dict(dy=torch.randn(K * B, C, 5, 4)),
        dict(dy=torch.randn(K * B, C, 5, 5).double()),
        dict(mean=torch.zeros(C)),
        dict(rstd=torch.ones(K, C).double()),
        dict(weight=torch.ones(K + 1, C)),
        dict(mask=torch.zeros(3, dtype=torch.uint8)),
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_registered_op_refuses_what_the_kernels_could_not_survive(change):
    with pytest.raises(RuntimeError, match="ensemble_batch_norm"):
        RAW.ensemble_batch_norm_backward(**(raw_arguments() | change), training=True, num_members=K,
                                         activation="relu", residual_grad=False)  # fmt: skip


@pytest.mark.parametrize("activation", ["relu6", "silu", "hardswish"])
def test_the_registered_op_refuses_what_a_standalone_activation_does_not_take(activation):
    gain = torch.ones(K, C)
    with pytest.raises(RuntimeError, match="only the activations none and relu take a residual or output_gain"):
        RAW.ensemble_batch_norm_backward(**raw_arguments(), training=True, num_members=K, activation=activation,
                                         residual_grad=False, output_gain=gain)  # fmt: skip
    with pytest.raises(RuntimeError, match=f"member_gain: activation must be none or relu, got {activation}"):
        RAW.member_gain(torch.randn(K * B, C), gain, None, 1, activation)


@pytest.mark.parametrize("num_members", [0, -1, 4])
def test_the_registered_op_refuses_members(num_members):
    with pytest.raises(RuntimeError, match="num_members"):
        RAW.ensemble_batch_norm_statistics(torch.randn(K * B, C), num_members)
