"""The subcommand `doctor`."""

from dataclasses import asdict

import click

from bots.cli.doctor.benchmark import benchmark
from bots.cli.doctor.checks import examine
from bots.cli.doctor.findings import Level, Setup, as_json, report
from bots.cli.options import Options, language, pass_options, shared_options, write_out
from core.errors import BadConfig
from core.observability import logs


@click.command()
@click.option("--bench", is_flag=True, help="Load the model and measure how fast it answers; takes about a minute.")
@click.option("--json", "json_wanted", is_flag=True, help="Print JSON.")
@shared_options
@pass_options
def doctor(options: Options, bench: bool, json_wanted: bool) -> int:
    """Look for what is wrong, and say what to do. Exit status 1 if something is bad."""
    config, problems = None, ""
    try:
        config = options.config()
    except BadConfig as error:
        problems = str(error.fields.get("problems") or error.detail or error)
    lines = tuple(line.strip() for line in problems.splitlines() if line.strip())
    setup = Setup(options.home, config, lines, language())
    findings, numbers = examine(setup), None
    if bench:
        logs.install("warning")
        measured, numbers = benchmark(setup)
        findings = sorted([*findings, *measured], key=lambda finding: finding.level)
    write_out(as_json(findings, bench=numbers and asdict(numbers)) if json_wanted else report(findings))
    return 1 if any(finding.level is Level.BAD for finding in findings) else 0
