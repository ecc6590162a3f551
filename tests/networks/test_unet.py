from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
from phantom import spec_content
from torch import nn

from pipeline.config.parser import parse_config
from pipeline.config.spec import Spec
from pipeline.errors import ShapeError
from pipeline.networks.factory import build_unet
from pipeline.networks.unet import InstanceNorm, UNet, centre_crop

FEATURES = (32, 64, 128, 256, 512)


@pytest.mark.parametrize(
    ("dims", "channels", "classes", "norm", "count"),
    [(2, 3, 1, None, 7_760_097), (3, 1, 1, None, 22_575_329), (2, 3, 1, "batch", 7_763_041)],
)
def test_parameters_are_those_of_the_papers_network(
    dims: int, channels: int, classes: int, norm: str | None, count: int
) -> None:
    """Every layer exists once and has the width that the features give."""
    net = UNet(dims, channels, classes, FEATURES, norm=norm)
    assert sum(p.numel() for p in net.parameters()) == count


def _traced(net: UNet, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in net.named_modules():
        if (
            name.split(".")[0] in ("encoder", "pool", "bottleneck", "up", "decoder", "output")
            and name.count(".") <= 1
        ):
            if isinstance(module, nn.ModuleList):
                continue
            module.register_forward_hook(
                lambda _m, _i, out, name=name: shapes.update({name: tuple(out.shape)})
            )
    with torch.no_grad():
        net(torch.zeros(shape))
    return shapes


@pytest.mark.parametrize(("shape", "channels"), [((1, 3, 256, 256), 3), ((2, 1, 32, 48, 16), 1)])
def test_shapes_layer_by_layer(shape: tuple[int, ...], channels: int) -> None:
    """Each encoder level halves the size; the decoder reverses it. All have their features."""
    batch, size = shape[0], shape[2:]
    shapes = _traced(UNet(len(size), channels, 1, FEATURES), shape)
    for level, features in enumerate(FEATURES[:-1]):
        here, below = ((batch, features, *(n // 2 ** (level + i) for n in size)) for i in (0, 1))
        assert (
            shapes[f"encoder.{level}"]
            == shapes[f"up.{level}"]
            == shapes[f"decoder.{level}"]
            == here
        )
        assert shapes[f"pool.{level}"] == below
    assert shapes["bottleneck"] == (batch, 512, *(n // 16 for n in size))
    assert shapes["output"] == (batch, 1, *size)


@pytest.mark.parametrize("shape", [(1, 5, 6, 7, 8), (3, 5, 6, 7), (2, 4, 5, 6, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_instance_norm_is_a_group_norm_of_single_channels(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Outputs are equal in training and in evaluation, and so is every gradient in training."""
    order = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = 3 + 2 * torch.randn(shape, dtype=dtype).to(memory_format=order)
    upstream = torch.randn(shape, dtype=dtype)
    ours, theirs = InstanceNorm(shape[1]).to(dtype), nn.GroupNorm(shape[1], shape[1]).to(dtype)
    with torch.no_grad():
        ours.weight.copy_(torch.rand(shape[1]) + 0.5)
        ours.bias.copy_(torch.randn(shape[1]))
    theirs.load_state_dict(ours.state_dict())
    found = []
    for norm in (ours.train(), theirs):
        own = x.clone().requires_grad_()
        out = norm(own)
        out.backward(upstream)
        found.append((out, own.grad, norm.weight.grad, norm.bias.grad))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(
            mine, other, atol=1e-4 if dtype == torch.float32 else 1e-10, rtol=1e-4
        )
    assert torch.equal(ours.eval()(x), theirs(x))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("norm", "residual"), list(itertools.product([None, "batch", "instance"], [False, True]))
)
@pytest.mark.parametrize("activation", ["relu", "leakyrelu", "prelu", "gelu"])
def test_any_option_keeps_the_size(
    dims: int, norm: str | None, residual: bool, activation: str
) -> None:
    """Logits have the input's size, and all weights learn."""
    strides: list[int | tuple[int, ...]] = [(2, 1, 2)[:dims], 3]
    net = UNet(
        dims,
        2,
        3,
        (4, 6, 8),
        strides,
        norm=norm,
        activation=activation,
        residual=residual,
        dropout=0.2,
    )
    x = torch.randn(2, 2, *(12, 9, 18)[:dims])
    out = net(x)
    assert isinstance(out, torch.Tensor)
    assert out.shape == (2, 3, *x.shape[2:])
    torch.autograd.backward(out.square().sum())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_deep_supervision_gives_each_level_while_training_only() -> None:
    """Training gives the full size first, then the lower levels; evaluation gives one tensor."""
    net = UNet(3, 1, 3, (4, 6, 8, 10), [(2, 2, 1), 2, 2], deep_supervision=2)
    x = torch.randn(1, 1, 16, 24, 12)
    assert [tuple(level.shape[1:]) for level in net(x)] == [
        (3, 16, 24, 12),
        (3, 8, 12, 12),
        (3, 4, 6, 6),
    ]
    assert net.eval()(x).shape == (1, 3, 16, 24, 12)


def test_dropout_is_for_training() -> None:
    """Two evaluations are equal, two training passes are not.

    There are 16 channels, because dropping all of few channels twice is likely.
    """
    torch.manual_seed(0)
    net = UNet(2, 1, 2, (16, 24), dropout=0.5)
    x = torch.randn(1, 1, 8, 12)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_residual_adds_the_input() -> None:
    """With its convolutions at 0, a residual block returns its rectified input."""
    block = UNet(3, 5, 2, (5, 6), residual=True).encoder[0]
    for layer in block.modules():
        if isinstance(layer, nn.Conv3d) and layer.kernel_size == (3, 3, 3):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias) if layer.bias is not None else None
    x = torch.randn(1, 5, 3, 4, 5)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("dims", [2, 3])
def test_instance_norm_is_torchs(dims: int) -> None:
    """A group norm with one channel per group equals InstanceNorm with the same weights."""
    ours = next(
        m
        for m in UNet(dims, 1, 2, (4, 6), norm="instance").modules()
        if isinstance(m, nn.GroupNorm)
    )
    theirs = (nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d)(4, affine=True)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, *(7, 8, 9)[:dims])
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("residual", [False, True])
def test_2d_weights_in_the_middle_of_3d_kernels_give_the_same_slices(residual: bool) -> None:
    """With 2D weights in the central slice of its kernels, a 3D network works slice by slice."""
    flat = UNet(2, 2, 3, (4, 6, 8), norm="batch", residual=residual).eval()
    deep = UNet(3, 2, 3, (4, 6, 8), [(2, 2, 1), (2, 2, 1)], norm="batch", residual=residual).eval()
    state = deep.state_dict()
    for name, weight in flat.state_dict().items():
        if weight.ndim == 4:
            state[name].zero_()[..., state[name].shape[-1] // 2] = weight
        else:
            state[name] = weight
    deep.load_state_dict(state)
    x = torch.randn(1, 2, 12, 8, 5)
    with torch.no_grad():
        slices = torch.stack([flat(x[..., z]) for z in range(5)], dim=-1)
        torch.testing.assert_close(deep(x), slices, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (
            (1, 1, 16, 21, 24),
            "21 voxels along spatial axis 1, expected a multiple of 8 .* crop it to 16 or 24",
        ),
        (
            (1, 1, 16, 16, 3),
            r"3 voxels along spatial axis 2, expected a multiple of 4 .* crop it to 4,",
        ),
        ((1, 2, 16, 16, 16), r"shape \(1, 2, 16, 16, 16\), expected \(B, 1, 8·n, 8·n, 4·n\)"),
        ((1, 1, 16, 16), r"shape \(1, 1, 16, 16\), expected"),
    ],
)
def test_sizes_that_the_strides_do_not_divide_are_refused(
    shape: tuple[int, ...], says: str
) -> None:
    """The message names size, axis and the sizes that work; the error is also a ValueError."""
    net = UNet(3, 1, 2, (2, 2, 2, 2), [(2, 2, 1), 2, 2])
    with pytest.raises(ShapeError, match=says) as raised:
        net(torch.zeros(shape))
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"spatial_dims": 4}, "spatial_dims: expected 2 or 3, got 4"),
        ({"features": (4,)}, "at least two features"),
        ({"strides": [2, 2]}, "one stride fewer than features"),
        ({"deep_supervision": 1}, "fewer deep outputs than strides"),
        ({"norm": "layer"}, "norm: expected None, 'batch' or 'instance', got 'layer'"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(
    arguments: dict[str, Any], says: str
) -> None:
    """The message names each wrong argument."""
    valid: dict[str, Any] = {
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": 2,
        "features": (4, 6),
    }
    with pytest.raises(ShapeError, match=says):
        UNet(**(valid | arguments))


@pytest.mark.parametrize("dims", [2, 3])
def test_traces(dims: int) -> None:
    """torch.jit.trace gives the same values, also for other sizes."""
    net = UNet(dims, 1, 2, (4, 6), norm="batch").eval()
    x, other = (torch.randn(1, 1, *sizes[:dims]) for sizes in ((8, 12, 6), (4, 6, 10)))
    with torch.no_grad():
        traced = torch.jit.trace(net, x)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(traced(other), net(other))


@pytest.mark.parametrize(
    ("dims", "options"),
    [
        (2, {}),
        (3, {"norm": "batch"}),
        (2, {"norm": "instance", "residual": True, "dropout": 0.1}),
        (3, {"norm": "instance", "residual": True, "contraction_dropout": 0.1}),
        (2, {"padding": False}),
        (3, {"deep_supervision": 1}),
    ],
)
def test_scripts(dims: int, options: dict[str, Any]) -> None:
    """A scripted network gives the same, in evaluation and in training, and can be saved.

    It is called twice, because torch optimises it after the first call.
    """
    net = UNet(dims, 1, 2, (3, 4, 5), **options).eval()
    scripted = torch.jit.script(net)
    x = torch.randn(2, 1, *(44, 48, 44)[:dims])
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(scripted(x), net(x))
    net.train()
    scripted.train()
    torch.manual_seed(0)
    expected = net(x)
    torch.manual_seed(0)
    torch.testing.assert_close(scripted(x), expected)
    torch.jit.save(scripted, io.BytesIO())


def test_centre_crop_takes_the_middle_of_every_axis() -> None:
    """With one voxel more after than before where the difference is odd."""
    x = torch.arange(7 * 8 * 9).view(1, 1, 7, 8, 9)
    assert torch.equal(centre_crop(x, torch.empty(1, 3, 3, 5, 9)), x[:, :, 2:5, 1:6])


@pytest.mark.parametrize("dims", [2, 3])
def test_from_spec_takes_every_fact_of_the_spec(dims: int) -> None:
    """The network has the spec's channels, labels and options."""
    options = {
        "features": [4, 6, 8],
        "norm": "batch",
        "residual": True,
        "dropout": 0.1,
        "deep_supervision": 1,
        "strides": [2, 1],
    }
    spec = parse_config(
        Spec, spec_content(dims, channels=["T1w", "FLAIR"], network=options), "spec"
    )
    net = build_unet(spec)
    same = UNet(
        dims, 2, 3, (4, 6, 8), (2, 1), norm="batch", residual=True, dropout=0.1, deep_supervision=1
    )
    assert str(net) == str(same)
