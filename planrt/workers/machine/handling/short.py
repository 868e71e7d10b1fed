"""Which events are handled in no time, as far as is known: these are not worth a thread of their own. No I/O.

Parties of a sharing group exchange some twenty messages for a step of training, and what each of them sets off takes a
millisecond. To hand it to another thread and back takes a third of that. Everything else may take long, or is told as
taking long: what a client posts is looked at as far as it is a single program on shares.
"""

from __future__ import annotations

from planrt.workers.machine.events import Arrived, Event, PeerAnswered, Received, TimePassed
from planrt.workers.machine.handling.parts import Parts
from planrt.workers.machine.handling.requests import Requests
from planrt.workers.wire import messages as m


def is_short(parts: Parts, requests: Requests, event: Event) -> bool:
    """Returns whether what comes of an event takes no more than `pace.SHORT` seconds of a processor's time."""
    if isinstance(event, Received):
        match event.envelope.body:
            case m.Opening() | m.Corrections() as body:
                return parts.parties.is_short(body)
            case m.AskNeeds() | m.ReadTraffic():
                return True
            case m.Post() as body:
                session = parts.sessions.get(event.connection)
                return session is not None and parts.eager.is_short(session, body)
            case m.PutShare() as body:
                return parts.parties.is_short_put(body)
            case m.Fetch(id):
                return parts.parties.is_short_fetch(id)
        return False
    if isinstance(event, PeerAnswered | TimePassed):
        asked = requests.waiting_for(event.key)
        if not isinstance(asked, m.Deal):
            return False
        if isinstance(event, TimePassed):
            return parts.dealers.is_short_ahead(asked.group, event.key)
        return parts.dealers.is_short(asked.group, event.body)
    return isinstance(event, Arrived)
