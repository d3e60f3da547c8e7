"""An expanded model beside the rest of PyTorch: averaging, clipping, precision, checkpointing, compilation.

Shapes: K members, B samples each.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_late_phase_errors import Temperature
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import CheckpointError, checkpoint

import latephase_kernels as lp

K, B = 3, 4


class Net(nn.Module):
    """A convolution, two batch norms and a head; the middle can be recomputed in the backward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(2, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 2), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 3)
        self.recompute = False

    def forward(self, x):
        x = F.relu(self.bn1(self.stem(x)))
        x = checkpoint(self.middle, x, use_reentrant=False) if self.recompute else self.middle(x)
        return self.fc(x.mean((2, 3)))


LATE = ("bn1.", "middle.1.", "fc.")


def images(rows, seed=3, dtype=torch.float32):
    return torch.randn(rows, 2, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(rows, seed=4):
    return torch.randint(3, (rows,), generator=torch.Generator().manual_seed(seed))


def expanded(targets=("batch_norm", "head")):
    """Members that differ in weights and statistics."""
    model = lp.expand(Net(), K, targets=targets, noise_std=0.3, generator=torch.Generator().manual_seed(1))
    for seed in range(3):
        model(images(K * B, seed))
    return model


def plain_members(model):
    """The members as plain models."""
    plains = []
    for k in range(K):
        plain = Net().to(next(model.parameters()).dtype)
        plain.load_state_dict({n: v[k] if n.startswith(LATE) else v for n, v in model.state_dict().items()})
        plains.append(plain)
    return plains


def loss_of(model, x, target):
    return lp.member_loss(F.cross_entropy, model(x), target, num_members=K)


def train(model, optimizer, steps, *each_step):
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(model, images(K * B, seed), labels(K * B, seed)).backward()
        optimizer.step()
        for call in each_step:
            call()


# ---------------------------------------------------------------------------------------------- averaging


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_model(kind):
    """Average during the late phase, recompute the statistics, collapse: the averages of every plain tensor."""
    model = expanded()
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if kind == "ema" else {}
    averaged = AveragedModel(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    history = []
    train(
        model,
        optimizer,
        4,
        lambda: averaged.update_parameters(model),
        lambda: history.append({name: p.detach().clone() for name, p in model.named_parameters()}),
        schedule.step,
    )
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}
    shares = [0.25] * 4 if kind == "swa" else [0.125, 0.125, 0.25, 0.5]
    for name, parameter in averaged.module.named_parameters():
        torch.testing.assert_close(parameter, sum(s * h[name] for s, h in zip(shares, history)))
        assert parameter.num_members == K if name.startswith(LATE) else not hasattr(parameter, "num_members")
    data = [images(B, seed) for seed in range(5, 8)]
    weights = {name: p.detach().clone() for name, p in averaged.module.named_parameters()}
    trained = copy.deepcopy(model.state_dict())
    lp.update_bn(data, averaged)
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())  # the copy's own
    plains = plain_members(averaged.module)
    for plain in plains:
        torch.optim.swa_utils.update_bn(data, plain)
    for name, value in averaged.module.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, torch.stack([plain.state_dict()[name] for plain in plains]))
    collapsed = lp.collapse(averaged.module.eval())
    for name in ("stem.weight", "middle.0.bias"):
        assert torch.equal(collapsed.get_parameter(name), weights[name])
    torch.testing.assert_close(collapsed.fc.weight, weights["fc.weight"].mean(0))
    x = images(6)
    outputs = torch.stack([plain.eval().bn1(plain.stem(x)) for plain in plains]).mean(0)
    torch.testing.assert_close(collapsed.bn1(collapsed.stem(x)), outputs)


