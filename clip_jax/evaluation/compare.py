"""Compare models by what evaluate.py or CLIP_benchmark wrote of them.

python -m clip_jax.evaluation.compare A.json B.json --report comparison.html
"""

import argparse
from collections.abc import Sequence

from clip_jax import cli
from clip_jax.evaluation.comparison import compare, table


def main(argv: Sequence[str]) -> None:
    """Print the models side by side, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m clip_jax.evaluation.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE.json", help="results; those of a model can be in several")
    parser.add_argument("--report", metavar="FILE.html", help="write a page here")
    flags = parser.parse_args(argv)
    comparison = compare(flags.files)
    if flags.report:
        cli.make_parent(flags.report)
    print(table(comparison))
    for note in comparison.notes:
        print(f"note: {note}")
    if flags.report:
        from clip_jax.reports.comparison import write_comparison

        write_comparison(flags.report, comparison)
        print(f"report: {flags.report}")


if __name__ == "__main__":
    cli.run(main)
