"""The code of docs/other_methods.md, run as it stands there, against plain PyTorch in float64."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import latephase_kernels as lp

PAGE = Path(__file__).parent.parent / "docs" / "other_methods.md"


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def run_section(title, **names):
    """Run the code under a heading of the page; return all names that it leaves."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    names |= {"copy": copy, "torch": torch, "F": F, "lp": lp}
    for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(code, names)
    return names


def network():
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(6)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norms[0], nn.ReLU(), nn.Conv2d(4, 6, 3), norms[1], nn.ReLU(), nn.Flatten(), nn.Linear(54, 5)
    )  # fmt: skip


def data(rows):
    return torch.randn(rows, 3, 7, 7), torch.randint(0, 5, (rows,))


def assert_same(model, plain):
    """Weights and buffers of plain models."""
    ours, theirs = model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12)


def twins(model, number):
    """Copies that share all but batch norms and head."""
    copies = [copy.deepcopy(model) for _ in range(number)]
    for i in (0, 3):
        for other in copies[1:]:
            other[i].weight, other[i].bias = copies[0][i].weight, copies[0][i].bias
    return copies


def sgd(models):
    return torch.optim.SGD({p for model in models for p in model.parameters()}, lr=0.1)


def test_tabm():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 1))
    plain, minibatches = copy.deepcopy(mlp), [(torch.randn(4, 5), torch.randn(4, 1)) for _ in range(3)]
    torch.manual_seed(1)
    names = run_section("TabM", mlp=mlp, minibatches=minibatches)
    torch.manual_seed(1)
    layers = []  # [32, …]: r and s of the gains, bias; as the paper's formulas have them
    for index, layer in enumerate((plain[0], plain[2])):
        r, s = torch.ones(32, layer.in_features), torch.ones(32, layer.out_features)
        if index == 0:
            r.bernoulli_(0.5).mul_(2).sub_(1)
            assert 0.3 < (r == 1).double().mean() < 0.7
        layers.append((layer.weight, r, s, layer.bias.detach().repeat(32, 1)))
    head = plain[4].weight.detach().repeat(32, 1, 1), plain[4].bias.detach().repeat(32, 1)
    own = [p.requires_grad_() for _, *tensors in layers for p in tensors] + [p.requires_grad_() for p in head]

    def answers_of(features):
        x = features.expand(32, -1, -1)
        for weight, r, s, bias in layers:
            x = F.relu((x * r[:, None]) @ weight.T * s[:, None] + bias[:, None])
        return x @ head[0].mT + head[1][:, None]

    optimizer = torch.optim.AdamW([*(weight for weight, *_ in layers), *own], lr=2e-3, weight_decay=3e-4)
    for features, answers in minibatches:
        optimizer.zero_grad()
        F.mse_loss(answers_of(features), answers.expand(32, -1, -1)).backward()
        optimizer.step()
    prediction = answers_of(minibatches[-1][0]).mean(0)
    torch.testing.assert_close(names["prediction"], prediction, rtol=1e-9, atol=1e-12)


def test_ghost_batch_norm():
    model, (images, labels) = network(), data(16)
    plain = copy.deepcopy(model)
    run_section("Ghost batch norm", model=model, images=images, labels=labels)
    F.cross_entropy(torch.cat([plain(part) for part in images.chunk(4)]), labels).backward()
    assert_same(model, plain)
    for ours, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    assert type(model[1]) is nn.BatchNorm2d


def fast_gradient_sign(model, images, labels):
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), labels), images)
    return (images + 0.1 * gradient.sign()).detach()


def test_advprop():
    model, minibatches = network(), [data(6) for _ in range(3)]
    clean, auxiliary = twins(model, 2)
    auxiliary[7] = clean[7]  # one head
    run_section("AdvProp", model=model, minibatches=minibatches, attack=fast_gradient_sign)
    optimizer = sgd([clean, auxiliary])
    for images, labels in minibatches:
        adversarial = fast_gradient_sign(auxiliary, images, labels)
        optimizer.zero_grad()
        (F.cross_entropy(clean(images), labels) + F.cross_entropy(auxiliary(adversarial), labels)).backward()
        optimizer.step()
    assert_same(model, clean)


