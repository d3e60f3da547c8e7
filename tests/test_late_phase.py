"""expand, collapse and what goes with them; shapes: K members, B samples each."""

import copy
import pickle
from collections import UserDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from latephase_kernels import late_phase as lp

K, B = 3, 4


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def images(rows, seed=3):
    return torch.randn(rows, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def diverged(targets=("batch_norm", "head")):
    """An expanded model whose members differ in weights and statistics."""
    model = lp.expand(small_net(), K, targets=targets, noise_std=0.3)
    for seed in range(3):
        model(images(K * B, seed))
    return model


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("mode", ["exact", "weights"])
@pytest.mark.parametrize("targets", [("batch_norm", "head"), "head", "rank1", ()])
def test_one_member_as_a_plain_model(targets, mode):
    model, plain, x = diverged(targets), small_net(), images(5)
    for k in range(K):
        alone = lp.collapse(copy.deepcopy(model), mode=mode, member=k)
        plain.load_state_dict(alone.state_dict())
        torch.testing.assert_close(plain.eval()(x), lp.predict(model, x, members=k))
        for key, value in model.state_dict().items():
            if targets != "rank1" and value.shape != plain.state_dict()[key].shape:
                assert torch.equal(alone.state_dict()[key], value[k])
    with pytest.raises(ValueError, match=r"collapse: member must be within range\(3\), got 3; member 0 is the first"):
        lp.collapse(model, member=3)
    with pytest.raises(TypeError, match="collapse: member must be an int or None, got bool"):
        lp.collapse(model, member=True)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_round_trip(name):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=10)
    model(torch.randn(4, 3, 32, 32))  # statistics other than 0 and 1
    original = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    answer = copy.deepcopy(model).eval()(x)
    assert lp.expand(model, K, targets=("batch_norm", "head")) is model
    assert list(model.state_dict()) == list(original)
    for key, value in model.state_dict().items():
        late = key.startswith("fc.") or "bn" in key or "downsample.1" in key
        assert torch.equal(value, original[key].expand_as(value)) and value.dim() == original[key].dim() + late
    assert torch.equal(model.eval()(x), answer)
    for mode in ("exact", "weights"):
        back = lp.collapse(copy.deepcopy(model), mode=mode)
        fresh = getattr(models, name)(num_classes=10)
        fresh.load_state_dict(back.state_dict(), strict=True)
        assert [type(m) for m in back.modules()] == [type(m) for m in fresh.modules()]
        assert all(torch.equal(value, original[key]) for key, value in back.state_dict().items())
        assert torch.equal(fresh.eval()(x), answer)
    if name == "resnet18":  # members that differ: still what the expanded model answers, bit for bit
        model.train()(torch.randn(2 * K, 3, 32, 32)).sum().backward()
        answer = model.eval()(x)
        fresh.load_state_dict(lp.collapse(model).state_dict(), strict=True)
        assert torch.equal(fresh(x), answer) and not torch.equal(answer, back.eval()(x))


@pytest.mark.parametrize("targets", ["batch_norm", "head", ("batch_norm", "head"), lambda name, module: name == "4"])
def test_eval_answers_as_the_collapsed_model(targets):
    model = diverged(targets).eval()
    answer = model(images(5))
    lp.collapse(model)
    assert torch.equal(model(images(5)), answer)
    assert {type(m) for m in model} == {type(m) for m in small_net()}


@pytest.mark.parametrize("targets", (("layer_norm", "head"), "rank1"))
def test_one_sample_without_a_batch_is_answered_in_eval_mode(targets):
    """As the plain model does: what acts in an environment asks for one."""
    x = torch.randn(2, 5, 5)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(-3), nn.Linear(36, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    lp.expand(model, K, targets=targets, noise_std=0.3).eval()
    answer = model(x)
    assert answer.shape == (3,)
    torch.testing.assert_close(lp.collapse(model)(x), answer)


def test_copies_follow_their_own_training_flag():
    model = diverged()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.eval()
        assert other[1].routing.model is other and other[1].weight.num_members == K
        assert torch.equal(other(images(2)), lp.predict(model, images(2)))
    assert model.training and model(images(K * B)).shape == (K * B, 3)


def test_plain_checkpoints_load_into_an_expanded_model():
    plain = small_net()
    plain(images(8))
    model = diverged()
    model.load_state_dict(plain.state_dict())
    back = lp.collapse(copy.deepcopy(model))
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in back.state_dict().items())
    other = diverged()
    model(images(K * B))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(images(2)), model.eval()(images(2)))


