"""What is traced once is traced once, and is the same program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg._tracing import traced_once
from jaxpg.algos.reinforce import ReinforceConfig
from jaxpg.chunks import Chunks, map_over_chunks, sum_over_chunks
from jaxpg.train.config import TrainConfig
from jaxpg.train.program import build_program
from jaxpg.train.run import create_run, initial_state


def counted(fn):
    calls = []

    def with_count(*args):
        calls.append(1)
        return fn(*args)

    return with_count, calls


def test_shapes_and_loops_share_a_trace():
    fn, calls = counted(lambda x: 2.0 * x)
    once = traced_once(fn)

    def program(x):
        jax.eval_shape(once, x)
        return jax.lax.fori_loop(0, 3, lambda _, x: once(x), once(x))

    assert jax.jit(program)(jnp.ones(())).item() == 16.0
    assert len(calls) == 1


def here(x):
    return jnp.sin(x)


def test_it_leaves_no_trace_of_its_own():
    (equation,) = jax.make_jaxpr(traced_once(here))(1.0).eqns
    assert str(equation.primitive) == "sin"
    text = jax.jit(traced_once(here)).lower(1.0).as_text(debug_info=True)
    assert f":{here.__code__.co_firstlineno + 1}:" in text


def test_other_shapes_and_weak_types_have_traces_of_their_own():
    fn, calls = counted(lambda x: 2.0 * x)
    once = traced_once(fn)
    for x in (1.0, jnp.float32(1.0), jnp.ones(2), jnp.ones(2), 1.0):
        found, expected = jax.eval_shape(once, x), jax.eval_shape(here, x)
        assert found == expected and found.weak_type == expected.weak_type
    assert len(calls) == 3


def test_it_closes_over_what_is_batched_or_differentiated():
    def program(scale, x):
        once = traced_once(lambda x: jnp.sin(scale * x))
        jax.eval_shape(once, x)
        return once(x)

    scales, x = jnp.array([1.0, 2.0]), 0.5
    np.testing.assert_allclose(
        jax.vmap(jax.grad(program), (0, None))(scales, x), x * jnp.cos(scales * x)
    )


def test_terms_of_a_sum_and_of_a_map_are_traced_once():
    """However many chunks there are, and skipped blocks of chunks too."""
    rows, active = jnp.ones((4096, 2)), jnp.ones((4096, 2), bool)
    for over, fn in ((sum_over_chunks, jnp.sum), (map_over_chunks, jnp.negative)):
        terms, calls = counted(lambda scale, x, fn=fn: fn(scale * x))
        program = jax.jit(
            lambda x, over=over, terms=terms: over(
                terms, x, rows, active, Chunks(size=32)
            )
        )
        assert np.sum(np.abs(program(2.0))) == 2.0 * rows.size
        assert len(calls) == 1, over


@pytest.mark.parametrize("num_devices", [1, 2])
def test_an_update_traces_its_world_once(tmp_path, num_devices):
    """Its loop and the shapes of buffers and of metrics ask for it four times."""
    run = create_run(
        TrainConfig(
            env="CartPole-v1",
            num_envs=8,
            num_devices=num_devices,
            algorithm=ReinforceConfig(),
            runs_dir=tmp_path,
            name="run",
        )
    )
    step, calls = counted(run.env.step)
    env = run.env._replace(step=step)
    program = build_program(run.config, env, run.policy, None, run.placement)
    program.advance.trace(initial_state(run), np.int32(1))
    assert len(calls) == 1
