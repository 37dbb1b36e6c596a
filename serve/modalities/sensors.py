"""Daily sensor data in a message: values by sensor and day, in UCUM units, become virtual tokens (PH-LLM).

Nothing is guessed: an unknown sensor or unit, an impossible value and another number of days are refused. Implausible
values are clipped by the rule of training (`attnzoo.clinical.events`); sensors that are left out count as not measured.
"""

from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError
from torch import Tensor

from attnzoo.clinical.cohort import Cohort, StayFacts, cohort_of
from attnzoo.clinical.events import Events
from attnzoo.clinical.trained_sensors import TrainedSensors
from attnzoo.clinical.units import convert, scale_of, spellings, unknown_unit
from attnzoo.clinical.variables import Variable
from attnzoo.errors import suggest
from serve.modalities.base import Content, Modality
from serve.openai.errors import ApiError, short_name
from serve.openai.invalid import explain_invalid
from serve.openai.protocol import Label, Strict

MAX_DAYS, MAX_CHANNELS = 366, 256
DAY_MINUTES = 24 * 60

Value = Annotated[float, Field(ge=-1e9, le=1e9)]


class SensorChannel(Strict):
    """The days of one sensor. unit: in UCUM; "1" for a number without a unit. values: one a day, the earliest first;
    null where nothing was measured."""

    variable: Label
    unit: Label
    values: Annotated[list[Value | None], Field(fail_fast=True, min_length=1, max_length=MAX_DAYS)]


class SensorData(Strict):
    """What the sensors of one person measured. Sensors of the model that are left out count as not measured."""

    channels: Annotated[list[SensorChannel], Field(fail_fast=True, min_length=1, max_length=MAX_CHANNELS)]


class SensorModality(Modality):
    """Parts of the kind sensor_data, for the adapter of an export."""

    kind, body = "sensor_data", SensorData

    def __init__(self, trained: TrainedSensors) -> None:
        self.trained, self.table, self.days = trained, trained.table, trained.statistics.days
        self.rows = trained.adapter.config.tokens

    def read(self, value: Any, where: str) -> Content:
        """The content is a `Cohort` of one row."""
        try:
            given = SensorData.model_validate(value)
        except ValidationError as error:
            raise explain_invalid(error, where, _fields) from None
        places = {name: place for place, name in enumerate(self.table)}
        values_VT = np.full((len(places), self.days), np.nan)
        seen: dict[str, int] = {}
        for number, channel in enumerate(given.channels):
            name, at = channel.variable, f"{where}.channels[{number}]"
            variable = self._variable(channel, at)
            if name in seen:
                what = f"{at}.variable={name!r} is that of channels[{seen[name]}] too; give each sensor once"
                raise ApiError(400, what, param=f"{at}.variable")
            seen[name] = number
            if len(channel.values) != self.days:
                what = (
                    f"{at}.values has {len(channel.values)} values, and this model takes {self.days} days; give one a "
                    "day, null where nothing was measured"
                )
                raise ApiError(400, what, param=f"{at}.values")
            values_VT[places[name]] = _converted(channel, variable, at)
        if np.isnan(values_VT).all():
            raise ApiError(400, f"{where} holds no measured value; give at least one", param=where)
        return Content(self.rows, self._cohort(values_VT))

    def _variable(self, channel: SensorChannel, at: str) -> Variable:
        """Raises ApiError for a sensor that the model does not have, and for a unit that is not known for it."""
        shown = short_name(channel.variable)
        if channel.variable not in self.table:
            known = suggest(shown, self.table) or f"; known: {', '.join(self.table)}"
            raise ApiError(400, f"{at}.variable={shown!r} is no sensor of this model{known}", param=f"{at}.variable")
        variable = self.table[channel.variable]
        if scale_of(variable, channel.unit) is None:
            what = f"{at}.unit: {unknown_unit(variable, short_name(channel.unit))}"
            raise ApiError(400, what, param=f"{at}.unit")
        return variable

    def _cohort(self, values_VT: np.ndarray) -> Cohort:
        """One row with these days."""
        place_E, day_E = np.nonzero(~np.isnan(values_VT))
        events = Events(
            np.zeros(len(place_E), np.int32),
            (day_E * DAY_MINUTES).astype(np.int32),
            place_E.astype(np.int16),
            values_VT[place_E, day_E].astype(np.float32),
        )
        facts = StayFacts(name="request", hours_N=np.array([self.days]), statics={}, stay_ids=("1",))
        return cohort_of(facts, events, self.table, self.days, step_hours=24)

    def encode(self, content: Content) -> Tensor:
        """The virtual tokens."""
        return self.trained.embeddings(content.value)[0]

    def card(self) -> dict[str, Any]:
        """Days and sensors that the model takes, and the yes/no questions it was trained with."""
        variables = [
            {
                "name": variable.name,
                "meaning": variable.meaning,
                "unit": variable.unit,
                "plausible": list(variable.plausible),
                "units": spellings(variable),
            }
            for variable in self.table.values()
        ]
        return {
            "days": self.days,
            "embeddings": self.rows,
            "variables": variables,
            "trained_with": {
                "template": self.trained.questions.template,
                "questions": self.trained.questions.questions,
            },
        }


def _converted(channel: SensorChannel, variable: Variable, at: str) -> np.ndarray:
    """[T] in the model's unit, NaN where nothing was measured. Raises ApiError for an impossible value."""
    least, most = variable.possible
    found_T = np.full(len(channel.values), np.nan)
    for day, value in enumerate(channel.values):
        if value is None:
            continue
        found_T[day] = float(convert(variable, value, channel.unit))
        if not least <= np.float32(found_T[day]) <= most:
            what = (
                f"{at}.values[{day}]={value:g} {short_name(channel.unit)} is outside of {least:g} to {most:g} "
                f"{variable.unit}, which is possible; correct it, or send null"
            )
            raise ApiError(400, what, param=f"{at}.values[{day}]")
    return found_T


def _fields(where: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that the object at a place may have."""
    return list(SensorChannel.model_fields if "channels" in where[:-1] else SensorData.model_fields)
