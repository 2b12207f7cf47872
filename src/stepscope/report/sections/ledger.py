# ruff: noqa: RUF001 (typographic signs are meant)
"""The account of a training: curve, contributions by step, waterfall, classes, prompts, reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from stepscope.reading.ledger import LedgerFolder
from stepscope.reading.rollups import Entries
from stepscope.report import style, text
from stepscope.report.parts import Section
from stepscope.report.style import Figure
from stepscope.report.tables import Cell, Value, interval_cell, percent_cell, table
from stepscope.results.ledger import Account, LedgerSteps
from stepscope.results.rollups import LedgerRollups
from stepscope.stats import Estimate

WAY = "quadrant"
"""How tokens are divided in the figures."""

_MOST_ROWS = 60
_COLORS = (style.GREEN, style.PURPLE, style.OCHRE, style.BROWN, style.MUTED, style.INK)
_PATTERNS = ("", "/", "", "x", ".", "-")
_BESIDE = "momentum before, decay and bonus"

_TABLES = {
    "kind": ("By kind of token", "Kind"),
    "token": ("By token", "Token"),
    "rarity": ("By rarity", "Probability of the token"),
    "position": ("By position", "Position in the response"),
    "pass_rate": ("By pass rate of the prompt", "Share of correct answers"),
}

ARTICLES = {
    "right, likely": "likely tokens of right responses",
    "right, rare": "rare tokens of right responses",
    "wrong, likely": "likely tokens of wrong responses",
    "wrong, rare": "rare tokens of wrong responses",
}


def headline(found: LedgerFolder, account: Account) -> list[str]:
    """The account in plain words."""
    first, last = found.ledger.first_step - 1, found.ledger.last_step
    name, change = text.quantity_name(account.quantity.removesuffix("_fixed_prefix")), account.realised
    moved = "did not change resolvably"
    if change.resolved:
        moved = "fell" if change.value < 0 else "rose"
    where = " at the prefixes of the start" if account.version == "fixed_prefix" else ""
    open_end = "which leaves out 0: the account does not close"
    closes = open_end if account.closing_error.resolved else "0 is in it"
    lines = [
        f"{name.capitalize()}{where} {moved} from {text.bare(account.before)} to "
        f"{text.estimate(account.after)} between steps {first} and {last}: {text.estimate(change)} realised, "
        f"{text.bare(account.predicted)} in the account, closing error {text.bare(account.closing_error)} "
        f"(95 % interval {text.interval(account.closing_error)}, {closes})."
    ]
    classes = found.rollups.of(account.quantity, WAY)
    order = np.argsort(-classes.influence * np.sign(account.tokens.value))
    shares = [
        f"{share_words(classes.share_estimate(int(k), found.ledger.num_folds))} by "
        f"{ARTICLES.get(classes.label[k], classes.label[k])}"
        for k in order
        if classes.share[k] != 0
    ]
    if account.tokens.resolved and shares:
        lines.append(f"Of what the tokens did, {text.joined(shares)}.")
    elif shares:
        lines.append("What the tokens did together is not resolved from zero, so no shares of it are named.")
    rest = [
        f"{words} {text.bare(part)}"
        for words, part in (
            ("moments from before the first step", account.momentum_before),
            ("weight decay", account.decay),
            ("an entropy bonus", account.bonus),
        )
        if part.value
    ]
    if rest:
        lines.append(f"Beside the tokens: {text.joined(rest)} {account.unit}.")
    return lines


def share_words(share: Estimate) -> str:
    """A share with its interval, as a percentage."""
    ends = f"{100 * share.low:.0f} to {100 * share.high:.0f}".replace("-", "−")
    known = f", 95 % interval {ends}" if np.isfinite(share.low) else ""
    unsure = "" if share.resolved or not known else ", not resolved"
    return f"{100 * share.value:.0f} %".replace("-", "−") + f" ({known.removeprefix(', ')}{unsure})" * bool(
        known
    )


def account_section(found: LedgerFolder, entries: Entries, account: Account) -> Section:
    """Curve, contributions and waterfall, with the parts as a table."""
    return Section(
        "account",
        "The account",
        intro="Rare and likely are by log p + H: whether the policy expected a likelier token or a rarer "
        "one. Click a step or a class in the figures to see its tokens below.",
        figures=[_curve(found, entries, account), waterfall(found, account)],
        tables=[_parts(account)],
    )


def _curve(found: LedgerFolder, entries: Entries, account: Account) -> Figure:
    steps = found.steps.where(found.steps.quantity == account.quantity)
    start = found.ledger.first_step - 1
    levels = levels_of(steps, account, start)
    numbers = [start, *steps.step.tolist()]
    predicted = account.before.value + np.concatenate([[0.0], np.cumsum(steps.change)])
    by_class = entries.class_steps(WAY)
    beside = steps.momentum_before + steps.decay + steps.bonus
    traces: list[Any] = [
        style.curve(
            "from the account",
            numbers,
            predicted.tolist(),
            style.look(1),
            "after step %{x}: %{y:.4g} in the account",
            mode="lines",
            yaxis="y",
        ),
        style.curve(
            "on the probe",
            [step for step, _ in levels],
            [level for _, level in levels],
            style.look(0),
            f"after step %{{x}}: %{{y:.4g}} {style.BARS}",
            mode="markers",
            size=4,
            details=[[step, None] for step, _ in levels],
            yaxis="y",
        ),
        style.curve(
            "realised, from more samples",
            [start, int(steps.step[-1])],
            [account.before, account.after],
            style.Look(style.INK, "star"),
            f"after step %{{x}}: %{{y:.4g}} {style.BARS}",
            mode="markers",
            size=10,
            yaxis="y",
        ),
    ]
    stacks = {name: values for name in by_class if (values := by_class[name].to_numpy()).any()}
    if beside.any():
        stacks[_BESIDE] = beside
    for k, (name, values) in enumerate(stacks.items()):
        traces.append(
            go.Bar(
                name=name,
                x=steps.step.tolist(),
                y=style.rounded(values),
                marker={"color": _COLORS[k], "pattern": {"shape": _PATTERNS[k], "size": 5}},
                customdata=[[step, name] for step in steps.step.tolist()],
                hovertemplate=f"batch of step %{{x}}, {name}: %{{y:.3g}}<extra></extra>",
                yaxis="y2",
                xaxis="x",
            )
        )
    end = int(steps.step[-1])
    gap = style.silent([end, end], [predicted[-1], account.after.value], style.BROWN, width=3, yaxis="y")
    return style.figure(
        "curve",
        f"{text.quantity_name(account.quantity).capitalize()}, and what each batch did to it",
        "Above: the quantity on the probe at every place where it was looked at, and what the account adds "
        f"up to; the bar at the end is the closing error, {text.estimate(account.closing_error)}. Below: "
        "what the tokens of each step's batch did over the rest of the training, by sign of the advantage "
        "and probability; the bars of all steps add up to the predicted change.",
        [*traces, gap],
        height=560,
        barmode="relative",
        bargap=0.15,
        xaxis=style.axis("optimizer step", anchor="y2"),
        yaxis=style.axis(account.unit, domain=[0.52, 1]),
        yaxis2=style.axis(f"over the rest, {account.unit}", domain=[0, 0.44], zeroline=True),
    )


def levels_of(steps: LedgerSteps, account: Account, start: int) -> list[tuple[int, Estimate]]:
    """The quantity after each step where it was looked at, and before the first."""
    found = [(start, account.before)]
    for step, level, stderr in zip(steps.step, steps.level, steps.level_stderr, strict=True):
        if np.isfinite(level):
            estimate = Estimate(float(level), float(stderr), account.before.n, account.unit, "on the probe")
            found.append((int(step), estimate))
    return found


def contributions(found: LedgerFolder, account: Account) -> list[tuple[str, Estimate]]:
    """All between the quantity before and after: classes of tokens, the rest, and the closing error."""
    classes = found.rollups.of(account.quantity, WAY)
    parts = [
        (str(label), classes.estimate(k, account.unit, found.ledger.num_folds))
        for k, label in enumerate(classes.label)
    ]
    before = [
        ("momentum before", account.momentum_before),
        ("decay", account.decay),
        ("bonus", account.bonus),
    ]
    return [
        *(part for part in before if part[1].value),
        *(part for part in parts if part[1].value),
        ("closing error", account.closing_error),
    ]


def waterfall(found: LedgerFolder, account: Account) -> Figure:
    """From the quantity before the first step to that after the last."""
    parts = contributions(found, account)
    names, bases, level = [], [], account.before.value
    for name, part in parts:
        names.append(name if part.resolved else f"{name}<br>not resolved")
        bases.append(level)
        level += part.value
    ends = [f"step {found.ledger.first_step - 1}", f"step {found.ledger.last_step}"]
    colors = [
        style.MUTED if name == "closing error" else style.BLUE if part.value < 0 else style.VERMILLION
        for name, part in parts
    ]
    bar = go.Bar(
        x=names,
        y=style.rounded(part.value for _, part in parts),
        base=style.rounded(bases),
        marker={
            "color": colors,
            "pattern": {"shape": ["" if part.resolved else "/" for _, part in parts], "size": 5},
        },
        error_y=style.error_bars((part for _, part in parts), style.INK),
        customdata=[[None, name] for name, _ in parts],
        text=[text.bare(part) for _, part in parts],
        hovertemplate="%{x}: %{text}<extra></extra>",
        textposition="none",
        showlegend=False,
    )
    levels = style.curve(
        "quantity",
        ends,
        [account.before, account.after],
        style.Look(style.INK, "star"),
        f"%{{x}}: %{{y:.4g}} {style.BARS}",
        mode="markers",
        size=11,
        showlegend=False,
    )
    labels = [
        style.note(text.bare(part).replace(" ± ", "<br>± "), name, 1.0, yanchor="bottom", font={"size": 11})
        for name, (_, part) in zip(names, parts, strict=True)
    ]
    return style.figure(
        "waterfall",
        "From start to end, by class of token",
        f"In {account.unit}; bars are 95 % intervals over probe prompts. Hatched: not resolved from zero. "
        "Blue lowers, orange raises; grey is what is in no part.",
        [bar, levels],
        height=400,
        annotations=labels,
        xaxis={"type": "category", "categoryorder": "array", "categoryarray": [ends[0], *names, ends[1]]},
        yaxis=style.axis(account.unit),
    )


def _parts(account: Account) -> Any:
    rows = [
        ("before", account.before),
        ("all tokens", account.tokens),
        ("moments before the first step", account.momentum_before),
        ("weight decay", account.decay),
        ("entropy bonus", account.bonus),
        ("predicted change", account.predicted),
        ("realised change", account.realised),
        ("closing error", account.closing_error),
        ("interpolation between places", account.interpolation),
        ("after", account.after),
    ]
    return table(
        "parts",
        "The account in numbers",
        f"In {account.unit}; ± is one standard error, clustered by probe prompts.",
        [
            {"Part": name, "Value": part, "95 % interval": interval_cell(part), "How": part.method}
            for name, part in rows
        ],
    )


def classes_section(found: LedgerFolder, account: Account) -> Section:
    """Sums by kind, token, rarity, position and pass rate."""
    tables = [_class_table(found, account, WAY, "By sign of the advantage and probability", "Class")]
    tables += [_class_table(found, account, way, title, name) for way, (title, name) in _TABLES.items()]
    return Section(
        "classes",
        "Which tokens did it",
        intro="Sums over all tokens of a class. The first interval is about the batches as they were; the "
        "second takes the training's prompts as a sample, too.",
        tables=tables,
    )


def prompts_section(found: LedgerFolder, entries: Entries, account: Account) -> Section:
    """The prompts that moved the quantity most."""
    rates = entries.table.drop_duplicates(["step", "sequence_id"]).groupby("prompt").correct.mean()
    return Section(
        "prompts",
        "Prompts",
        tables=[_class_table(found, account, "prompt", "By prompt", "Prompt", {"Pass rate": rates})],
    )


def _class_table(
    found: LedgerFolder,
    account: Account,
    way: str,
    title: str,
    name: str,
    more: dict[str, Any] | None = None,
) -> Any:
    classes = found.rollups.of(account.quantity, way)
    count = len(classes)
    order: Sequence[int] = range(count)
    if way in ("token", "prompt"):
        order = np.argsort(-np.abs(classes.influence), kind="stable")[:_MOST_ROWS].tolist()
    left = f" The {_MOST_ROWS} largest of {count:,}; all are in ledger_rollups.parquet." * (
        count > _MOST_ROWS
    )
    return table(
        f"by-{way}",
        title,
        f"Sums of entries in {account.unit} over {found.ledger.num_folds} folds of the probe; shares are of "
        f"what all tokens did.{left}",
        [_class_row(found, account, classes, k, name, more or {}) for k in order],
    )


def _class_row(
    found: LedgerFolder, account: Account, classes: LedgerRollups, k: int, name: str, more: dict[str, Any]
) -> dict[str, Value]:
    label, folds = str(classes.label[k]), found.ledger.num_folds
    whole = classes.estimate(k, account.unit, folds)
    share = classes.share_estimate(k, folds)
    wide = f"{text.number(classes.low_over_prompts[k])} to {text.number(classes.high_over_prompts[k])}"
    ends = f"{text.percent(share.low)} to {text.percent(share.high)}" if np.isfinite(share.low) else ""
    return {
        name: Cell(shown=label.replace("\n", "⏎"), raw=label),
        **{title: percent_cell(float(values.get(label, np.nan))) for title, values in more.items()},
        "Tokens": int(classes.tokens[k]),
        "Influence": whole,
        "95 % interval": interval_cell(whole),
        "Over training prompts": wide if np.isfinite(classes.low_over_prompts[k]) else "–",
        "Share": Cell(text.percent(share.value), share.value, note=ends),
    }


def plane_section(found: LedgerFolder, entries: Entries) -> Section | None:
    """Reward against entropy, a point for each place; None where no reward is known."""
    accounts = {account.quantity: account for account in found.ledger.accounts}
    if "entropy" not in accounts:
        return None
    start = found.ledger.first_step - 1
    levels = {
        name: dict(levels_of(found.steps.where(found.steps.quantity == name), accounts[name], start))
        for name in ("entropy", "reward")
        if name in accounts
    }
    rewards = levels.get("reward") or {step - 1: reward for step, reward in entries.rewards().items()}
    both = [step for step in levels["entropy"] if step in rewards and np.isfinite(rewards[step].value)]
    if not both:
        return None
    how = "of the probe" if "reward" in levels else "of the batch that the policy there was trained on next"
    points = style.curve(
        "steps",
        [levels["entropy"][step] for step in both],
        [rewards[step] for step in both],
        style.look(0),
        "after step %{text}: entropy %{x:.4g}, reward %{y:.3g}",
        mode="lines+markers+text",
        text=[str(step) if step in (both[0], both[-1]) else "" for step in both],
        textposition="top center",
        details=[[step, None] for step in both],
        width=0.8,
        marker={
            "color": both,
            "colorscale": "Viridis",
            "showscale": True,
            "colorbar": {"title": {"text": "step"}},
        },
        showlegend=False,
    )
    return Section(
        "plane",
        "Reward and entropy",
        figures=[
            style.figure(
                "plane",
                "Reward against entropy along the training",
                f"A point for each place where the entropy was looked at; reward {how}. Bars are 95 % "
                "intervals.",
                [points],
                height=420,
                xaxis=style.axis("entropy, nats/token", autorange="reversed"),
                yaxis=style.axis("mean reward"),
            )
        ],
    )
