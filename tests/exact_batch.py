"""A batch that is its own expectation: each path of the mine as often as it happens.

Under even actions every path of the mine has a probability of k / 64, so 64 rows hold
all of them in proportion, and a mean over them is exact. In float64 throughout.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpg import exact
from jaxpg.envs.tabular import canonical_mdp, tabular_environment
from jaxpg.policies import tabular_policy

with jax.enable_x64(True):
    MDP = canonical_mdp()
    ENV = tabular_environment(MDP)
    POLICY = tabular_policy(ENV.observation_space, ENV.action_space)
NUM_PATHS = 64


def even_params():
    """Parameters of the policy that draws evenly."""
    params = POLICY.init(jax.random.key(0), jnp.int32(0))
    return jax.tree.map(jnp.zeros_like, params)


def every_path():
    """All paths in proportion, one per row, as the even policy records them."""
    paths = exact.enumerate_trajectories(MDP)
    rows = exact.with_log_probs(paths.trajectories, POLICY, even_params())
    own = np.exp(np.where(rows.mask, rows.log_prob, 0.0).sum(1))
    times = NUM_PATHS * own * np.asarray(paths.world_probability)
    np.testing.assert_allclose(times, np.round(times), atol=1e-4)
    chosen = np.repeat(np.arange(len(times)), np.round(times).astype(int))
    assert len(chosen) == NUM_PATHS
    batch = jax.tree.map(lambda x: x[chosen], rows)
    ids = jnp.arange(NUM_PATHS, dtype=jnp.int32)[:, None]
    return batch._replace(episode_id=jnp.broadcast_to(ids, batch.mask.shape))


def packed(rows, per_row):
    """The same episodes, one after another in longer rows, empty slots last."""
    rows = jax.tree.map(np.asarray, rows._replace(next_obs=None, carry=None))
    count, length = rows.mask.shape
    order = np.argsort(~rows.mask.reshape(-1, per_row * length), axis=1, kind="stable")

    def pack(x):
        x = x.reshape(count // per_row, per_row * length)
        return jnp.asarray(np.take_along_axis(x, order, axis=1))

    return jax.tree.map(pack, rows)


def flat(tree):
    """All parameters in a row."""
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0])
