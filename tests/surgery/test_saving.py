"""`save_memory` beside everything else that saves tensors, and with tensors of every kind."""

import gc
import threading

import normalized_networks as networks
import pytest
import torch
import torch.nn.functional as F
from saving_cases import IMAGES, accelerated, assert_same, chain, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.layers import adopt, recompute
from batchnorm.surgery.saving import bytes_for_backward, forget_outputs


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_a_part(reentrant):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([chain(2), chain(2), chain(2)])
            self.again = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.parts[0](x)
            x = checkpoint(self.parts[1], x, use_reentrant=reentrant) if self.again else self.parts[1](x)
            return self.parts[2](x)

    net, x = Net(), torch.randn(IMAGES, dtype=torch.float64)
    model = accelerated(net, x)
    whole = bytes_for_backward(model, (x,), forget=True)
    model.again = True
    # Torch's own layer would move its statistics twice under checkpointing.
    assert_same(gradients(model, x), gradients(net, x))
    assert bytes_for_backward(model, (x,), forget=True) < whole


def test_what_checkpointing_lets_go_is_gone_before_the_forward_is_over():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.part, self.last = chain(1), chain(2), chain(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.part, self.first(x), use_reentrant=False))

    model, storages, alive = Net(), [], []
    forget_outputs(model.train())
    for conv in (model.part[0], model.part[3]):
        conv.register_forward_hook(
            lambda m, i, o: storages.append(recompute.StorageWeakRef(o.untyped_storage()))
        )
    for path in ("1", "4"):
        adopt(model.part.get_submodule(path))
    model.last.register_forward_pre_hook(lambda m, i: alive.extend(not s.expired() for s in storages))
    model(torch.randn(IMAGES, dtype=torch.float64))
    assert alive == [False, False]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_the_whole(reentrant):
    net, x = chain(), torch.randn(IMAGES, dtype=torch.float64)
    model = accelerated(net, x)

    def run(net: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=reentrant)

    assert_same(gradients(model, x, run), gradients(net, x))


