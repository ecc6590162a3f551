"""Weights of another network to start from: what fits, what does not, and a frozen encoder."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ignite.engine import Engine
from phantom import make_bundle, parse_spec
from torch import nn

from pipeline.bundle import find_bundle
from pipeline.config import BundlePaths, read_yaml
from pipeline.config.run import Run
from pipeline.errors import ConfigError
from pipeline.networks import Ensemble, UNet, build_network
from pipeline.parts import load_run
from pipeline.training.optimisation import Budget, build_optimizer, build_schedule
from pipeline.training.transfer import EncoderFreeze, encoder_parameters, start_from

RUN = Run(bundle="b", dataset="d", epochs=10, batch_size=2, learning_rate=0.1)


def network(channels: int = 1, outputs: int = 3, **changes: Any) -> UNet:
    settings: dict[str, Any] = {"features": (4, 6, 8), "dims": 3} | changes
    return UNet(settings["dims"], channels, outputs, settings["features"], norm="instance")


def saved(net: nn.Module, path: Path) -> str:
    torch.save(net.state_dict(), path)
    return str(path)


def same(a: nn.Module, b: nn.Module) -> list[str]:
    """Names of the entries of a that b has with the same values."""
    other = b.state_dict()
    return [
        name
        for name, tensor in a.state_dict().items()
        if name in other and torch.equal(tensor, other[name].to(tensor.dtype))
    ]


def test_everything_that_fits_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of the same network; all but the head for other labels, which the log names."""
    torch.manual_seed(0)
    source, twin, other = network(), network(), network(outputs=5)
    run = replace(RUN, start=saved(source, tmp_path / "a.pt"))
    count = len(source.state_dict())
    with caplog.at_level(logging.INFO, logger="volseg"):
        start_from(twin, run)
        assert len(same(twin, source)) == count
        assert f"loaded {count} of {count} tensors from" in caplog.text
        assert "random values" not in caplog.text
        caplog.clear()
        start_from(other, run)
    assert f"loaded {count - 2} of {count} tensors from" in caplog.text
    assert f"2 of {count} tensors have no counterpart of their shape" in caplog.text
    assert "output.weight, output.bias" in caplog.text
    loaded = same(other, source)
    assert set(other.state_dict()) - set(loaded) == {"output.weight", "output.bias"}


def test_a_first_layer_for_more_channels_gives_the_same_of_copies(tmp_path: Path) -> None:
    """Of an image in all channels, the first layer's output is that of the single channel."""
    torch.manual_seed(0)
    source, wider = network(), network(channels=3)
    start_from(wider, replace(RUN, start=saved(source, tmp_path / "a.pt")))
    image = torch.rand(1, 1, 8, 12, 16)
    torch.testing.assert_close(
        wider.encoder[0](image.expand(-1, 3, -1, -1, -1)), source.encoder[0](image)
    )
    new = {name.split(".")[0] for name in set(wider.state_dict()) - set(same(wider, source))}
    assert new == {"encoder"}
    # the first layer has to learn, the rest of the encoder may stay as it is
    run = replace(RUN, start=str(tmp_path / "a.pt"), freeze_encoder=1)
    frozen = {id(parameter) for parameter in encoder_parameters(wider, run)}
    free = [name for name, parameter in wider.named_parameters() if id(parameter) not in frozen]
    assert sum(name.startswith("encoder") for name in free) == 1


def test_more_features_keep_what_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A long list of what does not fit is cut."""
    source = network(features=(4, 6, 8, 10))
    target = network(features=(4, 6, 9, 10))
    start_from(target, replace(RUN, start=saved(source, tmp_path / "a.pt")))
    assert "encoder.0" in " ".join(same(target, source))
    (record,) = caplog.records
    assert record.getMessage().count(",") < 10
    assert "more" in record.getMessage()


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ({"dims": 2}, r"encoder.0.*weight has shape \(4, 1, 3, 3, 3\) there, \(4, 1, 3, 3\) here"),
        ({"features": (5, 7, 9)}, r"there, \(5, 1, 3, 3, 3\) here \(number of features, 2D or 3D"),
    ],
)
def test_a_network_of_which_nothing_fits_is_refused(
    target: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Biases and norms of the same length alone are no weights to start from."""
    run = replace(RUN, start=saved(network(), tmp_path / "a.pt"))
    with pytest.raises(ConfigError, match=rf"run.start: .*has no weights that fit.*{reason}"):
        start_from(network(**target), run)


