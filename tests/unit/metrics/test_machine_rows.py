"""Which figure of the machine stands under which name, with which labels."""

from __future__ import annotations

from fake_snapshots import full_machine

from kvscope.metrics.collector import Exposition, Format
from kvscope.snapshot import Snapshot

EXPECTED = """\
kvscope_server_memory_bytes{kind="resident",server="main"} 1.073741824e+09
kvscope_server_memory_bytes{kind="shared",server="main"} 1.048576e+06
kvscope_server_memory_bytes{kind="swapped",server="main"} 0.0
kvscope_host_memory_bytes{kind="total"} 6.8719476736e+10
kvscope_host_memory_bytes{kind="available"} 3.4359738368e+10
kvscope_host_memory_bytes{kind="swap_used"} 0.0
kvscope_host_pressure_seconds_total{kind="some"} 1.5
kvscope_host_pressure_seconds_total{kind="full"} 0.25
kvscope_gpu_info{driver="580.65",gpu="0",name="RTX 4090",uuid="GPU-1",vendor="nvidia"} 1.0
kvscope_gpu_memory_total_bytes{gpu="0"} 2.5769803776e+10
kvscope_gpu_memory_used_bytes{gpu="0"} 2.147483648e+10
kvscope_gpu_memory_free_bytes{gpu="0"} 3.221225472e+09
kvscope_gpu_memory_reserved_bytes{gpu="0"} 1.073741824e+09
kvscope_gpu_gtt_total_bytes{gpu="0"} 8.589934592e+09
kvscope_gpu_gtt_used_bytes{gpu="0"} 1.048576e+06
kvscope_gpu_memory_by_kind_bytes{gpu="0",kind="weights",server="main"} 1.5032385536e+10
kvscope_gpu_memory_by_kind_bytes{gpu="0",kind="free"} 3.221225472e+09
kvscope_gpu_memory_by_kind_bytes{gpu="0",kind="reserved"} 1.073741824e+09
kvscope_gpu_server_memory_bytes{gpu="0",server="main"} 1.9327352832e+10
kvscope_gpu_process_memory_bytes{gpu="0",process="llama-server"} 1.9327352832e+10
kvscope_gpu_process_memory_bytes{gpu="0",process="firefox"} 2.147483648e+09
kvscope_gpu_utilization_ratio{gpu="0"} 0.5
kvscope_gpu_memory_bandwidth_utilization_ratio{gpu="0"} 0.25
kvscope_gpu_power_watts{gpu="0"} 300.0
kvscope_gpu_power_limit_watts{gpu="0"} 450.0
kvscope_gpu_energy_joules_total{gpu="0"} 1234.5
kvscope_gpu_energy_joules_total{gpu="1"} 99.0
kvscope_gpu_temperature_celsius{gpu="0"} 61.0
kvscope_gpu_clock_hertz{clock="graphics",gpu="0"} 2.5e+09
kvscope_gpu_pcie_bytes_per_second{direction="rx",gpu="0"} 1e+06
kvscope_gpu_pcie_bytes_per_second{direction="tx",gpu="0"} 2e+06
kvscope_gpu_throttled{gpu="0",reason="power"} 1.0
kvscope_gpu_throttled{gpu="0",reason="thermal"} 0.0
kvscope_gpu_throttled{gpu="0",reason="other"} 0.0
kvscope_gpu_errors_total{gpu="0",kind="ecc_corrected"} 1.0
kvscope_gpu_errors_total{gpu="0",kind="xid"} 0.0
kvscope_source_up{source="gpu"} 1.0
kvscope_source_up{source="host"} 1.0
kvscope_poll_interval_seconds{source="gpu"} 2.0
kvscope_poll_interval_seconds{source="host"} 2.0
"""


def test_each_figure_of_gpus_and_host_stands_under_its_own_name() -> None:
    text = Exposition().render(Snapshot((), full_machine()), Format.TEXT).decode()
    subjects = (
        "kvscope_gpu_",
        "kvscope_host_",
        "kvscope_server_memory_",
        "kvscope_source_up",
        "kvscope_poll_",
    )
    shown = [line for line in text.splitlines() if line.startswith(subjects)]
    assert shown == EXPECTED.splitlines()
