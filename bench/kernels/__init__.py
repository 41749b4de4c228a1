"""The kernels that `bench/cpu_kernels.py` measures, by kind; each module has `cases() -> list[Case]`."""
