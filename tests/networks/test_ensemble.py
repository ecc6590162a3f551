from __future__ import annotations

from functools import partial

import pytest
import torch
from phantom import parse_spec

from pipeline.networks.ensemble import Ensemble, member_states
from pipeline.networks.factory import build_network, build_unet
from pipeline.networks.unet import UNet


@pytest.mark.parametrize(("dims", "output"), [(3, "softmax"), (2, "softmax"), (3, "sigmoid")])
def test_an_ensemble_is_the_mean_of_its_networks(dims: int, output: str) -> None:
    """The mean is taken over probabilities, whatever the scale of each member's logits."""
    spec = parse_spec(
        dims, output=output, network={"features": [4, 6], "norm": "instance", "ensemble": 3}
    )
    net = build_network(spec).eval()
    assert isinstance(net, Ensemble)
    for scale, member in enumerate(net.members, start=1):
        assert isinstance(member, UNet)
        torch.nn.init.normal_(member.output.weight, std=scale)
    x = torch.rand(2, 1, *spec.roi_size)
    activation = torch.sigmoid if output == "sigmoid" else partial(torch.softmax, dim=1)
    with torch.no_grad():
        expected = torch.stack([activation(member(x)) for member in net.members]).mean(dim=0)
        found = activation(net(x))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_scripts(output: str) -> None:
    """A scripted ensemble gives the same values in evaluation mode."""
    spec = parse_spec(2, output=output, network={"features": [3, 4], "ensemble": 2})
    net = build_network(spec).eval()
    x = torch.rand(1, 1, *spec.roi_size)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(net)(x), net(x))


def test_training_returns_what_each_member_returns() -> None:
    """With deep supervision, a list per member."""
    network = {"features": [3, 4, 5], "deep_supervision": 1, "ensemble": 2}
    spec = parse_spec(2, network=network)
    net = build_network(spec)
    x = torch.rand(1, 1, *spec.roi_size)
    outputs = net(x)
    assert isinstance(net, Ensemble)
    for member, levels in zip(net.members, outputs, strict=True):
        assert len(levels) == 2
        for level, expected in zip(levels, member(x), strict=True):
            assert torch.equal(level, expected)


def test_member_states_are_those_of_the_members() -> None:
    """In the members' order; a single network has one state."""
    spec = parse_spec(2, network={"features": [3, 4], "ensemble": 3})
    net = build_network(spec)
    assert isinstance(net, Ensemble)
    for state, member in zip(member_states(net.state_dict()), net.members, strict=True):
        assert state.keys() == member.state_dict().keys()
        assert all(torch.equal(state[k], v) for k, v in member.state_dict().items())
    single = build_unet(spec).state_dict()
    assert member_states(single) == [single]
