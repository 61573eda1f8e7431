"""The house: which file may import which, and docstrings that fit their signatures.

Read from the source with `ast`: nothing is imported to be judged.
"""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import jaxpg

ROOT = pathlib.Path(jaxpg.__file__).parent

# A file imports only files above it. Spaces and the environment record (`envs.base`)
# stand below the policies, because a head is made for an action space; the worlds
# themselves stand beside them. `envs` alone is the room's door: it shows all of it.
LAYERS = {
    "types": [
        "types",
        "_version",
        "_checks",
        "_batching",
        "_flat",
        "_tracing",
        "_unrolled",
    ],
    "mathematics": [
        "distributions.base",
        "distributions.discrete",
        "distributions.one_hot",
        "distributions.gaussian",
        "distributions",
        "envs.base",
        "heads.base",
        "heads.discrete",
        "heads.gaussian",
        "heads",
        "layers",
        "layout",
        "networks",
        "returns",
        "importance",
        "self_normalized",
        "advantages",
        "room",
        "credit",
        "leave_out",
        "grids",
        "skipping",
        "chunks",
        "gradients",
        "eligibility",
        "surrogate",
        "stochastic.nodes",
        "stochastic.influence",
        "stochastic.execution",
        "stochastic.credits",
        "stochastic.surrogates",
        "stochastic.score",
        "stochastic.enumeration",
        "stochastic.levels",
        "stochastic.multi_sample",
        "stochastic.noise",
        "stochastic.reruns",
        "stochastic.antithetic",
        "stochastic.controls",
        "stochastic.relaxation",
        "stochastic",
        "proximal",
        "moments",
        "normalizers",
        "diagnostics",
        "drift",
        "episodes",
        "linear_systems",
        "fisher",
        "trust_region",
    ],
    "parts": [
        "policies",
        "baselines",
        "optimal",
        "per_parameter",
        "linear_baselines",
        "value_functions",
        "critics",
        "groups",
        "estimators",
        "envs.tabular",
        "envs.wrappers",
        "envs.probes",
        "envs.from_gymnax",
        "envs.registry",
        "envs",
        "exact.dynamic",
        "exact.paths",
        "exact.enumeration",
        "exact.stationary",
        "exact.weights",
        "exact",
    ],
    "rollouts": ["slots", "pages", "rollout", "streams"],
    "algorithms": [
        "algos.base",
        "algos.measures",
        "algos.minibatches",
        "algos.segments",
        "algos.replay",
        "algos.behaviour",
        "algos.reinforce",
        "algos.a2c",
        "algos.vtrace",
        "algos.off_policy",
        "algos.natural",
        "algos.trpo",
        "algos.ppo_settings",
        "algos.ppo_steps",
        "algos.ppo",
        "algos.registry",
        "algos",
    ],
    "training": [
        "train.agreement",
        "train.lifeline",
        "train.visits",
        "train.distributed",
        "train.sharding",
        "train.provenance",
        "train.log",
        "train.checkpoint",
        "train.series",
        "train.axes",
        "train.render",
        "train.sweeps",
        "train.progress",
        "train.config",
        "train.tuned",
        "train.models",
        "train.program",
        "train.evaluate",
        "train.run",
        "train.records",
        "train.loop",
        "train",
    ],
    "studies": [
        "study.naming",
        "study.settings",
        "study.subjects",
        "study.sampling",
        "study.measure",
        "study.statistics",
        "study.laws",
        "study.store",
        "study.progress",
        "study.bench",
        "study.tables",
        "study.figures",
        "study.report",
        "study.ratio_figures",
        "study.curves_figures",
        "study.reports",
        "study.curves",
        "study.variance",
        "study.off_policy",
        "study.learning",
        "study.batch_size",
        "study",
        "study.commands",
    ],
    "systems": [
        "systems.base",
        "systems.digits",
        "systems.canvases",
        "systems.glimpses",
        "systems.gaze_pictures",
        "systems.attention_settings",
        "systems.attention_models",
        "systems.hard_attention",
        "systems.latent_settings",
        "systems.latent_model",
        "systems.latent_estimators",
        "systems.latent_data",
        "systems.discrete_vae",
        "systems.registry",
        "systems.program",
        "systems.runs",
        "systems.training",
        "systems",
    ],
    "doors": [
        "",
        "cli.words",
        "cli.process",
        "cli.systems",
        "cli.train",
        "cli.evaluate",
        "cli.study",
        "cli",
        "__main__",
    ],
}
ORDER = [file for files in LAYERS.values() for file in files]

HEAVY = {
    *("flax", "gymnasium", "gymnax", "matplotlib", "orbax", "rich", "sklearn", "tyro")
}
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}


