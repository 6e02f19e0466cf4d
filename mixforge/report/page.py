"""A campaign as one HTML page that needs no network: plotly and the data stand in it once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files

from plotly.offline import get_plotlyjs

from mixforge.db.values import State
from mixforge.evaluator.evaluation import FIGURES, Evaluation, Outcome
from mixforge.report.findings import Candidate, Findings
from mixforge.report.quantity import show
from mixforge.report.strip import legend, strip
from mixforge.search_space.count import counted

MOST_POINTS = 1_500
"""Of candidates off the front and no baseline. More are thinned evenly, and the page says so."""
MOST_CURVES = 16
MOST_MEMBERS = 60

Json = Mapping[str, object]


def page(found: Findings) -> str:
    """The page's text."""
    points = _thinned(found)
    data = {
        "figures": {
            name: {"label": f.label, "unit": f.unit, "better": f.better} for name, f in FIGURES.items()
        },
        "shown": _figure_names(found),
        "points": [_point(candidate) for candidate in points],
        "growth": [_growth(growth.arm, growth.volumes) for growth in found.growth],
        "baselineVolume": found.baseline_volume,
        "tasks": _tasks(found),
        "curves": list(_curves(found)),
    }
    return _fill(
        title=escape(f"{found.campaign.name}: front"),
        css=_read("page.css"),
        body="\n".join(_body(found, shown=len(points))),
        # A script's text ends at the first "</", whatever stands around it.
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        plotly=get_plotlyjs(),
        js=_read("page.js"),
    )


def _read(name: str) -> str:
    return files("mixforge.report").joinpath(name).read_text(encoding="utf-8")


