"""POST /v1/predict: risks of patients, from JSON or FHIR, whole or hour by hour, as JSON or as RiskAssessments; and
labels of their texts, from JSON."""

from contextlib import ExitStack
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from attnzoo.report import counted
from serve.clinical.accept import FHIR, prefers_fhir
from serve.clinical.answer import guard_of, head, hour_of, patients_of, reply
from serve.clinical.clinic import Clinic
from serve.clinical.fhir import assessments, read_bundle
from serve.clinical.intake import Intake, take_in
from serve.clinical.notes.answer import reply as notes_reply
from serve.clinical.notes.protocol import parse_notes
from serve.clinical.notes.reader import NoteReader
from serve.clinical.predictor import HourByHour, Predictor
from serve.clinical.protocol import PredictOptions, parse_bundle_options, parse_predict, read_values
from serve.config import ServeConfig
from serve.openai.errors import ApiError, dump, event, short_name
from serve.workplace import Deadline

PATH = "/v1/predict"


def add_predictions(app: FastAPI, clinic: Clinic) -> None:
    """Adds the path to an application."""

    @app.post(PATH)
    async def predict(request: Request) -> Response:
        body = await request.body()
        with ExitStack() as held:
            deadline = held.enter_context(clinic.admitted())
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() == FHIR:
                options: PredictOptions = parse_bundle_options(request.query_params.multi_items())
                model = clinic.of_bundles(options.model)
                check_explain(options, model)
                intake = await clinic.work(deadline, read_bundle, body, options, model)
            else:
                refuse_query(request)
                values = await clinic.work(deadline, read_values, body)
                found = clinic.find(values["model"])
                if isinstance(found, NoteReader):
                    refuse_fhir(request, found)
                    content = await clinic.work(deadline, read_notes, found, values, clinic.config, deadline)
                    return Response(content, media_type="application/json")
                model, options = found, await clinic.work(deadline, parse_predict, values)
                check_explain(options, model)
                intake = await clinic.work(deadline, take_in, options, model.needs)
            check_size(options, intake, clinic.config.max_explained)
            if _wants_fhir(request, options):
                content = await clinic.work(deadline, _assessed, model, intake, options, deadline)
                return Response(content, media_type=FHIR)
            if options.stream:
                return HourStream(clinic, model, intake, options, deadline, held.pop_all())
            content = await clinic.work(deadline, _replied, model, intake, options, deadline)
            return Response(content, media_type="application/json")


def refuse_query(request: Request) -> None:
    """Raises ApiError for options in the query of a request in JSON."""
    query = request.query_params.multi_items()
    if query:
        name = short_name(query[0][0])
        raise ApiError(400, f"{name} stands in the query; options of a JSON request stand in its body", param=name)


def refuse_fhir(request: Request, reader: NoteReader) -> None:
    """Raises ApiError where an answer about texts is wanted as a FHIR resource."""
    if prefers_fhir(request.headers.getlist("accept")):
        text = f"the labels of a text have no place in a RiskAssessment; of {reader.name!r} accept application/json"
        raise ApiError(400, text, param="accept", code="unsupported")


def read_notes(reader: NoteReader, values: dict[str, Any], config: ServeConfig, deadline: Deadline) -> bytes:
    """The reply to a request to a model of texts. Raises ApiError 400."""
    asked = parse_notes(values, reader.trained.labels, reader.needs is not None)
    _check_explained(asked.explain, len(asked.patients), config.max_explained)
    return dump(notes_reply(reader, reader.take_in(asked), asked, deadline))


def check_explain(options: PredictOptions, predictor: Predictor) -> None:
    """Raises ApiError for an explanation that a model does not have."""
    if options.explain not in ("none", *predictor.explains):
        text = (
            f"explain={options.explain!r} is not possible: a model that predicts every hour pools no attention; take "
            f"{' or '.join(map(repr, predictor.explains))}"
        )
        raise ApiError(400, text, param="explain")


def check_size(options: PredictOptions, intake: Intake, max_explained: int) -> None:
    """Raises ApiError for more patients than this form of the answer takes."""
    patients = len(intake.patients)
    if options.stream and patients != 1:
        raise ApiError(400, f"stream takes one patient; {patients} are given", param="stream")
    _check_explained(options.explain, patients, max_explained)


def _check_explained(explain: str, patients: int, max_explained: int) -> None:
    if explain != "none" and patients > max_explained:
        text = (
            f"explain={explain!r} takes at most {counted(max_explained, 'patient')} (max_explained); {patients} are "
            "given: send several requests, or explain='none'"
        )
        raise ApiError(400, text, param="explain", code="too_many_patients")


def _wants_fhir(request: Request, options: PredictOptions) -> bool:
    if not prefers_fhir(request.headers.getlist("accept")):
        return False
    for name, neutral in (("stream", False), ("explain", "none"), ("hourly", False)):
        if getattr(options, name) != neutral:
            text = f"{name} has no place in a RiskAssessment; leave it out, or accept application/json"
            raise ApiError(400, text, param=name)
    return True


def _replied(predictor: Predictor, intake: Intake, options: PredictOptions, deadline: Deadline) -> bytes:
    return dump(reply(predictor, intake, options.explain, options.hourly, deadline))


def _assessed(predictor: Predictor, intake: Intake, options: PredictOptions, deadline: Deadline) -> bytes:
    patients = patients_of(predictor, intake, options.explain, None, deadline)
    return dump(assessments(predictor, intake, patients))


class HourStream(StreamingResponse):
    """Server-sent events: one for each hour of the one patient, then the whole reply."""

    def __init__(
        self,
        clinic: Clinic,
        predictor: Predictor,
        intake: Intake,
        options: PredictOptions,
        deadline: Deadline,
        held: ExitStack,
    ) -> None:
        self._held = held
        headers = {"cache-control": "no-cache"}
        events = hourly_events(clinic, predictor, intake, options, deadline)
        super().__init__(events, headers=headers, media_type="text/event-stream; charset=utf-8")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


async def hourly_events(
    clinic: Clinic, predictor: Predictor, intake: Intake, options: PredictOptions, deadline: Deadline
) -> Any:
    """The events as bytes. A failure on the way is an event of its own, and the last one."""
    hours = list[dict[str, Any]]()
    try:
        course, guard = await clinic.work(
            deadline, lambda: (HourByHour(predictor, intake), guard_of(predictor, intake))
        )
        for hour in range(1, course.number + 1):
            (told,) = predictor.told(await clinic.work(deadline, course.next))
            hours.append(hour_of(guard, 0, hour, told))
            yield event({"object": "prediction.hour", **hours[-1]})
        patients = await clinic.work(deadline, patients_of, predictor, intake, options.explain, [hours], deadline)
        found = {**head(predictor), "patients": patients}
        whole = found if intake.bundle is None else {**found, "bundle": intake.bundle}
        yield event(whole) + b"data: [DONE]\n\n"
    except ApiError as error:
        yield event(error.body())
