"""Diffusion models behind POST /v1/images/generations and /v1/images/compose: pictures of words, and objects composed
into pictures.

`protocol` reads the requests, `drafts` turns them into pictures to be made, `studio` has the model and the thread that
makes them, one after another, `answer` sends them whole or step by step and ends the work when the client is gone, and
`routes` adds the paths to the application. The page that asks is in `page`.
"""
