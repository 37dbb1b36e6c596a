"""The 27 items of TRIPOD+AI, which a report on a prediction model answers, in our words.

Source: Collins et al., "TRIPOD+AI statement: updated guidance for reporting clinical prediction models that use
regression or machine learning methods", BMJ 2024;385:e078378, doi 10.1136/bmj-2023-078378; tripod-statement.org has the
checklist in its own words. Items have parts, written 3a, 3b, 3c.
"""

from typing import NamedTuple

SOURCE = "Collins et al., BMJ 2024;385:e078378 (doi 10.1136/bmj-2023-078378), items in our words"


class ReportItem(NamedTuple):
    """One item or part of one. section: of a report. asks: what the report is to say."""

    number: str
    section: str
    asks: str


_TABLE = """
1|title|that a prediction model is developed or evaluated, for whom, and of what outcome
2|abstract|a structured summary
3a|introduction|the medical context, why a model is wanted, and which ones there are
3b|introduction|for whom it is meant, where in their care, and who is to use it
3c|introduction|known inequalities of health between groups of people
4|introduction|the aim: development, evaluation, or both
5a|methods|where the data come from, why these, and whom they represent
5b|methods|dates of the data, and of the end of follow-up
6a|methods|the setting: kind of care, number and places of centres
6b|methods|who was eligible
6c|methods|treatments, and how they were dealt with
7|methods|preparation and checks of the data
8a|methods|the outcome, its time horizon, and how and when it was assessed
8b|methods|who assessed an outcome that takes judgement
8c|methods|whether its assessors knew the predictors
9a|methods|how predictors were chosen
9b|methods|what each predictor is, and how and when it was measured
9c|methods|who assessed predictors that take judgement
10|methods|how the sample size came about, and whether it suffices
11|methods|what was done about missing data
12a|methods|which data served development, tuning and evaluation
12b|methods|how predictors entered the analysis: scales, transformations, limits
12c|methods|kind of model and why, how it was built, how hyperparameters were found, internal validation
12d|methods|how differences between clusters, as hospitals, were examined
12e|methods|measures and figures of performance
12f|methods|updating of the model after its evaluation, as recalibration
12g|methods|how predictions were calculated for the evaluation
13|methods|whether classes were balanced, why, and recalibration after it
14|methods|what was done for fairness
15|methods|what the model puts out; thresholds and their reason
16|methods|how the data of development and of evaluation differ
17|methods|ethical approval and consent
18a|open science|funding
18b|open science|conflicts of interest
18c|open science|where the protocol is
18d|open science|registration of the study
18e|open science|where the data are
18f|open science|where the code is
19|involvement|how patients and the public took part
20a|results|flow of participants, with and without the outcome, and follow-up
20b|results|their characteristics, dates, and what is missing
20c|results|how participants of the evaluation differ from those of the development
21|results|participants and events in each analysis
22|results|the whole model, so that others can predict with it
23a|results|performance with intervals, also in groups of people
23b|results|how performance differs between clusters
24|results|results of updating
25|discussion|what the results mean, fairness included
26|discussion|limitations
27a|discussion|how a user deals with poor or missing input
27b|discussion|what users must do and know
27c|discussion|what should come next
"""
ITEMS = tuple(ReportItem(*line.split("|")) for line in _TABLE.strip().splitlines())