def _fill(**parts: str) -> str:
    """Cut at the template's marks first, so that a mark inside a part is only text."""
    pieces = _read("page.html").split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def _thinned(found: Findings) -> list[Candidate]:
    """Front, baselines and random arm, and as many of the others, evenly, as the page can carry."""
    dull = [each for each in found.candidates if not each.on_front and each.arm == "search"]
    every = -(-len(dull) // MOST_POINTS)
    dropped = {each.trial.id for number, each in enumerate(dull) if every > 1 and number % every}
    return [each for each in found.candidates if each.trial.id not in dropped]


def _figure_names(found: Findings) -> list[str]:
    """Objectives first, then every other figure that some candidate has."""
    others = [name for name in FIGURES if any(name in each.trial.figures for each in found.candidates)]
    return [*found.objectives, *(name for name in others if name not in found.objectives)]


def _point(candidate: Candidate) -> Json:
    trial = candidate.trial
    return {
        "label": candidate.label,
        "number": trial.number,
        "architecture": escape(trial.text),
        "role": _role(candidate),
        "front": candidate.on_front,
        "values": dict(trial.figures),
        "spreads": dict(trial.spreads),
        "text": {name: show(name, value, trial.spreads.get(name)) for name, value in trial.figures.items()},
    }


def _role(candidate: Candidate) -> str:
    return "front" if candidate.on_front and candidate.arm != "baseline" else candidate.arm


def _growth(arm: str, volumes: Sequence[float]) -> Json:
    """Only the trials at which the volume grew, and the last."""
    last = len(volumes) - 1
    kept = [n for n, volume in enumerate(volumes) if n in (0, last) or volume > volumes[n - 1]]
    return {"arm": arm, "trials": [n + 1 for n in kept], "volumes": [volumes[n] for n in kept]}


def _drawn(found: Findings) -> list[Candidate]:
    """Whose learning curves are drawn: the baselines and the first of the front."""
    members = [each for each in found.front if each.arm != "baseline"][:MOST_CURVES]
    return [each for each in (*found.baselines, *members) if each.trial.digest in found.evaluations]


def _tasks(found: Findings) -> list[str]:
    curves = (curve for each in _drawn(found) for curve in found.evaluations[each.trial.digest].curves)
    return list(dict.fromkeys(curve.task for curve in curves))


def _curves(found: Findings) -> Iterator[Json]:
    for candidate in _drawn(found):
        for curve in found.evaluations[candidate.trial.digest].curves:
            yield {
                "task": curve.task,
                "role": "baseline" if candidate.arm == "baseline" else "front",
                "label": candidate.label,
                "steps": curve.steps,
                "loss": curve.loss,
            }


def _body(found: Findings, shown: int) -> Iterator[str]:
    yield from _head(found)
    yield from _front(found, shown)
    yield "<h2>Hypervolume</h2>"
    yield (
        "<p>How much of the space of figures an arm has conquered, by the number of its own trials. The"
        " random arm draws from the same space without looking at results: between the lines lies the"
        " search's gain.</p>"
    )
    yield '<div id="growth" class="plot low"></div>'
    tasks = _tasks(found)
    if tasks:
        yield "<h2>Learning curves</h2>"
        yield f"<p>Baselines and the first {MOST_CURVES} of the front. Touch a line for its name.</p>"
        yield '<div class="pair">'
        for number, task in enumerate(tasks):
            yield f'<figure style="margin:0"><figcaption>{escape(task)}</figcaption>'
            yield f'<div id="curve{number}" class="plot low"></div></figure>'
        yield "</div>"
    yield from _members(found)


def _head(found: Findings) -> Iterator[str]:
    status, place = found.status, found.environment
    yield f"<h1>{escape(found.campaign.name)}</h1>"
    where = f"{place.device}, {counted(place.threads, 'thread')}" if place else "device not recorded"
    versions = f", torch {place.torch}, mixforge {place.mixforge}" if place else ""
    commit = f", commit {place.commit[:12]}" if place and place.commit else ""
    begun = f"Begun {found.campaign.created_at:%Y-%m-%d %H:%M} UTC"
    yield f'<p class="quiet">{escape(where + versions + commit)}. {begun}.</p>'
    counts: dict[str, int | str] = {
        "trials finished": status.trials(state=State.finished),
        "architectures measured": len(found.candidates),
        "on the front": len(found.front),
        "answered from the store": sum(count.reused for count in status.counts),
        "failed": sum(found.failed.values()),
        "refused before training": sum(status.rejected.values()),
        "time": _duration(status.spent_s),
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{_whole(value)}</dd></div>" for name, value in counts.items())
    yield f'<dl class="counts">{cells}</dl>'
    reasons = {**found.failed, **{f"refused: {reason}": n for reason, n in status.rejected.items()}}
    if reasons:
        listed = ", ".join(f"{escape(reason).replace('_', ' ')} {_whole(n)}" for reason, n in reasons.items())
        yield f'<p class="quiet">Not on the plots: {listed}.</p>'


def _whole(value: int | str) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _front(found: Findings, shown: int) -> Iterator[str]:
    names = _figure_names(found)
    second = next(name for name in (*reversed(found.objectives), *names) if name != names[0])
    yield "<h2>Pareto front</h2>"
    objectives = ", ".join(FIGURES[name].label for name in found.objectives)
    thinned = len(found.candidates) - shown
    left_out = counted(thinned, "dominated candidate", f"{thinned:,}")
    note = f" The plot leaves out {left_out}, evenly chosen." if thinned else ""
    yield (
        f"<p>No candidate beats a member of the front in all of {objectives}. The dotted line is the front of"
        f" the two figures shown alone. Bars span the interquartile range of the measured repeats.{note}</p>"
    )
    yield '<div class="axes">'
    for axis, chosen, text in (("y", names[0], "up"), ("x", second, "right")):
        choices = "".join(
            f'<option value="{name}"{" selected" * (name == chosen)}>{FIGURES[name].label}</option>'
            for name in names
        )
        yield f'<label>{text} <select id="{axis}">{choices}</select></label>'
    yield '</div><div id="front" class="plot"></div>'


def _members(found: Findings) -> Iterator[str]:
    members = [*found.front[:MOST_MEMBERS], *(each for each in found.baselines if not each.on_front)]
    layers = {each.trial.digest: each.layers for each in members}
    yield "<h2>Architectures</h2>"
    more = len(found.front) - MOST_MEMBERS
    note = f" The database has {counted(more, 'further member')}." if more > 0 else ""
    yield (
        "<p>Members of the front, best in the first figure first, then the baselines off it. A cell is a"
        " layer, the first at the left; mixers beside one another share a cell; a small number says how often"
        f" its weights are applied.{note}</p>"
    )
    yield legend(layers.values())
    for each in members:
        yield f'<article class="{_role(each)}"><header><h3>{escape(each.name or each.trial.digest[:12])}</h3>'
        place = "on the front" if each.on_front else "off the front"
        kind = {"baseline": "baseline, ", "random": "random arm, ", "search": ""}[each.arm]
        yield f'<span class="quiet">{kind}{place}, trial {each.trial.number}</span></header>'
        yield strip(layers[each.trial.digest])
        yield f"<code>{escape(each.trial.text)}</code>"
        yield f'<div class="figures">{"".join(_figures(each, found))}</div>'
        yield f'<div class="quiet"><code>{each.trial.digest}</code></div></article>'


def _figures(candidate: Candidate, found: Findings) -> Iterator[str]:
    trial = candidate.trial
    for name in _figure_names(found):
        if name in trial.figures:
            value = show(name, trial.figures[name], trial.spreads.get(name))
            yield f"<span>{FIGURES[name].label} <b>{value}</b></span>"
    evaluation: Evaluation | None = found.evaluations.get(trial.digest)
    if evaluation is not None and evaluation.outcome is Outcome.ok:
        trained = f"<b>{evaluation.train_tokens:,} tokens</b> in <b>{evaluation.train_s:.1f} s</b>"
        yield f"<span>trained on {trained}</span>"