def imported(node):
    """Full names that an import statement may load; of `from a import b` both."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are written in full"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def own_file(full_name):
    """The file of ours that holds a name, or None for other packages."""
    package, _, name = full_name.partition(".")
    if package != "jaxpg":
        return None
    return name if name in SOURCES else name.rpartition(".")[0]


def type_checking_only(tree):
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
    guarded = [n for n in blocks if "TYPE_CHECKING" in ast.unparse(n.test)]
    return {inner for block in guarded for inner in ast.walk(block)}


def violations(name, tree):
    for node in ast.walk(tree):
        for full_name in imported(node):
            file = own_file(full_name)
            if file is not None and ORDER.index(file) >= ORDER.index(name):
                yield f"{name or 'jaxpg'} imports {file or 'jaxpg'}"


def test_every_file_has_its_place():
    assert sorted(SOURCES) == sorted(ORDER), "add the file to LAYERS, in its layer"


@pytest.mark.parametrize("name", SOURCES)
def test_files_import_only_what_stands_above_them(name):
    assert list(violations(name, TREES[name])) == []


@pytest.mark.parametrize(
    "line",
    [
        "from jaxpg.rollout import Slot",
        "from jaxpg import rollout",
        "import jaxpg.rollout",
        "def f():\n    from jaxpg.rollout import Slot",
        "from jaxpg import Policy",
    ],
)
def test_a_wrong_import_would_be_found(line):
    assert len(list(violations("policies", ast.parse(line)))) == 1


def test_no_room_for_odds_and_ends():
    assert [name for name in SOURCES if set(name.split(".")) & VAGUE] == []


@pytest.mark.parametrize("name", SOURCES)
def test_heavy_packages_are_imported_where_they_are_used(name):
    tree = TREES[name]
    inside = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for inner in ast.walk(node)
    }
    allowed = {"tyro"} if name in ("cli.words", "cli.evaluate") else set()
    later = inside | type_checking_only(tree)
    top = [node for node in ast.walk(tree) if node not in later]
    loaded = {full.split(".")[0] for node in top for full in imported(node)}
    assert loaded & HEAVY - allowed == set()


def test_importing_jaxpg_loads_no_heavy_package():
    program = "import sys, jaxpg; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "optax" in loaded and "jaxpg" in loaded
    assert loaded & (HEAVY | {"pandas", "scipy.stats", "seaborn"}) == set()


# Public names and their docstrings.


def public_names(tree):
    for node in tree.body:
        target = getattr(node, "target", None) or (getattr(node, "targets", [None])[0])
        if isinstance(target, ast.Name) and target.id == "__all__":
            return ast.literal_eval(node.value)
    return None


def definitions():
    """Every public function and class, with the file that it stands in."""
    for name, tree in TREES.items():
        for node in tree.body:
            kinds = (ast.FunctionDef, ast.ClassDef)
            if isinstance(node, kinds) and node.name in (public_names(tree) or []):
                yield pytest.param(node, id=f"{name}.{node.name}")


DEFINITIONS = list(definitions())


def entries(docstring, section):
    """Names described in a section of a Google docstring; None without it."""
    head = re.search(rf"^{section}:\n", docstring, re.MULTILINE)
    if head is None:
        return None
    names = []
    for line in docstring[head.end() :].splitlines():
        if line and not line.startswith(" "):
            break
        if entry := re.match(r" {4}(\*{0,2}\w+):", line):
            names.append(entry[1])
    return names


def arguments(node):
    plain = [*node.args.posonlyargs, *node.args.args]
    star = [node.args.vararg] if node.args.vararg else []
    keywords = [*node.args.kwonlyargs, *([node.args.kwarg] if node.args.kwarg else [])]
    return [argument.arg for argument in (*plain, *star, *keywords)]


@pytest.mark.parametrize("name", SOURCES)
def test_every_module_opens_with_a_docstring_and_says_what_is_public(name):
    tree = TREES[name]
    if name == "_version":
        return
    assert ast.get_docstring(tree)
    if name in ("__main__", "algos"):
        return
    names = public_names(tree)
    assert names is not None, "__all__ is missing"
    defined = set(re.findall(r"\w+", ast.unparse(ast.Module(tree.body, []))))
    assert set(names) <= defined


@pytest.mark.parametrize("node", DEFINITIONS)
def test_public_names_are_documented(node):
    docstring = ast.get_docstring(node)
    assert docstring, f"{node.name} has no docstring"
    assert docstring.splitlines()[0].endswith((".", ":"))


@pytest.mark.parametrize("node", DEFINITIONS)
def test_docstrings_describe_the_arguments_that_there_are(node):
    docstring = ast.get_docstring(node) or ""
    if isinstance(node, ast.FunctionDef):
        described = entries(docstring, "Args")
        expected = arguments(node)
    else:
        described = entries(docstring, "Attributes")
        expected = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]
    if described is not None:
        assert [name.lstrip("*") for name in described] == expected


def test_a_wrong_docstring_would_be_found():
    source = '''
def f(a, *b, c=1, **d):
    """One line.

    Args:
        a: first, whose text
            goes on: here.
        **d: last.

    Returns:
        e: nothing.
    """
'''
    node = ast.parse(source).body[0]
    assert entries(ast.get_docstring(node), "Args") == ["a", "**d"]
    assert entries(ast.get_docstring(node), "Raises") is None
    assert arguments(node) == ["a", "b", "c", "d"]


def test_names_at_the_top_are_those_of_the_rooms():
    """What `jaxpg` shows exists, in order, and is public in the room it comes from."""
    assert sorted(jaxpg.__all__) == jaxpg.__all__
    for node in TREES[""].body:
        for full_name in imported(node):
            name = full_name.rpartition(".")[2]
            assert name in jaxpg.__all__ and hasattr(jaxpg, name)
            tree = TREES[own_file(full_name)]
            is_room = own_file(full_name) == name or name == "__version__"
            assert is_room or name in public_names(tree)
