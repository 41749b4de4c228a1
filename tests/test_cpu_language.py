"""What the CPU target does with every public name of `triton.language`: one row per name.

RUNS names the test that runs it, REFUSED why it cannot mean anything here, NO_OPERATION what computes nothing (types,
helpers of Triton's own). A name that a Triton release adds and that has no row fails here, by name.
"""

import ast
import functools
import inspect
from pathlib import Path

import pytest
import triton.language as tl

RUNS = {
    "test_cpu_math.py::test_fp32_functions_of_any_argument": """
        abs ceil cos erf exp exp2 floor log log2 rsqrt sin sqrt sqrt_rn""",
    "test_cpu_math.py::test_binary_operations_and_nan": "add clamp div_rn fdiv fma maximum minimum mul sub",
    "test_cpu_math.py::test_umulhi": "umulhi",
    "test_cpu_math.py::test_expect_zero_keeps_values": "expect_zero",
    "test_cpu_math.py::test_helpers_of_the_standard_library": "cdiv sigmoid softmax zeros_like",
    "test_cpu_types.py::test_rounding_to_every_smaller_float": "cast",
    "test_cpu_random.py::test_random_numbers_are_those_of_philox": """
        pair_uniform_to_normal philox philox_impl rand rand4x randint randint4x randn randn4x uint_to_uniform_float""",
    "test_cpu_random.py::test_map_elementwise_runs_a_scalar_function_with_loops": "map_elementwise",
    "test_cpu_report.py::test_device_print_writes_a_line_for_each_element": "device_print static_print",
    "test_cpu_report.py::test_a_failed_device_assert_raises_with_its_line": "device_assert",
    "test_cpu_report.py::test_static_assert_refuses_to_compile_and_static_range_unrolls": "static_assert static_range",
    "test_cpu_tiles.py::test_reductions": "argmax argmin max min sum xor_sum",
    "test_cpu_tiles.py::test_scans": "cumsum",
    "test_cpu_tiles.py::test_reshape_split_join_trans_gather_flip_sort": """
        cat flip gather join reshape sort split trans""",
    "test_cpu_atomics.py::test_atomics": "atomic_add atomic_max",
    "test_cpu_tiles.py::test_embedding_rows": "arange load program_id store",
    "test_cpu_structure.py::test_loops_branches_and_while_with_results": "range",
    "test_cpu_elementwise.py::test_double_precision": "where",
    "test_cpu_matmul.py::test_carried_pointers_and_wrapped_indices": "dot num_programs zeros",
    "test_cpu_matmul.py::test_flash_attention": "full",
    "test_cpu_dot_scaled.py::test_products_of_scaled_blocks": "dot_scaled",
    "test_cpu_reduce.py::test_welford_merges_three_results": "reduce",
    "test_cpu_reduce.py::test_reductions_of_all_axes_and_kept_dimensions": "reduce_or",
    "test_cpu_reduce.py::test_scans_of_tuples_both_ways": "associative_scan cumprod",
    "test_cpu_reduce.py::test_sort_both_ways_and_the_largest": "topk",
    "test_cpu_reduce.py::test_bitonic_merge_of_up_and_down": "bitonic_merge",
    "test_cpu_reduce.py::test_histogram_counts_what_the_mask_lets_in": "histogram",
    "test_cpu_atomics.py::test_programs_update_the_same_elements": """
        atomic_and atomic_min atomic_or atomic_xchg atomic_xor""",
    "test_cpu_atomics.py::test_compare_and_swap_of_a_block": "atomic_cas",
    "test_cpu_blocks.py::test_descriptors_cut_tiles_at_the_edges": """
        load_tensor_descriptor make_tensor_descriptor store_tensor_descriptor""",
    "test_cpu_blocks.py::test_block_pointers_advance_and_are_padded": "advance make_block_ptr",
    "test_cpu_values.py::test_hints_change_nothing": """
        assume debug_barrier max_constancy max_contiguous multiple_of""",
    "test_cpu_values.py::test_shapes_are_turned_joined_and_cut": """
        broadcast broadcast_to expand_dims interleave permute ravel view""",
    "test_cpu_values.py::test_dimensions_of_one_come_and_go": "squeeze unsqueeze",
    "test_cpu_structure.py::test_a_while_loop_with_hints": "condition",
    "test_cpu_atomics.py::test_atomic_loads_and_stores": "atomic_load atomic_store",
    "test_cpu_values.py::test_grids_of_three_dimensions_and_swizzled_programs": "swizzle2d",
}
REFUSED = {  # name: why
    "inline_asm_elementwise": "PTX",
    "atomic_poll": "waits for programs that may not have begun",
}
NO_OPERATION = {
    "types": """
        PropagateNan TRITON_MAX_TENSOR_NUMEL bfloat16 block_type const constexpr constexpr_type dtype float16 float32
        float64 float8e4b15 float8e4b8 float8e4nv float8e5 float8e5b16 int1 int16 int32 int64 int8 pi32_t pointer_type
        slice tensor tensor_descriptor tensor_descriptor_type tuple tuple_type uint16 uint32 uint64 uint8 void""",
    "helpers of the front end": "aggregate_replace str_to_ty to_tensor",
}


WRITTEN_OTHERWISE = ("cast", "range")  # x.to(...), for ... in range(...)


def rows(table: dict[str, str]) -> list[str]:
    return [name for names in table.values() for name in names.split()]


@functools.cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((Path(__file__).parent / file).read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_name_of_the_language_has_one_row():
    public = {name for name, value in vars(tl).items() if not name.startswith("_") and not inspect.ismodule(value)}
    named = rows(RUNS) + list(REFUSED) + rows(NO_OPERATION)
    assert public - set(named) == set(), "names of triton.language without a row here"
    assert sorted(named) == sorted(set(named)), "a name has two rows"


@pytest.mark.parametrize("place", RUNS)
def test_the_tests_that_rows_name_exist(place):
    file, name = place.split("::")
    assert name in functions_of(file)
    text = (Path(__file__).parent / file).read_text()
    missing = [
        n for n in RUNS[place].split() if f"tl.{n}" not in text and f".{n}(" not in text and n not in WRITTEN_OTHERWISE
    ]
    assert missing == [], f"{file} never calls these"
