"""What ComfyUI sees: one module a family, each with its `NODES`."""

from . import clip, combine, degrade, demo, face, guidance, measurement, reference, report, style

_NODES = {
    **guidance.NODES,
    **reference.NODES,
    **report.NODES,
    **measurement.NODES,
    **clip.NODES,
    **style.NODES,
    **face.NODES,
    **combine.NODES,
    **degrade.NODES,
    **demo.NODES,
}

NODE_CLASS_MAPPINGS = {node_id: node for node_id, (node, _) in _NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {node_id: name for node_id, (_, name) in _NODES.items()}
