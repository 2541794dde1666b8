"""The rules of the house: the training loop knows no method, imports go one way, files stay readable."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from neuclip.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"


def _files(*folders: str) -> list[Path]:
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert found
    return found


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _method_names() -> set[str]:
    """Names of the objectives, of their synonyms, and those of methods that are still to come."""
    synonyms = {flag for cls in OBJECTIVES.values() for synonym in cls.synonyms for flag in synonym}
    return {*OBJECTIVES, *synonyms, "npn", "fastclip", "amorlip", "siglip", "openclip"}


def _docstrings(tree: ast.AST) -> set[tuple[int, int]]:
    """Positions of the strings that are documentation."""
    places = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                places.add((first.value.lineno, first.value.col_offset))
    return places


def _import_lines(tree: ast.AST) -> set[int]:
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def _mentions(source: str, names: set[str]) -> list[str]:
    """Places in code, comments and docstrings left out, where a method's name is an identifier or part of a string.

    The package may be imported by its own name, and be the default of a flag for a project's name.
    """
    tree = ast.parse(source)
    documentation, imports = _docstrings(tree), _import_lines(tree)
    lines = source.splitlines()
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        # f-strings come as parts from Python 3.12 on, whole before; either way their type ends in STRING or MIDDLE.
        kind = tokenize.tok_name[token.type]
        if kind not in ("NAME", "STRING", "FSTRING_MIDDLE") or token.start in documentation:
            continue
        words = set(re.split(r"[^a-z0-9]+", re.sub(r"[A-Z][a-z]+", lambda m: f"_{m.group()}", token.string).lower()))
        words |= set(re.split(r"[^a-z0-9]+", token.string.lower()))
        line = lines[token.start[0] - 1]
        if "neuclip" in words and (token.start[0] in imports or "--wandb-project-name" in line):
            words -= {"neuclip"}
        found.extend(f"line {token.start[0]}: {token.string}" for _ in words & names)
    return found


@pytest.mark.parametrize("path", _files("src/training"), ids=_name)
def test_training_knows_no_method(path: Path) -> None:
    assert _mentions(path.read_text(encoding="utf-8"), _method_names()) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('if args.objective == "siglip":\n    pass\n', 1),
        ("if args.npn:\n    pass\n", 1),
        ("x = args.npn_num_protos\n", 1),
        ("from neuclip.objectives.siglip import SigLIP\n", 1),
        ("x = f'{y} of siglip'\n", 1),
        ("class FastclipLoop:\n    pass\n", 1),
        ("import neuclip\nfrom neuclip.objectives import OBJECTIVES\n", 0),
        ("add('--wandb-project-name', default='neuclip')\n", 0),
        ("x = 'neuclip'\n", 1),
        ('"""About siglip."""\n# and npn\nx = 1\n', 0),
        ("def f():\n    '''siglip'''\n    return 'open_clip'\n", 0),
    ],
)
def test_the_search_finds_what_it_looks_for(source: str, count: int) -> None:
    found = _mentions(source, _method_names())
    assert bool(found) == bool(count), found


def _imported_packages(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("neuclip", {"training", "evaluation"}), ("evaluation", {"training"})],
)
def test_imports_go_one_way(package: str, forbidden: set[str]) -> None:
    for path in _files(f"src/{package}"):
        assert _imported_packages(path) & forbidden == set(), path


def test_methods_need_little() -> None:
    """Anybody's training loop can use them."""
    allowed = {"neuclip", "torch", "open_clip"}
    standard = {
        "__future__",
        "argparse",
        "collections",
        "contextlib",
        "dataclasses",
        "enum",
        "logging",
        "math",
        "operator",
        "shlex",
        "time",
        "typing",
        "weakref",
    }
    found = set().union(*(_imported_packages(path) for path in _files("src/neuclip")))
    assert found - standard <= allowed


@pytest.mark.parametrize("path", _files("src", "scripts", "tests", "benchmarks"), ids=_name)
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 1000
    assert path.stem not in ("utils", "util", "misc", "common")


@pytest.mark.parametrize("path", _files("src", "benchmarks"), ids=_name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert not source.strip() or ast.get_docstring(ast.parse(source))
