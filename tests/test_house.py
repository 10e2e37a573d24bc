"""The rules that keep the house in order: documented modules, imports one way, one version, no path of one machine."""

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What each room may import of the others: belief knows nothing of computation, computation nothing of files.
MAY_IMPORT = {
    "model": {"model"},
    "data": {"model", "data"},
    "inference": {"model", "inference"},
    "experiments": {"model", "data", "inference", "experiments"},
}

PUBLIC = {
    "foveate.model": ["AttentionModel", "BernoulliRBM", "DeepBeliefNet", "GaussianRBM", "extract", "gaze"],
    "foveate.inference": ["BatchedHMC", "GazeGuide", "Posterior", "attend", "learn", "load", "save"],
    "foveate.data": ["Scenes", "caltech_faces", "orl_scenes", "webfaces"],
}

MODULES = sorted(path.relative_to(ROOT) for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def _tree(module: Path) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"), filename=str(module))


def _imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names of every import in a module, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def _docstrings(tree: ast.Module) -> set[int]:
    """Identities of the constants that are docstrings."""
    owners = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
    firsts = (owner.body[0] for owner in owners if owner.body)
    return {id(first.value) for first in firsts if isinstance(first, ast.Expr)}


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _plain(requirement: str) -> str:
    """The name a requirement begins with, as package indexes compare it."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def _written() -> list[Path]:
    """Every text that the project ships, as the folders hold it (a checkout need not be a git repository)."""
    kinds = {".py", ".md", ".csv", ".toml", ".cff", ".txt", ".html", ".css", ""}
    rooms = (ROOT / room for room in [*MAY_IMPORT, "tests", "docs", ".ci"])
    files = [path for room in rooms for path in room.rglob("*")] + list(ROOT.glob("*"))
    made = {"_build", "jupyter_execute", "__pycache__"}
    return sorted(p for p in files if p.is_file() and p.suffix in kinds and not made & set(p.parts))


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_opens_with_one_sentence(module: Path) -> None:
    docstring = ast.get_docstring(_tree(module)) or ""
    first, _, rest = docstring.partition("\n")
    assert first.endswith((".", ":")), f"{module}: the docstring's first line is no whole sentence: {first!r}"
    assert not rest or rest.startswith("\n"), f"{module}: a blank line is to follow the docstring's first line"


@pytest.mark.parametrize("module", [m for m in MODULES if m.name != "__main__.py"], ids=str)
def test_every_module_says_what_it_exports(module: Path) -> None:
    targets = [t for n in _tree(module).body if isinstance(n, ast.Assign) for t in n.targets]
    assert any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets), f"{module} has no __all__"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_one_way_through_the_rooms(module: Path) -> None:
    room = module.parts[0]
    for name in _imported(_tree(module)):
        assert not name.startswith("."), f"{module}: write `{name}` as an absolute import"
        if name.startswith("foveate."):
            other = name.split(".")[1]
            assert other in MAY_IMPORT[room], f"{module}: {room} may not import foveate.{other}"
        assert not name.startswith("__future__.annotations"), f"{module}: shapes are checked from live annotations"


@pytest.mark.parametrize("module", [m for m in MODULES if m.parts[0] != "experiments"], ids=str)
def test_no_library_module_names_a_cuda_device(module: Path) -> None:
    tree = _tree(module)
    prose = _docstrings(tree)
    constants = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in prose)
    lines = [n.lineno for n in constants if isinstance(n.value, str) and "cuda" in n.value]
    assert not lines, f"{module}:{lines}: the device follows the inputs; only the command line chooses one"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_no_module_unpickles_or_swallows_an_error(module: Path) -> None:
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            assert name not in {"torch.load", "pickle.load", "pickle.loads"}, f"{module}:{node.lineno}: unpickles"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False", f"{module}:{node.value.lineno}: unpickles"
        if isinstance(node, ast.ExceptHandler):
            assert not all(isinstance(n, ast.Pass) for n in node.body), f"{module}:{node.lineno}: swallows an error"


def test_no_file_names_a_path_of_one_machine() -> None:
    # A path from the root, but not the path part of an address.
    local = re.compile(r"(?<![\w.:/~])/(home|root|Users|work|tmp|opt|mnt)/")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in _written()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if local.search(line)
    ]
    assert not found


def test_the_version_is_the_same_wherever_it_stands() -> None:
    version = _project()["version"]
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    newest = re.search(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation is not None
    assert newest is not None
    assert citation.group(1) == newest.group(1) == version


def test_every_dependency_is_pinned_to_the_version_tested() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    # A local tag (`+cpu`) would bind the file to one machine's wheels.
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {_plain(pin) for pin in pins}
    extras = _project()["optional-dependencies"].values()
    wanted = {_plain(want) for wants in [_project()["dependencies"], *extras] for want in wants}
    assert wanted <= pinned, f"not in constraints.txt: {sorted(wanted - pinned)}"


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_where_users_look_for_them(package: str) -> None:
    module = importlib.import_module(package)
    missing = [name for name in PUBLIC[package] if name not in module.__all__ or not hasattr(module, name)]
    assert not missing, f"{package} does not offer {missing}"


def test_every_make_target_that_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", makefile, re.MULTILINE)
    named = re.findall(r"(?:^|`)make ([a-z][\w-]*)", readme, re.MULTILINE)
    assert named
    assert set(named) <= set(targets)