def test_a_checkpoint_of_another_number_of_members_says_so():
    state = lp.expand(small_net(), 2).state_dict()
    with pytest.raises(RuntimeError, match=r"1.weight has 2 members in the checkpoint and 3 in the model; expand the"):
        lp.expand(small_net(), 3).load_state_dict(state)


def test_flags_hooks_and_types_survive():
    model = small_net()
    model[1].eval().weight.requires_grad_(False)
    model[6].half()
    calls = []
    handle = model[1].register_forward_hook(lambda *_: calls.append(1))
    lp.expand(model, K, targets=("batch_norm", "head"))
    assert not model[1].training and model[4].training and model[6].weight.dtype == torch.float16
    assert [p.requires_grad for p in model[1].parameters()] == [False, True]
    model[:5](images(K * B))
    lp.collapse(model)
    model[:5](images(B))
    handle.remove()
    model[:5](images(B))
    assert calls == [1, 1] and not model[1].training and not model[1].weight.requires_grad
    assert model[6].weight.dtype == torch.float16


def test_a_model_without_data_is_converted_both_ways():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    lp.collapse(lp.expand(model, K, targets=("batch_norm", "head")))
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_tied_modules_and_parameters_stay_tied():
    norm = nn.BatchNorm2d(2)
    model = nn.Sequential(norm, nn.ReLU(), norm, nn.BatchNorm2d(2))
    model[3].weight = norm.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lp.expand(model, K, optimizers=[optimizer])
    assert model[0] is model[2] and model[3].weight is model[0].weight and model[0].weight.shape == (K, 2)
    left, late = (group["params"] for group in optimizer.param_groups)
    assert not left and set(late) == set(model.parameters())
    lp.collapse(model)
    assert model[0] is model[2] and model[3].weight is model[0].weight
    lp.expand(model, K, noise_std=0.5)
    model(images(K * B))
    answer = model.eval()(images(2))
    with pytest.warns(UserWarning, match="3.weight was tied"):
        lp.collapse(model)
    assert torch.equal(model(images(2)), answer) and model[3].weight is not model[0].weight


