"""scripts/build_flashinfer_moe.py: what is cut out of FlashInfer's sources, and when it refuses to."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import build_flashinfer_moe as build  # noqa: E402


@pytest.fixture
def sources(tmp_path):
    for name, begin, end, _ in build.CUTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"before\n{begin}\nother types\n{end}\nafter\n")
    return tmp_path


def test_only_one_pair_of_types_is_left(sources):
    build.cut(sources)
    for name, begin, end, instead in build.CUTS:
        assert (sources / name).read_text() == f"before\n{instead}{end}\nafter\n"
        assert "__nv_bfloat16, __nv_fp8_e4m3" in instead and begin not in instead


def test_other_sources_are_refused(sources):
    (sources / build.BINDING).write_text("something else")
    with pytest.raises(ValueError, match="expected FlashInfer"):
        build.cut(sources)


def test_each_module_names_its_sources_once():
    for names in build.MODULES.values():
        assert len({Path(name).name for name in names}) == len(names)
