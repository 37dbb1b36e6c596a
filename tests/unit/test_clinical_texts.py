"""Texts of patients: the dialogues of MTS-Dialog, what was written of a stay, words, and folds by several labels."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attnzoo.clinical.definitions import SECTIONS, definitions
from attnzoo.clinical.formats import load_cohort
from attnzoo.clinical.splits import folds
from attnzoo.clinical.words import UNKNOWN, Vocabulary, cooccurrence_vectors, spans, tokens
from tests.helpers.clinical_data import shared_data, small_cohort
from tests.helpers.clinical_files import write_csv, write_eicu

HEADER = "ID,section_header,section_text,dialogue\n"


def test_dialogues_are_rows_and_the_note_is_not_read(tmp_path: Path) -> None:
    write_csv(tmp_path / "TrainingSet.csv.gz", HEADER + '0,ALLERGY,secretnote,"Doctor: Any?\nPatient: No, none."\n')
    write_csv(tmp_path / "MTS-Dialog-ValidationSet.csv", HEADER + "0,fam/sochx,secretnote,Do you smoke?\n")
    cohort = load_cohort("mts_dialog", tmp_path)
    assert cohort.texts == ("Doctor: Any?\nPatient: No, none.", "Do you smoke?")
    assert cohort.stay_ids == ("training 0", "validation 0")
    assert [[name for name, value in cohort.labels.items() if value[row]] for row in (0, 1)] == [
        ["ALLERGY"],
        ["FAM/SOCHX"],
    ]
    assert "secretnote" not in repr(cohort)
    assert load_cohort("mts_dialog", tmp_path, parts=("validation",)).stay_ids == ("validation 0",)
    for line, told in [
        ("1,ALLERGIES,x,Hello", "line 2: section_header='ALLERGIES' is no section; did you mean 'ALLERGY'"),
        ("1,ALLERGY,x,", "line 2: dialogue='' is empty"),
    ]:
        write_csv(tmp_path / "MTS-Dialog-ValidationSet.csv", HEADER + line + "\n")
        with pytest.raises(ValueError, match=told):
            load_cohort("mts_dialog", tmp_path)
    with pytest.raises(ValueError, match="parts holds 'test'"):
        load_cohort("mts_dialog", tmp_path, parts=("test",))
    with pytest.raises(ValueError, match=r"has no TrainingSet\.csv"):
        load_cohort("mts_dialog", write_csv(tmp_path / "other" / "x.csv", "") or tmp_path / "other")


def test_the_whole_data_set_has_equal_shares_of_sections_in_all_folds() -> None:
    cohort = load_cohort("mts_dialog", shared_data("mts_dialog"))
    assert len(cohort) == 1301
    names = tuple(cohort.labels)
    table_NK = np.stack([cohort.labels[name] for name in names], axis=1)
    assert (table_NK.sum(1) == 1).all()
    counts = dict(zip(names, table_NK.sum(0).astype(int).tolist(), strict=True))
    assert (counts["FAM/SOCHX"], counts["EDCOURSE"], counts["LABS"]) == (373, 11, 3)
    for fold in folds(cohort, 5, by="stay", label=names):
        assert np.abs(table_NK[fold.test].sum(0) - table_NK.sum(0) / 5).max() <= 1
    with pytest.raises(ValueError, match="label='los' is not one 0 or 1 for each row"):
        folds(replace(cohort, labels={**cohort.labels, "los": table_NK @ np.arange(20)}), 5, by="stay", label=("los",))


def test_texts_of_a_stay_are_those_before_the_cut(tmp_path: Path) -> None:
    """Built from files that end at the cut, the texts are the same; later ones change nothing."""
    for directory, late in ((tmp_path / "whole", True), (tmp_path / "cut", False)):
        write_eicu(directory)
        rows = "1,30,sepsis\n1,-20,fall\n2,1439,shock\n1,40,sepsis\n" + ("1,1440,death\n2,9000,gone\n" if late else "")
        write_csv(directory / "diagnosis.csv", f"patientunitstayid,diagnosisoffset,diagnosisstring\n{rows}")
    whole, cut = (load_cohort("eicu", tmp_path / name, texts=True, hours=24) for name in ("whole", "cut"))
    assert whole.texts == cut.texts == ("fall\nsepsis", "shock")
    assert load_cohort("eicu", tmp_path / "whole", hours=24).texts is None
    later = load_cohort("eicu", tmp_path / "whole", texts=True, hours=25)
    assert later.texts == ("fall\nsepsis\ndeath", "shock")
    with pytest.raises(ValueError, match="texts has 1 rows for 40 stays"):
        replace(small_cohort(), texts=("one",))
    real = shared_data("eicu_demo_text")
    with gzip.open(real / "diagnosis.csv.gz", "rt") as file:
        assert "patientunitstayid" in file.readline()
    assert sum(map(bool, load_cohort("eicu", real, texts=True).texts or ())) == 103


def test_words_are_those_of_training_texts() -> None:
    text = "Doctor: Don't take 25 mg of Zoloft_x!"
    assert tokens(text) == ["doctor", ":", "don't", "take", "2", "5", "mg", "of", "zoloft", "_", "x", "!"]
    assert [text[start:end].lower() for start, end in spans(text)] == tokens(text)
    vocabulary = Vocabulary.fit(["a b b c", "a c d"], least=2, also=["flu shot"])
    assert vocabulary.words == (UNKNOWN, "a", "c", "flu", "shot")
    assert vocabulary.encode("C shot of a") == [2, 4, 0, 1]
    words_NL, lengths_N = vocabulary.inputs(["a c a", "", "c"], longest=2)
    assert words_NL.tolist() == [[1, 2], [0, 0], [2, 0]]
    assert lengths_N.tolist() == [2, 0, 1]
    assert Vocabulary.from_dict(vocabulary.to_dict()) == vocabulary
    for values, told in [({"words": ["a"]}, "must begin with '<unknown>'"), ({"words": [UNKNOWN, "a", "a"]}, "twice")]:
        with pytest.raises(ValueError, match=told):
            Vocabulary.from_dict(values)
    assert definitions(("LABS", "mine"), {"mine": "my own"}) == (SECTIONS["LABS"], "my own")
    with pytest.raises(ValueError, match="label 'LAB' has no definition; did you mean 'LABS'"):
        definitions(("LAB",))


def test_words_with_the_same_neighbours_have_near_vectors() -> None:
    """1 and 2 stand between the same words and never together; 3 stands elsewhere. Word 9 is in no text."""
    texts = [[4, 1, 5], [4, 2, 5], [6, 3, 7], [8, 3, 6], [5, 4], [7, 8]] * 3
    vectors_WD = cooccurrence_vectors(texts, 10, 6, window=1)
    near = torch.nn.functional.cosine_similarity
    assert near(vectors_WD[1], vectors_WD[2], dim=0) > 0.95
    assert near(vectors_WD[1], vectors_WD[3], dim=0) < 0.3
    assert not vectors_WD[9].any()
    assert float(vectors_WD.square().mean()) == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(vectors_WD, cooccurrence_vectors(texts, 10, 6, window=1))
    assert cooccurrence_vectors([[], [1]], 3, 5).shape == (3, 5)
