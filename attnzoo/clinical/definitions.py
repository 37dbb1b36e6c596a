"""What labels mean, in words: what LDAM reads beside a text.

MTS-Dialog (Ben Abacha et al., EACL 2023, github.com/abachaa/MTS-Dialog) abbreviates the 20 sections of a note; its
README writes the abbreviations out, and the sentences below say what such a section of a clinical note holds. They were
written once, before any figure was measured, and no dialogue was quoted.
"""

from collections.abc import Mapping, Sequence

from attnzoo.errors import suggest

SECTIONS = {
    "FAM/SOCHX": "family history and social history: diseases of mother, father, brothers, sisters and children; "
    "smoking, alcohol, drugs; work, marriage, living at home",
    "GENHX": "history of present illness: how the symptoms began, how long they last, what makes them better or worse, "
    "pain, and why the patient comes today",
    "PASTMEDICALHX": "past medical history: diseases and conditions that the patient has had before, such as diabetes, "
    "high blood pressure or asthma",
    "CC": "chief complaint: in short, the problem or pain that brings the patient in today",
    "PASTSURGICAL": "past surgical history: surgeries and operations in the past, what was removed or repaired, and "
    "when",
    "ALLERGY": "allergies: whether the patient is allergic to any drugs, medications or food, such as penicillin, and "
    "the reaction",
    "ROS": "review of systems: questions about every part of the body; fever, chills, cough, chest pain, shortness of "
    "breath, nausea, vomiting, headache; the patient denies or confirms",
    "MEDICATIONS": "medications: which medicines, pills and supplements the patient is taking now, with dose in "
    "milligrams and times a day",
    "ASSESSMENT": "assessment: what the doctor thinks of the problems, how the patient responds to treatment, and the "
    "impression",
    "EXAM": "physical examination: what the doctor sees, hears and feels; blood pressure, heart, lungs, abdomen, skin "
    "and eyes are normal or not",
    "DIAGNOSIS": "diagnosis: the names of the diseases that were found",
    "DISPOSITION": "disposition: where the patient goes after the visit; discharged home, admitted to the hospital, "
    "stable condition, follow up",
    "PLAN": "plan: what will be done next; tests to order, medications to start or continue, referral, next "
    "appointment",
    "EDCOURSE": "emergency department course: what was done and given in the emergency room, and how the patient did "
    "there",
    "IMMUNIZATIONS": "immunizations: vaccines and shots, such as flu, tetanus, pneumonia, and whether they are up to "
    "date",
    "IMAGING": "imaging: results of x ray, scan, ultrasound and electrocardiogram",
    "GYNHX": "gynecologic history: periods, pregnancies, births, menopause, pap smears, birth control",
    "PROCEDURES": "procedures: what was placed, taken out or carried out on the patient during this treatment",
    "OTHER_HISTORY": "other history: anything else of the past that no other section holds",
    "LABS": "laboratory: results of blood and urine tests, such as sodium, creatinine and thyroid levels",
}
DEFINITIONS: Mapping[str, str] = {
    **SECTIONS,
    "mortality": "death in hospital: shock, failure of organs, cardiac arrest, sepsis, ventilation, comfort care",
}
"""By the name of a cohort's label."""


def definitions(labels: Sequence[str], own: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The definition of each label; `own` ones come first. Raises ValueError for a label without one."""
    known = {**DEFINITIONS, **(own or {})}
    for label in labels:
        if label not in known:
            raise ValueError(
                f"label {label!r} has no definition{suggest(label, known)}; say in words what it means, with "
                "task.definitions"
            )
    return tuple(known[label] for label in labels)
