"""Frozen backbones behind one interface: images to tokens, blocks, pooled features."""

from lion_fast.backbones.backbone import Backbone, backbone_sha256, family_of
from lion_fast.backbones.build import load_backbone
from lion_fast.backbones.prefix import prefix_block, prefix_kv, takes_prefix
from lion_fast.backbones.weights import OWN_WEIGHTS

__all__ = [
    "OWN_WEIGHTS",
    "Backbone",
    "backbone_sha256",
    "family_of",
    "load_backbone",
    "prefix_block",
    "prefix_kv",
    "takes_prefix",
]
