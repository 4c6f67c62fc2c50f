"""Attacks that need a CUDA device, and those of the CPU that a device could hide."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HONEST = ("honest", "honest_into", "honest_cuda_streams")

# A stream left unjoined shows at once where the copy on the caller's stream overtakes it, else as a wrong timed output.
VERDICTS = {
    "cuda_side_stream": {"WORK_LEFT_BEHIND", "UNWRITTEN_OUTPUT"},
    "cuda_head_start": {"TIMED_OUTPUT_WRONG", "OUTPUT_CACHED"},  # it has the inputs of the call before
    "cuda_output_cache": {"OUTPUT_CACHED"},
    "cuda_graph_of_copies": {"OUTPUT_CACHED"},
    "cuda_partial_return": {"UNWRITTEN_OUTPUT"},
    "cuda_event_patch": {"TIMER_TAMPERED"},
    "synchronize_patch": {"TIMER_TAMPERED"},
    "event_patch": {"TIMER_TAMPERED"},
    "output_cache_into": {"OUTPUT_CACHED"},
    "noisy_cache": {"TIMED_OUTPUT_WRONG"},
    "weight_cache": {"INCORRECT_NUMERICAL"},
    "module_buffer": {"OUTPUT_ALIASES_EARLIER_OUTPUT"},
    "weight_byte": {"INPUT_MUTATED"},
    "mutation_but_last": {"INPUT_MUTATED"},
    "view_of_input": {"OUTPUT_ALIASES_INPUT"},
    "stale_output": {"UNWRITTEN_OUTPUT"},
    "partial_write": {"UNWRITTEN_OUTPUT"},
    "lazy_class_swap": {"OUTPUT_REPLACED"},
    "output_set": {"OUTPUT_REPLACED"},
    "background_thread_into": {"WORK_LEFT_BEHIND", "UNWRITTEN_OUTPUT"},
    "honest_if_kept": {"TIMED_OUTPUT_WRONG"},
    "expected_outputs": {"INCORRECT_NUMERICAL"},
    "late_correction": {"BENCH_TAMPERED"},
}


@pytest.fixture(scope="module")
def seen(evaluate):
    return evaluate([*HONEST, *VERDICTS], device="cuda", timeout=120.0)


@pytest.mark.parametrize("name", HONEST)
def test_honest_pass(seen, name):
    assert seen[name].verdict == "PASSED", seen[name].extra["message"]
    assert seen[name].performance.latency_ms > 0


@pytest.mark.parametrize(("name", "verdicts"), VERDICTS.items())
def test_attacker_is_named(seen, name, verdicts):
    assert seen[name].verdict in verdicts, f"{seen[name].verdict}: {seen[name].extra['message']}\n{seen[name].log}"
    assert seen[name].performance is None


def test_the_real_layer(evaluate):
    seen = evaluate(["honest", "weight_cache_moe"], device="cuda", timeout=120.0, tiny=True)
    assert seen["honest"].verdict == "PASSED", seen["honest"].extra["message"]
    assert seen["weight_cache_moe"].verdict == "INCORRECT_NUMERICAL"
