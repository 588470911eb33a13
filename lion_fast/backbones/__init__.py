"""Frozen backbones behind one interface: images to tokens, blocks, pooled features."""

from lion_fast.backbones.backbone import (
    OWN_WEIGHTS,
    Backbone,
    backbone_sha256,
    family_of,
    load_backbone,
    prefix_block,
    prefix_kv,
    takes_prefix,
)

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
