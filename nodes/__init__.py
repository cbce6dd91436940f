"""What ComfyUI sees: one module a family, each with its `NODES`."""

from . import degrade, demo, guidance, measurement, report

_NODES = {
    **guidance.NODES,
    **report.NODES,
    **measurement.NODES,
    **degrade.NODES,
    **demo.NODES,
}

NODE_CLASS_MAPPINGS = {node_id: node for node_id, (node, _) in _NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {node_id: name for node_id, (_, name) in _NODES.items()}
