"""What a study found is read from files: reading needs neither what runs a study nor what shows it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import lora_lite

SOURCE = Path(lora_lite.__file__).parent
RUNNER = (
    "training.run",
    "training.session",
    "training.loop",
    "studies.bench",
    "studies.workbench",
    "probe",
    "costs.cost",
)


def imported(name: str) -> Iterator[str]:
    """The library's modules that a module imports when it is imported."""
    path = SOURCE.parent / name.replace(".", "/")
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    if file.exists():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lora_lite"):
                yield node.module
                yield from (f"{node.module}.{each.name}" for each in node.names)
            elif isinstance(node, ast.Import):
                yield from (each.name for each in node.names if each.name.startswith("lora_lite"))


def reached(start: str) -> dict[str, str]:
    """Module -> the one that imports it, of all that is imported with `start`."""
    by = {start: ""}
    todo = [start]
    while todo:
        name = todo.pop()
        for other in set(imported(name)) - by.keys():
            by[other] = name
            todo.append(other)
    return by


def test_findings_import_neither_the_runner_nor_the_report() -> None:
    for file in (SOURCE / "lab" / "findings").glob("*.py"):
        by = reached(f"lora_lite.lab.findings.{file.stem}")
        for name, importer in by.items():
            forbidden = [f"lora_lite.lab.{each}" for each in (*RUNNER, "report")]
            assert not any(f"{name}.".startswith(f"{each}.") for each in forbidden), f"{importer} imports {name}"


def test_the_walk_sees_what_is_imported_by_what_is_imported() -> None:
    assert {"lora_lite.lab.training.loop", "lora_lite.lab.training.session"} <= reached(
        "lora_lite.lab.studies.bench"
    ).keys()
