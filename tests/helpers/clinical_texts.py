"""Texts of patients made up for tests: which words a text holds says what its label is."""

from pathlib import Path

import numpy as np

from attnzoo.clinical.cohort import Cohort
from attnzoo.clinical.grid import Grid
from tests.helpers.clinical_files import write_csv

TOPICS = {"ALLERGY": ("penicillin", "rash"), "LABS": ("sodium", "urine"), "CC": ("burned", "hand")}
FILLERS = ("doctor", ":", "how", "are", "you", "?", "patient", "i", "am", "fine", "today", ".", "and", "well")


def text_cohort(rows: int = 60, *, variables: tuple[str, ...] = (), seed: int = 0, planted: int = 2) -> Cohort:
    """A text of fillers with `planted` words of its topic; one label of three is 1. With variables, series of them that
    say nothing."""
    rng = np.random.default_rng(seed)
    topic_N = np.arange(rows) % 3
    texts = []
    for topic in topic_N:
        words = list(rng.choice(FILLERS, size=rng.integers(6, 12)))
        for word in rng.choice(list(TOPICS.values())[topic], size=planted):
            words.insert(int(rng.integers(len(words) + 1)), str(word))
        texts.append(" ".join(words))
    counts_NTV = rng.poisson(0.5, (rows, 4 if variables else 0, len(variables))).astype(np.uint8)
    values_NTV = np.where(counts_NTV > 0, rng.normal(80, 9, counts_NTV.shape), np.nan).astype(np.float32)
    return Cohort(
        name="made up texts",
        grid=Grid(values_NTV, counts_NTV, np.full(rows, counts_NTV.shape[1]), variables),
        statics_NS=np.zeros((rows, 0), np.float32),
        statics=(),
        stay_ids=tuple(f"text {i}" for i in range(rows)),
        patient_ids=None,
        labels={name: (topic_N == i).astype(np.float32) for i, name in enumerate(TOPICS)},
        texts=tuple(texts),
    )


def write_eicu_texts(root: Path, *, stays: int = 48, hours: int = 99, later: bool = True) -> Path:
    """eICU tables in which "shock" was written of those who died; what is written after `hours` says it of nobody."""
    rng = np.random.default_rng(0)
    header = "patientunitstayid,uniquepid,unitdischargeoffset,hospitaldischargestatus,gender,age,admissionheight,"
    patients, labs, diagnoses, vitals = [], [], [], []
    for stay in range(1, stays + 1):
        died = stay % 3 == 0
        patients.append(f"{stay},p{stay},3000,{'Expired' if died else 'Alive'},Male,{40 + stay},170,70")
        rows = [(60 * int(hour), rng.integers(60, 100)) for hour in rng.integers(0, 40, 8)]
        vitals += [f"{stay},{minute},{value},37,97,,,," for minute, value in rows if minute < hours * 60]
        labs.append(f"{stay},30,30,sodium,{rng.integers(130, 150)},mmol/L,")
        written = [(10, "cardiovascular|shock" if died else "observation"), (50, rng.choice(["pain", "fever"]))]
        written += [(1500, "morgue" if died else "home")] if later else []
        diagnoses += [f"{stay},{minute},{text}" for minute, text in written]
    lab_header = "patientunitstayid,labresultoffset,labresultrevisedoffset,labname,labresult,labmeasurenamesystem,"
    vital_header = "patientunitstayid,observationoffset,heartrate,temperature,sao2,respiration,systemicsystolic,"
    write_csv(root / "patient.csv", "\n".join([header + "admissionweight", *patients, ""]))
    write_csv(root / "lab.csv", "\n".join([lab_header + "labmeasurenameinterface", *labs, ""]))
    write_csv(root / "vitalPeriodic.csv", "\n".join([vital_header + "systemicdiastolic,systemicmean", *vitals, ""]))
    write_csv(root / "diagnosis.csv", "\n".join(["patientunitstayid,diagnosisoffset,diagnosisstring", *diagnoses, ""]))
    return root
