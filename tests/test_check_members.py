"""check_members: models whose members are independent pass, and what mixes them is named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import latephase_kernels as lp

K, ROWS = 3, 2


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.between(self.norm(self.conv(x)).relu().mean((2, 3))))

    def between(self, x):
        return x


class Centred(Convolutional):
    def between(self, x):
        return x - x.mean(0)


class HiddenInABranch(Convolutional):
    """What mixes goes into a last layer that is zero yet."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 8)
        nn.init.zeros_(self.last.weight)

    def between(self, x):
        return x + self.last(x - x.mean(0))


class MixedInTraining(Convolutional):
    def between(self, x):
        return x.flip(0) if self.training else x


class Noisy(Convolutional):
    """Noise that a flag switches off, a state that every call moves, and an input changed in place."""

    def __init__(self):
        super().__init__()
        self.drop, self.noise = nn.Dropout(0.5), nn.RReLU()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x.mul_(2))

    def between(self, x):
        return self.noise(self.drop(x)) + self.calls


class Loss(Convolutional):
    def forward(self, x):
        return super().forward(x).mean()


class Infinite(Convolutional):
    def forward(self, x):
        return super().forward(x) * torch.nan


class Single(Convolutional):
    def forward(self, x):
        return super().forward(x.float())


class SingleShuffled(Single):
    def between(self, x):
        return x.flip(0)


class Half(Convolutional):
    def forward(self, x):
        return super().forward(x.half())


class Shuffled(Convolutional):
    def between(self, x):
        return x.flip(0)


class Random(Convolutional):
    def between(self, x):
        return F.dropout(x, 0.5, self.training)


class TwoViews(Convolutional):
    def forward(self, x, other):
        return super().forward(torch.cat([x, other])).chunk(2)


class TwoViewsTogether(Convolutional):
    def forward(self, x, other):
        return super().forward(torch.cat([x, other]))


class Positions(nn.Module):
    """A replicated layer gets a table of all samples' positions."""

    def __init__(self):
        super().__init__()
        self.bias, self.head = nn.Sequential(nn.Linear(2, 8)), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(x.mean((2, 3)).repeat(1, 3)[:, :8] + self.bias(x.new_ones(1, 2)))


class InSeveralLayouts(Convolutional):
    """Beside the logits, answers that have the samples in dim 1."""

    def forward(self, x):
        y = super().forward(x)
        return y, y.mT, y.expand(5, *y.shape)


class Characters(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.2, batch_first=batch_first)

    def forward(self, text):
        return self.head(self.lstm(self.embed(text))[0].flatten(0, 1)).unflatten(0, text.shape)


def images(*shape):
    return torch.randn(K * ROWS, *(shape or (3, 8, 8)), generator=torch.Generator().manual_seed(1))


def text(*shape):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))


def with_a_new_norm():
    model = lp.expand(Convolutional(), K)
    model.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    return model


def encoder(batch_first):
    return nn.Sequential(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first), 1, enable_nested_tensor=False
        ),
        nn.Linear(8, 3),
    )


def expanded(model, *targets):
    return lp.expand(model, K, targets=targets or ("batch_norm", "head"))


class Remembers(Convolutional):
    """Puts another tensor in the place of a buffer at every call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(1, 8))

    def between(self, x):
        last = self.last if self.last.size(0) == x.size(0) else x.new_zeros(x.size(0), 8)
        self.last = x.detach()
        return x + last


class Masked(nn.Module):
    """Attention with a mask for each head of each sample."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x, mask):
        return self.head(self.attention(x, x, x, attn_mask=mask)[0].mean(1))


class OverAGraph(Convolutional):
    def forward(self, x, edges):
        received = torch.zeros_like(x).index_add_(0, edges[0], x[edges[1]])
        return super().forward(x + received)


