r"""Every claim of the tutorial as an experiment: what does it say, what is found, does it hold?

    python experiments/claims.py --quick --output quick.json       # minutes, on built-in data
    python experiments/claims.py --only 5 11                       # measures these two again
    python experiments/claims.py --data cifar10.tar.gz             # all: three and a half hours

Needs the test extra, which brings torch. Writes a JSON, a page (experiments/README.md, or beside
another --output) and the figures. Each result is saved as soon as it is measured. What was measured
with this code and data is not measured again unless --only names it, but it is judged again.
Trained networks are kept under runs/claims for all claims; delete that folder to train them again.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from cifar_jax import cli
from cifar_jax.data.sources import NAMES, check_source
from cifar_jax.errors import UsageError
from cifar_jax.system.files import write_atomically
from claims import CLAIMS, markdown
from claims.claim import CAVEAT, FAILS, HOLDS, Claim, Values, from_json, to_json
from claims.code import code_of
from claims.study import Study
from machine import environment

ROOT = Path(__file__).resolve().parents[1]
VERDICTS = (HOLDS, CAVEAT, FAILS)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")
DEFAULT_OUTPUT = ROOT / "experiments" / "results" / "claims.json"


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="measure these again")
    parser.add_argument(
        "--data", help="as in cifar_jax.train [default shapes if --quick, else auto]"
    )
    parser.add_argument("--data-dir", help="as in cifar_jax.train")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="does all of it run? on little data: ignore the verdicts",
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, help="the JSON to write [%(default)s]"
    )
    arguments = parser.parse_args()
    output: Path = arguments.output
    if arguments.quick and output == DEFAULT_OUTPUT:
        raise UsageError(
            "--quick would overwrite the measured results with meaningless ones",
            fix="give another --output",
        )
    chosen = choose(arguments.only)
    source = arguments.data or ("shapes" if arguments.quick else "auto")
    check_source(source)
    if arguments.quick:  # most of its time is compiling; its few steps may be slow
        jax.config.update("jax_disable_most_optimizations", True)
    output.parent.mkdir(parents=True, exist_ok=True)
    results = read_results(output)
    study = Study(
        source,
        arguments.data_dir,
        arguments.quick,
        figures=output.with_suffix(""),
        runs=output.with_suffix("") / "runs" if arguments.quick else ROOT / "runs" / "claims",
    )
    for claim in chosen:
        known = results.get(claim.question)
        state = {"code": code_of(claim.measure), "data": study.dataset.digest, "quick": study.quick}
        if not arguments.only and known and state.items() <= known.items():
            known |= judged(claim, known["value"])
            continue
        results[claim.question] = {**measure(claim, study), **state}
        write(output, results)
        print(f"  {results[claim.question]['verdict']}: {results[claim.question]['finding']}")
    write(output, results)
    print(f"{len(results)} claim(s) in {output} and {page_path(output)}")


def choose(only: list[int] | None) -> list[Claim]:
    """The claims of the questions ``only``, or all, by question."""
    claims = {claim.question: claim for claim in CLAIMS}
    missing = sorted(set(only or ()) - set(claims))
    if missing:
        raise UsageError(
            f"--only {missing[0]}: no claim has that number",
            fix=f"give questions from {min(claims)} to {max(claims)}",
        )
    return [claims[question] for question in sorted(only or claims)]


def measure(claim: Claim, study: Study) -> dict[str, Any]:
    """The row of ``claim``."""
    print(f"question {claim.question}: {claim.says} ...", flush=True)
    started = time.perf_counter()
    measured = claim.measure(study)
    seconds = time.perf_counter() - started
    options = f" --data {Path(study.source).name}" if study.source not in NAMES else ""
    options += " --quick" if study.quick else ""
    return {
        **judged(claim, measured.values),
        "value": measured.values,
        "n": measured.n,
        "seconds": round(seconds, 1),
        **environment(*PACKAGES),
        "data_name": study.dataset.name,
        "command": f"python experiments/claims.py --only {claim.question}{options}",
        "figure": measured.figure and f"{study.figures.name}/{measured.figure}",
    }


def judged(claim: Claim, values: Values) -> dict[str, Any]:
    """What a row says that follows from ``values`` and the code as it is now."""
    verdict = claim.judge(values)
    return {
        "question": claim.question,
        "claim": claim.says,
        "method": inspect.cleandoc(claim.measure.__doc__ or ""),
        "verdict": verdict.verdict,
        "finding": verdict.finding,
        "evidence": verdict.evidence,
        "source": f"{Path(inspect.getfile(claim.measure)).relative_to(ROOT)}"
        f"#L{inspect.getsourcelines(claim.measure)[1]}",
    }


def read_results(path: Path) -> dict[int, dict[str, Any]]:
    """The rows in ``path``, by question; none where there is no such file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["claims"]
        page(rows, path)  # a KeyError where rows of an earlier version lack something
        return {row["question"]: {**row, "value": from_json(row["value"])} for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"--output {path} is there already, and holds no claims: {error!r}",
            fix="give another --output",
        ) from error


