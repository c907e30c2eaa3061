"""Names, definitions, number formats and the headline that the page and the terminal table share."""

import math

from loopfm_ray.report.summary import Summary

__all__ = [
    "DATA_NOTES",
    "DEFINITIONS",
    "colour_key",
    "data_notes",
    "format_bytes",
    "format_count",
    "format_number",
    "format_seconds",
    "format_share",
    "format_small",
    "headline",
    "is_known",
    "model_order",
    "pretty_name",
    "subline",
]

MISSING = "–"

_PARTS = {
    "fm": "FM",
    "vm": "VM",
    "kd": "KD",
    "loopfm": "LoopFM",
    "raw": "raw history",
    "ah": "auxiliary head",
    "sa": "student adapter",
    "scaled": "scaled gradients",
}
_SMALL = 1e-3
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_ORDER = ("fm", "vm", "vm_kd", "vm_loopfm", "vm_kd_loopfm", "vm_raw")

DEFINITIONS = {
    "FM": "Foundation model: large, trained offline, never called while serving.",
    "VM": "Vertical model: small, the one that serves. Alone it is the baseline.",
    "KD": "Knowledge distillation: the VM also learns the FM's stored prediction for each training row.",
    "LoopFM": "The VM reads the user's history of FM latents, joined point in time.",
    "raw history": "The VM reads the user's past items themselves: history without the FM, for comparison.",
    "NE": "Normalized entropy: logloss / entropy of the mean label of the same rows. Lower is better; under 1 beats the base rate. No unit.",
    "NE gain": "NE of the plain VM minus NE of this model, same test rows. Positive is better.",
    "AUC": "Chance that a positive row outscores a negative one, ties half. Higher is better; 0.5 is chance.",
    "gAUC": "AUC within each user who has both labels, averaged with impressions as weights. Higher is better.",
    "Calibration": "Sum of predictions / sum of labels. 1 is perfect; over 1 predicts too much.",
    "Transfer ratio": "Share of the FM's NE improvement over the plain VM that reaches this VM: (NE of the VM - NE of this VM) / (NE of the VM - NE of the FM), same test rows.",
    "Parameters": "Trained weights, embedding tables included.",
    "Time": "Wall-clock time of training, mean over seeds.",
    "Visible": "An event is visible to a request when event_ts < request_ts and available_ts <= request_ts.",
    "Coverage": "Share of requests whose user has at least one visible event.",
    "Staleness": "Age of the newest visible event at the time of the request.",
    "Variance explained": "1 - squared error / variance, of the FM embedding rebuilt from what is kept.",
    "Probe": "Logloss, in nats, of a logistic regression of the label on what is kept at a step, on rows that it did not see; `none` is the mean label, `fm` the FM itself.",
    "Audit": "Joined rows computed again, slowly and independently, from the prepared data and the stored latents. A leak is a value that was not visible.",
    "Margin": "How long before the request an entry of its history could first be read: request_ts - available_ts. Never negative.",
    "Parity": "Largest absolute difference between the served score and the offline score of the same request and item.",
}
"""What every word on the page means, with unit and direction."""

DATA_NOTES = {
    "complete_journey": (
        "Complete Journey: its publisher calls the data simulated, made for education. Figures on it say how the"
        " methods compare, not what a real shop would see."
    ),
    "synthetic": "Synthetic data: drawn from a known formula with a fixed seed. It says nothing about a real product.",
    "events": "The event log that the config names; see its publisher's terms.",
}
"""What a reader must know about each kind of data before believing a number."""

_SAMPLED = (
    "The log holds no rows with label 0: they were sampled by popularity within the period, so NE, logloss and"
    " calibration depend on the sampling."
)


def data_notes(summary: Summary) -> list[str]:
    """Return what a reader must know about the data of this run."""
    notes = [DATA_NOTES[summary.data.kind]] if summary.data.kind in DATA_NOTES else []
    data = summary.config.get("data")
    negatives = data.get("negatives") if isinstance(data, dict) else None
    if isinstance(negatives, dict) and negatives.get("kind", "none") != "none":
        notes.append(_SAMPLED)
    return notes