@pytest.mark.parametrize("member_state", ["fresh", "copy"])
def test_live_optimizers_with_names_and_several_groups(member_state):
    model = small_net()
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [(n, p) for n, p in named if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    model(images(B)).sum().backward()
    optimizer.step()
    kept = {p: optimizer.state[p]["exp_avg"] for p in (model[0].weight, model[0].bias)}
    old = optimizer.state[model[1].weight]["exp_avg"]
    lp.expand(
        model,
        K,
        targets=("batch_norm", "head"),
        optimizers=optimizer,
        member_state=member_state,
        member_options={"lr": 0.5},
    )
    names = [group["param_names"] for group in optimizer.param_groups]
    late = ["1.weight", "1.bias", "4.weight", "4.bias", "6.bias"]
    assert names == [["0.weight", "3.weight"], ["0.bias", "3.bias"], ["6.weight"], late]
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.01, 0.5, 0.5]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0, 0.1, 0.0]
    assert all(optimizer.state[p]["exp_avg"] is state for p, state in kept.items())
    if member_state == "copy":
        assert torch.equal(optimizer.state[model[1].weight]["exp_avg"], old.expand(K, 4))
        assert optimizer.state[model[1].weight]["step"] == 1
    else:
        assert model[1].weight not in optimizer.state
    model(images(K * B)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == len(list(model.parameters()))


# ---------------------------------------------------------------------------------------------- running


def test_members_and_predict():
    model = diverged()
    plains = []
    for k in range(K):
        plain = small_net().eval()
        state = {n: v if n.split(".")[0] in "03" else v[k] for n, v in model.state_dict().items()}
        plain.load_state_dict(state)
        plains.append(plain)
    x = images(5)
    expected = torch.stack([plain(x) for plain in plains])
    model[1].eval()
    everyone = lp.predict(model, x, members="all")
    torch.testing.assert_close(everyone, expected)
    torch.testing.assert_close(lp.predict(model, x, members=2), expected[2])
    assert not everyone.requires_grad and model.training and not model[1].training and model[4].training
    averaged = lp.predict(model, x)
    assert torch.equal(averaged, lp.collapse(copy.deepcopy(model).eval())(x))
    model.eval()
    with lp.members(model, range(1, 3)):
        torch.testing.assert_close(model(torch.cat([x, x])), torch.cat([expected[1], expected[2]]))
        with lp.members(model, "average"):
            assert torch.equal(model(x), averaged)
    assert torch.equal(model(x), averaged)
    for wrong, error in ((3, ValueError), ("both", ValueError), (range(0, 3, 2), ValueError), (None, TypeError)):
        with pytest.raises(error, match="members: which must be"):
            with lp.members(model, wrong):
                pass


@pytest.mark.parametrize("targets", ["batch_norm", "head"])
@pytest.mark.parametrize("how", ["stacked", "share", "turns"])
def test_update_bn(targets, how):
    share, options = how == "share", {} if how == "stacked" else {how: True}
    model = diverged(targets).double()
    model[1].eval()
    data = [(images(B, seed).double(), seed) for seed in range(7)]
    # Truth: every member is a plain model; shared batch norms see the members one after the other.
    truth = copy.deepcopy(model)
    for layer in (truth[1], truth[4]):
        layer.momentum = None
        layer.reset_running_stats()
    truth.train()
    for i in range(2 if share else 7):
        for k in range(K):
            with lp.members(truth, k):
                truth(data[i * K + k if share else i][0])
    lp.update_bn(data, model, **options)
    for key, value in truth.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    assert model[1].momentum == 0.1 and not model[1].training and model[4].training
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="loader must yield at least"):
        lp.update_bn([], model, **options)
    message = r"got \(object" if how == "turns" else "a batch must hold a tensor .* got object; .* turns=True"
    with pytest.raises(TypeError, match=message):
        lp.update_bn([object()] * K, model, **options)  # a graph, of which members would get parts
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("targets", ["batch_norm", "head"])
def test_statistics_are_not_reset_while_one_member_runs(targets):
    """As torch's update_bn does: after one call for each member the last one alone would have statistics."""
    model = diverged(targets)
    before = copy.deepcopy(model.state_dict())
    message = r"reset_running_stats: .* runs some of them alone.* turns=True\)"
    with lp.members(model, 1), pytest.raises(RuntimeError, match=message):
        torch.optim.swa_utils.update_bn([images(B)], model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="share must be False with turns=True"):
        lp.update_bn([images(B)], model, share=True, turns=True)
    with lp.members(model, "stacked"):
        model[1].reset_running_stats()
    assert not model[1].running_mean.any()


def test_average_in_a_training_layer_is_the_mean_of_the_members_outputs():
    model = diverged("batch_norm").eval()
    layer = model[1].train()
    x = torch.randn(6, 4, 3, 3)
    others = copy.deepcopy(layer)
    others.routing = None
    expected = others(x.repeat(K, 1, 1, 1)).unflatten(0, (K, 6)).mean(0)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.running_var, others.running_var)
    assert torch.equal(layer.num_batches_tracked, others.num_batches_tracked)


def test_compiles_without_a_graph_break():
    model = diverged()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    reference = copy.deepcopy(model)
    torch.testing.assert_close(compiled(images(K * B)), reference(images(K * B)))
    torch.testing.assert_close(model[1].running_var, reference[1].running_var)
    compiled.eval(), reference.eval()
    assert torch.equal(compiled(images(2)), reference(images(2)))
    with lp.members(compiled, 1):
        torch.testing.assert_close(compiled(images(2)), lp.predict(reference, images(2), members=1))


