"""What scripts/operator_goals says of whose operator traces are."""

import subprocess
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockmoe.geometry import HEADLINE
from blockmoe.report.load import Record

ROOT = Path(__file__).parents[2]
DEFINITION = HEADLINE.definition_name


@pytest.fixture(scope="module")
def goals():
    loader = SourceFileLoader("operator_goals", str(ROOT / "scripts/operator_goals"))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


CODE = 'def f(a):\n    """Docstring."""\n    return "text", a  # why\n'
OTHER_WORDS = '"""Of a module."""\n\n\ndef f(a):\n    # another reason\n    return "text", a\n'


@pytest.mark.parametrize(
    ("content", "same"),
    [
        (OTHER_WORDS, True),
        (CODE.replace("return", "return  "), True),
        (CODE.replace("text", "other"), False),  # a string that is no docstring: the kernels' assembly is such
        (CODE.replace("(a)", "(a, b=1)"), False),
    ],
)
def test_words_are_apart_from_code(goals, content, same):
    assert (goals.without_words({"a.py": content}) == goals.without_words({"a.py": CODE})) is same


def test_other_files_and_the_package_of_a_packed_form(goals):
    name = "blockmoe_0123456789abcdef"
    packed, here = {f"{name}/a.py": f"from {name}.b import c"}, {"blockmoe/a.py": "from blockmoe.b import c"}
    assert goals.without_words(packed) == goals.without_words(here)
    assert goals.without_words({"a.cu": "x  // y"}) != goals.without_words({"a.cu": "x"})


def test_nothing_to_judge_and_an_operator_that_failed(goals, capsys, monkeypatch):
    monkeypatch.setattr(goals.sys, "argv", ["operator_goals", "results"])

    def judged(*solutions, status="PASSED"):
        records = [Record(DEFINITION, "w", name, status if name == "blockmoe" else "PASSED", "GPU", tokens=1) for name in solutions]
        monkeypatch.setattr(goals, "load", lambda folders: SimpleNamespace(records=records))
        return goals.main()

    for solutions in (("other", "reference"), ("blockmoe", "reference")):
        with pytest.raises(SystemExit) as ended:
            judged(*solutions)
        said = f"folders: expected traces of blockmoe and of another solution, got {', '.join(sorted(solutions))} in results"
        assert ended.value.code == 2 and said in capsys.readouterr().err
    assert judged("other", "reference", "blockmoe", status="RUNTIME_ERROR") == 1
    assert "     1         -*  blockmoe has no trace that passed\n1 workload misses a goal (*)" in capsys.readouterr().out


def test_replays_are_held_against_the_span_by_events(goals):
    """CUPTI's span of ours is 40, of events 42.5: 60 by replay is 1.41 times that, not 1.5."""

    def record(name, **times):
        return Record(DEFINITION, "w", name, "PASSED", "GPU", **times)

    ours = record("blockmoe", latency=0.040, events=0.0425)
    others = {"eager": record("eager", latency=0.064, events=0.0665), "replayed": record("replayed", latency=0.070, graph=0.060)}
    ratio, name, ms = goals.faster(ours, others)
    assert (name, ms, round(ratio, 3)) == ("replayed", 0.060, 1.412)
    del others["replayed"]
    assert goals.faster(ours, others)[0] == pytest.approx(1.6)


def test_whose(goals, monkeypatch):
    ((digest, _),) = goals.of_tree(ROOT, [DEFINITION]).values()
    assert goals.whose({DEFINITION: digest}) == "the operator of this tree"
    monkeypatch.setattr(goals, "COMMITS", 1)
    for unknown in ("f" * 16, None):
        assert goals.whose({DEFINITION: unknown}).startswith("another operator than this tree and its last 1 commits have")


@pytest.mark.skipif(subprocess.run(["git", "-C", ROOT, "rev-parse"], capture_output=True).returncode, reason="no git repository")
def test_a_commit(goals, monkeypatch):
    """The newest one's files; and what is said where something was changed after the traces."""
    ((digest, files),) = goals.of_commit("HEAD", [DEFINITION]).values()
    assert len(digest) == 16 and any(path.endswith("operator/plan.py") for path in files)
    ((_, now),) = goals.of_tree(ROOT, [DEFINITION]).values()
    plan = next(path for path in now if path.endswith("operator/plan.py"))
    for change, said in (("# more\n", "by comments and docstrings alone"), ("x = 1\n", "by its code")):
        older = {**now, plan: now[plan] + change}
        monkeypatch.setattr(goals, "of_commit", lambda commit, definitions, older=older: {DEFINITION: ["0" * 16, older]})
        assert goals.whose({DEFINITION: "0" * 16}).endswith(said)