INDEPENDENT = {
    "batch norm and head": (lambda: expanded(Convolutional()), (images(),), 0),
    "noise and state": (lambda: expanded(Noisy()), (images(),), 0),
    "fused": (lambda: lp.fuse(expanded(Convolutional())), (images(),), 0),
    "LSTM, batch first": (lambda: expanded(Characters(True), "rank1", "head"), (text(K * ROWS, 5),), 0),
    "LSTM alone, time first": (
        lambda: expanded(Characters(False), lambda name, _: "rank1" if name == "lstm" else False),
        (text(5, K * ROWS),),
        1,
    ),
    "encoder": (lambda: expanded(encoder(True), "layer_norm", "head"), (images(5, 8),), 0),
    "masks of heads": (lambda: expanded(Masked()), (images(5, 8), torch.eye(5).repeat(2 * K * ROWS, 1, 1)), 0),
    "a buffer that is replaced": (lambda: expanded(Remembers()), (images(),), 0),
    "several layouts": (lambda: expanded(InSeveralLayouts()), (images(),), 0),
}
MIXING = {
    "statistics over the batch": (lambda: expanded(Centred()), (images(),), 0, r"head \(MemberLinear\)"),
    "in a branch that is zero yet": (lambda: expanded(HiddenInABranch()), (images(),), 0, r"last \(MemberLinear\)"),
    "in training alone": (lambda: expanded(MixedInTraining()).eval(), (images(),), 0, r"head \(MemberLinear\)"),
    "rows in another order": (lambda: expanded(Shuffled()), (images(),), 0, r"head \(MemberLinear\)"),
    "two views": (lambda: expanded(TwoViews()), (images(), images()), 0, r"conv \(Conv2d\)"),
    "two views together": (lambda: expanded(TwoViewsTogether()), (images(), images()), 0, r"conv \(Conv2d\)"),
    "a norm added later": (with_a_new_norm, (images(),), 0, r"head.1 \(BatchNorm1d\)"),
    "time first": (lambda: expanded(Characters(False), "rank1", "head"), (text(9, K * ROWS),), 1, "head"),
    "encoder, time first": (lambda: expanded(encoder(False), "head"), (images(9, 8).transpose(0, 1),), 1, "1 "),
}


@pytest.mark.parametrize("case", INDEPENDENT)
@pytest.mark.parametrize("training", (True, False))
def test_independent_members_pass(case, training):
    make, arguments, dim = INDEPENDENT[case]
    model = make().train(training)
    state, flags = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    random = torch.get_rng_state()
    lp.check_members(model, *arguments, dim=dim)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert flags == [m.training for m in model.modules()] and torch.equal(random, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:expand. .* has batch_first=False")
@pytest.mark.parametrize("case", MIXING)
def test_what_mixes_members_is_named(case):
    make, arguments, dim, where = MIXING[case]
    with pytest.raises(RuntimeError, match=f"check_members: member 0 answers differently .* first at {where}"):
        lp.check_members(make(), *arguments, dim=dim)


def test_arguments_by_name():
    lp.check_members(expanded(Convolutional()), x=images())
    with pytest.raises(RuntimeError, match=r"first at conv \(Conv2d\)"):
        lp.check_members(expanded(TwoViews()), images(), other=images())


@pytest.mark.parametrize(
    "model, message",
    (
        (Random, "answers the same batch differently each time"),
        (Loss, r"must hold a tensor with the 6 samples in dim 0, got \[\[\]\]"),
        (Infinite, "answer has no finite value"),
        (Half, "fails on this batch in float64 .*: .*(type|dtype)"),
    ),
)
def test_models_that_cannot_be_checked(model, message):
    with pytest.raises(RuntimeError, match=f"check_members: .*{message}"):
        lp.check_members(expanded(model()), images())


def test_models_that_run_in_float32_alone():
    lp.check_members(expanded(Single()), images())
    with pytest.raises(RuntimeError, match=r"answers differently .* first at head \(MemberLinear\)"):
        lp.check_members(expanded(SingleShuffled()), images())


def test_a_layer_that_gets_no_batch_is_named():
    message = (
        r"fails on this batch in float64 at bias.0 \(Rank1Linear\): Rank1Linear: input.size\(0\)=1 is not divisible"
    )
    with pytest.raises(RuntimeError, match=message):
        lp.check_members(expanded(Positions(), "rank1"), images())


def test_a_weight_that_is_read_and_multiplied_by_gains():
    class InALoop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x):
            for layer in self.layers:
                x = F.linear(x, layer.weight, layer.bias).relu()
            return x

    with pytest.raises(
        RuntimeError, match="check_members: collapsed, the model answers otherwise .* choose other targ"
    ):
        lp.check_members(expanded(InALoop(), "rank1"), images(8))


def test_a_graph_of_all_samples():
    edges = torch.tensor([[0, 1, 2, 5], [1, 0, 5, 2]])
    with pytest.raises(RuntimeError, match=r"fails on the samples of member 0 alone, at .* let the members take turns"):
        lp.check_members(expanded(OverAGraph()), images(), edges)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_model_that_cannot_be_copied():
    model = expanded(Convolutional())
    nn.utils.weight_norm(model.conv)
    model(images())
    with pytest.raises(RuntimeError, match="check_members: the model cannot be copied: .*; call it once under"):
        lp.check_members(model, images())
    with torch.no_grad():
        model(images())
    lp.check_members(model, images())


def test_bad_arguments():
    with pytest.raises(RuntimeError, match="check_members: model is not expanded; call expand first"):
        lp.check_members(Convolutional(), images())
    with pytest.raises(ValueError, match=r"samples of 3 members in dim 0, got tensors of \[5\] there"):
        lp.check_members(expanded(Convolutional()), images()[:5])
