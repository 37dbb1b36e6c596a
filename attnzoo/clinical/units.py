"""Units: from the unit that a file states to the unit of the variable's table. A unit that is not known is refused."""

import re

import numpy as np

from attnzoo.clinical.variables import Variable

Scale = tuple[float, float]
"""(factor, offset): value in the table's unit = factor * value + offset."""

SAME: Scale = (1.0, 0.0)


def _named(scale: Scale | float, names: str) -> dict[str, Scale]:
    return dict.fromkeys(names.split(), scale if isinstance(scale, tuple) else (scale, 0.0))


# Spellings are compared in lower case without spaces. UCUM's codes stand first; the others are what hospitals write.
FAMILIES: dict[str, dict[str, Scale]] = {
    "Cel": {
        **_named(1.0, "cel c degc degreec celsius °c &#176;c c."),
        **_named((5 / 9, -160 / 9), "[degf] f degf degreef fahrenheit °f &#176;f f."),
        **_named((1.0, -273.15), "k kelvin"),
    },
    "mm[Hg]": {**_named(1.0, "mm[hg] mmhg mm(hg) mm/hg torr"), **_named(7.500617, "kpa")},
    "%": {**_named(1.0, "% %thb %sat. %totalhgb percent"), **_named(100.0, "1 fraction l/l")},
    "kg": {
        **_named(1.0, "kg kilogram"),
        **_named(0.001, "g gram"),
        **_named(0.45359237, "[lb_av] lb lbs pound pounds"),
        **_named(0.028349523125, "[oz_av] oz"),
    },
    "cm": {
        **_named(1.0, "cm"),
        **_named(100.0, "m"),
        **_named(0.1, "mm"),
        **_named(2.54, "[in_i] in inch inches"),
        **_named(30.48, "[ft_i] ft feet"),
    },
    "/min": _named(1.0, "/min bpm b/min 1/min {beats}/min {breaths}/min beats/min breaths/min insp/min breaths"),
    "g/dL": {**_named(1.0, "g/dl gm/dl g%"), **_named(0.1, "g/l"), **_named(0.001, "mg/dl")},
    "mg/dL": {
        **_named(1.0, "mg/dl mg%"),
        **_named(100.0, "g/l"),
        **_named(0.1, "mg/l"),
        **_named(1000.0, "g/dl"),
        **_named(0.001, "ug/dl mcg/dl"),
    },
    "mg/L": {**_named(1.0, "mg/l"), **_named(10.0, "mg/dl")},
    "mmol/L": _named(1.0, "mmol/l mm/l"),
    "U/L": {**_named(1.0, "u/l [iu]/l iu/l unit/l units/l"), **_named(60.0, "ukat/l")},
    "ng/mL": {**_named(1.0, "ng/ml ug/l mcg/l"), **_named(0.001, "pg/ml ng/l")},
    "10*3/uL": {
        **_named(
            1.0, "10*3/ul 10*9/l 10e3/ul 10e3/mcl 10^9/l 10(3)/mcl 10(3)mcl k/ul k/mcl k/mm3 k/cmm k/mmcu x103 x10(3)"
        ),
        **_named(1.0, "g/l th/ul th/cumm th/cmm ths/ul thou/ul thou/cumm x103/ul x10(3)/mcl"),
        **_named(0.001, "/ul /mm3 /cumm"),
    },
    "mL": {**_named(1.0, "ml mls cc"), **_named(1000.0, "l")},
    "s": _named(1.0, "s sec secs second seconds second(s)"),
    "pg": _named(1.0, "pg uug"),
    "fL": _named(1.0, "fl u3 um3"),
    "min": {**_named(1.0, "min minute minutes"), **_named(60.0, "h"), **_named(1 / 60, "s")},
    "a": {**_named(1.0, "a year years yr"), **_named(1 / 12, "mo month months")},
    "h": _named(1.0, "h hour hours"),
    "1": {"": SAME, **_named(1.0, "1 [ph] ph ratio units unit unit(s) {score} {inr}")},
}

# What depends on the substance: its molar mass, or its charge for equivalents.
_EQUIVALENTS = _named(1.0, "meq/l")
SUBSTANCES: dict[str, dict[str, Scale]] = {
    **dict.fromkeys(("sodium", "potassium", "chloride", "bicarbonate", "base_excess"), _EQUIVALENTS),
    "glucose": _named(18.016, "mmol/l"),
    "bun": _named(2.801, "mmol/l"),
    "creatinine": _named(1 / 88.42, "umol/l mcmol/l µmol/l"),
    "bilirubin": _named(1 / 17.1, "umol/l mcmol/l µmol/l"),
    "direct_bilirubin": _named(1 / 17.1, "umol/l mcmol/l µmol/l"),
    "calcium": {**_named(4.008, "mmol/l"), **_named(2.004, "meq/l")},
    "ionized_calcium": {**_named(1 / 4.008, "mg/dl"), **_named(0.5, "meq/l")},
    "magnesium": {**_named(2.4305, "mmol/l"), **_named(1.21525, "meq/l")},
    "phosphate": _named(3.0974, "mmol/l"),
    "cholesterol": _named(38.67, "mmol/l"),
    "lactate": {**_named(1 / 9.008, "mg/dl"), **_named(1.0, "meq/l")},
    "hemoglobin": _named(1.6114, "mmol/l"),
    "mchc": _named(1.0, "%"),
}


def scale_of(variable: Variable, unit: str) -> Scale | None:
    """How a value in `unit` becomes one in the variable's unit; None for a unit that is not known for it."""
    key = re.sub(r"\s", "", unit).lower()
    for known in (SUBSTANCES.get(variable.quantity, {}), FAMILIES[variable.unit]):
        if key in known:
            return known[key]
    return None


def spellings(variable: Variable) -> list[str]:
    """The units that are known for a variable, as `scale_of` compares them; the empty one is left out."""
    known = {**FAMILIES[variable.unit], **SUBSTANCES.get(variable.quantity, {})}
    return sorted(unit for unit in known if unit)


def unknown_unit(variable: Variable, unit: str) -> str:
    """The error message for a unit that is not known for a variable."""
    known = ", ".join(spellings(variable))
    return f"{variable.name!r} has the unit {unit!r}, which is not known for it; give {variable.unit} or one of {known}"


def convert(variable: Variable, values: np.ndarray | float, unit: str) -> np.ndarray:
    """Values in the variable's unit.

    Inspired oxygen is written as a fraction and as a percentage, often under the wrong unit. The two do not overlap: up
    to 1 it is a fraction. Raises ValueError that names the variable and the unit if the unit is not known for it.
    """
    scale = scale_of(variable, unit)
    if scale is None:
        raise ValueError(unknown_unit(variable, unit))
    given = np.asarray(values, np.float64)
    if variable.quantity == "fio2":
        return np.where(given <= 1, given * 100, given)
    return given * scale[0] + scale[1]
