"""The inferer of a bundle, which runs the network of any caller as volseg's own commands do.

`volseg` and `python -m monai.bundle run` give the inferer a `Runtime`. MONAI Label and MONAI Deploy
load the weights into the network of the wiring themselves and give it that: a network in torch.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import Inferer

from pipeline.config import Spec
from pipeline.inference.openvino_models import weights_hash
from pipeline.inference.runtime import Runtime
from pipeline.inference.sliding_window import WindowInferer, build_inferer
from pipeline.networks import Ensemble, StridedUNet, UNet


def bundle_inferer(spec: Spec, overlap: float | None = None) -> Inferer:
    """Return the inferer of `build_inferer`, which runs plain networks of the spec by `Runtime`.

    Args:
        spec: gives the size of windows and all other settings of inference.
        overlap: overlap of neighbouring windows, as a fraction of a window; None takes the spec's.
    """
    inferer = build_inferer(spec, overlap)
    if isinstance(inferer, WindowInferer):
        inferer.runtime_of = RuntimeOf(spec)
    return inferer


class RuntimeOf:
    """Returns the `Runtime` of a network, or what is not a network of volseg as it is.

    A network in training mode, or one that gradients are needed of, is returned as it is. The
    runtime of the last network is kept until its weights or its device change.

    Args:
        spec: of the network.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._last: tuple[str, torch.device, Runtime] | None = None

    def __call__(self, network: Any) -> Any:
        is_own = isinstance(network, UNet | StridedUNet | Ensemble)
        if not is_own or network.training or torch.is_grad_enabled():
            return network
        made_of, device = weights_hash(network, self.spec), next(network.parameters()).device
        last = self._last
        if last is None or last[:2] != (made_of, device):
            last = (made_of, device, Runtime(network, self.spec))
            self._last = last
        return last[2]
