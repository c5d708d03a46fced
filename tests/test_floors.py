"""A module of the bridge imports only from floors below its own, so that each can be read without those above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

BRIDGE = Path(__file__).parents[1] / "bridge"

# From the ground up; `x.*` is all modules of a package. The package `bridge` itself may be imported by all.
FLOORS = (
    ("model",),
    ("values", "join", "otlp.frame", "otlp.body", "reports", "tools.fields", "tools.tool"),
    ("otlp.forms",),
    ("otlp.attributes",),
    ("otlp.points",),
    ("otlp.protobuf_points", "otlp.json_points", "otlp.records"),
    ("otlp.metrics", "tools.events", "tools.claude_code_lines", "tools.gemini_lines"),
    ("tools.limits",),
    ("tools.codex_lines",),
    ("tools.*", "otlp", "naming", "temporality", "pricing", "exposition", "budgets", "jsonl", "packed", "edits",
     "config", "units", "tables"),
    ("tools.known",),
    ("database", "place", "descriptors"),
    ("state",),
    ("rows",),
    ("copies",),
    ("store", "report_store", "supervisor", "control", "filesystem", "tokens", "watch", "reading"),
    ("mark", "recovery"),
    ("usage_store",),
    ("usage",),
    ("bookkeeper",),
    ("ledger", "telemetry"),
    ("web.access",),
    ("web.server", "web.families", "readers", "tls", "file_events"),
    ("web.*", "transcripts", "forwarding", "listeners"),
    ("daemon",),
    ("setup", "reporting", "statusline"),
    ("exporters",),
    ("evidence",),
    ("service", "doctor", "terminal", "simulator"),
    ("cli",),
    ("__main__",),
)  # fmt: skip
LAST_PURE_FLOOR = 10
IMPURE = {"asyncio", "os", "time", "sqlite3", "threading", "socket"}

MODULES = {
    ".".join(path.relative_to(BRIDGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(BRIDGE.rglob("*.py"))
    if path != BRIDGE / "__init__.py"
}


def floor_of(module: str) -> int | None:
    """Counted from the ground; a module's own name goes before its package's."""
    floors = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    return floors.get(module, floors.get(f"{module.partition('.')[0]}.*"))


def imports_of(tree: ast.AST, module: str) -> Iterator[str]:
    """What a module imports, anywhere in it: absolute names, as deep as modules go."""
    package = ["bridge", *module.split(".")]
    if MODULES[module].name != "__init__.py":
        package.pop()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                yield name if name.removeprefix("bridge.") in MODULES else origin


def tree_of(module: str) -> ast.AST:
    return ast.parse(MODULES[module].read_text(), module)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_floor(module: str) -> None:
    assert floor_of(module) is not None, f"bridge/{module}: add it to FLOORS in tests/test_floors.py"


@pytest.mark.parametrize("module", [name for name in MODULES if floor_of(name) is not None])
def test_imports_go_downward(module: str) -> None:
    floor = floor_of(module)
    upward = [
        name
        for name in imports_of(tree_of(module), module)
        if name.startswith("bridge.") and not is_below(name.removeprefix("bridge."), floor)
    ]
    assert not upward, f"{module} stands on floor {floor} and imports {', '.join(upward)} from its own or above"


def is_below(module: str, floor: int | None) -> bool:
    its_floor = floor_of(module)
    return floor is not None and its_floor is not None and its_floor < floor


@pytest.mark.parametrize("module", [name for name in MODULES if (floor_of(name) or 0) <= LAST_PURE_FLOOR])
def test_pure_modules_do_nothing_to_the_world(module: str) -> None:
    impure = IMPURE & {name.partition(".")[0] for name in imports_of(tree_of(module), module)}
    assert not impure, f"{module} is pure and imports {', '.join(sorted(impure))}"


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import os.path
from bridge import __version__, store
from bridge.tools import claude_code
from . import model
from .tools.claude_code import QUANTITIES
def lazy():
    from bridge.store import Store
    import bridge.ledger as books
"""
    assert [*imports_of(ast.parse(source), "cli")] == [
        "os.path", "bridge", "bridge.store", "bridge.tools.claude_code", "bridge.model", "bridge.tools.claude_code",
        "bridge.store", "bridge.ledger",
    ]  # fmt: skip