def test_torchs_update_bn_takes_stacked_batches_or_says_why_not():
    """It cannot replicate batches; it must not pass the layers over either."""
    model = expanded()
    data = [images(K * B, seed) for seed in range(2)]
    truth = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(data, model)
    lp.update_bn([part for batch in data for part in batch.chunk(K)], truth, share=True)
    for name, value in truth.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    with pytest.raises(ValueError, match=r"input.size\(0\)=5 is not divisible by num_members=3; stack 3"):
        torch.optim.swa_utils.update_bn([images(5)], model)


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_clipping_equals_the_loops(norm_type, scale):
    model = expanded().double()
    lp.set_base_grad_scale(torch.optim.SGD(model.parameters(), lr=1.0), model, scale)
    x, target = images(K * B, dtype=torch.float64), labels(K * B)
    x[:B] *= 100  # one outlier
    plains = plain_members(model)
    loss_of(model, x, target).backward()
    factor = 1.0 if scale == "sum" else 1.0 / K
    max_norm = 0.3 if norm_type > 2 else 0.5
    expected = []
    for plain, part, part_target in zip(plains, x.chunk(K), target.chunk(K)):
        F.cross_entropy(plain(part), part_target).backward()
        late = [p for name, p in plain.named_parameters() if name.startswith(LATE)]
        expected.append(torch.nn.utils.clip_grad_norm_(late, max_norm, norm_type))
    base = dict(plains[0].named_parameters())
    base = {name: parameter for name, parameter in base.items() if not name.startswith(LATE)}
    for name, parameter in base.items():
        parameter.grad = factor * sum(plain.get_parameter(name).grad for plain in plains)
    expected.insert(0, torch.nn.utils.clip_grad_norm_(base.values(), max_norm, norm_type))
    norms = lp.clip_grad_norm_(model, max_norm, norm_type)
    torch.testing.assert_close(norms, torch.stack(expected).detach(), rtol=1e-9, atol=1e-9)
    assert (norms > max_norm).any() and (norms < max_norm).any()  # both branches are seen
    for name, parameter in model.named_parameters():
        if name.startswith(LATE):
            truth = torch.stack([plain.get_parameter(name).grad for plain in plains])
        else:
            truth = base[name].grad / factor  # the optimizer's hook scales it
        torch.testing.assert_close(parameter.grad, truth, rtol=1e-9, atol=1e-12)


def test_a_copy_is_clipped_by_the_gradients_that_its_own_optimizer_sees():
    model, x, target = expanded(), images(K * B), labels(K * B)
    lp.set_base_grad_scale(torch.optim.SGD(model.parameters(), lr=1.0), model, "mean")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # no optimizer scales theirs
    scaled, *norms = [lp.clip_grad_norm_(m, 1e9) for m in (model, *copies) if loss_of(m, x, target).backward() is None]
    for of_copy in norms:
        torch.testing.assert_close(of_copy[0], scaled[0] * K)
        torch.testing.assert_close(of_copy[1:], scaled[1:])


def test_clipping_of_weights_without_dimensions():
    model = lp.expand(nn.Sequential(Temperature()), K, targets=lambda name, module: name == "0")
    model(torch.tensor([[3.0], [-4.0], [0.5]])).sum().backward()
    assert lp.clip_grad_norm_(model, 1.0).tolist() == [0.0, 3.0, 4.0, 0.5]
    torch.testing.assert_close(model[0].scale.grad, torch.tensor([1.0, -1.0, 0.5]), rtol=1e-5, atol=0)


def test_clipping_of_sparse_gradients():
    def clipped(sparse):
        torch.manual_seed(0)
        layers = nn.Embedding(10, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 2)
        model = lp.expand(nn.Sequential(*layers), K, targets=lambda name, module: name == "0", noise_std=0.2)
        model(torch.arange(2 * K * B).view(K * B, 2) % 7).square().sum().backward()
        assert model[0].weight.grad.is_sparse == sparse
        return lp.clip_grad_norm_(model, 0.1), *(p.grad.to_dense() for p in model.parameters())

    for own, dense in zip(clipped(True), clipped(False)):
        torch.testing.assert_close(own, dense)


def test_clipping_of_gradients_that_are_not_finite():
    model = expanded()
    x = images(K * B)
    x[-1] = float("nan")  # the last member
    loss_of(model, x, labels(K * B)).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_: the norms must be finite, got \[nan, .*, nan\]"):
        lp.clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad.nan_to_num(7), before[name].nan_to_num(7))
    norms = lp.clip_grad_norm_(model, 1e9)
    assert norms.isnan().tolist() == [True, False, False, True]
    assert torch.equal(model.fc.weight.grad[:2], before["fc.weight"][:2])
    lp.clip_grad_norm_(expanded(), 1.0)  # no gradients at all
    with pytest.raises(RuntimeError, match="clip_grad_norm_: model is not expanded"):
        lp.clip_grad_norm_(Net(), 1.0)
    with pytest.raises(ValueError, match="max_norm must be at least 0, got -1.0"):
        lp.clip_grad_norm_(expanded(), -1.0)
    with pytest.raises(TypeError, match="max_norm must be a float, got str"):
        lp.clip_grad_norm_(expanded(), "1")


def test_grad_scaler():
    """Scaled and unscaled training agree; a member that overflows skips the whole step."""
    model = expanded().double()
    reference = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, target = images(K * B, dtype=torch.float64), labels(K * B)
    for trained in (model, reference):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        lp.set_base_grad_scale(optimizer, trained, "mean")
        loss = loss_of(trained, x, target)
        if trained is reference:
            loss.backward()
            lp.clip_grad_norm_(trained, 0.3)
            optimizer.step()
            continue
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        lp.clip_grad_norm_(trained, 0.3)
        scaler.step(optimizer)
        scaler.update()
        after = copy.deepcopy(list(trained.parameters()))
        optimizer.zero_grad()
        scaler.scale(loss_of(trained, x, target) * torch.tensor(float("inf"))).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), after))
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------- running