def pretty_name(key: str) -> str:
    """Return the shown name of a model key: `vm_kd_loopfm` gives "VM + KD + LoopFM"."""
    return " + ".join(_PARTS.get(part, part) for part in key.split("_") if part) or key


def is_known(key: str) -> bool:
    """Return whether every part of a model key has a shown name of its own."""
    return all(part in _PARTS for part in key.split("_"))


def colour_key(key: str) -> str:
    """Return the part of the CSS colour name that belongs to a model key; unknown models share one colour."""
    return key.replace("_", "-") if key in _ORDER else "other"


def model_order(keys: list[str] | tuple[str, ...]) -> list[str]:
    """Return `keys` in the order of the story: the FM, the baseline, then what is added to it; unknown ones last."""
    known = [key for key in _ORDER if key in keys]
    return known + [key for key in keys if key not in _ORDER]


def format_number(value: float | None, digits: int = 4, *, signed: bool = False) -> str:
    """Return a fixed-point number, or a dash for None and values that are not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text.replace("-", "−")


def format_share(value: float | None, digits: int = 1, *, signed: bool = False) -> str:
    """Return a fraction as percent: 0.462 gives "46.2 %"."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{format_number(100 * value, digits, signed=signed)} %"


def format_small(value: float | None) -> str:
    """Return two digits, below a thousandth with a power of ten: 0.26 gives "0.26", 2.4e-7 gives "2.4 × 10⁻⁷"."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0 or _SMALL <= abs(value) < 1 / _SMALL:
        return f"{value:.2g}".replace("-", "−")
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits} × 10{str(int(power)).translate(_SUPERSCRIPT)}"


def format_count(value: float | None) -> str:
    """Return a count, thousands set apart: 1234567 gives "1,234,567"."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:,.0f}"


def format_bytes(value: float | None) -> str:
    """Return bytes in decimal units: 2500000 gives "2.5 MB"."""
    if value is None or not math.isfinite(value):
        return MISSING
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:g} B"


def format_seconds(value: float | None) -> str:
    """Return a duration in the largest unit that leaves it over 1: 93784 gives "1.1 d"."""
    if value is None or not math.isfinite(value):
        return MISSING
    for unit, size in (("d", 86_400.0), ("h", 3_600.0), ("min", 60.0)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.1f} s"


def headline(summary: Summary) -> str:
    """Return the one sentence that says what the transfer gave."""
    ratios = summary.transfer_ratio
    best = next((key for key in ("vm_kd_loopfm", "vm_loopfm", "vm_kd") if _known(ratios, key)), "")
    if not best:
        return f"{len(summary.models)} models, trained and tested on the same rows"
    name, ratio = pretty_name(best), ratios[best]
    if ratio is None or ratio <= 0:
        return (
            f"Nothing reached the small model: {name} is no better than the plain VM"
            f" (transfer ratio {format_share(ratio)})"
        )
    text = (
        f"{format_share(ratio)} of the foundation model’s improvement reaches the model that serves"
    )
    if best != "vm_kd" and _known(ratios, "vm_kd"):
        text += f"; with distillation alone it is {format_share(ratios['vm_kd'])}"
    return text


def subline(summary: Summary) -> str:
    """Return what stands under the headline: who was compared, AUC beside it, and the raw-history rival."""
    models, ratios = summary.models, summary.transfer_ratio
    best = next((key for key in ("vm_kd_loopfm", "vm_loopfm", "vm_kd") if key in models), "")
    if not best:
        return ""
    rivals = [key for key in ("vm", "vm_kd", "fm") if key in models and key != best]
    against = ", ".join(
        f"{format_number(models[key].test.auc)} ({pretty_name(key)})" for key in rivals
    )
    text = f"{pretty_name(best)} has a test AUC of {format_number(models[best].test.auc)}"
    text += f" against {against}." if against else "."
    if _known(ratios, "vm_raw"):
        text += (
            " The same VM with its own raw history instead of FM latents"
            f" has a transfer ratio of {format_share(ratios['vm_raw'])}."
        )
    return text


def _known(ratios: dict[str, float | None], key: str) -> bool:
    ratio = ratios.get(key)
    return ratio is not None and math.isfinite(ratio)
