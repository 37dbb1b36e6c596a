"""What is measured: for each variable its unit, its plausible and possible range, and whether its scale is logarithmic.

Each data set names its variables in its own way; `QUANTITIES` describes what they measure, once. All cohorts hold a
quantity in the unit that stands here, whatever unit their files use. The ranges mark errors of recording, not illness:
a value outside `possible` is dropped, a value between the two ranges is clipped to `plausible`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from attnzoo.errors import suggest

Range = tuple[float, float]


@dataclass(frozen=True)
class Variable:
    """One measured variable, or one static fact about a patient."""

    name: str
    meaning: str
    unit: str
    """In UCUM; "1" for a number without a unit."""
    plausible: Range
    possible: Range
    log1p: bool = False
    """Whether the distribution is so skewed that log(1 + value) is standardised."""
    categories: tuple[tuple[int, str], ...] = ()
    """Codes and their meanings, for a variable that is not a number on a scale."""
    quantity: str = ""
    """The row of `QUANTITIES` that describes it."""


def _log(name: str, meaning: str, unit: str, plausible: Range, possible: Range) -> Variable:
    return Variable(name, meaning, unit, plausible, possible, log1p=True)


_ROWS = (
    Variable("heart_rate", "heart rate", "/min", (10, 250), (1, 350)),
    Variable("respiratory_rate", "respiratory rate", "/min", (0, 80), (0, 200)),
    Variable("spo2", "oxygen saturation", "%", (40, 100), (10, 101)),
    Variable("temperature", "body temperature", "Cel", (25, 43), (15, 47)),
    Variable("systolic_pressure", "systolic blood pressure", "mm[Hg]", (30, 280), (1, 375)),
    Variable("diastolic_pressure", "diastolic blood pressure", "mm[Hg]", (10, 200), (1, 375)),
    Variable("mean_pressure", "mean arterial blood pressure", "mm[Hg]", (15, 230), (1, 375)),
    Variable("gcs", "Glasgow Coma Scale, total", "1", (3, 15), (3, 15)),
    Variable("gcs_eye", "Glasgow Coma Scale, eye opening", "1", (1, 4), (1, 4)),
    Variable("gcs_motor", "Glasgow Coma Scale, motor response", "1", (1, 6), (1, 6)),
    Variable("gcs_verbal", "Glasgow Coma Scale, verbal response", "1", (1, 5), (1, 5)),
    Variable("capillary_refill", "capillary refill, delayed (1) or brisk (0)", "1", (0, 1), (0, 1)),
    Variable("fio2", "fraction of inspired oxygen", "%", (21, 100), (20, 100)),
    Variable("ventilated", "mechanical ventilation", "1", (0, 1), (0, 1)),
    _log("urine", "urine output", "mL", (0, 3000), (0, 12000)),
    Variable("albumin", "albumin", "g/dL", (0.5, 7), (0.1, 10)),
    _log("alkaline_phosphatase", "alkaline phosphatase", "U/L", (5, 4000), (0, 20000)),
    _log("alt", "alanine transaminase", "U/L", (1, 15000), (0, 40000)),
    _log("ast", "aspartate transaminase", "U/L", (1, 20000), (0, 50000)),
    Variable("base_excess", "base excess", "mmol/L", (-40, 40), (-60, 60)),
    Variable("bicarbonate", "bicarbonate", "mmol/L", (2, 60), (0, 90)),
    _log("bilirubin", "total bilirubin", "mg/dL", (0, 60), (0, 150)),
    _log("direct_bilirubin", "direct bilirubin", "mg/dL", (0, 50), (0, 150)),
    Variable("bands", "band neutrophils", "%", (0, 100), (0, 100)),
    _log("bun", "blood urea nitrogen", "mg/dL", (1, 250), (0, 400)),
    Variable("calcium", "calcium, total", "mg/dL", (3, 20), (1, 30)),
    Variable("ionized_calcium", "calcium, ionized", "mmol/L", (0.3, 2.2), (0.1, 2.5)),
    Variable("cholesterol", "cholesterol", "mg/dL", (20, 700), (5, 2000)),
    _log("creatine_kinase", "creatine kinase", "U/L", (1, 100000), (0, 500000)),
    _log("creatine_kinase_mb", "creatine kinase MB", "ng/mL", (0, 1000), (0, 10000)),
    Variable("chloride", "chloride", "mmol/L", (60, 150), (30, 200)),
    _log("creatinine", "creatinine", "mg/dL", (0.1, 25), (0, 60)),
    _log("crp", "C-reactive protein", "mg/L", (0, 700), (0, 2000)),
    Variable("fibrinogen", "fibrinogen", "mg/dL", (30, 1500), (5, 3000)),
    _log("glucose", "glucose", "mg/dL", (15, 1500), (1, 3000)),
    Variable("hematocrit", "hematocrit", "%", (8, 70), (3, 90)),
    Variable("hemoglobin", "hemoglobin", "g/dL", (2, 23), (1, 30)),
    Variable("inr", "international normalised ratio", "1", (0.5, 20), (0.1, 50)),
    Variable("potassium", "potassium", "mmol/L", (1.5, 12), (0.5, 30)),
    _log("lactate", "lactate", "mmol/L", (0.1, 35), (0, 60)),
    Variable("lymphocytes", "lymphocytes", "%", (0, 100), (0, 100)),
    Variable("mch", "mean corpuscular hemoglobin", "pg", (12, 50), (5, 100)),
    Variable("mchc", "mean corpuscular hemoglobin concentration", "g/dL", (20, 45), (10, 60)),
    Variable("mcv", "mean corpuscular volume", "fL", (45, 150), (20, 220)),
    Variable("methemoglobin", "methemoglobin", "%", (0, 60), (0, 100)),
    Variable("magnesium", "magnesium", "mg/dL", (0.3, 10), (0.1, 40)),
    Variable("sodium", "sodium", "mmol/L", (95, 190), (50, 250)),
    Variable("neutrophils", "neutrophils", "%", (0, 100), (0, 100)),
    Variable("paco2", "carbon dioxide, partial pressure", "mm[Hg]", (8, 200), (1, 350)),
    Variable("pao2", "oxygen, partial pressure", "mm[Hg]", (15, 700), (1, 900)),
    Variable("ph", "pH of blood", "1", (6.5, 8), (6.2, 8.5)),
    Variable("phosphate", "phosphate", "mg/dL", (0.3, 20), (0.1, 45)),
    _log("platelets", "platelets", "10*3/uL", (1, 2000), (0, 5000)),
    Variable("ptt", "partial thromboplastin time", "s", (10, 200), (5, 400)),
    _log("troponin_i", "troponin I", "ng/mL", (0, 500), (0, 5000)),
    _log("troponin_t", "troponin T", "ng/mL", (0, 100), (0, 1000)),
    _log("wbc", "white blood cells", "10*3/uL", (0, 300), (0, 1500)),
    Variable("weight", "body weight", "kg", (25, 350), (10, 600)),
    Variable("height", "body height", "cm", (100, 230), (50, 272)),
    Variable("age", "age", "a", (0, 110), (0, 130)),
    Variable("sex", "sex", "1", (0, 1), (0, 1), categories=((0, "female"), (1, "male"))),
    Variable(
        "icu_type",
        "kind of intensive care unit",
        "1",
        (1, 4),
        (1, 4),
        categories=((1, "coronary care"), (2, "cardiac surgery recovery"), (3, "medical"), (4, "surgical")),
    ),
)
_DAILY = (
    Variable("resting_heart_rate", "resting heart rate of the day", "/min", (30, 120), (20, 200)),
    _log("sedentary_minutes", "minutes without activity", "min", (0, 1440), (0, 1440)),
    _log("light_minutes", "minutes of light activity", "min", (0, 1440), (0, 1440)),
    _log("moderate_minutes", "minutes of moderate activity", "min", (0, 1440), (0, 1440)),
    _log("vigorous_minutes", "minutes of vigorous activity", "min", (0, 1440), (0, 1440)),
    _log("zone_below_minutes", "minutes below the heart rate zones", "min", (0, 1440), (0, 1440)),
    _log("zone_fat_burn_minutes", "minutes in the first heart rate zone", "min", (0, 1440), (0, 1440)),
    _log("zone_cardio_minutes", "minutes in the second heart rate zone", "min", (0, 1440), (0, 1440)),
    _log("zone_peak_minutes", "minutes in the third heart rate zone", "min", (0, 1440), (0, 1440)),
    _log("exercise_minutes", "minutes of recorded exercise", "min", (0, 1440), (0, 1440)),
    _log("exercise_steps", "steps in recorded exercise", "1", (0, 100000), (0, 200000)),
    Variable("sleep_minutes", "minutes asleep", "min", (0, 1000), (0, 1440)),
    Variable("awake_minutes", "minutes awake in bed", "min", (0, 600), (0, 1440)),
    Variable("bed_minutes", "minutes in bed", "min", (0, 1200), (0, 1440)),
    Variable("sleep_efficiency", "sleep efficiency", "%", (0, 100), (0, 100)),
    Variable("deep_minutes", "minutes of deep sleep", "min", (0, 600), (0, 1440)),
    Variable("light_sleep_minutes", "minutes of light sleep", "min", (0, 1000), (0, 1440)),
    Variable("rem_minutes", "minutes of REM sleep", "min", (0, 600), (0, 1440)),
    Variable("sleep_score", "the device's score of the night", "1", (0, 100), (0, 100)),
    Variable("restlessness", "share of the night in motion", "1", (0, 1), (0, 1)),
    Variable("bedtime", "start of sleep, in hours after noon", "h", (0, 24), (0, 24)),
)
QUANTITIES = {row.name: replace(row, quantity=row.name) for row in (*_ROWS, *_DAILY)}

Table = dict[str, Variable]


def _table(**names: str) -> Table:
    return {name: replace(QUANTITIES[quantity], name=name) for name, quantity in names.items()}


# The description of the data set gives Mg in mmol/L, but its values (about 2) are those of mg/dL.
PHYSIONET2012 = _table(
    Albumin="albumin",
    ALP="alkaline_phosphatase",
    ALT="alt",
    AST="ast",
    Bilirubin="bilirubin",
    BUN="bun",
    Cholesterol="cholesterol",
    Creatinine="creatinine",
    DiasABP="diastolic_pressure",
    FiO2="fio2",
    GCS="gcs",
    Glucose="glucose",
    HCO3="bicarbonate",
    HCT="hematocrit",
    HR="heart_rate",
    K="potassium",
    Lactate="lactate",
    Mg="magnesium",
    MAP="mean_pressure",
    MechVent="ventilated",
    Na="sodium",
    NIDiasABP="diastolic_pressure",
    NIMAP="mean_pressure",
    NISysABP="systolic_pressure",
    PaCO2="paco2",
    PaO2="pao2",
    pH="ph",
    Platelets="platelets",
    RespRate="respiratory_rate",
    SaO2="spo2",
    SysABP="systolic_pressure",
    Temp="temperature",
    TroponinI="troponin_i",
    TroponinT="troponin_t",
    Urine="urine",
    WBC="wbc",
    Weight="weight",
)
YAIB = _table(
    alb="albumin",
    alp="alkaline_phosphatase",
    alt="alt",
    ast="ast",
    be="base_excess",
    bicar="bicarbonate",
    bili="bilirubin",
    bili_dir="direct_bilirubin",
    bnd="bands",
    bun="bun",
    ca="calcium",
    cai="ionized_calcium",
    ck="creatine_kinase",
    ckmb="creatine_kinase_mb",
    cl="chloride",
    crea="creatinine",
    crp="crp",
    dbp="diastolic_pressure",
    fgn="fibrinogen",
    fio2="fio2",
    glu="glucose",
    hgb="hemoglobin",
    hr="heart_rate",
    inr_pt="inr",
    k="potassium",
    lact="lactate",
    lymph="lymphocytes",
    map="mean_pressure",
    mch="mch",
    mchc="mchc",
    mcv="mcv",
    methb="methemoglobin",
    mg="magnesium",
    na="sodium",
    neut="neutrophils",
    o2sat="spo2",
    pco2="paco2",
    ph="ph",
    phos="phosphate",
    plt="platelets",
    po2="pao2",
    ptt="ptt",
    resp="respiratory_rate",
    sbp="systolic_pressure",
    temp="temperature",
    tnt="troponin_t",
    urine="urine",
    wbc="wbc",
)
MIMIC3 = _table(
    **{
        "Capillary refill rate": "capillary_refill",
        "Diastolic blood pressure": "diastolic_pressure",
        "Fraction inspired oxygen": "fio2",
        "Glascow coma scale eye opening": "gcs_eye",
        "Glascow coma scale motor response": "gcs_motor",
        "Glascow coma scale total": "gcs",
        "Glascow coma scale verbal response": "gcs_verbal",
        "Glucose": "glucose",
        "Heart Rate": "heart_rate",
        "Height": "height",
        "Mean blood pressure": "mean_pressure",
        "Oxygen saturation": "spo2",
        "Respiratory rate": "respiratory_rate",
        "Systolic blood pressure": "systolic_pressure",
        "Temperature": "temperature",
        "Weight": "weight",
        "pH": "ph",
    }
)
PMDATA = {row.name: QUANTITIES[row.name] for row in _DAILY}
STATICS = {name: QUANTITIES[name] for name in ("age", "sex", "height", "weight", "icu_type")}

VARIABLES: Table = {**QUANTITIES, **PHYSIONET2012, **YAIB, **MIMIC3}
"""Every name of every table; where two tables share a name, they mean the same quantity."""


def choose(table: Table, names: Iterable[str] | None, where: str) -> Table:
    """The variables of a table with these names, in the table's order; None: all.

    Raises ValueError, naming `where`, for a name that is forbidden, unknown or given twice, and for no name at all.
    """
    if names is None:
        return table
    if isinstance(names, str):
        raise ValueError(f"{where}={names!r} is one text; give a list of names")
    wanted = list(names)
    refuse_forbidden(wanted, where)
    for name in wanted:
        if name not in table:
            raise ValueError(f"{where}: unknown variable {name!r}{suggest(name, table)}")
        if wanted.count(name) > 1:
            raise ValueError(f"{where}: variable {name!r} is named twice; name it once")
    if not wanted:
        raise ValueError(f"{where} names no variable; leave it out for all of them")
    return {name: row for name, row in table.items() if name in wanted}


_FORBIDDEN = {
    "a severity score, computed from the same hours by rules that differ between data sets": (
        "saps saps1 saps2 saps3 sapsi sapsii sapsiii sofa sofascore apache apachescore apacheii apacheiv apsiii oasis"
    ),
    "known only after the prediction": (
        "los lengthofstay losdays loshours loshosp losicu remaininghours survival survivaldays inhospitaldeath "
        "hospitaldeath mortality death deathtime dod dischargetime dischtime outtime dischargeweight dischargestatus "
        "dischargelocation hospitaldischargestatus hospitaldischargeoffset hospitaldischargelocation "
        "unitdischargestatus unitdischargeoffset unitdischargelocation hospitalexpireflag label ytrue outcome"
    ),
    "a number given to a record, not a fact about a patient": (
        "recordid id patientid stayid subjectid hadmid icustayid icustay patientunitstayid uniquepid "
        "patienthealthsystemstayid episodeid mrn"
    ),
}
FORBIDDEN = {name: reason for reason, names in _FORBIDDEN.items() for name in names.split()}
"""Names that are never features, without case and punctuation, and why."""


def refuse_forbidden(names: Iterable[str], where: str) -> None:
    """Raises ValueError for severity scores, outcomes and record numbers, which are never features of a model."""
    for name in names:
        reason = FORBIDDEN.get(re.sub(r"[\W_]", "", name).lower())
        if reason is not None:
            raise ValueError(f"{where}: {name!r} can never be a feature: it is {reason}; take it out")
