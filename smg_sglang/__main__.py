"""`python -m smg_sglang memory ...`: see smg_sglang/memory/cli.py."""

import sys

USAGE = "usage: python -m smg_sglang memory [--host-gb GIB] [--address DIR] (see memory --help)"


def main(arguments: list[str]) -> int:
    """Dispatch to a command; returns the exit code."""
    match arguments:
        case ["memory", *rest]:
            from smg_sglang.memory.cli import main as memory

            return memory(rest)
        case ["-h" | "--help"]:
            print(USAGE)
            return 0
    print(USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
