"""A STEP file of a box, one corner at the origin: planes, lines and their topology (AP203)."""

import numpy as np

__all__ = ["step_box"]

FACES = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]  # corners, outwards
HEADER = """ISO-10303-21;
HEADER;
FILE_DESCRIPTION((''),'2;1');
FILE_NAME('','',(''),(''),'','','');
FILE_SCHEMA(('CONFIG_CONTROL_DESIGN'));
ENDSEC;
DATA;
"""


class Rows:
    """Numbered instances; ``add`` returns the reference to one."""

    def __init__(self):
        self.rows: list[str] = []

    def add(self, kind: str, *values) -> str:
        self.rows.append(f"{kind}({','.join(map(str, values))})")
        return f"#{len(self.rows)}"

    def named(self, kind: str, *values) -> str:
        return self.add(kind, "''", *values)

    def vector(self, kind: str, values) -> str:
        return self.named(kind, "(" + ",".join(f"{value:.6f}" for value in map(float, values)) + ")")

    def axes(self, origin, axis, across) -> str:
        parts = (
            self.vector("CARTESIAN_POINT", origin),
            self.vector("DIRECTION", axis),
            self.vector("DIRECTION", across),
        )
        return self.named("AXIS2_PLACEMENT_3D", *parts)


def step_box(size: tuple[float, float, float], prefix: str) -> str:
    """The file; ``prefix`` of the metre its numbers are in: ".MILLI.", or "$" for none."""
    r = Rows()
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * np.array(size)
    points = [r.vector("CARTESIAN_POINT", corner) for corner in corners]
    ends = [r.named("VERTEX_POINT", point) for point in points]
    edges = {}
    for one in range(8):
        for two in range(one + 1, 8):
            way = corners[two] - corners[one]
            if np.count_nonzero(way) == 1:
                along = r.named("VECTOR", r.vector("DIRECTION", way / way.max()), "1.0")
                edges[one, two] = r.named(
                    "EDGE_CURVE", ends[one], ends[two], r.named("LINE", points[one], along), ".T."
                )
    faces = []
    for face in FACES:
        loop = []
        for one, two in zip(face, face[1:] + face[:1], strict=True):
            forward = ".T." if one < two else ".F."
            loop.append(r.named("ORIENTED_EDGE", "*", "*", edges[min(one, two), max(one, two)], forward))
        bound = r.named("FACE_OUTER_BOUND", r.named("EDGE_LOOP", f"({','.join(loop)})"), ".T.")
        first, second, third = corners[list(face[:3])]
        across, normal = second - first, np.cross(second - first, third - second)
        plane = r.named("PLANE", r.axes(first, normal / np.linalg.norm(normal), across / np.linalg.norm(across)))
        faces.append(r.named("ADVANCED_FACE", f"({bound})", plane, ".T."))
    solid = r.named("MANIFOLD_SOLID_BREP", r.named("CLOSED_SHELL", f"({','.join(faces)})"))
    units = [
        r.add("", f"LENGTH_UNIT()NAMED_UNIT(*)SI_UNIT({prefix},.METRE.)"),
        r.add("", "NAMED_UNIT(*)PLANE_ANGLE_UNIT()SI_UNIT($,.RADIAN.)"),
        r.add("", "NAMED_UNIT(*)SI_UNIT($,.STERADIAN.)SOLID_ANGLE_UNIT()"),
    ]
    assigned = f"GLOBAL_UNIT_ASSIGNED_CONTEXT(({','.join(units)}))"
    context = r.add("", f"GEOMETRIC_REPRESENTATION_CONTEXT(3){assigned}REPRESENTATION_CONTEXT('','')")
    origin = r.axes((0, 0, 0), (0, 0, 1), (1, 0, 0))
    shape = r.named("ADVANCED_BREP_SHAPE_REPRESENTATION", f"({origin},{solid})", context)
    application = r.add("APPLICATION_CONTEXT", "'mechanical design'")
    product = r.add("PRODUCT", "'box'", "'box'", "''", f"({r.named('MECHANICAL_CONTEXT', application, '$')})")
    formation = r.named("PRODUCT_DEFINITION_FORMATION", "''", product)
    definition = r.named("PRODUCT_DEFINITION", "''", formation, r.named("DESIGN_CONTEXT", application, "'design'"))
    r.add("SHAPE_DEFINITION_REPRESENTATION", r.named("PRODUCT_DEFINITION_SHAPE", "''", definition), shape)
    data = "".join(f"#{number}={row};\n" for number, row in enumerate(r.rows, 1))
    return f"{HEADER}{data}ENDSEC;\nEND-ISO-10303-21;\n"
