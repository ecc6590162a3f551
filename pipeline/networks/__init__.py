"""FIXME."""

from pipeline.networks.losses import build_loss
from pipeline.networks.published import (
    Kind,
    from_published,
    published_network,
    read_checkpoint,
    recognise,
)
from pipeline.networks.unet import UNet, build_network, build_unet, channels_last, member_states
from pipeline.networks.weights import save_state, save_weights

__all__ = [
    "Kind",
    "UNet",
    "build_loss",
    "build_network",
    "build_unet",
    "channels_last",
    "from_published",
    "member_states",
    "published_network",
    "read_checkpoint",
    "recognise",
    "save_state",
    "save_weights",
]
