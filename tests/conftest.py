"""Eight CPU devices, exact float32 matmuls, shape checks in signatures; set before jax is imported."""

import importlib.util
import os
import pathlib
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# On a busy machine eight devices on two cores meet late; XLA would abort the process after 40 seconds.
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_cpu_collective_timeout_seconds=600",
    # Most of the tests' time is compilation; what a program computes is the same.
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Many tests start the same run again: it need not be compiled again, in this process or in another.
_compiled = tempfile.TemporaryDirectory(prefix="compiled", ignore_cleanup_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compiled.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_default_matmul_precision", "highest")
# Eight virtual devices on two cores: two steps in flight at once starve each other's collectives for ever.
jax.config.update("jax_cpu_enable_async_dispatch", False)
install_import_hook(["irg_jax.models", "irg_jax.kernels"], "beartype.beartype")


def pytest_addoption(parser):
    parser.addoption("--golden", default=str(pathlib.Path(__file__).parent / "golden" / "tiny_bagel"),
                     help="folder of golden values in the format of tests/golden/README.md")


@pytest.fixture(scope="session")
def golden_dir(request) -> pathlib.Path:
    return pathlib.Path(request.config.getoption("--golden"))


@pytest.fixture(scope="session")
def libtpu() -> None:
    """Makes TPUs' compiler known, which `launch/test.sh` puts beside the environment."""
    sys.path.append(str(pathlib.Path(sys.prefix) / "libtpu"))
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("libtpu is missing: bash launch/test.sh installs it beside the environment")


@pytest.fixture(scope="session")
def sound_source(tmp_path_factory) -> pathlib.Path:
    """A small model in the released layout."""
    from checkpoint_cases import make_model, make_tokenizer
    from irg_jax.checkpoints.bagel import export_folder
    folder = tmp_path_factory.mktemp("sound") / "source"
    export_folder(make_model(tokenizer=make_tokenizer()), folder)
    return folder


@pytest.fixture
def source(sound_source, tmp_path) -> pathlib.Path:
    """A copy of it, to be spoiled."""
    from checkpoint_cases import copy_source
    return copy_source(sound_source, tmp_path / "source")


def pytest_terminal_summary(terminalreporter):
    """The measured distance to the original, module by module, as docs/parity.md lists it."""
    report = getattr(__import__("sys").modules.get("parity_cases"), "REPORT", {})
    if report:
        terminalreporter.section("relative error against the original")
        for name, error in report.items():
            terminalreporter.write_line(f"{name:48s} {error:.1e}")