def test_param_groups():
    model = diverged()
    groups = {g["name"]: g for g in lp.param_groups(model, lr=0.1, member_lr=0.2, weight_decay=0.3, no_decay=True)}
    assert groups["base"]["params"] == [model[0].weight, model[3].weight]
    assert groups["member"]["params"] == [model[6].weight]  # two dimensions before expansion
    assert set(groups["base_no_decay"]["params"]) == {model[0].bias, model[3].bias}
    assert len(groups["member_no_decay"]["params"]) == 5
    assert [(g["lr"], g["weight_decay"]) for g in groups.values()] == [(0.1, 0.3), (0.1, 0.0), (0.2, 0.3), (0.2, 0.0)]
    torch.optim.AdamW(list(groups.values()))
    groups = lp.param_groups(model, lr=0.1, weight_decay=0.3, member_weight_decay=0.4)
    assert [(g["name"], g["weight_decay"], len(g["params"])) for g in groups] == [("base", 0.3, 4), ("member", 0.4, 6)]
    groups = lp.param_groups(model, lr=0.1, no_decay=lambda name, parameter: name.endswith("bias"))
    assert [len(g["params"]) for g in groups] == [2, 2, 3, 3]
    assert [g["name"] for g in lp.param_groups(small_net(), lr=0.1)] == ["base"]


def test_member_loss_is_the_sum_of_the_members_means():
    output, target = torch.randn(K * B, 5), torch.randint(5, (K * B,))
    target[0] = -100  # ignored: member 0's mean is over one sample less
    expected = sum(F.cross_entropy(o, t) for o, t in zip(output.chunk(K), target.chunk(K)))
    assert torch.equal(lp.member_loss(F.cross_entropy, output, target, num_members=K), expected)
    both = lp.member_loss(lambda o, t: F.cross_entropy(o["a"], t), {"a": output}, target, num_members=K)
    assert torch.equal(both, expected)
    each, values = nn.MSELoss(reduction="none"), torch.randn(K * B, 5)  # a loss [B, 5] a member
    mean = sum(F.mse_loss(o, t) for o, t in zip(output.chunk(K), values.chunk(K)))
    torch.testing.assert_close(lp.member_loss(each, output, values, num_members=K), mean)
    with pytest.raises(ValueError, match=r"output.size\(0\)=12 is not divisible by num_members=5"):
        lp.member_loss(F.cross_entropy, output, target, num_members=5)


def test_lists_of_samples_go_with_their_members():
    """As a detector's targets, of which every sample has another number."""
    targets = [{"boxes": torch.zeros(n % 4, 4), "number": torch.tensor(n)} for n in range(K * B)]
    names = [f"{n}.jpg" for n in range(K * B)]
    parts = [slice(k * B, (k + 1) * B) for k in range(K)]
    x = torch.arange(K * B, dtype=torch.float64)
    minibatches = [(x[part], tuple(targets[part]), UserDict(names=names[part], weights=[x[part]])) for part in parts]
    (stacked,) = lp.stack_batches(minibatches, K)
    assert [target["number"] for target in stacked[1]] == list(range(K * B))
    assert stacked[2]["names"] == names and torch.equal(stacked[2]["weights"][0], x)
    seen = []
    loss = lp.member_loss(lambda o, t: seen.append(t) or o.mean(), stacked[0], stacked[1:], num_members=K)
    assert loss == sum(x[part].mean() for part in parts)
    for part, (of_member, others) in zip(parts, seen):
        assert [id(target) for target in of_member] == [id(target) for target in targets[part]]
        assert others["names"] == names[part] and torch.equal(others["weights"][0], x[part])

    def flip(*of_member):
        return tuple(one[::-1] if isinstance(one, list) else one.flip(0) for one in of_member)

    flipped = lp.map_members(flip, x, names, targets, num_members=K)
    assert flipped[1] == [names[n] for part in parts for n in range(part.stop - 1, part.start - 1, -1)]
    assert [f"{n:.0f}.jpg" for n in flipped[0]] == [f"{t['number']}.jpg" for t in flipped[2]] == flipped[1]
    with pytest.raises(
        TypeError, match="member_loss: loss_fn must return a tensor, got dict; of several losses, return"
    ):
        lp.member_loss(lambda o, t: {"loss": o.mean()}, x, None, num_members=K)


