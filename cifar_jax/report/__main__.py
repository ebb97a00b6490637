"""One HTML page for a run, or a comparison of several: ``python -m cifar_jax.report WORKDIR``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from cifar_jax import cli
from cifar_jax.errors import UsageError
from cifar_jax.options import Options, flag, option
from cifar_jax.report.run import read_run
from cifar_jax.system.files import try_to_write, write_atomically, writing

DESCRIPTION = """\
Show a run of cifar_jax.train as a single HTML file, which needs no network connection and no other
file: its curves, scores and mistakes, and what the network looks like from inside.

Several runs give one page that compares them. An unfinished run is scored on its validation images:
the test images are for the end.

examples:
  python -m cifar_jax.report runs/20261122-101500-cnn
  python -m cifar_jax.report runs/20261122-101500-cnn --data cifar10.tar.gz --output cnn.html
  python -m cifar_jax.report runs/* --output comparison.html
"""


@dataclasses.dataclass(frozen=True)
class ReportOptions(Options):
    """Where to write the page, and where to find the images that it shows."""

    output: str | None = option(
        None,
        "the file to write [default: report.html in the run's folder; comparison.html here for "
        "several runs]",
    )
    data: str | None = option(
        None, "images, as in cifar_jax.train [default: what the run was trained on]"
    )
    data_dir: str | None = option(None, "as in cifar_jax.train")


def write_report(workdirs: Sequence[Path], options: ReportOptions) -> Path:
    """Write the page of one run, or the comparison of several, and print where it is.

    Returns:
        The file.

    Raises:
        UsageError: the options do not go together.
        CheckpointError: a workdir contains no run, or a damaged one.
        DataError: ``options.data`` cannot be read.
        ResourceError: the file cannot be written.
    """
    single = len(workdirs) == 1
    for name in ("data", "data_dir"):
        if getattr(options, name) and not single:
            raise UsageError(
                f"{flag(name)} with {len(workdirs)} runs, whose comparison reads no images",
                fix="leave it out, or give one WORKDIR",
            )
    default = workdirs[0] / "report.html" if single else Path("comparison.html")
    output = Path(options.output) if options.output else default
    if output.exists() and not output.is_file():  # as root, it would replace /dev/null
        raise UsageError(f"--output {output} is not a regular file", fix="give a file name")
    runs = [read_run(workdir) for workdir in workdirs]
    with writing(str(output), "another --output"):
        try_to_write(output.parent)

    # Late imports, so that wrong options are reported before JAX starts.
    print(f"reading {', '.join(map(str, workdirs))} ...", flush=True)
    from cifar_jax.report import html, page

    if single:
        content = page.gather_run(runs[0], data=options.data, data_dir=options.data_dir)
        print("drawing ...", flush=True)
        text = html.render_run(content)
    else:
        text = html.render_comparison(page.gather_comparison(runs))
    with writing(str(output), "another --output"):
        # ASCII, so that neither the locale nor a file name of odd bytes can spoil it.
        write_atomically(output, text.encode("ascii", "xmlcharrefreplace").decode("ascii"))
    print(f"the page is {output}")
    return output


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(
        ReportOptions, prog="python -m cifar_jax.report", description=DESCRIPTION
    )
    parser.add_argument(
        "workdirs",
        metavar="WORKDIR",
        nargs="+",
        help="a run's folder, as cifar_jax.train wrote it",
    )
    given = parser.parse_given(argv)
    workdirs = [Path(workdir) for workdir in given.pop("workdirs")]
    write_report(workdirs, ReportOptions(**given))


if __name__ == "__main__":
    cli.run(main, beside_training=True)
