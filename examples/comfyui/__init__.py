"""dicompile as a custom node of ComfyUI: this folder, in ``custom_nodes``."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