@pytest.mark.parametrize("rows", (1, 2, 3))
def test_as_many_samples_as_a_batch_has_parts(rows):
    """Of two images and a pair of targets the batch is no pair of samples, and two views are none either."""
    x = torch.randn(rows, 3)
    for labels in (0, rows, 5):
        targets = tuple({"labels": torch.zeros(labels)} for _ in range(rows))
        for batch in ((x, targets), ({"x": x}, targets), (x, "today", targets), ((x, x), x, targets)):
            (stacked,) = lp.stack_batches([batch] * K, K)
            assert [id(target) for target in stacked[-1]] == [id(target) for target in targets] * K
            leaves = torch.utils._pytree.tree_leaves(stacked[:-1])
            assert {leaf.shape for leaf in leaves if isinstance(leaf, torch.Tensor)} == {(K * rows, 3)}


def test_samples_that_cannot_be_stacked():
    """Images of several sizes in a list, graphs."""
    detection = [((torch.zeros(3, n, 9), torch.zeros(3, 7, 8)), ({"boxes": torch.zeros(n, 4)},) * 2) for n in (7, 8, 8)]
    graphs = [{"x": torch.zeros(6, 5), "edges": torch.zeros(2, n)} for n in (7, 8, 8)]
    for batches in (detection, graphs):
        with pytest.raises(ValueError, match="must have one shape, got .*; pad .* let the members take turns"):
            next(iter(lp.stack_batches(batches, K)))
    with pytest.raises(TypeError, match="stack_batches: a batch must hold a tensor .* got object; .* take turns"):
        next(iter(lp.stack_batches([object()], K)))
    parts = [{"labelled": torch.full((2, 1), n), "unlabelled": torch.full((3, 1), n)} for n in range(K)]
    (batch,) = lp.stack_batches(parts, K)
    assert batch["labelled"].flatten().tolist() == [0, 0, 1, 1, 2, 2] and batch["unlabelled"].shape == (9, 1)


def test_stack_batches_carries_leftovers_and_drops_the_short_batch():
    samples = torch.arange(22)
    loader = DataLoader(TensorDataset(samples, samples * 10), batch_size=4)  # 5 batches of 4, one of 2
    stacked = lp.stack_batches(loader, K)
    epochs = []
    for length in (1, 2, 2, 1):  # 5 → 1 and 2 left; 7 → 2 and 1 left; 6 → 2; 5 → 1
        assert len(stacked) == length
        epochs.append(list(stacked))
        assert len(epochs[-1]) == length
        assert all(torch.equal(x * 10, y) for x, y in epochs[-1])
    assert epochs[0][0][0].tolist() == list(range(12))
    assert epochs[1][0][0].tolist() == [*range(12, 20), *range(4)]
    assert epochs[1][1][0].tolist() == list(range(4, 16))
    assert epochs[2][0][0].tolist() == [*range(16, 20), *range(8)]
    few = lp.stack_batches(loader, 8)
    with pytest.warns(UserWarning, match="5 minibatches, fewer than num_members=8, .* keep one stack_batches"):
        assert list(few) == []
    assert len(list(few)) == 1
    dicts = [{"x": torch.full((2, 1), float(i)), "name": [f"a{i}", f"b{i}"]} for i in range(K)]
    (batch,) = lp.stack_batches(dicts, K)
    assert batch["x"].flatten().tolist() == [0, 0, 1, 1, 2, 2] and batch["name"] == ["a0", "b0", "a1", "b1", "a2", "b2"]
    Meta = namedtuple("Meta", "name path")
    (batch,) = lp.stack_batches([(torch.zeros(2), Meta(f"n{i}", "p")) for i in range(K)], K)
    assert batch[1] == Meta(["n0", "n1", "n2"], "p")