def test_other_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("weights")
    torch.save({"layer.weight": torch.zeros(3, 3)}, tmp_path / "linear.pt")
    for start, says in {
        "text.pt": "is not a plain checkpoint of tensors",
        "linear.pt": r"it has layer.weight, …, this network encoder.0",
        "nothing.pt": "no such bundle; expected a folder",
    }.items():
        with pytest.raises(ConfigError, match=rf"run\.start: .*{says}"):
            start_from(network(), replace(RUN, start=str(tmp_path / start)))


def test_grow_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    """A network of as many levels fits nowhere one level lower; other files do not either."""
    start = saved(network(features=(4, 6, 8)), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="has no weights that fit this network"):
        start_from(network(features=(4, 6, 8)), replace(RUN, start=start, grow=True))
    torch.save({"encoder.first.weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="has no weights that fit this network"):
        start_from(network(), replace(RUN, start=str(tmp_path / "other.pt"), grow=True))


def test_a_bundle_is_a_start(tmp_path: Path) -> None:
    """By its folder; its kernels in float16 become float32."""
    bundle = make_bundle(tmp_path / "tiny")
    net = build_network(parse_spec())
    start_from(net, replace(RUN, start=str(bundle)))
    assert len(same(net, net)) == len(net.state_dict())
    stored = torch.load(bundle / "models" / "model.pt", weights_only=True)
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float())


@pytest.mark.parametrize(
    ("spacing", "features", "weights"),
    [
        ([1.0, 1.0, 1.2], None, "model_cascade.pt"),
        ([2.0, 1.5, 2.0], None, "model.pt"),
        ([1.3, None, 1.3], None, "model_cascade.pt"),
        ([None, None, None], None, "model.pt"),
        ([1.0, 1.0, 1.0], [16, 32, 64, 128], "model_cascade.pt"),
    ],
)
def test_of_two_networks_the_one_with_voxels_of_nearer_size_is_the_start(
    spacing: list[float | None],
    features: list[int] | None,
    weights: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The brain model's first network has voxels of 1.7 mm, its second one of 1 mm.

    Also where neither has all levels of the network that starts.
    """
    brain = BundlePaths(find_bundle("brain_mr_structures"))
    source = read_yaml(brain.spec, "spec")
    network = source["network"] | ({} if features is None else {"features": features})
    configs = tmp_path / "mine" / "configs"
    configs.mkdir(parents=True)
    spec = {
        "labels": {"background": 0, "hippocampus": 1},
        "channels": ["MR"],
        "spacing": spacing,
        "roi_size": [32, 48, 32],
        "network": network,
    }
    (configs / "spec.yaml").write_text(yaml.safe_dump(spec))
    run = {"bundle": "mine", "dataset": "d", "epochs": 1, "batch_size": 1, "learning_rate": 0.1}
    run["start"] = "brain_mr_structures"
    (configs / "run.yaml").write_text(yaml.safe_dump(run))
    with caplog.at_level(logging.INFO, logger="volseg"):
        loaded = load_run(configs / "run.yaml")
    assert loaded.start == str(brain.models / weights)
    assert ("the second network of" in caplog.text) == (weights == "model_cascade.pt")


def test_members_of_an_ensemble_start_from_those_of_another(tmp_path: Path) -> None:
    """In turn; a single network starts from the first one, and several from a single one."""
    torch.manual_seed(0)
    pair = Ensemble([network(), network()], sigmoid=False)
    run = replace(RUN, start=saved(pair, tmp_path / "pair.pt"))
    three, single = Ensemble([network() for _ in range(3)], sigmoid=False), network()
    start_from(three, run)
    start_from(single, run)
    for target, source in ((three.members[2], 0), (three.members[1], 1), (single, 0)):
        assert len(same(target, pair.members[source])) == len(single.state_dict())
    run = replace(RUN, start=saved(single, tmp_path / "single.pt"))
    start_from(pair, run)
    assert len(same(pair.members[1], single)) == len(single.state_dict())


def frozen_run(tmp_path: Path, **changes: Any) -> tuple[UNet, Run]:
    source = saved(network(), tmp_path / "a.pt")
    net, run = network(), replace(RUN, start=source, warmup=0.0, **changes)
    start_from(net, run)
    return net, run


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("gradients", ["switched off", "kept, as in several processes"])
def test_a_frozen_encoder_stays_and_then_learns_more_slowly(
    optimizer: str, gradients: str, tmp_path: Path
) -> None:
    """In the first two epochs nothing of it changes, weight decay included."""
    net, run = frozen_run(
        tmp_path, freeze_encoder=2, encoder_rate=0.25, epochs=4, optimizer=optimizer
    )
    before = {name: value.clone() for name, value in net.named_parameters()}
    steps, freeze = 3, EncoderFreeze(net, run)
    optimiser = build_optimizer(net, run)
    schedule = build_schedule(optimiser, run, steps, Budget(None))
    rates = []

    def step(engine: Engine, batch: Any) -> None:
        optimiser.zero_grad(set_to_none=False)
        net(torch.rand(1, 1, 8, 8, 8)).square().mean().backward()
        optimiser.step()
        schedule.step()
        rates.append([group["lr"] for group in optimiser.param_groups])
        changed = {n for n, value in net.named_parameters() if not torch.equal(value, before[n])}
        encoder = {n for n in changed if n.startswith(("encoder", "bottleneck"))}
        assert bool(encoder) == (engine.state.iteration > 2 * steps)
        if engine.state.iteration > 2:
            assert changed - encoder

    trainer = Engine(step)
    if gradients == "switched off":
        freeze.attach(trainer)
    trainer.run(range(steps), max_epochs=4)
    # a rate is set for the next step
    assert all(encoder == 0 for _, encoder in rates[: 2 * steps - 1])
    assert all(encoder == 0.25 * other for other, encoder in rates[2 * steps :])
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_without_a_rate_of_its_own_the_encoder_is_no_group(tmp_path: Path) -> None:
    """Plain runs have the optimizer that they always had."""
    net, run = frozen_run(tmp_path)
    assert len(build_optimizer(net, run).param_groups) == 1
    assert EncoderFreeze(net, run).parameters == []
    groups = build_optimizer(net, replace(run, encoder_rate=0.1)).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.01])
    count = sum(len(group["params"]) for group in groups)
    assert count == len(list(net.parameters()))


def test_a_coarser_network_becomes_the_lower_levels(tmp_path: Path) -> None:
    """The larger network's first deep output equals the coarser one's output."""
    torch.manual_seed(0)
    small = UNet(3, 1, 3, (6, 8, 10), norm="instance", deep_supervision=1)
    large = UNet(3, 1, 3, (4, 6, 8, 10), norm="instance", deep_supervision=2)
    before = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    torch.save(small.state_dict(), tmp_path / "small.pt")
    start_from(large, replace(RUN, start=str(tmp_path / "small.pt"), grow=True))
    new = ("encoder.0.", "up.0.", "decoder.0.", "output.")
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in large.state_dict().items()
        if name.startswith(new)
    )
    for ours, theirs in (
        (large.bottleneck, small.bottleneck),
        (large.up[1], small.up[0]),
        (large.decoder[2], small.decoder[1]),
    ):
        assert all(
            torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
        )
    large.encoder[1] = small.encoder[0]
    large.encoder[0], large.pool[0] = (
        nn.Identity(),
        nn.Identity(),
    )  # the image reaches the second level as it is
    image = torch.rand(1, 1, 8, 16, 8)
    large.up[0], large.decoder[0] = nn.Identity(), nn.Conv3d(7, 4, 1)
    np.testing.assert_allclose(large(image)[1].detach(), small(image)[0].detach(), atol=1e-5)
