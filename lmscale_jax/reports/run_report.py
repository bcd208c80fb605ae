"""Writes the page of one run, and the page of pairs of runs that differ in one switch."""

from pathlib import Path

from lmscale_jax.config.keys import get
from lmscale_jax.config.resolve import differences
from lmscale_jax.reports import pairs, plots
from lmscale_jax.reports.page import Page


def report_run(run: pairs.EvaluatedRun, folder: Path) -> Path:
    """Writes figures and numbers of one run, evaluated or not; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(run.record["name"])
    _warn_unfinished(page, [run])
    final = run.record.get("final") or {}
    rows = [(k, v) for k, v in (final | run.scores).items() if isinstance(v, (int, float, str))]
    page.table(["", "value"], [list(row) for row in rows])
    if "val_loss" in final and final["val_loss"] is None and "imported_from" in run.record:
        page.say(
            f"Imported from {run.record['imported_from']} without data and not evaluated; import "
            "it with --config=C, whose held-out tokens it is then measured on.",
            "warn",
        )
    elif not run.scores:
        page.say(
            f"No eval.json; run python -m lmscale_jax.evaluate --workdir={run.path}.",
            "warn",
        )
    page.figures(plots.draw_run(run.path, folder))
    page.figures(plots.plot_profiles({run.record["name"]: [run]}, folder))
    page.figures(plots.plot_over_training(run, folder, ""))
    return page.write(folder)


def report_pairs(matched: list[pairs.RunPair], switch: str, folder: Path) -> Path:
    """Writes the effect of a switch: the paired difference, scaling and profiles by layer.

    Args:
      matched: of `pairs.match_runs`; the arms, sizes and seeds are theirs.
      switch: the key, or the group of keys, that is studied.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(f"{switch}: baseline and variant")
    arms = {"baseline": [b for b, _ in matched], "variant": [v for _, v in matched]}
    _warn_unfinished(page, arms["baseline"] + arms["variant"])
    _add_config_differences(page, matched, switch)
    for size, of_size in _pairs_by_size(matched).items():
        page.say(f"{size} parameters: {difference_sentence(pairs.paired_difference(of_size))}")
    head = ["baseline", "variant", "parameters", "seed", "data.seed", "ppl baseline",
            "ppl variant", "difference, nats"]  # fmt: skip
    rows = [
        [str(b.path), str(v.path), b.record["counts"]["total"], *b.seeds, b.scores["perplexity"],
         v.scores["perplexity"], v.scores["val_loss"] - b.scores["val_loss"]]
        for b, v in matched
    ]  # fmt: skip
    page.table(head, rows, folder / "scaling_table.csv")
    page.figures([plots.plot_losses(arms, folder), plots.plot_perplexity(arms, folder)])
    page.head("By layer")
    page.figures(plots.plot_profiles(arms, folder))
    page.head("Over training, first pair")
    for run, name in zip(matched[0], ("baseline", "variant"), strict=True):
        page.figures(plots.plot_over_training(run, folder, f"{name}_"))
    return page.write(folder)


def difference_sentence(difference: dict) -> str:
    """Puts the result of `pairs.paired_difference` in words."""
    mean, low, high = (difference[name] for name in ("mean", "low", "high"))
    text = f"variant minus baseline {mean:+.4f} nats per token over {difference['n']} pair(s)"
    if low is None:
        return f"{text}; one pair has no interval"
    verdict = "no detectable difference" if low <= 0 <= high else "a difference"
    interval = f"95 % interval {low:+.4f} to {high:+.4f}"
    return f"{text}, {interval}, p = {difference['p']:.2g}: {verdict}"


def _pairs_by_size(matched: list[pairs.RunPair]) -> dict[str, list[pairs.RunPair]]:
    sizes = {}
    for pair in matched:
        sizes.setdefault(f"{pair.baseline.record['counts']['total']:,}", []).append(pair)
    return sizes


def _add_config_differences(page: Page, matched: list[pairs.RunPair], switch: str) -> None:
    baseline, variant = (run.record["config"] for run in matched[0])
    changed = differences(baseline, variant, identity_only=True)
    page.table(
        ["key", "baseline", "variant"],
        [[p, repr(get(baseline, p)), repr(get(variant, p))] for p in changed],
    )
    others = pairs.keys_outside(changed, switch)
    if others:
        page.say(f"More than {switch} differs: {', '.join(others)} (--allow_differences).", "warn")


def _warn_unfinished(page: Page, runs: list[pairs.EvaluatedRun]) -> None:
    for run in runs:
        if run.record["status"] != "finished" or not run.scores.get("complete", True):
            page.say(
                f"{run.path} is {run.record['status']}; its evaluation is of step "
                f"{run.scores.get('step')}.",
                "warn",
            )
