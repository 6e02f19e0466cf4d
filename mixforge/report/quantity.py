"""Figures as people read them: three digits and a prefix, the unit behind."""

from __future__ import annotations

from mixforge.evaluator.evaluation import FIGURES

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_UNITS = {"byte": "B", "fraction": "", "bit/byte": "bit/byte", "weights": "", "FLOP": "FLOP", "ms": "ms"}


def show(figure: str, value: float, spread: float | None = None) -> str:
    """`1.24 MB`, `2.31 bit/byte`, `0.412 ± 0.011 ms`: `spread` is shown as half of it to both sides."""
    unit = _UNITS.get(FIGURES[figure].unit, FIGURES[figure].unit)
    if FIGURES[figure].unit in ("byte", "weights", "FLOP"):
        scale, prefix = next(((s, p) for s, p in _PREFIXES if abs(value) >= s), (1.0, ""))
        return f"{_digits(value / scale)} {prefix}{unit}".strip()
    either = "" if spread is None else f" ± {_digits(spread / 2)}"
    return f"{_digits(value)}{either} {unit}".strip()


def _digits(value: float) -> str:
    """Three significant digits, as a power of ten only where it is very small or large."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 999.5:
        return f"{value:#.3g}".removesuffix(".")
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.2e}"
