"""Published weights give the published output under our names, and translate back exactly."""

from __future__ import annotations

import pytest
import torch
from references import Buda, Published, Tutorial, trained

from pipeline.errors import ConfigError
from pipeline.networks.published import (
    PublishedKind,
    State,
    from_published,
    key_pairs,
    published_network,
    recognise,
    to_published,
)
from pipeline.networks.unet import UNet

KINDS = {"tutorial": Tutorial, "buda": Buda}
FULL = {"tutorial": (46, 7_760_097), "buda": (118, 7_763_041)}


def ours_of(state: State) -> UNet:
    shape = published_network(state)
    net = UNet(
        shape.spatial_dims,
        shape.in_channels,
        shape.out_channels,
        shape.network.features,
        norm=shape.network.norm,
    ).eval()
    net.load_state_dict(state, strict=True)
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_size_loads_strictly_and_gives_the_same(kind: str) -> None:
    torch.manual_seed(0)
    theirs = trained(KINDS[kind]())
    entries, parameters = FULL[kind]
    assert len(theirs.state_dict()) == entries
    assert sum(p.numel() for p in theirs.parameters()) == parameters
    ours = ours_of(from_published(theirs.state_dict()))
    assert sum(p.numel() for p in ours.parameters()) == parameters
    _same_output(theirs, ours, torch.rand(1, 3, 64, 48))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("ins", "outs"), [(1, 1), (2, 4)])
def test_other_sizes_give_the_same_in_2d_and_3d(kind: str, dims: int, ins: int, outs: int) -> None:
    torch.manual_seed(1)
    theirs = trained(KINDS[kind](dims, ins, outs, features=4))
    _same_output(
        theirs,
        ours_of(from_published(theirs.state_dict())),
        torch.rand(2, ins, *(32, 16, 48)[:dims]),
    )


@pytest.mark.parametrize("kind", ["tutorial", "buda"])
def test_translating_back_gives_every_bit(kind: PublishedKind) -> None:
    torch.manual_seed(2)
    net = UNet(2, 3, 1, (4, 8, 16, 32, 64), norm="batch" if kind == "buda" else None)
    published = to_published(net.state_dict(), kind)
    theirs = KINDS[kind](features=4)
    theirs.load_state_dict(published, strict=True)
    _same_output(
        trained(theirs), ours_of(from_published(theirs.state_dict())), torch.rand(1, 3, 32, 32)
    )
    back = from_published(published)
    assert back.keys() == net.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in net.state_dict().items())


def test_the_names_are_the_published_ones() -> None:
    buda = set(key_pairs("buda", 4).values())
    assert {
        "encoder1.enc1conv1.weight",
        "encoder1.enc1norm1.running_mean",
        "bottleneck.bottleneckconv1.weight",
        "upconv4.weight",
        "decoder4.dec4conv1.weight",
        "conv.weight",
    } <= buda
    tutorial = set(key_pairs("tutorial", 4).values())
    assert {
        "encoder1.0.weight",
        "encoder1.2.weight",
        "bottleneck.0.weight",
        "decoder4.0.weight",
        "output.weight",
    } <= tutorial


def test_names_that_do_not_fit_are_listed() -> None:
    state = Tutorial(features=2).state_dict()
    del state["decoder2.0.bias"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(
        ConfigError,
        match=r"missing decoder2\.0\.bias; not expected extra; expected 46 entries, found 46",
    ):
        from_published(state)
    with pytest.raises(ConfigError, match="unknown weights: expected one of the keys encoder1"):
        recognise({"model.0.conv.weight": torch.zeros(1)})
    with pytest.raises(ConfigError, match="missing"):
        to_published(UNet(2, 1, 2, (2, 4), residual=True, norm="instance").state_dict(), "buda")


def _same_output(theirs: torch.nn.Module, ours: UNet, x: torch.Tensor) -> None:
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
    if isinstance(theirs, Buda):
        found = torch.sigmoid(found)
    assert isinstance(theirs, Published)
    assert (expected - found).abs().max() <= 1e-5