def test_autocast_is_each_members_autocast():
    model = expanded()
    plains = plain_members(model)
    x, target = images(K * B), labels(K * B)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        expected = torch.cat([plain(part) for plain, part in zip(plains, x.chunk(K))])
        lp.member_loss(F.cross_entropy, output, target, num_members=K).backward()
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=2**-6, atol=2**-6)  # sums in another order, bf16 between layers
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert model.bn1.running_var.dtype == torch.float32


@pytest.mark.parametrize("targets", [("batch_norm", "head"), ("head",)])
def test_activation_checkpointing(targets):
    """Gradients are those without; statistics move twice, as a plain batch norm's do."""
    model, x, target = expanded(targets), images(K * B), labels(K * B)
    twice, other = copy.deepcopy(model), copy.deepcopy(model)
    twice.recompute = True
    loss_of(model, x, target).backward()
    loss_of(twice, x, target).backward()
    for (name, p), q in zip(model.named_parameters(), twice.parameters()):
        assert torch.equal(p.grad, q.grad), name
    other(x), other(x)
    torch.testing.assert_close(twice.middle[1].running_mean, other.middle[1].running_mean)


def test_checkpointing_must_be_recomputed_as_the_same_members():
    model = expanded()
    model.recompute = True
    with lp.members(model, 1):
        loss = model(images(B)).sum()
        loss.backward()
    with lp.members(model, range(2)):
        loss = model(images(2 * B)).sum()
    with pytest.raises((CheckpointError, ValueError)):
        loss.backward()  # outside of the with block: as all members


def test_functional_call_and_its_gradients():
    model, x, target = expanded(), images(K * B), labels(K * B)
    parameters = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(parameters[name])
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    output = torch.func.functional_call(model, (parameters, buffers), (x,))
    loss = lp.member_loss(F.cross_entropy, output, target, num_members=K)
    gradients = dict(zip(parameters, torch.autograd.grad(loss, tuple(parameters.values()))))
    loss_of(other, x, target).backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    torch.testing.assert_close(buffers["bn1.running_mean"], other.bn1.running_mean)


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize(
    "layer, target",
    [
        (nn.BatchNorm1d(4), "batch_norm"),
        (nn.LayerNorm(4), "layer_norm"),
        (nn.Linear(4, 3), "head"),
        (nn.Linear(4, 3), "rank1"),
    ],
    ids=["batch_norm", "layer_norm", "head", "rank1"],
)
def test_the_average_passes_its_gradient_to_every_member(layer, target, noise_std):
    model = lp.expand(nn.Sequential(copy.deepcopy(layer)).double(), K, targets=target, noise_std=noise_std).eval()
    x = torch.randn(B, 4, dtype=torch.float64)
    average = model(x)
    with lp.members(model, "stacked"):
        members = model(x.repeat(K, 1)).unflatten(0, (K, B)).mean(0)
    factors, parameters = torch.randn_like(average), list(model.parameters())
    for one, other in zip(*(torch.autograd.grad((y * factors).sum(), parameters) for y in (average, members))):
        torch.testing.assert_close(one, other)


def test_groups_are_named_as_those_made_after_expand():
    model = Net()
    optimizer = torch.optim.SGD(lp.param_groups(model, lr=0.1, no_decay=1))
    lp.expand(model, K, optimizers=[optimizer])
    names = {id(p): group["name"] for group in optimizer.param_groups for p in group["params"]}
    after = {id(p): group["name"] for group in lp.param_groups(model, lr=0.1, no_decay=1) for p in group["params"]}
    assert names == after and "member_no_decay" in names.values()


def test_predictions_of_what_has_no_batch_in_front():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4, num_layers=K, batch_first=True)

        def forward(self, x):
            y, (h, _) = self.lstm(x)
            return y, h

    model = lp.expand(Recurrent(), K, targets="rank1")
    with pytest.raises(ValueError, match=r"the batch in dim 0 \(3 members × 4 rows\), got shape \[3, 12, 4\]"):
        lp.predict(model, torch.randn(B, 5, 3), members="all")


