"""Accelerate's own tests, with `bigkit.accelerate` in their imports, fail only where a reason says why.

They are not copied here. With the path of the folder `tests` of a clone of Accelerate, and `parameterized` installed:

    ACCELERATE_TESTS=path/to/accelerate/tests pytest tests/accelerate/test_their_tests.py -s
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bigkit.accelerate.differences import BEHAVIOUR

from .adapter import adapt

THEIRS = os.environ.get("ACCELERATE_TESTS")
FILES = [
    "test_accelerator", "test_big_modeling", "test_hooks", "test_logging", "test_memory_utils", "test_modeling_utils",
    "test_offload", "test_quantization", "test_utils",
]  # fmt: skip
HUB = "it asks the Hub for a model"
FAIL = {  # key of BEHAVIOUR -> tests
    "handles": """test_align_devices_as_cpu_offload test_attach_align_device_hook_as_cpu_offload
        test_attach_align_device_hook_as_cpu_offload_with_weight_map test_align_module_device_offloaded""",
    "maps": """test_infer_auto_device_map test_infer_auto_device_map_with_tied_weights
        test_infer_auto_device_map_with_buffer_check_and_multi_devices
        test_infer_auto_device_map_with_fallback_allocation
        test_infer_auto_device_map_with_fallback_allocation_partial_fit""",
    "budgets": """test_infer_auto_device_map_with_buffer_check
        test_infer_auto_device_map_with_fallback_allocation_no_fit
        test_infer_auto_device_map_with_fallback_allocation_and_buffers""",
    "words": """test_check_device_map_invalid_keys test_load_checkpoint_in_model_unexpected_keys_0
        test_load_checkpoint_in_model_unexpected_keys_1""",
    "ties": "test_save_safetensor_shared_memory",
    "execution device": "test_has_offloaded_params",
    "training": """test_accelerator_none test_is_accelerator_prepared test_prepared_objects_are_referenced
        test_free_memory_dereferences_prepared_components test_save_load_model_use_pytorch
        test_save_load_model_use_safetensors test_save_load_model_use_safetensors_tied_weights
        test_save_load_model_with_hooks_use_pytorch test_save_load_model_with_hooks_use_safetensors""",
    "private": """test_prepare_model_twice_does_not_double_wrap
        test_prepare_model_8bit_cpu_offload_raises_valueerror_not_typeerror""",
    "reset": "test_partial_state_after_reset test_accelerator_state_after_reset",
    "environment": "test_env_var_device",
    HUB: "test_infer_auto_device_map_on_t0pp",
}


def test_each_failure_has_its_reason():
    assert {*FAIL} - {HUB} == {*BEHAVIOUR}


@pytest.mark.skipif(THEIRS is None, reason="ACCELERATE_TESTS names no folder with Accelerate's tests")
def test_they_fail_only_where_a_reason_says_why(tmp_path):
    pytest.importorskip("parameterized")
    for name in FILES:
        source = Path(THEIRS, f"{name}.py").read_text(encoding="utf-8")
        (tmp_path / f"{name}.py").write_text(adapt(source), encoding="utf-8")
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", "report.xml", str(tmp_path)]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    print(run.stdout[-200:])
    cases = [*ElementTree.parse(tmp_path / "report.xml").iter("testcase")]
    failed = {case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None}
    expected = {name: reason for reason, names in FAIL.items() for name in names.split()}
    assert len(cases) > 100, run.stdout
    assert failed == expected.keys(), run.stdout
