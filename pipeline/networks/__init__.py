"""Networks, their losses and their weights.

unet        the U-Net in 2D and 3D
ensemble    U-Nets whose probabilities are averaged
factory     the network that a spec describes
losses      the losses that a run can choose
weights     reading and writing state dicts
published   the names of published U-Nets' weights
"""

from pipeline.networks.ensemble import Ensemble, member_states
from pipeline.networks.factory import build_network, build_unet, channels_last
from pipeline.networks.losses import build_loss
from pipeline.networks.published import (
    InferredUNet,
    PublishedKind,
    from_published,
    published_network,
    recognise,
)
from pipeline.networks.unet import UNet
from pipeline.networks.weights import (
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
    "UNet",
    "build_loss",
    "build_network",
    "build_unet",
    "channels_last",
    "from_published",
    "load_weights",
    "member_states",
    "published_network",
    "read_checkpoint",
    "read_state",
    "recognise",
    "save_state",
    "save_weights",
]
