"""Networks, their losses and their weights.

unet            the U-Net in 2D and 3D
strided_unet    nnU-Net's U-Nets in 2D and 3D
ensemble        U-Nets whose outputs are averaged
factory         the network that a spec describes
losses          the losses that a run can choose
weights         reading and writing state dicts
published       the names of published U-Nets' weights
nnunet_weights  the names of nnU-Net's weights
"""

from pipeline.networks.ensemble import Ensemble, member_states
from pipeline.networks.factory import build_network, build_unet, channels_last
from pipeline.networks.losses import build_loss
from pipeline.networks.nnunet_weights import from_nnunet
from pipeline.networks.published import (
    InferredUNet,
    PublishedKind,
    from_published,
    published_network,
    recognise,
)
from pipeline.networks.strided_unet import StridedUNet
from pipeline.networks.unet import UNet
from pipeline.networks.weights import (
    load_checkpoint,
    load_weights,
    read_checkpoint,
    read_state,
    save_state,
    save_weights,
)

__all__ = [
    "Ensemble",
    "InferredUNet",
    "PublishedKind",
    "StridedUNet",
    "UNet",
    "build_loss",
    "build_network",
    "build_unet",
    "channels_last",
    "from_nnunet",
    "from_published",
    "load_checkpoint",
    "load_weights",
    "member_states",
    "published_network",
    "read_checkpoint",
    "read_state",
    "recognise",
    "save_state",
    "save_weights",
]