def test_domain_specific_batch_norm():
    model, domains = network(), [[data(4) for _ in range(3)] for _ in range(3)]
    networks = twins(model, 3)
    names = run_section("Domain-specific batch norm", model=model, domains=domains)
    optimizer = sgd(networks)
    for batches in zip(*domains):
        optimizer.zero_grad()
        for of_domain, (images, labels) in zip(networks, batches):
            F.cross_entropy(of_domain(images), labels).backward()
        optimizer.step()
    assert_same(names["plain"], networks[1])
    expected = networks[1].eval()(names["images"])
    torch.testing.assert_close(names["of_one_domain"], expected, rtol=1e-12, atol=1e-12)


class Block(nn.Module):
    """Attention and two layers behind it, as transformers have them."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.norm, self.feed_forward = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        y = x + F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return y + self.feed_forward(self.norm(y))


def test_adapters():
    torch.manual_seed(0)
    model, sequences, answers = nn.Sequential(Block(), Block()), torch.randn(6, 5, 8), torch.randn(6, 5, 8)
    plain = copy.deepcopy(model)
    names = run_section("Adapters", model=model, sequences=sequences, answers=answers)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6 and all(p.shape == (3, 8) for p in trained.values())
    output = plain(sequences[4:])
    gain = torch.ones(8, requires_grad=True)
    key = plain[1].key
    handle = key.register_forward_hook(lambda module, args, y: y * gain)
    F.mse_loss(plain(sequences[4:]), answers[4:]).backward()
    handle.remove()
    torch.testing.assert_close(trained["1.key.output_gain"].grad[2], gain.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(names["merged"](sequences[4:]), output, rtol=1e-12, atol=1e-12)


def test_inner_loops():
    model, (support, support_labels), (query, query_labels) = network(), data(12), data(12)
    plain = copy.deepcopy(model)
    inside = [f"{i}.{name}" for i in (1, 4) for name in ("weight", "bias")]
    names = run_section(
        "Inner loops of meta-learning",
        model=model, moved_inside=inside, support=support, support_labels=support_labels,
        query=query, query_labels=query_labels,
    )  # fmt: skip
    for rows in (slice(4 * k, 4 * k + 4) for k in range(3)):
        own = {name: plain.get_parameter(name) for name in inside}
        for _ in range(2):
            loss = F.cross_entropy(torch.func.functional_call(plain, own, support[rows]), support_labels[rows])
            gradients = torch.autograd.grad(loss, list(own.values()), create_graph=True)
            own = {name: p - 0.1 * g for (name, p), g in zip(own.items(), gradients)}
        F.cross_entropy(torch.func.functional_call(plain, own, query[rows]), query_labels[rows]).backward()
    for name, parameter in plain.named_parameters():
        ours = names["start"][name] if name in inside else model.get_parameter(name)
        torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-9, atol=1e-12)


def test_batch_ensemble():
    model, minibatches = network(), [data(6) for _ in range(4)]
    layers = [(i, i == 7) for i in (0, 3, 7)]
    other, start = copy.deepcopy(model), {}

    class Minibatches(list):
        def __iter__(self):  # the loop begins: the members have their gains
            start.update({name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()})
            return super().__iter__()

    names = run_section("BatchEnsemble", model=model, minibatches=Minibatches(minibatches))
    decay = {name: 0.0 if "_gain" in name else 5e-4 for name in start}
    assert all((start[name].abs() == 1).all() for name in start if "_gain" in name)

    def member(k, images):
        """The plain network with member k's weights, in one expression for each."""
        own = {name: p for name, p in start.items() if "_gain" not in name}
        for i, linear in layers:
            s, r = start[f"{i}.input_gain"][k], start[f"{i}.output_gain"][k]
            gains = torch.outer(r, s) if linear else torch.outer(r, s)[..., None, None]
            own |= {f"{i}.weight": start[f"{i}.weight"] * gains, f"{i}.bias": start[f"{i}.bias"][k]}
        return torch.func.functional_call(other, own, images)

    for images, labels in minibatches:
        loss = sum(F.cross_entropy(member(k, images), labels) for k in range(4)) / 4
        gradients = torch.autograd.grad(loss, list(start.values()))
        with torch.no_grad():
            for (name, p), g in zip(start.items(), gradients):
                p -= 0.1 * (g + decay[name] * p)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, start[name], rtol=1e-10, atol=1e-12)
    other.eval()
    logits = torch.stack([member(k, images) for k in range(4)])
    torch.testing.assert_close(names["logits"], logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(names["probabilities"], logits.softmax(-1).mean(0), rtol=1e-10, atol=1e-12)
