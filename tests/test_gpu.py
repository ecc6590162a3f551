"""On a GPU: labels as on the CPU, fallbacks when memory runs out, timed steps, training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from phantom import RUN, OneVoxelNetwork, make_bundle, nifti, parse_spec, smooth

from pipeline.bundle.opening import open_bundle
from pipeline.config.parser import parse_config
from pipeline.config.run import Augment, Run
from pipeline.inference.predictor import predict_case
from pipeline.inference.sliding_window import WindowInferer
from pipeline.transforms.patches import training_transform
from pipeline.transforms.preprocess import preprocessing

pytestmark = pytest.mark.gpu
STEPS = {"read", "preprocess", "network", "invert"}


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A GPU that lends this process some 200 MB."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2e8) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_windows_are_those_of_the_cpu() -> None:
    """In float32, window by window."""
    x = torch.randn(1, 2, 40, 30, 9)
    with torch.no_grad():
        there = WindowInferer((16, 12, 8), 0.5)(x.cuda(), OneVoxelNetwork(3).cuda()).cpu()
        torch.testing.assert_close(
            there, WindowInferer((16, 12, 8), 0.5)(x, OneVoxelNetwork(3)), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("dims", [2, 3])
def test_labels_are_those_of_the_cpu_and_every_step_is_timed(
    dims: int, precision: str, tmp_path: Path
) -> None:
    """File to labels, in float16 by default; uncertainty too."""
    bundle = make_bundle(tmp_path / "tiny", dims)
    image = nifti(smooth((60, 50, 40)))
    cpu = predict_case(open_bundle(bundle, device="cpu", runtime="torch", uncertainty=True), image)
    gpu = predict_case(
        open_bundle(bundle, device="cuda", precision=precision, uncertainty=True), image
    )
    assert (cpu.labels == gpu.labels).mean() > (0.999 if precision == "float32" else 0.97)
    assert cpu.uncertainty is not None
    assert gpu.uncertainty is not None
    assert np.abs(cpu.uncertainty - gpu.uncertainty).mean() < 0.02
    assert set(gpu.seconds) >= STEPS
    assert all(seconds > 0 for seconds in gpu.seconds.values())


class Hungry(torch.nn.Module):
    """A network that takes so many bytes a window while it runs."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        room = torch.empty(self.size * len(x), dtype=torch.uint8, device=x.device)
        return torch.cat([x, -x], dim=1) + 0 * room[:1].float()


@pytest.mark.usefixtures("little_memory")
def test_fewer_windows_at_once_where_memory_runs_out() -> None:
    """Eight windows do not fit, two do: the result is that of the CPU."""
    x = torch.randn(1, 1, 64, 48, 32)
    found = WindowInferer((16, 12, 8), 0.25, sw_batch_size=8)(x.cuda(), Hungry(60_000_000)).cpu()
    torch.testing.assert_close(
        found, WindowInferer((16, 12, 8), 0.25)(x, Hungry(1)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.usefixtures("little_memory")
def test_sums_move_to_the_host_where_the_volume_does_not_fit() -> None:
    """A volume whose sums do not fit is put together on the host, and says so."""
    from monai.data import MetaTensor

    x = MetaTensor(torch.randn(1, 1, 256, 256, 128), meta={"warnings": ""})
    inferer = WindowInferer((64, 64, 64), 0.25)
    found = inferer(x.cuda(), Hungry(1_000_000))
    torch.testing.assert_close(
        found.cpu().as_tensor(), inferer(x.as_tensor(), Hungry(1)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_cases_are_kept_on_the_gpu_and_patches_are_drawn_there(dims: int) -> None:
    """Every random change works there; nothing random, and a patch is that of the CPU."""
    spec = parse_spec(dims)
    image = nifti(smooth((60, 50, 40)))
    label = nifti(np.where(smooth((60, 50, 40)) > 130, 300, 0).astype(np.int16))
    case = {"image": image, "label": label}
    every = {name: 1.0 for name in Augment.__dataclass_fields__ if name.endswith("_chance")} | {
        "mirror": ["R"]
    }
    none = dict.fromkeys(
        (name for name in Augment.__dataclass_fields__ if name.endswith("_chance")), 0.0
    )
    for changes in (every, none):
        run = parse_config(Run, RUN | {"augment": changes}, "run")
        there, here = (
            training_transform(preprocessing(spec), spec, run, torch.device(name))
            for name in ("cuda", "cpu")
        )
        drawn = [transform.set_random_state(3)(case)[0] for transform in (there, here)]
        assert {patch["image"].device.type for patch in drawn} == {"cuda", "cpu"}
        if changes is none:
            torch.testing.assert_close(drawn[0]["image"].cpu(), drawn[1]["image"])
            torch.testing.assert_close(drawn[0]["label"].cpu(), drawn[1]["label"])
