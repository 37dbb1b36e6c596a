"""Models that read the text of a note (`attnzoo.models.Ldam`) behind POST /v1/predict.

`protocol` reads the request, `reader` computes, `explanations` says what a prediction looked at word by word, `answer`
writes the reply. A model that reads measurements beside the text takes them as all clinical models do
(`serve.clinical.intake`). No log holds a word of a text.
"""
