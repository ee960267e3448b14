"""The order of the files: imports run one way, and importing a file changes nothing."""

import ast
import graphlib

from conftest import ROOT

# Each file imports files of lower floors alone, and of its own without a circle.
FLOORS = [
    "aggregate losses data encoder checkpoint program",
    "teachers student",
    "cache manifest",
    "run export superb.probe superb.upstream superb.ctc",
    "bench train evaluate_pr superb.asr superb.sid superb.er superb.report",
    "demo.speech demo.train_teachers demo.__main__",
]
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor.split()}
FREE = {  # what a file that is meant for copying needs besides Python's own modules
    "encoder": "torch",
    "aggregate": "torch",
    "losses": "torch",
    "checkpoint": "torch filelock",
    "student": "torch encoder checkpoint",
    "teachers": "torch filelock encoder checkpoint",
}


def modules():
    """{name: path} of the files of the repository without tests."""
    paths = [path for folder in (".", "superb", "demo") for path in (ROOT / folder).glob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return {n: path for n, path in zip(names, paths) if not n.endswith("__init__")}


def imports(path):
    """Names that a file imports, also inside functions: "torch", "superb.probe", ..."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_file_imports_one_above_it_and_there_is_no_circle():
    files = modules()
    assert files.keys() == FLOOR.keys()
    graph = {name: imports(path) & files.keys() for name, path in files.items()}
    for name, imported in graph.items():
        assert all(FLOOR[other] <= FLOOR[name] for other in imported), (name, imported)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_files_meant_for_copying_need_little():
    import sys

    for name, expected in FREE.items():
        needed = {other.split(".")[0] for other in imports(modules()[name])}
        assert needed - sys.stdlib_module_names <= set(expected.split()), name


def test_files_of_the_method_name_no_flag():
    for name in ("encoder", "teachers", "aggregate", "student", "losses", "data", "manifest"):
        strings = [
            node.value
            for node in ast.walk(ast.parse(modules()[name].read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        strings = [text.replace("docker run --shm-size=", "") for text in strings]
        assert not [text for text in strings if " --" in text or text.startswith("--")], name