def test_other_hooks_on_saved_tensors_are_left_in_peace():
    net, x = chain(), torch.randn(IMAGES, dtype=torch.float64)
    model, packed = accelerated(net, x), []

    def run(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
            return net(x)

    assert_same(gradients(model, x, run), gradients(net, x))
    assert len(packed) >= 10


def test_where_hooks_on_saved_tensors_are_forbidden():
    net, x = chain(), torch.randn(IMAGES, dtype=torch.float64)

    def run(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            return net(x)

    assert_same(gradients(accelerated(net, x), x, run), gradients(net, x))


def test_backward_twice_through_one_graph():
    net, x = chain(), torch.randn(IMAGES, dtype=torch.float64)
    model = accelerated(net, x)
    for module in (net, model):
        out = module(x)
        out.backward(torch.ones_like(out) * 0.5, retain_graph=True)
        out.backward(out.detach())
    assert_same([p.grad for p in model.parameters()], [p.grad for p in net.parameters()])


def test_second_derivatives():
    def penalty(net: nn.Module, x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        return grad.square().sum()

    net, x = chain(2, act=nn.Sigmoid), torch.randn(IMAGES, dtype=torch.float64)
    assert_same(gradients(accelerated(net, x), x, penalty), gradients(net, x, penalty))


def test_part_of_the_gradients_only():
    net, x = chain(), torch.randn(IMAGES, dtype=torch.float64)
    model = accelerated(net, x)
    found = [torch.autograd.grad(m(x).square().sum(), [m[9].weight, m[13].weight]) for m in (model, net)]
    assert_same(*found)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_held_without_gradients(context):
    net, x = chain(), torch.randn(IMAGES, dtype=torch.float64)
    model = accelerated(net, x)
    with context():
        assert_same([model(x)], [net(x)])
    assert recompute.active() is None


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_changes_between_forward_and_backward(training):
    net, x = chain().train(training), torch.randn(IMAGES, dtype=torch.float64)
    model, found = accelerated(net, x), []
    for module in (model, net):
        loss = module(x).square().sum()
        with torch.no_grad():
            for name, tensor in module[7].state_dict().items():
                if "num" not in name:
                    tensor.add_(1)
        # Wanted is only what follows the layer: its own backward would refuse.
        found.append(torch.autograd.grad(loss, [module[9].weight, module[12].weight]))
    assert_same(*found)


def test_torch_func_goes_its_own_way():
    net, x = chain().eval(), torch.randn(IMAGES, dtype=torch.float64)
    model = accelerated(net, x)
    found = []
    for module in (model, net):
        parameters = {name: p.detach() for name, p in module.named_parameters()}

        def loss(parameters: dict[str, Tensor], module=module) -> Tensor:
            return torch.func.functional_call(module, parameters, (x,)).square().sum()

        found.append(list(torch.func.grad(loss)(parameters).values()))
        found[-1].append(torch.vmap(module)(x[:, None]).flatten(0, 1))
    assert_same(*found)


def test_a_tensor_overwritten_after_it_was_saved_is_an_error_as_in_autograd():
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            y = x.exp() * x
            x.add_(1)
            return y

    net = Net()
    forget_outputs(net)
    out = net(torch.randn(3, requires_grad=True))
    with pytest.raises(
        RuntimeError, match="modified by an in-place operation: it is at version 1, saved was 0"
    ):
        out.sum().backward()


def test_an_output_overwritten_before_it_is_saved_is_kept_as_it_is():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.out = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(self.conv(x)).mul_(3).clamp_(-1, 4))

    net, x = Net().double(), torch.randn(IMAGES, dtype=torch.float64)
    assert_same(gradients(accelerated(net, x), x), gradients(net, x))


class Views(nn.Module):
    """Outputs saved as views: slices, flattened, permuted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.last, self.fc = nn.Linear(6, 4), nn.Linear(6 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        a, b = x.chunk(2, 1)
        c = self.last(x.permute(0, 2, 3, 1)).sum((1, 2))
        return (self.left(a) * self.right(b)).sum() + self.fc(x.flatten(1)) * c


class Last(nn.Module):
    """Features last, and one normalization for each activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = bn.BatchNorm1d(8, channel_dim=-1)
        self.each = bn.BatchNormPerActivation((6, 8, 8), activation="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.each(self.b(torch.sigmoid(self.norm(self.a(x))))))


@pytest.mark.parametrize("make", [Views, Last])
@pytest.mark.parametrize("channels_last", [False, True])
def test_views_and_other_layouts(make, channels_last):
    net, x = make().double(), torch.randn(IMAGES, dtype=torch.float64)
    if channels_last:
        net, x = (t.to(memory_format=torch.channels_last) for t in (net, x))
    model, report = bn.accelerate(net, x, save_memory=True, channels_last=False)
    assert any("fused" in change.what for change in report.changes)
    for _ in range(3):
        assert_same(gradients(model, x), gradients(net, x))


class Exponential(nn.Module):
    """Saves its own output: held as it is, that would be a circle."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp() + 1


def test_memory_is_given_back_when_the_graph_is_dropped():
    net = nn.Sequential(*chain(3), Exponential(), *chain(1)).double()
    x = torch.randn(IMAGES, dtype=torch.float64)
    model, storages = accelerated(net, x), []

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        storages.extend(recompute.StorageWeakRef(t.untyped_storage()) for t in (*args, output) if t is not x)

    for module in model:
        module.register_forward_hook(note)
    gc.disable()
    try:
        out = model(x)
        assert not storages[0].expired()
        del out
        assert all(storage.expired() for storage in storages)
    finally:
        gc.enable()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.norm = bn.BatchNorm2d(6, activation="sigmoid")

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x), mask=x[:, 0] > 0))


class Strided(nn.Module):
    """The normalization's input is neither contiguous nor channels-last, and has gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(6, 12, 1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x)[:, ::2].transpose(2, 3))))


@pytest.mark.parametrize("make", [Masked, Strided])
def test_masks_and_odd_strides(make):
    net, x = make().double(), torch.randn(IMAGES, dtype=torch.float64)
    assert_same(gradients(accelerated(net, x), x), gradients(net, x))


def test_two_threads_train_two_models():
    nets = [chain(3), networks.ResNet().double()]
    xs = [torch.randn(IMAGES, dtype=torch.float64), torch.randn(networks.IMAGES, dtype=torch.float64)]
    models = [accelerated(net, x) for net, x in zip(nets, xs, strict=True)]
    found: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        for _ in range(20):
            found[i] = gradients(models[i], xs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, net in enumerate(nets):
        for _ in range(20):
            expected = gradients(net, xs[i])
        assert_same(found[i], expected)


def test_an_error_in_forward_leaves_nothing_behind():
    x = torch.randn(IMAGES, dtype=torch.float64)
    model = accelerated(chain(), x)
    with pytest.raises(RuntimeError):
        model(x[:, :3])
    assert recompute.active() is None
    assert recompute.can_forget()


def test_later_surgery_keeps_it():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.out = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.out(F.relu(self.norm(self.fc(x)))))

    net, x = Net().double(), torch.randn(8, 6, dtype=torch.float64)
    model, _ = bn.insert(accelerated(net, x), x)
    assert "forward_source" in dir(type(model))
    plain = bytes_for_backward(model, (x,), forget=False)
    assert bytes_for_backward(model, (x,), forget=True) < plain
    assert type(model).forgets_outputs
    seen = []
    model.out.register_forward_hook(lambda m, i, o: seen.append(recompute.active()))
    model(x)
    assert seen[0] is not None


def test_a_forward_kept_as_an_attribute_cannot_be_wrapped():
    net = chain()
    net.forward = lambda x: x * 2
    with pytest.raises(ValueError, match=r"another as an attribute: delete model\.forward"):
        bn.accelerate(net, save_memory=True)
