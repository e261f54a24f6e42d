"""The rules of the house, read from the sources."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OURS = ("configs", "data_pipelines", "irg_jax")
SOURCES = sorted(path.relative_to(ROOT) for folder in (*OURS, "launch", "tests", "benchmarks")
                 for path in (ROOT / folder).rglob("*.py"))
COMMANDS = sorted(f"irg_jax.{path.stem}" for path in (ROOT / "irg_jax").glob("*.py")
                  if path.stem not in ("__init__", "config"))
# What a module may import of ours, by the longest prefix of its name. A package may import itself.
ALLOWED = {
    "configs": (),
    "data_pipelines": (),
    "irg_jax.parallel": (),
    "irg_jax.kernels": ("data_pipelines.batch", "irg_jax.parallel"),
    "irg_jax.models": ("data_pipelines.batch", "irg_jax.kernels", "irg_jax.parallel"),
    "irg_jax.checkpoints": ("data_pipelines.tokenizer", "irg_jax.models", "irg_jax.parallel"),
    "irg_jax.training": ("data_pipelines", "irg_jax.config", "irg_jax.checkpoints", "irg_jax.kernels",
                         "irg_jax.models", "irg_jax.parallel"),
    "irg_jax.sampling": ("data_pipelines", "irg_jax.config", "irg_jax.checkpoints", "irg_jax.kernels",
                         "irg_jax.models", "irg_jax.parallel"),
    "irg_jax.evaluation": ("data_pipelines", "irg_jax.config", "irg_jax.checkpoints", "irg_jax.models",
                           "irg_jax.parallel", "irg_jax.sampling"),
    "irg_jax.serving": ("data_pipelines", "irg_jax.sampling"),
    "irg_jax.config": ("data_pipelines", "irg_jax.models", "irg_jax.parallel", "irg_jax.training"),
    "irg_jax": ("data_pipelines", "irg_jax"),
}
NOT_IN_DATA = ("jax", "jaxlib", "flax", "optax", "orbax")


def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.Module) -> set[str]:
    """Every module that is named, wherever; `from a import b` names a.b, for b may be a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def forbidden_imports(module: str, named: set[str]) -> list[str]:
    """Which of the `named` modules `module` may not import."""
    home = max((prefix for prefix in ALLOWED if is_in(module, prefix)), key=len)
    allowed = (home, *ALLOWED[home])
    ours = [name for name in named if is_in(name, "launch") or any(is_in(name, top) for top in OURS)]
    wrong = {name for name in ours if not any(is_in(name, package) for package in allowed)}
    wrong |= {name for name in ours if any(is_in(name, command) for command in COMMANDS)}
    if home == "data_pipelines":
        wrong |= {name for name in named if any(is_in(name, top) for top in NOT_IN_DATA)}
    return sorted(wrong)


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] in OURS], ids=str)
def test_imports_point_up(path):
    assert forbidden_imports(module_name(path), imports(parse(path))) == []


@pytest.mark.parametrize("module, line", [
    ("configs.a", "from data_pipelines import config"),
    ("data_pipelines.a", "import jax.numpy as jnp"),
    ("data_pipelines.shapes.a", "def f():\n    from irg_jax.models import config"),
    ("irg_jax.models.a", "from data_pipelines.images import patchify"),
    ("irg_jax.models.a", "from data_pipelines import images"),
    ("irg_jax.kernels.a", "from irg_jax.models import config"),
    ("irg_jax.training.a", "from irg_jax.sampling import flow"),
    ("irg_jax.sampling.a", "from irg_jax.training import losses"),
    ("irg_jax.checkpoints.a", "from irg_jax.training import state"),
    ("irg_jax.evaluation.a", "from irg_jax import report"),
    ("irg_jax.report", "import irg_jax.report"),
])
def test_a_forbidden_import_is_seen(module, line):
    assert forbidden_imports(module, imports(ast.parse(line)))


def test_data_pipelines_start_no_backend():
    """Grain may import jax; with a platform that does not exist, starting a backend would raise."""
    def run(code: str) -> int:
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                              env={"PATH": "", "JAX_PLATFORMS": "none_such"}).returncode
    assert run("import data_pipelines.pipeline, data_pipelines.build") == 0
    assert run("import jax; jax.devices()") != 0  # so the line above would have told


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_source_keeps_the_form(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    tree = parse(path)
    lines = text.splitlines()
    assert text.isascii()
    assert ast.get_docstring(tree), "every module says what it is"
    assert len(lines) <= (500 if path.parts[:2] == ("irg_jax", "models") else 400)
    assert [number for number, line in enumerate(lines, 1) if len(line) > 112] == []
    assert path.name != "utils.py"
    functions = [node for node in ast.walk(tree)
                 if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 60] == []
    assert [node.lineno for node in ast.walk(tree)
            if isinstance(node, ast.ExceptHandler) and node.type is None] == []
    assert not {name for name in imports(tree) if name.split(".")[0] in ("pickle", "cloudpickle", "dill")}


def test_readme_prints_the_tree():
    """README's tree names every module, and nothing that does not exist."""
    tree = read_tree((ROOT / "README.md").read_text(encoding="utf-8"))
    modules = {str(path) for path in SOURCES if path.parts[0] in OURS and path.name != "__init__.py"}
    folders = {f"{folder}/" for folder in (*OURS, "launch", "tests", "docs")}
    assert sorted((modules | folders) - tree) == [], "README's tree lacks these"
    assert sorted(path for path in tree if not (ROOT / path).exists()) == [], "these do not exist"


def read_tree(readme: str) -> set[str]:
    """Paths of the indented block that shows the tree: deeper lines are inside the folder above.

            irg_jax/
              report.py   two spaces end a name
    """
    blocks = re.findall(r"(?:^    .*\n)+", readme, re.MULTILINE)
    block = next((block for block in blocks if re.search(r"^ +irg_jax/", block, re.MULTILINE)), None)
    assert block, "README has no indented block with a line that begins with irg_jax/"
    paths, parents = set(), []
    for line in block.splitlines():
        depth = len(line) - len(line.lstrip())
        parents = [(indent, folder) for indent, folder in parents if indent < depth]
        path = (parents[-1][1] if parents else "") + re.split(r"\s{2,}", line.strip())[0]
        paths.add(path)
        parents.append((depth, path))
    return paths


def test_tree_is_read():
    tree = ["irg_jax/", "  a.py   a file", "  models/   maths", "    c.py      one", "docs/", "  d.md"]
    readme = "# Title\n\n    a command\n\n" + "".join(f"    {line}\n" for line in tree) + "\ntext\n"
    assert read_tree(readme) == {"irg_jax/", "irg_jax/a.py", "irg_jax/models/", "irg_jax/models/c.py",
                                 "docs/", "docs/d.md"}
