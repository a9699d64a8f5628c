import pytest

from fm_core.training.mfu import peak_tflops, utilization


def test_utilization_is_three_forward_passes_of_a_device_over_its_peak():
    # 295.9 M parameters at 64 x 64: 219.3 GFLOP forward; 100% of an H200 is 1,503 images/s.
    speed = utilization(8 * 1503.0, 219.3e9, 8, "NVIDIA H200", bf16=True)
    assert speed["tflops_per_device"] == pytest.approx(988.8, abs=0.1)
    assert speed["mfu"] == pytest.approx(1.0, abs=1e-3)


def test_without_a_known_peak_there_is_no_utilization():
    for name, bf16 in ((None, True), ("NVIDIA H200", False), ("Some Other GPU", True)):
        assert [*utilization(10.0, 1e9, 1, name, bf16)] == ["tflops_per_device"]


def test_a_device_is_known_by_its_longest_name():
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989.4
    assert peak_tflops("NVIDIA H200 NVL") == 835.5
    assert peak_tflops("NVIDIA GB200") == 2500.0
    assert peak_tflops("NVIDIA L40S") == 362.05
    assert peak_tflops("NVIDIA L40") == 181.05
    assert peak_tflops("NVIDIA L4") == 121.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
