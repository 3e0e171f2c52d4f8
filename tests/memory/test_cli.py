import errno
import os
import signal
import subprocess
import sys

import pytest

from smg_sglang.errors import ConfigError
from smg_sglang.memory.address import Address
from smg_sglang.memory.cli import main
from smg_sglang.memory.client import MemoryConnection

from .world import eventually, make_namespace


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf", "1000000000"])
def test_a_wrong_size_ends_with_one_sentence_and_code_2(size, directory, capsys):
    assert main(["--host-gb", size, "--address", directory]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--host-gb" in error


@pytest.mark.parametrize("address", ["tcp://1.2.3.4:5", "/" + "x" * 120])
def test_a_wrong_address_ends_with_one_sentence_and_code_2(address, capsys):
    assert main(["--host-gb", "0.01", "--address", address]) == 2
    assert "memory address" in capsys.readouterr().err


@pytest.mark.parametrize("share", ["-0.1", "1.5", "nan"])
def test_a_share_that_is_none_ends_with_one_sentence_and_code_2(share, directory, capsys):
    assert main(["--host-gb", "0.01", "--address", directory, "--hint-share", share]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--hint-share must be at least 0 and at most 1" in error


def test_an_unknown_policy_is_refused_by_name(directory, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--host-gb", "0.01", "--address", directory, "--eviction-policy", "mru"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "--eviction-policy" in told and "slru" in told


@pytest.mark.parametrize("below", ["file/here", "file/deep/here", "file"])
def test_a_file_in_the_way_ends_with_one_sentence_and_code_2(below, directory, capsys):
    with open(f"{directory}/file", "w"):
        pass
    assert main(["--host-gb", "0.01", "--address", f"{directory}/{below}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{directory}/file" in error


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("os.memfd_create", PermissionError(errno.EPERM, "Operation not permitted")),
        ("os.ftruncate", OSError(errno.ENOSPC, "No space left on device")),
        ("os.pwrite", OSError(errno.ENOSPC, "No space left on device")),
        ("os.eventfd", OSError(errno.EMFILE, "Too many open files")),
    ],
)
def test_what_the_kernel_refuses_ends_with_one_sentence(
    call, error, directory, capsys, monkeypatch
):
    def refuse(*_):
        raise error

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(call, refuse)
        assert main(["--host-gb", "0.01", "--address", directory]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and error.strerror in told
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_command_serves_until_it_is_told_to_stop(directory):
    command = [sys.executable, "-m", "smg_sglang", "memory", "--host-gb", "0.01"]
    with subprocess.Popen([*command, "--address", f"ipc://{directory}/new"]) as server:
        eventually(lambda: os.path.exists(f"{directory}/new/control"), 10)
        connection = MemoryConnection.open(f"{directory}/new", make_namespace(), 10)
        second = subprocess.run(
            [*command, "--address", f"{directory}/new"], capture_output=True, text=True, check=False
        )
        assert second.returncode == 2
        assert f"pid {server.pid}" in second.stderr and "Traceback" not in second.stderr
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
    assert not connection.alive
    connection.close()


def test_help_names_units(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "GiB" in capsys.readouterr().out


def test_the_server_needs_neither_torch_nor_sglang():
    code = "import sys, smg_sglang.memory.cli; print({'torch', 'sglang'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def test_addresses_with_and_without_scheme_are_the_same():
    assert Address.parse("ipc:///run/x") == Address.parse("/run/x")
    assert str(Address.parse("/run/x")) == "ipc:///run/x"
    with pytest.raises(ConfigError):
        Address.parse("")


def test_the_default_address_is_this_users(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert Address.default().directory == f"/run/user/7/smg-{os.getuid()}/memory"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert Address.default().directory.startswith("/tmp/")


#: A server whose signals reach another of its threads: then the poll is not interrupted, as it is not
#: by a signal that comes just before the poll.
SIGNALLED_ELSEWHERE = """
import signal, sys, threading, time
from pathlib import Path
from smg_sglang.memory.cli import main

def signal_myself():
    while not Path(sys.argv[1], "control").exists():
        time.sleep(0.01)
    time.sleep(0.3)  # until the poll blocks
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=signal_myself, daemon=True).start()
sys.exit(main(["--host-gb", "0.0625", "--no-pretouch", "--address", sys.argv[1]]))
"""


def test_a_signal_that_does_not_interrupt_the_poll_ends_the_server(directory):
    command = [sys.executable, "-c", SIGNALLED_ELSEWHERE, f"{directory}/memory"]
    assert subprocess.run(command, timeout=20, check=False).returncode == 0
