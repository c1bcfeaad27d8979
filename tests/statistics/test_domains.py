"""Domains: one set of weights, several statistics, selected by name and kept in a file."""

import json
import struct

import pytest
import safetensors.torch
import torch
from torch import nn

import batchnorm as bn
from batchnorm.statistics import Domains, adapt


def network() -> nn.Sequential:
    """torch's layers and ours, one without γ and β, one without statistics."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        bn.BatchNorm2d(4, affine=False, activation="relu"),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).eval()


def images(shift: float) -> torch.Tensor:
    return torch.randn(48, 1, 6, 6, generator=torch.Generator().manual_seed(1)) * (1 + shift) + shift


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def three():
    """A network, its domains, and its state in each."""
    model = network()
    domains, states = Domains(model), {}
    domains.store("source")
    states["source"] = bits(model)
    for name, shift in (("usps", 1.0), ("über/alles.weight", 3.0)):
        adapt(model, images(shift).split(24), method="entropy", rate=0.1, trust=True)
        domains.store(name)
        states[name] = bits(model)
    return model, domains, states


def test_each_domain_comes_back_to_the_bit_and_the_rest_is_shared(three):
    model, domains, states = three
    assert domains.names == ("source", "usps", "über/alles.weight")
    outputs = {}
    for name in (*domains.names, *reversed(domains.names)):
        domains.select(name)
        assert same(model, states[name])
        with torch.no_grad():
            y = model(images(0.5))
        assert torch.equal(outputs.setdefault(name, y), y)
    assert not torch.equal(states["usps"]["1.weight"], states["source"]["1.weight"])  # γ is a domain's own
    assert not torch.equal(states["usps"]["1.running_var"], states["source"]["1.running_var"])
    assert not torch.equal(outputs["usps"], outputs["source"])


def test_what_is_stored_is_a_copy(three):
    model, domains, states = three
    domains.select("usps")
    with torch.no_grad():
        for tensor in (*model.buffers(), *model[1].parameters()):
            tensor.zero_()
    domains.select("usps")
    assert same(model, states["usps"])


def test_a_block_is_in_a_domain_and_leaves_everything_as_it_was(three):
    model, domains, states = three
    domains.select("source")
    model[1].running_mean.fill_(7)  # stored nowhere
    before = bits(model)
    with domains.selected("usps") as inside:
        assert inside is model
        assert same(model, states["usps"])
        with domains.selected("source"):
            assert same(model, states["source"])
        assert same(model, states["usps"])
    assert same(model, before)
    block = domains.selected("usps")
    with pytest.raises(KeyError), block:
        raise KeyError
    assert same(model, before)
    assert not model.training


def test_optimizers_and_modes_stay(three):
    model, domains, _states = three
    model.train()
    weight = model[1].weight
    weight.grad = torch.ones_like(weight)
    domains.select("source")
    assert model[1].weight is weight
    assert weight.grad.eq(1).all()
    assert all(m.training for m in model.modules())


def test_unknown_names_are_refused_with_what_is_known(three):
    model, domains, _states = three
    before = bits(model)
    message = (
        r"there is no domain 'ups'; known are 'source', 'usps', 'über/alles.weight'. Did you mean 'usps'\?"
    )
    for use in (domains.select, domains.remove, lambda name: domains.selected(name).__enter__()):
        with pytest.raises(ValueError, match=message):
            use("ups")
    with pytest.raises(ValueError, match=r"known are none yet: store one\.$"):
        Domains(network()).select("usps")
    assert same(model, before)


def test_names_are_text_and_taken_once(three):
    model, domains, states = three
    with pytest.raises(ValueError, match="there is a domain 'usps' already: give replace=True"):
        domains.store("usps")
    domains.select("source")
    domains.store("usps", replace=True)
    domains.select("usps")
    assert same(model, states["source"])
    with pytest.raises(ValueError, match="a domain needs a name"):
        domains.store("")
    with pytest.raises(TypeError, match="a domain's name must be text, got int"):
        domains.store(3)
    domains.remove("usps")
    assert domains.names == ("source", "über/alles.weight")
    assert repr(domains) == "Domains('source', 'über/alles.weight')"


def test_a_file_brings_them_back_beside_the_same_weights(three, tmp_path):
    _model, domains, states = three
    path = tmp_path / "domains.safetensors"
    domains.save(path)
    again = network()  # the same weights, other γ, β and statistics than the model's now
    before = bits(again)
    loaded = Domains.load(again, path)
    assert same(again, before)
    assert loaded.names == domains.names
    for name in domains.names:
        loaded.select(name)
        assert same(again, states[name])
    first = path.read_bytes()
    loaded.save(path)
    assert path.read_bytes() == first


def test_wrapped_models_are_looked_through(three, tmp_path):
    model, domains, states = three
    wrapped = nn.DataParallel(model)
    other = Domains(wrapped)
    domains.select("usps")
    other.store("x")
    domains.select("source")
    other.select("x")
    assert same(model, states["usps"])


def test_other_weights_are_refused(three, tmp_path):
    _model, domains, _states = three
    path = tmp_path / "domains.safetensors"
    domains.save(path)
    other = network()
    other[0].weight.data[0, 0, 0, 0] += 1
    with pytest.raises(
        ValueError, match=r"domains belong to weights .*Sequential has .*load that checkpoint"
    ):
        Domains.load(other, path)
    other = network()
    other[1].weight.data.fill_(9)  # a domain's own
    assert Domains.load(other, path).names == domains.names


def test_a_network_that_has_changed_is_refused(three):
    model, domains, _states = three
    model[2] = bn.BatchNorm2d(4)
    before = bits(model)
    with pytest.raises(ValueError, match=r"domain 'usps' does not fit: layer '2' has .*'weight'.*, not"):
        domains.select("usps")
    model[2] = nn.Identity()
    with pytest.raises(ValueError, match=r"batch normalization '2' is in domain 'usps' alone"):
        domains.select("usps")
    model[2] = bn.BatchNorm2d(5, affine=False)
    with pytest.raises(
        ValueError, match=r"2.running_mean has torch.float32 of shape \(4,\) where .* shape \(5,\)"
    ):
        domains.select("usps")
    model.append(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match=r"batch normalization '6' is in the network alone"):
        domains.select("usps")
    assert torch.equal(model[1].running_mean, before["1.running_mean"])


def test_models_without_normalization_are_refused():
    with pytest.raises(ValueError, match="Linear has no batch normalization"):
        Domains(nn.Linear(2, 2))


def rewritten(path, change):
    """The file with another header entry or other tensors."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["domains"])
    tensors = safetensors.torch.load(content)
    change(header, tensors)
    path.write_bytes(safetensors.torch.save(tensors, {"domains": json.dumps(header)}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h, t: h.update(format=2), "format 2, and this version reads 1"),
        (lambda h, t: h.update(names=["a", "a", "b"]), "not all different"),
        (lambda h, t: h.update(names="abc"), "no names"),
        (lambda h, t: h.update(names=["a", "b"]), "belongs to no domain"),
        (lambda h, t: h.update(names=["a", "b", "c", "d"]), "domain 'd' does not fit"),
        (lambda h, t: t.update({"-1.1.bias": t.pop("1.1.bias")}), "'-1.1.bias' belongs to no domain"),
        (lambda h, t: t.pop("1.1.bias"), "layer '1' has"),
        (lambda h, t: t.update({"1.1.bias": torch.zeros(3)}), r"1.bias has .* shape \(3,\)"),
        (lambda h, t: t.update({"1.1.bias": torch.zeros(4, dtype=torch.int64)}), "torch.int64"),
        (lambda h, t: t["1.1.running_var"].neg_(), "negative variance"),
        (lambda h, t: t["0.1.running_mean"].fill_(torch.nan), "not finite"),
        (
            lambda h, t: t.update({"0.9.bias": torch.zeros(3)}),
            "batch normalization '9' is in domain 'source'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_lie_are_refused(three, tmp_path, change, says):
    model, domains, _ = three
    path = tmp_path / "domains.safetensors"
    domains.save(path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=f"domains.safetensors has no domains that can be used: .*{says}"):
        Domains.load(model, path)


def test_other_files_are_refused(three, tmp_path):
    model, _, _ = three
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(2)}))
    with pytest.raises(ValueError, match="no entry 'domains'"):
        Domains.load(model, path)
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match="cannot be used"):
        Domains.load(model, path)
    with pytest.raises(FileNotFoundError):
        Domains.load(model, tmp_path / "none")
