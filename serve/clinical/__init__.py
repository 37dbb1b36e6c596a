"""Clinical models behind POST /v1/predict: what a request gives of patients, what is predicted, and how it is told.

`protocol` reads the request, `intake` (or `fhir`) turns it into a cohort and keeps account of every value,
`predictor` computes, `explanations` says what a prediction looked at, `answer` writes the reply, `clinic` runs the work
beside the event loop within limits, and `routes` adds the path to the application. Models that read texts are in
`notes`. Nothing here is for decisions about patients.
"""
