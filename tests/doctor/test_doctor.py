"""The doctor finds what is wrong, and says how to mend it."""

import json
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from smg_sglang.box import GIB, BoxMemory
from smg_sglang.config import MIN_HOST_GB
from smg_sglang.doctor import cli, devices, limits, software
from smg_sglang.doctor.devices import judge, measure_links
from smg_sglang.doctor.finding import Finding, Verdict, wrong
from smg_sglang.doctor.link import Link
from smg_sglang.doctor.recommend import recommend


def by_name(findings) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def make_root(path, *, total_gb=64, free_gb=32, limit_gb=None, overcommit="0", shmem="[advise]"):
    """A machine as /proc and /sys show it."""
    for folder in (
        "proc/self",
        "proc/sys/vm",
        "sys/fs/cgroup",
        "sys/kernel/mm/transparent_hugepage",
    ):
        (path / folder).mkdir(parents=True)
    kib = {"MemTotal": total_gb << 20, "MemFree": free_gb << 20, "MemAvailable": free_gb << 20}
    lines = [f"{name}: {size} kB" for name, size in kib.items()]
    (path / "proc/meminfo").write_text("\n".join(lines))
    (path / "proc/self/cgroup").write_text("0::/\n")
    (path / "proc/sys/vm/overcommit_memory").write_text(overcommit + "\n")
    (path / "sys/kernel/mm/transparent_hugepage/shmem_enabled").write_text(f"always {shmem} never")
    if limit_gb is not None:
        (path / "sys/fs/cgroup/memory.max").write_text(str(limit_gb * GIB))
        (path / "sys/fs/cgroup/memory.current").write_text("0")
    return path


def test_a_machine_with_memory_is_fine(tmp_path):
    found = by_name(limits.look_at_memory(make_root(tmp_path)))
    assert {finding.verdict for finding in found.values()} == {Verdict.OK}
    assert found["memory"].found == "32.0 GiB free of 64.0"


def test_too_little_memory_is_wrong(tmp_path):
    found = by_name(limits.look_at_memory(make_root(tmp_path, free_gb=0)))
    assert found["memory"].verdict is Verdict.WRONG


def test_a_tight_container_is_told(tmp_path):
    found = by_name(limits.look_at_memory(make_root(tmp_path, limit_gb=8)))["container limit"]
    assert found.verdict is Verdict.ADVICE
    assert found.found == "8.0 GiB, of the machine's 64.0"


def test_kernel_settings_that_hurt_are_told(tmp_path):
    root = make_root(tmp_path, overcommit="2", shmem="[never]")
    found = by_name(limits.look_at_memory(root))
    assert found["vm.overcommit_memory"].verdict is Verdict.ADVICE
    assert "as root" in found["huge pages for shared memory"].mend


@pytest.mark.parametrize(
    ("limit", "pins", "verdict"),
    [
        (8 << 20, True, Verdict.ADVICE),
        (8 << 20, False, Verdict.OK),
        (resource.RLIM_INFINITY, True, Verdict.OK),
    ],
)
def test_locked_memory_matters_where_memory_is_pinned(monkeypatch, limit, pins, verdict):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    found = by_name(limits.look_at_limits(GIB, pins=pins))
    assert found["locked memory (ulimit -l)"].verdict is verdict


