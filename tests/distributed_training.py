"""A small training run for several ranks, and the same in one process."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import latephase_kernels as lp

K, B, CLASSES, PLAIN_STEPS, LATE_STEPS = 4, 8, 3, 3, 4
NOISE = 0.1


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.BatchNorm2d(5, momentum=None),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 4, CLASSES),
    ).double()


def batches(steps, members):
    generator = torch.Generator().manual_seed(1 + members)
    for _ in range(steps):
        images = torch.randn(members * B, 2, 6, 6, generator=generator, dtype=torch.float64)
        yield images, torch.randint(CLASSES, (members * B,), generator=generator)


def make_optimizer(model):
    groups = lp.param_groups(model, lr=0.05, weight_decay=1e-2)
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)


def state_of(model, optimizer):
    """Every tensor: the model's, and the momentum by the parameter's name."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state[f"momentum of {name}"] = optimizer.state[parameter]["momentum_buffer"].clone()
    return state


def statistics(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def train_alone(targets, scale, shares):
    """Train in one process; `shares` = (before T0, after T0) parts of each minibatch that are normalized apart."""
    model = network()
    optimizer = make_optimizer(model)
    for images, labels in batches(PLAIN_STEPS, 1):
        _step(model, optimizer, images, labels, 1, shares[0])
    generator = torch.Generator().manual_seed(2)
    lp.expand(model, K, targets=targets, noise_std=NOISE, generator=generator, optimizers=[optimizer])
    lp.set_base_grad_scale(optimizer, model, scale)
    for images, labels in batches(LATE_STEPS, K):
        _step(model, optimizer, images, labels, K, shares[1])
    state = state_of(model, optimizer)
    model.eval()
    return state, lp.collapse(model).state_dict()


def _step(model, optimizer, images, labels, members, shares):
    """One step; each share's rows go through the model by themselves, running statistics are the mean of theirs."""
    model.train()
    optimizer.zero_grad()
    buffers = [b for layer in statistics(model) for b in (layer.running_mean, layer.running_var)]
    tracked = [layer.num_batches_tracked for layer in statistics(model)]
    before, after = [b.clone() for b in buffers + tracked], []
    for share in range(shares):
        for buffer, value in zip(buffers + tracked, before):
            buffer.copy_(value)
        x, y = (t.unflatten(0, (members, shares, -1))[:, share].flatten(0, 1) for t in (images, labels))
        (lp.member_loss(F.cross_entropy, model(x), y, num_members=members) / shares).backward()
        after.append([b.clone() for b in buffers])
    for place, buffer in enumerate(buffers):
        buffer.copy_(torch.stack([values[place] for values in after]).mean(0))
    optimizer.step()


def mesh_of(member_ranks, data_ranks):
    return init_device_mesh("cpu", (member_ranks, data_ranks), mesh_dim_names=("member", "data"))


def train_on_ranks(member_ranks, data_ranks, batch_norm, targets, scale, chunk):
    """Train the same on this rank; return whether ranks agree, all members' state, and the collapsed state."""
    model = network()
    optimizer = make_optimizer(model)
    distributed = lp.Distributed(model, mesh_of(member_ranks, data_ranks), batch_norm=batch_norm, bucket_bytes=256)
    for images, labels in batches(PLAIN_STEPS, 1):
        optimizer.zero_grad()
        distributed.backward(F.cross_entropy(model(distributed.share(images)), distributed.share(labels)))
        optimizer.step()
    generator = torch.Generator().manual_seed(2)
    distributed.expand(K, targets=targets, noise_std=NOISE, generator=generator, optimizers=[optimizer])
    lp.set_base_grad_scale(optimizer, model, scale)
    own = len(distributed.members)
    for images, labels in batches(LATE_STEPS, K):
        optimizer.zero_grad()
        x, y = distributed.share((images, labels))
        rows = len(x) // own
        for first in range(0, own, chunk or own):
            part = range(first, min(first + (chunk or own), own))
            with lp.members(model, part):
                output, target = model(x[part.start * rows : part.stop * rows]), y[part.start * rows : part.stop * rows]
                loss = lp.member_loss(F.cross_entropy, output, target, num_members=len(part))
                if part.stop == own:
                    distributed.backward(loss, rows=rows)
                else:
                    loss.backward()
        optimizer.step()
    local = state_of(model, optimizer)
    momenta = {name: value for name, value in local.items() if name.startswith("momentum")}
    with distributed.gathered():
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(local[name], tensor) for name, tensor in model.state_dict().items())
    copied = copy.deepcopy(model)
    assert copied.state_dict().keys() == local.keys() - momenta.keys()
    model.eval()
    return distributed.members, {**state, **momenta}, distributed.collapse().state_dict()
