"""Write docs/report.schema.json, which describes the JSON of a report: `python docs/scripts/report_schema.py`.

Types are those of the dataclasses, descriptions are those of their docstrings.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from optimum_sparse.report import MatrixReport, Picture, SparsityReport
from optimum_sparse.report.record import SCHEMA

TARGET = Path(__file__).parents[1] / "report.schema.json"


def render() -> str:
    """The schema as JSON."""
    schema = TypeAdapter(SparsityReport).json_schema()
    for kind, part in ((SparsityReport, schema), *((k, schema["$defs"][k.__name__]) for k in (MatrixReport, Picture))):
        described = attributes(kind)
        for name, entry in part["properties"].items():
            entry["description"] = described[name]
            del entry["title"]
        part["description"] = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
        part["additionalProperties"] = False
    schema["properties"] = {
        "schema": {"const": SCHEMA, "description": "Version of this form."},
        **schema["properties"],
        "sparsity": {"type": "number", "description": "Fraction of zeros in all pruned matrices."},
    }
    schema["required"] = sorted(schema["properties"])
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


def attributes(kind: type) -> dict[str, Any]:
    """What the docstring of a class says of its attributes."""
    _, section = inspect.cleandoc(kind.__doc__ or "").split("Attributes:\n")
    items = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
