"""What ComfyUI sees: one module a family, each with its `NODES`."""

from . import (
    amed,
    classifier,
    clip,
    combine,
    degrade,
    demo,
    epsilon,
    face,
    guidance,
    measurement,
    reference,
    report,
    segmentation,
    style,
    successors,
    sweep,
)
from .limits import within_limits

_NODES = {
    **guidance.NODES,
    **successors.NODES,
    **reference.NODES,
    **report.NODES,
    **sweep.NODES,
    **measurement.NODES,
    **clip.NODES,
    **segmentation.NODES,
    **style.NODES,
    **face.NODES,
    **classifier.NODES,
    **combine.NODES,
    **epsilon.NODES,
    **amed.NODES,
    **degrade.NODES,
    **demo.NODES,
}

NODE_CLASS_MAPPINGS = {node_id: within_limits(node, title) for node_id, (node, title) in _NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {node_id: name for node_id, (_, name) in _NODES.items()}
