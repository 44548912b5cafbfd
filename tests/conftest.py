"""Strictness for all tests, set once: eight simulated devices, no silent promotion, no rank promotion."""

import os

# Level 0: programs here are compiled more than they run, and compiled in half the time without LLVM's optimisations.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

SLOW = {f"test_{name}.py" for name in ("hosts", "jobs", "main", "sources", "reinforce", "bucket", "notebook")}  # long


def pytest_collection_modifyitems(items):
    """Slow files first: one that starts last keeps one of the two cores waiting."""
    items.sort(key=lambda item: item.path.name not in SLOW)
    if "WARP_JAX_SLOW_TESTS" not in os.environ:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set WARP_JAX_SLOW_TESTS=1"))


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
