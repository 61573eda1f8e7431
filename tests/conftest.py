"""Settings that hold in every test: strict promotion for our own code, no surprises.

Shape annotations are checked by beartype while the tests import jaxpg, and only then:
users pay nothing for them.
"""

import collections
import os
from importlib.metadata import version

# Before JAX starts. Eight host devices, so that sharded code runs sharded here. And no
# work on fast machine code: most of the time here goes into compiling programs that run
# once. Those flags concern how loops are written down and what LLVM makes of them: the
# algebra, loops and collectives of a program are the same, so tests that read those see
# what users have. Processes that play a user (test_cli, test_resume) drop the flags and
# run as he does. JAX ends at once on a flag that it does not know, hence the versions.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    + (
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        " --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
        if version("jaxlib").startswith(("0.8.", "0.9.", "0.10."))
        else ""
    ),
)
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

_hook = install_import_hook("jaxpg", "shape_checker.check")


# Begun first, so that no worker is left with a long file while the other has none.
LONG = (
    "test_resume",
    "test_unbiased",
    "test_distributed",
    "test_train",
    "test_devices",
    "test_notebooks",
    "test_study",
    "test_algorithm_contracts",
    "test_exact",
    "test_cli",
    "test_distributions",
    "test_policies",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Long files first; of a table marked `thinned(n)` one row in n is for a day."""
    places = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))
    seen = collections.Counter()
    for item in items:
        mark = item.get_closest_marker("thinned")
        if mark is not None:
            test = (item.path, item.originalname)
            if seen[test] % mark.args[0]:
                item.add_marker(pytest.mark.exhaustive)
            seen[test] += 1


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
