"""Embree, which casts rays, and Manifold, which cuts solids: the one place that imports the packages of ``render``.

Training, evaluation and export do not need them, and they are not built for every machine. Whoever renders imports
their names from here and, where they are missing, says so in one line.
"""

from dino_depth.errors import ConfigError

try:
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene
    from manifold3d import CrossSection, Error, Manifold, Mesh, OpType
except ImportError as missing:
    raise ConfigError(f"rendering needs {missing.name}: pip install 'dino-depth[render]' ({missing})") from None

__all__ = ["CrossSection", "EmbreeScene", "Error", "Manifold", "Mesh", "OpType", "TriangleMesh"]
