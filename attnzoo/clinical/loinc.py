"""LOINC codes: which quantity an observation of another system measures.

Several codes stand for one quantity: by sample, by method, by mass or by amount of substance. What is left out on
purpose: gases of venous blood, urea by mass, amounts of urine over a whole day, pressures of single cuffs' positions.
LOINC (https://loinc.org) is copyright Regenstrief Institute, Inc. and the LOINC Committee, and free to use under
https://loinc.org/license .
"""

from attnzoo.clinical.variables import Table

SYSTEMS = ("http://loinc.org", "urn:oid:2.16.840.1.113883.6.1")
"""The names of LOINC as a system of codes."""

_CODES = {
    "heart_rate": "8867-4 8889-8 76282-3",
    "respiratory_rate": "9279-1",
    "spo2": "59408-5 2708-6 20564-1",
    "temperature": "8310-5 8331-1 8332-9 8333-7 8328-7 8329-5",
    "systolic_pressure": "8480-6 76534-7",
    "diastolic_pressure": "8462-4 76535-4",
    "mean_pressure": "8478-0 76536-2",
    "gcs": "9269-2",
    "gcs_eye": "9267-6",
    "gcs_motor": "9268-4",
    "gcs_verbal": "9270-0",
    "fio2": "3150-0 19994-3",
    "urine": "9187-6",
    "albumin": "1751-7 61151-7 61152-5",
    "alkaline_phosphatase": "6768-6",
    "alt": "1742-6 1743-4 1744-2",
    "ast": "1920-8 30239-8",
    "base_excess": "11555-0 1925-7",
    "bicarbonate": "1963-8 1959-6 1960-4 2028-9",  # the last: total carbon dioxide, the bicarbonate of US panels
    "bilirubin": "1975-2 14631-6",
    "direct_bilirubin": "1968-7 14629-0",
    "bands": "26508-2 764-1",
    "bun": "3094-0 6299-2 14937-7 22664-7",
    "calcium": "17861-6 2000-8",
    "ionized_calcium": "1995-0 1994-3 12180-6",
    "cholesterol": "2093-3 14647-2",
    "creatine_kinase": "2157-6",
    "creatine_kinase_mb": "13969-1",
    "chloride": "2075-0 2069-3",
    "creatinine": "2160-0 14682-9 38483-4",
    "crp": "1988-5 30522-7",
    "fibrinogen": "3255-7",
    "glucose": "2345-7 2339-0 2340-8 41653-7 14749-6 15074-8",
    "hematocrit": "4544-3 20570-8",
    "hemoglobin": "718-7 20509-6 59260-0",
    "inr": "6301-6 34714-6",
    "potassium": "2823-3 6298-4",
    "lactate": "2524-7 32693-4 2518-9 14118-4",
    "lymphocytes": "736-9 26478-8 737-7",
    "mch": "785-6 28539-5",
    "mchc": "786-4 28540-3",
    "mcv": "787-2 30428-7",
    "methemoglobin": "2614-6 2615-3",
    "magnesium": "19123-9 2601-3",
    "sodium": "2951-2 2947-0",
    "neutrophils": "770-8 26511-6",
    "paco2": "2019-8",
    "pao2": "2703-7",
    "ph": "2744-1 11558-4",
    "phosphate": "2777-1 14879-1",
    "platelets": "777-3 26515-7 778-1",
    "ptt": "3173-2 14979-9",
    "troponin_i": "10839-9 89579-7",
    "troponin_t": "6598-7 67151-1",
    "wbc": "6690-2 26464-8 804-5",
    "weight": "29463-7 3141-9",
    "height": "8302-2 3137-7",
}
_ARTERIAL_LINE = {"systolic_pressure": "76215-3", "diastolic_pressure": "76213-8", "mean_pressure": "76214-6"}
QUANTITIES = {code: quantity for quantity, codes in _CODES.items() for code in codes.split()} | {
    code: quantity for quantity, code in _ARTERIAL_LINE.items()
}
"""By LOINC code: the row of `variables.QUANTITIES`."""


def names_by_code(table: Table) -> dict[str, str]:
    """For each LOINC code the table's variable.

    PhysioNet 2012 has two variables of each blood pressure, by arterial line and (NI) by cuff. There a code that does
    not name the method counts as the cuff's, because the arterial line has codes of its own.
    """
    names = {}
    for code, quantity in QUANTITIES.items():
        both = [name for name, row in table.items() if row.quantity == quantity]
        by_method = [name for name in both if name.startswith("NI") != (code in _ARTERIAL_LINE.values())]
        if both:
            names[code] = both[0] if len(both) == 1 else by_method[0]
    return names
