"""Settings that hold in every test: strict promotion for our own code, no surprises.

Shape annotations are checked by beartype while the tests import jaxpg, and only then:
users pay nothing for them.
"""

import os

# Before JAX starts. Eight host devices, so that sharded code runs sharded here. And no
# work on fast machine code: nearly all the time here goes into compiling programs that
# run once. Both flags concern LLVM alone; fusions, buffers and collectives are decided
# before it, so tests that read those see what users have. Processes that play a user
# (test_cli, test_resume) drop these flags and run as he does.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

_hook = install_import_hook("jaxpg", "shape_checker.check")


@pytest.fixture
def float64():
    """Run one test in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def free_large_programs(request):
    """Give back the memory of modules whose compiled programs are many and large."""
    yield
    if getattr(request.module, "__name__", "") in (
        "test_algos",
        "test_streams",
        "test_unbiased",
    ):
        jax.clear_caches()