def test_timms_linear_layer_is_a_linear_layer():
    linear = pytest.importorskip("timm.layers.linear").Linear
    model = nn.Sequential(linear(4, 3))
    x = torch.randn(B, 4)
    expected = model(x)
    lp.expand(model, K, targets="head")
    torch.testing.assert_close(lp.predict(model, x, members="all"), expected.expand(K, B, 3))
    assert type(lp.collapse(model)[0]) is linear and torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "layer, target", [(nn.Linear(4, 3), "head"), (nn.LayerNorm(4), "layer_norm"), (nn.RMSNorm(4), "rms_norm")]
)
def test_outputs_are_no_views_where_the_plain_layers_are_none(layer, target):
    """FSDP2's hooks are on outputs: of a view they are lost with the first operation in place, and backward fails."""
    model = lp.expand(nn.Sequential(copy.deepcopy(layer)), K, targets=target)
    for shape in ((K * B, 4), (K * B, 5, 4)):
        assert not model(torch.randn(shape))._is_view()


def test_sharded_parameters_are_marked():
    """fully_shard makes parameters of its own; a warning and users' filters go by the mark."""
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plains = [nn.Sequential(Net(), nn.LSTM(3, 2, batch_first=True)) for _ in range(2)]
        models = [lp.expand(plain, K, targets=("batch_norm", "rank1")) for plain in plains]
        fully_shard(models[1], mesh=dist.init_device_mesh("cpu", (1,)))
        marks = [{name: getattr(p, "num_members", None) for name, p in model.named_parameters()} for model in models]
        assert marks[0] == marks[1] and {*marks[0].values()} == {K, None}
        late = [parameter for parameter in models[1].parameters() if hasattr(parameter, "num_members")]
        with pytest.warns(UserWarning, match="LBFGS.step: the rule mixes the elements of a tensor, and .* replicated"):
            torch.optim.LBFGS(late).step(lambda: torch.zeros(()))
    finally:
        dist.destroy_process_group()


def test_compiled_training_step():
    model, x, target = expanded(), images(K * B), labels(K * B)
    reference = copy.deepcopy(model)
    compiled = torch.compile(lambda: loss_of(model, x, target), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled().backward()
        loss_of(reference, x, target).backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    torch.testing.assert_close(model.bn1.running_var, reference.bn1.running_var)


class Predictor(nn.Module):
    """What is exported: every member's answer."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return lp.predict(self.model, x, members="all")


def exported(model, x):
    """The program for any number of samples, and the names of its operators."""
    shapes = ({0: torch.export.Dim("samples", min=2, max=1024)},)
    program = torch.export.export(Predictor(model).eval(), (x,), dynamic_shapes=shapes)
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    return program.module(), {str(node.target) for graph in graphs for node in graph.nodes}


def test_exported_for_any_number_of_samples():
    layers = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 5)
    model = lp.fuse(lp.expand(nn.Sequential(*layers), K, targets=("batch_norm", "rank1"), noise_std=0.2)).eval()
    few, many = torch.randn(4, 12), torch.randn(200, 12)  # with the gains over the rows, and in the weight
    expected = [lp.predict(model, x, members="all") for x in (few, many)]
    program, operators = exported(model, few)
    assert "latephase_kernels.rank1_linear.default" in operators
    for x, y in zip((few, many), expected):
        torch.testing.assert_close(program(x), y)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
def test_exported_without_the_librarys_operators():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.lstm(self.norm(self.conv(x)).mean(2).mT)[0][:, -1])

    model = lp.fuse(lp.expand(Recurrent(), K, targets=("batch_norm", "rank1"), noise_std=0.2)).eval()
    x, other = torch.randn(4, 2, 2, 2), torch.randn(7, 2, 2, 2)
    expected = lp.predict(model, other, members="all")
    programs = [torch.jit.trace(Predictor(model), x, check_trace=False)]
    operators: set[str] = set()
    lp.set_backend("reference")
    try:
        if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14):  # before, strides are worked out for one size
            program, operators = exported(model, x)
            programs.append(program)
    finally:
        lp.set_backend("auto")
    # repeat_interleave's translation to ONNX is wrong for any number of rows.
    assert not [name for name in operators if "latephase" in name or "repeat_interleave" in name]
    for program in programs:
        torch.testing.assert_close(program(other), expected)


def test_mixup_stays_inside_a_member():
    v2 = pytest.importorskip("torchvision.transforms.v2")
    x, target = images(K * B), labels(K * B)
    torch.manual_seed(0)
    mixed, mixed_target = lp.map_members(v2.MixUp(num_classes=3), x, target, num_members=K)
    torch.manual_seed(0)
    parts = [v2.MixUp(num_classes=3)(*part) for part in zip(x.chunk(K), target.chunk(K))]
    assert torch.equal(mixed, torch.cat([part[0] for part in parts]))
    assert torch.equal(mixed_target, torch.cat([part[1] for part in parts])) and mixed_target.shape == (K * B, 3)
    with pytest.raises(ValueError, match=r"map_members: batch.size\(0\)=12 is not divisible by num_members=5"):
        lp.map_members(v2.MixUp(num_classes=3), x, target, num_members=5)
