"""Small data sets in their original formats, written for tests: whole, or cut at an hour."""

import gzip
import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

RECORDS = {
    "7.txt": [
        "00:00,RecordID,7", "00:00,Age,54", "00:00,Gender,0", "00:00,Height,-1", "00:00,ICUType,4", "00:00,Weight,80.6",
        "00:07,HR,73", "00:37,HR,77", "01:10,FiO2,0.5", "01:10,Temp,-17.8", "23:59,pH,7.3", "24:00,pH,7.4",
        "35:10,HR,88", "48:00,HR,99",
    ],
    "12.txt": [
        "00:00,RecordID,12", "00:00,Age,31", "00:00,Gender,1", "00:00,Height,175.3", "00:00,ICUType,3",
        "00:00,Weight,-1", "12:00,Na,140",
    ],
}  # fmt: skip


def write_csv(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.write(text)


def write_physionet(root: Path, hours: int = 99, died: int = 1) -> Path:
    """Two records, without the lines from the end of `hours` on."""
    for name, lines in RECORDS.items():
        kept = [line for line in lines if int(line[:2]) < hours]
        write_csv(root / "set-a" / name, "\n".join(["Time,Parameter,Value", *kept, ""]))
    write_csv(root / "set-a" / "readme.txt", "no record")
    outcomes = f"RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n7,6,1,5,-1,0\n12,16,8,-1,3,{died}\n"
    write_csv(root / "Outcomes-a.txt", outcomes)
    return root / "set-a"


def write_stays(root: Path, stays: int = 64, hours: int = 12) -> Path:
    """Stays in the format of PhysioNet 2012, of which those with a fast heart die more often."""
    random, outcomes = np.random.default_rng(0), ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"]
    (root / "set-a").mkdir()
    for number in range(100, 100 + stays):
        died = int(random.random() < 0.4)
        lines = [f"00:00,RecordID,{number}", f"00:00,Age,{random.integers(30, 90)}", f"00:00,Gender,{number % 2}"]
        lines += [f"{hour:02d}:15,HR,{70 + 20 * died + random.integers(0, 30)}" for hour in range(0, hours, 1 + died)]
        lines += [f"{hour:02d}:30,Temp,{36 + random.random():.1f}" for hour in range(0, hours, 3)]
        (root / "set-a" / f"{number}.txt").write_text("\n".join(["Time,Parameter,Value", *sorted(lines)]) + "\n")
        outcomes.append(f"{number},6,1,5,-1,{died}")
    (root / "Outcomes-a.txt").write_text("\n".join(outcomes) + "\n")
    return root / "set-a"


def write_yaib(root: Path, hours: int = 99, died: int = 1) -> Path:
    import pyarrow
    import pyarrow.parquet

    rng = np.random.default_rng(2)
    stays, steps = np.repeat([30, 10, 20], 50), np.tile(np.arange(50), 3)
    columns = {name: np.where(steps < hours, rng.uniform(20, 40, 150), np.nan) for name in ("hr", "resp", "bun")}
    dyn = {"stay_id": stays, "time": steps * np.timedelta64(3600, "s"), **columns}
    sta = {"stay_id": [10, 30, 20], "age": [70.0, 31.5, None], "sex": ["Male", None, "Female"]}
    tables = {
        "dyn": pyarrow.table({name: pyarrow.array(column, from_pandas=True) for name, column in dyn.items()}),
        "sta": pyarrow.table({**sta, "height": [170.0, 12.0, 160.0], "weight": [70.0, None, 60.0]}),
        "outc": pyarrow.table({"stay_id": [10, 20, 30], "label": [died, 0, 0]}),
    }
    root.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        pyarrow.parquet.write_table(table, root / f"{name}.parquet")
    return root


def write_yaib_hourly(root: Path, stays: int = 40) -> Path:
    """Stays of 3 to 62 hours with the hours that remain; the faster the heart, the longer the stay."""
    import pyarrow
    import pyarrow.parquet

    rng, hours_N = np.random.default_rng(3), 3 + np.arange(stays) * 13 % 60
    stay = np.concatenate([np.full(n, i) for i, n in enumerate(hours_N)])
    step = np.concatenate([np.arange(n) for n in hours_N])
    rate = 60 + 2 * hours_N[stay] + rng.normal(0, 5, len(stay))
    dyn = {"stay_id": stay, "time": step.astype(float), "hr": np.where(rng.random(len(stay)) < 0.7, rate, np.nan)}
    sta = {"stay_id": np.arange(stays), "age": rng.uniform(30, 90, stays), "sex": ["Male", "Female"] * (stays // 2)}
    outc = {"stay_id": stay, "time": step.astype(float), "label": (hours_N[stay] - 1.0 - step)}
    empty = dict.fromkeys(("height", "weight"), np.full(stays, np.nan))
    root.mkdir(parents=True, exist_ok=True)
    for name, columns in (("dyn", dyn), ("sta", {**sta, **empty}), ("outc", outc)):
        table = pyarrow.table({key: pyarrow.array(column, from_pandas=True) for key, column in columns.items()})
        pyarrow.parquet.write_table(table, root / f"{name}.parquet")
    return root


def write_eicu(root: Path, hours: int = 99, died: int = 1) -> Path:
    status = "Expired" if died else "Alive"
    write_csv(
        root / "patient.csv.gz",
        "patientunitstayid,uniquepid,unitdischargeoffset,hospitaldischargestatus,gender,age,admissionheight,"
        "admissionweight,dischargeweight\n"
        f"1,a,3000,{status},Male,> 89,170.2,70,60\n2,a,4000,Alive,Female,50,,,\n3,b,100,Alive,Male,60,180,90,\n"
        "4,c,9000,,Other,61,180,90,\n",
    )
    labs = [
        (1, 30, 90, "sodium", 140, "mmol/L", "mEq/L"),
        (1, 1000, 1030, "CRP", 12, "mg/dL", "mg/L"),
        (1, 1000, 1030, "CRP", 1.2, "mg/dL", ""),
        (2, -600, -500, "glucose", 90, "mg/dL", "mg/dL"),
        (2, 100, 800, "glucose", 100, "mg/dL", "mg/dL"),
        (2, 1500, 1500, "FiO2", 0.4, "%", "%"),
        (2, 1600, 1600, "FiO2", 4, "%", "lpm"),
    ]
    header = "patientunitstayid,labresultoffset,labresultrevisedoffset,labname,labresult,labmeasurenamesystem,"
    rows = [",".join(map(str, row)) for row in labs if row[2] < hours * 60]
    write_csv(root / "lab.csv", "\n".join([header + "labmeasurenameinterface", *rows, ""]))
    vitals = [f"1,{minute},{60 + minute % 37}" for minute in range(0, 2900, 50) if minute < hours * 60]
    head = "patientunitstayid,observationoffset,heartrate,temperature,sao2,respiration,systemicsystolic,"
    rows = [f"{row},,97,,,," for row in vitals]
    write_csv(root / "vitalPeriodic.csv.gz", "\n".join([head + "systemicdiastolic,systemicmean", *rows, ""]))
    return root


def write_mimic(root: Path, hours: int = 99, died: int = 1) -> Path:
    part = root / "in-hospital-mortality" / "train"
    names = MIMIC_HEADER.split(",")
    for stay, first in (("10026_episode1", 0.0), ("10026_episode2", 0.3), ("577_episode1", 5.5)):
        rows = [",".join(names)]
        for step in range(40):
            hour = first + 1.1 * step
            if hour < hours:
                given = {"Hours": hour, "Heart Rate": 60 + step, "Fraction inspired oxygen": 0.21 if step % 5 else ""}
                given |= {
                    "Glascow coma scale verbal response": ("5 Oriented", "No Response-ETT", "Confused", "")[step % 4]
                }
                rows.append(",".join(str(given.get(name, "")) for name in names))
        write_csv(part / f"{stay}_timeseries.csv", "\n".join([*rows, ""]))
    listed = [
        f"577_episode1_timeseries.csv,{died}",
        "10026_episode2_timeseries.csv,0",
        "10026_episode1_timeseries.csv,0",
    ]
    write_csv(part / "listfile.csv", "\n".join(["stay,y_true", *listed, ""]))
    return part


MIMIC_HEADER = (
    "Hours,Capillary refill rate,Diastolic blood pressure,Fraction inspired oxygen,Glascow coma scale eye opening,"
    "Glascow coma scale motor response,Glascow coma scale total,Glascow coma scale verbal response,Glucose,Heart Rate,"
    "Height,Mean blood pressure,Oxygen saturation,Respiratory rate,Systolic blood pressure,Temperature,Weight,pH"
)

LOINC, UCUM = "http://loinc.org", "http://unitsofmeasure.org"
FHIR_START = datetime(2026, 3, 1, 8, 30, tzinfo=UTC)


def fhir_time(minutes: float) -> str:
    """The dateTime so many minutes after admission."""
    return (FHIR_START + timedelta(minutes=minutes)).isoformat()


def fhir_quantity(code: str, value: object, unit: str) -> dict[str, Any]:
    """The coded value of an Observation or of one of its components."""
    quantity = {"value": value, "unit": unit, "system": UCUM, "code": unit}
    return {"code": {"coding": [{"system": LOINC, "code": code}]}, "valueQuantity": quantity}


def fhir_observation(id: str, minutes: float, code: str, value: object, unit: str, /, **changes: Any) -> dict[str, Any]:
    """An Observation of the encounter e1; changes: its other elements, None for those that it lacks."""
    whole = {
        "resourceType": "Observation",
        "id": id,
        "status": "final",
        "subject": {"reference": "Patient/p1"},
        "encounter": {"reference": "Encounter/e1"},
        "effectiveDateTime": fhir_time(minutes),
        **(fhir_quantity(code, value, unit) | changes),
    }
    return {name: element for name, element in whole.items() if element is not None}


def fhir_stays(died: int = 1) -> list[dict[str, Any]]:
    """Two patients, each with an encounter of 60 hours."""
    resources: list[dict[str, Any]] = [
        {"resourceType": "Patient", "id": "p1", "gender": "female", "birthDate": "1950-03-02"},
        {"resourceType": "Patient", "id": "p2", "gender": "male", "birthDate": "1980"},
    ]
    for number, disposition in ((1, "exp" if died else "home"), (2, "home")):
        system = "http://terminology.hl7.org/CodeSystem/discharge-disposition"
        coding = [{"system": system, "code": disposition}]
        encounter = {
            "resourceType": "Encounter",
            "id": f"e{number}",
            "status": "finished",
            "class": {"code": "IMP"},
            "subject": {"reference": f"Patient/p{number}"},
            "period": {"start": fhir_time(0), "end": fhir_time(3600)},
            "hospitalization": {"dischargeDisposition": {"coding": coding}},
        }
        resources.append(encounter)
    return resources


def fhir_bundle(resources: list[dict[str, Any]]) -> dict[str, Any]:
    return {"resourceType": "Bundle", "type": "collection", "entry": [{"resource": r} for r in resources]}


def write_fhir(root: Path, hours: int = 99, died: int = 1) -> Path:
    """A bundle of the stays and NDJSON of the observations; each result is issued 40 minutes after its sample."""
    observations = [
        fhir_observation(f"{code}-{i}", at, code, 60 + i % 37, unit, issued=fhir_time(at + 40))
        for code, unit, every in (("8867-4", "/min", 50), ("2345-7", "mg/dL", 400))
        for i, at in enumerate(range(0, 3600, every))
        if at + 40 < hours * 60
    ]
    write_csv(root / "stays.json", json.dumps(fhir_bundle(fhir_stays(died))))
    write_csv(root / "observations.ndjson.gz", "".join(json.dumps(row) + "\n" for row in observations))
    return root


WRITERS: dict[str, Callable[..., Path]] = {
    "physionet2012": write_physionet,
    "yaib": write_yaib,
    "eicu": write_eicu,
    "mimic": write_mimic,
    "fhir": write_fhir,
}


def write_pmdata(root: Path, last: date = date(2020, 1, 31)) -> Path:
    """One person's January, as far as `last`."""
    days = [date(2020, 1, 1) + timedelta(i) for i in range(31)]
    days = [day for day in days if day <= last]
    fitbit = root / "pmdata" / "p03" / "fitbit"
    minutes = [{"dateTime": f"{day} 00:00:00", "value": str(600 + day.day)} for day in days]
    write_csv(fitbit / "sedentary_minutes.json", json.dumps(minutes))
    night = {"minutesAsleep": 400, "minutesAwake": 30, "timeInBed": 430, "efficiency": 93, "levels": {}}
    nights = [{"dateOfSleep": str(day), "startTime": f"{day}T00:30:00", **night} for day in days]
    naps = [{**entry, "timeInBed": 20, "minutesAsleep": 20} for entry in nights[:3]]
    write_csv(fitbit / "sleep.json", json.dumps(nights + naps))
    questions = "effective_time_frame,fatigue,mood,readiness,sleep_quality,soreness,stress"
    reports = [f"{day}T08:00:00.000Z,{1 + day.day % 5},3,{day.day % 11},3,3,0" for day in days]
    write_csv(root / "pmdata" / "p03" / "pmsys" / "wellness.csv", "\n".join([questions, *reports, ""]))
    return root
