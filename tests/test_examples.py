"""The examples run on a CPU, with and without Triton: torch's CPU builds come without it; their modules are modules."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
WITHOUT_TRITON = """
import runpy, sys
sys.modules["triton"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    result = subprocess.run([sys.executable, str(path), "cpu"], capture_output=True, text=True)
    assert result.returncode == 0 and "relative L2" in result.stdout, result.stderr[-2000:]


def test_without_triton() -> None:
    path = next(path for path in EXAMPLES if path.stem == "deepseek_moe_layer")
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON, str(path), "cpu"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("parallel", [False, True], ids=["whole", "a process's part"])
def test_quantised_experts_go_where_their_module_goes(parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied, saved, loaded and moved, and without the graph that led to them."""
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(EXAMPLES[0].parent)
    from deepseek_moe_layer import QUANTISED, DeepSeekMoE
    from expert_parallel import ParallelMoE

    def module() -> torch.nn.Module:
        whole = DeepSeekMoE(hidden=256, intermediate=128, experts=16).use_blockmoe()
        return ParallelMoE(whole, 1, 2) if parallel else whole

    first, second = module(), module()
    state = first.state_dict()
    assert not any(state[name].requires_grad for name in QUANTISED) and state["down_codes"].dtype == torch.float8_e4m3fn
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    for other in (copy.deepcopy(first), second):
        for name in QUANTISED:
            assert torch.equal(getattr(other, name).float(), getattr(first, name).float())
    assert {getattr(first.to("meta"), name).device.type for name in QUANTISED} == {"meta"}
