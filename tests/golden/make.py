"""Takes the numbers anew: python -m tests.golden.make [runs] [ladders] [fits]

Only where a number is meant to change: the difference then shows which, and the commit says why.
"""

import csv
import json
import sys

from synthetic import two_arms

from tests.golden import cases, measure


def lines(value, depth: int = 0) -> str:
    """Returns JSON in which everything that fits on a line of 100 stands on one."""
    short, inner = json.dumps(value, ensure_ascii=False), "\n" + " " * (depth + 1)
    if len(short) + depth <= 100 or not isinstance(value, dict | list):
        return short
    if isinstance(value, dict):
        parts = [f"{json.dumps(k)}: {lines(v, depth + 1)}" for k, v in value.items()]
    else:
        parts = [lines(v, depth + 1) for v in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return opening + inner + f",{inner}".join(parts) + "\n" + " " * depth + closing


def write(name: str, names, measured) -> None:
    values = {each: measured(each) for each in names}
    whole = {"taken_on": measure.taken_on(), "values": values}
    (measure.HERE / f"{name}.json").write_text(lines(whole) + "\n", encoding="utf-8")


def write_arms() -> None:
    """Writes the table of two arms. Committed, since a generator may draw otherwise one day."""
    columns = two_arms(s=0.08, tau=0.2, seeds=2)
    with open(measure.HERE / "arms.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def main() -> None:
    asked = sys.argv[1:] or ["runs", "ladders", "fits"]
    if "runs" in asked:
        with measure.place():
            write("runs", cases.CHANGES, measure.run)
    if "ladders" in asked:
        write("ladders", measure.LADDERS, measure.ladder)
    if "fits" in asked:
        if not (measure.HERE / "arms.csv").exists():
            write_arms()
        write("fits", measure.FITS, lambda name: measure.FITS[name]())


if __name__ == "__main__":
    main()