def test_a_kernel_without_memfd_is_wrong(monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.memfd_create", refuse)
    found = by_name(limits.look_at_limits(GIB, pins=False))["sealed shared memory (memfd)"]
    assert found.verdict is Verdict.WRONG
    assert "seccomp" in found.mend


def test_an_installation_that_is_whole_is_fine():
    found = list(software.look_at_software({}))
    assert {finding.verdict for finding in found} == {Verdict.OK}


@pytest.mark.parametrize(
    ("have", "verdict", "mend"),
    [
        ("0.5.99", Verdict.WRONG, "--smg-allow-untested-sglang"),
        (None, Verdict.WRONG, "pip install sglang=="),
    ],
)
def test_another_or_no_sglang_is_wrong(monkeypatch, have, verdict, mend):
    def version(name):
        if name == "sglang" and have is None:
            raise PackageNotFoundError(name)
        return have or "1.0"

    monkeypatch.setattr(software, "version", version)
    found = by_name(software.look_at_software({}))["SGLang"]
    assert found.verdict is verdict
    assert mend in found.mend


@pytest.mark.parametrize(
    ("environment", "verdict"),
    [
        ({"SGLANG_PLUGINS": "other"}, Verdict.WRONG),
        ({"SGLANG_PLUGINS": "other, smg"}, Verdict.OK),
        ({"SMG_ENABLE": "1"}, Verdict.ADVICE),
        ({"SMG_ENABLE": "True"}, Verdict.ADVICE),
        ({"SMG_ENABLE": "0"}, Verdict.OK),
    ],
)
def test_whether_sglang_will_find_us(environment, verdict):
    assert list(software.look_at_software(environment))[-1].verdict is verdict


def test_not_being_installed_is_wrong(monkeypatch):
    monkeypatch.setattr(software, "entry_points", lambda group: [])
    last = list(software.look_at_software({}))[-1]
    assert (last.verdict, "pip install" in last.mend) == (Verdict.WRONG, True)


def test_the_link_is_measured():
    (link, *_) = measure_links(64 << 20)
    assert min(link.to_device_gbps, link.to_host_gbps, link.prepare_gbps) > 0.01


def test_a_slow_link_is_told():
    found = by_name(judge(Link("cuda:0", 25.0, 1.5, 2.0)))
    assert found["link, cuda:0"].verdict is Verdict.ADVICE
    assert found["page-locking, cuda:0"].found == "2.0 GB/s"
    assert by_name(judge(Link("cpu", 9.0, 9.0, 1.0)))["link, cpu"].verdict is Verdict.OK


def test_a_device_that_refuses_is_a_finding(monkeypatch):
    def refuse(_):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(devices, "measure_links", refuse)
    links, (finding,) = devices.try_to_measure(GIB)
    assert (links, finding.verdict) == ([], Verdict.WRONG)
    assert "out of memory" in finding.found


def test_a_gpu_machine_gets_half_of_its_memory_and_a_cpu_machine_a_quarter():
    box = BoxMemory(128 * GIB, 100 * GIB)
    assert recommend(box, [Link("cuda:0", 50.0, 50.0, 2.0)], cuda=True).host_gb == 50
    assert recommend(box, [Link("cpu", 10.0, 10.0, 1.0)], cuda=False).host_gb == 25
    assert recommend(box, [Link("cuda:0", 0.9, 0.9, 2.0)], cuda=True).write_policy == "selective"


def test_no_less_is_recommended_than_a_server_takes():
    assert recommend(BoxMemory(GIB, GIB // 100), [], cuda=False).host_gb == MIN_HOST_GB


def test_a_gpu_whose_link_cannot_be_measured_still_is_one(monkeypatch):
    monkeypatch.setattr(devices, "cuda_available", lambda: True)
    monkeypatch.setattr(devices, "look_at_devices", lambda: [])
    monkeypatch.setattr(devices, "try_to_measure", lambda _: ([], []))
    assert cli._measure([], BoxMemory(GIB, GIB)) == ([], True)


WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise {error}("libtorch.so is broken\\nmore")

sys.meta_path.insert(0, Blocked())
from smg_sglang.doctor.cli import main
sys.exit(main(["--json"]))
"""


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_torch_that_cannot_be_imported_is_a_finding(error):
    code = WITHOUT_TORCH.format(error=error)
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert ended.returncode == 1, ended.stderr.decode()
    report = json.loads(ended.stdout)
    (found,) = [f for f in report["findings"] if f["verdict"] == "wrong" and f["what"] == "torch"]
    assert found["found"] == "cannot be imported: libtorch.so is broken"
    assert report["links"] == [] and report["recommended"]["host_gb"] > 0


def test_the_command_prints_json_and_says_by_its_code_that_all_is_fine(capfdbinary):
    code = cli.main(["--json"])
    report = json.loads(capfdbinary.readouterr().out)
    wrongs = [finding for finding in report["findings"] if finding["verdict"] == "wrong"]
    assert (code, report["fine"]) == ((1, False) if wrongs else (0, True))
    assert report["recommended"]["host_gb"] > 0


def test_the_command_says_by_its_code_that_something_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(cli, "look_at_software", lambda: [wrong("SGLang", "none", "install it")])
    assert cli.main([]) == 1
    told = capsys.readouterr().out
    assert "install it" in told and "1 wrong" in told
