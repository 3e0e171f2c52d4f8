"""`python -m smg_sglang doctor`: looks at this machine, measures, recommends."""

from __future__ import annotations

import argparse
import sys

import msgspec
from rich.console import Console
from rich.table import Table

from smg_sglang.box import GIB, BoxMemory, box_memory
from smg_sglang.doctor.disk import look_at_disk
from smg_sglang.doctor.finding import Finding, Verdict, first_line, wrong
from smg_sglang.doctor.limits import look_at_limits, look_at_memory
from smg_sglang.doctor.link import Link
from smg_sglang.doctor.recommend import Recommendation, recommend
from smg_sglang.doctor.software import look_at_software

_STYLES = {Verdict.OK: "green", Verdict.ADVICE: "yellow", Verdict.WRONG: "red"}


class Report(msgspec.Struct, frozen=True):
    """All of it, as `--json` prints it. `links`: see `link.Link`."""

    findings: list[Finding]
    links: list[Link]
    recommended: Recommendation
    fine: bool


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 when nothing is wrong, 1 when something is."""
    options = _parser().parse_args(arguments)
    report = examine(options.storage)
    if options.json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    else:
        _print(report, Console())
    return 0 if report.fine else 1


def examine(storage: str | None = None) -> Report:
    """Look at everything, and at a directory for storage. Takes a few seconds: torch is imported,
    and copies are timed."""
    findings = [*look_at_software(), *look_at_memory()]
    if storage is not None:
        findings += look_at_disk(storage)
    box = box_memory()
    links, cuda = _measure(findings, box)
    recommended = recommend(box, links, cuda=cuda)
    findings += look_at_limits(int(recommended.host_gb * GIB), pins=cuda)
    fine = all(finding.verdict is not Verdict.WRONG for finding in findings)
    return Report(findings, links, recommended, fine)


def _measure(findings: list[Finding], box: BoxMemory) -> tuple[list[Link], bool]:
    """The links, as far as they can be measured, and whether there is CUDA."""
    try:
        # Only here: without torch, or with a broken one, there still is something to say.
        from smg_sglang.doctor.devices import cuda_available, look_at_devices, try_to_measure
    except (ImportError, OSError) as error:
        if not any(f.what == "torch" and f.verdict is Verdict.WRONG for f in findings):
            found = f"cannot be imported: {first_line(error)}"
            findings.append(wrong("torch", found, "pip install --force-reinstall torch"))
        return [], False
    findings += look_at_devices()
    links, told = try_to_measure(box.available)
    findings += told
    return links, cuda_available()


def _print(report: Report, console: Console) -> None:
    table = Table(show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for finding in report.findings:
        mark = f"[{_STYLES[finding.verdict]}]{finding.verdict}[/]"
        told = finding.found + (f"\n[dim]mend: {finding.mend}[/]" if finding.mend else "")
        table.add_row(mark, finding.what, told)
    console.print(table)
    console.print(f"[bold]recommended[/]  {report.recommended.flags}", soft_wrap=True)
    for reason in report.recommended.reasons:
        console.print(f"  [dim]{reason}[/]", soft_wrap=True)
    wrong = sum(finding.verdict is Verdict.WRONG for finding in report.findings)
    console.print("Nothing is wrong." if report.fine else f"[red]{wrong} wrong: see the mends.[/]")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m smg_sglang doctor",
        description="What this machine offers a server with host memory, what suits it, and what "
        "is wrong, each with its mend. Exit code 1 when something is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    parser.add_argument(
        "--storage", metavar="DIRECTORY", help="also how fast it is (256 MiB are written there)"
    )
    return parser
