"""What setup.cfg asks for is what the code imports, and requirements.txt has versions of it that fit."""

import ast
import configparser
import pathlib
import sys
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for folder in ("irg_jax", "data_pipelines") for path in (ROOT / folder).rglob("*.py")}
EXTRAS = {"studio": ["irg_jax.serve"],
          "eval": ["irg_jax.evaluate", "irg_jax.report", "data_pipelines.show"]}
# starlette reads forms with it; asked for by name, with what to install.
NOT_IMPORTED, OPTIONAL = {"python-multipart"}, {"wandb"}


def read_setup() -> dict[str, list[Requirement]]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    sections = {"": parser["options"]["install_requires"], **parser["options.extras_require"]}
    return {name: [Requirement(line) for line in text.split("\n") if line] for name, text in sections.items()}


def names(*extras: str) -> set[str]:
    declared = read_setup()
    return {canonicalize_name(one.name) for extra in extras for one in declared[extra]}


def imported(module: str) -> set[str]:
    """Modules that a module names, ours and others', wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def reached(commands: list[str]) -> set[str]:
    """Packages of others that the commands import, themselves or through ours."""
    distributions, packages = packages_distributions(), set()
    seen, waiting = set(), list(commands)
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for name in imported(module):
            top = name.partition(".")[0]
            if top in ("irg_jax", "data_pipelines"):
                parents = [name.rsplit(".", cut)[0] for cut in range(name.count("."))]
                waiting += [parent for parent in parents if parent in SOURCES]
            elif top not in sys.stdlib_module_names:
                packages.add(canonicalize_name(distributions.get(top, [top])[0]))
    return packages - OPTIONAL


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_is_what_its_commands_import_besides(extra):
    assert names(extra) - NOT_IMPORTED == reached(EXTRAS[extra]) - names("")


def test_other_commands_need_no_extra():
    apart = sum(EXTRAS.values(), [])
    commands = [name for name, path in SOURCES.items()
                if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and name not in apart]
    assert reached(commands) == names("")


def read_pinned(file: str, environment: dict[str, str]) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return {canonicalize_name(one.name): one for one in map(Requirement, filter(None, lines))
            if one.marker is None or one.marker.evaluate(environment)}


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_pinned_versions_fit(python):
    environment = {"python_version": python, "sys_platform": "linux"}
    pinned = read_pinned("requirements.txt", environment)
    for extra, declared in read_setup().items():
        for one in declared:
            if one.marker is None or one.marker.evaluate(environment):
                (version,) = pinned[canonicalize_name(one.name)].specifier
                assert version.operator == "==" and one.specifier.contains(version.version), (extra, str(one))


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_cuda_is_the_one_of_jax(python):
    environment = {"python_version": python, "sys_platform": "linux"}
    pinned = read_pinned("requirements-cuda.txt", environment)
    jax = read_pinned("requirements.txt", environment)["jax"].specifier
    assert all(one.specifier == jax for name, one in pinned.items() if name.startswith("jax-cuda12-"))
    (extra,) = [one for one in read_setup()["cuda"] if one.marker.evaluate(environment)]
    assert (extra.specifier, extra.extras) == (jax, {"cuda12"}) and "jax-cuda12-pjrt" in pinned
