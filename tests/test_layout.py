"""The layout of the package: imports go one way, names are unique, files are short."""

import ast
import collections
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "bsq_ray").rglob("*.py"))
# A package imports only packages of lower layers, and itself.
LAYERS = [
    {"runtime"},
    {"storage"},
    {"config", "media"},
    {"model_card", "model_ids", "samples", "shipped_models"},
    {"model_folder"},
    {"models", "planning"},
    {"losses", "metrics"},
    {"codec", "data", "import_bsq_vit", "model_export"},
    {"training"},
    {"evaluation"},
    {"tuning", "serving"},
    {"demos"},
    {"cli"},
]
LAYER = {package: level for level, packages in enumerate(LAYERS) for package in packages}
WITHOUT_RAY = {"models", "losses", "metrics", "codec"}
# Private parts of these packages may change in any release.
INTERNALS = ("ray._private", "ray._raylet", "ray.train.v2._internal", "ray.serve._private", "deepspeed.runtime")


def package_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imports_of(path):
    """Every imported module of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                [f"bsq_ray.{alias.name}" for alias in node.names] if node.module == "bsq_ray" else [node.module]
            )


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_imports_only_lower_layers(path):
    package = package_of(name_of(path))
    if package not in LAYER:  # bsq_ray/__init__.py and __main__.py
        return
    for module in imports_of(path):
        other = package_of(module)
        if module.startswith("bsq_ray.") and other != package and other in LAYER:
            assert LAYER[other] < LAYER[package], f"{name_of(path)} imports {module}"
        if package in WITHOUT_RAY:
            assert module.split(".")[0] not in {"ray", "deepspeed"}, f"{name_of(path)} imports {module}"


def test_every_package_has_a_layer():
    found = {package_of(name_of(path)) for path in MODULES} - {"__init__", "__main__"}
    assert found == set(LAYER)


def test_module_names_are_unique():
    names = collections.Counter(path.stem for path in MODULES if path.stem != "__init__")
    assert not [name for name, count in names.items() if count > 1]


def test_class_names_are_unique():
    places = collections.defaultdict(list)
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name_of(path))
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_modules_are_at_most_400_lines():
    long = {name_of(path): count for path in MODULES if (count := len(path.read_text().splitlines())) > 400}
    assert not long


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_private_parts_are_used_only_in_internals(path):
    if path.parent.name == "runtime" and path.name.endswith("_internals.py"):
        return
    assert not [module for module in imports_of(path) if module.startswith(INTERNALS)]
