"""No module of the package imports itself by way of others, wherever the imports stand."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def modules():
    """Dotted name -> file."""
    found = {}
    for file in (ROOT / "smg_sglang").rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def executed(node):
    """The nodes below one, without what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from executed(other)
        else:
            yield child
            yield from executed(child)


def imported(source, known):
    """The known modules that a source text imports, functions' own imports included."""
    names = set()
    for node in executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inside & known if inside <= known else inside | {node.module}
    return names & known


def check_acyclic(graph):
    graphlib.TopologicalSorter(graph).prepare()


def test_no_circle_of_imports_is_left():
    files = modules()
    graph = {
        name: imported(file.read_text(encoding="utf-8"), files.keys()) - {name}
        for name, file in files.items()
    }
    check_acyclic(graph)


def test_a_circle_that_a_function_hides_is_seen():
    sources = {"a": "def f():\n    from b import x\n", "b": "import a\n"}
    with pytest.raises(graphlib.CycleError):
        check_acyclic({name: imported(text, sources.keys()) for name, text in sources.items()})


def test_imports_for_types_alone_are_no_circle():
    sources = {"a": "if TYPE_CHECKING:\n    import b\n", "b": "import a\n"}
    check_acyclic({name: imported(text, sources.keys()) for name, text in sources.items()})


@pytest.mark.parametrize("room", sorted((ROOT / "smg_sglang" / "engine").glob("*/__init__.py")))
def test_each_room_says_who_calls_it_and_what_it_touches(room):
    said = ast.get_docstring(ast.parse(room.read_text(encoding="utf-8")))
    assert said is not None
    assert "Called" in said
    assert "touch" in said
