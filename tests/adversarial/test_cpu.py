"""Attacks that exist on a CPU: each is called by its name, beside honest contenders that pass."""

import pytest

pytestmark = pytest.mark.slow

HONEST = ("honest", "honest_into", "honest_inference")

VERDICTS = {
    # results of earlier calls
    "output_cache": "OUTPUT_CACHED",
    "output_cache_into": "OUTPUT_CACHED",
    "id_cache": "OUTPUT_CACHED",
    "data_ptr_cache": "OUTPUT_CACHED",
    "noisy_cache": "TIMED_OUTPUT_WRONG",
    "weight_cache": "INCORRECT_NUMERICAL",
    "module_buffer": "OUTPUT_ALIASES_EARLIER_OUTPUT",
    # inputs
    "input_mutation": "INPUT_MUTATED",
    "weight_byte": "INPUT_MUTATED",
    "mutation_while_timed": "INPUT_MUTATED",
    "mutation_but_last": "INPUT_MUTATED",
    "input_replaced": "INPUT_MUTATED",
    "view_of_input": "OUTPUT_ALIASES_INPUT",
    # outputs that are not there, or not yet
    "stale_output": "UNWRITTEN_OUTPUT",
    "partial_write": "UNWRITTEN_OUTPUT",
    "noncontiguous": "NOT_A_PLAIN_TENSOR",
    "lazy_tensor": "NOT_A_PLAIN_TENSOR",
    "zero_tensor": "NOT_A_PLAIN_TENSOR",
    "lazy_class_swap": "OUTPUT_REPLACED",
    "output_set": "OUTPUT_REPLACED",
    "output_data_swap": "OUTPUT_REPLACED",
    "output_resize": "OUTPUT_REPLACED",
    "background_thread": "WORK_LEFT_BEHIND",
    "background_thread_into": "WORK_LEFT_BEHIND",
    # honest while looked at
    "garbage_after_count": "TIMED_OUTPUT_WRONG",
    "garbage_in_block": "TIMED_OUTPUT_WRONG",
    "honest_if_kept": "TIMED_OUTPUT_WRONG",
    "honest_if_drawn": "TIMED_OUTPUT_WRONG",
    "expected_outputs": "INCORRECT_NUMERICAL",
    # the bench itself
    "timer_patch": "TIMER_TAMPERED",
    "synchronize_patch": "TIMER_TAMPERED",
    "event_patch": "TIMER_TAMPERED",
    "digest_patch": "BENCH_TAMPERED",
    "code_patch": "BENCH_TAMPERED",
    "session_patch": "BENCH_TAMPERED",
    "clone_patch": "BENCH_TAMPERED",
    "function_mode": "BENCH_TAMPERED",
    "late_correction": "BENCH_TAMPERED",
}
SLEEPERS = ("sleeper", "import_sleeper")


@pytest.fixture(scope="module")
def seen(evaluate):
    return evaluate([*HONEST, *VERDICTS])


@pytest.mark.parametrize("name", HONEST)
def test_honest_pass(seen, name):
    assert seen[name].verdict == "PASSED", seen[name].extra["message"]
    assert seen[name].performance.latency_ms > 0


@pytest.mark.parametrize(("name", "verdict"), VERDICTS.items())
def test_attacker_is_named(seen, name, verdict):
    assert seen[name].verdict == verdict, f"{seen[name].extra['message']}\n{seen[name].log}"
    assert seen[name].performance is None


def test_sleepers_time_out_alone(evaluate):
    seen = evaluate(["honest", *SLEEPERS], timeout=5.0)
    assert {name: seen[name].verdict for name in SLEEPERS} == dict.fromkeys(SLEEPERS, "TIMEOUT")
    assert seen["honest"].verdict == "PASSED", seen["honest"].extra["message"]


def test_the_real_layer(evaluate):
    """Weights kept from call to call, and times edited where no function is replaced: only the floor tells."""
    seen = evaluate(["honest", "weight_cache_moe", "sample_editor"], tiny=True)
    assert seen["honest"].verdict == "PASSED", seen["honest"].extra["message"]
    assert seen["weight_cache_moe"].verdict == "INCORRECT_NUMERICAL"
    assert "is anything of an earlier call kept?" in seen["weight_cache_moe"].extra["message"]
    assert seen["sample_editor"].verdict == "IMPOSSIBLE"
