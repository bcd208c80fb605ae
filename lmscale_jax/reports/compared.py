"""The report of one run, and that of pairs of runs that differ in one switch."""

from pathlib import Path

from lmscale_jax.config.keys import get
from lmscale_jax.config.resolve import differences
from lmscale_jax.reports import layers, pairs, plots
from lmscale_jax.reports.page import Page


def of_run(run: pairs.Run, folder: Path) -> Path:
    """Figures and numbers of one run; what was not evaluated is left out, and said."""
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(run.record["name"])
    _warn(page, [run])
    final = run.record.get("final") or {}
    rows = [(k, v) for k, v in (final | run.scores).items() if isinstance(v, (int, float, str))]
    page.table(["", "value"], [list(row) for row in rows])
    if not run.scores:
        page.say("Not evaluated: python -m lmscale_jax.evaluate makes eval.json.", "warn")
    page.figures(plots.draw(run.path, folder))
    page.figures(layers.profiles({run.record["name"]: [run]}, folder))
    page.figures(layers.over_training(run, folder, ""))
    return page.write(folder)


def of_pairs(found: list[pairs.Pair], switch: str, folder: Path) -> Path:
    """What the switch did: the difference with its interval, profiles by layer, scaling."""
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(f"{switch}: baseline and variant")
    arms = {"baseline": [b for b, _ in found], "variant": [v for _, v in found]}
    _warn(page, arms["baseline"] + arms["variant"])
    _differences(page, found, switch)
    for size, several in _by_size(found).items():
        page.say(f"{size} parameters: {sentence(pairs.difference(several))}")
    head = ["baseline", "variant", "parameters", "seed", "data.seed", "ppl baseline",
            "ppl variant", "difference, nats"]  # fmt: skip
    rows = [
        [str(b.path), str(v.path), b.record["counts"]["total"], *b.seeds, b.scores["perplexity"],
         v.scores["perplexity"], v.scores["val_loss"] - b.scores["val_loss"]]
        for b, v in found
    ]  # fmt: skip
    page.table(head, rows, folder / "scaling_table.csv")
    page.figures([layers.losses(arms, folder), layers.scaling(arms, folder)])
    page.head("By layer")
    page.figures(layers.profiles(arms, folder))
    page.head("Over training, first pair")
    for run, name in zip(found[0], ("baseline", "variant"), strict=True):
        page.figures(layers.over_training(run, folder, f"{name}_"))
    return page.write(folder)


def sentence(found: dict) -> str:
    """The difference of `pairs.difference` in words."""
    said = f"variant minus baseline {found['mean']:+.4f} nats a token over {found['n']} pair(s)"
    if found["low"] is None:
        return f"{said}; one pair has no interval"
    within = found["low"] <= 0 <= found["high"]
    verdict = "no detectable difference" if within else "a difference"
    return (
        f"{said}, 95 % interval {found['low']:+.4f} to {found['high']:+.4f}, "
        f"p = {found['p']:.2g}: {verdict}"
    )


def _by_size(found: list[pairs.Pair]) -> dict[str, list[pairs.Pair]]:
    sizes = {}
    for pair in found:
        sizes.setdefault(f"{pair.baseline.record['counts']['total']:,}", []).append(pair)
    return sizes


def _differences(page: Page, found: list[pairs.Pair], switch: str) -> None:
    one, two = (run.record["config"] for run in found[0])
    changed = differences(one, two, identity_only=True)
    page.table(
        ["what differs", "baseline", "variant"],
        [[p, repr(get(one, p)), repr(get(two, p))] for p in changed],
    )
    other = [p for p in changed if p != switch and not p.startswith(f"{switch}.")]
    if other:
        page.say(f"More than {switch} differs: {', '.join(other)}. Compared on request.", "warn")


def _warn(page: Page, runs: list[pairs.Run]) -> None:
    for run in runs:
        if run.record["status"] != "finished" or not run.scores.get("complete", True):
            page.say(
                f"{run.path} is {run.record['status']}; its evaluation is of step "
                f"{run.scores.get('step')}.",
                "warn",
            )