def write(output: Path, results: dict[int, dict[str, Any]]) -> None:
    """The JSON, and the page beside it."""
    rows = [results[question] for question in sorted(results)]
    stored = [{**row, "value": to_json(row["value"])} for row in rows]
    write_atomically(
        output, json.dumps({"claims": stored}, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    )
    write_atomically(page_path(output), page(rows, output))


def page_path(output: Path) -> Path:
    """Where the page goes: experiments/README.md for the committed results, else beside them."""
    return (
        ROOT / "experiments" / "README.md"
        if output == DEFAULT_OUTPUT
        else output.with_suffix(".md")
    )


def page(rows: list[dict[str, Any]], output: Path) -> str:
    """All rows as Markdown: a table of what was found, then each claim with its evidence."""
    plural = ("hold", "hold with a caveat", "do not hold here")
    counts = ", ".join(
        f"{sum(row['verdict'] == verdict for row in rows)} {words}"
        for verdict, words in zip(VERDICTS, plural, strict=True)
    )
    dates = [row["date"] for row in rows]
    summary = [
        (
            f"[{row['question']}](#question-{row['question']})",
            row["claim"],
            row["verdict"],
            row["finding"],
        )
        for row in rows
    ]
    parts = [
        "# What the tutorial claims, measured",
        f"Each claim was tested by an experiment. Of {len(rows)} claims, {counts}. "
        "This page is written by `python experiments/claims.py`.",
        f"Measured on {of_all(row['data_name'] for row in rows)}, "
        f"{' to '.join(sorted({min(dates), max(dates)}))}, with "
        f"jax {of_all(row['versions']['jax'] for row in rows)}, "
        f"torch {of_all(row['versions']['torch'] for row in rows)} and "
        f"Python {of_all(row['versions']['python'] for row in rows)}; the machine stands with each "
        "claim. `cifar10.tar.gz` is a JPEG copy of CIFAR-10.",
        "In what follows, 77.4 ± 0.2 % is a mean and standard deviation over n repetitions (seeds, "
        "rounds or resamplings, by the claim), and a difference, such as +2.5 ± 2.3 points, comes "
        "with half of its 95 % interval.",
        markdown.table(("", "claim", "verdict", "finding"), summary),
        *(section(row, output) for row in rows),
    ]
    return "\n\n".join(parts) + "\n"


def section(row: dict[str, Any], output: Path) -> str:
    """One claim with its verdict, evidence, figure, method and command."""
    folder = page_path(output).parent
    question, verdict = row["question"], row["verdict"]
    parts = [
        f"### Question {question}",
        f"> {markdown.escaped(row['claim'])}",
        f"**{verdict.capitalize()}.** {markdown.escaped(row['finding'])}",
        row["evidence"],
    ]
    if row["figure"]:
        figure = os.path.relpath(output.parent / row["figure"], folder)
        parts.append(f"![Figure of question {question}]({figure})")
    code = os.path.relpath(ROOT / row["source"], folder)
    parts += [
        "<details><summary>How it was tested</summary>",
        row["method"],
        f"n = {row['n']}; {row['date']}; {row['machine']}. [The code]({code}); to run it again: "
        f"`{row['command']}`",
        "</details>",
    ]
    return "\n\n".join(parts)


def of_all(values: Iterable[str]) -> str:
    """The different ones of ``values``."""
    return " or ".join(sorted(set(values)))


if __name__ == "__main__":
    cli.run(main)
