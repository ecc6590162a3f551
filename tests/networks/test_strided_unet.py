"""nnU-Net's U-Nets against modules written by hand with nnU-Net's names."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from nnunet_modules import SHAPES, nnunet_network

from pipeline.errors import ConfigError, ShapeError
from pipeline.networks import StridedUNet, from_nnunet

CASES = list(product((2, 3), (False, True)))


def our_network(dims: int, *, residual: bool, deep_supervision: int = 1) -> StridedUNet:
    shape = SHAPES[dims]
    return StridedUNet(
        dims,
        2,
        3,
        shape.features,
        shape.strides[1:],
        shape.kernels,
        shape.blocks,
        shape.decoder[::-1],
        residual=residual,
        norm="instance",
        activation="leakyrelu",
        conv_bias=True,
        deep_supervision=deep_supervision,
    )


@pytest.mark.parametrize(("dims", "residual"), CASES)
def test_the_logits_are_those_of_nnunet(dims: int, residual: bool) -> None:
    theirs = nnunet_network(dims, residual=residual)
    ours = our_network(dims, residual=residual)
    ours.load_state_dict(from_nnunet(theirs.state_dict(), 3, 1), strict=True)
    x = torch.randn(2, 2, *(16, 24, 12)[:dims])
    expected = theirs.eval()(x)
    torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dims", "residual"), CASES)
def test_it_scripts(dims: int, residual: bool) -> None:
    network = our_network(dims, residual=residual).eval()
    x = torch.randn(1, 2, *(16, 24, 12)[:dims])
    scripted = torch.jit.script(network)
    for _ in range(2):  # the second call is the optimised one
        torch.testing.assert_close(scripted(x), network(x))


def test_lower_levels_have_outputs_in_training() -> None:
    outputs = our_network(3, residual=True)(torch.randn(2, 2, 16, 24, 12))
    assert [tuple(output.shape) for output in outputs] == [(2, 3, 16, 24, 12), (2, 3, 8, 12, 12)]


def test_a_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="17 voxels along spatial axis 0, expected a multiple"):
        our_network(3, residual=False)(torch.randn(1, 2, 17, 24, 12))


def test_names_of_another_network_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"encoder1\.0\.weight is no name of nnU-Net"):
        from_nnunet({"encoder1.0.weight": torch.zeros(1)}, 3, 1)


def test_names_of_a_compiled_network_fit() -> None:
    state = nnunet_network(2, residual=False).state_dict()
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    assert from_nnunet(compiled, 3, 1).keys() == from_nnunet(state, 3, 1).keys()
