"""Checkpoints: the bits come back, damage is told, and a kill loses nothing."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.train.checkpoint import CheckpointStore

ROOT = pathlib.Path(__file__).parent.parent


class Inner(NamedTuple):
    count: Any
    key: Any


class State(NamedTuple):
    params: Any
    inner: Inner
    step: Any


def make_state(seed: int = 0) -> State:
    """A state with every kind of leaf, whose bits depend on the seed."""
    rng = np.random.default_rng(seed)
    awkward = np.array([np.nan, -0.0, np.inf, 1e-45, rng.normal()], np.float32)
    with jax.enable_x64(True):
        wide = {
            "float64": jnp.asarray(rng.normal(size=3)),
            "int64": jnp.asarray(rng.integers(-(2**60), 2**60, 4)),
        }
    params = {
        "mlp/w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "": jnp.asarray(awkward),
        "bool": jnp.asarray(rng.integers(0, 2, 7) == 1),
        "uint32": jnp.asarray(rng.integers(0, 2**32, 3), jnp.uint32),
        "bfloat16": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
        "int32": jnp.asarray(rng.integers(-9, 9), jnp.int32),
        "empty": jnp.zeros((0, 2), jnp.float32),
        "host": rng.normal(size=2),
        "scalar": np.float64(rng.normal()),
        **wide,
    }
    keys = [
        jax.random.split(jax.random.key(seed), 3),
        jax.random.key(seed + 1, impl="rbg"),
    ]
    return State(params, Inner((None, [jnp.ones(())]), keys), seed)


def bits(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    ):
        impl = str(jax.random.key_impl(leaf))
        return (type(leaf), impl, *bits(jax.random.key_data(leaf)))
    array = np.asarray(leaf)
    return (type(leaf), array.dtype, array.shape, array.tobytes())


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert bits(a) == bits(b)


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    store = CheckpointStore(tmp_path / "made" / "by save")
    store.save(7, make_state(3))
    # The template has other values, so nothing can come from it.
    restored = CheckpointStore(store.folder).restore(make_state(11))
    assert_same(restored, make_state(3))
    assert type(restored) is State and type(restored.inner) is Inner


def test_restored_keys_draw_the_numbers_of_the_saved_ones(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"key": jax.random.key(5)})
    restored = store.restore({"key": jax.random.key(0)})
    assert jax.random.bits(restored["key"]) == jax.random.bits(jax.random.key(5))


def test_a_template_may_be_abstract(tmp_path):
    store = CheckpointStore(tmp_path)
    state = {"w": jnp.arange(4.0), "key": jax.random.key(5)}
    store.save(1, state)
    assert_same(store.restore(jax.eval_shape(lambda: state)), state)


def test_saving_leaves_the_state_donatable(tmp_path):
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    x = add(jnp.arange(1000.0))
    pointer = x.unsafe_buffer_pointer()
    CheckpointStore(tmp_path).save(1, {"x": x})
    assert add(x).unsafe_buffer_pointer() == pointer


def test_a_restored_state_can_be_donated(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": jnp.arange(1000.0)})
    restored = store.restore({"x": jnp.zeros(1000)})
    added = jax.jit(lambda x: x + 1.0, donate_argnums=0)(restored["x"])
    np.testing.assert_array_equal(added, np.arange(1000.0) + 1)


def test_sharded_states_go_home(tmp_path):
    mesh = jax.make_mesh((8,), ("batch",))
    split = jax.NamedSharding(mesh, jax.P("batch"))
    whole = jax.NamedSharding(mesh, jax.P())
    x = np.arange(32.0, dtype=np.float32).reshape(16, 2)
    state = {
        "split": jax.device_put(x, split),
        "whole": jax.device_put(x + 1, whole),
        "keys": jax.device_put(jax.random.split(jax.random.key(1), 8), split),
        "free": jnp.asarray(x + 2),
    }
    store = CheckpointStore(tmp_path)
    store.save(1, state)
    restored = store.restore(
        jax.tree.map(jnp.zeros_like, state) | {"keys": state["keys"]}
    )
    assert_same(restored, state)
    for name in ("split", "whole", "keys"):
        assert restored[name].sharding == state[name].sharding
    # Uncommitted arrays stay so: otherwise this raises "incompatible devices".
    jax.jit(jnp.add)(restored["split"], restored["free"])


def test_a_template_may_use_other_devices_than_the_save(tmp_path):
    mesh = jax.make_mesh((8,), ("batch",))
    split = jax.NamedSharding(mesh, jax.P("batch"))
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": jnp.arange(16.0)})
    restored = store.restore({"x": jax.device_put(jnp.zeros(16), split)})
    assert restored["x"].sharding == split
    np.testing.assert_array_equal(restored["x"], np.arange(16.0))


@pytest.mark.parametrize(
    ("metrics", "keep", "left", "best"),
    [
        ([None] * 5, 3, [2, 3, 4], None),
        ([5.0, 1.0, 2.0, 3.0, 4.0], 2, [0, 3, 4], 0),
        ([1.0, 9.0, 2.0, 9.0, 4.0], 1, [3, 4], 3),  # of equals the later
        ([1.0, float("nan"), -2.0, None], 2, [0, 2, 3], 0),
        ([-1.0, -2.0], 1, [0, 1], 0),
        ([1.0, 2.0], 1, [1], 1),
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, metrics, keep, left, best):
    store = CheckpointStore(tmp_path, keep=keep)
    for step, metric in enumerate(metrics):
        store.save(step, {"x": jnp.full(2, step)}, metric)
    for reader in (store, CheckpointStore(tmp_path)):  # the second reads from disk
        assert reader.steps() == left
        assert reader.latest_step() == left[-1]
        assert reader.best_step() == best
    for step in left:
        assert store.restore({"x": jnp.zeros(2, jnp.int32)}, step)["x"][0] == step
    assert {p.name for p in tmp_path.iterdir()} == {f"step_{s:010d}" for s in left}


def test_rewinding_makes_room_for_other_steps(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        store.save(step, {"x": jnp.full(2, step)}, metric=float(step))
    with pytest.raises(ValueError, match=r"step is 2, .* holds already"):
        store.save(2, {"x": jnp.zeros(2)})
    store.rewind(1)
    assert (store.steps(), store.best_step()) == ([1], 1)
    store.save(2, {"x": jnp.full(2, 20)}, metric=0.0)
    assert store.restore({"x": jnp.zeros(2, jnp.int32)})["x"][0] == 20
    assert store.best_step() == 1


def test_an_empty_store_says_so(tmp_path):
    store = CheckpointStore(tmp_path / "none")
    assert (store.steps(), store.latest_step(), store.best_step()) == ([], None, None)
    with pytest.raises(ValueError, match="holds no checkpoint; start without"):
        store.restore({})
    store.save(4, {"x": jnp.zeros(1)})
    with pytest.raises(ValueError, match=r"no checkpoint of step 3; .* steps \[4\]"):
        store.restore({"x": jnp.zeros(1)}, 3)


@pytest.mark.parametrize("step", [-1, 1.0, True])
def test_bad_steps_are_refused(tmp_path, step):
    with pytest.raises((ValueError, TypeError), match="step"):
        CheckpointStore(tmp_path).save(step, {"x": jnp.zeros(1)})


def test_bad_settings_and_states_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        CheckpointStore(tmp_path, keep=0)
    with pytest.raises(ValueError, match=r"state\['name'\] is 'x', needs an array"):
        CheckpointStore(tmp_path).save(1, {"name": "x"})
    with pytest.raises(ValueError, match="needs at least one array"):
        CheckpointStore(tmp_path).save(1, {"empty": jnp.zeros(0)})
    assert CheckpointStore(tmp_path).steps() == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            {"b": jnp.zeros(3), "w": jnp.zeros((2, 4))},
            r"\['w'\] is float32 of shape \(2, 4\) in the template, but float32 of "
            r"shape \(2, 3\) in the checkpoint",
        ),
        (
            {"b": jnp.zeros(3, jnp.int32), "w": jnp.zeros((2, 3))},
            r"\['b'\] is int32 of shape \(3,\) in the template, but float32",
        ),
        ({"w": jnp.zeros((2, 3))}, r"\['b'\] is missing in the template"),
        (
            {"a": jnp.zeros(1), "b": jnp.zeros(3), "w": jnp.zeros((2, 3))},
            r"\['a'\] is float32 .* but missing in the checkpoint",
        ),
        (State(1, 2, 3), r"state\.params is int64 .* but missing"),
    ],
)
def test_a_template_that_does_not_fit_is_told_where(tmp_path, template, message):
    store = CheckpointStore(tmp_path)
    store.save(1, {"b": jnp.zeros(3), "w": jnp.zeros((2, 3))})
    with pytest.raises(ValueError, match=message):
        store.restore(template)


def test_a_key_of_another_implementation_does_not_fit(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"key": jax.random.key(0)})
    with pytest.raises(ValueError, match=r"key<rbg> .* but key<fry>"):
        store.restore({"key": jax.random.key(0, impl="rbg")})


def truncate_to_nothing(file: pathlib.Path) -> None:
    file.write_bytes(b"")


def truncate_to_half(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: pathlib.Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage", [pathlib.Path.unlink, truncate_to_nothing, truncate_to_half, flip_a_bit]
)
def test_damage_to_any_file_is_told(tmp_path, damage):
    """Every file of a checkpoint in turn: never other bits, never another error."""
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, make_state(step), metric=float(step))
    newest = tmp_path / "step_0000000002"
    whole = tmp_path / "whole"
    shutil.move(newest, whole)
    files = [p.relative_to(whole) for p in sorted(whole.rglob("*")) if p.is_file()]
    assert pathlib.Path("manifest.json") in files
    for file in files:
        shutil.copytree(whole, newest)
        assert_same(store.restore(make_state(9)), make_state(2))
        damage(newest / file)
        with pytest.raises(ValueError) as told:
            store.restore(make_state(9))
        assert f"checkpoint {newest} is damaged: " in str(told.value)
        assert file.name in str(told.value)
        assert "step 1 is intact: restore it with step=1" in str(told.value)
        shutil.rmtree(newest)


def test_damage_without_an_intact_earlier_step_is_told(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, make_state(step))
        truncate_to_half(tmp_path / f"step_{step:010d}" / "manifest.json")
    with pytest.raises(ValueError, match="no earlier step is intact"):
        store.restore(make_state(0))
    # The damaged ones do not compete, and do not hinder what follows.
    assert CheckpointStore(tmp_path).best_step() is None
    store.save(3, make_state(3), metric=1.0)
    assert_same(store.restore(make_state(0)), make_state(3))


def test_a_later_step_is_no_way_back(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, {"x": jnp.zeros(1)})
    truncate_to_half(tmp_path / "step_0000000001" / "manifest.json")
    with pytest.raises(ValueError, match="no earlier step is intact"):
        store.restore({"x": jnp.zeros(1)}, 1)


def test_a_manifest_that_still_reads_but_was_changed_is_told(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": jnp.zeros(1)}, metric=5.0)
    manifest = tmp_path / "step_0000000001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("5.0", "6.0"))
    with pytest.raises(ValueError, match=r"manifest\.json cannot be trusted"):
        store.restore({"x": jnp.zeros(1)})
    assert store.best_step() is None


def test_a_step_appears_and_disappears_by_one_rename(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"x": jnp.zeros(1)})
    monkeypatch.setattr("os.rename", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save(2, {"x": jnp.ones(1)})
    assert store.steps() == [1]
    monkeypatch.undo()
    monkeypatch.setattr("shutil.rmtree", killed)  # killed before it deletes step 1
    with pytest.raises(KeyboardInterrupt):
        (tmp_path / ".saving-2").rename(tmp_path / "elsewhere")
        store.save(2, {"x": jnp.ones(1)})
    assert store.steps() == [2]
    assert store.restore({"x": jnp.zeros(1)})["x"] == 1


def test_rubbish_of_a_killed_process_is_swept_and_never_listed(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": jnp.zeros(1)})
    for name in (".deleted-0", ".saving-2"):
        shutil.copytree(tmp_path / "step_0000000001", tmp_path / name)
    assert store.steps() == [1]
    store.save(2, {"x": jnp.ones(1)})
    assert {p.name for p in tmp_path.iterdir()} == {
        "step_0000000001",
        "step_0000000002",
    }


SAVER = """
import sys, jax.numpy as jnp
from jaxpg.train.checkpoint import CheckpointStore
store = CheckpointStore(sys.argv[1], keep=2)
for step in range(10_000):
    state = {f"w{i}": jnp.full((64, 64), step, jnp.int32) for i in range(4)}
    store.save(step, state, metric=-float(step))
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.011, 0.023])
@pytest.mark.thinned(2)
def test_a_kill_while_saving_leaves_the_newest_complete_checkpoint(tmp_path, delay):
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        text=True,
    )
    with saver:
        assert saver.stdout is not None
        finished = [int(saver.stdout.readline()) for _ in range(5)]
        try:
            saver.wait(delay)  # into the middle of a later save
        except subprocess.TimeoutExpired:
            saver.send_signal(signal.SIGKILL)
        finished += [int(line) for line in saver.stdout.read().split()]
    assert saver.returncode == -signal.SIGKILL
    store = CheckpointStore(tmp_path, keep=2)
    # One more may have been renamed into place before its number was printed.
    assert store.latest_step() in (finished[-1], finished[-1] + 1)
    template = {f"w{i}": jnp.zeros((64, 64), jnp.int32) for i in range(4)}
    for step in store.steps():
        for leaf in store.restore(template, step).values():
            np.testing.assert_array_equal(leaf, np.full((64, 64), step))
    assert store.best_step() == 0
    store.save(20_000, template)  # and the run can go on
    assert store.latest_step() == 20_000
