# ruff: noqa: RUF001 (typographic signs are meant)
"""The entropy law on the page: points and curves of one run or of several, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stepscope.report import style, text
from stepscope.report.tables import Table, table
from stepscope.results.entropy_law import EntropyLaw
from stepscope.stats import Estimate


def law_figure(laws: Mapping[str, EntropyLaw]) -> style.Figure:
    """Performance against entropy with the fitted law; one colour and mark per run."""
    traces = []
    for number, (name, law) in enumerate(laws.items()):
        own = style.look(number)
        H = np.linspace(0.0, 1.05 * max(law.entropy), 60)
        performance = law.b.value - law.a.value * np.exp(H)
        traces += [
            style.curve(
                name or "checkpoints",
                _points(law.entropy, law.entropy_stderr, law.num_prompts),
                _points(law.performance, law.performance_stderr, law.num_prompts),
                own,
                f"{text.plotly_text(name)} step %{{customdata}}<br>H = %{{x:.3g}} nats/token, "
                "pass@1 = %{y:.3g}",
                mode="markers",
                details=law.steps,
            ),
            style.silent(
                H,
                performance,
                own.color,
                width=1.3,
                line={"dash": own.dash},
                name=f"{name}: law" if name else "−a exp(H) + b",
                showlegend=None,
            ),
        ]
    caption = (
        "Performance against entropy over the checkpoints of a run, and the law R = −a exp(H) + b fitted "
        "with errors in both. Where a curve meets H = 0 is the ceiling b − a. Error bars: 95 % intervals, "
        "clustered by prompt; those of different checkpoints are correlated, for they share their prompts."
    )
    return style.figure(
        "entropy-law",
        "Entropy law",
        caption,
        traces,
        height=340,
        wide=len(laws) > 1,
        xaxis=style.axis("entropy H, nats/token", rangemode="tozero"),
        yaxis=style.axis("pass@1"),
    )


def law_sentences(law: EntropyLaw) -> list[str]:
    """The fit, its ceiling and the prediction of late points in words."""
    doubt = "" if law.ceiling.reliable else f" Flagged unreliable: {law.ceiling.reason}."
    sentences = [
        f"Entropy law R = −a exp(H) + b over {len(law.steps)} checkpoints: a = {text.bare(law.a)}, b = "
        f"{text.bare(law.b)}; ceiling at zero entropy {text.bare(law.ceiling)}.{doubt}"
    ]
    if late := law.prediction:
        doubt = "" if late.rmse.reliable else f" ({late.rmse.reason})"
        sentences.append(
            f"The law of the first {late.fitted} checkpoints predicts the others with a root mean "
            f"square error of {text.bare(late.rmse.scaled(100))} points of pass@1{doubt}; their sampling "
            f"errors alone would give {text.number(100 * late.noise, 2)}. "
            "Published: 0.9 (mathematics) and 1.2 (code), Cui et al. 2025."
        )
    return sentences


def law_table(laws: Mapping[str, EntropyLaw]) -> Table:
    """The fits of several runs side by side."""
    return table(
        "laws",
        "Fits",
        "Entropy law R = −a exp(H) + b of every run, ± one standard error; scatter: spread of pass@1 about "
        "the law beyond the sampling errors; last: late checkpoints predicted from the first ones. ⚠ marks "
        "unreliable ones.",
        [
            {
                "Run": name,
                "a": law.a,
                "b": law.b,
                "Ceiling b − a": law.ceiling,
                "Scatter about the law": law.scatter,
                "RMSE of late points": law.prediction.rmse if law.prediction else None,
                "Checkpoints": len(law.steps),
            }
            for name, law in laws.items()
        ],
    )


def _points(values: Sequence[float], errors: Sequence[float], prompts: int) -> list[Estimate]:
    return [Estimate(value, error, prompts, "", "") for value, error in zip(values, errors, strict=True)]
