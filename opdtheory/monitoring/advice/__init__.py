"""Which estimator has the least error in its gradient, from what the teacher can send (T19)."""

from opdtheory.monitoring.advice.recommendation import Found, recommend
from opdtheory.monitoring.advice.record import Advice, Choice

__all__ = ["Advice", "Choice", "Found", "recommend"]
