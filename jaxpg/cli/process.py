"""What JAX must know before its first computation."""

import contextlib
import os

__all__ = ["set_up_jax", "use_compilation_cache"]


def set_up_jax(num_devices: int, use_cache: bool) -> None:
    """Devices, flags and the cache of compiled programs."""
    import jax

    # Resuming to the bit needs sums in a fixed order; on CPU they are so anyway.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Never fewer than cores: a resumed run must find as many as a new one.
        with contextlib.suppress(RuntimeError):  # JAX runs already, with its devices
            jax.config.update("jax_num_cpu_devices", max(num_devices, cores))
    if use_cache:
        use_compilation_cache()


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless one is set already."""
    import jax
    import platformdirs

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        folder = platformdirs.user_cache_path("jaxpg") / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
